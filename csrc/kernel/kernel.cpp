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

template <class Work>
int64_t measure(const Call& call) {
  const WorkItem item{0, 0, 0, 0};
  Arena arena(nullptr);
  Work work(call, item, arena);
  return arena.used();
}

// What floats in parts need for themselves: they keep something for the next item, which products in place must not overwrite.
template <template <class> class Direction>
int64_t measure_split(const Call& call) {
  return uses_amx<TraitsF32> ? measure<Direction<TraitsF32>>(call) : 0;
}

template <template <class> class Direction>
int64_t measure(const Call& call) {
  if (call.type != Type::f32) return measure<Direction<TraitsBf16>>(call);
  return measure_split<Direction>(call) + measure<Direction<F32>>(call);
}

// Runs an item in turns of kRows rows; if it was the last part of a split tile to finish, joins them.
template <class Work, class... Rest>
void run_item(const Call& call, const WorkItem& item, char* scratch, const Rest&... rest) {
  Arena arena(scratch);
  [[maybe_unused]] const typename Work::TileConfig session;
  Work work(call, item, arena);
  const PieceView& piece = call.plan->pieces[item.piece];
  for (int first = 0; first < piece.count[item.entry]; first += kRows) work.run(first, rest...);
  const int32_t group = piece.group[item.entry];
  if (group < 0) return;
  const int64_t at = call.pending_base[item.piece] + (item.batch * call.heads + item.head) * piece.groups + group;
  if (call.pending[at].fetch_sub(1, std::memory_order_acq_rel) == 1) work.merge_parts();
}

// Runs an item in the way that suits it. A tile that sees more keys than are kept would have to split each of them into parts anew;
// then products of vectors are faster.
template <template <class> class Direction, class... Rest>
void run(const Call& call, const WorkItem& item, char* scratch, const Rest&... rest) {
  if (call.type != Type::f32) run_item<Direction<TraitsBf16>>(call, item, scratch, rest...);
  else if (PackedCacheOf<TraitsF32>::fits(call.dim, Direction<TraitsF32>::kCachedRowOperands, visited_keys(*call.plan, item)))
    run_item<Direction<TraitsF32>>(call, item, scratch, rest...);
  else run_item<Direction<F32>>(call, item, scratch + measure_split<Direction>(call), rest...);
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
      const float* more = blocks[i] + r * stride;
      for (int64_t d = 0; d < stride; d += W) store(sum + d, add(load(sum + d), load(more + d)));
    }
    char* to = static_cast<char*>(out) + r * dim * width;
    if (to != reinterpret_cast<char*>(sum)) write_row(type, to, 0, sum, dim);
  }
}

}  // namespace

#define FARLIGHT_STRINGIFY_TOKEN(x) #x
#define FARLIGHT_STRINGIFY(x) FARLIGHT_STRINGIFY_TOKEN(x)
#if defined(FARLIGHT_BF16_PAIRS)
constexpr int64_t kCleared = sizeof(CacheTags);
#else
constexpr int64_t kCleared = 0;
#endif
extern const Kernels kernels;
const Kernels kernels{FARLIGHT_STRINGIFY(FARLIGHT_NS), kCleared, scratch_bytes, forward, backward, reduce, peak_fma, 2 * kChains * W};

}  // namespace farlight::FARLIGHT_NS
