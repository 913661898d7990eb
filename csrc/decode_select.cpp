// Choosing blocks of keys while decoding (decode_select.h).
#include "decode_select.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dispatch.h"

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
  if (codes) code_scale[head * capacity + index] = kernels.narrow(KeyType::i8, mean + at, dim, codes + at);
}

void BlockRule::scores(const DecodeKernels& kernels, const float* q, int64_t head, int64_t dim, int64_t first, int64_t count,
                       float* to) const {
  const int64_t at = (head * capacity + first) * dim;
  if (mean) return kernels.dots(q, mean + at, nullptr, count, dim, to);
  float positive[kMaxDim], negative[kMaxDim];
  for (int64_t d = 0; d < dim; ++d) positive[d] = std::max(q[d], 0.0f), negative[d] = std::min(q[d], 0.0f);
  thread_local std::vector<float> low;
  low.resize(count);
  kernels.dots(positive, upper + at, nullptr, count, dim, to);
  kernels.dots(negative, lower + at, nullptr, count, dim, low.data());
  for (int64_t c = 0; c < count; ++c) to[c] += low[c];
}

namespace {

// Indices of the `most` largest of `count` finite scores, ascending; the earlier one where two are equal.
void select_largest(const float* scores, int64_t count, int64_t most, std::vector<int32_t>& selected) {
  constexpr int64_t kLanes = 16;  // of the widest ISA
  thread_local std::vector<int32_t> keys;
  keys.resize(count + kLanes);
  selected.resize(most);
  if (most) kernels().select_largest(scores, nullptr, count, most, keys.data(), selected.data());
}

}  // namespace

int64_t BlockRule::num_selected(int64_t count) const {
  // The block of the query itself is selected whatever the budget, which counts it.
  const double wanted = budget == BlockBudget::count ? limit : std::ceil(static_cast<double>(count + 1) * limit - 1e-9);
  return std::clamp<int64_t>(static_cast<int64_t>(std::min(wanted, 1e15)) - 1, 0, count);
}

void BlockRule::select(const float* scores, int64_t count, std::vector<int32_t>& selected) const {
  if (budget == BlockBudget::mass) return select_mass(scores, count, selected);
  select_largest(scores, count, num_selected(count), selected);
}

void BlockRule::select_mass(const float* scores, int64_t count, std::vector<int32_t>& selected) const {
  selected.resize(count);
  for (int64_t c = 0; c < count; ++c) selected[c] = static_cast<int32_t>(c);
  std::stable_sort(selected.begin(), selected.end(),
                   [&](int32_t a, int32_t b) { return scale * scores[a] > scale * scores[b]; });
  const auto weight = [&](int32_t c) { return std::exp(scale * scores[c] - scale * scores[selected[0]]); };
  double total = 0.0, before = 0.0;
  for (const int32_t c : selected) total += weight(c);
  int64_t most = 0;
  for (; most < count && before < limit * total; ++most) before += weight(selected[most]);
  selected.resize(most);
  std::sort(selected.begin(), selected.end());
}

bool BlockRule::selects_by_codes(int64_t count) const {
  if (!codes) return false;
  const int64_t most = num_selected(count);
  return most > 0 && 8 * most <= count;
}

void BlockRule::code_scores(const DecodeKernels& kernels, const float* q, int64_t head, int64_t dim, int64_t first,
                            int64_t count, float* to) const {
  const int64_t at = head * capacity + first;
  kernels.code_dots(q, codes + at * dim, code_scale + at, count, dim, to);
}

bool BlockRule::select_by_codes(const DecodeKernels& kernels, const float* q, int64_t head, int64_t dim, const float* coarse,
                                int64_t count, std::vector<int32_t>& selected) const {
  // An element of a mean is within scale / 2 of scale * code and at most 127.5 * scale, so a score is within |q|_1 * scale / 2 of
  // the coarse one. The rounding of each of the two sums adds at most 256 * 2^-24 * 127.5 < 0.002 times |q|_1 * scale, for which
  // 0.51 leaves room. kTiny: rows whose inverse scale overflows have zero codes, and products may underflow.
  constexpr float kTiny = 1e-30f;
  thread_local std::vector<float> bounds, scores;
  thread_local std::vector<int32_t> candidates, best;
  const int64_t most = num_selected(count);
  if (most == 0) return selected.clear(), true;
  float norm = 0.0f;
  for (int64_t d = 0; d < dim; ++d) norm += std::abs(q[d]);
  const float* scales = code_scale + head * capacity;
  const auto error = [&](int64_t c) { return 0.51f * norm * (scales[c] + kTiny) + kTiny; };
  bounds.resize(count);
  int32_t overflows = 0;
  for (int64_t c = 0; c < count; ++c) {
    bounds[c] = coarse[c] - error(c);
    overflows |= !(256.0f * norm * scales[c] < std::numeric_limits<float>::max());
  }
  if (overflows) return false;
  select_largest(bounds.data(), count, most, best);
  float threshold = std::numeric_limits<float>::infinity();  // `most` blocks have this score or more
  for (const int32_t c : best) threshold = std::min(threshold, bounds[c]);
  for (int64_t c = 0; c < count; ++c) bounds[c] = coarse[c] + error(c);
  candidates.clear();
  constexpr int64_t kStride = 64;
  for (int64_t first = 0; first < count; first += kStride) {
    const int64_t end = std::min(count, first + kStride);
    int32_t any = 0;
    for (int64_t c = first; c < end; ++c) any |= bounds[c] >= threshold;
    for (int64_t c = first; any && c < end; ++c)
      if (bounds[c] >= threshold) candidates.push_back(static_cast<int32_t>(c));
  }
  const int64_t n = static_cast<int64_t>(candidates.size());
  scores.resize(n);
  kernels.dots(q, mean + head * capacity * dim, candidates.data(), n, dim, scores.data());
  select_largest(scores.data(), n, most, selected);
  for (int32_t& c : selected) c = candidates[c];
  return true;
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
