// Online softmax of a row block: the running maximum of each row, the sum of its weights relative to that maximum, and the
// factors by which a raised maximum rescales what was accumulated before.
#pragma once

#include "scores.h"

namespace farlight::FARLIGHT_NS {

template <class Traits>
struct OnlineSoftmax {
  // The running maximum of a row is raised only when a score exceeds it by more than kMaxSlack, so rescaling is rare; float32
  // weights up to 2^8 are harmless. Weights rounded to bfloat16 use the exact maximum: numbers just below 1 are rounded half as
  // coarsely as those just above, which takes a tenth off the rounding error of the results.
  static constexpr float kMaxSlack = uses_pairs<Traits> && num_parts<Traits> == 1 ? 0.0f : 8.0f;

  // No keys seen.
  void reset() {
    for (int g = 0; g < kRows; g += W) {
      store(row_max + g, broadcast(kInitialMax));
      store(row_sum + g, broadcast(0.0f));
      store(rescale + g, broadcast(1.0f));
    }
  }

  // Raises the running maximum to the chunk's where it exceeds the slack, and rescales the row sums. Returns whether the
  // accumulators must be multiplied by `rescale` as well.
  bool raise_max(const float* chunk_row_max, int lanes, bool first_chunk) {
    bool rescales = false;
    for (int g = 0; g < lanes; g += W) {
      const F previous = load(row_max + g), chunk_max = load(chunk_row_max + g);
      const uint32_t raised = greater(chunk_max, add(previous, broadcast(kMaxSlack)));
      store(rescale + g, broadcast(1.0f));
      if (!raised) continue;
      const F reference = select(raised, chunk_max, previous);
      store(row_max + g, reference);
      if (first_chunk) continue;
      const F factor = exp2_poly<5>(sub(previous, reference));
      store(rescale + g, factor);
      store(row_sum + g, mul(load(row_sum + g), factor));
      rescales = true;
    }
    return rescales;
  }

  // Whether a running maximum is so large (kLargeReference) that scores must be scaled before it is subtracted.
  bool any_large(int lanes) const {
    uint32_t large = 0;
    for (int g = 0; g < lanes; g += W) {
      const F reference = load(row_max + g);
      large |= greater(reference, broadcast(kLargeReference)) |
               (greater(broadcast(-kLargeReference), reference) & greater(reference, broadcast(kInitialMax)));
    }
    return large != 0;
  }

  void add_sums(int g, F sum) { store(row_sum + g, add(load(row_sum + g), sum)); }

  alignas(64) float row_max[kRows];
  alignas(64) float row_sum[kRows];
  alignas(64) float rescale[kRows];
};

}  // namespace farlight::FARLIGHT_NS
