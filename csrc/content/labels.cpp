#include "labels.h"

#include <algorithm>
#include <cstring>

#include "../memory.h"
#include "query_blocks.h"

namespace farlight {

namespace {

constexpr int64_t kRowsPerItem = 8 * kScoreRows;

// The columns of a head, packed in panels as block summaries are: [panel][dim][kPanel], zeros behind the last column.
void pack_columns(const NearestProblem& p, int64_t head, int64_t panels, float* to) {
  std::memset(to, 0, static_cast<size_t>(panels * kPanel * p.dim) * sizeof(float));
  for (int64_t c = 0; c < p.count; ++c) {
    const float* column = p.columns + (head * p.count + c) * p.dim;
    for (int64_t d = 0; d < p.dim; ++d) to[(c / kPanel * p.dim + d) * kPanel + c % kPanel] = column[d];
  }
}

}  // namespace

void nearest_labels(const Kernels& kernels, const NearestProblem& p, int threads, InterruptCheck& interrupt) {
  const int64_t panels = (p.count + kPanel - 1) / kPanel, size = panels * kPanel * p.dim, ld = panels * kPanel + 16;
  const int64_t group = p.heads / p.kv_heads, chunks = (p.n + kRowsPerItem - 1) / kRowsPerItem;
  const Buffer columns(p.heads * size * static_cast<int64_t>(sizeof(float)));
  parallel_for(p.heads, threads, interrupt,
               [&](int64_t head) { pack_columns(p, head, panels, columns.as<float>() + head * size); });
  parallel_for(p.batch * p.kv_heads * chunks, threads, interrupt, [&](int64_t i) {
    thread_local std::vector<float> queries, scores;
    queries.resize(kScoreRows * p.dim);
    scores.resize(kRowSlots * ld);
    const int64_t b = i / chunks / p.kv_heads, kv_head = i / chunks % p.kv_heads, begin = i % chunks * kRowsPerItem;
    const uint8_t* mask = p.mask ? p.mask + (p.mask_batch > 1 ? b * p.n : 0) : nullptr;
    for (int64_t first = begin; first < std::min(begin + kRowsPerItem, p.n); first += kScoreRows) {
      const int64_t rows = std::min(kScoreRows, p.n - first);
      const float* row[kRowSlots];
      for (int64_t r = 0; r < kRowSlots; ++r) {
        row[r] = queries.data() + (r < rows ? r : 0) * p.dim;
        if (r < rows) read_row(p.type, p.x, b, kv_head, first + r, p.dim, queries.data() + r * p.dim);
      }
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        kernels.block_scores(row, rows, columns.as<float>() + head * size, panels, p.dim, scores.data(), ld);
        int64_t* to = p.labels + (b * p.heads + head) * p.n + first;
        kernels.largest_columns(scores.data(), rows, ld, p.count, to);
        for (int64_t r = 0; mask && r < rows; ++r)
          if (!mask[first + r]) to[r] = -1;
      }
    }
  });
}

namespace {

// Labels up to `limit` are counted by as they are; else each is replaced by its place among the distinct ones. Returns their
// number.
int64_t number_labels(std::vector<int64_t>& query, std::vector<int64_t>& key) {
  int64_t largest = -1;
  for (const std::vector<int64_t>* labels : {&query, &key})
    for (const int64_t label : *labels) largest = std::max(largest, label);
  const auto limit = static_cast<int64_t>(4 * (query.size() + key.size()) + 1024);
  if (largest < limit) return largest + 1;
  std::vector<int64_t> distinct(key);
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  const auto negative = std::lower_bound(distinct.begin(), distinct.end(), 0) - distinct.begin();
  for (std::vector<int64_t>* labels : {&query, &key})
    for (int64_t& label : *labels) {
      const auto at = std::lower_bound(distinct.begin(), distinct.end(), label);
      label = label < 0 || at == distinct.end() || *at != label ? -1 : at - distinct.begin() - negative;
    }
  return static_cast<int64_t>(distinct.size()) - negative;
}

// Tokens in the order of their labels, and where each label begins.
void sort_tokens(const std::vector<int64_t>& labels, int64_t count, std::vector<int32_t>& tokens, std::vector<int32_t>& first) {
  first.assign(count + 1, 0);
  for (const int64_t label : labels)
    if (label >= 0) ++first[label + 1];
  for (int64_t c = 0; c < count; ++c) first[c + 1] += first[c];
  tokens.resize(first[count]);
  std::vector<int32_t> next(first.begin(), first.end() - 1);
  for (size_t i = 0; i < labels.size(); ++i)
    if (labels[i] >= 0) tokens[next[labels[i]]++] = static_cast<int32_t>(i);
}

}  // namespace

LabelOrder::LabelOrder(std::vector<int64_t>& query, std::vector<int64_t>& key) {
  const int64_t count = number_labels(query, key);
  sort_tokens(query, count, rows, first_row);
  sort_tokens(key, count, keys, first_key);
}

void recent_starts(const int64_t* query, const int64_t* key, int64_t lines, int64_t n_q, int64_t n_k, int64_t count,
                   int64_t* starts, int threads, InterruptCheck& interrupt) {
  parallel_for(lines, threads, interrupt, [&](int64_t line) {
    std::vector<int64_t> query_labels(query + line * n_q, query + (line + 1) * n_q);
    std::vector<int64_t> key_labels(key + line * n_k, key + (line + 1) * n_k);
    const LabelOrder order(query_labels, key_labels);
    int64_t* to = starts + line * n_q;
    std::fill_n(to, n_q, 0);
    for (int64_t c = 0; c < order.labels(); ++c) {
      const int64_t first = order.first_key[c];
      int64_t end = first;  // behind the keys that the row sees
      for (int64_t x = order.first_row[c]; x < order.first_row[c + 1]; ++x) {
        const int64_t row = order.rows[x], position = n_k - n_q + row;
        while (end < order.first_key[c + 1] && order.keys[end] <= position) ++end;
        if (end > first) to[row] = order.keys[std::max(first, end - count)];
      }
    }
  });
}

}  // namespace farlight
