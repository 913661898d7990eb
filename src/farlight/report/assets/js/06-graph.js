/* Shortest paths and receptive fields: the backward breadth-first search of farlight.path, and the rules of a link. */
"use strict";
(() => {
  const RESTRICT = { causal: "past", padding: "real", documents: "document", full: "everything" };
  const REACH = {
    window: "window", blocked_window: "blocked_window", strided: "strided", landmarks: "landmarks", offsets: "offsets",
    random_keys: "random_keys", random_blocks: "random_blocks", blocks: "blocks", pairs: "pairs", clusters: "clusters",
    chosen_keys: "chosen_keys", chosen_blocks: "chosen_blocks", stretches: "listed",
  };

  /* The reached keys of a search. Union-find over the next unreached key touches each key of a run once; a comb inside one
     that was marked before is skipped. */
  class Reached {
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

    mark(key, level, frontier) {
      this.level[key] = level;
      this.next[key] = key + 1;
      this.size++;
      frontier.push(key);
    }

    run(lo, hi, level, frontier) {
      for (let key = this.free(lo); key < hi; key = this.free(key + 1)) this.mark(key, level, frontier);
      this.work++;
    }

    comb(lo, hi, step, width, level, frontier) {
      const name = `${step}:${width}:${lo % step}`, marked = this.combs.get(name);
      if (marked && marked[0] <= lo && hi <= marked[1]) return;
      const touches = marked && marked[0] <= hi && lo <= marked[1];
      this.combs.set(name, touches ? [Math.min(lo, marked[0]), Math.max(hi, marked[1])] : [lo, hi]);
      for (let t = lo; t < hi; t += step) this.run(t, Math.min(hi, t + width), level, frontier);
    }
  }

  /* Frontiers at distance 0, 1, … from `target`, until `done(frontier)`, `maxDepth` or an empty frontier: {layers, reached};
     null when `alive()` turned false. */
  async function search(pattern, target, maxDepth, done, alive) {
    const reached = new Reached(pattern.n), layers = [];
    let frontier = [];
    reached.mark(target, 0, frontier);
    let sliceStart = performance.now();
    while (frontier.length) {
      layers.push(frontier);
      if (layers.length > maxDepth || done(frontier)) break;
      const next = [];
      for (let x = 0; x < frontier.length; x++) {
        const pieces = pattern.row(frontier[x]);
        for (let p = 0; p < pieces.count; p++) {
          const lo = pieces.lo[p], hi = pieces.hi[p], step = pieces.step[p];
          if (step === 0) reached.run(lo, hi, layers.length, next);
          else reached.comb(lo, hi, step, pieces.width[p], layers.length, next);
        }
        if ((x & 63) === 0 && performance.now() - sliceStart > 14) {
          await FL.breathe();
          if (!alive()) return null;
          sliceStart = performance.now();
        }
      }
      frontier = next;
    }
    return { layers, reached };
  }

  const always = () => true;

  /* A shortest path from source to target, the same as farlight.path: {positions, hops: [{speaker, listener, rules}], heard}.
     Without a path positions is empty and `heard` counts the reached tokens; null when `alive()` turned false. */
  FL.path = async (pattern, source, target, alive = always) => {
    if (source === target) return { positions: [source], hops: [], heard: 1 };
    let found = false;
    const sees = (row) => pattern.allows(row, source);
    const result = await search(pattern, target, Infinity, (rows) => (found = rows.some(sees)), alive);
    if (!result) return null;
    if (!found) return { positions: [], hops: [], heard: result.reached.size };
    const positions = [source];
    for (const rows of result.layers.reverse()) {
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

  /* Distance of each token from `target`, an Int32Array; -1 beyond `layers`. */
  FL.heardOf = async (pattern, target, layers, alive = always) => {
    const result = await search(pattern, target, layers, () => false, alive);
    return result && result.reached.level;
  };

  /* The distinct rules that allow a link, the same as farlight's rules_of; each a tree of names, see tellRule. */
  FL.rulesOf = (pattern, i, j) => {
    const seen = new Set();
    return rules(pattern, i, j).filter((rule) => {
      const name = JSON.stringify(rule);
      return !seen.has(name) && seen.add(name);
    });
  };

  function rules(pattern, i, j) {
    const { rule, parts } = pattern;
    switch (rule.is) {
      case "or": return parts.flatMap((part) => (part.allows(i, j) ? rules(part, i, j) : []));
      case "and": return intersectionRules(parts.map((part) => [part, FL.rulesOf(part, i, j)]));
      case "sub": return rules(parts[0], i, j);
      case "not": return rule.parts[0].is === "not" ? rules(parts[0].parts[0], i, j) : [{ reach: [{ text: rule.text }] }];
      default: return [atomRule(rule, i, j)];
    }
  }

  function atomRule(rule, i, j) {
    if (rule.is === "sees_all") return { reach: [{ global: i }] };
    if (rule.is === "seen_by_all") return { reach: [{ global: j }] };
    if (rule.is === "global_tokens") return { reach: [{ global: FL.inRuns(rule.runs, j) ? j : i }] };
    if (rule.is === "stretches" && rule.name === "neighborhood") return { reach: [rule.name] };
    return { reach: [REACH[rule.is] || RESTRICT[rule.is]] };
  }

  /* Rules of an intersection: each combination of non-restricting rules, within the restricting ones. */
  function intersectionRules(sides) {
    const limits = sides.filter(([part]) => restricts(part)).flatMap(([, partRules]) => partRules);
    const reaching = sides.filter(([part]) => !restricts(part)).map(([, partRules]) => partRules);
    const known = new Set(), fresh = (rule) => !known.has(JSON.stringify(rule)) && known.add(JSON.stringify(rule));
    const named = limits.filter((rule) => !(rule.reach && rule.reach[0] === "everything")).filter(fresh);
    if (!reaching.length) return [named.length ? { all: named } : { reach: ["everything"] }];
    let out = reaching[0];
    for (const more of reaching.slice(1)) out = out.flatMap((a) => more.map((b) => ({ joined: [a, b] })));
    // An intersection inside another may have the same limits.
    const last = (rule) => (rule.joined ? last(rule.joined[rule.joined.length - 1]) : JSON.stringify(rule.limits));
    return out.map((rule) => (named.length && last(rule) !== JSON.stringify(named) ? { rule, limits: named } : rule));
  }

  /* Whether a part of an intersection is named as a limit: a complement, or made of restricting atoms only. */
  const restricts = (pattern) => pattern.rule.is === "not" || onlyRestricts(pattern);
  const onlyRestricts = ({ rule, parts }) => (parts.length ? parts.every(onlyRestricts) : rule.is in RESTRICT);

  /* The text of a rule; `say(name, values)` gives the strings of the language. */
  FL.tellRule = (rule, say) => {
    if (rule.all) return rule.all.map((inner) => FL.tellRule(inner, say)).join(say("rule.and"));
    if (rule.joined) return rule.joined.map((inner) => FL.tellRule(inner, say)).join(say("rule.and"));
    if (rule.limits) {
      const limits = rule.limits.map((inner) => FL.tellRule(inner, say)).join(say("rule.and"));
      return say("rule.within", { rule: FL.tellRule(rule.rule, say), limits });
    }
    return rule.reach.map((name) => {
      if (name.text !== undefined) return name.text;
      return name.global === undefined ? say(`rule.${name}`) : say("rule.global", { position: name.global });
    }).join("");
  };
})();
