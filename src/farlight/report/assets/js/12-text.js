/* The text: clickable tokens, the path highlighted on them, and the receptive field of the listener up to the chosen layer. */
"use strict";
(() => {
  const box = FL.id("tokens"), page = FL.id("page");
  let focus = 0, next = "source";

  function lay() {
    if (!FL.data.words) return;
    const [from, to] = FL.onPage(), passage = FL.state.scope === "passage";
    page.max = FL.pages() - 1;
    page.value = passage ? FL.state.passage : FL.state.page;
    FL.id("back").disabled = Number(page.value) === 0;
    FL.id("forth").disabled = Number(page.value) === Number(page.max);
    FL.id("place").textContent = FL.say(passage ? "text.passage" : "text.place", {
      number: FL.number(Number(page.value) + 1), of: FL.number(FL.pages()), from: FL.number(from), to: FL.number(to - 1),
    });
    page.setAttribute("aria-valuetext", FL.id("place").textContent);
    const parts = [];
    let breaks = 0; // of the blank tokens directly before: two make a paragraph
    for (let position = from; position < to; position++) {
      const piece = FL.piece(position);
      if (!piece) continue;
      if (piece.space && !piece.blank) parts.push(piece.space.replace(/\n\s*\n/g, "\n\n").replace(/([^\n])\n([^\n])/g, "$1 $2").replace(/^\n$/, " "));
      parts.push(FL.el("span", { role: "button", tabindex: -1, "data-at": position, class: piece.frame ? "frame-token" : piece.blank ? "blank" : "", text: piece.word }));
      if (piece.blank) parts.push(breaks < 2 && breaks + piece.breaks > 1 ? "\n\n" : " ");
      breaks = piece.blank ? breaks + piece.breaks : 0;
    }
    box.replaceChildren(...parts);
    if (focus < from || focus >= to) focus = from;
    rove(focus, false);
    FL.markHits();
    const { shown, tokens } = FL.data.words;
    FL.id("ended").textContent = shown < tokens ? FL.say("text.ended", { shown: FL.number(shown), tokens: FL.number(tokens) }) : "";
    mark();
  }

  FL.tokenAt = (position) => box.querySelector(`[data-at="${position}"]`);

  function mark() {
    const { source, target, layer } = FL.state, relays = new Set(FL.path_ ? FL.path_.positions.slice(1, -1) : []);
    for (const span of box.children) {
      const at = Number(span.dataset.at), role = at === source ? "source" : at === target ? "target" : relays.has(at) ? "relay" : "";
      const heard = FL.levels && FL.levels[at] >= 0 && FL.levels[at] <= layer;
      span.classList.remove("source", "target", "relay", "heard");
      if (role) span.classList.add(role);
      else if (heard) span.classList.add("heard");
      span.setAttribute("aria-pressed", role === "source" || role === "target" ? "true" : "false");
      span.title = role ? FL.say(`legend.${role}`) : "";
    }
  }

  function rove(position, take = true) {
    const was = box.querySelector('[tabindex="0"]'), now = FL.tokenAt(position);
    if (was) was.tabIndex = -1;
    if (!now) return;
    focus = position;
    now.tabIndex = 0;
    if (take) now.focus();
  }

  /* The first token picked is the source, the second the target, the third a new source. */
  function pick(position) {
    rove(position, false);
    if (!FL.hasView()) return;
    if (next === "source" || FL.state.source === null) {
      next = "target";
      FL.set({ source: position, target: null });
    } else {
      next = "source";
      FL.set({ target: position });
    }
  }

  FL.goTo = (position, take) => {
    if (FL.state.scope !== "passage") FL.set({ page: Math.min(FL.pages() - 1, FL.pageOf(position)) });
    rove(position, take);
    const span = FL.tokenAt(position);
    if (span) span.scrollIntoView({ block: "center" });
  };

  box.addEventListener("click", (event) => {
    const span = event.target.closest("[data-at]");
    if (span) pick(Number(span.dataset.at));
  });
  box.addEventListener("keydown", (event) => {
    const [from, to] = FL.onPage();
    const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 12, ArrowUp: -12 };
    if (event.key in moves) {
      event.preventDefault();
      rove(Math.min(to - 1, Math.max(from, focus + moves[event.key])));
    } else if (event.key === "Home" || event.key === "End") {
      event.preventDefault();
      rove(event.key === "Home" ? from : to - 1);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      pick(focus);
    }
  });

  const turn = (number) => {
    const to = Math.min(FL.pages() - 1, Math.max(0, number));
    FL.set(FL.state.scope === "passage" ? { passage: to } : { page: to });
  };
  page.addEventListener("input", () => turn(Number(page.value)));
  FL.id("back").addEventListener("click", () => turn(Number(page.value) - 1));
  FL.id("forth").addEventListener("click", () => turn(Number(page.value) + 1));
  FL.on((changed) => {
    if (["scope", "start"].some((name) => changed.has(name))) {
      focus = 0;
      if (FL.state.page) FL.state.page = 0;
    }
    if (["scope", "start", "passage", "page", "language"].some((name) => changed.has(name))) lay();
    else if (["source", "target", "path", "levels", "layer"].some((name) => changed.has(name))) mark();
  });
})();
