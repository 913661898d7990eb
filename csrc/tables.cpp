// Validation of a plan's tables, the fields derived from them, and their views (tables.h). Error texts name piece, layer and
// rule.
#include "tables.h"

#include <algorithm>

namespace farlight {

namespace {

constexpr int64_t kIndexLimit = int64_t{1} << 30;  // rows, keys, slots, places: the sum of two indices fits 32 bits

// Throws MalformedPlan("<where>: <what>") unless good.
void require(bool good, const std::string& where, const char* what) {
  if (!good) throw MalformedPlan(where + ": " + what);
}

template <class T>
int64_t size(const std::vector<T>& v) {
  return static_cast<int64_t>(v.size());
}

// CSR pointers: 0 = p[0] <= p[1] <= ... <= p[last] = end.
void check_pointers(const std::vector<int64_t>& p, int64_t end, const std::string& where, const char* what) {
  require(!p.empty() && p.front() == 0 && p.back() == end && std::is_sorted(p.begin(), p.end()), where, what);
}

// Checks the shape and range of a variant table; `count`: number of variants.
void check_variants(const Variants& v, int64_t count, const std::string& where) {
  require(v.batch >= 1 && v.heads >= 1 && size(v.of) == int64_t{v.batch} * v.heads, where, "variant has the wrong shape");
  for (const int32_t x : v.of) require(x >= 0 && x < count, where, "a variant does not exist");
}

}  // namespace

void Tables::finish() {
  require(tile >= 1 && tile <= 1024, "plan", "tile is outside 1 ... 1024");
  require(n_q >= 0 && n_q < kIndexLimit && n_k >= 0 && n_k < kIndexLimit, "plan", "more than 2^30 rows or keys");
  check_masks();
  piece_views_.clear();
  layer_views_.clear();
  for (size_t i = 0; i < pieces.size(); ++i) {
    const std::string where = "piece " + std::to_string(i);
    check_piece(pieces[i], where);
    for (size_t j = 0; j < pieces[i].layers.size(); ++j)
      check_layer(pieces[i], pieces[i].layers[j], where + ", layer " + std::to_string(j));
    std::vector<LayerView> layers;
    for (const Layer& l : pieces[i].layers)
      layers.push_back({l.entry_base.data(), l.place_base.data(), l.indptr.data(), l.lo.data(), l.hi.data(), l.mask.data(),
                        l.has_keys ? l.keys.data() : nullptr, l.has_points ? l.point_indptr.data() : nullptr,
                        l.point_keys.data(), l.variant.of.data(), l.variant.batch, l.variant.heads});
    layer_views_.push_back(std::move(layers));
  }
  find_visible_rows();
  for (size_t i = 0; i < pieces.size(); ++i) {
    const Piece& p = pieces[i];
    piece_views_.push_back({p.has_rows ? p.rows.data() : nullptr, p.first.data(), p.start.data(), p.count.data(), p.part.data(),
                            p.parts.data(), p.slot.data(), p.variant.of.data(), p.variant.batch, p.variant.heads, p.slots,
                            p.groups, p.group.data(), p.every_row_visible.data(), layer_views_[i].data(),
                            static_cast<int32_t>(layer_views_[i].size())});
  }
  covers_all_rows_ = pieces.size() == 1;
  if (covers_all_rows_) {
    // Rows of a variant are distinct and its tiles do not overlap (both validated), so counting rows is enough.
    const Piece& p = pieces[0];
    for (size_t v = 0; v + 1 < p.first.size(); ++v) {
      int64_t rows = 0;
      for (int64_t e = p.first[v]; e < p.first[v + 1]; ++e) rows += p.part[e] == 0 ? p.count[e] : 0;
      covers_all_rows_ = covers_all_rows_ && rows == n_q;
    }
  }
  if (covers_all_rows_ && !overlapping) unwritten_rows_.clear();
  view_ = {piece_views_.data(),
           {masks.kind.data(), masks.start.data(), masks.core_lo.data(), masks.core_hi.data(), masks.data.data()},
           static_cast<int32_t>(pieces.size()),
           static_cast<int32_t>(tile),
           n_q,
           n_k,
           q_offset};
}

// Marks tiles of which every row sees at least one key, by a nonempty run without a mask. Only where batch items and heads
// share one variant; otherwise nothing is marked, which is safe.
void Tables::find_visible_rows() {
  std::vector<bool> visible(n_q, false);
  for (Piece& p : pieces) {
    const int64_t entries = size(p.start);
    p.every_row_visible.assign(entries, 0);
    bool single_variant = p.first.size() == 2;
    for (const Layer& layer : p.layers) single_variant = single_variant && layer.entry_base.size() == 1;
    if (!single_variant) continue;
    for (int64_t e = 0; e < entries; e += p.parts[e]) {
      bool every_row_visible = false;
      for (const Layer& l : p.layers)
        for (int64_t t = e; t < e + p.parts[e] && !every_row_visible; ++t)
          for (int64_t r = l.indptr[l.entry_base[0] + t]; r < l.indptr[l.entry_base[0] + t + 1] && !every_row_visible; ++r)
            every_row_visible = l.mask[r] < 0 && l.lo[r] < l.hi[r];
      if (!every_row_visible) continue;
      for (int64_t t = e; t < e + p.parts[e]; ++t) p.every_row_visible[t] = 1;
      for (int64_t i = p.start[e]; i < int64_t{p.start[e]} + p.count[e]; ++i) visible[p.has_rows ? p.rows[i] : i] = true;
    }
  }
  unwritten_rows_.clear();
  for (int64_t i = 0; i < n_q; ++i) {
    if (visible[i] && !overlapping) continue;
    if (unwritten_rows_.empty() || unwritten_rows_.back().second < i) unwritten_rows_.push_back({i, i});
    unwritten_rows_.back().second = i + 1;
  }
}

int64_t Tables::bytes() const {
  const auto sum_bytes = [](const auto&... v) { return (bytes_of(v) + ...); };
  int64_t sum =
      static_cast<int64_t>(sizeof(*this)) + sum_bytes(masks.kind, masks.start, masks.core_lo, masks.core_hi, masks.data, pieces,
                                                      unwritten_rows_, piece_views_, layer_views_);
  for (const auto& views : layer_views_) sum += bytes_of(views);
  for (const Piece& p : pieces) {
    sum += sum_bytes(p.variant.of, p.rows, p.row_first, p.first, p.start, p.count, p.part, p.parts, p.layers,
                     p.every_row_visible, p.slot, p.group);
    for (const Layer& l : p.layers)
      sum += sum_bytes(l.variant.of, l.entry_base, l.place_base, l.indptr, l.lo, l.hi, l.mask, l.keys, l.point_indptr,
                       l.point_keys);
  }
  return sum;
}

void Tables::dense(int64_t batch, int64_t heads, uint8_t* mask) const {
  const auto sees = [&](int32_t m, int64_t row, int64_t lo, int64_t hi, int64_t slot) {
    if (m < 0) return true;
    const int32_t* data = masks.data.data() + masks.start[m];
    if (masks.kind[m] == kBounds) return slot >= lo + data[2 * row] && slot < hi + data[2 * row + 1];
    if (masks.kind[m] == kRowSet) return (data[row / 32] >> row % 32 & 1) != 0;
    return (data[row * kBitsWords + (slot - lo) / 32] >> (slot - lo) % 32 & 1) != 0;
  };
  for (const PieceView& p : piece_views_)
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t h = 0; h < heads; ++h) {
        const int32_t v = variant_of(p.variant, p.variant_batch, p.variant_heads, b, h);
        for (int64_t e = p.first[v]; e < p.first[v + 1]; ++e)
          for (const LayerView* l = p.layers; l < p.layers + p.layer_count; ++l) {
            const int32_t w = variant_of(l->variant, l->variant_batch, l->variant_heads, b, h);
            const int64_t t = l->entry_base[w] + e - p.first[v];
            for (int64_t s = 0; s < p.count[e]; ++s) {
              const int64_t place = p.start[e] + s, row = p.rows ? p.rows[place] : place;
              uint8_t* to = mask + ((b * heads + h) * n_q + row) * n_k;
              for (int64_t r = l->indptr[t]; r < l->indptr[t + 1]; ++r)
                for (int64_t slot = l->lo[r]; slot < l->hi[r]; ++slot)
                  if (sees(l->mask[r], s, l->lo[r], l->hi[r], slot)) ++to[l->keys ? l->keys[slot] : slot];
              if (!l->point_indptr || p.part[e]) continue;
              const int64_t* range = &l->point_indptr[l->place_base[w] + place];
              for (int64_t x = range[0]; x < range[1]; ++x) ++to[l->point_keys[x]];
            }
          }
      }
}

void Tables::check_heads(int64_t batch, int64_t heads) const {
  auto check = [&](const Variants& v) {
    if ((v.batch != 1 && v.batch != batch) || (v.heads != 1 && v.heads != heads))
      throw MalformedPlan("the plan differs over " + std::to_string(v.batch) + " batch items and " + std::to_string(v.heads) +
                          " heads, but q has " + std::to_string(batch) + " and " + std::to_string(heads));
  };
  for (const Piece& piece : pieces) {
    check(piece.variant);
    for (const Layer& layer : piece.layers) check(layer.variant);
  }
}

void Tables::check_masks() const {
  const int64_t count = size(masks.kind);
  const std::string where = "masks";
  require(size(masks.start) == count && size(masks.core_lo) == count && size(masks.core_hi) == count, where,
          "tables differ in length");
  for (int64_t m = 0; m < count; ++m) {
    require(masks.kind[m] >= kBounds && masks.kind[m] <= kRowSet, where, "a mask is of no known kind");
    const int64_t words = masks.kind[m] == kBounds ? 2 * tile : masks.kind[m] == kBits ? kBitsWords * tile : (tile + 31) / 32;
    require(masks.start[m] >= 0 && masks.start[m] + words <= size(masks.data), where, "a mask reaches outside the mask data");
    require(masks.core_lo[m] >= 0 && masks.core_hi[m] <= 0, where, "a mask's core reaches outside its run");
  }
}

void Tables::check_piece(Piece& p, const std::string& where) {
  const int64_t entries = size(p.start), places = p.has_rows ? size(p.rows) : n_q;
  require(places < kIndexLimit && entries < kIndexLimit, where, "too many places or tiles");
  check_pointers(p.first, entries, where, "first does not divide the tiles");
  check_pointers(p.row_first, places, where, "row_first does not divide the places");
  require(p.row_first.size() == p.first.size(), where, "row_first and first differ in length");
  require(p.has_rows || p.first.size() == 2, where, "an order that is not stored has one variant");
  check_variants(p.variant, size(p.first) - 1, where);
  require(size(p.count) == entries && size(p.part) == entries && size(p.parts) == entries, where,
          "tables of tiles differ in length");
  std::vector<int64_t> last_variant(p.has_rows ? n_q : 0, -1);
  for (size_t v = 0; v + 1 < p.first.size(); ++v) {
    if (p.has_rows)
      for (int64_t i = p.row_first[v]; i < p.row_first[v + 1]; ++i) {
        require(p.rows[i] >= 0 && p.rows[i] < n_q, where, "a row does not exist");
        require(last_variant[p.rows[i]] != static_cast<int64_t>(v), where, "a row comes twice");
        last_variant[p.rows[i]] = static_cast<int64_t>(v);
      }
    int64_t place = p.row_first[v];
    for (int64_t e = p.first[v]; e < p.first[v + 1]; ++e) {
      require(p.count[e] >= 1 && p.count[e] <= tile, where, "a tile has no row or too many");
      require(p.parts[e] >= 1 && p.part[e] >= 0 && p.part[e] < p.parts[e], where, "a part is not below parts");
      if (p.part[e] == 0) {
        require(p.start[e] >= place, where, "tiles overlap or are not in order");
        require(int64_t{p.start[e]} + p.count[e] <= p.row_first[v + 1], where, "a tile reaches outside its variant's places");
        require(e + p.parts[e] <= p.first[v + 1], where, "the parts of a tile do not stand together");
        place = int64_t{p.start[e]} + p.count[e];
      } else {
        require(e > p.first[v] && p.part[e] == p.part[e - 1] + 1 && p.parts[e] == p.parts[e - 1] &&
                    p.start[e] == p.start[e - 1] && p.count[e] == p.count[e - 1],
                where, "the parts of a tile do not stand together");
      }
    }
  }
  number_partials(p, where);
}

// Numbers the partial results (slots) and split tiles (groups) of each variant, and checks that the parts of a tile are
// adjacent.
void Tables::number_partials(Piece& p, const std::string& where) {
  p.slot.assign(p.start.size(), -1);
  p.group.assign(p.start.size(), -1);
  p.slots = p.groups = 0;
  for (size_t v = 0; v + 1 < p.first.size(); ++v) {
    int64_t slots = 0, groups = 0;
    for (int64_t e = p.first[v]; e < p.first[v + 1]; ++e) {
      if (p.part[e] + 1 < p.parts[e])
        require(e + 1 < p.first[v + 1] && p.part[e + 1] == p.part[e] + 1, where, "the parts of a tile do not stand together");
      if (p.parts[e] == 1) continue;
      if (p.part[e] == 0) ++groups;
      p.slot[e] = slots++;
      p.group[e] = static_cast<int32_t>(groups - 1);
    }
    p.slots = std::max(p.slots, slots);
    p.groups = std::max(p.groups, groups);
  }
}

void Tables::check_layer(const Piece& p, const Layer& l, const std::string& where) const {
  const int64_t variants = size(l.entry_base), slots = l.has_keys ? size(l.keys) : n_k;
  require(slots < kIndexLimit, where, "too many slots");
  require(size(l.place_base) == variants, where, "place_base has the wrong length");
  check_variants(l.variant, variants, where);
  check_pointers(l.indptr, size(l.lo), where, "indptr does not divide the runs");
  require(size(l.hi) == size(l.lo) && size(l.mask) == size(l.lo), where, "lo, hi and mask differ in length");
  for (size_t r = 0; r < l.lo.size(); ++r) {
    require(l.lo[r] >= 0 && l.lo[r] <= l.hi[r] && l.hi[r] <= slots, where, "a run reaches outside the keys");
    require(l.mask[r] >= -1 && l.mask[r] < size(masks.kind), where, "a mask does not exist");
    if (l.mask[r] >= 0 && masks.kind[l.mask[r]] == kBits)
      require(l.hi[r] - l.lo[r] <= kBitsKeys, where, "a run masked by bits is too wide");
  }
  for (const int32_t key : l.keys) require(key >= 0 && key < n_k, where, "a key does not exist");
  if (l.has_points) {
    check_pointers(l.point_indptr, size(l.point_keys), where, "point_indptr does not divide the points");
    for (const int32_t key : l.point_keys) require(key >= 0 && key < n_k, where, "a gathered key does not exist");
  } else {
    require(l.point_indptr.empty() && l.point_keys.empty(), where, "points have pointers without keys, or keys without");
  }
  // Every (piece variant, layer variant) that some (batch item, head) combines must find its entries and places.
  const Variants &a = p.variant, &b = l.variant;
  require(a.batch == 1 || b.batch == 1 || a.batch == b.batch, where, "variant has the wrong shape");
  require(a.heads == 1 || b.heads == 1 || a.heads == b.heads, where, "variant has the wrong shape");
  for (int32_t i = 0; i < std::max(a.batch, b.batch); ++i)
    for (int32_t j = 0; j < std::max(a.heads, b.heads); ++j) {
      const int32_t v = variant_of(a.of.data(), a.batch, a.heads, i, j), w = variant_of(b.of.data(), b.batch, b.heads, i, j);
      const int64_t base = l.entry_base[w], place = l.place_base[w];
      require(base >= 0 && base < size(l.indptr) && base + (p.first[v + 1] - p.first[v]) < size(l.indptr), where,
              "the tiles of a variant reach outside indptr");
      if (l.has_points && p.first[v] < p.first[v + 1])
        require(place >= -kIndexLimit && place <= (int64_t{1} << 40) && place + p.row_first[v] >= 0 &&
                    place + p.row_first[v + 1] < size(l.point_indptr),
                where, "the places of a variant reach outside point_indptr");
    }
}

}  // namespace farlight
