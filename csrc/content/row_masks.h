// Row masks of a tile, key by key: the union of a plan's clauses before it is cut into runs.
//
// Keys are handled in granules of kGranule. Rows that see a whole granule are one mask of that granule; only the ends of ranges
// that are not aligned to granules, and masked keys, are written key by key. A bit per granule records which have been touched,
// so that a tile costs as much as the granules it touches, and both clearing and the ordered walk skip the rest.
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
      : n_k_(n_k),
        granules_((n_k + kGranule - 1) / kGranule),
        whole_(granules_, 0),
        rows_(granules_ * kGranule, 0),
        touched_(granules_ / 64 + 1, 0),
        split_(granules_ / 64 + 1, 0) {}

  // The rows in `rows` see the keys [lo, hi). `keep`: per key, nonzero where it takes part; null = all.
  void add(int64_t lo, int64_t hi, uint32_t rows, const uint8_t* keep) {
    lo = std::max<int64_t>(lo, 0), hi = std::min(hi, n_k_);
    if (lo >= hi) return;
    const int64_t first = (lo + kGranule - 1) / kGranule, last = hi == n_k_ ? granules_ : hi / kGranule;
    if (keep || first >= last) return add_keys(lo, hi, rows, keep);
    for (int64_t g = first; g < last; ++g) {
      whole_[g] |= rows;
      touched_[g / 64] |= uint64_t{1} << (g % 64);
    }
    add_keys(lo, first * kGranule, rows, nullptr);
    add_keys(last * kGranule, hi, rows, nullptr);
  }

  // The rows mask_of(j) see key j, for the keys j of [lo, hi).
  template <class MaskOf>
  void add_each(int64_t lo, int64_t hi, const uint8_t* keep, const MaskOf& mask_of) {
    lo = std::max<int64_t>(lo, 0), hi = std::min(hi, n_k_);
    if (lo >= hi) return;
    touch_split(lo, hi);
    uint32_t* at = rows_.data();
    for (int64_t j = lo; j < hi; ++j) at[j] |= !keep || keep[j] ? mask_of(j) : 0;
  }

  // Calls visit(first key, masks, keys, whether the masks are equal) for every touched granule in ascending order, and clears
  // it.
  template <class Visit>
  void drain(const Visit& visit) {
    for (size_t w = 0; w < touched_.size(); ++w) {
      const uint64_t split = std::exchange(split_[w], 0);
      for (uint64_t bits = std::exchange(touched_[w], 0); bits; bits &= bits - 1) {
        const int bit = std::countr_zero(bits);
        const int64_t granule = static_cast<int64_t>(w) * 64 + bit, first = granule * kGranule;
        const uint32_t whole = std::exchange(whole_[granule], 0);
        uint32_t masks[kGranule];
        std::fill_n(masks, kGranule, whole);
        const bool is_split = split >> bit & 1;
        if (is_split) {
          uint32_t* rows = rows_.data() + first;
          for (int64_t i = 0; i < kGranule; ++i) masks[i] |= std::exchange(rows[i], 0);
        }
        visit(first, masks, static_cast<int>(std::min(kGranule, n_k_ - first)), !is_split);
      }
    }
  }

 private:
  void add_keys(int64_t lo, int64_t hi, uint32_t rows, const uint8_t* keep) {
    if (lo >= hi) return;
    touch_split(lo, hi);
    uint32_t* at = rows_.data();
    if (keep) {
      for (int64_t j = lo; j < hi; ++j) at[j] |= keep[j] ? rows : 0;
    } else {
      for (int64_t j = lo; j < hi; ++j) at[j] |= rows;
    }
  }

  void touch_split(int64_t lo, int64_t hi) {
    for (int64_t g = lo / kGranule; g <= (hi - 1) / kGranule; ++g) {
      touched_[g / 64] |= uint64_t{1} << (g % 64);
      split_[g / 64] |= uint64_t{1} << (g % 64);
    }
  }

  int64_t n_k_, granules_;
  std::vector<uint32_t> whole_;              // per granule: bit s, row s of the tile sees all of it
  std::vector<uint32_t> rows_;               // per key: further rows
  std::vector<uint64_t> touched_, split_;    // a bit per granule: any row sees a key of it; `rows_` was written to
};

}  // namespace farlight
