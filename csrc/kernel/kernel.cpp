// Entry points of the kernels of one ISA. This file is compiled once per ISA (see isa.h) and exports one `Kernels` table.
//
// It chooses the kernel traits of a call: bfloat16 tensors use AMX tiles, dot products of bfloat16 pairs, or float32 products
// of widened operands, whichever the ISA offers; float32 tensors use AMX with a 3-way bfloat16 split, or FMA.
#include "backward.h"
#include "block_scores.h"
#include "forward.h"
#include "peak_fma.h"
#include "select_largest.h"
#include "visits.h"

namespace farlight::FARLIGHT_NS {

namespace {

#if defined(FARLIGHT_ISA_AMX)
using TraitsF32 = AmxF32Split;
using TraitsBf16 = AmxBf16;
#elif defined(FARLIGHT_BF16_PAIRS)
using TraitsF32 = F32;
using TraitsBf16 = Bf16Pairs;
#else
using TraitsF32 = F32;
using TraitsBf16 = Bf16Widened;
#endif

// Scratch bytes of one pass, found by running its constructor on a counting arena.
template <class Pass>
int64_t measure(const Call& call) {
  const WorkItem item{0, 0, 0, 0};
  Arena arena(nullptr);
  Pass pass(call, item, arena);
  return arena.used();
}

// Scratch bytes of the AMX float32 pass, 0 where there is none. The FMA fallback's scratch follows it instead of sharing it,
// since the packed operands cached in the former must survive for the next work item.
template <template <class> class PassOf>
int64_t measure_split(const Call& call) {
  return uses_amx<TraitsF32> ? measure<PassOf<TraitsF32>>(call) : 0;
}

// Scratch bytes of a pass for the dtype of the call.
template <template <class> class PassOf>
int64_t measure(const Call& call) {
  if (call.type != Type::f32) return measure<PassOf<TraitsBf16>>(call);
  return measure_split<PassOf>(call) + measure<PassOf<F32>>(call);
}

// Runs a work item, one row block of kRows query rows at a time. The thread that finishes the last part of a split-K tile
// merges the parts.
template <class Pass, class... Rest>
void run_item(const Call& call, const WorkItem& item, char* scratch, const Rest&... rest) {
  Arena arena(scratch);
  [[maybe_unused]] const typename Pass::TileConfig tile_config;
  Pass pass(call, item, arena);
  const PieceView& piece = call.plan->pieces[item.piece];
  for (int first = 0; first < piece.count[item.entry]; first += kRows) pass.run(first, rest...);
  const int32_t group = piece.group[item.entry];
  if (group < 0) return;
  const int64_t index = call.pending_base[item.piece] + (item.batch * call.heads + item.head) * piece.groups + group;
  if (call.pending[index].fetch_sub(1, std::memory_order_acq_rel) == 1) pass.merge_parts();
}

// Selects the traits for an item. AMX on float32 pays only while the item's keys fit the cache of split operands: beyond that
// every tile would split all its keys again, and FMA is faster. That cache holds K and V of one width.
template <template <class> class PassOf, class... Rest>
void run(const Call& call, const WorkItem& item, char* scratch, const Rest&... rest) {
  if (call.type != Type::f32) run_item<PassOf<TraitsBf16>>(call, item, scratch, rest...);
  else if (call.dim == call.value_dim &&
           PackedCacheOf<TraitsF32>::fits(call.dim, PassOf<TraitsF32>::kCachedRowOperands, visited_keys(*call.plan, item)))
    run_item<PassOf<TraitsF32>>(call, item, scratch, rest...);
  else run_item<PassOf<F32>>(call, item, scratch + measure_split<PassOf>(call), rest...);
}

int64_t scratch_bytes(const Call& call) { return max(measure<Forward>(call), measure<Backward>(call)); }

void forward(const Call& call, const WorkItem& item, const WorkItem* next, char* scratch) {
  run<Forward>(call, item, scratch, next);
}

void backward(const Call& call, const WorkItem& item, const WorkItem* next, const DkDvBlocks& sums, char* scratch) {
  run<Backward>(call, item, scratch, sums, next);
}

void forward_visits(const Call& call, const RowVisits& visits, char* scratch) {
  Arena arena(scratch);
  if (call.type == Type::f32) VisitAttention<float>(call, visits, arena).run();
  else VisitAttention<Bf16>(call, visits, arena).run();
}

int64_t visit_scratch_bytes(const Call& call, int64_t rows) {
  RowVisits visits{};
  visits.rows = rows;
  Arena arena(nullptr);
  VisitAttention<float>(call, visits, arena);
  return arena.used();
}

// See Kernels::reduce. Sums in the order of `blocks`, so the result is deterministic.
void reduce(float* const* blocks, int64_t count, int64_t rows, int64_t stride, int64_t dim, Type type, void* out) {
  const int64_t width = type == Type::f32 ? 4 : 2;
  float* sum = blocks[0];
  for (int64_t r = 0; r < rows; ++r, sum += stride) {
    for (int64_t i = 1; i < count; ++i) {
      const float* addend = blocks[i] + r * stride;
      for (int64_t d = 0; d < stride; d += W) store(sum + d, add(load(sum + d), load(addend + d)));
    }
    char* out_row = static_cast<char*>(out) + r * dim * width;
    if (out_row != reinterpret_cast<char*>(sum)) write_row(type, out_row, 0, sum, dim);
  }
}

void round_rows(Type type, const float* from, int64_t count, void* tensor, int64_t at) {
  write_row(type, tensor, at, from, count);
}

}  // namespace

#define FARLIGHT_STRINGIFY_TOKEN(x) #x
#define FARLIGHT_STRINGIFY(x) FARLIGHT_STRINGIFY_TOKEN(x)
#if defined(FARLIGHT_BF16_PAIRS)
constexpr int64_t kZeroedBytes = sizeof(CacheTags);
#else
constexpr int64_t kZeroedBytes = 0;
#endif
extern const DecodeKernels decode_kernels;  // decode_kernel.cpp
extern const Kernels kernels;
const Kernels kernels{FARLIGHT_STRINGIFY(FARLIGHT_NS),
                      kPairsBf16,
                      kZeroedBytes,
                      scratch_bytes,
                      forward,
                      backward,
                      forward_visits,
                      visit_scratch_bytes,
                      reduce,
                      round_rows,
                      block_scores,
                      pool_softmax,
                      largest_columns,
                      weighted_exponentials,
                      select_largest,
                      peak_fma,
                      2 * kChains * W,
                      &decode_kernels};

}  // namespace farlight::FARLIGHT_NS
