/* The matrix view: queries down, keys across; zoom, pan, cell cursor and selection of source and target. */
"use strict";
(() => {
  const canvas = FL.id("grid"), over = FL.id("over"), sheet = document.createElement("canvas");
  const FEWEST = 16, MOST_WORK = 1.2e9;
  const matrix = (FL.matrix = { view: null, cursor: { i: 0, j: 0 }, shares: null, pixels: 0, run: 0, state: "busy" });

  const fewest = () => Math.min(FEWEST, FL.n());
  const clampView = ({ top, left, span }) => {
    const n = FL.n(), size = Math.round(Math.min(n, Math.max(fewest(), span)));
    const place = (x) => Math.round(Math.min(n - size, Math.max(0, x)));
    return { top: place(top), left: place(left), span: size };
  };

  const shownKinds = () => FL.KINDS.filter((name) => !FL.state.hidden.split(" ").includes(name));

  /* Darkness of a density: itself where a pixel is one pair, else its fourth root, which keeps a single global token visible. */
  const darkness = (share, cells) => (cells ? share : share ** 0.25);

  function show(view) {
    matrix.view = clampView(view);
    const { top, left, span } = matrix.view;
    canvas.dataset.view = `${top},${left},${span}`;
    FL.id("zoom").value = Math.round(zoomOf(span));
    FL.id("span").textContent = FL.say("matrix.span", { tokens: FL.number(span) });
    FL.id("zoom").setAttribute("aria-valuetext", FL.id("span").textContent);
    // A finger on the whole picture scrolls the page; zoomed in, it moves the picture.
    canvas.style.touchAction = span === FL.n() ? "pan-y" : "none";
    draw();
    overlay();
    here();
  }

  const zoomOf = (span) => {
    const low = Math.log(fewest()), high = Math.log(FL.n());
    return high > low ? 1000 * (1 - (Math.log(span) - low) / (high - low)) : 0;
  };
  const spanAt = (zoom) => Math.exp(Math.log(FL.n()) - (zoom / 1000) * (Math.log(FL.n()) - Math.log(fewest())));

  /* Draws the overlapping part of the previous image until the new one is counted. */
  function stretch(context, size) {
    if (!matrix.held) return;
    const was = matrix.held.view, now = matrix.view, scale = size / now.span;
    context.imageSmoothingEnabled = false;
    context.drawImage(matrix.held.image, (was.left - now.left) * scale, (was.top - now.top) * scale, was.span * scale, was.span * scale);
  }

  const fineness = () => Math.max(64, Math.min(1024, Math.round(canvas.clientWidth * (window.devicePixelRatio || 1))));

  async function draw() {
    const run = ++matrix.run, alive = () => run === matrix.run, size = fineness();
    if (canvas.width !== size) canvas.width = canvas.height = size;
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, size, size);
    stretch(context, size);
    state("busy");
    const whole = await FL.pattern(), view = matrix.view, pixels = Math.min(view.span, size), cells = pixels === view.span;
    if (!alive()) return;
    const pattern = FL.ofKinds(whole, shownKinds()), parts = FL.byKind(whole).filter(({ kind }) => shownKinds().includes(kind));
    const colours = parts.map(({ kind }) => FL.colourOf(kind)), shares = new Float32Array(pixels * pixels), single = colours[0] || [0, 0, 0];
    sheet.width = sheet.height = pixels;
    const paper = sheet.getContext("2d"), image = paper.createImageData(pixels, pixels);
    const ink = (at, dark, [red, green, blue] = single) => {
      image.data[4 * at] = red;
      image.data[4 * at + 1] = green;
      image.data[4 * at + 2] = blue;
      image.data[4 * at + 3] = Math.round(255 * dark);
    };
    // Lines that are not counted yet keep the stretched previous image.
    const paint = (lines) => {
      const high = (lines * size) / pixels;
      paper.putImageData(image, 0, 0);
      context.clearRect(0, 0, size, size);
      stretch(context, size);
      context.clearRect(0, 0, size, high);
      context.imageSmoothingEnabled = false;
      context.drawImage(sheet, 0, 0, pixels, lines, 0, 0, size, high);
    };
    const picture = FL.view().picture;
    let exact = true;
    if (picture && pattern === whole && FL.workOf(pattern, view, pixels) > MOST_WORK) {
      exact = false;
      await fromPicture(picture, view, pixels, shares, ink);
      if (!alive()) return;
    } else {
      let painted = performance.now();
      const done = await FL.density(pattern, view, pixels, (r, line, ofParts) => {
        shares.set(line, r * pixels);
        for (let p = 0; p < pixels; p++) ink(r * pixels + p, darkness(line[p], cells), mixed(ofParts, p, colours, cells));
        if (performance.now() - painted > 120) {
          painted = performance.now();
          paint(r + 1);
          canvas.dataset.done = String(Math.round((100 * r) / pixels));
        }
      }, alive, parts.length > 1 ? parts.map((part) => part.pattern) : []);
      if (!done) return;
    }
    paint(pixels);
    if (cells && size / pixels >= 7) lines(context, size, pixels);
    const copy = document.createElement("canvas");
    copy.width = copy.height = size;
    copy.getContext("2d").drawImage(canvas, 0, 0);
    matrix.held = { view, image: copy };
    Object.assign(matrix, { shares, pixels });
    state(exact ? "exact" : "picture");
    here();
  }

  /* The colour of a pixel: that of the first kind where it is one pair, else the mean of its kinds by the root of their shares. */
  function mixed(ofParts, p, colours, cells) {
    if (!ofParts.length) return colours[0];
    if (cells) return colours[Math.max(0, ofParts.findIndex((line) => line[p] > 0))];
    const sum = [0, 0, 0];
    let total = 0;
    for (let k = 0; k < ofParts.length; k++) {
      const weight = Math.sqrt(ofParts[k][p]);
      if (!weight) continue;
      total += weight;
      for (let c = 0; c < 3; c++) sum[c] += weight * colours[k][c];
    }
    return total ? sum.map((x) => x / total) : colours[0];
  }

  function lines(context, size, pixels) {
    context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--edge");
    context.lineWidth = 1;
    context.beginPath();
    for (let p = 1; p < pixels; p++) {
      const at = Math.round((p * size) / pixels) + 0.5;
      context.moveTo(at, 0);
      context.lineTo(at, size);
      context.moveTo(0, at);
      context.lineTo(size, at);
    }
    context.stroke();
  }

  async function fromPicture(picture, view, pixels, shares, ink) {
    const held = (picture.read = picture.read || FL.unpack(picture.ink)), table = await held, n = FL.n();
    for (let r = 0; r < pixels; r++) {
      const row = Math.floor(((view.top + ((r + 0.5) * view.span) / pixels) * picture.pixels) / n);
      for (let p = 0; p < pixels; p++) {
        const column = Math.floor(((view.left + ((p + 0.5) * view.span) / pixels) * picture.pixels) / n);
        const dark = table[row * picture.pixels + column] / 255;
        shares[r * pixels + p] = dark ** 4;
        ink(r * pixels + p, dark);
      }
    }
  }

  function state(now) {
    matrix.state = now;
    canvas.dataset.state = now;
  }

  // ---- overlay ----------------------------------------------------------------------------------------------------
  const x = (key) => (1000 * (key - matrix.view.left + 0.5)) / matrix.view.span;
  const y = (row) => (1000 * (row - matrix.view.top + 0.5)) / matrix.view.span;

  function overlay() {
    if (!matrix.view) return;
    over.setAttribute("viewBox", "0 0 1000 1000");
    over.replaceChildren();
    const { i, j } = matrix.cursor, cell = 1000 / matrix.view.span;
    ticks();
    over.append(FL.svg("path", { class: "cross", d: `M0 ${y(i)}H1000M${x(j)} 0V1000`, "vector-effect": "non-scaling-stroke" }));
    const path = FL.path_;
    if (!path || !path.positions.length) return;
    const positions = path.positions.slice(0, 1500);
    let d = `M${x(positions[0])} ${y(positions[0])}`;
    for (let p = 1; p < positions.length; p++) d += `V${y(positions[p])}H${x(positions[p])}`;
    over.append(FL.svg("path", { class: "hop", d, "vector-effect": "non-scaling-stroke" }));
    for (const { speaker, listener } of path.hops.slice(0, 1500)) {
      if (cell >= 8) {
        over.append(FL.svg("rect", { class: "cell", x: x(speaker) - cell / 2, y: y(listener) - cell / 2, width: cell, height: cell }));
      } else over.append(FL.svg("circle", { class: "dot", cx: x(speaker), cy: y(listener), r: 8 }));
    }
    const end = (position, name) => over.append(FL.svg("circle", { class: `dot ${name}`, cx: x(position), cy: y(position), r: 9 }));
    end(positions[0], "source");
    if (positions.length > 1) end(positions[positions.length - 1], "target");
  }

  /* Positions along the left and the lower edge, at steps of 1, 2 or 5 times a power of ten. */
  function ticks() {
    const { top, left, span } = matrix.view, unit = 1000 / Math.max(120, canvas.clientWidth || 1000), rough = span / (canvas.clientWidth < 420 ? 3 : 5);
    const power = 10 ** Math.floor(Math.log10(Math.max(1, rough))), step = power * ([1, 2, 5, 10].find((x) => x * power >= rough) || 10);
    const text = (x, y, anchor, value) => FL.svg("text", { class: "place", x, y, "text-anchor": anchor, "font-size": 11.5 * unit, "stroke-width": 3 * unit }, value);
    const mark = (value) => FL.short(value).length < FL.number(value).length && value >= 10000 && value % 100 === 0 && span > 5000 ? FL.short(value) : FL.number(value);
    for (let at = Math.ceil(left / step) * step; at < left + span; at += step) {
      const place = x(at);
      over.append(FL.svg("path", { class: "tick-line", d: `M${place} 1000v${-7 * unit}`, "vector-effect": "non-scaling-stroke" }));
      if (place > 40 * unit && place < 1000 - 30 * unit) over.append(text(place, 1000 - 11 * unit, "middle", mark(at)));
    }
    for (let at = Math.ceil(top / step) * step; at < top + span; at += step) {
      const place = y(at);
      over.append(FL.svg("path", { class: "tick-line", d: `M0 ${place}h${7 * unit}`, "vector-effect": "non-scaling-stroke" }));
      if (place > 12 * unit && place < 1000 - 30 * unit) over.append(text(11 * unit, place + 4 * unit, "start", mark(at)));
    }
  }

  // ---- kinds of rules and the schematic ---------------------------------------------------------------------------
  const sketch = FL.id("sketch");

  async function legend() {
    const pattern = await FL.pattern();
    if (pattern !== (await FL.pattern())) return; // another one was chosen while this one was unpacked
    const box = FL.id("kinds"), kinds = FL.byKind(pattern).map(({ kind }) => kind), hidden = new Set(FL.state.hidden.split(" "));
    box.replaceChildren(FL.el("legend", { class: "hidden", text: FL.say("kind.legend") }), ...kinds.map((kind) => {
      const tick = FL.el("input", { type: "checkbox", value: kind, onchange: () => {
        const out = FL.KINDS.filter((name) => (name === kind ? hidden.has(name) === false : hidden.has(name)));
        FL.set({ hidden: out.join(" ") });
      } });
      tick.checked = !hidden.has(kind);
      return FL.el("label", { class: "kind" }, tick, FL.el("i", { class: `swatch ${kind}` }), FL.el("span", { text: FL.say(`kind.${kind}`) }));
    }));
  }

  async function schematic() {
    const pattern = await FL.pattern();
    if (pattern !== (await FL.pattern())) return;
    const hairline = FL.isHairline(pattern.rule, FL.n()), shown = hairline && FL.state.schematic;
    FL.id("scale-pick").hidden = !hairline;
    for (const button of FL.id("scale-pick").children) button.setAttribute("aria-checked", String((button.value === "schematic") === shown));
    sketch.hidden = !shown;
    for (const part of [canvas, over]) part.classList.toggle("under", shown);
    const says = FL.id("sketch-says");
    says.hidden = !shown;
    if (!shown) return;
    says.textContent = FL.say("sketch.says", { cells: FL.CELLS, n: FL.number(FL.n()) });
    sketch.setAttribute("aria-label", says.textContent);
    FL.drawCells(sketch, FL.compile(FL.schematic(pattern.rule, FL.n()), FL.CELLS), shownKinds(), 16 * FL.CELLS);
  }
  for (const button of FL.id("scale-pick").children) button.addEventListener("click", () => FL.set({ schematic: button.value === "schematic" }));
  sketch.addEventListener("click", () => FL.set({ schematic: false }));

  const named = (position) => {
    const word = FL.word(position);
    return word === null ? FL.number(position) : `${FL.number(position)} “${word}”`;
  };

  /* The sentence about the cell under the cursor. */
  async function here() {
    const { i, j } = matrix.cursor, pattern = await FL.pattern();
    if (i >= FL.n() || j >= FL.n()) return;
    const allowed = pattern.allows(i, j);
    const rules = allowed ? FL.rulesOf(pattern, i, j).map((rule) => FL.tellRule(rule, FL.say)).join(FL.say("rule.or")) : "";
    let text = FL.say(allowed ? "matrix.allowed" : "matrix.refused", { query: named(i), key: named(j), rules });
    const { view, pixels, shares } = matrix;
    const r = Math.floor(((i - view.top) * pixels) / view.span), p = Math.floor(((j - view.left) * pixels) / view.span);
    if (shares && pixels < view.span && r >= 0 && p >= 0 && r < pixels && p < pixels && matrix.state !== "busy") {
      const side = Math.ceil(view.span / pixels), share = FL.percent(shares[r * pixels + p], 1);
      text += ` ${FL.say(matrix.state === "exact" ? "matrix.pixel" : "matrix.about", { side: FL.number(side), share })}`;
    }
    if (matrix.state === "busy") text += ` ${FL.say("matrix.busy")}`;
    FL.id("here").textContent = text;
  }

  // ---- pointer and keyboard ---------------------------------------------------------------------------------------
  const cellAt = (event) => {
    const box = canvas.getBoundingClientRect(), { top, left, span } = matrix.view;
    const at = (offset, size) => Math.min(span - 1, Math.max(0, Math.floor((offset / size) * span)));
    return { i: top + at(event.clientY - box.top, box.height), j: left + at(event.clientX - box.left, box.width) };
  };

  function zoom(factor, around = null) {
    const { top, left, span } = matrix.view, middle = around || { i: top + span / 2, j: left + span / 2 };
    const size = Math.min(FL.n(), Math.max(fewest(), span * factor)), change = size / span;
    show({ top: middle.i - (middle.i - top) * change, left: middle.j - (middle.j - left) * change, span: size });
  }

  const pick = ({ i, j }) => FL.set({ source: j, target: i });
  const hands = new Map();
  let moved = false, grip = null;

  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    hands.set(event.pointerId, event);
    moved = hands.size > 1;
    grip = { view: matrix.view, hands: [...hands.values()] };
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!hands.has(event.pointerId)) {
      matrix.cursor = cellAt(event);
      overlay();
      here();
      return;
    }
    hands.set(event.pointerId, event);
    const first = grip.hands[0], now = hands.get(first.pointerId) || event, size = canvas.clientWidth;
    if (grip.hands.length > 1 && hands.size > 1) {
      const apart = ([a, b]) => Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
      const factor = apart(grip.hands) / Math.max(1, apart([...hands.values()])), { top, left, span } = grip.view;
      show({ top: top + (span * (1 - factor)) / 2, left: left + (span * (1 - factor)) / 2, span: span * factor });
    } else if (moved || Math.hypot(now.clientX - first.clientX, now.clientY - first.clientY) > 5) {
      moved = true;
      const scale = grip.view.span / size;
      show({ ...grip.view, top: grip.view.top - (now.clientY - first.clientY) * scale, left: grip.view.left - (now.clientX - first.clientX) * scale });
    }
  });
  /* Fingers that stay go on from the picture as it is now. */
  function lift(event) {
    hands.delete(event.pointerId);
    grip = { view: matrix.view, hands: [...hands.values()] };
  }
  canvas.addEventListener("pointerup", (event) => {
    lift(event);
    if (moved) return;
    matrix.cursor = cellAt(event);
    canvas.focus({ preventScroll: true });
    pick(matrix.cursor);
    overlay();
    here();
  });
  canvas.addEventListener("pointercancel", lift);
  canvas.addEventListener("dblclick", (event) => zoom(0.5, cellAt(event)));
  canvas.addEventListener("wheel", (event) => {
    // The wheel scrolls the page unless the canvas has the focus or Ctrl is held.
    if (document.activeElement !== canvas && !event.ctrlKey) return;
    event.preventDefault();
    zoom(Math.exp(event.deltaY / 400), cellAt(event));
  }, { passive: false });

  function step(down, across) {
    const { cursor, view } = matrix, n = FL.n(), keep = (value) => Math.min(n - 1, Math.max(0, value));
    cursor.i = keep(cursor.i + down);
    cursor.j = keep(cursor.j + across);
    const into = (at, start) => (at < start ? at : at >= start + view.span ? at - view.span + 1 : start);
    const top = into(cursor.i, view.top), left = into(cursor.j, view.left);
    if (top !== view.top || left !== view.left) show({ top, left, span: view.span });
    overlay();
    here();
  }

  canvas.addEventListener("keydown", (event) => {
    const far = event.shiftKey ? Math.max(1, Math.round(matrix.view.span / 8)) : 1, centre = matrix.cursor;
    const acts = {
      ArrowUp: () => step(-far, 0), ArrowDown: () => step(far, 0), ArrowLeft: () => step(0, -far), ArrowRight: () => step(0, far),
      "+": () => zoom(0.5, centre), "=": () => zoom(0.5, centre), "-": () => zoom(2, centre), "0": whole, Home: whole,
      Enter: () => pick(matrix.cursor), " ": () => pick(matrix.cursor), Escape: () => FL.set({ source: null, target: null }),
    };
    if (!acts[event.key] || event.metaKey || event.altKey) return;
    event.preventDefault();
    acts[event.key]();
  });

  const whole = () => show({ top: 0, left: 0, span: FL.n() });
  for (const name of ["closer", "wider", "whole"]) FL.id(name).addEventListener("click", () => FL.set({ schematic: false }));
  FL.id("zoom").addEventListener("input", () => FL.set({ schematic: false }));
  FL.id("closer").addEventListener("click", () => zoom(0.5, inView() ? matrix.cursor : null));
  FL.id("wider").addEventListener("click", () => zoom(2, inView() ? matrix.cursor : null));
  FL.id("whole").addEventListener("click", whole);
  FL.id("zoom").addEventListener("input", (event) => zoom(spanAt(event.target.value) / matrix.view.span, inView() ? matrix.cursor : null));
  const inView = () => {
    const { cursor: { i, j }, view: { top, left, span } } = matrix;
    return i >= top && i < top + span && j >= left && j < left + span;
  };
  new ResizeObserver(() => matrix.view && canvas.clientWidth && canvas.width !== fineness() && draw()).observe(canvas);

  FL.on((changed) => {
    if (changed.has("scope") || changed.has("start")) {
      FL.state.schematic = true;
      matrix.held = null;
      matrix.view = null;
      matrix.cursor = { i: Math.min(FL.n() - 1, FL.state.target || 0), j: Math.min(FL.n() - 1, FL.state.source || 0) };
      whole();
    } else if (changed.has("pattern") || changed.has("head") || changed.has("theme") || changed.has("hidden")) {
      matrix.held = null;
      show(matrix.view.span > FL.n() ? { top: 0, left: 0, span: FL.n() } : matrix.view);
    } else if (changed.has("language")) show(matrix.view);
    else if (changed.has("path")) overlay();
    if (changed.has("passage")) here();
    if (["scope", "start", "pattern", "head", "theme", "language", "hidden", "schematic"].some((name) => changed.has(name))) {
      legend();
      schematic();
    }
  });
  Object.assign(matrix, { show, zoom, mixed, darkness });
})();
