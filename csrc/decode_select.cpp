// Choosing blocks of keys while decoding (decode_select.h).
#include "decode_select.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace farlight {

void BlockRule::summarize(const DecodeKernels& kernels, const KeyPage* pages, int32_t page_shift, KeyType type, int64_t head,
                          int64_t dim, int64_t index) const {
  const int64_t size = dim * (type == KeyType::f32 ? 4 : type == KeyType::i8 ? 1 : 2), at = (head * capacity + index) * dim;
  float row[kMaxDim], low[kMaxDim], high[kMaxDim], sum[kMaxDim];
  std::fill(sum, sum + dim, 0.0f);
  std::fill(low, low + dim, std::numeric_limits<float>::infinity());
  std::fill(high, high + dim, -std::numeric_limits<float>::infinity());
  for (int64_t s = index * block; s < (index + 1) * block; ++s) {
    const KeyPage& page = pages[s >> page_shift];
    const int64_t place = head * page.capacity + (s & ((int64_t{1} << page_shift) - 1));
    kernels.widen(type, page.k + place * size, dim, page.k_scale ? page.k_scale[place] : 1.0f, row);
    for (int64_t d = 0; d < dim; ++d) {
      sum[d] += row[d];
      low[d] = row[d] < low[d] ? row[d] : low[d];
      high[d] = row[d] > high[d] ? row[d] : high[d];
    }
  }
  for (int64_t d = 0; d < dim; ++d) {
    if (mean) mean[at + d] = sum[d] / static_cast<float>(block);
    else lower[at + d] = low[d], upper[at + d] = high[d];
  }
}

void BlockRule::scores(const DecodeKernels& kernels, const float* q, int64_t head, int64_t dim, int64_t first, int64_t count,
                       float* to) const {
  const int64_t at = (head * capacity + first) * dim;
  if (mean) return kernels.dots(q, mean + at, count, dim, to);
  float positive[kMaxDim], negative[kMaxDim];
  for (int64_t d = 0; d < dim; ++d) positive[d] = std::max(q[d], 0.0f), negative[d] = std::min(q[d], 0.0f);
  thread_local std::vector<float> low;
  low.resize(count);
  kernels.dots(positive, upper + at, count, dim, to);
  kernels.dots(negative, lower + at, count, dim, low.data());
  for (int64_t c = 0; c < count; ++c) to[c] += low[c];
}

namespace {

struct Scored {
  float score;
  int32_t block;
};
// Descending scores; the earlier block first where they are equal.
bool precedes(const Scored& a, const Scored& b) { return a.score > b.score || (a.score == b.score && a.block < b.block); }

// The `most` best of `count` scores, in no order: a buffer of candidates above the best threshold known so far.
void best(const float* scores, int64_t count, int64_t most, std::vector<Scored>& candidates) {
  constexpr int64_t kStride = 32;
  candidates.clear();
  const auto keep_best = [&] {
    std::nth_element(candidates.begin(), candidates.begin() + (most - 1), candidates.end(), precedes);
    candidates.resize(most);
    return candidates.back().score;
  };
  const int64_t most_candidates = 2 * most + 64;
  float threshold = -std::numeric_limits<float>::infinity();
  for (int64_t first = 0; first < count; first += kStride) {
    const int64_t end = std::min(count, first + kStride);
    float largest = scores[first];
    for (int64_t c = first; c < end; ++c) largest = scores[c] > largest ? scores[c] : largest;
    if (largest <= threshold) continue;
    for (int64_t c = first; c < end; ++c)
      if (scores[c] > threshold) candidates.push_back({scores[c], static_cast<int32_t>(c)});
    if (static_cast<int64_t>(candidates.size()) >= most_candidates) threshold = keep_best();
  }
  if (static_cast<int64_t>(candidates.size()) > most) keep_best();
}

}  // namespace

void BlockRule::select(const float* scores, int64_t count, std::vector<int32_t>& selected) const {
  thread_local std::vector<Scored> candidates;
  selected.clear();
  int64_t most;
  if (budget == BlockBudget::mass) {
    candidates.clear();
    for (int64_t c = 0; c < count; ++c) candidates.push_back({scores[c] * scale, static_cast<int32_t>(c)});
    std::sort(candidates.begin(), candidates.end(), precedes);
    double total = 0.0, before = 0.0;
    for (const Scored& x : candidates) total += std::exp(x.score - candidates[0].score);
    most = 0;
    for (; most < count && before < limit * total; ++most) before += std::exp(candidates[most].score - candidates[0].score);
    candidates.resize(most);
  } else {
    // The block of the query itself is selected whatever the budget, which counts it.
    const double wanted = budget == BlockBudget::count ? limit : std::ceil(static_cast<double>(count + 1) * limit - 1e-9);
    most = std::clamp<int64_t>(static_cast<int64_t>(std::min(wanted, 1e15)) - 1, 0, count);
    if (most == 0) return;
    if (most == count) {
      for (int64_t c = 0; c < count; ++c) selected.push_back(static_cast<int32_t>(c));
      return;
    }
    best(scores, count, most, candidates);
  }
  for (const Scored& x : candidates) selected.push_back(x.block);
  std::sort(selected.begin(), selected.end());
}

void append_run(Runs& runs, int64_t lo, int64_t hi) {
  if (lo >= hi) return;
  if (!runs.empty() && runs.back() >= lo) runs.back() = std::max(runs.back(), hi);
  else runs.push_back(lo), runs.push_back(hi);
}

Runs combine_runs(const Runs& a, const Runs& b, int64_t op) {
  // A sweep over the edges of both: each edge toggles being inside its list.
  Runs out;
  size_t i = 0, j = 0;
  bool was_inside = false;
  while (i < a.size() || j < b.size()) {
    const int64_t at = j == b.size() || (i < a.size() && a[i] <= b[j]) ? a[i] : b[j];
    while (i < a.size() && a[i] == at) ++i;
    while (j < b.size() && b[j] == at) ++j;
    const bool in_a = i % 2, in_b = j % 2;
    const bool inside = op == kOr ? in_a || in_b : op == kAnd ? in_a && in_b : in_a && !in_b;
    if (inside != was_inside) out.push_back(at);
    was_inside = inside;
  }
  return out;
}

}  // namespace farlight
