// The binary interface between the ISA-independent host code and the kernels: plain views of the plan's tables and of the
// tensors, and the table of function pointers of one ISA.
//
// This header is compiled into both, so it holds no ownership, no templates and no function body worth vectorising: an inline
// function emitted with AVX-512 could otherwise be picked by the linker for a CPU that lacks it.
#pragma once

#include <atomic>
#include <cstdint>

namespace farlight {

constexpr int kRows = 32;     // query rows of a row block, which a kernel keeps in vector lanes; a tile has one or more
constexpr int kBlock = 64;    // keys in a block of dk/dv accumulators
constexpr int kMaxDim = 256;  // largest head dimension
constexpr int kPanel = 32;    // key blocks in a panel of block summaries

// Element type of a tensor.
enum class Type : int { f32 = 0, bf16 = 1 };

// How a masked run stores which rows of its tile see which keys: bounds per row, one bit per (row, key), or one bit per row
// (every key of the run is seen by the same rows).
enum MaskKind : int32_t { kBounds = 0, kBits = 1, kRowSet = 2 };
constexpr int kBitsKeys = 128, kBitsWords = kBitsKeys / 32;  // widest run masked by bits, in keys and 32-bit words per row

// Masks of runs, (masks,) each. Mask m's table starts at data[start[m]]: kBounds: (tile, 2) per row the first slot,
// relative to the run's lo, and the end, relative to its hi; kBits: (tile, kBitsWords) bits; kRowSet: (tile / 32,) bits. Every
// row sees the core [lo + core_lo, hi + core_hi); kRowSet has none.
struct MaskView {
  const int32_t *kind, *start, *core_lo, *core_hi, *data;
};

// One layer of a piece, in CSR form: runs of slots [lo, hi) per tile entry, and gathered single keys per row. A slot is a key,
// or an index into `keys`.
struct LayerView {
  const int64_t *entry_base, *place_base;  // (variants,): first row of indptr; offset of places in point_indptr
  const int64_t* indptr;                   // (entries + 1,) into lo, hi, mask
  const int32_t *lo, *hi, *mask;           // (runs,); mask -1: every row of the tile sees the run
  const int32_t* keys;                     // null: slot = key
  const int64_t* point_indptr;             // gathered keys of each place; null: none
  const int32_t* point_keys;
  const int32_t* variant;                // (variant_batch, variant_heads): which tables a (batch item, head) uses
  int32_t variant_batch, variant_heads;  // 1: shared by all batch items / heads
};

// One piece of a plan: tile entries over query rows in an order of their own ("place"). A tile that is split over its keys
// (split-K) has one entry per part.
struct PieceView {
  const int32_t* rows;                          // (places,) query row of a place; null: place = row
  const int64_t* first;                         // (variants + 1,) first entry of each variant
  const int32_t *start, *count, *part, *parts;  // (entries,): first place, rows, index of the part, number of parts
  const int64_t* slot;                          // (entries,) index of the entry's partial result; -1 when the tile is not split
  const int32_t* variant;
  int32_t variant_batch, variant_heads;
  int64_t slots;                     // partial results of the piece, for one (batch item, head)
  int64_t groups;                    // split tiles of the piece, for one (batch item, head)
  const int32_t* group;              // (entries,) which split tile an entry belongs to; -1 when not split
  const uint8_t* every_row_visible;  // (entries,) nonzero: every row of the tile sees at least one key of this piece
  const LayerView* layers;
  int32_t layer_count;
};

// The plan's tables.
struct PlanView {
  const PieceView* pieces;
  MaskView masks;
  int32_t piece_count, tile;  // tile: rows of a tile, at most
  int64_t n_q, n_k, q_offset;
};

// A (B, H, N, D) tensor whose last dimension is contiguous; strides count elements.
struct TensorView {
  const void* data;
  int64_t batch, head, row;
};

// Dropout of links: a (query, key) pair is dropped when its 32-bit hash is below the threshold.
struct Dropout {
  bool on;
  bool drop_all;                 // p = 1
  uint32_t threshold;            // p * 2^32
  uint32_t seed_low, seed_high;  // the two halves of the 64-bit seed
  float keep_scale;              // 1 / (1 - p), by which kept weights are multiplied
};

// Softmax statistics of a row in base 2: the sum of 2^score over its keys is row_sum * 2^row_max. Kept beside the lse where a
// float32 lse has too few digits: at a score of 1e7 it cannot resolve the logarithm of the number of keys.
struct RowStats {
  float row_max, row_sum;
};

// Terms on the scores, in base 2: S = capped(score) + distance[head, i - j] + key_bias[batch, head, j].
struct TermsView {
  bool on;    // scores have terms; sinks and delta are apart from it
  float cap;  // 0: none
  // (heads, distance_length) or null: the biases of the distances i - j = lowest, lowest + 1, ..., its two ends repeated
  // kRows - 1 times.
  const float* distance;
  int64_t distance_length, lowest;
  const float* key_bias;  // null: none; strides in elements, 0 where shared
  int64_t key_batch, key_head;
  const float* sinks;  // (heads,) or null: added to the sum of a row when it is written; every row is written once
  float *d_distance, *d_key_bias;  // gradients of S, (heads, distance_length) and (batch, heads, n_k), or null
  float* delta;                    // backward: rowsum(dO * out) - dlse of every row, or null
};

// A slab's sums of the gradients of the terms, for the heads of its group; null where not wanted.
struct TermSums {
  float* distance;  // (heads of the group, distance_length)
  float* keys;      // (heads of the group, key_count)
  int64_t key_count;
};

// The arguments of one call, the same for every work item.
struct Call {
  const PlanView* plan;
  Type type, out_type;  // of q, k, v, dout; of the result (float32 where pieces are merged into it)
  int64_t batch, heads, kv_heads;
  int64_t dim, value_dim;  // of a row of q and k; of v, out and dout
  float scale;
  Dropout dropout;
  TermsView terms;
  TensorView q, k, v, out, dout;
  float* lse;         // (B, H, n_q), natural logarithm
  const float* dlse;  // (B, H, n_q) or null
  // (B, H, n_q) or null. Forward: read and written when pieces merge; zero at the start. Backward: row_sum holds its natural
  // logarithm instead.
  RowStats* row_stats;
  void* result;        // forward: out; backward: dq; contiguous (B, H, n_q, result_dim)
  int64_t result_dim;  // forward: value_dim; backward: dim
  bool merges;   // pieces overlap in rows: a row may already hold a result, to be merged with (forward) or added to (dq)
  bool keep_masked_rows;  // a row that sees no key in a tile keeps its present result (initialised before the tiles run)
  // Split-K: partial results (result_dim + 2 floats per row) and the number of parts still to finish, with base offsets per
  // piece.
  float* partial;
  std::atomic<int32_t>* pending;
  const int64_t *partial_base, *pending_base;
};

// Float32 accumulators of dk and dv for one (batch item, key head): a pointer per block of kBlock keys (null: block not touched
// by this slab), rows `dk_stride` and `dv_stride` floats apart.
struct DkDvBlocks {
  float* const* dk;
  float* const* dv;
  int64_t dk_stride, dv_stride;
  TermSums terms;
};

// The unit of scheduling: one tile entry of one (batch item, query head).
struct WorkItem {
  int32_t piece, batch, head, entry;
};

// Rows that each visit key groups of their own: kVisitKeys keys from a multiple of kVisitKeys on.
constexpr int kVisitKeys = 16;

// A row, counted from the first of its group of rows, and which keys of the key group it sees: a bit per key, at least one.
struct Visit {
  uint16_t row, keys;
};

// The visits of the rows [first_row, first_row + rows) of one (batch item, query head), by key group, ascending; those of key
// group group[g] end at ends[g].
struct RowVisits {
  int64_t batch, head, first_row, rows;
  int64_t n_q, n_k;
  int64_t groups;
  const int32_t *group, *ends;
  const Visit* visit;
};

struct DecodeKernels;  // decode.h

// The kernels of one ISA.
struct Kernels {
  const char* name;
  bool pairs_bf16;       // bfloat16 is multiplied in pairs or tiles; else widened, at the rate of float32
  int64_t zeroed_bytes;  // prefix of the scratch memory that must be zero when a thread begins a call (cache tags)
  int64_t (*scratch_bytes)(const Call&);  // scratch memory of one thread
  // `next` is the item that this thread will probably run afterwards, for prefetching; may be null.
  void (*forward)(const Call&, const WorkItem&, const WorkItem* next, char* scratch);
  void (*backward)(const Call&, const WorkItem&, const WorkItem* next, const DkDvBlocks&, char* scratch);
  // Attention without terms or dropout over visits (kernel/visits.h), and its scratch memory for so many rows.
  void (*forward_visits)(const Call&, const RowVisits&, char* scratch);
  int64_t (*visit_scratch_bytes)(const Call&, int64_t rows);
  // Adds `count` accumulator blocks into the first one and writes `rows` rows of `dim` elements of `type`; out may alias
  // blocks[0].
  void (*reduce)(float* const* blocks, int64_t count, int64_t rows, int64_t stride, int64_t dim, Type type, void* out);
  // Writes `count` elements, rounded to `type`, to element `at` of a tensor.
  void (*round_rows)(Type type, const float* from, int64_t count, void* tensor, int64_t at);
  // See kernel/block_scores.h.
  void (*block_scores)(const float* const* rows, int64_t num_rows, const float* panel, int64_t panels, int64_t dim,
                       float* scores, int64_t ld);
  void (*pool_softmax)(float* scores, int64_t num_rows, int64_t ld, int64_t width, float factor, const float* bias,
                       float* weights, float* largest_exponents);
  void (*largest_columns)(const float* scores, int64_t num_rows, int64_t ld, int64_t width, int64_t* columns);
  float (*weighted_exponentials)(const float* row, const float* counts, int64_t panels, float factor, float shift);
  // See kernel/select_largest.h.
  void (*select_largest)(const float* weights, const int32_t* sizes, int64_t width, int64_t count, int32_t* keys,
                         int32_t* chosen);
  float (*peak_fma)(int64_t iterations);  // register-only multiply-adds, `peak_fma_flops` operations per iteration
  int64_t peak_fma_flops;
  const DecodeKernels* decode;
};

// The variant of (batch item b, head h) in a (batch_extent, head_extent) table whose extents of 1 are broadcast.
inline int32_t variant_of(const int32_t* variant, int32_t batch_extent, int32_t head_extent, int64_t b, int64_t h) {
  return variant[(batch_extent > 1 ? b : 0) * head_extent + (head_extent > 1 ? h : 0)];
}

}  // namespace farlight
