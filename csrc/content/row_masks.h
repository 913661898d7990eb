// Row masks of a tile, key by key: the union of a plan's clauses before it is cut into runs.
//
// Keys are handled in granules of kGranule: a bit per granule records which have been touched, so that a tile costs as much as
// the keys it touches, and both clearing and the ordered walk skip the rest.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <utility>
#include <vector>

namespace farlight {

constexpr int64_t kGranule = 8;

class RowMasks {
 public:
  explicit RowMasks(int64_t n_k)
      : n_k_(n_k), rows_((n_k + kGranule - 1) / kGranule * kGranule, 0), touched_((n_k / kGranule + 64) / 64, 0) {}

  // The rows in `rows` see the keys [lo, hi). `keep`: per key, nonzero where it takes part; null = all.
  void add(int64_t lo, int64_t hi, uint32_t rows, const uint8_t* keep) {
    lo = std::max<int64_t>(lo, 0), hi = std::min(hi, n_k_);
    if (lo >= hi) return;
    for (int64_t g = lo / kGranule; g <= (hi - 1) / kGranule; ++g) touched_[g / 64] |= uint64_t{1} << (g % 64);
    uint32_t* at = rows_.data();
    if (keep) {
      for (int64_t j = lo; j < hi; ++j) at[j] |= keep[j] ? rows : 0;
    } else {
      for (int64_t j = lo; j < hi; ++j) at[j] |= rows;
    }
  }

  // Calls visit(first key, masks, keys) for every touched granule in ascending order, and clears it.
  template <class Visit>
  void drain(const Visit& visit) {
    for (size_t w = 0; w < touched_.size(); ++w)
      for (uint64_t bits = std::exchange(touched_[w], 0); bits; bits &= bits - 1) {
        const int64_t first = (static_cast<int64_t>(w) * 64 + std::countr_zero(bits)) * kGranule;
        uint32_t* masks = rows_.data() + first;
        visit(first, masks, static_cast<int>(std::min(kGranule, n_k_ - first)));
        std::fill_n(masks, kGranule, 0);
      }
  }

 private:
  int64_t n_k_;
  std::vector<uint32_t> rows_;     // per key: bit s, row s of the tile sees it
  std::vector<uint64_t> touched_;  // a bit per granule
};

}  // namespace farlight
