// Choosing blocks of keys while decoding: the native form of routers of `TopBlocks` and patterns
// (farlight/routing/topblocks.py).
//
// A router's cache evicts nothing, so slot s holds position s, and what a query sees is a sorted list of runs of positions.
#pragma once

#include <cstdint>
#include <vector>

#include "decode.h"

namespace farlight {

enum class BlockBudget : int { count = 0, share = 1, mass = 2 };

// One TopBlocks. Tables `(B, key heads, capacity, D)` float32: the mean of each complete block, or its lower and upper bounds.
struct BlockRule {
  int64_t block;
  BlockBudget budget;
  double limit;  // blocks, share or mass
  float scale;    // of the scores, for mass
  float *mean, *lower, *upper;  // mean, or both bounds
  int64_t capacity;
  // Codes `(B, key heads, capacity, D)` and scales `(B, key heads, capacity)` of the means, rounded as int8 rows of a cache;
  // null: none.
  int8_t* codes;
  float* code_scale;

  // Rows of tables: the sums of a block that has become complete.
  void summarize(const DecodeKernels& kernels, const KeyPage* pages, int32_t page_shift, KeyType type, int64_t head,
                 int64_t dim, int64_t index) const;
  // to[c] = score of block first + c, c < count, for a query of one key head.
  void scores(const DecodeKernels& kernels, const float* q, int64_t head, int64_t dim, int64_t first, int64_t count,
              float* to) const;
  // The same of the codes.
  void code_scores(const DecodeKernels& kernels, const float* q, int64_t head, int64_t dim, int64_t first, int64_t count,
                   float* to) const;
  // Writes the selected ones of `count` blocks to `selected`, in ascending order. Scores must be finite.
  void select(const float* scores, int64_t count, std::vector<int32_t>& selected) const;

  // Whether up to `count` blocks are selected by `select_by_codes`.
  bool selects_by_codes(int64_t count) const;
  // The blocks that `select` would write, from the scores of the codes: these bound every score, and means are read of those
  // blocks only whose upper bound reaches the best lower bounds. False where a score may overflow.
  bool select_by_codes(const DecodeKernels& kernels, const float* q, int64_t head, int64_t dim, const float* coarse,
                       int64_t count, std::vector<int32_t>& selected) const;

 private:
  // Blocks that a count or share selects of `count` scored ones; the query's own block is selected beside them.
  int64_t num_selected(int64_t count) const;
  void select_mass(const float* scores, int64_t count, std::vector<int32_t>& selected) const;
};

// A sorted list of disjoint intervals [lo, hi).
using Runs = std::vector<int64_t>;

// Adds [lo, hi), which begins at or behind the last run's beginning.
void append_run(Runs& runs, int64_t lo, int64_t hi);
// Union, intersection and difference: op is kOr, kAnd or kAndNot of VisibilityOp.
Runs combine_runs(const Runs& a, const Runs& b, int64_t op);

// A router as a program in postfix order: a node is a BlockRule, a visibility program, or an operator on the last two results.
struct RouterNode {
  enum Kind : int { kBlocks = 0, kPattern = 1, kOperator = 2 } kind;
  int64_t index;  // of the rule or program, or the VisibilityOp
};

}  // namespace farlight
