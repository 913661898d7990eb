/* Evaluator of the rules of farlight.report.formula. A compiled pattern has `allows(i, j)`, one pair, and `row(i, a, b)`, the
   keys of [a, b) that the query at i sees, as pieces; the two are implemented independently and tested against each other. */
"use strict";
(() => {
  const { Pieces, combine } = FL;
  const mod = (x, m) => ((x % m) + m) % m;

  /* Index of the run in lo, hi, lo, hi, … that contains a position, or -1. */
  function runAt(runs, position) {
    let low = 0, high = runs.length / 2;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (runs[2 * middle + 1] <= position) low = middle + 1;
      else high = middle;
    }
    return low < runs.length / 2 && runs[2 * low] <= position ? low : -1;
  }

  FL.inRuns = (runs, position) => runAt(runs, position) >= 0;

  /* The first index in sorted `list[from … to - 1]` with at least this value. */
  function lowerBound(list, value, from, to) {
    while (from < to) {
      const middle = (from + to) >> 1;
      if (list[middle] < value) from = middle + 1;
      else to = middle;
    }
    return from;
  }

  /* The runs lo, hi, lo, hi, … clipped to [a, b). */
  function cut(runs, a, b, out) {
    for (let x = 0; x < runs.length; x += 2) {
      if (runs[x] >= b) break;
      out.run(Math.max(a, runs[x]), Math.min(b, runs[x + 1]));
    }
  }

  const within = (lo, hi, a, b, out) => out.run(Math.max(lo, a), Math.min(hi, b));

  /* An index table with `each` entries per query block, each a block of keys; -1 is padding, duplicates count once. */
  function indexTable(rule, n) {
    const rows = rule.table.length / Math.max(1, rule.each), line = new Int32Array(rule.each);
    let cachedRow = -1, size = 0;
    const read = (row) => {
      if (row === cachedRow) return size;
      cachedRow = row;
      line.set(rule.table.subarray ? rule.table.subarray(row * rule.each, (row + 1) * rule.each)
        : rule.table.slice(row * rule.each, (row + 1) * rule.each));
      line.sort();
      size = 0;
      for (let x = 0; x < rule.each; x++) if (line[x] >= 0 && (size === 0 || line[size - 1] !== line[x])) line[size++] = line[x];
      return size;
    };
    return {
      allows(i, j) {
        const row = Math.floor(i / rule.query_block), key = Math.floor(j / rule.block);
        if (row >= rows) return false;
        for (let x = 0; x < rule.each; x++) if (rule.table[row * rule.each + x] === key) return true;
        return false;
      },
      fill(i, a, b, out) {
        const row = Math.floor(i / rule.query_block);
        if (row >= rows) return;
        for (let x = 0, size = read(row); x < size; x++) {
          within(line[x] * rule.block, Math.min(n, (line[x] + 1) * rule.block), a, b, out);
        }
      },
    };
  }

  /* A bit mask over blocks of queries and keys. */
  function layout(rule, n) {
    const bit = (row, column) => (rule.bits[row * rule.bytes + (column >> 3)] >> (column & 7)) & 1;
    return {
      allows(i, j) {
        const row = Math.floor(i / rule.block);
        return row < rule.rows && bit(row, Math.floor(j / rule.block)) === 1;
      },
      fill(i, a, b, out) {
        const row = Math.floor(i / rule.block), last = Math.ceil(Math.min(b, n) / rule.block);
        if (row >= rule.rows) return;
        for (let c = Math.floor(a / rule.block); c < last; c++) {
          if (bit(row, c)) within(c * rule.block, (c + 1) * rule.block, a, b, out);
        }
      },
    };
  }

  /* Equal labels; -1 is in no cluster. Keys are bucketed by label (counting sort). */
  function labels(rule, n) {
    const query = rule.labels[0], key = rule.labels[rule.labels.length - 1];
    let maxLabel = -1;
    for (let x = 0; x < n; x++) if (key[x] > maxLabel) maxLabel = key[x];
    const first = new Int32Array(maxLabel + 2), keys = new Int32Array(n);
    for (let x = 0; x < n; x++) if (key[x] >= 0) first[key[x] + 1]++;
    for (let x = 0; x <= maxLabel; x++) first[x + 1] += first[x];
    const next = first.slice();
    for (let x = 0; x < n; x++) if (key[x] >= 0) keys[next[key[x]]++] = x;
    return {
      allows: (i, j) => query[i] >= 0 && query[i] === key[j],
      fill(i, a, b, out) {
        const label = query[i];
        if (label < 0 || label > maxLabel) return;
        for (let x = lowerBound(keys, a, first[label], first[label + 1]); x < first[label + 1] && keys[x] < b; x++) {
          out.run(keys[x], keys[x] + 1);
        }
      },
    };
  }

  /* Random keys (unit 1) or random blocks of `unit` keys. */
  function randomUnits(rule, n, unit) {
    const population = Math.ceil(n / unit), count = Math.min(rule.count, population), units = new Int32Array(count);
    let cachedAt = -1, size = 0;
    const draw = (at) => {
      if (at === cachedAt) return size;
      cachedAt = at;
      size = FL.drawDistinct(rule.seed, rule.head, at, count, rule.causal ? Math.min(at + 1, population) : population, units);
      units.subarray(0, size).sort();
      return size;
    };
    // Single keys are drawn from the past; of the query's own block only the keys up to the query are visible.
    const end = (i) => (rule.causal && unit > 1 ? Math.min(n, i + 1) : n);
    return {
      allows(i, j) {
        const unitOfKey = Math.floor(j / unit);
        for (let x = 0, size = draw(Math.floor(i / unit)); x < size; x++) if (units[x] === unitOfKey) return j < end(i);
        return false;
      },
      fill(i, a, b, out) {
        for (let x = 0, size = draw(Math.floor(i / unit)); x < size; x++) {
          within(units[x] * unit, Math.min(end(i), (units[x] + 1) * unit), a, b, out);
        }
      },
    };
  }

  const ATOMS = {
    full: () => ({ allows: () => true, fill: (i, a, b, out) => out.run(a, b) }),
    causal: () => ({ allows: (i, j) => j <= i, fill: (i, a, b, out) => within(0, i + 1, a, b, out) }),
    window({ left, right, step }, n) {
      return {
        allows: (i, j) => j - i >= -left * step && j - i <= right * step && mod(j - i, step) === 0,
        fill(i, a, b, out) {
          if (step === 1) return within(i - left, i + right + 1, a, b, out);
          const lo = i - left * step, first = lo >= 0 ? lo : mod(lo, step);
          out.clip(first, Math.min(n, i + right * step + 1), step, 1, a, b);
        },
      };
    },
    strided({ stride, phase }, n) {
      const takesPart = (i) => phase === null || i % stride === phase;
      return {
        allows: (i, j) => mod(j - i, stride) === 0 && takesPart(i),
        fill(i, a, b, out) {
          if (!takesPart(i)) return;
          if (stride === 1) out.run(a, b);
          else out.clip(i % stride, n, stride, 1, a, b);
        },
      };
    },
    blocked_window({ left, right, block }) {
      return {
        allows(i, j) {
          const step = Math.floor(j / block) - Math.floor(i / block);
          return step >= -left && step <= right;
        },
        fill(i, a, b, out) {
          const queryBlock = Math.floor(i / block);
          within((queryBlock - left) * block, (queryBlock + right + 1) * block, a, b, out);
        },
      };
    },
    landmarks({ every, count }, n) {
      return {
        allows: (i, j) => j % every >= every - count,
        fill: (i, a, b, out) => (every === count ? out.run(a, b) : out.clip(every - count, n, every, count, a, b)),
      };
    },
    offsets({ values }) {
      return {
        allows: (i, j) => values.includes(j - i),
        fill(i, a, b, out) {
          for (let x = 0; x < values.length; x++) within(i + values[x], i + values[x] + 1, a, b, out);
        },
      };
    },
    sees_all: ({ runs }) => ({
      allows: (i) => runAt(runs, i) >= 0,
      fill: (i, a, b, out) => runAt(runs, i) >= 0 && out.run(a, b),
    }),
    seen_by_all: ({ runs }) => ({ allows: (i, j) => runAt(runs, j) >= 0, fill: (i, a, b, out) => cut(runs, a, b, out) }),
    global_tokens: ({ runs }) => ({
      allows: (i, j) => runAt(runs, i) >= 0 || runAt(runs, j) >= 0,
      fill: (i, a, b, out) => (runAt(runs, i) >= 0 ? out.run(a, b) : cut(runs, a, b, out)),
    }),
    padding: (rule, n) => ATOMS.seen_by_all(rule, n),
    documents: labels,
    clusters: labels,
    pairs: layout,
    blocks: layout,
    chosen_keys: indexTable,
    chosen_blocks: indexTable,
    random_keys: (rule, n) => randomUnits(rule, n, 1),
    random_blocks: (rule, n) => randomUnits(rule, n, rule.block),
    stretches({ first, lo, hi }) {
      return {
        allows(i, j) {
          for (let x = first[i]; x < first[i + 1]; x++) if (lo[x] <= j && j < hi[x]) return true;
          return false;
        },
        fill(i, a, b, out) {
          for (let x = first[i]; x < first[i + 1]; x++) within(lo[x], hi[x], a, b, out);
        },
      };
    },
  };

  const UNIVERSE = new Pieces();

  const OPERATORS = {
    or: (parts) => ({ allows: (i, j) => parts.some((part) => part.allows(i, j)) }),
    and: (parts) => ({ allows: (i, j) => parts.every((part) => part.allows(i, j)) }),
    sub: ([p, ...others]) => ({ allows: (i, j) => p.allows(i, j) && !others.some((part) => part.allows(i, j)) }),
    not: ([p]) => ({
      allows: (i, j) => !p.allows(i, j),
      fill: (i, a, b, out) => {
        UNIVERSE.clear().run(a, b);
        combine(UNIVERSE, p.row(i, a, b), "sub", a, b, out);
      },
    }),
  };

  /* Fills a row: that of parts[0] combined with that of parts[1], then with parts[2], and so on, into `out`. */
  function folded(parts, operator) {
    const between = parts.slice(2).map(() => new Pieces());
    return (i, a, b, out) => {
      let left = parts[0].row(i, a, b);
      for (let x = 1; x < parts.length; x++) {
        const to = x === parts.length - 1 ? out : between[x - 1].clear();
        left = combine(left, parts[x].row(i, a, b), operator, a, b, to);
      }
    };
  }

  /* Compiles an unpacked rule over n tokens. The pattern keeps `rule` and `parts` for the names of hops. `row` returns one
     buffer per pattern, overwritten by the next call. */
  FL.compile = (rule, n) => {
    const out = new Pieces(), operator = rule.is;
    const parts = rule.parts ? rule.parts.map((part) => FL.compile(part, n)) : [];
    const evaluator = OPERATORS[operator] ? OPERATORS[operator](parts) : ATOMS[operator](rule, n);
    const fill = evaluator.fill || folded(parts, operator);
    return {
      n, rule, parts,
      allows: evaluator.allows,
      row(i, a = 0, b = n) {
        out.clear();
        if (a < b) fill(i, a, b, out);
        return out;
      },
    };
  };
})();
