/* Reach by layer: mean and worst share of the text, and the receptive field of the chosen listener as a strip. */
"use strict";
(() => {
  const layer = FL.id("layer"), strip = FL.id("strip");

  function says() {
    const { mean, margin, worst, exact } = FL.view().reach, at = FL.state.layer;
    const spread = margin[at] ? FL.say("reach.margin", { margin: FL.percent(margin[at]) }) : "";
    let text = FL.say("reach.says", { layer: at, mean: FL.percent(mean[at]) + spread, worst: FL.percent(worst[at]) });
    if (!exact) text += ` ${FL.say("reach.drawn", { confidence: FL.percent(FL.view().reach.confidence, 0) })}`;
    FL.id("reach-says").textContent = text;
    FL.id("layer-is").textContent = at;
    layer.value = at;
    layer.setAttribute("aria-valuetext", text);
  }

  /* Mean, worst token and the band of all searched tokens against the layer. */
  async function curve() {
    const view = FL.view(), reach = view.reach, svg = FL.id("reach-curve"), wide = 520, high = 300, most = FL.data.layers;
    const shares = await Promise.all(reach.share.map(FL.unpack));
    if (view !== FL.view()) return;
    const x = (l) => 52 + ((wide - 72) * l) / Math.max(1, most), y = (share) => 16 + (high - 60) * (1 - share);
    svg.setAttribute("viewBox", `0 0 ${wide} ${high}`);
    svg.replaceChildren();
    for (const share of [0, 0.25, 0.5, 0.75, 1]) {
      svg.append(FL.svg("path", { class: "grid-line", d: `M52 ${y(share)}H${wide - 20}` }));
      svg.append(FL.svg("text", { class: "tick", x: 44, y: y(share) + 4, "text-anchor": "end" }, FL.percent(share, 0)));
    }
    const every = Math.max(1, Math.ceil(most / 12));
    for (let l = 0; l <= most; l += every) svg.append(FL.svg("text", { class: "tick", x: x(l), y: high - 24, "text-anchor": "middle" }, l));
    svg.append(FL.svg("text", { class: "tick", x: (52 + wide - 20) / 2, y: high - 5, "text-anchor": "middle" }, FL.say("reach.layer")));
    const ends = shares.map((row) => row.reduce(([low, top], share) => [Math.min(low, share), Math.max(top, share)], [1, 0]));
    const line = (values) => values.map((value, l) => `${l ? "L" : "M"}${x(l)} ${y(value)}`).join("");
    const outline = [...ends.map(([, top], l) => [l, top]), ...ends.map(([low], l) => [l, low]).reverse()];
    const band = outline.map(([l, value], p) => `${p ? "L" : "M"}${x(l)} ${y(value)}`).join("");
    svg.append(FL.svg("path", { class: "band", d: `${band}Z` }));
    svg.append(FL.svg("path", { class: "worst", d: line(reach.worst) }), FL.svg("path", { class: "mine", d: line(reach.mean) }));
    const l = FL.state.layer;
    svg.append(FL.svg("path", { class: "cross", d: `M${x(l)} 16V${high - 44}` }), FL.svg("circle", { class: "point mine", cx: x(l), cy: y(reach.mean[l]), r: 6 }));
    svg.setAttribute("aria-label", FL.id("reach-says").textContent);
  }

  /* The text from left to right: the tokens within reach of the listener; without a listener the reach of each token. */
  async function paint() {
    const n = FL.n(), { layer: at, target } = FL.state, view = FL.view();
    const pixels = Math.max(64, Math.min(1400, Math.round(strip.clientWidth * (window.devicePixelRatio || 1)))), tall = 46;
    const shares = await FL.unpack(view.reach.share[at]), places = await FL.unpack(view.reach.positions);
    if (view !== FL.view()) return;
    const levels = FL.levels;
    strip.width = pixels;
    strip.height = tall;
    const context = strip.getContext("2d"), style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink").trim();
    const edges = FL.edges(0, n, Math.min(pixels, n)), last = edges.length - 1;
    let heard = 0;
    for (let p = 0; p < last; p++) {
      let share = 0;
      if (levels) {
        for (let k = edges[p]; k < edges[p + 1]; k++) if (levels[k] >= 0 && levels[k] <= at) share++;
        heard += share;
        share /= edges[p + 1] - edges[p];
      } else if (places.length) share = shares[Math.min(places.length - 1, Math.round(((p + 0.5) * places.length) / last))];
      if (!share) continue;
      context.fillStyle = `rgb(${ink} / ${levels ? 0.12 + 0.88 * share : 0.06 + 0.94 * share})`;
      context.fillRect(Math.floor((p * pixels) / last), 0, Math.ceil(pixels / last), tall);
    }
    if (target !== null && levels) {
      context.fillStyle = style.getPropertyValue("--accent");
      context.fillRect(Math.floor((target * pixels) / n) - 1, 0, 4, tall);
    }
    const word = target === null ? null : FL.word(target);
    const who = target === null ? "" : word === null ? FL.number(target) : `“${word}” (${FL.number(target)})`;
    const text = levels
      ? FL.say("reach.heard", { who, layer: at, heard: FL.number(heard), n: FL.number(n), share: FL.percent(heard / n) })
      : FL.say("reach.each", { layer: at });
    FL.id("strip-says").textContent = text;
    strip.dataset.heard = levels ? heard : "";
    strip.setAttribute("aria-label", text);
  }

  layer.max = FL.data.layers;
  layer.addEventListener("input", () => FL.set({ layer: Number(layer.value) }));
  new ResizeObserver(() => FL.ready && paint()).observe(strip);
  FL.on((changed) => {
    if (["layer", "pattern", "head", "scope", "start", "language", "theme"].some((name) => changed.has(name))) {
      says();
      curve();
    }
    if (["layer", "levels", "scope", "start", "language", "theme", "passage", "pattern", "head"].some((name) => changed.has(name))) paint();
  });
})();
