// A plan's tables in native memory (farlight._cpu.Plan): converted once from Python's tables, or planned here, then validated.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "binding.h"
#include "content/row_visits.h"
#include "schedule.h"
#include "tables.h"

namespace farlight {

// A plan's validated tables and the schedule of the latest (batch, heads, kv_heads) it was called with. Thread-safe.
class NativePlan {
 public:
  // The plan of a farlight.plan.tables.Plan.
  explicit NativePlan(nanobind::handle plan);
  // The plan of clusterings, and of the clauses of a fixed pattern that shares no pair with them. sizes: (batch, heads, n_q,
  // n_k, q_offset); pieces: 17 numbers each, see plan_binding.cpp.
  NativePlan(const std::vector<int64_t>& sizes, const std::vector<std::vector<int64_t>>& clauses, int64_t gather,
             const std::vector<std::vector<int64_t>>& pieces, int threads);
  // The plan of a content pattern, whose tables are made by the first call that needs them. sizes: (batch, heads, n_q, n_k,
  // q_offset); clauses: see `content_pattern_of`; owners: the Python tensors that these point into, held as long as the plan.
  NativePlan(const std::vector<int64_t>& sizes, const std::vector<std::vector<int64_t>>& clauses, nanobind::object owners,
             int64_t gather);
  NativePlan(const NativePlan&) = delete;
  NativePlan& operator=(const NativePlan&) = delete;

  // The tables; those of a content pattern are planned by the first call of this function.
  const Tables& tables(int threads, InterruptCheck& interrupt);
  bool overlapping() const { return !content_ && tables_.overlapping; }
  bool covers_all_rows() const { return content_ || tables_.covers_all_rows(); }
  // The clauses of a content pattern, else null.
  const ContentPattern* content() const { return content_ ? &*content_ : nullptr; }
  // Where the rows of a tile see fewer than 1 / gather of a granule's pairs, its keys are gathered for each row.
  int64_t gather() const { return gather_; }
  // Whether forward passes of the dtype visit key groups row by row (content/row_visits.h), without tables.
  bool visits_rows(Type type, int threads, InterruptCheck& interrupt);
  // Whether a forward pass should plan its tiles where they are executed: the first one of a content pattern without tables.
  // Later ones are worth tables.
  bool plans_in_place() { return content_ && !is_planned_ && !was_executed_.exchange(true); }
  // Pairs, and keys visited by a float32 forward pass. Zero for a plan of Python's tables.
  ContentCounts counts(int threads, InterruptCheck& interrupt);
  // The same for a dtype, estimated from some tiles; where rows are visited one by one, `visited` is the number of keys that
  // tiles would visit in that time.
  ContentCounts expected(Type type, int threads, InterruptCheck& interrupt);
  int64_t bytes() const { return bytes_; }

  // The schedule of a forward pass, or of both passes. A forward pass under way reads nothing that `order_backward` writes.
  std::shared_ptr<const Schedule> schedule(int64_t batch, int64_t heads, int64_t kv_heads, bool with_backward, int threads,
                                           InterruptCheck& interrupt) {
    const Tables& tables = this->tables(threads, interrupt);
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t before = schedule_ ? schedule_->bytes() : 0;
    if (!schedule_ || schedule_->batch != batch || schedule_->heads != heads || schedule_->kv_heads != kv_heads)
      schedule_ = std::make_shared<Schedule>(tables, batch, heads, kv_heads);
    if (with_backward && !schedule_->has_backward()) schedule_->order_backward();
    grown_bytes_ += schedule_->bytes() - before;
    return schedule_;
  }
  // Growth of the memory of tables and schedule since the previous call of this function, for the plan's byte accounting.
  int64_t take_grown_bytes() { return grown_bytes_.exchange(0, std::memory_order_relaxed); }

 private:
  // Appends the tables of a farlight.plan.tables.Plan.
  void read(nanobind::handle plan);

  std::atomic<int64_t> grown_bytes_{0}, bytes_{0};  // bytes_: of the tables, and of the lists
  Tables tables_;
  nanobind::object owners_;
  std::optional<const ContentPattern> content_;
  int64_t gather_ = 0;
  std::atomic<bool> is_planned_{true}, was_executed_{false};  // `tables_` are there; a forward pass has run
  const ContentSample& sample(int threads, InterruptCheck& interrupt);
  std::optional<ContentSample> sample_;
  std::optional<ContentCounts> counts_;  // of what was planned natively
  std::mutex mutex_;
  std::shared_ptr<Schedule> schedule_;
};

// A content pattern from (batch, heads, n_q, n_k, q_offset) and its clauses, 16 numbers each.
ContentPattern content_pattern_of(const std::vector<int64_t>& sizes, const std::vector<std::vector<int64_t>>& clauses);

}  // namespace farlight
