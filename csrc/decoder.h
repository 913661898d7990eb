// The native side of a KV cache: views of its stores' pages and slot tables, the append of one token, and attention over slots.
//
// All memory belongs to the caller (farlight/decoding), which makes a new Decoder whenever a buffer is reallocated. Results do
// not depend on the number of threads: where the keys of a row are split is a function of the shapes alone.
#pragma once

#include <cstdint>
#include <vector>

#include "decode.h"
#include "decode_select.h"
#include "decode_work.h"

namespace farlight {

// A (B, H, n, D) tensor of queries or new tokens.
struct TokenTensor {
  TensorView view;
  KeyType type;  // not i8
  const char* row(int64_t b, int64_t h, int64_t i) const;
};

// The keys under one eviction rule. Slot tables `(rows, capacity)`; state `(rows, 4)`: slots in use, their smallest last use,
// how many of them are not gapless, 1 + the greatest last use of an evicted key; farlight/decoding/slots.py explains them.
struct DecodeStore {
  std::vector<KeyPage> pages;
  int32_t page_shift = 0;
  std::vector<int32_t> kv_heads;
  int64_t rows = 0, capacity = 0;
  int64_t *position = nullptr, *last_use = nullptr, *state = nullptr;
  uint8_t* gapless = nullptr;
  // Last uses of the tokens at positions rule_start … rule_stop - 1.
  const int64_t* rule_last_use = nullptr;
  const uint8_t* rule_gapless = nullptr;
  int64_t rule_start = 0, rule_stop = 0;
  // What a query sees, where that is known as a program.
  std::vector<int64_t> program;
  int64_t program_depth = 0;

  int64_t count(int64_t row) const { return state[4 * row]; }
};

// A caller's mask: one byte at data + b * batch + h * head + i * query + slot; strides in bytes, 0 broadcasts.
struct SlotMask {
  const uint8_t* data;
  int64_t batch, head, query;
};

// Score terms of a call; pointers are null where there is no such term.
struct CallTerms {
  float cap;             // 0: none
  const float* slopes;   // (H,)
  const float* distance; // (H, length), for the distances j - i = first, first + 1, …; both ends are repeated
  int64_t first, length;
  const float* key_bias; // by position; strides in elements, 0 where shared
  int64_t key_batch, key_head;
  const float* sinks;    // (H,)
  bool on() const { return cap != 0.0f || slopes || distance || key_bias; }  // terms on the scores, sinks apart
};

// The queries of one call. positions: `(rows, n_q)` or null: first, first + 1, …; -1 = no token.
struct DecodeQueries {
  TokenTensor q;
  int64_t heads, n_q;  // heads: a multiple of the key heads
  const int64_t* positions;
  int64_t rows, first;
  float scale;
  void* out;   // (B, H, n_q, D) of q's type, contiguous
  float* lse;  // (B, H, n_q) or null
  int threads;
  CallTerms terms;

  int64_t position(int64_t row, int64_t i) const { return positions ? positions[(rows > 1 ? row : 0) * n_q + i] : first + i; }
};

// A constant pattern in a router.
struct RouterPattern {
  std::vector<int64_t> code;
  int64_t depth;
};

class Decoder {
 public:
  Decoder(int64_t batch, int64_t kv_heads, int64_t dim, KeyType type, int64_t keep_back);

  void add_store(DecodeStore store) { stores_.push_back(std::move(store)); }

  // The router of a cache with one store that evicts nothing.
  void set_router(std::vector<RouterNode> nodes, std::vector<BlockRule> rules, std::vector<RouterPattern> patterns) {
    nodes_ = std::move(nodes), rules_ = std::move(rules), patterns_ = std::move(patterns);
  }

  // Stores the token at `position` in every store, whose slot tables must have one row. False, and nothing changed, where that
  // is not one write per store: no free slot, several expired keys, a shared page, or a position outside the rule's table.
  bool append(const TokenTensor& k, const TokenTensor& v, int64_t position);

  // Attention by the stores' programs. False, and nothing written, where a store has none and a query does not see every slot.
  bool attend(const DecodeQueries& queries) const;
  // Attention by a caller's mask for each store, `(B or 1, heads of the store or 1, n_q, slots)`.
  void attend_masked(const DecodeQueries& queries, const std::vector<SlotMask>& masks) const;

  // Attention of the newest queries over what the router chooses for each of them and each head. False, and nothing written,
  // where there is no router, or a score is not finite.
  bool attend_routed(const DecodeQueries& queries) const;

  int64_t batch() const { return batch_; }
  int64_t kv_heads() const { return kv_heads_; }
  int64_t dim() const { return dim_; }
  size_t stores() const { return stores_.size(); }
  bool has_router() const { return !nodes_.empty(); }

 private:
  struct Work;
  struct Routed;
  bool choose(const DecodeQueries& queries, int64_t b, int64_t kv_head, Routed& routed, float* scores) const;
  bool has_capacity_for_summaries(int64_t position) const;
  void summarize(int64_t position) const;
  // Where a token goes, and the least last use of the keys in all other slots.
  struct TokenSlot {
    int64_t slot, least_of_others;
  };
  TokenSlot slot_for_token(const DecodeStore& store, int64_t position) const;
  void write_token(DecodeStore& store, TokenSlot slot, int64_t position) const;
  void copy_token(const DecodeStore& store, int64_t slot, const TokenTensor& k, const TokenTensor& v) const;
  bool sees_every_slot(const DecodeStore& store, const DecodeQueries& queries) const;
  void evaluate(const DecodeStore& store, const DecodeQueries& queries, Work& work) const;
  void add_units(const DecodeStore& store, const DecodeQueries& queries, Work& work) const;
  void add_masked_units(const DecodeStore& store, const DecodeQueries& queries, const SlotMask& mask, Work& work) const;
  void run(const DecodeQueries& queries, Work& work) const;
  void set_terms(const DecodeQueries& queries, DecodeSchedule& schedule) const;

  int64_t batch_, kv_heads_, dim_;
  int64_t keep_back_;  // keys are evicted that many tokens after their last use
  KeyType type_;
  std::vector<DecodeStore> stores_;
  std::vector<RouterNode> nodes_;
  std::vector<BlockRule> rules_;
  std::vector<RouterPattern> patterns_;
};

}  // namespace farlight
