#include "label_piece.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "labels.h"

namespace farlight {

namespace {

constexpr int32_t kEmptyRow = 1 << 30;  // first slot of a row that sees nothing of a run

struct SlotRange {
  int32_t lo, hi;
};

// The tables of one variant: slots, places and masks are numbered within it.
struct VariantTables {
  std::vector<int32_t> rows, keys, start, count, lo, hi, mask;
  std::vector<int64_t> run_count;  // per tile
  Masks masks;
  ContentCounts counts;
};

class VariantPlanner {
 public:
  VariantPlanner(const LabelLinks& links, int64_t b, int64_t h, VariantTables& to) : links_(links), b_(b), h_(h), to_(to) {}

  void plan() {
    std::vector<int64_t> query(links_.n_q), key(links_.n_k);
    read_labels(query, key);
    LabelOrder order(query, key);
    find_ranges(order);
    for (int64_t c = 0; c < order.labels(); ++c)
      std::fill(label_.begin() + order.first_row[c], label_.begin() + order.first_row[c + 1], static_cast<int32_t>(c));
    to_.rows = std::move(order.rows), to_.keys = std::move(order.keys);
    const auto places = static_cast<int64_t>(to_.rows.size());
    for (int64_t place = 0; place < places; place += kRows) plan_tile(place, std::min<int64_t>(kRows, places - place));
    to_.masks.data.shrink_to_fit();  // the capacity is up to twice the size, and is held until all variants are planned
  }

 private:
  template <class T>
  const T* line(const T* table, int64_t batch, int64_t heads, int64_t n) const {
    return table + ((batch > 1 ? b_ : 0) * heads + (heads > 1 ? h_ : 0)) * n;
  }

  void read_labels(std::vector<int64_t>& query, std::vector<int64_t>& key) const {
    const int64_t* of_rows = line(links_.query, links_.query_batch, links_.query_heads, links_.n_q);
    const int64_t* of_keys = line(links_.key, links_.key_batch, links_.key_heads, links_.n_k);
    const uint8_t* real = links_.key_mask ? line(links_.key_mask, links_.mask_batch, 1, links_.n_k) : nullptr;
    for (int64_t i = 0; i < links_.n_q; ++i)
      query[i] = links_.excluded_rows && links_.excluded_rows[i] ? -1 : std::max<int64_t>(of_rows[i], -1);
    for (int64_t j = 0; j < links_.n_k; ++j)
      key[j] = (links_.excluded_keys && links_.excluded_keys[j]) || (real && !real[j]) ? -1 : std::max<int64_t>(of_keys[j], -1);
  }

  // The slots that the row at each place sees. Rows of a label ascend, so that the limits by position move forward only.
  void find_ranges(const LabelOrder& order) {
    const int64_t* starts = links_.starts ? line(links_.starts, links_.starts_batch, links_.starts_heads, links_.n_q) : nullptr;
    range_.resize(order.rows.size());
    label_.resize(order.rows.size());
    const int32_t* keys = order.keys.data();
    for (int64_t c = 0; c < order.labels(); ++c) {
      int32_t lo = order.first_key[c], hi = lo;
      const int32_t end = order.first_key[c + 1];
      for (int32_t x = order.first_row[c]; x < order.first_row[c + 1]; ++x) {
        const int64_t position = links_.q_offset + order.rows[x];
        while (lo < end && keys[lo] < position + links_.lower) ++lo;
        while (hi < end && keys[hi] <= position + links_.upper) ++hi;
        int32_t first = lo;
        if (starts && first < end && keys[first] < starts[order.rows[x]])
          first = static_cast<int32_t>(std::lower_bound(keys + first, keys + end, starts[order.rows[x]]) - keys);
        range_[x] = {first, std::max(first, hi)};
      }
    }
  }

  // The runs of one tile: consecutive rows of one label share a run.
  void plan_tile(int64_t place, int64_t count) {
    const auto runs = to_.lo.size();
    for (int64_t first = 0; first < count;) {
      int64_t last = first + 1;
      while (last < count && label_[place + last] == label_[place + first]) ++last;
      add_run(range_.data() + place, static_cast<int>(first), static_cast<int>(last), static_cast<int>(count));
      first = last;
    }
    to_.start.push_back(static_cast<int32_t>(place));
    to_.count.push_back(static_cast<int32_t>(count));
    to_.run_count.push_back(static_cast<int64_t>(to_.lo.size() - runs));
  }

  // The run of the rows [first, last) of a tile of `count` rows with these ranges.
  void add_run(const SlotRange* range, int first, int last, int count) {
    SlotRange hull{INT32_MAX, 0}, core{0, INT32_MAX};
    int rows = 0;
    for (int s = first; s < last; ++s) {
      if (range[s].lo == range[s].hi) continue;
      hull = {std::min(hull.lo, range[s].lo), std::max(hull.hi, range[s].hi)};
      core = {std::max(core.lo, range[s].lo), std::min(core.hi, range[s].hi)};
      to_.counts.pairs += range[s].hi - range[s].lo;
      ++rows;
    }
    if (!rows) return;
    to_.counts.visited += static_cast<int64_t>(hull.hi - hull.lo) * count;
    to_.lo.push_back(hull.lo);
    to_.hi.push_back(hull.hi);
    to_.mask.push_back(mask_of(range, first, last, hull, core, rows == count));
  }

  int32_t mask_of(const SlotRange* range, int first, int last, SlotRange hull, SlotRange core, bool every_row) {
    Masks& masks = to_.masks;
    const auto start = static_cast<int32_t>(masks.data.size()), number = static_cast<int32_t>(masks.kind.size());
    const bool is_whole = core.lo == hull.lo && core.hi == hull.hi;
    if (is_whole && every_row) return -1;
    if (is_whole) {
      uint32_t rows = 0;
      for (int s = first; s < last; ++s) rows |= range[s].lo < range[s].hi ? 1u << s : 0u;
      masks.data.push_back(static_cast<int32_t>(rows));
    } else {
      masks.data.resize(masks.data.size() + 2 * kRows, 0);
      int32_t* bounds = masks.data.data() + start;
      for (int s = 0; s < kRows; ++s) {
        const bool sees = s >= first && s < last && range[s].lo < range[s].hi;
        bounds[2 * s] = sees ? range[s].lo - hull.lo : kEmptyRow;
        bounds[2 * s + 1] = sees ? range[s].hi - hull.hi : 0;
      }
    }
    const bool has_core = every_row && !is_whole && core.lo < core.hi;
    masks.kind.push_back(is_whole ? kRowSet : kBounds);
    masks.start.push_back(start);
    masks.core_lo.push_back(has_core ? core.lo - hull.lo : 0);
    masks.core_hi.push_back(has_core ? core.hi - hull.hi : -kEmptyRow);
    return number;
  }

  const LabelLinks& links_;
  const int64_t b_, h_;
  VariantTables& to_;
  std::vector<SlotRange> range_;  // per place
  std::vector<int32_t> label_;    // per place
};

template <class T>
void append(std::vector<T>& to, const std::vector<T>& from, T shift = 0) {
  for (const T x : from) to.push_back(x + shift);
}

// Reserves the column for the sum of `parts`: a vector that grows holds its old and its new memory at the same time.
template <class T, class ColumnOf>
void reserve_for(const std::vector<VariantTables>& parts, std::vector<T>& to, const ColumnOf& column_of) {
  size_t size = to.size();
  for (const VariantTables& part : parts) size += column_of(part).size();
  to.reserve(size);
}

void reserve_for(const std::vector<VariantTables>& parts, Tables& tables, Piece& piece, Layer& layer) {
  using Part = VariantTables;
  const auto of = [](auto member) { return [member](const Part& part) -> const auto& { return part.*member; }; };
  const auto of_masks = [](auto member) { return [member](const Part& part) -> const auto& { return part.masks.*member; }; };
  reserve_for(parts, piece.rows, of(&Part::rows));
  reserve_for(parts, piece.start, of(&Part::start));
  reserve_for(parts, piece.count, of(&Part::count));
  reserve_for(parts, layer.keys, of(&Part::keys));
  reserve_for(parts, layer.lo, of(&Part::lo));
  reserve_for(parts, layer.hi, of(&Part::hi));
  reserve_for(parts, layer.mask, of(&Part::mask));
  reserve_for(parts, layer.indptr, of(&Part::run_count));
  reserve_for(parts, tables.masks.kind, of_masks(&Masks::kind));
  reserve_for(parts, tables.masks.start, of_masks(&Masks::start));
  reserve_for(parts, tables.masks.core_lo, of_masks(&Masks::core_lo));
  reserve_for(parts, tables.masks.core_hi, of_masks(&Masks::core_hi));
  reserve_for(parts, tables.masks.data, of_masks(&Masks::data));
}

// Copies a variant's tables behind those of the variants before it.
void append(const VariantTables& from, Tables& tables, Piece& piece, Layer& layer) {
  const auto first_slot = static_cast<int32_t>(layer.keys.size()), first_place = static_cast<int32_t>(piece.rows.size());
  Masks& masks = tables.masks;
  const auto first_mask = static_cast<int32_t>(masks.kind.size()), first_word = static_cast<int32_t>(masks.data.size());
  if (masks.data.size() + from.masks.data.size() > size_t{1} << 30) throw MalformedPlan("masks: more than 2^30 words");
  layer.entry_base.push_back(static_cast<int64_t>(piece.start.size()));
  layer.place_base.push_back(0);
  append(piece.rows, from.rows);
  append(piece.start, from.start, first_place);
  append(piece.count, from.count);
  append(layer.keys, from.keys);
  append(layer.lo, from.lo, first_slot);
  append(layer.hi, from.hi, first_slot);
  for (const int32_t mask : from.mask) layer.mask.push_back(mask < 0 ? -1 : mask + first_mask);
  for (const int64_t count : from.run_count) layer.indptr.push_back(layer.indptr.back() + count);
  append(masks.kind, from.masks.kind);
  append(masks.start, from.masks.start, first_word);
  append(masks.core_lo, from.masks.core_lo);
  append(masks.core_hi, from.masks.core_hi);
  append(masks.data, from.masks.data);
  piece.row_first.push_back(static_cast<int64_t>(piece.rows.size()));
  piece.first.push_back(static_cast<int64_t>(piece.start.size()));
}

}  // namespace

void add_label_piece(const LabelLinks& links, int64_t copies, int threads, InterruptCheck& interrupt, Tables& tables,
                     ContentCounts& counts) {
  const int64_t variants = links.batch * links.heads;
  std::vector<VariantTables> parts(variants);
  parallel_for(variants, threads, interrupt,
               [&](int64_t v) { VariantPlanner(links, v / links.heads, v % links.heads, parts[v]).plan(); });
  Piece piece;
  Layer layer;
  piece.has_rows = layer.has_keys = true;
  piece.variant.batch = layer.variant.batch = static_cast<int32_t>(links.batch);
  piece.variant.heads = layer.variant.heads = static_cast<int32_t>(links.heads);
  piece.row_first = {0};
  piece.first = {0};
  layer.indptr = {0};
  reserve_for(parts, tables, piece, layer);
  for (int64_t v = 0; v < variants; ++v) {
    layer.variant.of.push_back(static_cast<int32_t>(v));
    piece.variant.of.push_back(static_cast<int32_t>(v));
    append(parts[v], tables, piece, layer);
    counts.pairs += parts[v].counts.pairs * copies;
    counts.visited += parts[v].counts.visited * copies;
    parts[v] = VariantTables();
  }
  piece.part.assign(piece.start.size(), 0);
  piece.parts.assign(piece.start.size(), 1);
  piece.layers.push_back(std::move(layer));
  tables.pieces.push_back(std::move(piece));
}

}  // namespace farlight
