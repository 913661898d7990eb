#include "sorted_piece.h"

#include <algorithm>

namespace farlight {

namespace {

constexpr int32_t kEmptyRow = 1 << 30;  // first slot of a row that sees nothing of a run

// Appends a mask of the given kind and returns its number.
int32_t add_mask(Masks& masks, int32_t kind, int64_t words, int32_t core_hi) {
  if (masks.data.size() + words > size_t{1} << 30) throw MalformedPlan("masks: more than 2^30 words");
  masks.kind.push_back(kind);
  masks.start.push_back(static_cast<int32_t>(masks.data.size()));
  masks.core_lo.push_back(0);
  masks.core_hi.push_back(core_hi);
  masks.data.resize(masks.data.size() + words, 0);
  return static_cast<int32_t>(masks.kind.size()) - 1;
}

// Writes the runs of one tile: consecutive rows whose ranges begin at the same slot (rows of one label) share a run.
class TileRuns {
 public:
  TileRuns(const int64_t* lo, const int64_t* hi, int count, int64_t first_slot, Tables& tables, Layer& layer)
      : lo_(lo), hi_(hi), count_(count), first_slot_(first_slot), tables_(tables), layer_(layer) {}

  void write(ContentCounts& counts) {
    for (int first = 0; first < count_;) {
      int last = first + 1;
      while (last < count_ && lo_[last] == lo_[first]) ++last;
      const int64_t end = *std::max_element(hi_ + first, hi_ + last);
      if (end > lo_[first]) {
        layer_.lo.push_back(static_cast<int32_t>(first_slot_ + lo_[first]));
        layer_.hi.push_back(static_cast<int32_t>(first_slot_ + end));
        layer_.mask.push_back(mask_of(first, last, end));
        counts.visited += (end - lo_[first]) * count_;
        for (int s = first; s < last; ++s) counts.pairs += std::max<int64_t>(0, hi_[s] - lo_[s]);
      }
      first = last;
    }
  }

 private:
  int32_t mask_of(int first, int last, int64_t end) {
    const int64_t least = *std::min_element(hi_ + first, hi_ + last);
    const bool every_row = first == 0 && last == count_;
    if (least == end) {
      if (every_row) return -1;
      const int32_t mask = add_mask(tables_.masks, kRowSet, (tables_.tile + 31) / 32, -kEmptyRow);
      for (int s = first; s < last; ++s) tables_.masks.data[tables_.masks.start[mask] + s / 32] |= static_cast<int32_t>(1u << s % 32);
      return mask;
    }
    const auto core = static_cast<int32_t>(every_row ? std::max(least, lo_[first]) - end : -kEmptyRow);
    const int32_t mask = add_mask(tables_.masks, kBounds, 2 * tables_.tile, core);
    int32_t* bounds = tables_.masks.data.data() + tables_.masks.start[mask];
    for (int64_t s = 0; s < tables_.tile; ++s) {
      const bool sees = s >= first && s < last && hi_[s] > lo_[s];
      bounds[2 * s] = sees ? 0 : kEmptyRow;
      bounds[2 * s + 1] = sees ? static_cast<int32_t>(hi_[s] - end) : 0;
    }
    return mask;
  }

  const int64_t *lo_, *hi_;
  const int count_;
  const int64_t first_slot_;
  Tables& tables_;
  Layer& layer_;
};

}  // namespace

void add_sorted_piece(const SortedLinks& links, int64_t copies, Tables& tables, ContentCounts& counts) {
  const int64_t variants = links.batch * links.heads, tile = tables.tile;
  Piece piece;
  Layer layer;
  piece.has_rows = layer.has_keys = true;
  piece.variant.batch = layer.variant.batch = static_cast<int32_t>(links.batch);
  piece.variant.heads = layer.variant.heads = static_cast<int32_t>(links.heads);
  piece.row_first = {0};
  piece.first = {0};
  layer.indptr = {0};
  ContentCounts sums;
  for (int64_t v = 0; v < variants; ++v) {
    const int64_t first_slot = static_cast<int64_t>(layer.keys.size()), num_rows = links.row_count[v];
    layer.variant.of.push_back(static_cast<int32_t>(v));
    piece.variant.of.push_back(static_cast<int32_t>(v));
    layer.entry_base.push_back(static_cast<int64_t>(piece.start.size()));
    layer.place_base.push_back(0);
    layer.keys.insert(layer.keys.end(), links.keys + v * links.n_k, links.keys + v * links.n_k + links.key_count[v]);
    piece.rows.insert(piece.rows.end(), links.rows + v * links.n_q, links.rows + v * links.n_q + num_rows);
    for (int64_t place = 0; place < num_rows; place += tile) {
      const int64_t count = std::min(tile, num_rows - place), at = v * links.n_q + place;
      piece.start.push_back(static_cast<int32_t>(piece.row_first.back() + place));
      piece.count.push_back(static_cast<int32_t>(count));
      TileRuns(links.lo + at, links.hi + at, static_cast<int>(count), first_slot, tables, layer).write(sums);
      layer.indptr.push_back(static_cast<int64_t>(layer.lo.size()));
    }
    piece.row_first.push_back(static_cast<int64_t>(piece.rows.size()));
    piece.first.push_back(static_cast<int64_t>(piece.start.size()));
  }
  piece.part.assign(piece.start.size(), 0);
  piece.parts.assign(piece.start.size(), 1);
  piece.layers.push_back(std::move(layer));
  tables.pieces.push_back(std::move(piece));
  counts.pairs += sums.pairs * copies;
  counts.visited += sums.visited * copies;
}

}  // namespace farlight
