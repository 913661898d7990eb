// Choice of key blocks until the attention that every row misses is proven to be small.
#pragma once

#include "bound_query.h"
#include "query_blocks.h"

namespace farlight {

// Adds scored blocks to the list of a query block, in one order for all of its rows, until for each row
//
//   sum over blocks c left out of n_c 2^bound(row, c)  <=  lost / (1 - lost) * sum over keys seen of 2^score(row, key),
//
// so that the left-out share of the row's attention is at most `lost`; or until everything is seen. Order: by the sum over the
// rows of the softmax over blocks of bound + log n_c, largest first. Rounding is added on the side of the proof.
class UntilProven : public QueryBlocks {
 public:
  // summaries: channel-wise bounds.
  UntilProven(const Kernels& kernels, const ChoiceProblem& problem, const Summaries& summaries)
      : QueryBlocks(problem, summaries),
        kernels_(kernels),
        bounds_(problem, summaries),
        allowed_(problem.budget_value / (1.0 - problem.budget_value)) {}

  // An item is as many query blocks as have kScoreRows rows together.
  int64_t lists_per_item() const { return std::max<int64_t>(1, kScoreRows / (p_.query_block * choosing_heads())); }
  int64_t items() const { return (num_lists_ + lists_per_item() - 1) / lists_per_item(); }
  void run(int64_t b, int64_t h, int64_t item, Lists& to) const;

 private:
  struct Row {
    int64_t head, row;
  };
  struct Scratch;
  class Order;

  void score(Scratch& s, int64_t b, int64_t h, const Row* rows, int64_t count, int64_t width) const;
  void weigh(Scratch& s, int64_t b, int64_t u, int64_t first, int64_t count) const;
  int64_t count_needed(Scratch& s, int64_t b, int64_t h, int64_t u, Order& order, const Row* rows, int64_t first,
                       int64_t count) const;
  void see_forced_keys(Scratch& s, int64_t b, int64_t h, int64_t u, const Row* rows, int64_t first, int64_t count) const;
  void score_keys(Scratch& s, int64_t first, int64_t count) const;
  void pack_key(Scratch& s, int64_t b, int64_t h, int64_t key, int64_t lane) const;

  const Kernels& kernels_;
  const BoundQueries bounds_;
  const double allowed_;
};

}  // namespace farlight
