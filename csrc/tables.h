// The plan's tables, owned and validated once. Every index that passes `Tables::finish` is in range, so kernels walk the tables
// without bounds checks.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "views.h"

namespace farlight {

// Heap memory of a vector, in bytes.
template <class T>
int64_t bytes_of(const std::vector<T>& v) {
  return static_cast<int64_t>(v.capacity() * sizeof(T));
}

// A table violates the plan's format.
struct MalformedPlan : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// Which variant of a table each (batch item, head) uses; an extent of 1 is broadcast.
struct Variants {
  std::vector<int32_t> of;  // (batch, heads)
  int32_t batch = 1, heads = 1;
};

// See MaskView.
struct Masks {
  std::vector<int32_t> kind, start, core_lo, core_hi, data;
};

// See LayerView; the names are those of farlight.plan.tables.
struct Layer {
  Variants variant;
  std::vector<int64_t> entry_base, place_base, indptr;
  std::vector<int32_t> lo, hi, mask, keys;
  std::vector<int64_t> point_indptr;
  std::vector<int32_t> point_keys;
  bool has_keys = false, has_points = false;
};

// See PieceView; the names are those of farlight.plan.tables.
struct Piece {
  Variants variant;
  std::vector<int32_t> rows;
  std::vector<int64_t> row_first, first;
  std::vector<int32_t> start, count, part, parts;
  std::vector<Layer> layers;
  bool has_rows = false;
  // Derived by Tables::finish: tiles of which every row sees a key, and the numbering of split-K partial results inside a
  // variant.
  std::vector<uint8_t> every_row_visible;
  std::vector<int64_t> slot;
  std::vector<int32_t> group;
  int64_t slots = 0, groups = 0;
};

// The tables of one plan. Filled by the binding, then frozen by finish().
class Tables {
 public:
  int64_t n_q = 0, n_k = 0, q_offset = 0, tile = 0;
  bool overlapping = false;
  Masks masks;
  std::vector<Piece> pieces;

  // Validates every table, derives the fields above and builds the view. Throws MalformedPlan.
  void finish();
  const PlanView& view() const { return view_; }
  // Whether every row is in exactly one tile, for every batch item and head. Then the tiles themselves write rows that see no
  // key.
  bool covers_all_rows() const { return covers_all_rows_; }
  // Ranges [first, last) of rows that possibly no tile writes. Their result is initialised to that of a row without keys (out
  // 0, lse -inf) before the tiles run.
  const std::vector<std::pair<int64_t, int64_t>>& unwritten_rows() const { return unwritten_rows_; }
  // Throws MalformedPlan unless the variants fit this batch size and number of heads.
  void check_heads(int64_t batch, int64_t heads) const;
  // Memory held, in bytes.
  int64_t bytes() const;
  // Adds 1 to mask[b, h, row, key], (batch, heads, n_q, n_k), for every pair of the tables. For tests.
  void dense(int64_t batch, int64_t heads, uint8_t* mask) const;

 private:
  void check_masks() const;
  void check_piece(Piece& piece, const std::string& where);
  void check_layer(const Piece& piece, const Layer& layer, const std::string& where) const;
  void number_partials(Piece& piece, const std::string& where);
  void find_visible_rows();

  bool covers_all_rows_ = false;
  std::vector<std::pair<int64_t, int64_t>> unwritten_rows_;
  PlanView view_{};
  std::vector<PieceView> piece_views_;
  std::vector<std::vector<LayerView>> layer_views_;
};

}  // namespace farlight
