// Per-thread cache of packed key blocks, the left operands of products over keys (O^T += V^T P^T, dQ^T += K^T dS^T).
//
// Products of bfloat16 pairs sum over neighbouring keys, so 32 keys are packed with pairs interleaved: [pair of keys][d] for
// vector products, transposed to [d][key] for AMX. Split float32 operands are stored in three parts, and their row-major form
// (for Q K^T and dO V^T) is packed as well. Packing costs a sixth of the product that uses it, and neighbouring query tiles
// visit mostly the same keys, so a thread keeps the blocks it packed last, for the length of a call.
//
// The cache is two-way set associative. A block is tagged with its head and its 32 key indices, so dilated and clustered keys
// hit as well. Capacity: 512 KiB (bfloat16) or 768 KiB (split float32) per thread, to stay in L2.
#pragma once

#include "amx_tiles.h"
#include "kernel_traits.h"
#include "row_ops.h"

namespace farlight::FARLIGHT_NS {

// Stands in where operands are read in place and nothing is packed.
struct NoPackedCache {
  template <class T>
  NoPackedCache(const HeadRows<T>&, const HeadRows<T>*, int, int64_t, int64_t) {}
  void reserve(Arena&) {}
  static bool fits(int64_t, int, int64_t) { return true; }
};

#if defined(FARLIGHT_BF16_PAIRS)

constexpr int64_t kMaxBlocks = 256;  // blocks per thread, at most

// The cache's tags; zeroed when a thread begins a call, which invalidates all blocks.
struct CacheTags {
  uint64_t fetch_count;           // clock of the LRU rule
  uint64_t head[kMaxBlocks];      // batch item * kv_heads + kv head + 1; 0: empty
  uint64_t last_use[kMaxBlocks];  // fetch_count of the latest use
};

// The packed operands of the keys of one (batch item, kv head), backed by the thread's cache.
template <class Traits>
class PackedCache {
  using T = typename Traits::T;

 public:
  static constexpr int kParts = num_parts<Traits>;
  static constexpr int kMaxRowOperands = 2;  // K and V

  // Packs the col-major form of `col_source`, and the row-major form of `num_row_operands` tensors (K, V) for split operands.
  PackedCache(const HeadRows<T>& col_source, const HeadRows<T>* row_sources, int num_row_operands, int64_t dim, int64_t head)
      : col_source_(col_source),
        row_sources_{row_sources[0], row_sources[num_row_operands > 1 ? 1 : 0]},
        num_row_operands_(num_row_operands),
        dim_(dim),
        head_(static_cast<uint64_t>(head) + 1) {}

  // Must be the first allocation of the arena: the tags lie in the prefix that the caller zeroes (Kernels::zeroed_bytes).
  void reserve(Arena& arena) {
    const int64_t block = (1 + num_row_operands_) * operand_size();
    slots_ = capacity(dim_, num_row_operands_);
    tags_ = arena.allocate<CacheTags>(1);
    keys_ = arena.allocate<int32_t>(kMaxBlocks * kDepth);
    blocks_ = arena.allocate<Bf16>(slots_ * block);
    uncached_ = arena.allocate<Bf16>(kGroups * block);
    if (uses_amx<Traits>) scratch_ = arena.allocate<uint32_t>(kDepth * ld());
    groups = arena.allocate<const Bf16*>(kGroups);
    cached_has_inf_ = arena.allocate<bool>(slots_);
  }

  // Whether `keys` keys fit in the cache together, with `num_row_operands` row operands.
  static bool fits(int64_t dim, int num_row_operands, int64_t keys) { return keys <= capacity(dim, num_row_operands) * kDepth; }

  // Whether the block of the chunk's keys [first, first + 32) is cached.
  bool contains(const Chunk& c, int first) const { return first + kDepth <= c.n && find(c.key + first) >= 0; }

  // Sets groups[i] to the packed block of the chunk's keys from 32 i on, packing it on a miss; padding keys are zero. An
  // incomplete block, or one whose two ways are already used by this chunk, is packed outside the cache. Returns the number of
  // blocks.
  int fetch(const Chunk& c) {
    const int64_t block = (1 + num_row_operands_) * operand_size();
    const int num_groups = (c.n + kDepth - 1) / kDepth;
    const uint64_t tick = ++tags_->fetch_count;
    for (int i = 0; i < num_groups; ++i) {
      const int first = i * kDepth;
      int64_t slot = first + kDepth <= c.n ? find(c.key + first) : -1;
      if (slot < 0) {
        slot = first + kDepth <= c.n ? least_recent(c.key + first) : -1;
        Bf16* to = uncached_ + i * block;
        if (slot >= 0 && tags_->last_use[slot] < tick) {
          to = blocks_ + slot * block;
          tags_->head[slot] = head_;
          std::memcpy(keys_ + slot * kDepth, c.key + first, kDepth * sizeof(int32_t));
        } else {
          slot = -1;
        }
        const bool has_inf = pack_block(c, first, to);
        groups[i] = to;
        group_has_inf_[i] = has_inf;
        if (slot >= 0) cached_has_inf_[slot] = has_inf;
      } else {
        groups[i] = blocks_ + slot * block;
        group_has_inf_[i] = cached_has_inf_[slot];
      }
      if (slot >= 0) tags_->last_use[slot] = tick;
    }
    return num_groups;
  }

  // Elements between the parts of split operands.
  int64_t part() const { return ld() * kDepth; }
  // Whether group g has an infinity in the first row operand (K): its lower parts are NaN.
  bool has_inf(int g) const { return group_has_inf_[g]; }
  // For vector products: pairs[i] points to the interleaved words of the chunk's keys 2i and 2i + 1, for i < (n + 1) / 2.
  void find_pairs(int n, const uint32_t** pairs) const {
    const uint32_t* at = nullptr;
    for (int i = 0; i < (n + 1) / 2; ++i, at += ld()) {
      if (i % (kDepth / 2) == 0) at = reinterpret_cast<const uint32_t*>(groups[i / (kDepth / 2)]);
      pairs[i] = at;
    }
  }
#if defined(FARLIGHT_ISA_AMX)
  // Half a group (16 keys) of row operand `operand` as an AMX panel. A tile of 32 keys is contiguous, tiles of successive d
  // follow.
  Panel panel(int g, int operand, int half) const {
    const Bf16* at = groups[g] + (1 + operand) * operand_size() + half * kTileDim * kDepth;
    return {reinterpret_cast<const char*>(at), kDepth * 2, kDepth * kDepth * 2, part() * 2};
  }
#endif

  const Bf16** groups = nullptr;

 private:
  static constexpr int kGroups = chunk_keys<Traits> / kDepth;
  // Bytes of all blocks. L2 is 2 MiB on CPUs with AMX, 1 MiB on others with products of pairs.
  static constexpr int64_t kCapacityBytes = (kParts == 1 ? 512 : 768) << 10;

  static constexpr int64_t kMinBlocks = kParts == 1 ? 1 : 20;  // a window of 512 keys plus a few global ones need 20 blocks

  // Number of blocks.
  static int64_t capacity(int64_t dim, int num_row_operands) {
    const int64_t bytes = (1 + num_row_operands) * kParts * round_up(dim, 32) * kDepth * static_cast<int64_t>(sizeof(Bf16));
    return max<int64_t>(kMinBlocks, min<int64_t>(kMaxBlocks, kCapacityBytes / bytes));
  }

  int64_t ld() const { return round_up(dim_, 32); }
  int64_t operand_size() const { return kParts * part(); }

  // A block's first way is hashed from its first key divided by the extent of its 32 keys: tiles of a window, also of a dilated
  // one, step by 32 rows, so their blocks start a whole extent apart and fall into successive sets.
  int64_t first_way(const int32_t* key) const {
    const int64_t extent = max<int64_t>(1, (key[kDepth - 1] - key[0]) / (kDepth - 1)) * kDepth;
    // 32-bit division is faster than 64-bit
    return static_cast<uint32_t>(key[0]) / static_cast<uint32_t>(extent) % static_cast<uint32_t>(slots_);
  }
  int64_t second_way(int64_t way) const { return (way + slots_ / 2) % slots_; }

  // The slot that holds these 32 keys of this head, or -1.
  int64_t find(const int32_t* key) const {
    const int64_t first = first_way(key), second = second_way(first);
    return matches(first, key) ? first : matches(second, key) ? second : -1;
  }
  bool matches(int64_t slot, const int32_t* key) const {
    const int32_t* cached = keys_ + slot * kDepth;
    return tags_->head[slot] == head_ && equal(load_i(cached), load_i(key)) && equal(load_i(cached + W), load_i(key + W));
  }
  // The less recently used of the block's two ways.
  int64_t least_recent(const int32_t* key) const {
    const int64_t first = first_way(key), second = second_way(first);
    return tags_->last_use[second] < tags_->last_use[first] ? second : first;
  }

  // Packs a block; returns whether the first row operand has an infinity.
  bool pack_block(const Chunk& c, int first, Bf16* to) {
    bool has_inf = false;
    if constexpr (!uses_amx<Traits>) {
      interleave(c, first, reinterpret_cast<uint32_t*>(to));
    } else if constexpr (kParts == 1) {
      interleave_and_transpose(c, first, to);
    } else {
      const T* rows[kDepth];
      gather_rows(c, first, col_source_, rows);
      transpose_and_split(rows, to);
      for (int r = 0; r < num_row_operands_; ++r) {
        gather_rows(c, first, row_sources_[r], rows);
        const bool operand_has_inf = split_rows(rows, to + (1 + r) * operand_size());
        has_inf |= r == 0 && operand_has_inf;
      }
    }
    return has_inf;
  }

  // Packs [pair of keys][d] of bfloat16; padding keys are zero.
  void interleave(const Chunk& c, int first, uint32_t* to) const {
    for (int at = first; at < first + kDepth; at += 2, to += ld())
      interleave_rows(at < c.n ? col_source_.row(c.key[at]) : nullptr, at + 1 < c.n ? col_source_.row(c.key[at + 1]) : nullptr,
                      dim_, to, 0);
  }

  // Packs [d][key] of bfloat16: interleaves pairs of keys, then transposes them as 32-bit words.
  void interleave_and_transpose(const Chunk& c, int first, Bf16* to) {
    interleave(c, first, scratch_);
    const char* rows[kDepth / 2];
    for (int i = 0; i < kDepth / 2; ++i) rows[i] = reinterpret_cast<const char*>(scratch_ + i * ld());
    for (int64_t d = 0; d < ld(); d += 8)
      transpose_block(rows, kDepth / 2, d * 4, reinterpret_cast<char*>(to + d * kDepth), kDepth * sizeof(Bf16));
  }

  // Row pointers of a block of float32 rows: in place, or a zero-padded copy where the head dimension is not a multiple of 32
  // or the key is padding.
  void gather_rows(const Chunk& c, int first, const HeadRows<T>& source, const T** rows) {
    T* padded = reinterpret_cast<T*>(scratch_);
    for (int i = 0; i < kDepth; ++i, padded += ld()) {
      const bool valid = first + i < c.n;
      rows[i] = valid ? source.row(c.key[first + i]) : padded;
      if (valid && dim_ == ld()) continue;
      std::memset(padded, 0, ld() * sizeof(T));
      if (valid) std::memcpy(padded, rows[i], dim_ * sizeof(T));
      rows[i] = padded;
    }
  }

  // Packs [part][d][key].
  void transpose_and_split(const T* const* rows, Bf16* to) const {
    const char* at[kDepth];
    for (int i = 0; i < kDepth; ++i) at[i] = reinterpret_cast<const char*>(rows[i]);
    for (int64_t d = 0; d < ld(); d += 8) {
      alignas(64) float transposed[8 * kDepth];
      transpose_block(at, kDepth, d * 4, reinterpret_cast<char*>(transposed), kDepth * sizeof(float));
      FARLIGHT_UNROLL
      for (int i = 0; i < 8; ++i)
        store_narrow<kParts>(load(transposed + i * kDepth), load(transposed + i * kDepth + W),
                             reinterpret_cast<uint32_t*>(to + (d + i) * kDepth), part() / 2);
    }
  }

  // Packs [part][d / 32][key][d % 32]; returns whether any element is infinite.
  bool split_rows(const T* const* rows, Bf16* to) const {
    uint32_t has_inf = 0;
    for (int64_t d = 0; d < ld(); d += kDepth)
      for (int i = 0; i < kDepth; ++i) {
        const F low = load(rows[i] + d), high = load(rows[i] + d + W);
        has_inf |= inf_mask(low) | inf_mask(high);
        store_narrow<kParts>(low, high, reinterpret_cast<uint32_t*>(to + (d + i) * kDepth), part() / 2);
      }
    return has_inf != 0;
  }

  HeadRows<T> col_source_, row_sources_[kMaxRowOperands];
  int num_row_operands_;
  int64_t dim_, slots_ = 0;
  uint64_t head_;
  CacheTags* tags_ = nullptr;
  int32_t* keys_ = nullptr;
  Bf16 *blocks_ = nullptr, *uncached_ = nullptr;
  uint32_t* scratch_ = nullptr;
  bool group_has_inf_[kGroups] = {}, *cached_has_inf_ = nullptr;
};

#endif

// PackedCacheOf<Traits>: PackedCache where operand words are pairs, else NoPackedCache.
template <class Traits, bool UsesPairs>
struct PackedCacheFor {
  using type = NoPackedCache;
};
#if defined(FARLIGHT_BF16_PAIRS)
template <class Traits>
struct PackedCacheFor<Traits, true> {
  using type = PackedCache<Traits>;
};
#endif
template <class Traits>
using PackedCacheOf = typename PackedCacheFor<Traits, uses_pairs<Traits>>::type;

}  // namespace farlight::FARLIGHT_NS
