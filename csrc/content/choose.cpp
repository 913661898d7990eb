// Choice of key blocks (choose.h). Sums are in float32 whatever the element type, in an order that does not depend on the
// number of threads.
#include "choose.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "choose_until.h"
#include "query_blocks.h"

namespace farlight {

namespace {

// Scratch memory of one thread.
struct Scratch {
  std::vector<float> queries, scores, weights, row, total;
  std::vector<Candidate> candidates;
  std::vector<int32_t> keys, chosen;
};

class Chooser : public QueryBlocks {
 public:
  Chooser(const Kernels& kernels, const ChoiceProblem& problem, const Summaries& summaries)
      : QueryBlocks(problem, summaries), kernels_(kernels) {}

  // Query blocks of one item: pooled rows are those of one query block, representatives are scored kScoreRows at a time.
  int64_t lists_per_item() const { return p_.score == BlockScore::kSoftmax ? 1 : kScoreRows; }
  int64_t items() const { return (num_lists_ + lists_per_item() - 1) / lists_per_item(); }

  // Chooses for item `item` of batch item b and choosing head h (a key head where the choice is shared).
  void run(int64_t b, int64_t h, int64_t item, Lists& to) const {
    thread_local Scratch s;
    s.row.resize(p_.dim);
    s.queries.resize(kScoreRows * summaries_.dim());
    s.scores.resize(kRowSlots * ld_);
    s.weights.resize(ld_);
    const int64_t first = item * lists_per_item(), last = std::min(first + lists_per_item(), num_lists_);
    to.counts.reserve(last - first);
    if (p_.budget != BudgetKind::kMass)
      to.blocks.reserve((last - first) * (wanted(b, last - 1) + end_of_forced(last - 1) - scored(last - 1)));
    if (p_.score == BlockScore::kSoftmax) pooled(s, b, h, item, to);
    else representatives(s, b, h, item * kScoreRows, to);
  }

 private:
  // score = softmax: the sum over real rows (and the heads that share the choice) of their softmax over the scored blocks.
  void pooled(Scratch& s, int64_t b, int64_t h, int64_t u, Lists& to_lists) const {
    const int64_t width = scored(u), padded = (width + kPanel - 1) / kPanel * kPanel;
    s.total.assign(padded, 0.0f);
    int64_t rows_seen = 0;
    const bool scores = !takes_all(b, u);
    for (int64_t head = first_head(h); head < first_head(h) + choosing_heads(); ++head) {
      const float* row[kRowSlots];
      int64_t count = 0;
      const auto flush = [&] {
        if (width && count) {
          for (int64_t r = count; r < kRowSlots; ++r) row[r] = row[0];
          kernels_.block_scores(row, count, summaries_.panels_of(p_, b, kv_head(h)), padded / kPanel, summaries_.dim(),
                                s.scores.data(), ld_);
          kernels_.pool_softmax(s.scores.data(), count, ld_, width, p_.scale * kLog2e, log_sizes(b), s.weights.data(),
                                nullptr);
          for (int64_t c = 0; c < width; ++c) s.total[c] += s.weights[c];
        }
        count = 0;
      };
      for (int64_t r = first_row(u); r < last_row(u); ++r) {
        if (!real(b, r)) continue;
        ++rows_seen;
        if (!scores) continue;
        float* to = s.queries.data() + count * summaries_.dim();
        read_row(p_.type, p_.q, b, head, r, p_.dim, to);
        row[count] = to;
        if (++count == kScoreRows) flush();
      }
      flush();
    }
    select(s, b, u, rows_seen > 0, s.total.data(), to_lists);
  }

  // score = mean or minmax: one vector for each of the query blocks u0, ..., u0 + kScoreRows - 1.
  void representatives(Scratch& s, int64_t b, int64_t h, int64_t u0, Lists& to_lists) const {
    const int64_t count = std::min(kScoreRows, num_lists_ - u0);
    int64_t width = 0;  // 0 where nothing has to be scored
    for (int64_t u = u0; u < u0 + count; ++u)
      if (!takes_all(b, u)) width = std::max(width, scored(u));
    const int64_t padded = (width + kPanel - 1) / kPanel * kPanel;
    s.total.assign(choosing_heads() > 1 ? kScoreRows * ld_ : 0, 0.0f);
    bool has_query[kScoreRows] = {};
    for (int64_t head = first_head(h); head < first_head(h) + choosing_heads(); ++head) {
      const float* row[kRowSlots];
      for (int64_t r = 0; r < kRowSlots; ++r) {
        row[r] = r < count ? represent(s, b, head, u0 + r, s.queries.data() + r * summaries_.dim()) : nullptr;
        if (r < count) has_query[r] = row[r] != nullptr;
        if (!row[r]) row[r] = s.queries.data();
      }
      if (!width) continue;
      kernels_.block_scores(row, count, summaries_.panels_of(p_, b, kv_head(h)), padded / kPanel, summaries_.dim(),
                            s.scores.data(), ld_);
      for (size_t i = 0; i < s.total.size(); ++i) s.total[i] += s.scores[i];
    }
    float* scores = s.total.empty() ? s.scores.data() : s.total.data();
    for (int64_t r = 0; r < count; ++r) {
      float* weights = scores + r * ld_;
      if (p_.budget == BudgetKind::kMass && scored(u0 + r)) {
        kernels_.pool_softmax(weights, 1, ld_, scored(u0 + r), p_.scale * kLog2e, log_sizes_always(b), s.weights.data(),
                              nullptr);
        weights = s.weights.data();
      }
      select(s, b, u0 + r, has_query[r], weights, to_lists);
    }
  }

  // The vector of a query block: causal, its first real query; else the mean of its real queries. It is formed in `to` unless it
  // stands in q itself. Null without a real query.
  const float* represent(Scratch& s, int64_t b, int64_t head, int64_t u, float* to) const {
    const bool bounds = p_.score == BlockScore::kMinMax;
    if (p_.type == Type::f32 && !bounds && (p_.causal || p_.query_block == 1)) {
      for (int64_t r = first_row(u); r < last_row(u); ++r)
        if (real(b, r)) return static_cast<const float*>(p_.q.data) + b * p_.q.batch + head * p_.q.head + r * p_.q.row;
      return nullptr;
    }
    int64_t rows = 0;
    std::fill_n(to, p_.dim, 0.0f);
    for (int64_t r = first_row(u); r < last_row(u) && !(p_.causal && rows); ++r) {
      if (!real(b, r)) continue;
      read_row(p_.type, p_.q, b, head, r, p_.dim, s.row.data());
      for (int64_t d = 0; d < p_.dim; ++d) to[d] += s.row[d];
      ++rows;
    }
    const float inverse = rows ? 1.0f / static_cast<float>(rows) : 0.0f;
    for (int64_t d = 0; d < p_.dim; ++d) {
      const float x = to[d] * inverse;
      to[d] = bounds ? std::max(x, 0.0f) : x;
      if (bounds) to[p_.dim + d] = std::min(x, 0.0f);
    }
    return rows ? to : nullptr;
  }

  // Null where every scored block is full: their equal log sizes cancel in the softmax.
  const float* log_sizes(int64_t b) const { return p_.causal && !p_.key_mask ? nullptr : log_sizes_always(b); }
  const float* log_sizes_always(int64_t b) const { return summaries_.log_sizes(p_, b); }

  // Selects the blocks of query block u from the weights of the scored blocks.
  void select(Scratch& s, int64_t b, int64_t u, bool has_query, const float* weights, Lists& to) const {
    s.chosen.clear();
    if (has_query) {
      if (p_.budget == BudgetKind::kMass) take_mass(s, b, scored(u), weights);
      else take(s, b, scored(u), wanted(b, u), takes_all(b, u), weights);
    }
    append_list(b, u, has_query, s.chosen.data(), static_cast<int64_t>(s.chosen.size()), to);
  }

  // Scored blocks with a real key.
  int64_t visible(int64_t b, int64_t u) const {
    const int32_t* sizes = summaries_.sizes(p_, b);
    return p_.key_mask ? std::count_if(sizes, sizes + scored(u), [](int32_t size) { return size > 0; }) : scored(u);
  }

  // How many of them a count or a share selects.
  int64_t wanted(int64_t b, int64_t u) const {
    // Overlapping blocks are counted by position, whether or not the text has reached them.
    int64_t forced = 0;
    const int64_t last = start(u) + p_.query_block - 1;
    if (p_.causal) forced = std::max<int64_t>(last, 0) / p_.block - std::max<int64_t>(start(u), 0) / p_.block + 1;
    auto blocks = static_cast<int64_t>(p_.budget_value);
    // Rounding may lift a whole product just above its integer; 1e-9 keeps ceil from counting one more.
    if (p_.budget == BudgetKind::kShare)
      blocks = static_cast<int64_t>(std::ceil(static_cast<double>(visible(b, u) + forced) * p_.budget_value - 1e-9));
    return std::clamp<int64_t>(blocks - forced, 0, visible(b, u));
  }

  // Whether every scored block is chosen, whatever its score.
  bool takes_all(int64_t b, int64_t u) const { return p_.budget != BudgetKind::kMass && wanted(b, u) == visible(b, u); }

  // The `count` best of the scored blocks; is_all: they are all that are visible.
  void take(Scratch& s, int64_t b, int64_t width, int64_t count, bool is_all, const float* weights) const {
    if (!count) return;
    const int32_t* sizes = p_.key_mask ? summaries_.sizes(p_, b) : nullptr;
    if (is_all) {
      for (int64_t c = 0; c < width; ++c)
        if (!sizes || sizes[c]) s.chosen.push_back(static_cast<int32_t>(c));
      return;
    }
    s.keys.resize(ld_);
    s.chosen.resize(count);
    kernels_.select_largest(weights, sizes, width, count, s.keys.data(), s.chosen.data());
  }

  // The fewest of the scored blocks, best first, whose weights reach the share `mass` of all weights.
  void take_mass(Scratch& s, int64_t b, int64_t width, const float* weights) const {
    const int32_t* sizes = summaries_.sizes(p_, b);
    s.candidates.clear();
    for (int64_t c = 0; c < width; ++c)
      if (sizes[c]) s.candidates.push_back({weights[c], static_cast<int32_t>(c)});
    std::sort(s.candidates.begin(), s.candidates.end());
    double total = 0.0, before = 0.0;
    // NaN, which comes last, has no share.
    for (const Candidate& c : s.candidates) total += c.weight == c.weight ? c.weight : 0.0f;
    size_t count = 0;
    for (; count < s.candidates.size() && before < p_.budget_value * total; ++count) before += s.candidates[count].weight;
    blocks_of(s.candidates.data(), static_cast<int64_t>(count), s.chosen);
  }

  const Kernels& kernels_;
};

}  // namespace

namespace {

// Writes consecutive lists to a table, from list `first` on.
template <class Index>
void write_lists(const Lists& lists, const ListTable& table, int64_t first) {
  const int32_t* block = lists.blocks.data();
  Index* to = static_cast<Index*>(table.data) + first * table.width;
  for (const int32_t count : lists.counts) {
    for (int32_t x = 0; x < count; ++x) to[x] = static_cast<Index>(block[x]);
    std::fill(to + count, to + table.width, Index{-1});
    block += count;
    to += table.width;
  }
}

void write(const Lists& lists, const ListTable& table, int64_t first) {
  if (table.bytes == 2) write_lists<int16_t>(lists, table, first);
  else if (table.bytes == 4) write_lists<int32_t>(lists, table, first);
  else write_lists<int64_t>(lists, table, first);
}

// Calls take(first list, lists) for items of consecutive query blocks, in parallel; the lists are those of one thread, its next
// item overwrites them.
template <class AnyChooser, class Take>
void for_lists(const AnyChooser& chooser, const ChoiceProblem& problem, int threads, InterruptCheck& interrupt,
               const Take& take) {
  const int64_t heads = problem.shared ? problem.kv_heads : problem.heads, items = chooser.items();
  parallel_for(problem.batch * heads * items, threads, interrupt, [&](int64_t i) {
    thread_local Lists lists;
    lists.clear();
    chooser.run(i / items / heads, i / items % heads, i % items, lists);
    take(i / items * chooser.lists() + i % items * chooser.lists_per_item(), i, lists);
  });
}

// Calls choose(chooser) with the chooser of the budget.
template <class Choose>
void with_chooser(const Kernels& kernels, const ChoiceProblem& problem, int threads, InterruptCheck& interrupt,
                  const Choose& choose) {
  const Summaries summaries(problem, threads, interrupt);
  if (problem.budget == BudgetKind::kLost) choose(UntilProven(kernels, problem, summaries));
  else choose(Chooser(kernels, problem, summaries));
}

int64_t num_items(const ChoiceProblem& problem, int64_t items) {
  return problem.batch * (problem.shared ? problem.kv_heads : problem.heads) * items;
}

}  // namespace

void ChosenLists::copy_to(const ListTable& table, int threads) const {
  std::vector<int64_t> first;  // list of each part
  int64_t lists = 0;
  for (const Lists& part : parts) {
    first.push_back(lists);
    lists += static_cast<int64_t>(part.counts.size());
  }
  advise_huge_pages(table.data, lists * table.width * table.bytes);
  InterruptCheck no_interrupt(nullptr);
  parallel_for(static_cast<int64_t>(parts.size()), threads, no_interrupt,
               [&](int64_t i) { write(parts[i], table, first[i]); });
}

ChosenLists choose_blocks(const Kernels& kernels, const ChoiceProblem& problem, int threads, InterruptCheck& interrupt) {
  ChosenLists chosen;
  with_chooser(kernels, problem, threads, interrupt, [&](const auto& chooser) {
    chosen.parts.resize(num_items(problem, chooser.items()));
    for_lists(chooser, problem, threads, interrupt, [&](int64_t, int64_t item, const Lists& lists) { chosen.parts[item] = lists; });
  });
  for (const Lists& part : chosen.parts)
    for (const int32_t count : part.counts) chosen.width = std::max<int64_t>(chosen.width, count);
  return chosen;
}

void choose_blocks(const Kernels& kernels, const ChoiceProblem& problem, const ListTable& table, int threads,
                   InterruptCheck& interrupt) {
  with_chooser(kernels, problem, threads, interrupt, [&](const auto& chooser) {
    advise_huge_pages(table.data, num_items(problem, chooser.lists()) * table.width * table.bytes);
    for_lists(chooser, problem, threads, interrupt, [&](int64_t first, int64_t, const Lists& lists) {
      for (const int32_t count : lists.counts)
        if (count > table.width) throw std::length_error("a list is longer than its table is wide");
      write(lists, table, first);
    });
  });
}

}  // namespace farlight
