// Schedule construction (schedule.h): cost model, order of the forward items, slabs of the backward pass and the key blocks
// they touch. Linear in the plan's runs and gathered keys, apart from sorting.
#include "schedule.h"

#include <algorithm>
#include <cmath>

namespace farlight {

namespace {

constexpr int64_t kTargetSlabs = 48;  // slabs over all groups: enough work items for some dozen threads
// fewer tiles per slab would spend more on zeroing and reducing accumulators than on using them
constexpr int64_t kMinSlabTiles = 16;
constexpr int64_t kMaxCopies = 3;     // the slabs of a group together hold at most this many accumulators per key
constexpr int64_t kTileOverhead = 8;  // fixed cost of a tile entry, in visited keys

// The runs and gathered keys of an item in one layer: ranges of LayerView::lo and of LayerView::point_keys.
struct WorkRange {
  int64_t first_run, last_run, first_gathered, last_gathered;
};

WorkRange work_range(const PieceView& piece, const LayerView& layer, const WorkItem& item) {
  const int32_t v = variant_of(piece.variant, piece.variant_batch, piece.variant_heads, item.batch, item.head);
  const int32_t w = variant_of(layer.variant, layer.variant_batch, layer.variant_heads, item.batch, item.head);
  const int64_t t = layer.entry_base[w] + item.entry - piece.first[v];
  WorkRange range{layer.indptr[t], layer.indptr[t + 1], 0, 0};
  if (layer.point_indptr && piece.part[item.entry] == 0) {
    const int64_t place = layer.place_base[w] + piece.start[item.entry];
    range.first_gathered = layer.point_indptr[place];
    range.last_gathered = layer.point_indptr[place + piece.count[item.entry]];
  }
  return range;
}

}  // namespace

Schedule::Schedule(const Tables& tables, int64_t batch, int64_t heads, int64_t kv_heads)
    : batch(batch),
      heads(heads),
      kv_heads(kv_heads),
      tables_(tables) {
  tables.check_heads(batch, heads);
  for (const Piece& piece : tables.pieces) {
    partial_base.push_back(partials);
    pending_base.push_back(static_cast<int64_t>(parts.size()));
    partials += piece.slots * batch * heads;
    parts.resize(parts.size() + piece.groups * batch * heads, 0);
    by_batch_ |= piece.variant.batch > 1;
    by_head_ |= piece.variant.heads > 1;
    for (const Layer& layer : piece.layers) {
      by_batch_ |= layer.variant.batch > 1;
      by_head_ |= layer.variant.heads > 1;
    }
  }
  phases.resize(tables.overlapping ? std::max<size_t>(1, tables.pieces.size()) : 1);
  order_forward();
}

int64_t Schedule::bytes() const {
  int64_t sum = static_cast<int64_t>(sizeof(*this)) + bytes_of(phases) + bytes_of(partial_base) + bytes_of(pending_base) +
                bytes_of(parts) + bytes_of(key_block_sets_);
  for (const Phase& phase : phases) sum += bytes_of(phase.forward) + bytes_of(phase.backward) + bytes_of(phase.slabs);
  for (const KeyBlockSet& set : key_block_sets_) sum += bytes_of(set.blocks);
  return sum;
}

// Cost model of an item: visited keys for each row block of its tile; a gathered key costs half a visited one.
int64_t Schedule::cost_of(const WorkItem& item) const {
  const PieceView& piece = tables_.view().pieces[item.piece];
  int64_t keys = 0, gathered = 0;
  for (int32_t i = 0; i < piece.layer_count; ++i) {
    const LayerView& layer = piece.layers[i];
    const WorkRange range = work_range(piece, layer, item);
    for (int64_t r = range.first_run; r < range.last_run; ++r) keys += layer.hi[r] - layer.lo[r];
    gathered += range.last_gathered - range.first_gathered;
  }
  const int64_t row_blocks = (piece.count[item.entry] + kRows - 1) / kRows;
  return keys * row_blocks + (gathered + 1) / 2;
}

// Lists all items of the plan. An item without keys is left out, unless the plan relies on it to write the empty result of its
// rows.
void Schedule::order_forward() {
  const PlanView& view = tables_.view();
  struct CostedItem {
    WorkItem item;
    int32_t cost_class;
  };
  for (int32_t p = 0; p < view.piece_count; ++p) {
    Phase& phase = phases[phases.size() > 1 ? p : 0];
    const PieceView& piece = view.pieces[p];
    std::vector<WorkItem> items;
    std::vector<int64_t> costs;
    int64_t total = 0;
    for (int32_t b = 0; b < batch; ++b)
      for (int32_t h = 0; h < heads; ++h) {
        const int32_t v = variant_of(piece.variant, piece.variant_batch, piece.variant_heads, b, h);
        for (int64_t e = piece.first[v]; e < piece.first[v + 1]; ++e) {
          const WorkItem item{p, b, h, static_cast<int32_t>(e)};
          const int64_t item_cost = cost_of(item);
          if (item_cost == 0 && piece.group[e] < 0 && !tables_.covers_all_rows()) continue;
          if (piece.group[e] >= 0) parts[pending_base[p] + (b * heads + h) * piece.groups + piece.group[e]] = piece.parts[e];
          items.push_back(item);
          costs.push_back(item_cost + kTileOverhead);
          total += item_cost + kTileOverhead;
        }
      }
    cost += total;
    // Longest-processing-time-first for outliers only: an item above four times the mean cost moves to the front, in classes of
    // a factor of two, so that items of similar cost keep their memory order.
    const double mean = items.empty() ? 1.0 : static_cast<double>(total) / static_cast<double>(items.size());
    std::vector<CostedItem> costed(items.size());
    for (size_t i = 0; i < items.size(); ++i) {
      const double ratio = static_cast<double>(costs[i]) / (4.0 * mean);
      costed[i] = {items[i], ratio > 1.0 ? static_cast<int32_t>(std::log2(ratio)) + 1 : 0};
    }
    std::stable_sort(costed.begin(), costed.end(),
                     [](const CostedItem& x, const CostedItem& y) { return x.cost_class > y.cost_class; });
    for (const CostedItem& x : costed) phase.forward.push_back(x.item);
    phase.forward.shrink_to_fit();
  }
}

// Sorts the items by group and cuts each group into slabs: about kTargetSlabs over all groups, halved until the
// accumulators' copies fit kMaxCopies.
void Schedule::order_backward() {
  blocks = (tables_.n_k + kBlock - 1) / kBlock;
  int64_t items_per_group = 0;
  for (Phase& phase : phases) {
    phase.backward = phase.forward;
    const int64_t heads_per_kv = heads / kv_heads;
    auto group = [&](const WorkItem& x) { return x.batch * kv_heads + x.head / heads_per_kv; };
    std::stable_sort(phase.backward.begin(), phase.backward.end(), [&](const WorkItem& x, const WorkItem& y) {
      if (group(x) != group(y)) return group(x) < group(y);
      if (x.head != y.head) return x.head < y.head;
      return x.piece != y.piece ? x.piece < y.piece : x.entry < y.entry;
    });
    items_per_group += static_cast<int64_t>(phase.backward.size()) / std::max<int64_t>(1, groups());
  }
  int64_t slabs = std::min((kTargetSlabs + groups() - 1) / std::max<int64_t>(1, groups()), items_per_group / kMinSlabTiles);
  for (slabs = std::max<int64_t>(1, slabs);; slabs = slabs > 2 ? slabs / 2 : 1) {
    cut_slabs(slabs);
    if (find_key_blocks() <= kMaxCopies * std::max<int64_t>(1, blocks) || slabs == 1) break;
  }
}

// Cuts the items of each group into `slabs` contiguous ranges of about equal cost.
void Schedule::cut_slabs(int64_t slabs) {
  slab_count = slabs;
  const int64_t heads_per_kv = heads / kv_heads;
  for (Phase& phase : phases) {
    phase.slabs.clear();
    int64_t group_end = 0;
    const int64_t end = static_cast<int64_t>(phase.backward.size());
    for (int64_t g = 0; g < groups(); ++g) {
      const int64_t begin = group_end;
      int64_t total = 0;
      for (; group_end < end; ++group_end) {
        const WorkItem& x = phase.backward[group_end];
        if (x.batch * kv_heads + x.head / heads_per_kv != g) break;
        total += cost_of(x) + kTileOverhead;
      }
      int64_t cost_before = 0, i = begin;
      for (int64_t s = 0; s < slabs; ++s) {
        const int64_t first = i;
        while (i < group_end && (s + 1 == slabs || cost_before * slabs < total * (s + 1)))
          cost_before += cost_of(phase.backward[i++]) + kTileOverhead;
        phase.slabs.push_back({first, i});
      }
    }
  }
}

// Computes the key blocks that each slab touches; returns the largest number of accumulator blocks of any group.
int64_t Schedule::find_key_blocks() {
  const int64_t cells = (by_batch_ ? batch : 1) * (by_head_ ? kv_heads : 1);
  key_block_sets_.assign(cells * slab_count, {});
  std::vector<uint8_t> done(cells, 0);
  std::vector<uint8_t> touched(blocks);
  int64_t max_blocks = 0;
  for (int64_t g = 0; g < groups(); ++g) {
    if (done[variant_cell(g)]) continue;
    done[variant_cell(g)] = 1;
    int64_t group_blocks = 0;
    for (int64_t s = 0; s < slab_count; ++s) {
      std::fill(touched.begin(), touched.end(), uint8_t{0});
      for (const Phase& phase : phases) {
        const Slab& slab = phase.slabs[g * slab_count + s];
        for (int64_t i = slab.first; i < slab.last; ++i) mark_key_blocks(phase.backward[i], touched);
      }
      std::vector<int32_t>& list = key_block_sets_[variant_cell(g) * slab_count + s].blocks;
      for (int64_t k = 0; k < blocks; ++k)
        if (touched[k]) list.push_back(static_cast<int32_t>(k));
      group_blocks += static_cast<int64_t>(list.size());
    }
    max_blocks = std::max(max_blocks, group_blocks);
  }
  return max_blocks;
}

// Sets touched[block] for every block of keys that the item visits.
void Schedule::mark_key_blocks(const WorkItem& item, std::vector<uint8_t>& touched) const {
  const PieceView& piece = tables_.view().pieces[item.piece];
  for (int32_t i = 0; i < piece.layer_count; ++i) {
    const LayerView& layer = piece.layers[i];
    const WorkRange range = work_range(piece, layer, item);
    for (int64_t r = range.first_run; r < range.last_run; ++r) {
      if (layer.keys) {
        for (int32_t slot = layer.lo[r]; slot < layer.hi[r]; ++slot) touched[layer.keys[slot] / kBlock] = 1;
      } else if (layer.lo[r] < layer.hi[r]) {
        for (int32_t k = layer.lo[r] / kBlock; k <= (layer.hi[r] - 1) / kBlock; ++k) touched[k] = 1;
      }
    }
    for (int64_t x = range.first_gathered; x < range.last_gathered; ++x) touched[layer.point_keys[x] / kBlock] = 1;
  }
}

}  // namespace farlight
