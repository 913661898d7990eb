// How the numbers of tensors reach the products. Five ways:
//   InPlace  float32 tensors, float products; rows are read where they lie
//   Widened  bfloat16 tensors, float products; rows are widened a chunk at a time
//   Pairs    bfloat16 tensors, products of bfloat16 pairs; what is summed over keys or rows is interleaved, that of keys kept
//   Tiles    the same operands as Pairs where the machine multiplies whole tiles of them (tiles.h)
//   Parts    float32 tensors in place of InPlace there: operands as for Tiles, three times, for the parts of each number
#pragma once

#include "arena.h"
#include "blocks.h"
#include "chunk.h"
#include "rows.h"
#include "tiles.h"

namespace farlight::FARLIGHT_NS {

struct NoSession {
  static constexpr bool tiles = false;
  NoSession() {}  // what must be set up around an item: nothing
};

// The numbers of the tensors, what is multiplied, the degree of exp2, what stands around an item, how many parts a number has.
template <class Number, class Product, int Degree, class Around = NoSession, int Parts = 1>
struct Way {
  using T = Number;
  using Op = Product;
  using Session = Around;
  static constexpr bool tiles = Around::tiles;
  static constexpr int degree = Degree, parts = Parts;
};

using InPlace = Way<float, FloatWord, 5>;
using Widened = Way<Half, FloatWord, 3>;
#if defined(FARLIGHT_PAIRS)
using Pairs = Way<Half, PairWord, 3>;
#endif
#if defined(FARLIGHT_ISA_AMX)
using Tiles = Way<Half, PairWord, 3, TileSession>;
using Parts = Way<float, PairWord, 5, TileSession, kParts>;
#endif

template <class Mode>
constexpr bool in_pairs = Mode::Op::per == 2;
// How many parts a number has in products.
template <class Mode>
constexpr int parts_of = Mode::parts;
// Whether Q is scaled before it is multiplied: what is bfloat16 would be rounded once more.
template <class Mode>
constexpr bool scaled_first = !in_pairs<Mode> || parts_of<Mode> > 1;
// Whether products are made of tiles, and then how many keys are taken together.
template <class Mode>
constexpr bool in_tiles = Mode::tiles;
template <class Mode>
constexpr int group_of = in_tiles<Mode> ? 32 : kM;
// Keys in a chunk: many are walked over with less ado; but what tiles are made of has to stay in the first cache.
template <class Mode>
constexpr int chunk_of = in_tiles<Mode> ? 64 : kKeys;

// The rows of one (batch, head) of a tensor.
template <class T>
struct Source {
  const T* base;
  int64_t stride;
  Source(const Rows& rows, int64_t b, int64_t h)
      : base(static_cast<const T*>(rows.data) + b * rows.batch + h * rows.head), stride(rows.row) {}
  const T* row(int64_t i) const { return base + i * stride; }
};

#if defined(FARLIGHT_PAIRS)
// Two vectors as bfloat16: the pairs of neighbouring lanes. Numbers that have parts: each part, `part` words from the one before.
template <int Parts>
FARLIGHT_INLINE void store_paired(F x, F y, uint32_t* to, int64_t part) {
  if constexpr (Parts == 1) {
    store_i(to, paired(x, y));
  } else {
    I a[kParts], b[kParts];
    split(x, a);
    split(y, b);
    FARLIGHT_UNROLL
    for (int p = 0; p < kParts; ++p) store_i(to + p * part, upper_paired(a[p], b[p]));
  }
}
// The same, all lanes of x before those of y.
template <int Parts>
FARLIGHT_INLINE void store_narrowed(F x, F y, uint32_t* to, int64_t part) {
  if constexpr (Parts == 1) {
    store_i(to, narrowed(x, y));
  } else {
    I a[kParts], b[kParts];
    split(x, a);
    split(y, b);
    FARLIGHT_UNROLL
    for (int p = 0; p < kParts; ++p) store_i(to + p * part, upper_narrowed(a[p], b[p]));
  }
}

// to[d] = (x[d], y[d]) for d < dim rounded up to 32; null: zeros. Floats are split into parts, `part` words apart.
FARLIGHT_INLINE void interleave_rows(const Half* x, const Half* y, int64_t dim, uint32_t* to, int64_t) {
  for (int64_t d = 0; d < dim; d += 32) {
    I low, high;
    interleave(x ? load_halves(x + d, dim - d) : all_i(0), y ? load_halves(y + d, dim - d) : all_i(0), low, high);
    store_i(to + d, low);
    store_i(to + d + W, high);
  }
}
FARLIGHT_INLINE void interleave_rows(const float* x, const float* y, int64_t dim, uint32_t* to, int64_t part) {
  for (int64_t d = 0; d < rounded(dim, 32); d += W)
    store_paired<kParts>(x ? load_floats(x + d, dim - d) : all(0.0f), y ? load_floats(y + d, dim - d) : all(0.0f), to + d, part);
}
#endif

}  // namespace farlight::FARLIGHT_NS
