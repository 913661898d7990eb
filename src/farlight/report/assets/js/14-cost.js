/* Cost against the number of tokens on logarithmic scales, beside full attention: links at all lengths, time where measured. */
"use strict";
(() => {
  const WIDE = 520, HIGH = 330, LEFT = 62, RIGHT = 18, TOP = 16, BOTTOM = 46;

  /* Draws logarithmic axes for these points; returns their scales {x, y}. */
  function axes(svg, points, unit) {
    const log = Math.log10, xs = points.map(([n]) => log(n)), ys = points.map(([, value]) => log(value));
    const low = [Math.min(...xs), Math.floor(Math.min(...ys))], top = [Math.max(...xs), Math.ceil(Math.max(...ys))];
    if (top[0] === low[0]) top[0] += 1;
    if (top[1] === low[1]) top[1] += 1;
    const x = (n) => LEFT + ((WIDE - LEFT - RIGHT) * (log(n) - low[0])) / (top[0] - low[0]);
    const y = (value) => TOP + (HIGH - TOP - BOTTOM) * (1 - (log(value) - low[1]) / (top[1] - low[1]));
    svg.setAttribute("viewBox", `0 0 ${WIDE} ${HIGH}`);
    svg.replaceChildren();
    const every = Math.max(1, Math.ceil((top[1] - low[1]) / 7));
    for (let k = low[1]; k <= top[1]; k += every) {
      svg.append(FL.svg("path", { class: "grid-line", d: `M${LEFT} ${y(10 ** k)}H${WIDE - RIGHT}` }));
      svg.append(FL.svg("text", { class: "tick", x: LEFT - 8, y: y(10 ** k) + 4, "text-anchor": "end" }, unit(10 ** k)));
    }
    for (let k = Math.ceil(low[0]); k <= top[0]; k++) {
      svg.append(FL.svg("path", { class: "grid-line", d: `M${x(10 ** k)} ${TOP}V${HIGH - BOTTOM}` }));
      svg.append(FL.svg("text", { class: "tick", x: x(10 ** k), y: HIGH - BOTTOM + 18, "text-anchor": "middle" }, FL.short(10 ** k)));
    }
    svg.append(FL.svg("text", { class: "tick", x: (LEFT + WIDE - RIGHT) / 2, y: HIGH - 6, "text-anchor": "middle" }, FL.say("cost.tokens")));
    return { x, y };
  }

  const line = (points, { x, y }) => points.map(([n, value], p) => `${p ? "L" : "M"}${x(n).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  const pairs = (xs, ys) => xs.map((n, p) => [n, ys[p]]).filter(([, value]) => value > 0);

  function links() {
    const svg = FL.id("links-curve"), mine = FL.row().cost, full = pairs(mine.tokens, mine.full), own = pairs(mine.tokens, mine.links);
    const others = FL.data.patterns.filter((row) => row !== FL.row() && row.cost).map((row) => pairs(row.cost.tokens, row.cost.links));
    const every = [...full, ...own, ...others.flat()];
    if (!every.length) return svg.replaceChildren();
    const at = axes(svg, every, FL.short);
    for (const other of others) svg.append(FL.svg("path", { class: "other", d: line(other, at) }));
    svg.append(FL.svg("path", { class: "full", d: line(full, at) }), FL.svg("path", { class: "mine", d: line(own, at) }));
    const middle = full[Math.floor(full.length * 0.55)];
    if (middle) svg.append(FL.svg("text", { class: "label soft", x: at.x(middle[0]) - 8, y: at.y(middle[1]) - 8, "text-anchor": "end" }, FL.say("cost.full")));
    for (const [n, value] of own) svg.append(FL.svg("circle", { class: "point mine", cx: at.x(n), cy: at.y(value), r: own.length > 1 ? 3 : 6 }));
    const [n, some] = own[own.length - 1] || [0, 0], all = mine.full[mine.full.length - 1];
    const text = FL.say("cost.says", { n: FL.number(n), links: FL.short(some), full: all ? FL.short(all) : "–", times: all && some ? FL.short(all / some) : "–" });
    FL.id("cost-says").textContent = text;
    svg.setAttribute("aria-label", text);
  }

  function time() {
    const svg = FL.id("time-curve"), { model, patterns } = FL.data;
    const long = patterns.map((row) => row.audit.long_text), known = long.find((row) => row.full_seconds > 0);
    if (!known) return svg.replaceChildren();
    const at = Math.min(model.full_measured_at, known.tokens), full = (n) => known.full_seconds * (n / known.tokens) ** 2;
    const measured = long.filter((row) => row.seconds > 0).map((row) => [row.tokens, row.seconds]);
    const first = Math.max(64, Math.min(at, known.tokens / 1000));
    const axis = axes(svg, [[first, full(first)], [known.tokens, known.full_seconds], ...measured], (value) => FL.say(value < 1 ? "unit.ms" : "unit.seconds", { value: FL.short(value < 1 ? value * 1000 : value) }));
    svg.append(FL.svg("path", { class: "full", d: line([[first, full(first)], [known.tokens, full(known.tokens)]], axis) }));
    svg.append(FL.svg("circle", { class: "point", cx: axis.x(at), cy: axis.y(full(at)), r: 5 }));
    svg.append(FL.svg("text", { class: "label soft", x: axis.x(known.tokens) - 14, y: axis.y(full(known.tokens)) - 4, "text-anchor": "end" }, FL.say("cost.predicted")));
    patterns.forEach((row, p) => {
      const one = row.audit.long_text, mine = p === FL.state.pattern;
      if (!one.seconds) return;
      svg.append(FL.svg("circle", { class: mine ? "point mine" : "point", cx: axis.x(one.tokens) - 6, cy: axis.y(one.seconds), r: mine ? 8 : 5 }));
      if (mine) svg.append(FL.svg("text", { class: "label", x: axis.x(one.tokens) - 22, y: axis.y(one.seconds) + 5, "text-anchor": "end" }, FL.seconds(one.seconds)));
    });
    const mine = FL.row().audit.long_text;
    const text = mine.why_not ? FL.say("cost.not", { why: mine.why_not })
      : FL.say("cost.timed", { n: FL.number(mine.tokens), seconds: FL.seconds(mine.seconds), full: FL.seconds(mine.full_seconds), at: FL.number(at), backend: mine.backend });
    FL.id("cost-says").textContent += ` ${text}`;
    svg.setAttribute("aria-label", text);
  }

  FL.on((changed) => {
    if (!["pattern", "start", "language"].some((name) => changed.has(name)) || !FL.row().cost) return;
    links();
    if (FL.data.kind === "audit") time();
  });
})();
