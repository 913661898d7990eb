/* Attention mass kept by layer and head, and the heaviest links that the pattern lacks. */
"use strict";
(() => {
  /* Relative luminance of an sRGB colour, as in WCAG 2. */
  const luminance = (rgb) => rgb.map((x) => x / 255).map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, c) => sum + x * [0.2126, 0.7152, 0.0722][c], 0);

  /* Ink at this opacity on the paper, and black or white upon it: one of the two has a contrast of at least 4.58. */
  function colours(opacity, ink, paper) {
    const mixed = paper.map((x, c) => Math.round(x + (ink[c] - x) * opacity)), light = luminance(mixed);
    return { background: `rgb(${mixed.join(" ")})`, color: (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) ? "#000" : "#fff" };
  }

  function heat() {
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink").trim().split(/\s+/).map(Number);
    const paper = getComputedStyle(document.body).backgroundColor.match(/\d+/g).slice(0, 3).map(Number);
    const { mass_by_head: mass, best_by_head: best } = FL.row().audit, table = FL.id("heat");
    const head = FL.el("tr", {}, FL.el("th", { scope: "col", text: FL.say("heads.layer") }));
    (mass[0] || []).forEach((_, h) => head.append(FL.el("th", { scope: "col", text: h })));
    table.tHead.replaceChildren(head);
    table.classList.toggle("many", (mass[0] || []).length > 16);
    table.tBodies[0].replaceChildren(...mass.map((row, l) => {
      const line = FL.el("tr", {}, FL.el("th", { scope: "row", text: l }));
      row.forEach((share, h) => {
        const says = FL.say("heads.cell", { layer: l, head: h, mass: FL.percent(share), best: FL.percent(best[l][h]) });
        const shown = share >= 0.9995 ? "100" : FL.fixed(100 * share, 0);
        const cell = FL.el("button", {
          type: "button", text: shown, "aria-label": `${shown}. ${says}`, title: says,
          class: h === FL.state.head ? "chosen" : "",
          onclick: () => {
            const carried = FL.data.weights ? FL.data.weights.heads.findIndex((each) => each.layer === l && each.head === h) : -1;
            if (carried >= 0) FL.chooseHead(carried);
            else FL.set({ head: h });
            FL.id("heat-says").textContent = says;
          },
          onfocus: () => { FL.id("heat-says").textContent = says; },
          onmouseenter: () => { FL.id("heat-says").textContent = says; },
        });
        Object.assign(cell.style, colours(0.05 + 0.95 * share ** 1.5, ink, paper));
        line.append(FL.el("td", {}, cell));
      });
      return line;
    }));
    const row = FL.row().audit;
    FL.id("heat-says").textContent = FL.say("heads.says", {
      mass: FL.percent(row.mass), best: FL.percent(row.best), worst: FL.percent(row.worst_head), layer: row.worst_head_at[0], head: row.worst_head_at[1],
    });
  }

  const around = (position, name, label) => {
    const [before, after] = FL.context(position), piece = FL.piece(position);
    return FL.el("td", { "data-label": FL.say(label) }, FL.el("span", { class: "context", text: before + (piece && piece.space ? " " : "") }),
      FL.el("span", { class: `word ${name}`, text: piece ? piece.word : FL.number(position) }), FL.el("span", { class: "context", text: after }));
  };

  function lost() {
    const body = FL.id("losses").tBodies[0], saved = { scope: FL.state.scope, passage: FL.state.passage };
    const links = FL.row().lost;
    if (!links.length) return body.replaceChildren(FL.el("tr", {}, FL.el("td", { colspan: 6, text: FL.say("lost.nothing") })));
    const rows = links.map((link) => {
      // FL.context reads the state: set it to the passage of the link while its row is built.
      Object.assign(FL.state, { scope: "passage", passage: link.passage });
      const row = FL.el("tr", {}, around(link.query, "target", "lost.reader"), around(link.key, "source", "lost.read"),
        FL.el("td", { class: "num", "data-label": FL.say("lost.share"), text: FL.percent(link.share) }),
        FL.el("td", { class: "num", "data-label": FL.say("lost.where"), text: FL.say("lost.at", { layer: link.layer, head: link.head }) }),
        FL.el("td", { class: "num", "data-label": FL.say("lost.heads"), text: FL.number(link.heads) }),
        FL.el("td", {}, FL.hasView() ? FL.el("button", { type: "button", text: FL.say("lost.show"), onclick: () => show(link) }) : ""));
      return row;
    });
    Object.assign(FL.state, saved);
    body.replaceChildren(...rows);
  }

  function show(link) {
    FL.set({ scope: "passage" });
    FL.set({ passage: link.passage, head: link.head });
    FL.set({ source: link.key, target: link.query });
    FL.goTo(link.query, false);
    FL.id("words").scrollIntoView();
  }

  FL.on((changed) => {
    if (FL.data.kind !== "audit") return;
    if (["pattern", "start", "language", "head", "theme"].some((name) => changed.has(name))) heat();
    if (["pattern", "start", "language"].some((name) => changed.has(name))) lost();
  });
})();
