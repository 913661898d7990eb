// Visits of rows to key groups, straight from a content pattern's clauses: what plan_content is for tiles that share their keys,
// for rows that each choose their own. Nothing is kept: visits are found again for every group of rows of every call.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "plan_content.h"

namespace farlight {

constexpr int64_t kVisitRows = 512;  // rows of a group at most: their queries and outputs stay in L2

// The keys that one row sees: the union of a pattern's clauses as a bit per key of each key group.
class KeysOfRow {
 public:
  explicit KeysOfRow(int64_t n_k) : n_k_(n_k), seen_((n_k + kVisitKeys - 1) / kVisitKeys, 0) {}

  // The row sees the keys [lo, hi); the interface of RowMasks.
  void add(int64_t lo, int64_t hi, uint32_t, const uint8_t* keep) {
    lo = std::max<int64_t>(lo, 0), hi = std::min(hi, n_k_);
    for (int64_t group = lo / kVisitKeys; lo < hi; ++group) {
      const int64_t first = group * kVisitKeys, last = std::min(hi, first + kVisitKeys);
      uint32_t keys = ((1u << (last - first)) - 1) & ~((1u << (lo - first)) - 1);
      for (int64_t j = lo; keep && j < last; ++j)
        if (!keep[j]) keys &= ~(1u << (j - first));
      if (keys && !seen_[group]) touched_.push_back(static_cast<int32_t>(group));
      seen_[group] |= static_cast<uint16_t>(keys);
      lo = last;
    }
  }

  // The interface of RowMasks, for what differs between rows: nothing does.
  template <class MaskOf>
  void add_each(int64_t, int64_t, const uint8_t*, const MaskOf&) {}

  // Calls visit(key group, keys) for every key group with a key of the row, and clears them.
  template <class Visit>
  void drain(const Visit& visit) {
    for (const int32_t group : touched_) visit(group, std::exchange(seen_[group], uint16_t{0}));
    touched_.clear();
  }

 private:
  int64_t n_k_;
  std::vector<uint16_t> seen_;
  std::vector<int32_t> touched_;
};

// The visits of one group of rows, sorted by key group; memory that is kept from group to group of a thread.
class VisitTable {
 public:
  // Points `to`, whose rows are set, to their visits.
  void fill(const ContentPattern& pattern, RowVisits& to);

 private:
  struct Found {
    int32_t group;
    Visit visit;
  };
  std::vector<Found> found_;
  std::vector<int32_t> place_, group_, ends_;
  std::vector<Visit> visits_;
};

// Whether some list of the pattern serves one row; other patterns are not visited.
bool serves_single_rows(const ContentPattern& pattern);

// The pairs of a pattern, and the keys of all visits. Throws MalformedPlan for an index outside the key blocks.
ContentCounts count_visits(const ContentPattern& pattern, int threads, InterruptCheck& interrupt);

// What the sampled rows' visits cost by these kernels, as the number of keys that a tile would visit in their time.
double visited_by_rows(const ContentSample& sample, Type type, const Kernels& kernels);

}  // namespace farlight
