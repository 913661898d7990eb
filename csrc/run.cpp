// One call on all threads (run.h): scratch memory, split-K partials, initialisation of rows without keys, exact row statistics
// for large scores, and the parallel loops over work items and slabs.
#include "run.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "content/row_visits.h"
#include "content/tiles_in_place.h"
#include "dkdv_reduction.h"
#include "memory.h"
#include "parallel.h"
#include "term_reduction.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace farlight {

namespace {

// visited keys times head dimension; below this, waking a second thread costs more than it saves
constexpr int64_t kMinParallelWork = 50'000;

// Float32 sums of pieces that merge into a 16-bit result: this many bytes at least, and one of so many parts of the result's
// lines.
constexpr int64_t kMergeBytes = int64_t{6} << 20, kMergeParts = 8;

// The calling thread's scratch memory, kept from call to call. Its first `zeroed` bytes (cache tags) are zeroed once per call.
char* scratch(int64_t bytes, int64_t zeroed, uint64_t call_id) {
  thread_local Buffer buffer;
  thread_local uint64_t last_call = 0;
  if (buffer.bytes() < bytes) {
    buffer = Buffer(bytes);
    last_call = 0;
  }
  if (last_call != call_id) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(buffer.as<char>(), bytes);  // another ISA's kernels may lay out the arena differently
#endif
    std::memset(buffer.as<char>(), 0, static_cast<size_t>(zeroed));
  }
  last_call = call_id;
  return buffer.as<char>();
}

// A process-wide number of the call, from 1 on.
uint64_t next_call_id() {
  static std::atomic<uint64_t> calls{0};
  return calls.fetch_add(1, std::memory_order_relaxed) + 1;
}

// Partial results of split-K tiles and the countdown of parts still to finish; sets the call's pointers to them.
class PartialResults {
 public:
  PartialResults(Call& call, const Schedule& schedule)
      : values_(schedule.partials * call.plan->tile * (call.result_dim + 2) * static_cast<int64_t>(sizeof(float))),
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

// Bytes of a contiguous (B, heads, rows, dim) tensor.
int64_t rows_bytes(const Call& call, Type type, int64_t heads, int64_t rows, int64_t dim) {
  return call.batch * heads * rows * dim * (type == Type::f32 ? 4 : 2);
}

// Initialises rows that possibly no tile writes: zeros, and an lse of -inf. Of the lines (batch item, head) from `first_line` to
// `last_line`.
void initialise_lines(const Call& call, const Schedule& schedule, bool with_lse, int threads, InterruptCheck& interrupt,
                      int64_t first_line, int64_t last_line) {
  constexpr int64_t range_rows = 4096;  // rows per parallel item
  struct RowRange {
    int64_t first, last;
  };
  std::vector<RowRange> row_ranges;
  for (const auto& [first, last] : schedule.unwritten_rows())
    for (int64_t i = first; i < last; i += range_rows) row_ranges.push_back({i, std::min(i + range_rows, last)});
  const int64_t width = call.result_dim * (call.out_type == Type::f32 ? 4 : 2);
  const auto num_ranges = static_cast<int64_t>(row_ranges.size());
  parallel_for((last_line - first_line) * num_ranges, threads, interrupt, [&](int64_t i) {
    const RowRange& rows = row_ranges[i % num_ranges];
    const int64_t at = (first_line + i / num_ranges) * call.plan->n_q + rows.first, count = rows.last - rows.first;
    std::memset(static_cast<char*>(call.result) + at * width, 0, static_cast<size_t>(count * width));
    if (with_lse) std::fill_n(call.lse + at, count, -std::numeric_limits<float>::infinity());
  });
}

void initialise_result(const Call& call, const Schedule& schedule, bool with_lse, int threads, InterruptCheck& interrupt) {
  advise_huge_pages(call.result, rows_bytes(call, call.out_type, call.heads, call.plan->n_q, call.result_dim));
  initialise_lines(call, schedule, with_lse, threads, interrupt, 0, call.batch * call.heads);
}

// The item after items[i] in the range before `end`, or null.
const WorkItem* next_item(const std::vector<WorkItem>& items, int64_t i, int64_t end) {
  return i + 1 < end ? &items[i + 1] : nullptr;
}

// Rows of the result, over batch items and heads.
int64_t rows_of(const Call& call) { return call.batch * call.heads * call.plan->n_q; }

// Zeroed softmax statistics of all rows.
Buffer zeroed_row_stats(const Call& call) {
  const int64_t bytes = rows_of(call) * static_cast<int64_t>(sizeof(RowStats));
  Buffer buffer(bytes);
  std::memset(buffer.as<char>(), 0, static_cast<size_t>(bytes));
  return buffer;
}

// The |lse| beyond which weights exp(score - lse) computed from a float32 lse are off by more than 2^-14 (float32) or 2^-10
// (bfloat16).
float largest_lse(Type type) { return type == Type::f32 ? 1024.0f : 16384.0f; }

// Whether the lse of any row exceeds that limit.
bool any_large_lse(const Call& call, int threads, InterruptCheck& interrupt) {
  constexpr int64_t range_rows = 1 << 16;
  const float limit = largest_lse(call.type);
  const int64_t rows = rows_of(call);
  std::atomic<bool> any{false};
  parallel_for((rows + range_rows - 1) / range_rows, threads, interrupt, [&](int64_t i) {
    bool large = false;
    for (int64_t at = i * range_rows; at < std::min(rows, (i + 1) * range_rows); ++at)
      large |= std::abs(call.lse[at]) > limit && std::isfinite(call.lse[at]);
    if (large) any.store(true, std::memory_order_relaxed);
  });
  return any.load();
}

// Softmax statistics of all rows, recomputed by one more forward pass without dropout, for a backward pass whose lse has too
// few digits. Where the caller's lse differs from the recomputed one beyond rounding (lse_shift: the call sees only some of a
// row's keys), the weights are relative to the caller's.
Buffer exact_row_stats(const Kernels& kernels, const Call& call, const Schedule& schedule, int threads,
                       InterruptCheck& interrupt) {
  Buffer row_stats = zeroed_row_stats(call);
  const int64_t rows = rows_of(call);
  const Buffer out(rows_bytes(call, call.type, call.heads, call.plan->n_q, call.value_dim)),
      lse(rows * static_cast<int64_t>(sizeof(float)));
  Call recompute = call;
  recompute.out_type = call.type;
  recompute.dropout.on = false;
  recompute.result = out.as<void>();
  recompute.result_dim = call.value_dim;
  recompute.lse = lse.as<float>();
  recompute.row_stats = row_stats.as<RowStats>();
  run_forward(kernels, recompute, schedule, threads, interrupt);
  for (int64_t at = 0; at < rows; ++at) {
    RowStats& row = recompute.row_stats[at];
    if (row.row_sum == 0.0f) continue;
    const float lse_shift = call.lse[at] - recompute.lse[at];
    row.row_sum = std::log(row.row_sum) + (std::abs(lse_shift) <= 0x1p-21f * std::abs(recompute.lse[at]) ? 0.0f : lse_shift);
  }
  return row_stats;
}

}  // namespace

void run_forward(const Kernels& kernels, Call call, const Schedule& schedule, int threads, InterruptCheck& interrupt) {
  const PartialResults partials(call, schedule);
  const int64_t bytes = kernels.scratch_bytes(call);
  const uint64_t call_id = next_call_id();
  if (schedule.cost * call.dim < kMinParallelWork) threads = 1;
  const auto run_items = [&](const Call& some, const std::vector<WorkItem>& items) {
    const int64_t count = static_cast<int64_t>(items.size());
    parallel_for(count, threads, interrupt, [&](int64_t i) {
      kernels.forward(some, items[i], next_item(items, i, count), scratch(bytes, kernels.zeroed_bytes, call_id));
    });
  };
  const bool needs_stats = call.merges && !call.row_stats;
  if (!call.merges || call.out_type == Type::f32) {
    const Buffer row_stats = needs_stats ? zeroed_row_stats(call) : Buffer();
    if (row_stats.bytes()) call.row_stats = row_stats.as<RowStats>();
    initialise_result(call, schedule, true, threads, interrupt);
    for (const Phase& phase : schedule.phases) run_items(call, phase.forward);
    return;
  }
  // Pieces that merge do so in float32: some lines at a time, in a buffer that is rounded to the result behind the last piece.
  const int64_t lines = call.batch * call.heads, line_size = call.plan->n_q * call.result_dim;
  const int64_t line_bytes = std::max<int64_t>(1, line_size * static_cast<int64_t>(sizeof(float)));
  const int64_t most = std::clamp<int64_t>(std::max(kMergeBytes / line_bytes, lines / kMergeParts), 1, lines);
  const int64_t together = (lines + (lines + most - 1) / most - 1) / ((lines + most - 1) / most);  // groups of about one size
  std::vector<std::vector<std::vector<WorkItem>>> items((lines + together - 1) / together,
                                                        std::vector<std::vector<WorkItem>>(schedule.phases.size()));
  for (size_t p = 0; p < schedule.phases.size(); ++p)
    for (const WorkItem& item : schedule.phases[p].forward)
      items[(item.batch * call.heads + item.head) / together][p].push_back(item);
  const int64_t stats_bytes = call.plan->n_q * static_cast<int64_t>(sizeof(RowStats));  // of a line
  const Buffer sums(together * line_bytes), row_stats(needs_stats ? together * stats_bytes : 0);
  // Kernels add the offset of a line from the first line of the call, which is therefore subtracted from a group's buffer.
  const auto shifted = [](const Buffer& group, int64_t before) {
    return reinterpret_cast<void*>(reinterpret_cast<intptr_t>(group.as<char>()) - before);
  };
  for (size_t g = 0; g < items.size(); ++g) {
    const int64_t first = static_cast<int64_t>(g) * together, count = std::min(together, lines - first);
    Call some = call;
    some.out_type = Type::f32;
    some.result = shifted(sums, first * line_bytes);
    if (needs_stats) {
      std::memset(row_stats.as<char>(), 0, static_cast<size_t>(count * stats_bytes));
      some.row_stats = static_cast<RowStats*>(shifted(row_stats, first * stats_bytes));
    }
    initialise_lines(some, schedule, true, threads, interrupt, first, first + count);
    for (const std::vector<WorkItem>& phase : items[g]) run_items(some, phase);
    constexpr int64_t rows = 256;  // of a parallel item
    const int64_t parts = (count * call.plan->n_q + rows - 1) / rows;
    parallel_for(parts, threads, interrupt, [&](int64_t i) {
      const int64_t row = i * rows, some_rows = std::min(rows, count * call.plan->n_q - row);
      kernels.round_rows(call.out_type, sums.as<float>() + row * call.result_dim, some_rows * call.result_dim, call.result,
                         first * line_size + row * call.result_dim);
    });
  }
}

namespace {

void check_heads(const ContentPattern& pattern, const Call& call) {
  if (pattern.batch != call.batch || pattern.heads != call.heads)
    throw MalformedPlan("the plan is for " + std::to_string(pattern.batch) + " batch items and " +
                        std::to_string(pattern.heads) + " heads, but q has " + std::to_string(call.batch) + " and " +
                        std::to_string(call.heads));
}

}  // namespace

void run_content_tiles(const Kernels& kernels, const Call& call, const ContentPattern& pattern, int64_t gather, int threads,
                       InterruptCheck& interrupt) {
  check_heads(pattern, call);
  constexpr int64_t max_tiles = 32, min_items = 32;  // of an item; for each thread, so that all finish at about the same time
  const int64_t lines = call.batch * call.heads, tiles = (pattern.n_q + kRows - 1) / kRows;
  if (lines * tiles * pattern.n_k * call.dim < kMinParallelWork) threads = 1;
  int64_t chunk = max_tiles;
  while (chunk > 1 && lines * ((tiles + chunk - 1) / chunk) < min_items * threads) chunk /= 2;
  PlanView sizes{};  // scratch memory depends on the sizes alone
  sizes.n_q = pattern.n_q, sizes.n_k = pattern.n_k;
  Call sized = call;
  sized.plan = &sizes;
  const int64_t parts = (tiles + chunk - 1) / chunk, bytes = kernels.scratch_bytes(sized);
  const uint64_t call_id = next_call_id();
  advise_huge_pages(call.result, rows_bytes(call, call.out_type, call.heads, pattern.n_q, call.result_dim));
  parallel_for(lines * parts, threads, interrupt, [&](int64_t i) {
    thread_local TilesInPlace planner;
    // The last tiles of a line first: under causal patterns they see the most keys, and the smallest items even out the end.
    const int64_t line = i / parts, first = (parts - 1 - i % parts) * chunk, last = std::min(first + chunk, tiles);
    const int64_t batch_item = line / call.heads, head = line % call.heads;
    Call local = call;
    local.plan = &planner.plan(pattern, gather, batch_item, head, first, last);
    WorkItem item{0, static_cast<int32_t>(batch_item), static_cast<int32_t>(head), 0};
    for (; item.entry < last - first; ++item.entry) {
      WorkItem next = item;
      ++next.entry;
      kernels.forward(local, item, next.entry < last - first ? &next : nullptr,
                      scratch(bytes, kernels.zeroed_bytes, call_id));
    }
  });
}

void run_row_visits(const Kernels& kernels, const Call& call, const ContentPattern& pattern, int threads,
                    InterruptCheck& interrupt) {
  check_heads(pattern, call);
  constexpr int64_t min_items = 8;  // for each thread, so that all finish at about the same time
  const int64_t lines = call.batch * call.heads;
  int64_t rows = kVisitRows;
  while (rows > 2 * kRows && lines * ((pattern.n_q + rows - 1) / rows) < min_items * threads) rows /= 2;
  const int64_t parts = (pattern.n_q + rows - 1) / rows, bytes = kernels.visit_scratch_bytes(call, rows);
  const uint64_t call_id = next_call_id();
  advise_huge_pages(call.result, rows_bytes(call, call.out_type, call.heads, pattern.n_q, call.result_dim));
  parallel_for(lines * parts, threads, interrupt, [&](int64_t i) {
    thread_local VisitTable table;
    const int64_t line = i / parts, first = i % parts * rows;
    RowVisits visits{line / call.heads, line % call.heads, first, std::min(rows, pattern.n_q - first),
                     pattern.n_q,       pattern.n_k,       0,     nullptr, nullptr, nullptr};
    table.fill(pattern, visits);
    kernels.forward_visits(call, visits, scratch(bytes, 0, call_id));
  });
}

void run_backward(const Kernels& kernels, Call call, const Schedule& schedule, void* dk, void* dv, int threads,
                  InterruptCheck& interrupt) {
  const Buffer row_stats =
      any_large_lse(call, threads, interrupt) ? exact_row_stats(kernels, call, schedule, threads, interrupt) : Buffer();
  if (row_stats.bytes()) call.row_stats = row_stats.as<RowStats>();
  const PartialResults partials(call, schedule);
  const int64_t bytes = kernels.scratch_bytes(call);
  const uint64_t call_id = next_call_id();
  if (schedule.cost * call.dim < kMinParallelWork) threads = 1;
  initialise_result(call, schedule, false, threads, interrupt);
  advise_huge_pages(dk, rows_bytes(call, call.type, call.kv_heads, call.plan->n_k, call.dim));
  advise_huge_pages(dv, rows_bytes(call, call.type, call.kv_heads, call.plan->n_k, call.value_dim));
  const int64_t num_slabs = schedule.groups() * schedule.slab_count;
  // With one phase and at least a group per thread, the thread that finishes a group's last slab reduces it and recycles its
  // buffers for the next group. Otherwise all threads reduce all groups at the end.
  const bool reduce_per_group = schedule.phases.size() == 1 && schedule.groups() >= threads;
  DkDvReduction sums(kernels, call, schedule, dk, dv);
  TermReduction term_sums(call, schedule);
  for (size_t p = 0; p < schedule.phases.size(); ++p) {
    const Phase& phase = schedule.phases[p];
    parallel_for(num_slabs, threads, interrupt, [&](int64_t slab_index) {
      if (p == 0) {
        sums.open_slab(slab_index);
        term_sums.open_slab(slab_index);
      }
      DkDvBlocks accumulators = sums.blocks_of(slab_index);
      accumulators.terms = term_sums.sums_of(slab_index);
      const Slab& slab = phase.slabs[slab_index];
      for (int64_t i = slab.first; i < slab.last; ++i) {
        char* buffer = scratch(bytes, kernels.zeroed_bytes, call_id);
        kernels.backward(call, phase.backward[i], next_item(phase.backward, i, slab.last), accumulators, buffer);
      }
      if (reduce_per_group && sums.finish_slab(slab_index)) {
        const int64_t group = slab_index / schedule.slab_count;
        for (int64_t block = 0; block < schedule.blocks; ++block) sums.reduce_block(group, block);
        sums.release_group(group);
      }
    });
  }
  if (!reduce_per_group)
    parallel_for(schedule.groups() * schedule.blocks, threads, interrupt,
                 [&](int64_t i) { sums.reduce_block(i / schedule.blocks, i % schedule.blocks); });
  term_sums.reduce(threads, interrupt);
}

}  // namespace farlight
