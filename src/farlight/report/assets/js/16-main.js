/* Title, table of patterns, small-world metrics, scope and head selection, theme, and start-up. */
"use strict";
(() => {
  const { data } = FL, audit = data.kind === "audit";

  function head() {
    FL.id("title").textContent = audit ? FL.say("title.audit", { name: data.name.split(/[\\/]/).pop() }) : data.name;
    const holes = audit
      ? { ...data.model, n: FL.number(data.passages.of), passages: FL.number(data.passages.starts.length), length: FL.number(data.passages.length), count: data.patterns.length }
      : { n: FL.number(FL.n()), count: data.patterns.length };
    FL.id("summary").textContent = FL.say(audit ? "summary.audit" : data.patterns.length > 1 ? "summary.maps" : "summary.map", holes);
    FL.id("made").textContent = FL.say("made", { version: data.version });
    document.title = `farlight: ${data.name}`;
  }

  const COLUMNS = [
    ["density", (row) => bar(row.density)], ["mass", (row) => bar(row.mass)], ["of_best", (row) => FL.percent(row.of_best)],
    ["worst_head", (row) => FL.percent(row.worst_head)], ["token_cosine", (row) => FL.fixed(row.token_cosine, 3)],
    ["pooled_cosine", (row) => FL.fixed(row.pooled_cosine, 3)], ["speedup", (row) => speedup(row.long_text)],
  ];
  const world = (row) => row.views.text.world, hops = (value) => (value === null ? "–" : FL.fixed(value, 2));
  const MAP_COLUMNS = [
    ["density", (row) => bar(world(row).density)], ["hops", (row) => hops(world(row).hops)],
    ["diameter", (row) => (world(row).exact ? "" : "≥ ") + FL.number(world(row).diameter)], ["clustering", (row) => FL.fixed(world(row).clustering, 3)],
    ["relay", (row) => (row.views.text.capacity ? FL.short(Math.round(row.views.text.capacity.bottleneck)) : "–")],
  ];
  const speedup = (long) => (long.why_not || !long.seconds ? "–" : FL.say("times", { times: FL.fixed(long.full_seconds / long.seconds, long.full_seconds > 10 * long.seconds ? 0 : 1) }));

  function bar(share) {
    const fill = FL.el("i"), out = document.createDocumentFragment();
    fill.style.width = `${100 * share}%`;
    out.append(FL.percent(share), FL.el("span", { class: "bar", "aria-hidden": "true" }, fill));
    return out;
  }

  function patterns() {
    const table = FL.id("patterns");
    table.hidden = !audit && data.patterns.length < 2;
    if (table.hidden) return;
    const columns = audit ? COLUMNS : MAP_COLUMNS;
    table.tHead.replaceChildren(FL.el("tr", {}, FL.el("th", { scope: "col", text: FL.say("patterns.pattern") }),
      ...columns.map(([name]) => FL.el("th", { scope: "col", class: "num", text: FL.say(`patterns.${name}`) }))));
    const focused = document.activeElement && document.activeElement.name === "pattern";
    table.tBodies[0].replaceChildren(...data.patterns.map((row, p) => {
      const radio = FL.el("input", { type: "radio", name: "pattern", value: p, onchange: () => FL.set({ pattern: p }) });
      radio.checked = p === FL.state.pattern;
      const line = FL.el("tr", { class: radio.checked ? "chosen" : "", onclick: (event) => event.target.tagName === "INPUT" || FL.set({ pattern: p }) },
        FL.el("th", { scope: "row" }, FL.el("label", {}, radio, FL.el("span", { text: row.text }))));
      for (const [name, cell] of columns) line.append(FL.el("td", { class: "num", "data-label": FL.say(`patterns.${name}`) }, cell(audit ? row.audit : row)));
      return line;
    }));
    if (focused) table.querySelector("input:checked").focus();
  }

  function facts() {
    const { world, capacity } = FL.view(), box = FL.id("facts");
    box.hidden = !world;
    if (!world) return;
    const fact = (name, value, note, spread = 0) => FL.el("div", {}, FL.el("dt", { text: FL.say(`fact.${name}`) }),
      FL.el("dd", { text: value }, FL.el("i", { text: spread ? ` ± ${FL.plain(spread)}` : "" }), FL.el("small", { text: note })));
    const number = (value, digits = 2) => (value === null ? "–" : Math.abs(value) < 0.05 ? FL.plain(value) : FL.fixed(value, digits));
    box.replaceChildren(
      fact("links", FL.short(world.links), FL.say("fact.of", { full: FL.short(world.full_links), times: FL.short(world.full_links / world.links) })),
      fact("hops", number(world.hops), FL.say("fact.random", { random: number(world.random_hops), lattice: number(world.lattice_hops, 1) }), world.hops_margin),
      fact("diameter", (world.exact ? "" : "≥ ") + FL.number(world.diameter), FL.say("fact.unreachable", { share: FL.percent(world.unreachable) })),
      fact("clustering", number(world.clustering, 3), FL.say("fact.random", { random: number(world.random_clustering, 3), lattice: number(world.lattice_clustering, 3) }), world.clustering_margin),
      fact("sigma", world.sigma === null ? "–" : FL.short(world.sigma), FL.say("fact.sigma.note")),
      ...(capacity ? [fact("relay", capacity.relayed ? FL.short(Math.round(capacity.bottleneck)) : "–", capacity.relayed
        ? FL.say("fact.relay.note", { relays: FL.short(Math.round(capacity.relays)), sole: FL.short(Math.round(capacity.sole)) }) : FL.say("fact.relay.none"))] : []),
      fact("omega", number(world.omega), FL.say("fact.omega.note")),
    );
  }

  function choices() {
    const scopes = data.scopes.filter(({ id }) => FL.row().views[id]), box = FL.id("scopes");
    box.hidden = scopes.length < 2;
    box.replaceChildren(...scopes.map(({ id, n }) => FL.el("button", {
      type: "button", role: "radio", "aria-checked": String(id === FL.state.scope), "data-scope": id, tabindex: id === FL.state.scope ? 0 : -1,
      text: FL.say(`scope.${id}`, { n: FL.number(n) }),
      onclick: () => scope(id),
    })));
    const heads = Object.keys(FL.view().rules), pick = FL.id("head"), many = heads.length > 1;
    FL.id("head-pick").hidden = !many;
    pick.replaceChildren(...(many ? heads : []).map((h) => FL.el("option", { value: h, text: h })));
    pick.value = String(FL.state.head);
  }

  function scope(id) {
    if (id === FL.state.scope) return;
    Object.assign(FL.state, { source: null, target: null });
    FL.set({ scope: id });
    FL.set(FL.farApart());
  }
  FL.scope = scope;

  FL.id("scopes").addEventListener("keydown", (event) => {
    if (!event.key.startsWith("Arrow")) return;
    event.preventDefault();
    const other = [...event.currentTarget.children].find((node) => node.getAttribute("aria-checked") === "false");
    if (!other) return;
    scope(other.dataset.scope);
    FL.id("scopes").querySelector('[aria-checked="true"]').focus();
  });
  FL.id("head").addEventListener("change", (event) => FL.set({ head: Number(event.target.value) }));

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  function theme(name) {
    document.documentElement.dataset.theme = name;
    FL.id("theme").setAttribute("aria-pressed", String(name === "dark"));
    FL.tell("theme");
  }
  dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
  FL.id("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  FL.id("language").addEventListener("click", () => {
    FL.language = FL.language === "zh" ? "en" : "zh";
    FL.translate();
    FL.tell("language");
  });

  FL.on((changed) => {
    if (!["start", "language", "pattern", "scope", "head"].some((name) => changed.has(name))) return;
    for (const name of ["matrix", "words", "reach", "cost"]) {
      const gone = name === "words" ? !audit || (!FL.hasView() && !data.weights) : !FL.hasView();
      FL.id(name).hidden = document.querySelector(`.jump [href="#${name}"]`).hidden = gone;
    }
    FL.id("no-matrix").hidden = FL.hasView();
    if (!FL.hasView() && FL.state.scope !== data.scopes[0].id) return FL.set({ scope: data.scopes[0].id });
    if (FL.hasView() && !FL.row().views[FL.state.scope]) return scope(Object.keys(FL.row().views)[0]);
    head();
    patterns();
    facts();
    choices();
  });

  async function begin() {
    for (const node of document.querySelectorAll("[data-only]")) node.hidden = node.dataset.only !== data.kind;
    document.documentElement.dataset.theme = dark.matches ? "dark" : "light";
    // Start with the pattern whose mass is closest to the best of its number of links.
    if (audit) FL.state.pattern = data.patterns.reduce((best, row, p) => (row.audit.of_best > data.patterns[best].audit.of_best ? p : best), 0);
    if (data.weights) Object.assign(FL.state, { passage: data.weights.passage, head: data.weights.heads[0].head });
    FL.state.layer = Math.min(2, data.layers);
    FL.translate();
    await FL.loadWords();
    Object.assign(FL.state, data.ends || FL.farApart());
    FL.tell("start");
    FL.ready = true;
    document.documentElement.dataset.ready = "true";
  }
  begin();
})();
