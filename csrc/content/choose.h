// Choice of key blocks by content: summaries of the key blocks, their scores for every query block, and the selection of the
// highest. The rule is that of farlight.routing.TopBlocks; ties go to the block that comes first.
#pragma once

#include <cstdint>
#include <vector>

#include "../parallel.h"
#include "../views.h"

namespace farlight {

enum class BlockScore : int { kMean = 0, kMinMax = 1, kSoftmax = 2 };
enum class BudgetKind : int { kCount = 0, kShare = 1, kMass = 2, kLost = 3 };

struct ChoiceProblem {
  Type type;
  TensorView q, k;
  int64_t batch, heads, kv_heads, n_q, n_k, dim;
  // (mask_batch, n_q) and (mask_batch, n_k): nonzero where a token is real; null = all.
  const uint8_t *query_mask, *key_mask;
  int64_t mask_batch;
  int64_t block, query_block;
  int64_t offset;  // position of query row 0
  int64_t first;   // position of the first query block
  bool causal;
  bool shared;  // one choice for the query heads of a key head, by the sum of their scores
  BlockScore score;
  BudgetKind budget;
  double budget_value;  // count, share, mass or lost
  float scale;
};

// A table of lists, (batch, heads or key heads, query blocks, width): block indices of `bytes` bytes, 2, 4 or 8, ascending, the
// rest of a list -1.
struct ListTable {
  void* data;
  int64_t width, bytes;
};

// Consecutive lists: their lengths, and their blocks one after the other.
struct Lists {
  std::vector<int32_t> counts, blocks;
  void clear() { counts.clear(), blocks.clear(); }
};

// The chosen blocks of each (batch item, head or key head, query block).
struct ChosenLists {
  int64_t width = 0;  // length of the longest list
  std::vector<Lists> parts;
  // Writes a table at least that wide.
  void copy_to(const ListTable& table, int threads) const;
};

ChosenLists choose_blocks(const Kernels& kernels, const ChoiceProblem& problem, int threads, InterruptCheck& interrupt);

// The same, written to a table as wide as a list can become: nothing is stored twice.
void choose_blocks(const Kernels& kernels, const ChoiceProblem& problem, const ListTable& table, int threads,
                   InterruptCheck& interrupt);

}  // namespace farlight
