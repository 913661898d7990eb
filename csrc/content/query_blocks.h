// Query blocks of a choice: the rows that choose together, and the key blocks that they may choose.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "choose.h"
#include "summaries.h"

namespace farlight {

constexpr float kLog2e = 1.44269504f;
constexpr int64_t kScoreRows = 16;  // rows scored together: each panel is read once for all of them
constexpr int64_t kRowSlots = 24;   // slots for kScoreRows rounded up to whole groups of kM rows, on every ISA

// A scored block.
struct Candidate {
  float weight;
  int32_t block;
  // Order of selection, that of kernel/select_largest.h: higher weight first, NaN behind every number, of equals the block that
  // comes first.
  bool operator<(const Candidate& other) const {
    const bool is_nan = weight != weight, other_is_nan = other.weight != other.weight;
    if (is_nan || other_is_nan) return is_nan == other_is_nan ? block < other.block : other_is_nan;
    return weight != other.weight ? weight > other.weight : block < other.block;
  }
};

// The blocks of the first `count` candidates, ascending.
inline void blocks_of(const Candidate* candidates, int64_t count, std::vector<int32_t>& blocks) {
  blocks.clear();
  for (int64_t i = 0; i < count; ++i) blocks.push_back(candidates[i].block);
  std::sort(blocks.begin(), blocks.end());
}

class QueryBlocks {
 public:
  QueryBlocks(const ChoiceProblem& problem, const Summaries& summaries) : p_(problem), summaries_(summaries) {
    num_lists_ = (p_.offset + p_.n_q - p_.first + p_.query_block - 1) / p_.query_block;
    ld_ = summaries.padded() + 16;  // not a power of two: rows would share their cache sets
  }

  int64_t lists() const { return num_lists_; }  // of a (batch item, choosing head)

 protected:
  int64_t group() const { return p_.heads / p_.kv_heads; }
  // Choosing head h is a key head where the choice is shared, else a query head.
  int64_t first_head(int64_t h) const { return p_.shared ? h * group() : h; }
  int64_t kv_head(int64_t h) const { return p_.shared ? h : h / group(); }
  int64_t choosing_heads() const { return p_.shared ? group() : 1; }
  bool real(int64_t b, int64_t row) const {
    return !p_.query_mask || p_.query_mask[(p_.mask_batch > 1 ? b * p_.n_q : 0) + row];
  }
  bool real_key(int64_t b, int64_t key) const {
    return !p_.key_mask || p_.key_mask[(p_.mask_batch > 1 ? b * p_.n_k : 0) + key];
  }
  // Position of the first query of a query block, and its rows.
  int64_t start(int64_t u) const { return p_.first + u * p_.query_block; }
  int64_t first_row(int64_t u) const { return std::max<int64_t>(0, start(u) - p_.offset); }
  int64_t last_row(int64_t u) const { return std::min(p_.n_q, start(u) + p_.query_block - p_.offset); }
  // Blocks that are scored: causal, those that end before the query block begins.
  int64_t scored(int64_t u) const {
    return p_.causal ? std::clamp<int64_t>(start(u) / p_.block, 0, summaries_.blocks()) : summaries_.blocks();
  }
  // Blocks behind the scored ones that overlap the query block and are always chosen: [scored, end_of_forced). None unless
  // causal.
  int64_t end_of_forced(int64_t u) const {
    const int64_t last = start(u) + p_.query_block - 1;
    return p_.causal && last >= 0 ? std::min(last / p_.block + 1, summaries_.blocks()) : scored(u);
  }

  // Appends the list of query block u: the chosen scored blocks, ascending, and the forced ones; empty without a real query.
  void append_list(int64_t b, int64_t u, bool has_query, const int32_t* chosen, int64_t count, Lists& to) const {
    const size_t first = to.blocks.size();
    if (has_query) {
      to.blocks.insert(to.blocks.end(), chosen, chosen + count);
      const int32_t* sizes = summaries_.sizes(p_, b);
      for (int64_t c = scored(u); c < end_of_forced(u); ++c)
        if (sizes[c] > 0) to.blocks.push_back(static_cast<int32_t>(c));
    }
    to.counts.push_back(static_cast<int32_t>(to.blocks.size() - first));
  }

  const ChoiceProblem& p_;
  const Summaries& summaries_;
  int64_t num_lists_, ld_;
};

}  // namespace farlight
