/* The page's state, change listeners, and helpers that create elements. */
"use strict";
(() => {
  const listeners = [];
  const compiled = new Map();
  FL.data = JSON.parse(document.getElementById("data").textContent);
  FL.state = { pattern: 0, scope: FL.data.scopes[0].id, passage: 0, head: 0, source: null, target: null, layer: 1, page: 0, weights: 0, tint: "full", hidden: "", schematic: false };
  FL.path_ = null; // the result of FL.path for source and target, or null
  FL.levels = null; // the result of FL.heardOf for the target, or null

  FL.id = (name) => document.getElementById(name);

  /* Registers `react(changed)`, where `changed` is a set of state names, "language", "theme", "path", "levels" or "start". */
  FL.on = (react) => listeners.push(react);
  FL.tell = (...changed) => {
    const names = new Set(changed);
    for (const react of listeners) react(names);
  };

  FL.set = (values) => {
    const changed = Object.keys(values).filter((name) => FL.state[name] !== values[name]);
    if (!changed.length) return;
    Object.assign(FL.state, values);
    FL.tell(...changed);
  };

  FL.row = () => FL.data.patterns[FL.state.pattern];

  /* The view of the chosen pattern in the chosen scope, or in the other scope where its tables do not fit. A router or a
     pattern per layer has no view: NONE stands in and its sections are hidden. */
  const layers = Array.from({ length: FL.data.layers + 1 }, () => 0);
  const NONE = {
    n: FL.data.scopes[0].n, rules: { every: { is: "full" } }, picture: null,
    reach: { mean: layers, margin: layers, worst: layers, exact: true, confidence: 0.95, positions: [], share: layers.map(() => []) },
  };
  FL.hasView = () => Object.keys(FL.row().views).length > 0;
  FL.viewOf = (p) => {
    const { views } = FL.data.patterns[p];
    return views[FL.state.scope] || Object.values(views)[0] || NONE;
  };
  FL.view = () => FL.viewOf(FL.state.pattern);
  FL.n = () => FL.view().n;

  FL.patternOf = async (p) => {
    const view = FL.viewOf(p), head = view.rules.every ? "every" : String(FL.state.head in view.rules ? FL.state.head : Object.keys(view.rules)[0]);
    const name = `${p}/${FL.data.patterns[p].views.text === view}/${head}`;
    if (!compiled.has(name)) compiled.set(name, FL.unpackAll(view.rules[head]).then((rule) => FL.compile(rule, view.n)));
    return compiled.get(name);
  };
  FL.pattern = () => FL.patternOf(FL.state.pattern);

  FL.el = (tag, settings = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(settings)) {
      if (name === "text") node.textContent = value;
      else if (name === "class") node.className = value;
      else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children);
    return node;
  };

  FL.svg = (tag, settings = {}, text = null) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(settings)) node.setAttribute(name, value);
    if (text !== null) node.textContent = text;
    return node;
  };
})();
