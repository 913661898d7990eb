// The binary interface between the host code of decoding (decode.cpp) and its kernels, compiled once per ISA
// (kernel/decode_kernel.cpp). As in views.h: no ownership, no templates, no function bodies.
#pragma once

#include <cstdint>

#include "views.h"

namespace farlight {

// Element type of stored keys and values. i8: rows of int8 with one float32 scale each.
enum class KeyType : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };

// One page of a store: K and V `(B, heads, capacity, D)` and, for i8, their scales `(B, heads, capacity)`; contiguous.
struct KeyPage {
  char *k, *v;
  float *k_scale, *v_scale;
  int64_t capacity;
  int32_t shared;  // nonzero: a fork of the cache reads it too, so it must be copied before a write
};

// Score terms of one query row: S = capped(scale * q k) - slope |j - i| + distance[clip(j - i - first, 0, length - 1)] +
// key_bias[j].
struct RowTerms {
  int64_t position;  // i
  float slope;
  const float *distance, *key_bias;  // or null
};

// Score terms of a call, in natural units; `first` and `length` are those of the rows' tables by distance.
struct DecodeTerms {
  float cap;  // 0: none
  int64_t first, length;
};

// Queries of one (batch item, key head) over a list of slots: one partial result per row.
struct DecodeItem {
  const KeyPage* pages;  // slot s is in pages[s >> page_shift], at row s & ((1 << page_shift) - 1)
  int32_t page_shift;
  KeyType type;
  int64_t head;  // batch item * heads of the store + head of the store
  int64_t dim, rows;
  const float* const* q;       // per row: dim floats
  float factor;                // scale * log2(e)
  KeyType query_type;          // q's before it was widened
  const int32_t* slots;        // (count,) ascending, or null: slots first, first + 1, …
  int64_t first, count;
  const uint8_t* const* mask;  // per row: one byte per slot, zero = hidden; null: every row sees every listed slot
  const DecodeTerms* terms;    // null: none
  const RowTerms* row_terms;   // per row
  const int64_t* position;     // of each slot's key; null: slot s holds position s
  float* const* result;        // per row: dim sums, the maximum and the sum of 2^(score - maximum)
};

// A visibility program: a pattern of one head as instructions on a stack of byte arrays. Arguments follow the opcode.
enum VisibilityOp : int64_t {
  kConstant = 0,     // value
  kBetween = 1,      // lo hi: lo <= j - i <= hi
  kDivides = 2,      // s: s divides j - i
  kKeyModulo = 3,    // s lo hi: lo <= j mod s < hi
  kQueryModulo = 4,  // s lo hi: lo <= i mod s < hi
  kKeyRuns = 5,      // n lo hi …: j in one of n sorted intervals [lo, hi)
  kQueryRuns = 6,    // n lo hi …: i in one of them
  kDistanceRuns = 7, // n lo hi …: j - i in one of them
  kBlockBetween = 8, // w lo hi: lo <= floor(j / w) - floor(i / w) <= hi
  kAnd = 9,
  kOr = 10,
  kAndNot = 11,
  kNot = 12,
};

constexpr int64_t kListSlack = 16;  // entries behind a list that `list_nonzero` may overwrite

struct VisibilityProgram {
  const int64_t* code;
  int64_t length, depth;  // words of code; byte arrays on the stack, at most
};

// Slots whose key has expired: their number, the last of them or -1, and the least last use of all others (kNoUse: none).
struct ExpiredSlots {
  int64_t count, slot, least;
};
constexpr int64_t kNoUse = INT64_MAX;

// The decode kernels of one ISA.
struct DecodeKernels {
  int64_t (*scratch_bytes)(int64_t rows, int64_t dim);
  void (*attend)(const DecodeItem&, char* scratch);
  // to[s] = whether the query at position i sees the key of slot s, s < count; position: (count,), or null: slot s holds
  // position s. scratch: depth * count bytes.
  void (*visible)(const VisibilityProgram&, const int64_t* position, int64_t count, int64_t i, uint8_t* to, uint8_t* scratch);
  // The indices of the nonzero bytes, ascending; returns their number. to: kListSlack more than there are.
  int64_t (*list_nonzero)(const uint8_t* bytes, int64_t count, int32_t* to);
  // Of slots 0 … count - 1, those with last_use < oldest.
  ExpiredSlots (*expired)(const int64_t* last_use, int64_t count, int64_t oldest);
  // to[d] = factor * row[d] as float32.
  void (*widen)(KeyType type, const void* row, int64_t dim, float factor, float* to);
  // Writes a float32 row in an element type, rounded to nearest even; returns the scale of an i8 row, else 1.
  float (*narrow)(KeyType type, const float* row, int64_t dim, void* to);
  // out[i] = q · rows[index[i]], rows `(…, dim)` float32; index null: rows[i].
  void (*dots)(const float* q, const float* rows, const int32_t* index, int64_t count, int64_t dim, float* out);
  // out[i] = scale[i] * q · codes[i], codes `(count, dim)` int8.
  void (*code_dots)(const float* q, const int8_t* codes, const float* scale, int64_t count, int64_t dim, float* out);
};

}  // namespace farlight
