/* By which relays does one token hear of another? The walk of farlight.path: back from the target, layer by layer. */
"use strict";
(() => {
  const RESTRICT = { causal: "past", padding: "real", documents: "document", full: "everything" };
  const REACH = {
    window: "window", blocked_window: "blocked_window", strided: "strided", landmarks: "landmarks", offsets: "offsets",
    random_keys: "random_keys", random_blocks: "random_blocks", blocks: "blocks", pairs: "pairs", clusters: "clusters",
    chosen_keys: "chosen_keys", chosen_blocks: "chosen_blocks", stretches: "listed",
  };

  /* Marks what rows see as known; each key is touched once by runs, and a comb that came before is not walked again. */
  class Known {
    constructor(n) {
      this.level = new Int32Array(n).fill(-1);
      this.next = Int32Array.from({ length: n + 1 }, (_, key) => key);
      this.combs = new Map();
      this.size = 0;
      this.work = 0;
    }

    free(key) {
      const next = this.next;
      let root = key;
      while (next[root] !== root) root = next[root];
      while (next[key] !== root) [next[key], key] = [root, next[key]];
      return root;
    }

    mark(key, level, found) {
      this.level[key] = level;
      this.next[key] = key + 1;
      this.size++;
      found.push(key);
    }

    run(lo, hi, level, found) {
      for (let key = this.free(lo); key < hi; key = this.free(key + 1)) this.mark(key, level, found);
      this.work++;
    }

    comb(lo, hi, step, width, level, found) {
      const name = `${step}:${width}:${lo % step}`, held = this.combs.get(name);
      if (held && held[0] <= lo && hi <= held[1]) return;
      this.combs.set(name, held && held[0] <= hi && lo <= held[1] ? [Math.min(lo, held[0]), Math.max(hi, held[1])] : [lo, hi]);
      for (let t = lo; t < hi; t += step) this.run(t, Math.min(hi, t + width), level, found);
    }
  }

  /* What `target` hears of after 1, 2, … layers, until `done(rows)` or nothing is new: {layers, known}. */
  async function walk(pattern, target, most, done, alive) {
    const known = new Known(pattern.n), layers = [];
    let newest = [];
    known.mark(target, 0, newest);
    let begun = performance.now();
    while (newest.length) {
      layers.push(newest);
      if (layers.length > most || done(newest)) break;
      const found = [];
      for (let x = 0; x < newest.length; x++) {
        const pieces = pattern.row(newest[x]);
        for (let p = 0; p < pieces.count; p++) {
          const lo = pieces.lo[p], hi = pieces.hi[p], step = pieces.step[p];
          if (step === 0) known.run(lo, hi, layers.length, found);
          else known.comb(lo, hi, step, pieces.width[p], layers.length, found);
        }
        if ((x & 63) === 0 && performance.now() - begun > 14) {
          await FL.breathe();
          if (!alive()) return null;
          begun = performance.now();
        }
      }
      newest = found;
    }
    return { layers, known };
  }

  const forever = () => true;

  /* A shortest chain from source to target, as farlight.path gives it: of several, relays close to the target.
     {positions, hops: [{speaker, listener, rules}], heard}; positions is empty when there is no way; null when ended early. */
  FL.path = async (pattern, source, target, alive = forever) => {
    if (source === target) return { positions: [source], hops: [], heard: 1 };
    let met = false;
    const sees = (row) => pattern.allows(row, source);
    const walked = await walk(pattern, target, Infinity, (rows) => (met = rows.some(sees)), alive);
    if (!walked) return null;
    if (!met) return { positions: [], hops: [], heard: walked.known.size };
    const positions = [source];
    for (const rows of walked.layers.reverse()) {
      let best = -1;
      for (const row of rows) {
        if (!pattern.allows(row, positions[positions.length - 1])) continue;
        const nearer = Math.abs(row - target) - Math.abs(best - target);
        if (best < 0 || nearer < 0 || (nearer === 0 && row < best)) best = row;
      }
      positions.push(best);
    }
    const hops = positions.slice(1).map((listener, x) => {
      return { speaker: positions[x], listener, rules: FL.rulesOf(pattern, listener, positions[x]) };
    });
    return { positions, hops, heard: null };
  };

  /* After how many layers `target` has heard of each token (-1: not within `layers`). */
  FL.heardOf = async (pattern, target, layers, alive = forever) => {
    const walked = await walk(pattern, target, layers, () => false, alive);
    return walked && walked.known.level;
  };

  /* The rules that allow a link, as farlight's rules_of finds them; each a tree of names, see tellRule. */
  FL.rulesOf = (pattern, i, j) => {
    const found = rules(pattern, i, j), seen = new Set();
    return found.filter((rule) => {
      const name = JSON.stringify(rule);
      return !seen.has(name) && seen.add(name);
    });
  };

  function rules(pattern, i, j) {
    const { rule, parts } = pattern;
    switch (rule.is) {
      case "or": return parts.flatMap((part) => (part.allows(i, j) ? rules(part, i, j) : []));
      case "and": return both(parts.map((part) => [part, FL.rulesOf(part, i, j)]));
      case "sub": return rules(parts[0], i, j);
      case "not": return rule.parts[0].is === "not" ? rules(parts[0].parts[0], i, j) : [{ reach: [{ text: rule.text }] }];
      default: return [named(rule, i, j)];
    }
  }

  function named(rule, i, j) {
    if (rule.is === "sees_all") return { reach: [{ global: i }] };
    if (rule.is === "seen_by_all") return { reach: [{ global: j }] };
    if (rule.is === "global_tokens") return { reach: [{ global: FL.inRuns(rule.runs, j) ? j : i }] };
    return { reach: [REACH[rule.is] || RESTRICT[rule.is]] };
  }

  /* An intersection: each rule that reaches out, followed by what it lies within. */
  function both(sides) {
    const limits = sides.filter(([part]) => restricts(part)).flatMap(([, found]) => found);
    const reaching = sides.filter(([part]) => !restricts(part)).map(([, found]) => found);
    const said = limits.filter((rule) => !(rule.reach && rule.reach[0] === "everything"));
    if (!reaching.length) return [said.length ? { all: said } : { reach: ["everything"] }];
    let out = reaching[0];
    for (const more of reaching.slice(1)) out = out.flatMap((a) => more.map((b) => ({ joined: [a, b] })));
    return out.map((rule) => (said.length ? { rule, limits: said } : rule));
  }

  /* Whether a part of an intersection only says where not to look: as Python asks it of the atoms, whatever joins them. */
  const restricts = (pattern) => pattern.rule.is === "not" || onlyRestricts(pattern);
  const onlyRestricts = ({ rule, parts }) => (parts.length ? parts.every(onlyRestricts) : rule.is in RESTRICT);

  /* A rule in words; `say` knows the words of a language. */
  FL.tellRule = (rule, say) => {
    if (rule.all) return rule.all.map((one) => FL.tellRule(one, say)).join(say("rule.and"));
    if (rule.joined) return rule.joined.map((one) => FL.tellRule(one, say)).join(say("rule.and"));
    if (rule.limits) {
      const limits = rule.limits.map((one) => FL.tellRule(one, say)).join(say("rule.and"));
      return say("rule.within", { rule: FL.tellRule(rule.rule, say), limits });
    }
    return rule.reach.map((one) => {
      if (one.text !== undefined) return one.text;
      return one.global === undefined ? say(`rule.${one}`) : say("rule.global", { position: one.global });
    }).join("");
  };
})();
