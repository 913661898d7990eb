// Kept probability, number of links and largest lost probability of each row of a tile, under several masks in one pass.
#pragma once

#include <vector>

#include "../parallel.h"
#include "probability_tile.h"

namespace farlight {

// The allowed pairs of a pattern in a tile: bytes 0 or 1, keys contiguous; strides in bytes, 0 for a broadcast dimension.
struct PairMask {
  const uint8_t* data;
  int64_t batch_stride, head_stride, row_stride;
};

// Outputs of one mask, contiguous (batch, heads, rows) each. `beyond` and `lost` may be null: not measured.
struct RowMeasures {
  double* kept;    // sum over allowed keys
  double* beyond;  // the same without the first keys
  int64_t* links;  // number of allowed keys
  float* lost;     // largest probability of a key that is not allowed, 0 where there is none
};

// Fills outputs[m] under masks[m]. `first_keys`: the number of keys that `beyond` leaves out. Sums are accumulated in double.
void measure_rows(const ProbabilityTile& tile, const std::vector<PairMask>& masks, const std::vector<RowMeasures>& outputs,
                  int64_t first_keys, int threads, InterruptCheck& interrupt);

}  // namespace farlight
