#include "run.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "memory.h"
#include "parallel.h"
#include "dkdv_reduction.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace farlight {

namespace {

constexpr int64_t kWorthThreads = 50'000;  // keys visited times head dimension, below which one thread is faster than two

// A thread's working memory; kept from call to call, but for its beginning, which is cleared for each.
char* scratch(int64_t bytes, int64_t cleared, uint64_t call) {
  thread_local Buffer room;
  thread_local uint64_t served = 0;
  if (room.bytes() < bytes) {
    room = Buffer(bytes);
    served = 0;
  }
  if (served != call) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(room.as<char>(), bytes);  // it is divided anew, with other gaps where the kernels are others
#endif
    std::memset(room.as<char>(), 0, static_cast<size_t>(cleared));
  }
  served = call;
  return room.as<char>();
}

uint64_t next_call() {
  static std::atomic<uint64_t> calls{0};
  return calls.fetch_add(1, std::memory_order_relaxed) + 1;
}

// Results of split tiles on their way.
class Partials {
 public:
  Partials(Call& call, const Schedule& schedule)
      : values_(schedule.partials * call.plan->tile * (call.dim + 2) * static_cast<int64_t>(sizeof(float))),
        pending_(schedule.parts.empty() ? nullptr : new std::atomic<int32_t>[schedule.parts.size()]) {
    for (size_t i = 0; i < schedule.parts.size(); ++i) pending_[i].store(schedule.parts[i], std::memory_order_relaxed);
    call.partial = values_.as<float>();
    call.pending = pending_.get();
    call.partial_base = schedule.partial_base.data();
    call.pending_base = schedule.pending_base.data();
  }

 private:
  Buffer values_;
  std::unique_ptr<std::atomic<int32_t>[]> pending_;
};

int64_t rows_bytes(const Call& call, Type type, int64_t heads, int64_t rows) {
  return call.batch * heads * rows * call.dim * (type == Type::f32 ? 4 : 2);
}

// Rows that see nothing have zeros, and an lse of minus infinity. All of the result is about to be written, here or by tiles.
void begin_result(const Call& call, const Schedule& schedule, bool with_lse, int threads, InterruptCheck& interrupt) {
  advise_huge_pages(call.result, rows_bytes(call, call.out_type, call.heads, call.plan->n_q));
  constexpr int64_t stretch = 4096;  // rows that a thread takes at once
  struct Stretch {
    int64_t first, last;
  };
  std::vector<Stretch> all;
  for (const auto& [first, last] : schedule.unwritten_rows())
    for (int64_t i = first; i < last; i += stretch) all.push_back({i, std::min(i + stretch, last)});
  const int64_t width = call.dim * (call.out_type == Type::f32 ? 4 : 2), many = static_cast<int64_t>(all.size());
  parallel_for(call.batch * call.heads * many, threads, interrupt, [&](int64_t i) {
    const Stretch& rows = all[i % many];
    const int64_t at = i / many * call.plan->n_q + rows.first, count = rows.last - rows.first;
    std::memset(static_cast<char*>(call.result) + at * width, 0, static_cast<size_t>(count * width));
    if (with_lse) std::fill_n(call.lse + at, count, -std::numeric_limits<float>::infinity());
  });
}

// The item after item i of those before `end`, if there is one.
const WorkItem* after(const std::vector<WorkItem>& items, int64_t i, int64_t end) { return i + 1 < end ? &items[i + 1] : nullptr; }

int64_t rows_of(const Call& call) { return call.batch * call.heads * call.plan->n_q; }

Buffer row_sums_of(const Call& call) {
  const int64_t bytes = rows_of(call) * static_cast<int64_t>(sizeof(RowStats));
  Buffer room(bytes);
  std::memset(room.as<char>(), 0, static_cast<size_t>(bytes));
  return room;
}

// The lse beyond which weights computed from it are off by more than 2^-14 in float32, 2^-10 in bfloat16.
float largest_lse(Type type) { return type == Type::f32 ? 1024.0f : 16384.0f; }

bool any_large(const Call& call, int threads, InterruptCheck& interrupt) {
  constexpr int64_t stretch = 1 << 16;
  const float limit = largest_lse(call.type);
  const int64_t rows = rows_of(call);
  std::atomic<bool> found{false};
  parallel_for((rows + stretch - 1) / stretch, threads, interrupt, [&](int64_t i) {
    bool large = false;
    for (int64_t at = i * stretch; at < std::min(rows, (i + 1) * stretch); ++at)
      large |= std::abs(call.lse[at]) > limit && std::isfinite(call.lse[at]);
    if (large) found.store(true, std::memory_order_relaxed);
  });
  return found.load();
}

// The sums of rows for the backward pass of scores so large that their lse in float32 has too few digits: computed once more.
// Where the lse at hand is another one than that of these keys, as far as it can be told, the weights are relative to it.
Buffer exact_row_sums(const Kernels& kernels, const Call& call, const Schedule& schedule, int threads, InterruptCheck& interrupt) {
  Buffer sums = row_sums_of(call);
  const int64_t rows = rows_of(call);
  const Buffer out(rows_bytes(call, call.type, call.heads, call.plan->n_q)), lse(rows * static_cast<int64_t>(sizeof(float)));
  Call again = call;
  again.out_type = call.type;
  again.dropout.on = false;
  again.result = out.as<void>();
  again.lse = lse.as<float>();
  again.row_stats = sums.as<RowStats>();
  run_forward(kernels, again, schedule, threads, interrupt);
  for (int64_t at = 0; at < rows; ++at) {
    RowStats& row = again.row_stats[at];
    if (row.row_sum == 0.0f) continue;
    const float apart = call.lse[at] - again.lse[at];
    row.row_sum = std::log(row.row_sum) + (std::abs(apart) <= 0x1p-21f * std::abs(again.lse[at]) ? 0.0f : apart);
  }
  return sums;
}

}  // namespace

void run_forward(const Kernels& kernels, Call call, const Schedule& schedule, int threads, InterruptCheck& interrupt) {
  const Partials partials(call, schedule);
  const Buffer row_stats = call.merges && !call.row_stats ? row_sums_of(call) : Buffer();
  if (row_stats.bytes()) call.row_stats = row_stats.as<RowStats>();
  const int64_t bytes = kernels.scratch_bytes(call);
  const uint64_t number = next_call();
  if (schedule.cost * call.dim < kWorthThreads) threads = 1;
  begin_result(call, schedule, true, threads, interrupt);
  for (const Phase& phase : schedule.phases) {
    const int64_t count = static_cast<int64_t>(phase.forward.size());
    parallel_for(count, threads, interrupt, [&](int64_t i) {
      kernels.forward(call, phase.forward[i], after(phase.forward, i, count), scratch(bytes, kernels.zeroed_bytes, number));
    });
  }
}

void run_backward(const Kernels& kernels, Call call, const Schedule& schedule, void* dk, void* dv, int threads,
                  InterruptCheck& interrupt) {
  const Buffer row_stats = any_large(call, threads, interrupt) ? exact_row_sums(kernels, call, schedule, threads, interrupt) : Buffer();
  if (row_stats.bytes()) call.row_stats = row_stats.as<RowStats>();
  const Partials partials(call, schedule);
  const int64_t bytes = kernels.scratch_bytes(call);
  const uint64_t number = next_call();
  if (schedule.cost * call.dim < kWorthThreads) threads = 1;
  begin_result(call, schedule, false, threads, interrupt);
  for (void* grad : {dk, dv}) advise_huge_pages(grad, rows_bytes(call, call.type, call.kv_heads, call.plan->n_k));
  const int64_t units = schedule.groups() * schedule.slab_count;
  // With one phase and a group for every thread, a group is added up by whoever finishes its last slab, and its memory
  // serves the next group. Otherwise all is added up at the end, by all threads.
  const bool at_once = schedule.phases.size() == 1 && schedule.groups() >= threads;
  DkDvReduction sums(kernels, call, schedule, dk, dv);
  for (size_t p = 0; p < schedule.phases.size(); ++p) {
    const Phase& phase = schedule.phases[p];
    parallel_for(units, threads, interrupt, [&](int64_t unit) {
      if (p == 0) sums.open(unit);
      const Slab& slab = phase.slabs[unit];
      for (int64_t i = slab.first; i < slab.last; ++i) {
        char* room = scratch(bytes, kernels.zeroed_bytes, number);
        kernels.backward(call, phase.backward[i], after(phase.backward, i, slab.last), sums.of(unit), room);
      }
      if (at_once && sums.finished(unit)) {
        const int64_t group = unit / schedule.slab_count;
        for (int64_t block = 0; block < schedule.blocks; ++block) sums.add_up(group, block);
        sums.close(group);
      }
    });
  }
  if (!at_once)
    parallel_for(schedule.groups() * schedule.blocks, threads, interrupt,
             [&](int64_t i) { sums.add_up(i / schedule.blocks, i % schedule.blocks); });
}

}  // namespace farlight
