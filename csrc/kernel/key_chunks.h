// Iteration over the keys of a row block, in chunks of up to kChunkKeys keys.
//
// KeyWalk concatenates the runs of all layers of a tile entry and cuts them into chunks: each chunk lists key indices, a 32-bit
// row mask per key (bit s: query row s sees the key), and per block of kM keys whether any mask bit is 0. Blocks without a zero
// bit skip masking entirely. A run may start at any key; chunks are independent of run boundaries.
#pragma once

#include "../views.h"
#include "isa.h"

namespace farlight::FARLIGHT_NS {

constexpr int kChunkKeys = 64 * kAccumulators / kM * kM;  // keys in a chunk, at most: 64 per accumulator
// keys in a group: summed dimension of a tile product, and unit of the packed cache (packed_cache.h)
constexpr int kDepth = 32;
constexpr uint32_t kAllRows = 0xffffffffu;  // row mask: every row sees the key
constexpr int kHalfRows = kRows / 2;        // products skip a half of the rows that sees nothing of a key block
constexpr uint32_t kBothHalves = 3;         // bit 0: rows 0-15, bit 1: rows 16-31

// A row block: up to kRows consecutive query rows of a tile entry, the unit that one pass of a kernel holds in vector lanes.
struct RowBlock {
  const PlanView* plan;
  const PieceView* piece;
  WorkItem item;
  int first_row, count;  // the rows of the entry: [first_row, first_row + count)
  int64_t row[kRows];    // their query row indices

  RowBlock(const PlanView& plan_view, const WorkItem& work_item, int first_row)
      : plan(&plan_view),
        piece(&plan_view.pieces[work_item.piece]),
        item(work_item),
        first_row(first_row) {
    count = min(piece->count[work_item.entry] - first_row, kRows);
    const int64_t place = piece->start[work_item.entry] + first_row;
    for (int s = 0; s < count; ++s) row[s] = piece->rows ? piece->rows[place + s] : place + s;
  }

  // The layer's table variant for this (batch item, head).
  int32_t variant(const LayerView& layer) const {
    return variant_of(layer.variant, layer.variant_batch, layer.variant_heads, item.batch, item.head);
  }
  // Whether the layer has gathered keys. Of a split-K tile, part 0 handles them.
  bool has_gathered(const LayerView& layer) const { return layer.point_indptr && piece->part[item.entry] == 0; }
  // Gathered keys of row s: indices [first, last) into layer.point_keys.
  void gathered_range(const LayerView& layer, int s, int64_t& first, int64_t& last) const {
    const int64_t place = layer.place_base[variant(layer)] + piece->start[item.entry] + first_row + s;
    first = layer.point_indptr[place];
    last = layer.point_indptr[place + 1];
  }
  // Whether any row of the block has a gathered key.
  bool any_gathered() const {
    for (int i = 0; i < piece->layer_count; ++i) {
      const LayerView& layer = piece->layers[i];
      if (!has_gathered(layer)) continue;
      const int64_t place = layer.place_base[variant(layer)] + piece->start[item.entry] + first_row;
      if (layer.point_indptr[place] < layer.point_indptr[place + count]) return true;
    }
    return false;
  }
};

// Keys of the runs that an item visits, gathered keys not counted.
inline int64_t visited_keys(const PlanView& plan, const WorkItem& item) {
  const PieceView& piece = plan.pieces[item.piece];
  const int32_t v = variant_of(piece.variant, piece.variant_batch, piece.variant_heads, item.batch, item.head);
  int64_t keys = 0;
  for (int i = 0; i < piece.layer_count; ++i) {
    const LayerView& layer = piece.layers[i];
    const int32_t w = variant_of(layer.variant, layer.variant_batch, layer.variant_heads, item.batch, item.head);
    const int64_t t = layer.entry_base[w] + item.entry - piece.first[v];
    for (int64_t run = layer.indptr[t]; run < layer.indptr[t + 1]; ++run) keys += layer.hi[run] - layer.lo[run];
  }
  return keys;
}

// Whether rows of the item's tile that see no key keep their present result, instead of being written as empty.
FARLIGHT_INLINE bool keep_masked_rows(const Call& call, const WorkItem& item) {
  return call.keep_masked_rows && (call.merges || !call.plan->pieces[item.piece].every_row_visible[item.entry]);
}

// Keys [first, last) of a chunk, in whole blocks of kM, of which the same halves of the rows see something.
struct Span {
  int first, last;
  uint32_t halves;
};
// The spans of a chunk, in order of keys.
struct Spans {
  int count;
  Span span[kChunkKeys / kM];
};

// Calls body.operator()<V>(g) for the register blocks of V vectors of lanes, from lane g on, that cover the given halves.
template <class Body>
FARLIGHT_INLINE void for_lanes(uint32_t halves, int lanes, Body&& body) {
  if constexpr (kV * W > kHalfRows) {
    if (halves == kBothHalves) body.template operator()<kV>(0);
    else body.template operator()<kV / 2>(halves == 1 ? 0 : kHalfRows);
  } else {
    for (int g = 0; g < lanes; g += kV * W)
      if (halves >> (g / kHalfRows) & 1) body.template operator()<kV>(g);
  }
}

// The next keys of the walk.
struct Chunk {
  int n;       // keys
  int blocks;  // blocks of kM keys; the last is padded with copies of a key that no row sees
  int32_t key[kChunkKeys];
  uint32_t row_mask[kChunkKeys];          // bit s: row s sees the key
  bool masked[kChunkKeys / kM];           // some row does not see some key of the block
  bool maybe_duplicate[kChunkKeys / kM];  // keys of the block may repeat (several runs or a key table)
  Spans spans;                            // the chunk's keys that at least one row sees
};

// The walk over the runs of all layers of a row block.
class KeyWalk {
 public:
  // A chunk has at most `max_keys` keys and is padded to a multiple of `group`.
  KeyWalk(const RowBlock& row_block, int max_keys, int group)
      : row_block_(row_block),
        max_keys_(max_keys),
        group_(group),
        layer_(-1),
        run_(0),
        run_end_(0),
        slot_(0),
        hi_(0) {
    advance();
  }

  // Fills the next chunk; false at the end.
  bool next(Chunk& c) {
    c.n = 0;
    for (int i = 0; i < kChunkKeys / kM; ++i) c.maybe_duplicate[i] = c.masked[i] = false;
    while (c.n < max_keys_ && has_run_) {
      const int count = min(max_keys_ - c.n, hi_ - slot_);
      if (c.n % kM) c.maybe_duplicate[c.n / kM] = true;
      if (layer_view_->keys) {
        for (int i = 0; i < count; ++i) c.key[c.n + i] = layer_view_->keys[slot_ + i];
        for (int i = c.n / kM; i * kM < c.n + count; ++i) c.maybe_duplicate[i] = true;
      } else {
        for (int i = 0; i < count; ++i) c.key[c.n + i] = slot_ + i;
      }
      mark_visibility(c, count);
      c.n += count;
      slot_ += count;
      if (slot_ == hi_) advance();
    }
    if (c.n == 0) return false;
    c.blocks = (c.n + group_ - 1) / group_ * (group_ / kM);
    for (int i = c.n; i < c.blocks * kM; ++i) {
      c.key[i] = c.key[c.n - 1];
      c.row_mask[i] = 0;
      c.masked[i / kM] = true;
    }
    find_spans(c);
    return true;
  }

 private:
  // Advances to the next nonempty run.
  void advance() {
    for (++run_;; ++run_) {
      while (layer_ < 0 || run_ >= run_end_) {
        if (++layer_ >= row_block_.piece->layer_count) {
          has_run_ = false;
          return;
        }
        layer_view_ = &row_block_.piece->layers[layer_];
        const PieceView& piece = *row_block_.piece;
        const int32_t v =
            variant_of(piece.variant, piece.variant_batch, piece.variant_heads, row_block_.item.batch, row_block_.item.head);
        const int64_t t = layer_view_->entry_base[row_block_.variant(*layer_view_)] + row_block_.item.entry - piece.first[v];
        run_ = layer_view_->indptr[t];
        run_end_ = layer_view_->indptr[t + 1];
      }
      slot_ = lo_ = layer_view_->lo[run_];
      hi_ = layer_view_->hi[run_];
      if (lo_ < hi_) break;
    }
    has_run_ = true;
    open_mask(layer_view_->mask[run_]);
  }

  // Loads the mask of a run, transposed to lanes: per-row bounds, or per-row bit words. Padding rows see nothing.
  void open_mask(int32_t m) {
    mask_ = m;
    if (m < 0) return;
    const MaskView& masks = row_block_.plan->masks;
    kind_ = masks.kind[m];
    core_lo_ = static_cast<int64_t>(lo_) + masks.core_lo[m];
    core_hi_ = static_cast<int64_t>(hi_) + masks.core_hi[m];
    const int32_t* data = masks.data + masks.start[m];
    if (kind_ == kRowSet) {
      const uint32_t in_block = row_block_.count == kRows ? kAllRows : (1u << row_block_.count) - 1;
      row_set_ = static_cast<uint32_t>(data[row_block_.first_row / kRows]) & in_block;
      return;
    }
    for (int s = 0; s < kRows; ++s) {
      const bool in_block = s < row_block_.count;
      if (kind_ == kBounds) {
        first_[s] = in_block ? data[2 * (row_block_.first_row + s)] : 0x7fffffff;
        last_[s] = in_block ? data[2 * (row_block_.first_row + s) + 1] : 0;
      } else {
        for (int w = 0; w < kBitsWords; ++w) word_[w][s] = in_block ? data[(row_block_.first_row + s) * kBitsWords + w] : 0;
      }
    }
  }

  // The row mask of one slot of the current run.
  uint32_t visible_rows(int32_t slot) const {
    uint32_t bits = 0;
    if (kind_ == kBounds) {
      const I from_lo = broadcast_i(static_cast<uint32_t>(slot - lo_)),
              from_hi = broadcast_i(static_cast<uint32_t>(slot - hi_));
      for (int g = 0; g < kRows; g += W) {
        const uint32_t early = less_i32(from_lo, load_i(first_ + g)), late = ~less_i32(from_hi, load_i(last_ + g));
        bits |= (~(early | late) & ((1u << W) - 1)) << g;
      }
    } else {
      const int32_t column = slot - lo_;
      const I bit = broadcast_i(1u << (column % 32));
      for (int g = 0; g < kRows; g += W) bits |= test_bits(bit, load_i(word_[column / 32] + g)) << g;
    }
    return bits;
  }

  // Row masks of the next `count` slots of the run. Inside the run's core every row sees every key and no test is needed.
  void mark_visibility(Chunk& c, int count) const {
    uint32_t* row_mask = c.row_mask + c.n;
    if (mask_ >= 0 && kind_ == kRowSet) {
      for (int i = 0; i < count; ++i) row_mask[i] = row_set_;
      for (int i = c.n / kM; i * kM < c.n + count; ++i) c.masked[i] |= row_set_ != kAllRows;
      return;
    }
    int from = 0, to = count;  // slots inside the core
    if (mask_ >= 0) {
      from = static_cast<int>(max<int64_t>(0, min<int64_t>(core_lo_ - slot_, count)));
      to = static_cast<int>(max<int64_t>(from, min<int64_t>(core_hi_ - slot_, count)));
    }
    const auto test = [&](int i) {
      row_mask[i] = visible_rows(slot_ + i);
      if (row_mask[i] != kAllRows) c.masked[(c.n + i) / kM] = true;
    };
    for (int i = 0; i < from; ++i) test(i);
    for (int i = from; i < to; ++i) row_mask[i] = kAllRows;
    for (int i = to; i < count; ++i) test(i);
  }

  // Groups consecutive blocks that the same halves of the rows see.
  void find_spans(Chunk& c) const {
    const uint32_t halves = row_block_.count > kHalfRows ? kBothHalves : 1;
    Spans& to = c.spans;
    bool masked = false;
    for (int i = 0; i < kChunkKeys / kM; ++i) masked |= c.masked[i];
    to.count = masked ? 0 : 1;
    to.span[0] = {0, c.n, halves};
    if (!masked) return;
    for (int first = 0; first < c.n; first += kM) {
      uint32_t rows = c.masked[first / kM] ? 0 : kAllRows;
      for (int i = 0; rows != kAllRows && i < kM; ++i) rows |= c.row_mask[first + i];
      const uint32_t visible_halves = halves & ((rows << kHalfRows ? 1 : 0) | (rows >> kHalfRows ? 2 : 0));
      if (visible_halves == 0) continue;
      const int last = min(first + kM, c.n);
      if (to.count && to.span[to.count - 1].last == first && to.span[to.count - 1].halves == visible_halves)
        to.span[to.count - 1].last = last;
      else to.span[to.count++] = {first, last, visible_halves};
    }
  }

  const RowBlock& row_block_;
  const LayerView* layer_view_ = nullptr;
  int max_keys_, group_, layer_;
  int64_t run_, run_end_;
  int32_t slot_, lo_ = 0, hi_;
  bool has_run_ = false;
  int32_t mask_ = -1, kind_ = kBounds;
  int64_t core_lo_ = 0, core_hi_ = 0;
  uint32_t row_set_ = 0;
  int32_t first_[kRows], last_[kRows];
  int32_t word_[kBitsWords][kRows];
};

}  // namespace farlight::FARLIGHT_NS
