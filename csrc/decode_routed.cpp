// Decoder::attend_routed: scores of block summaries, selection and attention in one call.
#include <cmath>
#include <cstring>

#include "decoder.h"
#include "dispatch.h"
#include "parallel.h"

namespace farlight {

namespace {

constexpr int64_t kScoredBlocks = 256;  // summaries that stay in L2 while the heads of a group are scored

// The runs of the nonzero bytes.
Runs runs_of(const std::vector<uint8_t>& bytes) {
  Runs out;
  const int64_t n = static_cast<int64_t>(bytes.size());
  for (int64_t s = 0; s < n;) {
    const uint8_t value = out.size() % 2;  // inside a run its end is searched
    const void* next = std::memchr(bytes.data() + s, 1 - value, static_cast<size_t>(n - s));
    if (!next) break;
    s = static_cast<const uint8_t*>(next) - bytes.data();
    out.push_back(s);
  }
  if (out.size() % 2) out.push_back(n);
  return out;
}

}  // namespace

// Memory of one call, reused by the thread.
struct Decoder::Routed {
  std::vector<float> queries, scores;
  std::vector<Runs> patterns;               // (programs, n_q)
  std::vector<std::vector<int32_t>> lists;  // (B, H, n_q)
  std::vector<uint8_t> bytes, stack;
  DecodeSchedule schedule;
};

// Scores and selects for the query heads of one key head: fills lists of slots. False where a score is not finite.
bool Decoder::choose(const DecodeQueries& queries, int64_t b, int64_t kv_head, Routed& routed, float* scores) const {
  const DecodeKernels& kernels = *farlight::kernels().decode;
  const int64_t group = queries.heads / kv_heads_, n_q = queries.n_q, rows = group * n_q, head = b * kv_heads_ + kv_head;
  const int64_t first_row = (b * queries.heads + kv_head * group) * n_q;
  std::vector<std::vector<Runs>> stacks(rows);
  std::vector<int32_t> selected;
  for (const RouterNode& node : nodes_) {
    if (node.kind == RouterNode::kPattern) {
      for (int64_t r = 0; r < rows; ++r) stacks[r].push_back(routed.patterns[node.index * n_q + r % n_q]);
    } else if (node.kind == RouterNode::kOperator) {
      for (std::vector<Runs>& stack : stacks) {
        const Runs right = std::move(stack.back());
        stack.pop_back();
        stack.back() = combine_runs(stack.back(), right, node.index);
      }
    } else {
      const BlockRule& rule = rules_[node.index];
      const int64_t most = (queries.first + n_q - 1) / rule.block;
      const bool by_codes = rule.selects_by_codes(most);
      const auto q_row = [&](int64_t r) { return routed.queries.data() + (first_row + r) * dim_; };
      for (int64_t at = 0; at < most; at += kScoredBlocks)
        for (int64_t r = 0; r < rows; ++r) {
          const auto score = by_codes ? &BlockRule::code_scores : &BlockRule::scores;
          (rule.*score)(kernels, q_row(r), head, dim_, at, std::min(kScoredBlocks, most - at), scores + r * most + at);
        }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = queries.first + r % n_q, count = i / rule.block;
        int32_t not_finite = 0;
        for (int64_t c = 0; c < count; ++c) not_finite |= scores[r * most + c] * 0.0f != 0.0f;
        if (not_finite) return false;
        if (!by_codes) rule.select(scores + r * most, count, selected);
        else if (!rule.select_by_codes(kernels, q_row(r), head, dim_, scores + r * most, count, selected)) return false;
        Runs runs;
        for (const int32_t c : selected) append_run(runs, c * rule.block, (c + 1) * rule.block);
        append_run(runs, count * rule.block, i + 1);
        stacks[r].push_back(std::move(runs));
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<int32_t>& list = routed.lists[first_row + r];
    const Runs& runs = stacks[r].back();
    list.clear();
    for (size_t e = 0; e < runs.size(); e += 2)
      for (int64_t s = runs[e]; s < runs[e + 1]; ++s) list.push_back(static_cast<int32_t>(s));
  }
  return true;
}

bool Decoder::attend_routed(const DecodeQueries& queries) const {
  thread_local Routed routed;
  const DecodeKernels& kernels = *farlight::kernels().decode;
  const DecodeStore& store = stores_[0];
  const int64_t heads = queries.heads, n_q = queries.n_q, count = store.count(0), rows = batch_ * heads * n_q;
  if (nodes_.empty() || queries.first + n_q != count) return false;
  // Blocks are chosen by unscaled scores.
  routed.queries.resize(rows * dim_);
  float* to = routed.queries.data();
  for (int64_t b = 0; b < batch_; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < n_q; ++i, to += dim_) kernels.widen(queries.q.type, queries.q.row(b, h, i), dim_, 1.0f, to);
  routed.bytes.resize(count);
  routed.patterns.clear();
  for (const RouterPattern& pattern : patterns_)
    for (int64_t i = 0; i < n_q; ++i) {
      const VisibilityProgram program{pattern.code.data(), static_cast<int64_t>(pattern.code.size()), pattern.depth};
      routed.stack.resize(std::max<size_t>(routed.stack.size(), pattern.depth * count));
      kernels.visible(program, nullptr, count, queries.first + i, routed.bytes.data(), routed.stack.data());
      routed.patterns.push_back(runs_of(routed.bytes));
    }
  int64_t most = 1;
  for (const BlockRule& rule : rules_) most = std::max(most, count / rule.block + 1);
  const int64_t items = batch_ * kv_heads_, width = heads / kv_heads_ * n_q * most;
  routed.scores.resize(items * width);
  routed.lists.resize(std::max<size_t>(routed.lists.size(), rows));
  std::atomic<bool> finite{true};
  InterruptCheck no_interrupt(nullptr);
  Routed& shared = routed;  // the thread's own object, which the other threads fill
  parallel_for(items, items * width * dim_ < (1 << 14) ? 1 : queries.threads, no_interrupt, [&](int64_t item) {
    if (!choose(queries, item / kv_heads_, item % kv_heads_, shared, shared.scores.data() + item * width)) finite = false;
  });
  if (!finite) return false;
  DecodeSchedule& schedule = routed.schedule;
  schedule.clear();
  for (int64_t b = 0; b < batch_; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < n_q; ++i) {
        const int64_t row = (b * heads + h) * n_q + i;
        const std::vector<int32_t>& list = routed.lists[row];
        schedule.units.push_back({store.pages.data(), store.page_shift, type_, b * kv_heads_ + h / (heads / kv_heads_), row, 1,
                                  list.data(), 0, static_cast<int64_t>(list.size()), -1, nullptr});
      }
  schedule.factor = static_cast<float>(static_cast<double>(queries.scale) * 1.44269504088896340736);
  schedule.queries.swap(routed.queries);
  set_terms(queries, schedule);
  schedule.run(kernels, dim_, {queries.q.type, queries.out, queries.lse}, queries.threads);
  return true;
}

// Whether every table has capacity for the summary of a block that ends with the token at `position`.
bool Decoder::has_capacity_for_summaries(int64_t position) const {
  for (const BlockRule& rule : rules_)
    if ((position + 1) % rule.block == 0 && (position + 1) / rule.block > rule.capacity) return false;
  return true;
}

void Decoder::summarize(int64_t position) const {
  const DecodeKernels& kernels = *farlight::kernels().decode;
  for (const BlockRule& rule : rules_)
    for (int64_t head = 0; (position + 1) % rule.block == 0 && head < batch_ * kv_heads_; ++head)
      rule.summarize(kernels, stores_[0].pages.data(), stores_[0].page_shift, type_, head, dim_, position / rule.block);
}

}  // namespace farlight
