// Products of whole tiles: Intel's AMX, 16 x 32 bfloat16 times 32 x 16 into 16 x 16 sums, in one instruction.
//
// The operands lie as the other kernels have them. A tile of the left factor is 16 rows of 32 neighbours: keys of K or V as
// they lie in their tensor, or keys of P^T and dS^T with 32 query rows in a row. A tile of the right factor is 16 rows of 16
// pairs: queries turned, weights paired along the keys, dO and Q interleaved along the rows. All tiles have their full size;
// what a row lacks is zero.
#pragma once

#if defined(FARLIGHT_ISA_AMX)

#include <immintrin.h>

#include "../views.h"
#include "isa.h"

namespace farlight::FARLIGHT_NS {

constexpr int kTile = 16;  // rows of a tile, sums in a row of it
constexpr int kDeep = 32;  // numbers summed in one step, and keys in a group

struct TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64);
alignas(64) constexpr TileShapes kTileShapes{};

// The tile registers are a thread's own and must be told their shapes; given back, they cost nothing when threads change.
class TileSession {
 public:
  TileSession() {
    _tile_loadconfig(&kTileShapes);
    fence();
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;

  // To the compiler a tile load reads no memory: what was written before must be told to be there.
  static FARLIGHT_INLINE void fence() { __asm__ volatile("" ::: "memory"); }
};

// 16 rows of bfloat16, `stride` bytes apart.
struct Strip {
  const void* at;
  int64_t stride;
};

// to[i][lane] = sum over d of (low, then high)[i][d] * b[d][lane]: 32 keys x 32 rows of scores.
inline void score_group(const Strip& low, const Strip& high, const uint32_t* b, int64_t steps, float* to) {
  constexpr int64_t line = kRows * 4;
  TileSession::fence();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const char *x = static_cast<const char*>(low.at), *y = static_cast<const char*>(high.at);
  for (int64_t s = 0; s < steps; ++s, x += 64, y += 64, b += kTile * kRows) {
    _tile_loadd(4, x, low.stride);
    _tile_loadd(6, b, line);
    _tile_loadd(7, b + kTile, line);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, y, high.stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, to, line);
  _tile_stored(1, to + kTile, line);
  _tile_stored(2, to + kTile * kRows, line);
  _tile_stored(3, to + kTile * kRows + kTile, line);
}

// to[d][lane] (+)= sum over groups and their keys of columns[group][d][key] * b[key][lane], for d < dim rounded up to 16.
inline void add_across_groups(float* to, const uint16_t* const* columns, const uint32_t* b, int groups, int64_t dim, bool fresh) {
  constexpr int64_t line = kRows * 4;
  TileSession::fence();
  for (int64_t d = 0; d < dim; d += 2 * kTile, to += 2 * kTile * kRows) {
    const bool two = d + kTile < dim;
    float* second = to + kTile * kRows;
    if (fresh) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, to, line);
      _tile_loadd(1, to + kTile, line);
      if (two) {
        _tile_loadd(2, second, line);
        _tile_loadd(3, second + kTile, line);
      }
    }
    for (int g = 0; g < groups; ++g) {
      const uint16_t* a = columns[g] + d * kDeep;
      const uint32_t* x = b + g * (kDeep / 2) * kRows;
      _tile_loadd(4, a, 64);
      _tile_loadd(6, x, line);
      _tile_loadd(7, x + kTile, line);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (two) {
        _tile_loadd(5, a + kTile * kDeep, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, to, line);
    _tile_stored(1, to + kTile, line);
    if (two) {
      _tile_stored(2, second, line);
      _tile_stored(3, second + kTile, line);
    }
  }
}

// sums[i][d] (+)= sum over 32 rows of a[i][row] * b[row][d], for `strips` strips of 16 keys whose 16 x 32 numbers follow one
// another in `a`. The sums of a strip lie from to[strip], `stride` floats between keys; b has `ld` words between pairs of rows.
inline void add_strips(float* const* to, int64_t stride, const uint16_t* a, const uint32_t* b, int64_t ld, int strips, int64_t dim,
                       bool fresh) {
  const int64_t line = stride * 4;
  TileSession::fence();
  for (int64_t d = 0; d < dim; d += 4 * kTile) {
    const int columns = static_cast<int>((least<int64_t>(dim - d, 4 * kTile) + kTile - 1) / kTile);
    _tile_loadd(4, b + d, ld * 4);
    if (columns > 1) _tile_loadd(5, b + d + kTile, ld * 4);
    if (columns > 2) _tile_loadd(6, b + d + 2 * kTile, ld * 4);
    if (columns > 3) _tile_loadd(7, b + d + 3 * kTile, ld * 4);
    for (int s = 0; s < strips; ++s) {
      float* at = to[s] + d;
      _tile_loadd(0, a + s * kTile * kRows, kRows * 2);
#define FARLIGHT_COLUMN(SUM, RIGHT, NUMBER)                    \
  if (columns > NUMBER) {                                      \
    if (fresh) _tile_zero(SUM);                                \
    else _tile_loadd(SUM, at + NUMBER * kTile, line);          \
    _tile_dpbf16ps(SUM, 0, RIGHT);                             \
    _tile_stored(SUM, at + NUMBER * kTile, line);              \
  }
      FARLIGHT_COLUMN(1, 4, 0)
      FARLIGHT_COLUMN(2, 5, 1)
      FARLIGHT_COLUMN(3, 6, 2)
      FARLIGHT_COLUMN(1, 7, 3)
#undef FARLIGHT_COLUMN
    }
  }
}

}  // namespace farlight::FARLIGHT_NS

#endif
