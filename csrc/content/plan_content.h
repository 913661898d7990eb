// Plans of patterns that content decides: from lists of chosen key blocks straight to tables, without an expression's normal
// form.
//
// A pattern is a union of clauses: listed key blocks, bands, named keys and rows; each restricted to causal links, or to real
// keys, or not. Each tile of rows unites its clauses in a row mask per key (row_masks.h), and the masks are cut into runs and
// gathered keys. No pair occurs twice, since a key has one mask.
#pragma once

#include <cstdint>
#include <vector>

#include "../parallel.h"
#include "../tables.h"

namespace farlight {

enum class ClauseKind : int { kBlocks = 0, kBand = 1, kKeys = 2, kRows = 3 };

// One clause of the union. Whoever holds it keeps what it points to alive.
struct Clause {
  ClauseKind kind;
  bool causal;  // key <= position of the query
  // kBlocks: `lists` lists of `width` block indices (-1 = none) for each (batch, heads); an extent of 1 is broadcast. List u
  // serves the positions base + u * query_block, ..., base + (u + 1) * query_block - 1; others have no list.
  const void* indices;
  int64_t index_bytes;  // of an index: 2, 4 or 8; 8 for kKeys and kRows
  int64_t batch, heads, lists, width, block, query_block, base;
  // kBand: keys i - left ... i + right of the query at position i.
  int64_t left, right;
  // kKeys: `lists` key ranges [first, last), (lists, 2) int64 in `indices`, seen by every query. kRows: `lists` ranges of query
  // positions that see every key.
  // (mask_batch, n_k): nonzero where a key is real; null = all. An extent of 1 is broadcast.
  const uint8_t* key_mask;
  int64_t mask_batch;
  int64_t head;  // the only head that the clause belongs to; -1 = every head
};

struct ContentPattern {
  int64_t batch, heads, n_q, n_k, q_offset;
  std::vector<Clause> clauses;

  // Extents of the batch and head dimensions over which the links differ.
  int64_t batch_variants() const;
  int64_t head_variants() const;
};

// Sums over all (batch item, head) pairs.
struct ContentCounts {
  int64_t pairs = 0, visited = 0;
};

// The tables of a content pattern. Throws MalformedPlan for an index outside the key blocks.
void plan_content(const ContentPattern& pattern, int64_t gather, int threads, InterruptCheck& interrupt, Tables& tables,
                  ContentCounts& counts);

// Appends the same as one piece. The caller calls `Tables::finish` after the last piece.
void add_content_piece(const ContentPattern& pattern, int64_t gather, int threads, InterruptCheck& interrupt, Tables& tables,
                       ContentCounts& counts);

// The counts of what plan_content would plan, without its tables.
ContentCounts count_tiles(const ContentPattern& pattern, int64_t gather, int threads, InterruptCheck& interrupt);

// Counts of some tiles, spread over variants and rows: about kSampledTiles of them, or all.
struct ContentSample {
  ContentCounts counts;   // of the tiles
  int64_t row_visits = 0;  // key groups of kVisitKeys keys of which a row sees a key, summed over rows
  double scale = 1.0;     // pairs of (batch item, head, tile) for each one counted
};
constexpr int64_t kSampledTiles = 48;
ContentSample sample_tiles(const ContentPattern& pattern, int64_t gather, int threads, InterruptCheck& interrupt);

}  // namespace farlight
