// Python's side of analysis/: measures of tiles of full attention probabilities.
#include "../binding.h"

#include <nanobind/stl/vector.h>

#include <algorithm>

#include "histogram.h"
#include "row_measures.h"

namespace nb = nanobind;

namespace farlight {

namespace {

// numbers: (address, batch, heads, rows, keys).
ProbabilityTile tile_of(const std::vector<int64_t>& numbers) {
  if (numbers.size() != 5 || std::any_of(numbers.begin() + 1, numbers.end(), [](int64_t size) { return size < 0; }))
    throw std::invalid_argument("a tile is (address, batch, heads, rows, keys)");
  return {pointer<const float>(numbers[0]), numbers[1], numbers[2], numbers[3], numbers[4]};
}

// See row_measures.h. masks: (address, batch stride, head stride, row stride) each; outputs: the addresses (kept, beyond,
// links, lost) of each mask.
void rows(const std::vector<int64_t>& tile_numbers, const std::vector<std::vector<int64_t>>& masks,
          const std::vector<std::vector<int64_t>>& outputs, int64_t first_keys, int threads) {
  const ProbabilityTile tile = tile_of(tile_numbers);
  if (masks.size() != outputs.size() || first_keys < 0) throw std::invalid_argument("each mask has its outputs");
  std::vector<PairMask> mask_views;
  std::vector<RowMeasures> output_views;
  for (size_t m = 0; m < masks.size(); ++m) {
    if (masks[m].size() != 4 || outputs[m].size() != 4) throw std::invalid_argument("a mask is 4 numbers, its outputs are 4");
    mask_views.push_back({pointer<const uint8_t>(masks[m][0]), masks[m][1], masks[m][2], masks[m][3]});
    output_views.push_back({pointer<double>(outputs[m][0]), pointer<double>(outputs[m][1]), pointer<int64_t>(outputs[m][2]),
                            pointer<float>(outputs[m][3])});
  }
  InterruptCheck interrupt = signal_check();
  const nb::gil_scoped_release release;
  measure_rows(tile, mask_views, output_views, first_keys, threads, interrupt);
}

// See histogram.h. to: (address of counts, address of sums, batch stride, head stride); binning: (bins, shift).
void histogram(const std::vector<int64_t>& tile_numbers, const std::vector<int64_t>& to, const std::vector<int64_t>& binning,
               int threads) {
  const ProbabilityTile tile = tile_of(tile_numbers);
  if (to.size() != 4 || binning.size() != 2) throw std::invalid_argument("a histogram is 4 numbers, its bins are 2");
  if (binning[0] < 1 || binning[0] > kMostBins || binning[1] < 0 || binning[1] > 31)
    throw std::invalid_argument("malformed bins of a histogram");
  InterruptCheck interrupt = signal_check();
  const nb::gil_scoped_release release;
  add_to_histogram(tile, {binning[0], static_cast<int>(binning[1])},
                   {pointer<int64_t>(to[0]), pointer<double>(to[1]), to[2], to[3]}, threads, interrupt);
}

}  // namespace

void bind_analysis(nb::module_& m) {
  m.def("measure_rows", &rows);
  m.def("add_to_histogram", &histogram);
}

}  // namespace farlight
