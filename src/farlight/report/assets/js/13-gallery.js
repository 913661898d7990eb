/* All patterns side by side: a small picture of each with its numbers; a click chooses it. */
"use strict";
(() => {
  const box = FL.id("gallery"), SIDE = 144, MOST_WORK = 3e7;
  let run = 0;

  async function draw(canvas, p, alive) {
    const pattern = await FL.patternOf(p), n = pattern.n, view = { top: 0, left: 0, span: n }, pixels = Math.min(n, SIDE);
    if (!alive()) return;
    canvas.dataset.kind = n > 96 && (FL.isHairline(pattern.rule, n) || FL.workOf(pattern, view, pixels) > MOST_WORK) ? "schematic" : "scale";
    if (canvas.dataset.kind === "schematic") return FL.drawCells(canvas, FL.compile(FL.schematic(pattern.rule, n), FL.CELLS), FL.KINDS, 6 * FL.CELLS);
    if (n <= 96) return FL.drawCells(canvas, pattern, FL.KINDS, 2 * SIDE);
    const parts = FL.byKind(pattern), colours = parts.map(({ kind }) => FL.colourOf(kind)), cells = pixels === n;
    const context = canvas.getContext("2d"), image = context.createImageData(pixels, pixels);
    canvas.width = canvas.height = pixels;
    await FL.density(pattern, view, pixels, (r, line, ofParts) => {
      for (let c = 0; c < pixels; c++) {
        const at = 4 * (r * pixels + c), [red, green, blue] = FL.matrix.mixed(ofParts, c, colours, cells);
        image.data.set([red, green, blue, Math.round(255 * FL.matrix.darkness(line[c], cells))], at);
      }
    }, alive, parts.length > 1 ? parts.map((part) => part.pattern) : []);
    if (alive()) context.putImageData(image, 0, 0);
  }

  /* Hops and the load of the busiest relay, of those that the page has. */
  function numbers(p) {
    const { world, capacity } = FL.viewOf(p), { audit } = FL.data.patterns[p], out = [];
    if (audit) out.push(FL.say("gallery.mass", { mass: FL.percent(audit.mass), density: FL.percent(audit.density) }));
    else if (world) out.push(FL.say("gallery.links", { density: FL.percent(world.density) }));
    if (world && world.hops !== null) out.push(FL.say("gallery.hops", { hops: FL.fixed(world.hops, 2) }));
    if (capacity && capacity.relayed) out.push(FL.say("gallery.relay", { load: FL.short(Math.round(capacity.bottleneck)) }));
    return out;
  }

  async function show() {
    const mine = ++run, alive = () => mine === run, rows = FL.data.patterns;
    box.hidden = rows.length < 2;
    if (box.hidden) return;
    const canvases = rows.map((row) => (Object.keys(row.views).length ? FL.el("canvas", { "aria-hidden": "true" }) : null));
    box.replaceChildren(...rows.map((row, p) => FL.el("button", {
      type: "button", class: p === FL.state.pattern ? "chosen" : "", "aria-pressed": String(p === FL.state.pattern), "data-pattern": p, onclick: () => FL.set({ pattern: p }),
    }, canvases[p] || FL.el("span", { class: "blank", text: FL.say("gallery.none") }), FL.el("code", { text: row.text }), ...numbers(p).map((text) => FL.el("span", { text })))));
    for (const [p, canvas] of canvases.entries()) {
      if (canvas && alive()) await draw(canvas, p, alive);
    }
    if (alive()) box.dataset.drawn = String(rows.length);
  }

  FL.on((changed) => {
    if (["start", "language", "scope", "theme", "head"].some((name) => changed.has(name))) show();
    else if (changed.has("pattern")) {
      for (const button of box.children) {
        const chosen = Number(button.dataset.pattern) === FL.state.pattern;
        button.classList.toggle("chosen", chosen);
        button.setAttribute("aria-pressed", String(chosen));
      }
    }
  });
})();
