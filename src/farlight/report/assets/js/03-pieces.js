/* Sets of keys as sorted disjoint pieces, with union, intersection and difference as sweeps over two lists.

   A piece is a run [lo, hi) (step 0), or a comb: the keys j of [lo, hi) with (j - lo) mod step < width. A stride over a
   million keys is one comb. Between two consecutive end points at most one piece of each list is active. */
"use strict";
(() => {
  class Pieces {
    constructor() {
      this.count = 0;
      this.lo = new Int32Array(16);
      this.hi = new Int32Array(16);
      this.step = new Int32Array(16);
      this.width = new Int32Array(16);
    }

    clear() {
      this.count = 0;
      return this;
    }

    run(lo, hi) {
      if (lo >= hi) return;
      const last = this.count - 1;
      if (last >= 0 && this.step[last] === 0 && this.hi[last] === lo) this.hi[last] = hi;
      else this.push(lo, hi, 0, 0);
    }

    comb(lo, hi, step, width) {
      if (lo >= hi || width <= 0) return;
      if (width >= step) this.run(lo, hi);
      else if (hi - lo <= step) this.run(lo, Math.min(hi, lo + width));
      else this.push(lo, hi, step, width);
    }

    push(lo, hi, step, width) {
      if (this.count === this.lo.length) this.grow();
      const at = this.count++;
      this.lo[at] = lo;
      this.hi[at] = hi;
      this.step[at] = step;
      this.width[at] = width;
    }

    grow() {
      for (const name of ["lo", "hi", "step", "width"]) {
        const wide = new Int32Array(2 * this[name].length);
        wide.set(this[name]);
        this[name] = wide;
      }
    }

    /* The part inside [a, b) of a run or comb. */
    clip(lo, hi, step, width, a, b) {
      if (b > hi) b = hi;
      if (a <= lo) a = lo;
      if (a >= b) return;
      if (step === 0) return this.run(a, b);
      const off = (a - lo) % step;
      if (off === 0) return this.comb(a, b, step, width);
      if (off < width) this.run(a, Math.min(b, a + width - off));
      this.comb(a + step - off, b, step, width);
    }

    /* The part of [a, b) between the teeth of a comb that covers it. */
    gaps(lo, step, width, a, b) {
      const off = (a - lo) % step;
      let next = a;
      if (off < width) next = a + width - off;
      else {
        this.run(a, Math.min(b, a + step - off));
        next = a + step - off + width;
      }
      this.comb(next, b, step, step - width);
    }

    copy(from, at, a, b) {
      this.clip(from.lo[at], from.hi[at], from.step[at], from.width[at], a, b);
    }

    has(key) {
      for (let x = 0; x < this.count && this.lo[x] <= key; x++) {
        if (key < this.hi[x] && (this.step[x] === 0 || (key - this.lo[x]) % this.step[x] < this.width[x])) return true;
      }
      return false;
    }

    /* Calls `visit(lo, hi)` for each run and each tooth of a comb. */
    runs(visit) {
      for (let x = 0; x < this.count; x++) {
        const { lo, hi, step, width } = this;
        if (step[x] === 0) visit(lo[x], hi[x]);
        else for (let t = lo[x]; t < hi[x]; t += step[x]) visit(t, Math.min(hi[x], t + width[x]));
      }
    }
  }

  /* Bits of the regions that an operator keeps: 1 only in A, 2 only in B, 4 in both. */
  const KEEP = { or: 7, and: 4, sub: 1 };

  /* Two combs on [a, b): one comb where the teeth align, else tooth by tooth. */
  function twoCombs(A, x, B, y, a, b, keep, out) {
    const shift = A.lo[x] - B.lo[y];
    const [s, w, t, v] = [A.step[x], A.width[x], B.step[y], B.width[y]];
    if (s === t && shift % s === 0) {
      if (keep === 7) return (w >= v ? out.copy(A, x, a, b) : out.copy(B, y, a, b));
      if (keep === 4) return (w <= v ? out.copy(A, x, a, b) : out.copy(B, y, a, b));
      if (w <= v) return;
      // The rest of a tooth of A begins where the tooth of B ends.
      return out.clip(A.lo[x] + v, b, s, w - v, a, b);
    }
    if (w === 1 && v === 1 && keep !== 1) {
      const coarse = s % t === 0 && shift % t === 0 ? [A, x, B, y] : t % s === 0 && shift % s === 0 ? [B, y, A, x] : null;
      if (coarse) return keep === 4 ? out.copy(coarse[0], coarse[1], a, b) : out.copy(coarse[2], coarse[3], a, b);
    }
    const clippedA = SCRATCH[0].clear(), clippedB = SCRATCH[1].clear();
    clippedA.copy(A, x, a, b);
    clippedB.copy(B, y, a, b);
    combine(toRuns(clippedA, SCRATCH[2].clear()), toRuns(clippedB, SCRATCH[3].clear()), keep, a, b, out);
  }

  function toRuns(pieces, out) {
    pieces.runs((lo, hi) => out.run(lo, hi));
    FL.work += out.count;
    return out;
  }

  /* A combined with B on [a, b), appended to `out`. */
  function combine(A, B, keep, a, b, out) {
    let x = 0, y = 0, at = a;
    while (at < b) {
      while (x < A.count && A.hi[x] <= at) x++;
      while (y < B.count && B.hi[y] <= at) y++;
      const moreA = x < A.count, moreB = y < B.count;
      if (!moreA && !(keep & 2)) break;
      if (!moreA && !moreB) break;
      const inA = moreA && A.lo[x] <= at, inB = moreB && B.lo[y] <= at;
      let to = b;
      if (moreA) to = Math.min(to, inA ? A.hi[x] : A.lo[x]);
      if (moreB) to = Math.min(to, inB ? B.hi[y] : B.lo[y]);
      if (inA && inB) overlap(A, x, B, y, at, to, keep, out);
      else if (inA && keep & 1) out.copy(A, x, at, to);
      else if (inB && keep & 2) out.copy(B, y, at, to);
      at = to;
    }
    FL.work += A.count + B.count;
    return out;
  }

  /* The part [a, b) that lies in piece x of A and piece y of B. */
  function overlap(A, x, B, y, a, b, keep, out) {
    const runA = A.step[x] === 0, runB = B.step[y] === 0;
    if (runA && runB) {
      if (keep & 4) out.run(a, b);
    } else if (runA) {
      if (keep === 7) out.run(a, b);
      else if (keep === 4) out.copy(B, y, a, b);
      else out.gaps(B.lo[y], B.step[y], B.width[y], a, b);
    } else if (runB) {
      if (keep === 7) out.run(a, b);
      else if (keep === 4) out.copy(A, x, a, b);
    } else twoCombs(A, x, B, y, a, b, keep, out);
  }

  const SCRATCH = [new Pieces(), new Pieces(), new Pieces(), new Pieces()];
  FL.work = 0; // pieces touched: a machine-independent measure of time
  FL.Pieces = Pieces;
  FL.combine = (A, B, operator, a, b, out) => combine(A, B, KEEP[operator], a, b, out);
})();
