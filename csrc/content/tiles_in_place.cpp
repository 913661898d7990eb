#include "tiles_in_place.h"

namespace farlight {

namespace {

// Empties a table and keeps its memory.
template <class... Tables>
void clear(Tables&... tables) {
  (tables.clear(), ...);
}

}  // namespace

const PlanView& TilesInPlace::plan(const ContentPattern& pattern, int64_t gather, int64_t batch_item, int64_t head,
                                   int64_t first, int64_t last) {
  ChunkTables chunk;
  ChunkPlanner planner(pattern, gather, batch_item, head, chunk);
  for (int64_t tile = first; tile < last; ++tile) planner.plan_tile(tile * kRows);

  clear(masks_.kind, masks_.start, masks_.core_lo, masks_.core_hi, masks_.data, layer_.lo, layer_.hi, layer_.mask, layer_.indptr,
        layer_.point_indptr, layer_.point_keys, start_, count_);
  layer_.indptr.push_back(0);
  layer_.point_indptr.push_back(0);
  Offsets at;
  append(chunk, masks_, layer_, at);

  const int64_t tiles = last - first;
  for (int64_t tile = first; tile < last; ++tile) {
    start_.push_back(static_cast<int32_t>(tile * kRows));
    count_.push_back(static_cast<int32_t>(std::min<int64_t>(kRows, pattern.n_q - tile * kRows)));
  }
  none_.assign(tiles, 0), one_.assign(tiles, 1), no_slot_.assign(tiles, -1), invisible_.assign(tiles, 0);
  no_group_.assign(tiles, -1);
  first_entry_[1] = tiles;
  place_base_ = -first * kRows;
  layer_view_ = {&entry_base_,     &place_base_,      layer_.indptr.data(),
                 layer_.lo.data(), layer_.hi.data(),  layer_.mask.data(),
                 nullptr,          at.points ? layer_.point_indptr.data() : nullptr,
                 layer_.point_keys.data(), &variant_, 1, 1};
  piece_view_ = {nullptr,           first_entry_, start_.data(), count_.data(), none_.data(), one_.data(),
                 no_slot_.data(),   &variant_,    1,             1,             0,            0,
                 no_group_.data(),  invisible_.data(), &layer_view_, 1};
  view_ = {&piece_view_,
           {masks_.kind.data(), masks_.start.data(), masks_.core_lo.data(), masks_.core_hi.data(), masks_.data.data()},
           1,
           kRows,
           pattern.n_q,
           pattern.n_k,
           pattern.q_offset};
  return view_;
}

}  // namespace farlight
