/* The counter-based random numbers of farlight.patterns.hashing, in the same 32-bit operations. */
"use strict";
(() => {
  function mix32(x) {
    x ^= x >>> 16;
    x = Math.imul(x, 0x85ebca6b);
    x ^= x >>> 13;
    x = Math.imul(x, 0xc2b2ae35);
    return x ^ (x >>> 16);
  }

  /* Hash state after one more 32-bit word. */
  const hashWord = (h, word) => (Math.imul(mix32(h ^ word), 5) + 0xe6546b64) | 0;

  const START = 0x9e3779b9 | 0;

  /* (h * bound) >> 32 for h < 2^32 and bound <= 2^31, in steps that a double holds exactly. */
  function drawBelow(h, bound) {
    h >>>= 0;
    if (bound <= 0x100000) return Math.floor((h * bound) / 4294967296);
    const high = (h >>> 16) * bound, low = (h & 0xffff) * bound;
    return Math.floor((high + Math.floor(low / 65536)) / 65536);
  }

  /* Writes `count` distinct numbers below `population` into `out` (Floyd's algorithm); returns how many, fewer if population is. */
  FL.drawDistinct = (seed, head, at, count, population, out) => {
    let row = hashWord(hashWord(START, seed[0] | 0), seed[1] | 0);
    row = hashWord(hashWord(row, head), at);
    const first = hashWord(START, row);
    let size = 0;
    for (let t = 0; t < count; t++) {
      const bound = population - count + t + 1;
      if (bound <= 0) continue;
      const pick = drawBelow(hashWord(first, t), bound);
      let taken = false;
      for (let x = 0; x < size; x++) if (out[x] === pick) { taken = true; break; }
      out[size++] = taken ? bound - 1 : pick;
    }
    return size;
  };
})();
