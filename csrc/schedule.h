// The order in which a plan's work items run, for one batch size and number of heads, and the cut of the backward pass into
// slabs. Depends on the problem alone, never on the number of threads, so float sums are formed in the same order whoever runs
// an item.
#pragma once

#include <cstdint>
#include <vector>

#include "tables.h"

namespace farlight {

// A range of a group's backward items, run in order by one thread with dk/dv accumulators of its own.
struct Slab {
  int64_t first, last;  // indices into Phase::backward
};

// Items that may run concurrently. Pieces that overlap in query rows are put into consecutive phases, since each merges into
// the same result rows.
struct Phase {
  std::vector<WorkItem> forward;   // longest items first (load balance), the rest in memory order (locality)
  std::vector<WorkItem> backward;  // sorted by group, head, piece, entry
  std::vector<Slab> slabs;         // (groups, slab_count)
};

// The blocks of kBlock keys that a slab's items visit, sorted. Groups whose tables are the same share one set.
struct KeyBlockSet {
  std::vector<int32_t> blocks;
};

// The schedule of one plan for (batch, heads, kv_heads). Throws MalformedPlan when the plan's variants do not fit.
class Schedule {
 public:
  Schedule(const Tables& tables, int64_t batch, int64_t heads, int64_t kv_heads);

  const int64_t batch, heads, kv_heads;
  std::vector<Phase> phases;
  std::vector<int64_t> partial_base, pending_base;  // per piece: first split-K result, first counter
  int64_t partials = 0;                             // split-K partial results in all
  std::vector<int32_t> parts;                       // initial counter of each split tile: its number of parts
  int64_t cost = 0;  // (visited keys + kTileOverhead) summed over row blocks: the cost model's estimate of a call

  // Orders the backward pass: Phase::backward, the slabs and the key blocks, which a call without gradients does not need.
  void order_backward();
  bool has_backward() const { return !key_block_sets_.empty(); }

  int64_t bytes() const;  // memory held
  const std::vector<std::pair<int64_t, int64_t>>& unwritten_rows() const { return tables_.unwritten_rows(); }
  int64_t groups() const { return batch * kv_heads; }
  int64_t slab_count = 1;  // slabs of a group, the same in every phase
  int64_t blocks = 0;      // blocks of kBlock keys
  const KeyBlockSet& key_blocks_of(int64_t group, int64_t slab) const {
    return key_block_sets_[variant_cell(group) * slab_count + slab];
  }

 private:
  // Index of the group among groups with different tables.
  int64_t variant_cell(int64_t group) const {
    return (by_batch_ ? group / kv_heads : 0) * (by_head_ ? kv_heads : 1) + (by_head_ ? group % kv_heads : 0);
  }
  int64_t cost_of(const WorkItem& item) const;
  void order_forward();
  void cut_slabs(int64_t slabs);
  int64_t find_key_blocks();
  void mark_key_blocks(const WorkItem& item, std::vector<uint8_t>& touched) const;

  const Tables& tables_;
  bool by_batch_ = false, by_head_ = false;
  std::vector<KeyBlockSet> key_block_sets_;
};

}  // namespace farlight
