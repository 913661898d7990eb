// Labels of tokens: the nearest column of a table for each token, tokens sorted by label, and the most recent keys of a label.
#pragma once

#include <cstdint>
#include <vector>

#include "../parallel.h"
#include "../views.h"

namespace farlight {

// labels[b, h, i] = argmax over c of columns[h, c] . x[b, h / group, i], the lowest c of equals; -1 where the mask is zero.
struct NearestProblem {
  Type type;
  TensorView x;  // (batch, kv_heads, n, dim)
  int64_t batch, heads, kv_heads, n, dim;
  const float* columns;  // (heads, count, dim)
  int64_t count;
  const uint8_t* mask;  // (mask_batch, n): nonzero where a token is real; null = all
  int64_t mask_batch;
  int64_t* labels;  // (batch, heads, n)
};

void nearest_labels(const Kernels& kernels, const NearestProblem& problem, int threads, InterruptCheck& interrupt);

// Rows and keys of one (batch item, head), sorted by label; ascending within a label. A negative label is none.
class LabelOrder {
 public:
  // Overwrites the labels with consecutive numbers where they are too large to count by.
  LabelOrder(std::vector<int64_t>& query, std::vector<int64_t>& key);

  int64_t labels() const { return static_cast<int64_t>(first_row.size()) - 1; }

  std::vector<int32_t> rows, keys;            // in sorted order, without unlabelled ones
  std::vector<int32_t> first_row, first_key;  // (labels + 1): where each label begins
};

// starts[b, h, r]: position of the `count`-th most recent key, up to the row's own position n_k - n_q + r, of the row's label;
// of the earliest one where there are fewer, 0 where there is none. query (lines, n_q), key (lines, n_k), starts (lines, n_q).
void recent_starts(const int64_t* query, const int64_t* key, int64_t lines, int64_t n_q, int64_t n_k, int64_t count,
                   int64_t* starts, int threads, InterruptCheck& interrupt);

}  // namespace farlight
