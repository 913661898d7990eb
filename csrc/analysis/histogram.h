// Histogram of a tile's probabilities per batch item and head, in the bins of src/farlight/analysis/loss/histogram.py.
#pragma once

#include "../parallel.h"
#include "probability_tile.h"

namespace farlight {

// Bins are cut from the bits of a float32: bin of p = (bits of 1.0 - bits of p) >> shift, clamped to 0 … bins - 1.
struct Binning {
  int64_t bins;
  int shift;
};

// Per batch item and head `bins` counts and sums of probability, bins contiguous; strides in elements, equal for both.
struct HistogramView {
  int64_t* count;
  double* mass;
  int64_t batch_stride, head_stride;
};

constexpr int64_t kMostBins = 4096;

// Adds a tile to `to`. The sums are the same for any number of threads: rows are summed in chunks that depend on the tile's
// shape alone, and the chunks of a head are added in order.
void add_to_histogram(const ProbabilityTile& tile, const Binning& binning, const HistogramView& to, int threads,
                      InterruptCheck& interrupt);

}  // namespace farlight
