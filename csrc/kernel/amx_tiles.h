// Products on Intel AMX tiles: one tdpbf16ps multiplies 16 x 32 by 32 x 16 bfloat16 into 16 x 16 float32 sums.
//
// A tile of the left operand is 16 rows of 32 consecutive bfloat16: keys of K or V in place in their tensor, or keys of P^T and
// dS^T with 32 query rows each. A tile of the right operand is 16 rows of 16 bfloat16 pairs: transposed queries, weights
// interleaved along keys, or dO and Q interleaved along query rows. Tiles are always full size; padding is zero. The operands
// are those of the pair kernels (Bf16Pairs), so masks, dropout and the order of sums are shared.
//
// float32 (AmxF32Split): x = x0 + x1 + x2 in bfloat16 exactly, and x y is computed as the six products x0y0, x0y1, x1y0, x0y2,
// x1y1, x2y0. The three omitted ones are below 2^-23 of the product, i.e. below float32 rounding. A tile product does sixteen
// times the work of an FMA, so six of them still take less than half the time. Split operands hold their three parts one after
// the other.
//
// Register use: tiles 0-3 are sums, 4-5 left operands, 6-7 right operands (accumulate_panels differs).
#pragma once

#if defined(FARLIGHT_ISA_AMX)

#include <immintrin.h>

#include "key_chunks.h"

namespace farlight::FARLIGHT_NS {

constexpr int kTileDim = 16;  // rows of a tile, and float32 columns of a sum tile; one tile product sums over kDepth elements

// The operand of ldtilecfg: eight tiles of 16 rows of 64 bytes.
struct AmxTileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(AmxTileShapes) == 64);
alignas(64) constexpr AmxTileShapes kAmxTileShapes{};

// RAII scope of the tile registers of a thread: configures the shapes, and releases the registers so that context switches need
// not save 8 KiB of tile state.
class AmxTileConfig {
 public:
  static constexpr bool tiles = true;
  AmxTileConfig() {
    _tile_loadconfig(&kAmxTileShapes);
    fence();
  }
  ~AmxTileConfig() { _tile_release(); }
  AmxTileConfig(const AmxTileConfig&) = delete;
  AmxTileConfig& operator=(const AmxTileConfig&) = delete;

  // Compiler barrier: the tile load intrinsics do not tell the compiler that they read memory, so pending stores must be forced
  // out first.
  static FARLIGHT_INLINE void fence() { __asm__ volatile("" ::: "memory"); }
};

// A panel of 16 operand rows: `line` bytes between rows, `step` bytes to the next 32 elements of the rows, `part` bytes between
// the parts of split operands.
struct Panel {
  const char* at;
  int64_t line, step, part;
};

// Sum tiles 0-3 += (low, high) x (b, b + 16 lanes); without `has_high` only tiles 0 and 1, without `has_right` only 0 and 2. b
// has `line` bytes between rows and `part` words between parts. With three parts, the six products of the split are ordered so
// that consecutive ones share a loaded operand and the largest comes last. `between` runs after every four tile products, to
// issue prefetches in slots that would be idle.
template <int NumParts, class Between>
FARLIGHT_INLINE void multiply(const Panel& low, const Panel& high, bool has_high, const uint32_t* b, int64_t line, int64_t part,
                              bool has_right, Between&& between) {
  const auto load_left = [&](int p) {
    _tile_loadd(4, low.at + p * low.part, low.line);
    if (has_high) _tile_loadd(5, high.at + p * high.part, high.line);
  };
  const auto load_right = [&](int p) {
    _tile_loadd(6, b + p * part, line);
    if (has_right) _tile_loadd(7, b + p * part + kTileDim, line);
  };
  const auto multiply_tiles = [&] {
    _tile_dpbf16ps(0, 4, 6);
    if (has_right) _tile_dpbf16ps(1, 4, 7);
    if (has_high) _tile_dpbf16ps(2, 5, 6);
    if (has_high && has_right) _tile_dpbf16ps(3, 5, 7);
    between();
  };
  load_left(0);
  if constexpr (NumParts == 3) {
    load_right(2);
    multiply_tiles();
    load_right(1);
    multiply_tiles();
    load_left(1);
    multiply_tiles();
    load_right(0);
    multiply_tiles();
    load_left(2);
    multiply_tiles();
    load_left(0);
    multiply_tiles();
  } else {
    load_right(0);
    multiply_tiles();
  }
}

// The sum tiles 0-3 as a 2 x 2 block in memory: panels `low` and `high`, two tiles of lanes each; `stride` bytes between rows.
struct AccTiles {
  float *low, *high;
  int64_t stride;
  bool has_high, has_right;

  FARLIGHT_INLINE void clear() const {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  FARLIGHT_INLINE void load() const {
    _tile_loadd(0, low, stride);
    if (has_right) _tile_loadd(1, low + kTileDim, stride);
    if (has_high) _tile_loadd(2, high, stride);
    if (has_high && has_right) _tile_loadd(3, high + kTileDim, stride);
  }
  FARLIGHT_INLINE void store() const {
    _tile_stored(0, low, stride);
    if (has_right) _tile_stored(1, low + kTileDim, stride);
    if (has_high) _tile_stored(2, high, stride);
    if (has_high && has_right) _tile_stored(3, high + kTileDim, stride);
  }
};

// Scores of 32 keys x 32 query rows: to[i][lane] = sum over d of (low, then high)[i][d] * b[d][lane]. `part`: words between the
// parts of b; `steps`: blocks of 32 head dimensions.
template <int NumParts, class Between>
inline void score_key_group(Panel low, Panel high, const uint32_t* b, int64_t part, int64_t steps, float* to,
                            Between&& between) {
  constexpr int64_t line = kRows * 4;
  AmxTileConfig::fence();
  const AccTiles sums{to, to + kTileDim * kRows, line, true, true};
  sums.clear();
  for (int64_t s = 0; s < steps; ++s, low.at += low.step, high.at += high.step, b += kTileDim * kRows)
    multiply<NumParts>(low, high, true, b, line, part, true, between);
  sums.store();
}

// O^T += V^T P^T and dQ^T += K^T dS^T: to[d][lane] (+)= sum over groups and their 32 keys of columns[group][d][key] *
// b[key][lane], for d < dim rounded up to 16. `column_part`: elements between the parts of the columns; `part`: words between
// the parts of b.
template <int NumParts, class Between>
inline void accumulate_key_groups(float* to, const uint16_t* const* columns, int64_t column_part, const uint32_t* b,
                                  int64_t part, int groups, int64_t dim, bool overwrite, Between&& between) {
  constexpr int64_t line = kRows * 4;
  AmxTileConfig::fence();
  for (int64_t d = 0; d < dim; d += 2 * kTileDim, to += 2 * kTileDim * kRows) {
    const AccTiles sums{to, to + kTileDim * kRows, line, d + kTileDim < dim, true};
    if (overwrite) sums.clear();
    else sums.load();
    for (int g = 0; g < groups; ++g) {
      const Panel low{reinterpret_cast<const char*>(columns[g] + d * kDepth), kDepth * 2, 0, column_part * 2};
      const Panel high{low.at + kTileDim * kDepth * 2, low.line, 0, low.part};
      multiply<NumParts>(low, high, sums.has_high, b + g * (kDepth / 2) * kRows, line, part, true, between);
    }
    sums.store();
  }
}

// dV += P^T dO and dK += dS^T Q: sums[i][d] (+)= sum over 32 query rows of a[i][row] * b[row][d], for `panels` panels of 16
// keys whose 16 x 32 weights are consecutive in `a`. The sums of a panel start at to[panel], `stride` floats between keys;
// `ld`: words between row pairs of b. Tiles 4-7 hold 64 columns of b across all panels.
inline void accumulate_panels(float* const* to, int64_t stride, const uint16_t* a, const uint32_t* b, int64_t ld, int panels,
                              int64_t dim, bool overwrite) {
  const int64_t line = stride * 4;
  AmxTileConfig::fence();
  for (int64_t d = 0; d < dim; d += 4 * kTileDim) {
    const int columns = static_cast<int>((min<int64_t>(dim - d, 4 * kTileDim) + kTileDim - 1) / kTileDim);
    _tile_loadd(4, b + d, ld * 4);
    if (columns > 1) _tile_loadd(5, b + d + kTileDim, ld * 4);
    if (columns > 2) _tile_loadd(6, b + d + 2 * kTileDim, ld * 4);
    if (columns > 3) _tile_loadd(7, b + d + 3 * kTileDim, ld * 4);
    for (int s = 0; s < panels; ++s) {
      float* at = to[s] + d;
      _tile_loadd(0, a + s * kTileDim * kRows, kRows * 2);
#define FARLIGHT_COLUMN(SUM, RIGHT, NUMBER)              \
  if (columns > NUMBER) {                                \
    if (overwrite) _tile_zero(SUM);                      \
    else _tile_loadd(SUM, at + NUMBER * kTileDim, line); \
    _tile_dpbf16ps(SUM, 0, RIGHT);                       \
    _tile_stored(SUM, at + NUMBER * kTileDim, line);     \
  }
      FARLIGHT_COLUMN(1, 4, 0)
      FARLIGHT_COLUMN(2, 5, 1)
      FARLIGHT_COLUMN(3, 6, 2)
      FARLIGHT_COLUMN(1, 7, 3)
#undef FARLIGHT_COLUMN
    }
  }
}

// The same for split operands; `a_part` elements and `b_part` words between parts.
inline void accumulate_split_panels(float* const* to, int64_t stride, const uint16_t* a, int64_t a_part, const uint32_t* b,
                                    int64_t ld, int64_t b_part, int panels, int64_t dim, bool overwrite) {
  AmxTileConfig::fence();
  for (int s = 0, num = 0; s < panels; s += num) {
    // Two panels at once, unless their sums overlap (a key in both): a panel's sums must be stored before the other loads them.
    const auto address = [&](int i) { return reinterpret_cast<intptr_t>(to[i]); };
    const int64_t distance = s + 1 < panels ? address(s + 1) - address(s) : 0, extent = kTileDim * stride * 4;
    const bool both = distance >= extent || distance <= -extent;
    num = both ? 2 : 1;
    const Panel low{reinterpret_cast<const char*>(a + s * kTileDim * kRows), kRows * 2, 0, a_part * 2};
    const Panel high{low.at + kTileDim * kRows * 2, low.line, 0, low.part};
    for (int64_t d = 0; d < dim; d += 2 * kTileDim) {
      const AccTiles sums{to[s] + d, both ? to[s + 1] + d : nullptr, stride * 4, both, d + kTileDim < dim};
      if (overwrite) sums.clear();
      else sums.load();
      multiply<kParts>(low, high, both, b + d, ld * 4, b_part, sums.has_right, [] {});
      sums.store();
    }
  }
}

}  // namespace farlight::FARLIGHT_NS

#endif
