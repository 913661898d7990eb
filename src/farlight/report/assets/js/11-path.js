/* The path between source and target: relays, a sentence per hop, and arcs over the text. */
"use strict";
(() => {
  const SHOWN = 40;
  let run = 0;

  async function find() {
    const { source, target } = FL.state, thisRun = ++run, alive = () => thisRun === run;
    FL.path_ = FL.levels = null;
    fields();
    if (source === null || target === null) {
      FL.tell("path", "levels");
      return told();
    }
    const pattern = await FL.pattern();
    if (!alive()) return;
    const path = await FL.path(pattern, source, target, alive);
    if (!path || !alive()) return;
    FL.path_ = path;
    told();
    FL.tell("path");
    const levels = await FL.heardOf(pattern, target, FL.data.layers, alive);
    if (!levels || !alive()) return;
    FL.levels = levels;
    FL.tell("levels");
  }

  function fields() {
    for (const end of ["source", "target"]) {
      const position = FL.state[end];
      FL.id(end).value = position === null ? "" : position;
      FL.id(end).max = FL.n() - 1;
      FL.id(`${end}-word`).textContent = position === null ? "" : FL.word(position) || "";
    }
  }

  const named = (position) => {
    const word = FL.word(position);
    return word === null ? FL.number(position) : `“${word}” (${FL.number(position)})`;
  };
  const rulesOf = (hop) => hop.rules.map((rule) => FL.tellRule(rule, FL.say)).join(FL.say("rule.or"));

  function told() {
    const { source, target } = FL.state, path = FL.path_, list = FL.id("hops");
    list.replaceChildren();
    if (!path) {
      FL.id("told").textContent = FL.say(source === null || target === null ? "path.none" : "path.busy");
      return arcs();
    }
    const holes = { target: named(target), source: named(source), layers: FL.number(path.hops.length) };
    const name = source === target ? "path.same" : !path.positions.length ? "path.never" : path.hops.length === 1 ? "path.one" : "path.found";
    FL.id("told").textContent = FL.say(name, { ...holes, heard: FL.number(path.heard || 0), n: FL.number(FL.n()) });
    arcs();
    path.hops.forEach((hop, x) => {
      if (x === SHOWN / 2 && path.hops.length > SHOWN) {
        list.append(FL.el("li", { class: "note", value: x + 1, text: FL.say("path.more", { count: FL.number(path.hops.length - SHOWN) }) }));
      }
      if (x >= SHOWN / 2 && x < path.hops.length - SHOWN / 2) return;
      const line = FL.el("li", { value: x + 1 }, FL.say("path.hop", { listener: named(hop.listener), speaker: named(hop.speaker), rules: rulesOf(hop) }));
      if (FL.data.words && x < path.hops.length - 1) {
        line.append(" ", FL.el("button", { type: "button", text: FL.say("path.show"), onclick: () => FL.goTo(hop.listener, true) }));
      }
      list.append(line);
    });
  }

  /* The text as a line, each hop an arc over it. */
  function arcs() {
    const svg = FL.id("arcs"), path = FL.path_, wide = 420, floor = 104, n = FL.n();
    svg.setAttribute("viewBox", `0 0 ${wide} 130`);
    svg.setAttribute("aria-label", FL.id("told").textContent);
    svg.replaceChildren(FL.svg("path", { class: "line", d: `M10 ${floor}H${wide - 10}` }));
    const x = (position) => 10 + ((wide - 20) * (position + 0.5)) / n;
    const ends = [["source", FL.state.source], ["target", FL.state.target]].filter(([, position]) => position !== null);
    if (path) {
      for (const { speaker, listener } of path.hops.slice(0, 1500)) {
        const a = x(speaker), b = x(listener), high = Math.min(96, 14 + Math.abs(b - a) * 0.24);
        svg.append(FL.svg("path", { class: "arc", d: `M${a} ${floor}C${a} ${floor - high * 1.3} ${b} ${floor - high * 1.3} ${b} ${floor}` }));
      }
      for (const position of path.positions.slice(1, -1).slice(0, 1500)) svg.append(FL.svg("circle", { class: "dot", cx: x(position), cy: floor, r: 4 }));
    }
    for (const [name, position] of ends) {
      svg.append(FL.svg("circle", { class: `dot ${name}`, cx: x(position), cy: floor, r: 6 }));
      const label = FL.svg("text", { class: "tick", x: Math.min(wide - 4, Math.max(4, x(position))), y: floor + 20 }, FL.number(position));
      label.setAttribute("text-anchor", x(position) < 60 ? "start" : x(position) > wide - 60 ? "end" : "middle");
      svg.append(label);
    }
  }

  for (const end of ["source", "target"]) {
    FL.id(end).addEventListener("change", (event) => {
      const value = Math.round(Number(event.target.value));
      if (event.target.value === "" || !Number.isFinite(value)) FL.set({ [end]: null });
      else FL.set({ [end]: Math.min(FL.n() - 1, Math.max(0, value)) });
      fields();
    });
  }
  FL.id("ends").addEventListener("submit", (event) => event.preventDefault());
  FL.farApart = () => ({ source: Math.floor(FL.n() * 0.02), target: Math.max(0, Math.ceil(FL.n() * 0.98) - 1) });
  FL.id("far").addEventListener("click", () => FL.set(FL.farApart()));
  FL.id("swap").addEventListener("click", () => FL.set({ source: FL.state.target, target: FL.state.source }));
  FL.id("clear").addEventListener("click", () => FL.set({ source: null, target: null }));

  FL.on((changed) => {
    if (["source", "target", "pattern", "head", "scope", "start"].some((name) => changed.has(name))) find();
    else if (changed.has("language") || changed.has("passage")) {
      fields();
      told();
    }
  });
})();
