// What a kernel is given: plain views of the plan's tables and of the tensors. No ownership, no templates: this header is
// read both by code compiled for any machine and by code compiled for one instruction set, so nothing here may be inlined
// into a function with a body worth vectorising.
#pragma once

#include <atomic>
#include <cstdint>

namespace farlight {

constexpr int kRows = 32;     // query rows that a kernel holds in its lanes; a longer tile is taken in several turns
constexpr int kBlock = 64;    // keys in a block of dk/dv accumulators
constexpr int kMaxDim = 256;  // largest head dimension

enum class Type : int { f32 = 0, bf16 = 1 };

enum MaskKind : int32_t { kBounds = 0, kBits = 1 };
constexpr int kBitsKeys = 128, kBitsWords = kBitsKeys / 32;

struct MaskView {
  const int32_t *kind, *start, *core_lo, *core_hi, *data;
};

struct LayerView {
  const int64_t *entry_base, *place_base, *indptr;
  const int32_t *lo, *hi, *mask;
  const int32_t* keys;          // null: slot = key
  const int64_t* point_indptr;  // null: no points
  const int32_t* point_keys;
  const int32_t* variant;
  int32_t variant_batch, variant_heads;  // extents of `variant`, 1 = shared
};

struct PieceView {
  const int32_t* rows;  // null: place = row
  const int64_t* first;
  const int32_t *start, *count, *part, *parts;
  const int64_t* slot;  // where the partial result of an entry goes, -1 when the tile is not split; (entries,)
  const int32_t* variant;
  int32_t variant_batch, variant_heads;
  int64_t slots;   // partial results of the piece, for one (batch, head)
  int64_t groups;  // split tiles of the piece, for one (batch, head)
  const int32_t* group;  // which split tile an entry belongs to, -1 when not split
  const uint8_t* every_row_visible;   // all rows of the tile see something here
  const LayerView* layers;
  int32_t layer_count;
};

struct PlanView {
  const PieceView* pieces;
  MaskView masks;
  int32_t piece_count, tile;
  int64_t n_q, n_k, q_offset;
};

// A (B, H, N, D) tensor whose last dimension is contiguous; strides count elements.
struct TensorView {
  const void* data;
  int64_t batch, head, row;
};

struct Dropout {
  bool on;
  bool all;            // p = 1: nothing survives
  uint32_t threshold;  // a link is dropped when its hash is below
  uint32_t low, high;  // the seed
  float inverse;       // 1 / (1 - p)
};

// What a row's scores, times log2 e, add up to: total · 2^top. Kept where an lse in float32 would lose too much of it.
struct RowStats {
  float row_max, row_sum;
};

// One call: the problem, the same for every item of work.
struct Call {
  const PlanView* plan;
  Type type, out_type;  // of q, k, v, dout; of out (and dq)
  int64_t batch, heads, kv_heads, dim;
  float scale;
  Dropout dropout;
  TensorView q, k, v, out, dout;
  float* lse;         // (B, H, Nq)
  const float* dlse;  // (B, H, Nq) or null
  // (B, H, Nq) or null. Forward: written, and joined to; zeros at the start. Backward: `total` is the natural logarithm there.
  RowStats* row_stats;
  void* result;       // forward: out; backward: dq; contiguous (B, H, Nq, D)
  bool merges;         // rows may already hold a result, to be merged or added to
  bool keep_masked_rows;        // rows that see nothing here are left as they are, where a tile might have such
  // Split tiles: partial results and how many parts are still to come. Indexed by base of the (piece, batch, head).
  float* partial;
  std::atomic<int32_t>* pending;
  const int64_t *partial_base, *pending_base;  // per piece
};

// Where the sums for dk and dv of one (batch, kv head) go: a pointer for each block of keys, rows `stride` floats apart.
struct DkDvBlocks {
  float* const* dk;
  float* const* dv;
  int64_t stride;
};

struct WorkItem {
  int32_t piece, batch, head, entry;
};

// The functions of one instruction set.
struct Kernels {
  const char* name;
  int64_t zeroed_bytes;  // of the working memory's beginning, zero when a thread first serves a call
  int64_t (*scratch_bytes)(const Call&);
  // `next` is what the thread will do afterwards, as far as is known; may be null.
  void (*forward)(const Call&, const WorkItem&, const WorkItem* next, char* scratch);
  void (*backward)(const Call&, const WorkItem&, const WorkItem* next, const DkDvBlocks&, char* scratch);
  // Adds `count` blocks of sums to the first of them and writes `rows` rows of `dim` numbers, as `type`; out may be the first.
  void (*reduce)(float* const* blocks, int64_t count, int64_t rows, int64_t stride, int64_t dim, Type type, void* out);
  float (*peak_fma)(int64_t turns);  // `spin_operations` operations a turn, in registers
  int64_t peak_fma_flops;
};

inline int32_t variant_of(const int32_t* variant, int32_t batch_extent, int32_t head_extent, int64_t b, int64_t h) {
  return variant[(batch_extent > 1 ? b : 0) * head_extent + (head_extent > 1 ? h : 0)];
}

}  // namespace farlight
