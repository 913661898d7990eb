/* Density (share of allowed pairs) of each pixel of a view, counted exactly from the pieces of every row. */
"use strict";
(() => {
  /* Pixel p covers the positions edges[p] … edges[p + 1] - 1. */
  FL.edges = (start, span, pixels) => Int32Array.from({ length: pixels + 1 }, (_, p) => start + Math.floor((p * span) / pixels));

  /* Adds one row to its line of pixels: `part` counts pairs in pixels that a piece partly covers, `whole` is a difference array
     of fully covered pixels. Returns the work done. */
  function addRow(pieces, edges, start, span, pixels, part, whole) {
    const { lo, hi, step, width } = pieces;
    const pixel = (key) => Math.floor(((key - start + 1) * pixels - 1) / span);
    let work = 0;
    for (let x = 0; x < pieces.count; x++) {
      const first = pixel(lo[x]), last = pixel(hi[x] - 1);
      work++;
      if (step[x] === 0) {
        if (first === last) part[first] += hi[x] - lo[x];
        else {
          part[first] += edges[first + 1] - lo[x];
          part[last] += hi[x] - edges[last];
          whole[first + 1]++;
          whole[last]--;
        }
        continue;
      }
      const base = lo[x], s = step[x], w = width[x], teeth = Math.ceil((hi[x] - base) / s);
      if (teeth < last - first) {
        for (let key = base; key < hi[x]; key += s) {
          for (let t = key, end = Math.min(hi[x], key + w); t < end; t++) part[pixel(t)]++;
        }
        work += teeth;
        continue;
      }
      let before = 0;
      for (let p = first; p <= last; p++) {
        const far = Math.min(hi[x], edges[p + 1]) - base, rest = far % s;
        const upTo = ((far - rest) / s) * w + (rest < w ? rest : w);
        part[p] += upTo - before;
        before = upTo;
      }
      work += last - first;
    }
    return work;
  }

  /* Estimated work of a view in pieces and pixels, from up to 24 of its rows. */
  FL.workOf = (pattern, view, pixels) => {
    const edges = FL.edges(view.left, view.span, pixels), part = new Float64Array(pixels + 1), whole = new Float64Array(pixels + 2);
    const samples = Math.min(view.span, 24), before = FL.work;
    let work = 0;
    for (let x = 0; x < samples; x++) {
      const row = view.top + Math.floor(((x + 0.5) * view.span) / samples);
      work += addRow(pattern.row(row, view.left, view.left + view.span), edges, view.left, view.span, pixels, part, whole);
    }
    return ((work + FL.work - before) / samples) * view.span;
  };

  /* Calls `line(r, shares, ofParts)` for each line of pixels from the top, the shares of the pattern and of each of `patterns`;
     returns false when `alive()` turned false before the end. A view is a square: `span` positions from `top` down and from
     `left` across. */
  FL.density = async (pattern, view, pixels, line, alive, patterns = []) => {
    const { top, left, span } = view;
    const down = FL.edges(top, span, pixels), across = FL.edges(left, span, pixels);
    const sums = [pattern, ...patterns].map((each) => ({
      pattern: each, part: new Float64Array(pixels), whole: new Float64Array(pixels + 1), shares: new Float32Array(pixels),
    }));
    const [{ shares }, ...others] = sums, ofParts = others.map((each) => each.shares);
    let sliceStart = performance.now();
    for (let r = 0; r < pixels; r++) {
      for (const { part, whole } of sums) {
        part.fill(0);
        whole.fill(0);
      }
      for (let i = down[r]; i < down[r + 1]; i++) {
        for (const each of sums) addRow(each.pattern.row(i, left, left + span), across, left, span, pixels, each.part, each.whole);
        if ((i & 63) === 0 && performance.now() - sliceStart > 14) {
          await FL.breathe();
          if (!alive()) return false;
          sliceStart = performance.now();
        }
      }
      const rows = down[r + 1] - down[r];
      for (const { part, whole, shares: out } of sums) {
        let full = 0;
        for (let p = 0; p < pixels; p++) {
          full += whole[p];
          const wide = across[p + 1] - across[p];
          out[p] = (part[p] + full * wide) / (rows * wide);
        }
      }
      line(r, shares, ofParts);
    }
    return true;
  };
})();
