// S^T = K Q^T for a chunk: scaled, masked, with the largest score of every row.
#pragma once

#include "elementary.h"
#include "operands.h"

namespace farlight::FARLIGHT_NS {

constexpr float kNothing = -1e30f;  // the running maximum of a row that has seen no key yet: finite, below every real score
constexpr float kUnseen = -3e38f;   // the score of a pair that is not allowed: exp2(kUnseen - kNothing) is 0
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The rows of K and V that the next chunk (null: there is none) will read, asked for a block at a time while scores are formed:
// memory answers late, and machines do not foresee a walk down the columns of V.
template <class Mode>
struct Ahead {
  const Chunk* next;
  const Operand<Mode>&keys, &values;
  int64_t dim;

  FARLIGHT_INLINE void operator()(int block) const {
    if (!next || block >= next->blocks) return;
    for (int i = block * kM; i < block * kM + kM; ++i) {
      ask_for(keys.source().row(next->key[i]), dim);
      ask_for(values.source().row(next->key[i]), dim);
    }
  }
};

struct Nothing {
  FARLIGHT_INLINE void operator()(int) const {}
};

// The same with tiles: scores stay as the product gives them, neither scaled nor masked; `top` is of scaled and masked ones.
template <class Mode, bool Masking, class Also>
inline void score_tiles(const Chunk& c, const Operand<Mode>& keys, const Turned<Mode>& queries, float scale, int lanes, float* scores,
                        float* top, const Also& also) {
#if defined(FARLIGHT_ISA_AMX)
  if constexpr (in_tiles<Mode>) {
    const int64_t steps = (queries.words + kTile - 1) / kTile;
    for (int first = 0; first < c.n; first += 2 * kTile) {
      for (int block = first / kM; block < (first + 2 * kTile) / kM; ++block) also(block);
      score_group(keys.strip(c, first, 0), keys.strip(c, first + kTile, 1), queries.turned, steps, scores + first * kRows);
    }
    if constexpr (Masking) {
      const F factor = all(scale);
      for (int g = 0; g < lanes; g += W) {
        F largest = all(kUnseen);
        for (int block = 0; block < c.blocks; ++block) {
          F x[kM];
          FARLIGHT_UNROLL
          for (int m = 0; m < kM; ++m) x[m] = mul(load(scores + (block * kM + m) * kRows + g), factor);
          if (c.masked[block])
            for (int m = 0; m < kM; ++m) x[m] = choose(c.seen[block * kM + m] >> g, x[m], all(kUnseen));
          static_assert(kM == 8);
          largest = max(max(max(max(x[0], x[1]), max(x[2], x[3])), max(max(x[4], x[5]), max(x[6], x[7]))), largest);
        }
        store(top + g, largest);
      }
    }
  }
#endif
  (void)c, (void)keys, (void)queries, (void)scale, (void)lanes, (void)scores, (void)top, (void)also;
}

// The scores of kM keys and kV vectors of rows. A function of its own, so that the pointers to the keys' rows have the registers
// to themselves. `seen` is null where every row sees every key.
template <class Mode, bool Masking>
FARLIGHT_APART void score_block(const typename Mode::Op::Word* const* rows, const typename Mode::Op::Word* queries, int64_t words,
                                float scale, const uint32_t* seen, int g, float* to, float* top) {
  F acc[kM][kV];
  clear(acc);
  along_rows<typename Mode::Op, kM, kV>(acc, rows, queries, kRows, words);
  if constexpr (in_pairs<Mode>) {
    const F factor = all(scale);
    FARLIGHT_UNROLL
    for (int m = 0; m < kM; ++m) {
      FARLIGHT_UNROLL
      for (int v = 0; v < kV; ++v) acc[m][v] = mul(acc[m][v], factor);
    }
  }
  if constexpr (Masking) {
    if (seen) {
      FARLIGHT_UNROLL
      for (int m = 0; m < kM; ++m) {
        FARLIGHT_UNROLL
        for (int v = 0; v < kV; ++v) acc[m][v] = choose(seen[m] >> (g + v * W), acc[m][v], all(kUnseen));
      }
    }
    FARLIGHT_UNROLL
    for (int v = 0; v < kV; ++v) {
      F largest = load(top + v * W);
      FARLIGHT_UNROLL
      for (int m = 0; m < kM; ++m) largest = max(acc[m][v], largest);
      store(top + v * W, largest);
    }
  }
  FARLIGHT_UNROLL
  for (int m = 0; m < kM; ++m) {
    FARLIGHT_UNROLL
    for (int v = 0; v < kV; ++v) store(to + m * kRows + v * W, acc[m][v]);
  }
}

// scores[key][row] of the chunk, times `scale` where the rows were not scaled before; `top[row]` grows to the largest.
// Without `Masking` pairs that are not allowed keep their scores. `also(block)` is done on the way.
template <class Mode, bool Masking, class Also>
inline void score(const Chunk& c, const Operand<Mode>& keys, const Turned<Mode>& queries, float scale, int lanes, float* scores,
                  float* top, const Also& also) {
  if constexpr (in_tiles<Mode>) {
    score_tiles<Mode, Masking>(c, keys, queries, scale, lanes, scores, top, also);
    return;
  }
  if constexpr (Masking) {
    for (int g = 0; g < lanes; g += W) store(top + g, all(kUnseen));
  }
  for (int block = 0; block < c.blocks; ++block) {
    also(block);
    const uint32_t* seen = c.masked[block] ? c.seen + block * kM : nullptr;
    for (int g = 0; g < lanes; g += kV * W)
      score_block<Mode, Masking>(keys.along + block * kM, queries.turned + g, queries.words, scale, seen, g,
                                 scores + block * kM * kRows + g, Masking ? top + g : nullptr);
  }
}

// Which links of a tile survive dropout.
class Dropped {
 public:
  Dropped(const Dropout& dropout, const PlanView& plan, const Tile& tile) : dropout_(dropout) {
    if (!dropout.on) return;
    for (int s = 0; s < kRows; ++s)
      rows_[s] = s < tile.count ? row_hash(dropout.low, dropout.high, tile.item.batch, tile.item.head, plan.q_offset + tile.row[s]) : 0;
  }
  bool on() const { return dropout_.on; }
  float inverse() const { return dropout_.on ? dropout_.inverse : 1.0f; }
  // Bit i: the link of lane g + i to the key stays.
  uint32_t kept(int32_t key, int g) const {
    if (dropout_.all) return 0;
    const I hash = mix32(exclusive(load_i(rows_ + g), all_i(key_word(key))));
    return ~below(hash, all_i(dropout_.threshold));
  }
  bool kept_one(int32_t key, int s) const { return !dropout_.all && mix32(rows_[s] ^ key_word(key)) >= dropout_.threshold; }

 private:
  const Dropout& dropout_;
  uint32_t rows_[kRows];
};

}  // namespace farlight::FARLIGHT_NS
