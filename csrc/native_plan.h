// A plan's tables in native memory (farlight._cpu.Plan): converted once from Python's tables, or planned here, then validated.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "binding.h"
#include "content/plan_content.h"
#include "schedule.h"
#include "tables.h"

namespace farlight {

// A plan's validated tables and the schedule of the latest (batch, heads, kv_heads) it was called with. Thread-safe.
class NativePlan {
 public:
  // The plan of a farlight.plan.tables.Plan.
  explicit NativePlan(nanobind::handle plan);
  // The plan of clusterings, and of a fixed pattern (None without one) that shares no pair with them. sizes: (batch, heads,
  // n_q, n_k, q_offset); pieces: 17 numbers each, see plan_binding.cpp.
  NativePlan(nanobind::handle fixed, const std::vector<int64_t>& sizes, const std::vector<std::vector<int64_t>>& pieces,
             int threads);
  // The plan of a content pattern. sizes: (batch, heads, n_q, n_k, q_offset); clauses: see `content_pattern_of`.
  NativePlan(const std::vector<int64_t>& sizes, const std::vector<std::vector<int64_t>>& clauses, int64_t gather, int threads);
  NativePlan(const NativePlan&) = delete;
  NativePlan& operator=(const NativePlan&) = delete;

  const Tables& tables() const { return tables_; }
  bool overlapping() const { return tables_.overlapping; }
  bool covers_all_rows() const { return tables_.covers_all_rows(); }
  const ContentCounts& counts() const { return counts_; }

  std::shared_ptr<const Schedule> schedule(int64_t batch, int64_t heads, int64_t kv_heads) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!schedule_ || schedule_->batch != batch || schedule_->heads != heads || schedule_->kv_heads != kv_heads) {
      auto fresh = std::make_shared<const Schedule>(tables_, batch, heads, kv_heads);
      grown_bytes_ += fresh->bytes() - (schedule_ ? schedule_->bytes() : 0);
      schedule_ = std::move(fresh);
    }
    return schedule_;
  }
  // Growth of the schedule's memory in bytes since the previous call of this function, for the plan's byte accounting.
  int64_t take_grown_bytes() { return grown_bytes_.exchange(0, std::memory_order_relaxed); }

 private:
  // Appends the tables of a farlight.plan.tables.Plan.
  void read(nanobind::handle plan);

  std::atomic<int64_t> grown_bytes_{0};
  Tables tables_;
  ContentCounts counts_;  // of a content pattern; else zero
  std::mutex mutex_;
  std::shared_ptr<const Schedule> schedule_;
};

// A content pattern from (batch, heads, n_q, n_k, q_offset) and its clauses, 14 numbers each.
ContentPattern content_pattern_of(const std::vector<int64_t>& sizes, const std::vector<std::vector<int64_t>>& clauses);

}  // namespace farlight
