/* What the reader has chosen, and who wants to know when that changes. */
"use strict";
(() => {
  const listeners = [];
  const compiled = new Map();
  FL.data = JSON.parse(document.getElementById("data").textContent);
  FL.state = { pattern: 0, scope: FL.data.scopes[0].id, passage: 0, head: 0, source: null, target: null, layer: 1, page: 0 };
  FL.path_ = null; // the path between the two ends, once found
  FL.levels = null; // after how many layers the target has heard of each token

  FL.id = (name) => document.getElementById(name);

  /* `react(changed)`: a set of names of state that changed; "language" and "theme" are told in the same way. */
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

  /* The chosen pattern over the chosen text; where that text is too long for it (a table of its own), over the other.
     What is chosen by content, or layer by layer, has neither: its sections are hidden, over one that sees all. */
  const layers = Array.from({ length: FL.data.layers + 1 }, () => 0);
  const NONE = {
    n: FL.data.scopes[0].n, rules: { every: { is: "full" } }, picture: null,
    reach: { mean: layers, margin: layers, worst: layers, exact: true, confidence: 0.95, positions: [], share: layers.map(() => []) },
  };
  FL.hasView = () => Object.keys(FL.row().views).length > 0;
  FL.view = () => FL.row().views[FL.state.scope] || Object.values(FL.row().views)[0] || NONE;
  FL.n = () => FL.view().n;

  FL.pattern = async () => {
    const view = FL.view(), head = view.rules.every ? "every" : String(FL.state.head in view.rules ? FL.state.head : Object.keys(view.rules)[0]);
    const name = `${FL.state.pattern}/${FL.row().views.text === view}/${head}`;
    if (!compiled.has(name)) compiled.set(name, FL.unpackAll(view.rules[head]).then((rule) => FL.compile(rule, view.n)));
    return compiled.get(name);
  };

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
