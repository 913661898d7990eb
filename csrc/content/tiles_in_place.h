// Tiles of a content pattern that are planned where they are executed: a few at a time, by the thread that computes them next,
// into tables that the next ones overwrite. A forward pass that runs once needs no other plan.
#pragma once

#include "tile_planner.h"

namespace farlight {

class TilesInPlace {
 public:
  // Plans the tiles [first, last) of one (batch item, head). The view holds until the next call.
  const PlanView& plan(const ContentPattern& pattern, int64_t gather, int64_t batch_item, int64_t head, int64_t first,
                       int64_t last);

 private:
  Masks masks_;
  Layer layer_;
  std::vector<int32_t> start_, count_, none_, one_, no_group_;  // per tile
  std::vector<int64_t> no_slot_;
  std::vector<uint8_t> invisible_;
  int64_t first_entry_[2] = {0, 0}, entry_base_ = 0, place_base_ = 0;
  int32_t variant_ = 0;
  LayerView layer_view_{};
  PieceView piece_view_{};
  PlanView view_{};
};

}  // namespace farlight
