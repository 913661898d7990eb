// The plan's tables, owned and checked. What has passed `check` can be walked by a kernel without looking left or right.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "views.h"

namespace farlight {

template <class T>
int64_t bytes_of(const std::vector<T>& v) {
  return static_cast<int64_t>(v.capacity() * sizeof(T));
}

// A table that does not hold what the plan's format promises.
struct MalformedPlan : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

struct Variants {
  std::vector<int32_t> of;  // (batch or 1) x (heads or 1)
  int32_t batch = 1, heads = 1;
};

struct Masks {
  std::vector<int32_t> kind, start, core_lo, core_hi, data;
};

struct Layer {
  Variants variant;
  std::vector<int64_t> entry_base, place_base, indptr;
  std::vector<int32_t> lo, hi, mask, keys;
  std::vector<int64_t> point_indptr;
  std::vector<int32_t> point_keys;
  bool has_keys = false, has_points = false;
};

struct Piece {
  Variants variant;
  std::vector<int32_t> rows;
  std::vector<int64_t> row_first, first;
  std::vector<int32_t> start, count, part, parts;
  std::vector<Layer> layers;
  bool has_rows = false;
  // Derived: which tiles have a run of keys that all of their rows see; where split tiles put their partial results, numbered
  // inside a variant.
  std::vector<uint8_t> every_row_visible;
  std::vector<int64_t> slot;
  std::vector<int32_t> group;
  int64_t slots = 0, groups = 0;
};

class Tables {
 public:
  int64_t n_q = 0, n_k = 0, q_offset = 0, tile = 0;
  bool overlapping = false;
  Masks masks;
  std::vector<Piece> pieces;

  // Checks everything and makes the view. Throws MalformedPlan.
  void finish();
  const PlanView& view() const { return view_; }
  // Whether every row stands in exactly one tile, whatever the batch item and head: then tiles write what rows see nothing, too.
  bool covers_all_rows() const { return covers_all_; }
  // The rows that might be written by no tile and must hold the result of a row that sees nothing before: [first, last) each.
  const std::vector<std::pair<int64_t, int64_t>>& unwritten_rows() const { return unwritten_rows_; }
  // Throws MalformedPlan unless the variants fit this many batch items and heads.
  void check_heads(int64_t batch, int64_t heads) const;
  // What is held in memory.
  int64_t bytes() const;

 private:
  void check_masks() const;
  void check_piece(Piece& piece, const std::string& where);
  void check_layer(const Piece& piece, const Layer& layer, const std::string& where) const;
  void number_parts(Piece& piece, const std::string& where);
  void find_sure();

  bool covers_all_ = false;
  std::vector<std::pair<int64_t, int64_t>> unwritten_rows_;
  PlanView view_{};
  std::vector<PieceView> piece_views_;
  std::vector<std::vector<LayerView>> layer_views_;
};

}  // namespace farlight
