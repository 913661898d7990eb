// Pieces of labelled tokens (clusters, buckets): rows and keys sorted by label, so that each row sees one range of key slots.
#pragma once

#include <cstdint>

#include "../parallel.h"
#include "../tables.h"
#include "plan_content.h"

namespace farlight {

// The row at position i sees the key at j where their labels agree, i + lower <= j <= i + upper and starts[i] <= j. Pointers
// are borrowed for the call; of (batch, heads) extents those of 1 are broadcast.
struct LabelLinks {
  int64_t batch, heads;  // over which the links differ
  int64_t n_q, n_k, q_offset;
  const int64_t* query;  // (query_batch, query_heads, n_q) labels; negative = none
  int64_t query_batch, query_heads;
  const int64_t* key;  // (key_batch, key_heads, n_k)
  int64_t key_batch, key_heads;
  const uint8_t* key_mask;  // (mask_batch, n_k): nonzero where a key is real; null = all
  int64_t mask_batch;
  const uint8_t *excluded_rows, *excluded_keys;  // (n_q), (n_k): nonzero = without a label; null = none
  const int64_t* starts;                         // (starts_batch, starts_heads, n_q) positions; null = 0
  int64_t starts_batch, starts_heads;
  int64_t lower, upper;
};

// Appends a piece of one layer. `copies`: how many (batch item, head) pairs of the call share each variant.
void add_label_piece(const LabelLinks& links, int64_t copies, int threads, InterruptCheck& interrupt, Tables& tables,
                     ContentCounts& counts);

}  // namespace farlight
