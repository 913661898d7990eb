// Pieces of clustered tokens: rows and keys sorted by label, so that each row sees one range of key slots.
#pragma once

#include <cstdint>

#include "../tables.h"
#include "plan_content.h"

namespace farlight {

// Tables of a clustering, row-major; variant v = b * heads + h. An extent of 1 is broadcast.
struct SortedLinks {
  int64_t batch, heads;       // extents of the variants
  int64_t n_q, n_k;
  const int64_t* rows;        // (variants, n_q): query row at each place; the first row_count[v] places are used
  const int64_t* row_count;   // (variants,)
  const int64_t* keys;        // (variants, n_k): key at each slot; the first key_count[v] slots are used
  const int64_t* key_count;   // (variants,)
  const int64_t *lo, *hi;     // (variants, n_q): the row at a place sees the slots [lo, hi); empty where lo >= hi
};

// Appends a piece with the links to the tables, and adds its sums over all (batch item, head) pairs to `counts`; `copies`: pairs
// of (batch item, head) for each variant. Rows without a slot are left out of the counts only.
void add_sorted_piece(const SortedLinks& links, int64_t copies, Tables& tables, ContentCounts& counts);

}  // namespace farlight
