/* The text by token: the word at a position of the chosen scope, paging and search. */
"use strict";
(() => {
  const PAGE = 400;
  let content = "", ends = new Int32Array(0);

  FL.loadWords = async () => {
    const words = FL.data.words;
    if (!words) return;
    content = await FL.unpack(words.content);
    const lengths = await FL.unpack(words.lengths);
    ends = new Int32Array(lengths.length);
    for (let t = 0, end = 0; t < lengths.length; t++) ends[t] = end += lengths[t];
  };

  const slice = (t) => content.slice(t ? ends[t - 1] : 0, ends[t]);

  /* {frame, space, word} at a position of the scope (frame: a special token; of white space alone also blank, and breaks, its
     line breaks); null beyond the text that the page carries. */
  FL.piece = (position) => {
    const { words, passages } = FL.data;
    if (!words || position === null) return null;
    let token = position;
    if (FL.state.scope === "passage") {
      const inside = passages.length - words.before.length - words.after.length, start = passages.starts[FL.state.passage];
      const size = Math.min(inside, passages.of - start);
      if (position < words.before.length) return { frame: true, space: "", word: words.before[position] };
      if (position >= words.before.length + size) return { frame: true, space: "", word: words.after[position - words.before.length - size] };
      token = start + position - words.before.length;
    }
    if (token >= ends.length) return null;
    const text = slice(token), word = text.trimStart();
    if (!word) return { frame: false, blank: true, breaks: text.split("\n").length - 1, space: text, word: text.includes("\n") ? "↵" : "␣" };
    return { frame: false, space: text.slice(0, text.length - word.length), word };
  };

  /* The word at a position, joined from its subword tokens. */
  FL.word = (position) => {
    const piece = FL.piece(position);
    if (!piece) return null;
    let word = piece.word;
    const letters = /^[\p{L}\p{N}]+$/u, whole = (other) => other && !other.frame && letters.test(other.word);
    if (piece.frame || !letters.test(word)) return word.trim().slice(0, 40);
    for (let at = position, here = piece; at > 0 && !here.space && whole(FL.piece(at - 1)); at--) {
      here = FL.piece(at - 1);
      word = here.word + word;
    }
    for (let at = position + 1, n = FL.n(); at < n; at++) {
      const here = FL.piece(at);
      if (!whole(here) || here.space) break;
      word += here.word;
    }
    return word.slice(0, 40);
  };

  /* The text on both sides of a token. */
  FL.context = (position, reach = 5) => {
    const part = (from, to) => {
      let out = "";
      for (let p = Math.max(0, from); p < Math.min(FL.n(), to); p++) {
        const piece = FL.piece(p);
        if (piece && !piece.frame) out += piece.space.replace(/\s+/g, " ") + (piece.blank ? "" : piece.word);
      }
      return out;
    };
    return [part(position - reach, position), part(position + 1, position + 1 + reach)];
  };

  /* Number of pages, page of a position, and positions [from, to) of the current page. */
  FL.pages = () => (FL.state.scope === "passage" ? FL.data.passages.starts.length : Math.max(1, Math.ceil(ends.length / PAGE)));
  FL.pageOf = (position) => (FL.state.scope === "passage" ? FL.state.passage : Math.floor(position / PAGE));
  FL.onPage = () => {
    if (FL.state.scope === "passage") return [0, FL.data.passages.length];
    return [FL.state.page * PAGE, Math.min(ends.length, (FL.state.page + 1) * PAGE)];
  };

  /* The token of the text at a position of the scope; null for a special token and beyond the text that the page carries. */
  FL.tokenOf = (position) => {
    const { words, passages } = FL.data;
    if (FL.state.scope !== "passage") return position < ends.length ? position : null;
    const inside = passages.length - words.before.length - words.after.length, token = position - words.before.length;
    return token < 0 || token >= inside ? null : passages.starts[FL.state.passage] + token;
  };

  /* The passage that contains a token, the current one first; -1 for none. */
  FL.passageOf = (token) => {
    const { words, passages } = FL.data, inside = passages.length - words.before.length - words.after.length;
    const holds = (start) => start <= token && token < start + inside;
    return holds(passages.starts[FL.state.passage]) ? FL.state.passage : passages.starts.findIndex(holds);
  };

  FL.tokensShown = () => ends.length;

  /* Lower case, character by character where the whole changes its length. */
  function lower() {
    const all = content.toLowerCase();
    return all.length === content.length ? all : Array.from(content, (c) => (c.toLowerCase().length === c.length ? c.toLowerCase() : c)).join("");
  }

  function tokenAtCharacter(at) {
    let a = 0, b = ends.length;
    while (a < b) {
      const middle = (a + b) >> 1;
      if (ends[middle] <= at) a = middle + 1;
      else b = middle;
    }
    return a;
  }

  /* Every place of the whole text where these characters stand, as [first token, last token]. */
  FL.findAll = (word) => {
    const needle = word.toLowerCase(), text = FL.lower || (FL.lower = lower()), hits = [];
    for (let at = text.indexOf(needle); needle && at >= 0; at = text.indexOf(needle, at + needle.length)) {
      hits.push([tokenAtCharacter(at), tokenAtCharacter(at + needle.length - 1)]);
    }
    return hits;
  };
})();
