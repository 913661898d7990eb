// Walking over the keys of a tile: runs of all layers, laid end to end and handed out some dozen keys at a time, each with
// a word that says which of the tile's rows see it.
#pragma once

#include "../views.h"
#include "isa.h"

namespace farlight::FARLIGHT_NS {

constexpr int kKeys = 64 * kApart / kM * kM;  // keys in a chunk, at most: 64 that are summed into one number
constexpr int kDeep = 32;              // keys in a group, of which a thread keeps operands (columns.h)
constexpr uint32_t kEvery = 0xffffffffu;
constexpr int kHalf = kRows / 2;       // a half of the rows that sees nothing of a block is left out of its products
constexpr uint32_t kBoth = 3;          // halves

// The rows of one turn: at most kRows of a tile entry.
struct Tile {
  const PlanView* plan;
  const PieceView* piece;
  Item item;
  int skip, count;  // which rows of the entry
  int64_t row[kRows];

  Tile(const PlanView& of, const Item& at, int first_row)
      : plan(&of), piece(&of.pieces[at.piece]), item(at), skip(first_row) {
    count = least(piece->count[at.entry] - first_row, kRows);
    const int64_t place = piece->start[at.entry] + first_row;
    for (int s = 0; s < count; ++s) row[s] = piece->rows ? piece->rows[place + s] : place + s;
  }

  int32_t variant(const LayerView& layer) const {
    return variant_of(layer.variant, layer.variant_batch, layer.variant_heads, item.batch, item.head);
  }
  bool has_points(const LayerView& layer) const { return layer.point_indptr && piece->part[item.entry] == 0; }
  // The points of row s: from `first` to before `last` in layer.point_keys.
  void points(const LayerView& layer, int s, int64_t& first, int64_t& last) const {
    const int64_t place = layer.place_base[variant(layer)] + piece->start[item.entry] + skip + s;
    first = layer.point_indptr[place];
    last = layer.point_indptr[place + 1];
  }
  bool any_points() const {
    for (int i = 0; i < piece->layer_count; ++i) {
      const LayerView& layer = piece->layers[i];
      if (!has_points(layer)) continue;
      const int64_t place = layer.place_base[variant(layer)] + piece->start[item.entry] + skip;
      if (layer.point_indptr[place] < layer.point_indptr[place + count]) return true;
    }
    return false;
  }
};

// How many keys an item visits, points apart.
inline int64_t keys_of(const PlanView& plan, const Item& item) {
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

// Whether rows that see nothing in an item's tile keep what they have, rather than to be told so.
FARLIGHT_INLINE bool leaves(const Call& call, const Item& item) {
  return call.leaves && (call.joins || !call.plan->pieces[item.piece].sure[item.entry]);
}

// Keys of a chunk, in whole blocks, of which the same halves of the rows see something: bit 0 the first, bit 1 the second.
struct Span {
  int first, last;  // to before `last`
  uint32_t halves;
};
struct Spans {
  int count;
  Span span[kKeys / kM];
};

// Takes the register blocks of lanes that belong to these halves: take.operator()<V>(g) for V vectors from lane g on.
template <class Take>
FARLIGHT_INLINE void for_lanes(uint32_t halves, int lanes, Take&& take) {
  if constexpr (kV * W > kHalf) {
    if (halves == kBoth) take.template operator()<kV>(0);
    else take.template operator()<kV / 2>(halves == 1 ? 0 : kHalf);
  } else {
    for (int g = 0; g < lanes; g += kV * W)
      if (halves >> (g / kHalf) & 1) take.template operator()<kV>(g);
  }
}

struct Chunk {
  int n;                             // keys
  int blocks;                        // of kM keys; the last is filled up with copies of a key that no row sees
  int32_t key[kKeys];
  uint32_t seen[kKeys];              // bit s: row s sees the key
  bool masked[kKeys / kM];           // some row does not see some key of the block
  bool mixed[kKeys / kM];            // the block's keys might not be distinct
  Spans spans;                       // of all keys that some row sees
};

class Walk {
 public:
  // Chunks hold at most `most` keys, and are filled up to a multiple of `group`.
  Walk(const Tile& tile, int most, int group) : tile_(tile), most_(most), group_(group), layer_(-1), run_(0), stop_(0), slot_(0), hi_(0) { advance(); }

  // The next keys; false when there are none.
  bool next(Chunk& c) {
    c.n = 0;
    for (int i = 0; i < kKeys / kM; ++i) c.mixed[i] = c.masked[i] = false;
    while (c.n < most_ && more_) {
      const int take = least(most_ - c.n, hi_ - slot_);
      if (c.n % kM) c.mixed[c.n / kM] = true;
      if (at_->keys) {
        for (int i = 0; i < take; ++i) c.key[c.n + i] = at_->keys[slot_ + i];
        for (int i = c.n / kM; i * kM < c.n + take; ++i) c.mixed[i] = true;
      } else {
        for (int i = 0; i < take; ++i) c.key[c.n + i] = slot_ + i;
      }
      mark(c, take);
      c.n += take;
      slot_ += take;
      if (slot_ == hi_) advance();
    }
    if (c.n == 0) return false;
    c.blocks = (c.n + group_ - 1) / group_ * (group_ / kM);
    for (int i = c.n; i < c.blocks * kM; ++i) {
      c.key[i] = c.key[c.n - 1];
      c.seen[i] = 0;
      c.masked[i / kM] = true;
    }
    find_spans(c);
    return true;
  }

 private:
  // To the next run that is not empty.
  void advance() {
    for (++run_;; ++run_) {
      while (layer_ < 0 || run_ >= stop_) {
        if (++layer_ >= tile_.piece->layer_count) {
          more_ = false;
          return;
        }
        at_ = &tile_.piece->layers[layer_];
        const PieceView& piece = *tile_.piece;
        const int32_t v = variant_of(piece.variant, piece.variant_batch, piece.variant_heads, tile_.item.batch, tile_.item.head);
        const int64_t t = at_->entry_base[tile_.variant(*at_)] + tile_.item.entry - piece.first[v];
        run_ = at_->indptr[t];
        stop_ = at_->indptr[t + 1];
      }
      slot_ = lo_ = at_->lo[run_];
      hi_ = at_->hi[run_];
      if (lo_ < hi_) break;
    }
    more_ = true;
    open_mask(at_->mask[run_]);
  }

  void open_mask(int32_t m) {
    mask_ = m;
    if (m < 0) return;
    const MaskView& masks = tile_.plan->masks;
    kind_ = masks.kind[m];
    core_lo_ = static_cast<int64_t>(lo_) + masks.core_lo[m];
    core_hi_ = static_cast<int64_t>(hi_) + masks.core_hi[m];
    const int32_t* data = masks.data + masks.start[m];
    for (int s = 0; s < kRows; ++s) {
      const bool real = s < tile_.count;
      if (kind_ == kBounds) {
        first_[s] = real ? data[2 * (tile_.skip + s)] : 0x7fffffff;
        last_[s] = real ? data[2 * (tile_.skip + s) + 1] : 0;
      } else {
        for (int w = 0; w < kBitsWords; ++w) word_[w][s] = real ? data[(tile_.skip + s) * kBitsWords + w] : 0;
      }
    }
  }

  uint32_t rows_seeing(int32_t slot) const {
    uint32_t bits = 0;
    if (kind_ == kBounds) {
      const I from_lo = all_i(static_cast<uint32_t>(slot - lo_)), from_hi = all_i(static_cast<uint32_t>(slot - hi_));
      for (int g = 0; g < kRows; g += W) {
        const uint32_t early = less(from_lo, load_i(first_ + g)), late = ~less(from_hi, load_i(last_ + g));
        bits |= (~(early | late) & ((1u << W) - 1)) << g;
      }
    } else {
      const int32_t column = slot - lo_;
      const I bit = all_i(1u << (column % 32));
      for (int g = 0; g < kRows; g += W) bits |= share_bits(bit, load_i(word_[column / 32] + g)) << g;
    }
    return bits;
  }

  void mark(Chunk& c, int take) const {
    uint32_t* seen = c.seen + c.n;
    int from = 0, to = take;  // seen by every row
    if (mask_ >= 0) {
      from = static_cast<int>(most<int64_t>(0, least<int64_t>(core_lo_ - slot_, take)));
      to = static_cast<int>(most<int64_t>(from, least<int64_t>(core_hi_ - slot_, take)));
    }
    const auto ask = [&](int i) {
      seen[i] = rows_seeing(slot_ + i);
      if (seen[i] != kEvery) c.masked[(c.n + i) / kM] = true;
    };
    for (int i = 0; i < from; ++i) ask(i);
    for (int i = from; i < to; ++i) seen[i] = kEvery;
    for (int i = to; i < take; ++i) ask(i);
  }

  void find_spans(Chunk& c) const {
    const uint32_t halves = tile_.count > kHalf ? kBoth : 1;
    Spans& to = c.spans;
    bool masked = false;
    for (int i = 0; i < kKeys / kM; ++i) masked |= c.masked[i];
    to.count = masked ? 0 : 1;
    to.span[0] = {0, c.n, halves};
    if (!masked) return;
    for (int first = 0; first < c.n; first += kM) {
      uint32_t rows = c.masked[first / kM] ? 0 : kEvery;
      for (int i = 0; rows != kEvery && i < kM; ++i) rows |= c.seen[first + i];
      const uint32_t here = halves & ((rows << kHalf ? 1 : 0) | (rows >> kHalf ? 2 : 0));
      if (here == 0) continue;
      const int last = least(first + kM, c.n);
      if (to.count && to.span[to.count - 1].last == first && to.span[to.count - 1].halves == here) to.span[to.count - 1].last = last;
      else to.span[to.count++] = {first, last, here};
    }
  }

  const Tile& tile_;
  const LayerView* at_ = nullptr;
  int most_, group_, layer_;
  int64_t run_, stop_;
  int32_t slot_, lo_ = 0, hi_;
  bool more_ = false;
  int32_t mask_ = -1, kind_ = kBounds;
  int64_t core_lo_ = 0, core_hi_ = 0;
  int32_t first_[kRows], last_[kRows];
  int32_t word_[kBitsWords][kRows];
};

}  // namespace farlight::FARLIGHT_NS
