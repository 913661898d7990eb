// The kernels of one instruction set; compiled once for each, see isa.h.
#include "backward.h"
#include "forward.h"
#include "peak_fma.h"

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

template <class Pass>
int64_t measure(const Call& call) {
  const WorkItem item{0, 0, 0, 0};
  Arena arena(nullptr);
  Pass pass(call, item, arena);
  return arena.used();
}

// What floats in parts need for themselves: they keep something for the next item, which products in place must not overwrite.
template <template <class> class PassOf>
int64_t measure_split(const Call& call) {
  return uses_amx<TraitsF32> ? measure<PassOf<TraitsF32>>(call) : 0;
}

template <template <class> class PassOf>
int64_t measure(const Call& call) {
  if (call.type != Type::f32) return measure<PassOf<TraitsBf16>>(call);
  return measure_split<PassOf>(call) + measure<PassOf<F32>>(call);
}

// Runs an item in turns of kRows rows; if it was the last part of a split tile to finish, joins them.
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

// Runs an item in the way that suits it. A tile that sees more keys than are kept would have to split each of them into parts anew;
// then products of vectors are faster.
template <template <class> class PassOf, class... Rest>
void run(const Call& call, const WorkItem& item, char* scratch, const Rest&... rest) {
  if (call.type != Type::f32) run_item<PassOf<TraitsBf16>>(call, item, scratch, rest...);
  else if (PackedCacheOf<TraitsF32>::fits(call.dim, PassOf<TraitsF32>::kCachedRowOperands, visited_keys(*call.plan, item)))
    run_item<PassOf<TraitsF32>>(call, item, scratch, rest...);
  else run_item<PassOf<F32>>(call, item, scratch + measure_split<PassOf>(call), rest...);
}

int64_t scratch_bytes(const Call& call) { return max(measure<Forward>(call), measure<Backward>(call)); }

void forward(const Call& call, const WorkItem& item, const WorkItem* next, char* scratch) { run<Forward>(call, item, scratch, next); }

void backward(const Call& call, const WorkItem& item, const WorkItem* next, const DkDvBlocks& sums, char* scratch) {
  run<Backward>(call, item, scratch, sums, next);
}

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

}  // namespace

#define FARLIGHT_STRINGIFY_TOKEN(x) #x
#define FARLIGHT_STRINGIFY(x) FARLIGHT_STRINGIFY_TOKEN(x)
#if defined(FARLIGHT_BF16_PAIRS)
constexpr int64_t kZeroedBytes = sizeof(CacheTags);
#else
constexpr int64_t kZeroedBytes = 0;
#endif
extern const Kernels kernels;
const Kernels kernels{FARLIGHT_STRINGIFY(FARLIGHT_NS), kZeroedBytes, scratch_bytes, forward, backward, reduce, peak_fma, 2 * kChains * W};

}  // namespace farlight::FARLIGHT_NS
