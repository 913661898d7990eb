// Choice of key blocks (choose.h). Sums are in float32 whatever the element type, in an order that does not depend on the
// number of threads.
#include "choose.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "summaries.h"

namespace farlight {

namespace {

constexpr int64_t kScoreRows = 16;  // rows scored together: each panel is read once for all of them
constexpr int64_t kRowSlots = 24;   // room for kScoreRows rounded up to whole groups of kM rows, on every ISA

// A scored block.
struct Candidate {
  float weight;
  int32_t block;
  // Order of selection: higher weight first, then the block that comes first.
  bool operator<(const Candidate& other) const {
    return weight != other.weight ? weight > other.weight : block < other.block;
  }
};

// Scratch memory of one thread.
struct Scratch {
  std::vector<float> queries, scores, weights, row, total;
  std::vector<Candidate> candidates;
};

class Chooser {
 public:
  Chooser(const Kernels& kernels, const ChoiceProblem& problem, const Summaries& summaries)
      : kernels_(kernels), p_(problem), summaries_(summaries) {
    num_lists_ = (p_.offset + p_.n_q - p_.first + p_.query_block - 1) / p_.query_block;
    ld_ = summaries.padded() + 16;  // not a power of two: rows would share their cache sets
  }

  // Query blocks of one item: pooled rows are those of one query block, representatives are scored kScoreRows at a time.
  int64_t lists_per_item() const { return p_.score == BlockScore::kSoftmax ? 1 : kScoreRows; }
  int64_t items() const { return (num_lists_ + lists_per_item() - 1) / lists_per_item(); }

  // Chooses for item `item` of batch item b and choosing head h (a key head where the choice is shared).
  void run(int64_t b, int64_t h, int64_t item, ChosenLists::Part& to) const {
    thread_local Scratch s;
    s.row.resize(p_.dim);
    s.queries.resize(kScoreRows * summaries_.dim());
    s.scores.resize(kRowSlots * ld_);
    s.weights.resize(ld_);
    if (p_.score == BlockScore::kSoftmax) pooled(s, b, h, item, to);
    else representatives(s, b, h, item * kScoreRows, to);
  }

 private:
  int64_t group() const { return p_.heads / p_.kv_heads; }
  int64_t first_head(int64_t h) const { return p_.shared ? h * group() : h; }
  int64_t kv_head(int64_t h) const { return p_.shared ? h : h / group(); }
  int64_t choosing_heads() const { return p_.shared ? group() : 1; }
  bool real(int64_t b, int64_t row) const {
    return !p_.query_mask || p_.query_mask[(p_.mask_batch > 1 ? b * p_.n_q : 0) + row];
  }
  // Position of the first query of a query block, and its rows.
  int64_t start(int64_t u) const { return p_.first + u * p_.query_block; }
  int64_t first_row(int64_t u) const { return std::max<int64_t>(0, start(u) - p_.offset); }
  int64_t last_row(int64_t u) const { return std::min(p_.n_q, start(u) + p_.query_block - p_.offset); }
  // Blocks that are scored: causal, those that end before the query block begins.
  int64_t scored(int64_t u) const {
    return p_.causal ? std::clamp<int64_t>(start(u) / p_.block, 0, summaries_.blocks()) : summaries_.blocks();
  }

  // score = softmax: the sum over real rows (and the heads that share the choice) of their softmax over the scored blocks.
  void pooled(Scratch& s, int64_t b, int64_t h, int64_t u, ChosenLists::Part& to_lists) const {
    const int64_t width = scored(u), padded = (width + kPanel - 1) / kPanel * kPanel;
    s.total.assign(padded, 0.0f);
    int64_t rows_seen = 0;
    for (int64_t head = first_head(h); head < first_head(h) + choosing_heads(); ++head) {
      const float* row[kRowSlots];
      int64_t count = 0;
      const auto flush = [&] {
        if (width && count) {
          for (int64_t r = count; r < kRowSlots; ++r) row[r] = row[0];
          kernels_.block_scores(row, count, summaries_.panels_of(p_, b, kv_head(h)), padded / kPanel, summaries_.dim(),
                                s.scores.data(), ld_);
          kernels_.pool_softmax(s.scores.data(), count, ld_, width, p_.scale * kLog2e, log_sizes(b), s.weights.data());
          for (int64_t c = 0; c < width; ++c) s.total[c] += s.weights[c];
        }
        count = 0;
      };
      for (int64_t r = first_row(u); r < last_row(u); ++r) {
        if (!real(b, r)) continue;
        float* to = s.queries.data() + count * summaries_.dim();
        read_row(p_.type, p_.q, b, head, r, p_.dim, to);
        row[count] = to;
        ++rows_seen;
        if (++count == kScoreRows) flush();
      }
      flush();
    }
    select(s, b, u, rows_seen > 0, s.total.data(), to_lists);
  }

  // score = mean or minmax: one vector for each of the query blocks u0, ..., u0 + kScoreRows - 1.
  void representatives(Scratch& s, int64_t b, int64_t h, int64_t u0, ChosenLists::Part& to_lists) const {
    const int64_t count = std::min(kScoreRows, num_lists_ - u0);
    int64_t width = 0;
    for (int64_t u = u0; u < u0 + count; ++u) width = std::max(width, scored(u));
    const int64_t padded = (width + kPanel - 1) / kPanel * kPanel;
    s.total.assign(choosing_heads() > 1 ? kScoreRows * ld_ : 0, 0.0f);
    bool has_query[kScoreRows] = {};
    for (int64_t head = first_head(h); head < first_head(h) + choosing_heads(); ++head) {
      const float* row[kRowSlots];
      for (int64_t r = 0; r < kRowSlots; ++r) {
        float* to = s.queries.data() + (r < count ? r : 0) * summaries_.dim();
        if (r < count) has_query[r] = represent(s, b, head, u0 + r, to);
        row[r] = to;
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
        kernels_.pool_softmax(weights, 1, ld_, scored(u0 + r), p_.scale * kLog2e, log_sizes_always(b), s.weights.data());
        weights = s.weights.data();
      }
      select(s, b, u0 + r, has_query[r], weights, to_lists);
    }
  }

  // The vector of a query block: causal, its first real query; else the mean of its real queries. False without a real query.
  bool represent(Scratch& s, int64_t b, int64_t head, int64_t u, float* to) const {
    const bool bounds = p_.score == BlockScore::kMinMax;
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
    return rows > 0;
  }

  // Null where every scored block is full: their equal log sizes cancel in the softmax.
  const float* log_sizes(int64_t b) const { return p_.causal && !p_.key_mask ? nullptr : log_sizes_always(b); }
  const float* log_sizes_always(int64_t b) const { return summaries_.log_sizes(p_, b); }

  // Selects the blocks of query block u from the weights of the scored blocks, and adds those that overlap it (causal).
  void select(Scratch& s, int64_t b, int64_t u, bool has_query, const float* weights, ChosenLists::Part& to) const {
    const auto first = static_cast<std::ptrdiff_t>(to.blocks.size());
    if (has_query) append_chosen(s, b, u, weights, to.blocks);
    std::sort(to.blocks.begin() + first, to.blocks.end());
    to.counts.push_back(static_cast<int32_t>(static_cast<std::ptrdiff_t>(to.blocks.size()) - first));
  }

  void append_chosen(Scratch& s, int64_t b, int64_t u, const float* weights, std::vector<int32_t>& chosen) const {
    const int32_t* sizes = summaries_.sizes(p_, b);
    const int64_t width = scored(u);
    int64_t visible = width;
    if (p_.key_mask) visible = std::count_if(sizes, sizes + width, [](int32_t size) { return size > 0; });
    // Overlapping blocks are counted by position, whether or not the text has reached them.
    int64_t forced = 0;
    const int64_t last = start(u) + p_.query_block - 1;
    if (p_.causal) forced = std::max<int64_t>(last, 0) / p_.block - std::max<int64_t>(start(u), 0) / p_.block + 1;
    int64_t wanted = static_cast<int64_t>(p_.amount);
    // Rounding may lift a whole product just above its integer; 1e-9 keeps ceil from counting one more.
    if (p_.budget == BudgetKind::kShare) wanted = static_cast<int64_t>(std::ceil(static_cast<double>(visible + forced) * p_.amount - 1e-9));
    if (p_.budget == BudgetKind::kMass) take_mass(s, sizes, width, weights);
    else take(s, sizes, width, std::clamp<int64_t>(wanted - forced, 0, visible), weights);
    for (const Candidate& c : s.candidates) chosen.push_back(c.block);
    if (p_.causal && last >= 0)
      for (int64_t c = width; c <= last / p_.block && c < summaries_.blocks(); ++c)
        if (sizes[c] > 0) chosen.push_back(static_cast<int32_t>(c));
  }

  // The `count` best of the scored blocks. Candidates above the count-th best so far are collected, and reduced to the best
  // `count` whenever they are twice as many.
  static void take(Scratch& s, const int32_t* sizes, int64_t width, int64_t count, const float* weights) {
    auto& best = s.candidates;
    best.clear();
    if (!count) return;
    float threshold = -std::numeric_limits<float>::infinity();
    bool full = false;
    const auto reduce = [&] {
      std::nth_element(best.begin(), best.begin() + (count - 1), best.end());
      best.resize(count);
      threshold = best.back().weight;
      full = true;
    };
    for (int64_t c = 0; c < width; ++c) {
      if ((full && !(weights[c] > threshold)) || !sizes[c]) continue;
      best.push_back({weights[c] == weights[c] ? weights[c] : -std::numeric_limits<float>::infinity(), static_cast<int32_t>(c)});
      if (static_cast<int64_t>(best.size()) == 2 * count + 64) reduce();
    }
    if (static_cast<int64_t>(best.size()) > count) reduce();
  }

  // The fewest of the scored blocks, best first, whose weights reach the share `mass` of all weights.
  void take_mass(Scratch& s, const int32_t* sizes, int64_t width, const float* weights) const {
    take(s, sizes, width, width, weights);
    std::sort(s.candidates.begin(), s.candidates.end());
    double total = 0.0, before = 0.0;
    for (const Candidate& c : s.candidates) total += c.weight;
    size_t count = 0;
    for (; count < s.candidates.size() && before < p_.amount * total; ++count) before += s.candidates[count].weight;
    s.candidates.resize(count);
  }

  static constexpr float kLog2e = 1.44269504f;
  const Kernels& kernels_;
  const ChoiceProblem& p_;
  const Summaries& summaries_;
  int64_t num_lists_, ld_;
};

}  // namespace

void ChosenLists::copy_to(int64_t* indices) const {
  for (const Part& part : parts) {
    const int32_t* block = part.blocks.data();
    for (const int32_t count : part.counts) {
      std::copy(block, block + count, indices);
      std::fill(indices + count, indices + width, -1);
      block += count;
      indices += width;
    }
  }
}

ChosenLists choose_blocks(const Kernels& kernels, const ChoiceProblem& problem, int threads, InterruptCheck& interrupt) {
  const Summaries summaries(problem, threads, interrupt);
  const Chooser chooser(kernels, problem, summaries);
  const int64_t heads = problem.shared ? problem.kv_heads : problem.heads, items = chooser.items();
  ChosenLists lists;
  lists.parts.resize(problem.batch * heads * items);
  parallel_for(problem.batch * heads * items, threads, interrupt,
               [&](int64_t i) { chooser.run(i / items / heads, i / items % heads, i % items, lists.parts[i]); });
  for (const ChosenLists::Part& part : lists.parts)
    for (const int32_t count : part.counts) lists.width = std::max<int64_t>(lists.width, count);
  return lists;
}

}  // namespace farlight
