/* Next-token loss of a causal language model: of the pattern and of full attention, by position, and the words that suffered. */
"use strict";
(() => {
  const nats = (value) => FL.fixed(value, 3), gain = (value) => (value < 0 ? "−" : "+") + FL.fixed(Math.abs(value), 3);

  function byPosition(parts) {
    const table = FL.id("loss-by-position");
    const head = FL.el("tr", {}, FL.el("th", { scope: "col", text: FL.say("loss.positions") }));
    const lost = FL.el("tr", {}, FL.el("th", { scope: "row", text: FL.say("loss.lost") }));
    for (const [start, stop, loss, full] of parts) {
      head.append(FL.el("th", { scope: "col", class: "num", text: `${FL.number(start)}–${FL.number(stop - 1)}` }));
      lost.append(FL.el("td", { class: "num", text: gain(loss - full) }));
    }
    table.tHead.replaceChildren(head);
    table.tBodies[0].replaceChildren(lost);
  }

  function suffered(predictions) {
    const line = (each) => FL.el("tr", {},
      FL.el("td", {}, FL.el("span", { class: "context", text: `${each.context || ""} ` }),
        FL.el("span", { class: "word target", text: each.word === null ? FL.number(each.token) : each.word })),
      FL.el("td", { class: "num", text: nats(each.loss_full) }), FL.el("td", { class: "num", text: nats(each.loss) }));
    FL.id("suffered").tBodies[0].replaceChildren(...predictions.map(line));
  }

  FL.on((changed) => {
    if (FL.data.kind !== "audit" || !["pattern", "start", "language"].some((name) => changed.has(name))) return;
    const language = FL.row().audit.language;
    FL.id("loss").hidden = !language;
    if (!language) return;
    const [low, high] = language.interval || [NaN, NaN];
    const values = {
      full: nats(language.loss_full), loss: nats(language.loss), lost: gain(language.loss - language.loss_full), low: gain(low), high: gain(high),
      perplexity_full: FL.fixed(Math.exp(language.loss_full), 2), perplexity: FL.fixed(Math.exp(language.loss), 2),
    };
    FL.id("loss-says").textContent = language.interval ? FL.say("loss.says", values) : FL.say("loss.says_one", values);
    byPosition(language.by_position);
    suffered(language.suffered);
  });
})();
