/* The links of a pattern by kind of rule (global, window, random, content, other), and a schematic: the same rules in few cells. */
"use strict";
(() => {
  const KIND = {
    sees_all: "global", seen_by_all: "global", global_tokens: "global", landmarks: "global",
    window: "window", blocked_window: "window", offsets: "window",
    random_keys: "random", random_blocks: "random",
    clusters: "content", chosen_keys: "content", chosen_blocks: "content",
  };
  const LIMITS = new Set(["causal", "padding", "documents", "full"]);
  const kind = (rule) => (rule.name === "neighborhood" ? "window" : KIND[rule.from || rule.is] || "other");

  /* In this order a link that several rules allow takes its colour. */
  FL.KINDS = ["global", "window", "random", "content", "other"];

  const limits = (rule) => rule.is === "not" || (rule.parts ? rule.parts.every(limits) : LIMITS.has(rule.is));

  /* The part of a rule whose links are of this kind, or null. In an intersection the first part that is no limit decides. */
  function only(rule, name) {
    if (rule.is === "or") {
      const parts = rule.parts.map((part) => only(part, name)).filter(Boolean);
      return parts.length > 1 ? { is: "or", parts } : parts[0] || null;
    }
    if (rule.is === "and" || rule.is === "sub") {
      const at = rule.is === "sub" ? 0 : rule.parts.findIndex((part) => !limits(part));
      if (at < 0) return name === "other" ? rule : null;
      const part = only(rule.parts[at], name);
      return part && { is: rule.is, parts: rule.parts.with(at, part) };
    }
    return (rule.is === "not" ? "other" : kind(rule)) === name ? rule : null;
  }

  const split = new WeakMap();

  /* [{kind, pattern}] of a compiled pattern, kinds without a rule left out; together they allow the same links. */
  FL.byKind = (pattern) => {
    if (!split.has(pattern)) {
      const parts = FL.KINDS.map((name) => ({ kind: name, rule: only(pattern.rule, name) })).filter(({ rule }) => rule);
      split.set(pattern, parts.map(({ kind: name, rule }) => ({ kind: name, pattern: rule === pattern.rule ? pattern : FL.compile(rule, pattern.n) })));
    }
    return split.get(pattern);
  };

  const NOTHING = { is: "not", text: "", parts: [{ is: "full" }] };

  /* The compiled pattern of these kinds alone. */
  FL.ofKinds = (pattern, kinds) => {
    const parts = FL.byKind(pattern).filter(({ kind: name }) => kinds.includes(name));
    if (parts.length === FL.byKind(pattern).length) return pattern;
    if (parts.length === 1) return parts[0].pattern;
    return FL.compile(parts.length ? { is: "or", parts: parts.map((part) => part.pattern.rule) } : NOTHING, pattern.n);
  };

  // ---- schematic ----------------------------------------------------------------------------------------------------
  FL.CELLS = 48;
  const WIDE = 640;

  const extent = (rule) => {
    if (rule.is === "window") return (rule.left + rule.right) * rule.step + 1;
    if (rule.is === "blocked_window") return (rule.left + rule.right + 1) * rule.block;
    return rule.parts ? Math.max(0, ...rule.parts.map(extent)) : 0;
  };

  /* Whether the widest window of a rule over n tokens is thinner than three pixels of a picture. */
  FL.isHairline = (rule, n) => n >= 4096 && extent(rule) > 0 && (extent(rule) * WIDE) / n < 3;

  /* A rule over n tokens drawn with `FL.CELLS` cells: positions keep their place, widths grow with their logarithm. */
  FL.schematic = (rule, n) => {
    const cells = FL.CELLS, cell = (position) => Math.min(cells - 1, Math.floor((position * cells) / n));
    const few = (value, low, top) => Math.max(low, Math.min(top, Math.round(Math.log2(Math.max(1, value)))));
    const size = (value) => (value > 0 ? Math.max(1, Math.round((value * cells) / n), Math.floor(Math.log10(value))) : value === 0 ? 0 : -size(-value));
    const runs = (list) => {
      const out = [];
      for (let x = 0; x < list.length; x += 2) {
        const lo = cell(list[x]), hi = cell(list[x + 1] - 1) + 1;
        if (out.length && lo <= out[out.length - 1]) out[out.length - 1] = Math.max(hi, out[out.length - 1]);
        else out.push(lo, hi);
      }
      return out;
    };
    const atoms = {
      full: () => rule, causal: () => rule,
      window: () => ({ is: "window", left: size(rule.left), right: size(rule.right), step: rule.step > 1 ? 2 : 1 }),
      blocked_window: () => ({ is: "blocked_window", left: Math.min(2, rule.left), right: Math.min(2, rule.right), block: few(rule.block, 2, 3) }),
      strided: () => ({ is: "strided", stride: few(rule.stride, 4, 12), phase: rule.phase === null ? null : 0 }),
      landmarks: () => {
        const every = few(rule.every, 4, 12);
        return { is: "landmarks", every, count: Math.max(1, Math.round((rule.count / rule.every) * every)) };
      },
      offsets: () => ({ is: "offsets", values: [...new Set(Array.from(rule.values, size))] }),
      random_keys: () => ({ ...rule, count: Math.min(3, rule.count) }),
      random_blocks: () => ({ ...rule, count: Math.min(2, rule.count), block: 2 }),
    };
    for (const name of ["sees_all", "seen_by_all", "global_tokens", "padding"]) atoms[name] = () => ({ is: name, runs: runs(rule.runs) });
    for (const name of ["documents", "clusters"]) {
      const sample = (table) => Int32Array.from({ length: cells }, (_, c) => table[Math.floor(((c + 0.5) * n) / cells)]);
      atoms[name] = () => ({ is: name, labels: rule.labels.map(sample) });
    }
    if (rule.parts) return { ...rule, parts: rule.parts.map((part) => FL.schematic(part, n)) };
    return atoms[rule.is] ? atoms[rule.is]() : sampled(rule, n, cell);
  };

  /* A table of links: every cell of rows shows the keys of its middle row. */
  function sampled(rule, n, cell) {
    const pattern = FL.compile(rule, n), first = [0], lo = [], hi = [];
    for (let c = 0; c < FL.CELLS; c++) {
      const seen = new Set();
      pattern.row(Math.floor(((c + 0.5) * n) / FL.CELLS)).runs((a, b) => { for (let x = cell(a); x <= cell(b - 1); x++) seen.add(x); });
      for (const x of [...seen].sort((a, b) => a - b)) lo.push(x), hi.push(x + 1);
      first.push(lo.length);
    }
    return { is: "stretches", name: rule.name, from: rule.is, first, lo, hi };
  }

  FL.colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--rule-${name}`).trim().split(/\s+/).map(Number);

  /* Draws a compiled pattern of few tokens, one square per pair, each in the colour of the first kind that allows it. */
  FL.drawCells = (canvas, pattern, kinds, size) => {
    const parts = FL.byKind(pattern).filter(({ kind: name }) => kinds.includes(name)), context = canvas.getContext("2d"), n = pattern.n;
    canvas.width = canvas.height = size;
    context.clearRect(0, 0, size, size);
    const edge = (x) => Math.round((x * size) / n);
    for (const { kind: name, pattern: part } of parts.reverse()) {
      context.fillStyle = `rgb(${FL.colourOf(name).join(" ")})`;
      for (let i = 0; i < n; i++) {
        part.row(i).runs((lo, hi) => { for (let j = lo; j < hi; j++) context.fillRect(edge(j), edge(i), edge(j + 1) - edge(j) - (size > 6 * n ? 1 : 0), edge(i + 1) - edge(i) - (size > 6 * n ? 1 : 0)); });
      }
    }
  };
})();
