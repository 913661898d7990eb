/* What a head attends to: the heaviest keys of the word that is pointed at, under full attention and under the pattern. */
"use strict";
(() => {
  const box = FL.id("tokens"), SHOWN = 10, LOG_STEPS = 4096;
  const share = (steps) => (steps === 65535 ? 0 : Math.exp(-steps / LOG_STEPS));
  const data = FL.data.weights, opened = new Map();
  let pinned = null, hovered = null, drawn = 0;

  /* The decoded rows of carried head `index`: {first, key, full, allowed, kept}. */
  async function open(index) {
    if (!opened.has(index)) {
      opened.set(index, FL.unpackAll(data.heads[index]).then(({ counts, steps, full, allowed, kept }) => {
        const first = new Int32Array(counts.length + 1), key = new Int32Array(steps.length);
        counts.forEach((count, i) => {
          first[i + 1] = first[i] + count;
          for (let x = first[i]; x < first[i + 1]; x++) key[x] = steps[x] + (x > first[i] ? key[x - 1] : 0);
        });
        return { first, key, full, allowed, kept };
      }));
    }
    return opened.get(index);
  }

  /* The row of a query under candidate `p`: {kept, keys: [{key, full, under, kept}]}, heaviest of full attention first. `under`
     and `kept` are null for a candidate that attends to block summaries too. */
  FL.attends = async (index, query, p = FL.state.pattern) => {
    const { first, key, full, allowed, kept } = await open(index), mine = kept[p] && share(kept[p][query]), keys = [];
    for (let x = first[query]; x < first[query + 1]; x++) {
      const weight = share(full[x]), seen = (allowed[p][x >> 3] >> (x & 7) & 1) === 1;
      keys.push({ key: key[x], full: weight, kept: seen, under: mine === null ? null : seen && mine > 0 ? weight / mine : 0 });
    }
    return { kept: mine, keys: keys.sort((a, b) => b.full - a.full || a.key - b.key) };
  };

  const here = () => data && FL.state.scope === "passage" && FL.state.passage === data.passage;
  const named = (position) => {
    const word = FL.word(position);
    return word === null ? FL.number(position) : `“${word}” (${FL.number(position)})`;
  };

  /* The ten heaviest of both lists, those of full attention first. */
  function listed(keys) {
    const under = [...keys].sort((a, b) => b.under - a.under), half = Math.ceil(SHOWN / 2);
    const out = new Set([...keys.slice(0, half), ...under.slice(0, half).filter((each) => each.under > 0), ...keys]);
    return [...out].slice(0, SHOWN).sort((a, b) => b.full - a.full || a.key - b.key);
  }

  async function show() {
    const run = ++drawn, { weights: index, pattern, tint } = FL.state;
    box.classList.toggle("attending", Boolean(data) && tint !== "relays");
    FL.id("attends").hidden = FL.data.kind !== "audit";
    FL.id("attends-elsewhere").hidden = !data || here();
    const query = here() ? hovered ?? pinned : null;
    const row = query === null ? null : await FL.attends(index, query, pattern);
    if (run !== drawn) return;
    FL.id("attends-keys").hidden = !row;
    wash(query, row);
    const says = FL.id("attends-says");
    if (!row) {
      says.textContent = FL.say(!data ? "attends.none" : here() ? "attends.point" : "attends.elsewhere", data ? { passage: FL.number(data.passage + 1) } : {});
      FL.id("attends-rest").textContent = "";
      return;
    }
    const { layer, head } = data.heads[index];
    const holes = { word: named(query), layer, head, kept: row.kept === null ? "" : FL.percent(row.kept), pattern: FL.row().text };
    says.textContent = FL.say(row.kept === null ? "attends.says_summaries" : "attends.says", holes);
    table(query, row);
  }

  function table(query, row) {
    const body = FL.id("attends-keys").tBodies[0], keys = listed(row.keys);
    const weight = (value, name) => FL.el("td", { class: "num", [`data-${name}`]: value, text: value === null ? "–" : FL.percent(value) });
    body.replaceChildren(...keys.map((each) => FL.el("tr", { class: each.kept ? "" : "gone", "data-key": each.key },
      FL.el("th", { scope: "row" }, FL.el("button", { type: "button", text: named(each.key), onclick: () => FL.goTo(each.key, false) })),
      weight(each.full, "full"), weight(each.under, "under"),
      FL.el("td", {}, FL.el("span", { class: each.kept ? "tag kept" : "tag gone", text: FL.say(each.kept ? "attends.kept" : "attends.lost") })))));
    const sum = (name) => keys.reduce((total, each) => total + each[name], 0);
    FL.id("attends-rest").textContent = row.kept === null ? "" : FL.say("attends.rest", {
      full: FL.percent(Math.max(0, 1 - sum("full"))), under: FL.percent(row.kept > 0 ? Math.max(0, 1 - sum("under")) : 0),
    });
  }

  /* Tints the words by their weight; keys that the pattern lacks are outlined. */
  function wash(query, row) {
    for (const span of box.querySelectorAll(".attended, .asking")) {
      span.classList.remove("attended", "gone", "asking");
      span.style.removeProperty("--weight");
    }
    if (!row || FL.state.tint === "relays") return;
    for (const { key, full, under, kept } of row.keys) {
      const span = FL.tokenAt(key), weight = FL.state.tint === "under" ? under : full;
      if (!span || !weight) continue;
      span.classList.add("attended");
      span.classList.toggle("gone", !kept);
      span.style.setProperty("--weight", `${Math.round(100 * Math.min(1, Math.sqrt(weight)))}%`);
    }
    const asking = FL.tokenAt(query);
    if (asking) asking.classList.add("asking");
  }

  const at = (event) => {
    const span = event.target.closest("[data-at]");
    return span ? Number(span.dataset.at) : null;
  };
  box.addEventListener("pointerover", (event) => {
    if (event.pointerType === "touch" || at(event) === hovered) return;
    hovered = at(event);
    show();
  });
  box.addEventListener("pointerleave", () => {
    hovered = null;
    show();
  });
  for (const name of ["click", "focusin"]) {
    box.addEventListener(name, (event) => {
      if (at(event) === null || at(event) === pinned) return;
      pinned = at(event);
      show();
    });
  }

  FL.id("attends-head").addEventListener("change", (event) => FL.chooseHead(Number(event.target.value)));
  FL.chooseHead = (index) => FL.set({ weights: index, head: data.heads[index].head });
  FL.id("attends-elsewhere").addEventListener("click", () => {
    FL.scope("passage");
    FL.set({ passage: data.passage });
  });
  const tints = FL.id("tint");
  tints.addEventListener("change", (event) => FL.set({ tint: event.target.value }));

  function labels() {
    FL.id("attends-head").replaceChildren(...(data ? data.heads : []).map(({ layer, head }, index) => FL.el("option", { value: index, text: FL.say("attends.head", { layer, head }) })));
    FL.id("attends-head").value = String(FL.state.weights);
    tints.hidden = !data;
    FL.id("attends-pick").hidden = !data;
  }

  FL.on((changed) => {
    if (FL.data.kind !== "audit") return;
    if (["passage", "scope"].some((name) => changed.has(name))) pinned = hovered = null;
    // A head chosen elsewhere shows its weights where the page carries them.
    if (data && changed.has("head") && data.heads[FL.state.weights].head !== FL.state.head) {
      const index = data.heads.findIndex(({ head }) => head === FL.state.head);
      if (index >= 0) FL.state.weights = index;
    }
    if (["start", "language", "weights", "head"].some((name) => changed.has(name))) labels();
    if (["start", "language", "weights", "head", "pattern", "passage", "scope", "tint"].some((name) => changed.has(name))) show();
  });
})();
