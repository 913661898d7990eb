#include "row_measures.h"

#include <algorithm>
#include <bit>

namespace farlight {

namespace {

constexpr int64_t kLanes = 16;          // independent accumulators: whole vectors of every ISA
constexpr int64_t kCountedSteps = 255;  // additions of 0 or 1 that a byte counter holds

// Measures of a range of keys. Bit patterns of nonnegative floats are ordered as the numbers are, so the maximum is taken of
// integers, and a mask byte becomes an AND mask: the loops vectorise without -ffast-math.
struct RangeMeasures {
  double kept = 0;
  int64_t links = 0;
  int32_t lost = 0;  // bits of a float

  void add(float p, bool allowed) {
    kept += allowed ? p : 0.0f;
    links += allowed;
    lost = std::max(lost, allowed ? 0 : std::bit_cast<int32_t>(p));
  }

  void add(const RangeMeasures& other) {
    kept += other.kept;
    links += other.links;
    lost = std::max(lost, other.lost);
  }
};

RangeMeasures measure_range(const float* p, const uint8_t* mask, int64_t keys) {
  double kept[kLanes] = {};
  int32_t lost[kLanes] = {};
  RangeMeasures result;
  int64_t j = 0;
  while (j + kLanes <= keys) {
    const int64_t stop = std::min(keys - kLanes + 1, j + kLanes * kCountedSteps);
    uint8_t links[kLanes] = {};
    for (; j < stop; j += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int32_t bits = std::bit_cast<int32_t>(p[j + lane]), keep = -static_cast<int32_t>(mask[j + lane]);
        const int32_t outside = bits & ~keep;
        kept[lane] += std::bit_cast<float>(bits & keep);
        lost[lane] = outside > lost[lane] ? outside : lost[lane];
        links[lane] += mask[j + lane];
      }
    for (const uint8_t count : links) result.links += count;
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    result.kept += kept[lane];
    result.lost = std::max(result.lost, lost[lane]);
  }
  for (; j < keys; ++j) result.add(p[j], mask[j] != 0);
  return result;
}

}  // namespace

void measure_rows(const ProbabilityTile& tile, const std::vector<PairMask>& masks, const std::vector<RowMeasures>& outputs,
                  int64_t first_keys, int threads, InterruptCheck& interrupt) {
  const int64_t first = std::min(first_keys, tile.keys);
  parallel_for(tile.batch * tile.heads * tile.rows, threads, interrupt, [&](int64_t i) {
    const int64_t row = i % tile.rows, head = i / tile.rows % tile.heads, item = i / tile.rows / tile.heads;
    const float* p = tile.row(i);
    for (size_t m = 0; m < masks.size(); ++m) {
      const PairMask& mask = masks[m];
      const uint8_t* allowed = mask.data + item * mask.batch_stride + head * mask.head_stride + row * mask.row_stride;
      const RowMeasures& to = outputs[m];
      const int64_t begin = to.beyond ? first : 0;
      RangeMeasures range = measure_range(p + begin, allowed + begin, tile.keys - begin);
      if (to.beyond) to.beyond[i] = range.kept;
      range.add(measure_range(p, allowed, begin));
      to.kept[i] = range.kept;
      to.links[i] = range.links;
      if (to.lost) to.lost[i] = std::bit_cast<float>(range.lost);
    }
  });
}

}  // namespace farlight
