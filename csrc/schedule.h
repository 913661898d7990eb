// In which order the work of a plan is done, for a number of batch items and heads. Depends on the problem alone, never on
// the number of threads: sums are formed in the same order whoever does the work.
#pragma once

#include <cstdint>
#include <vector>

#include "tables.h"

namespace farlight {

// A stretch of a group's items, done by one thread from first to last with sums of its own.
struct Slab {
  int64_t first, last;  // items, in Phase::items
};

// Items that may run at the same time. Pieces that serve the same rows come one after the other.
struct Phase {
  std::vector<WorkItem> forward;    // dear ones first, the rest as they lie in memory
  std::vector<WorkItem> backward;   // group by group
  std::vector<Slab> slabs;      // (group, slab), group by group
};

// The blocks of keys that a slab's sums cover. Shared by groups that see the same plan.
struct Cover {
  std::vector<int32_t> blocks;
};

class Schedule {
 public:
  Schedule(const Tables& tables, int64_t batch, int64_t heads, int64_t kv_heads);

  const int64_t batch, heads, kv_heads;
  std::vector<Phase> phases;
  std::vector<int64_t> partial_base, pending_base;  // per piece
  int64_t partials = 0;
  std::vector<int32_t> parts;  // of each split tile: how many results are awaited
  int64_t cost = 0;            // keys visited, times turns of kRows rows

  int64_t bytes() const;  // held in memory
  const std::vector<std::pair<int64_t, int64_t>>& unwritten_rows() const { return tables_.unwritten_rows(); }
  int64_t groups() const { return batch * kv_heads; }
  int64_t slab_count = 1;  // slabs of a group, in every phase
  int64_t blocks = 0;      // of keys
  const Cover& cover(int64_t group, int64_t slab) const { return covers_[cell(group) * slab_count + slab]; }

 private:
  int64_t cell(int64_t group) const { return (by_batch_ ? group / kv_heads : 0) * (by_head_ ? kv_heads : 1) + (by_head_ ? group % kv_heads : 0); }
  int64_t cost_of(const WorkItem& item) const;
  void order_forward();
  void order_backward();
  void cut(int64_t slabs);
  int64_t find_covers();
  void mark(const WorkItem& item, std::vector<uint8_t>& seen) const;

  const Tables& tables_;
  bool by_batch_ = false, by_head_ = false;
  std::vector<Cover> covers_;
};

}  // namespace farlight
