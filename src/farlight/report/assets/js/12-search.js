/* Search over the whole text: every hit marked in the text and on a strip, one after the other by button or Enter. */
"use strict";
(() => {
  const box = FL.id("tokens"), strip = FL.id("hits"), BINS = 400;
  let word = "", hits = [], at = -1;

  /* Marks the hits among the tokens on the page. */
  FL.markHits = () => {
    const marked = new Map();
    hits.forEach(([from, to], index) => { for (let token = from; token <= to; token++) marked.set(token, Math.max(index === at ? 2 : 1, marked.get(token) || 0)); });
    for (const span of box.children) {
      const mark = marked.get(FL.tokenOf(Number(span.dataset.at))) || 0;
      span.classList.toggle("hit", mark > 0);
      span.classList.toggle("now", mark > 1);
    }
  };

  /* Where the hits are, from the first token of the text to the last. */
  function bars() {
    strip.toggleAttribute("hidden", !hits.length);
    const count = new Array(BINS).fill(0), n = Math.max(1, FL.tokensShown());
    for (const [token] of hits) count[Math.min(BINS - 1, Math.floor((token * BINS) / n))]++;
    const most = Math.max(1, ...count), bar = (value, x) => FL.svg("rect", { x, y: 12 - 11 * Math.sqrt(value / most), width: 1, height: 11 * Math.sqrt(value / most) });
    strip.replaceChildren(...count.flatMap((value, x) => (value ? [bar(value, x)] : [])));
    if (at >= 0) strip.append(FL.svg("path", { class: "now", d: `M${((hits[at][0] + 0.5) * BINS) / n} 0V14` }));
  }

  function says() {
    FL.id("find-says").textContent = !word ? "" : !hits.length ? FL.say("text.nowhere") : FL.say("text.found", { index: FL.number(at + 1), count: FL.number(hits.length) });
    FL.id("find-back").disabled = hits.length < 2;
  }

  /* Turns to hit `index`: in its passage where there is one, else in the whole text. */
  function go(index) {
    at = (index + hits.length) % hits.length;
    const [token] = hits[at];
    if (FL.state.scope === "passage") {
      const passage = FL.passageOf(token);
      if (passage >= 0) FL.set({ passage });
      else FL.scope("text");
    }
    const inPassage = FL.state.scope === "passage", position = inPassage ? token - FL.data.passages.starts[FL.state.passage] + FL.data.words.before.length : token;
    FL.goTo(position, false);
    FL.markHits();
    bars();
    says();
  }

  function search() {
    word = FL.id("find-word").value.trim();
    // Under a router the page shows passages only.
    hits = FL.findAll(word).filter(([token]) => FL.row().views.text || FL.passageOf(token) >= 0);
    at = -1;
    const first = FL.tokenOf(FL.onPage()[0] + (FL.state.scope === "passage" ? FL.data.words.before.length : 0)) || 0;
    if (hits.length) return go(Math.max(0, hits.findIndex(([token]) => token >= first)));
    FL.markHits();
    bars();
    says();
  }

  const step = (by) => (FL.id("find-word").value.trim() !== word || !hits.length ? search() : go(at + by));
  FL.id("find").addEventListener("submit", (event) => {
    event.preventDefault();
    step(1);
  });
  FL.id("find-back").addEventListener("click", () => step(-1));
  FL.on((changed) => {
    if (changed.has("language")) says();
    if (changed.has("pattern") && word) search();
  });
})();
