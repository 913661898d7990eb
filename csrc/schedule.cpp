#include "schedule.h"

#include <algorithm>
#include <cmath>

namespace farlight {

namespace {

constexpr int64_t kUnits = 48;        // slabs wanted over all groups, so that some dozen threads have work
constexpr int64_t kTilesInSlab = 16;  // at least, lest sums be cleared and added up more than they are used
constexpr int64_t kCopies = 3;        // the slabs of a group together cover each key at most so many times
constexpr int64_t kTileCost = 8;      // a tile's own cost, in visited keys

struct Where {
  int64_t first_run, last_run, first_point, last_point;
};

Where where(const PieceView& piece, const LayerView& layer, const WorkItem& item) {
  const int32_t v = variant_of(piece.variant, piece.variant_batch, piece.variant_heads, item.batch, item.head);
  const int32_t w = variant_of(layer.variant, layer.variant_batch, layer.variant_heads, item.batch, item.head);
  const int64_t t = layer.entry_base[w] + item.entry - piece.first[v];
  Where at{layer.indptr[t], layer.indptr[t + 1], 0, 0};
  if (layer.point_indptr && piece.part[item.entry] == 0) {
    const int64_t place = layer.place_base[w] + piece.start[item.entry];
    at.first_point = layer.point_indptr[place];
    at.last_point = layer.point_indptr[place + piece.count[item.entry]];
  }
  return at;
}

}  // namespace

Schedule::Schedule(const Tables& tables, int64_t batch, int64_t heads, int64_t kv_heads)
    : batch(batch), heads(heads), kv_heads(kv_heads), tables_(tables) {
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
  order_backward();
}

int64_t Schedule::bytes() const {
  int64_t sum = static_cast<int64_t>(sizeof(*this)) + bytes_of(phases) + bytes_of(partial_base) + bytes_of(pending_base) +
                bytes_of(parts) + bytes_of(covers_);
  for (const Phase& phase : phases) sum += bytes_of(phase.forward) + bytes_of(phase.backward) + bytes_of(phase.slabs);
  for (const Cover& cover : covers_) sum += bytes_of(cover.blocks);
  return sum;
}

int64_t Schedule::cost_of(const WorkItem& item) const {
  const PieceView& piece = tables_.view().pieces[item.piece];
  int64_t keys = 0, points = 0;
  for (int32_t i = 0; i < piece.layer_count; ++i) {
    const LayerView& layer = piece.layers[i];
    const Where at = where(piece, layer, item);
    for (int64_t r = at.first_run; r < at.last_run; ++r) keys += layer.hi[r] - layer.lo[r];
    points += at.last_point - at.first_point;
  }
  const int64_t turns = (piece.count[item.entry] + kRows - 1) / kRows;
  return keys * turns + (points + 1) / 2;
}

// All items of the plan. An item without work is left out, unless it alone tells its rows that they see nothing.
void Schedule::order_forward() {
  const PlanView& view = tables_.view();
  struct Priced {
    WorkItem item;
    int32_t dear;
  };
  for (int32_t p = 0; p < view.piece_count; ++p) {
    Phase& phase = phases[phases.size() > 1 ? p : 0];
    const PieceView& piece = view.pieces[p];
    std::vector<WorkItem> here;
    std::vector<int64_t> costs;
    int64_t total = 0;
    for (int32_t b = 0; b < batch; ++b)
      for (int32_t h = 0; h < heads; ++h) {
        const int32_t v = variant_of(piece.variant, piece.variant_batch, piece.variant_heads, b, h);
        for (int64_t e = piece.first[v]; e < piece.first[v + 1]; ++e) {
          const WorkItem item{p, b, h, static_cast<int32_t>(e)};
          const int64_t price = cost_of(item);
          if (price == 0 && piece.group[e] < 0 && !tables_.covers_all_rows()) continue;
          if (piece.group[e] >= 0) parts[pending_base[p] + (b * heads + h) * piece.groups + piece.group[e]] = piece.parts[e];
          here.push_back(item);
          costs.push_back(price + kTileCost);
          total += price + kTileCost;
        }
      }
    cost += total;
    // Dear: more than four times the mean, in steps of two, so that equals keep their places.
    const double mean = here.empty() ? 1.0 : static_cast<double>(total) / static_cast<double>(here.size());
    std::vector<Priced> priced(here.size());
    for (size_t i = 0; i < here.size(); ++i) {
      const double ratio = static_cast<double>(costs[i]) / (4.0 * mean);
      priced[i] = {here[i], ratio > 1.0 ? static_cast<int32_t>(std::log2(ratio)) + 1 : 0};
    }
    std::stable_sort(priced.begin(), priced.end(), [](const Priced& x, const Priced& y) { return x.dear > y.dear; });
    for (const Priced& x : priced) phase.forward.push_back(x.item);
    phase.forward.shrink_to_fit();
  }
}

void Schedule::order_backward() {
  blocks = (tables_.n_k + kBlock - 1) / kBlock;
  int64_t most = 0;
  for (Phase& phase : phases) {
    phase.backward = phase.forward;
    const int64_t shared = heads / kv_heads;
    auto group = [&](const WorkItem& x) { return x.batch * kv_heads + x.head / shared; };
    std::stable_sort(phase.backward.begin(), phase.backward.end(), [&](const WorkItem& x, const WorkItem& y) {
      if (group(x) != group(y)) return group(x) < group(y);
      if (x.head != y.head) return x.head < y.head;
      return x.piece != y.piece ? x.piece < y.piece : x.entry < y.entry;
    });
    most += static_cast<int64_t>(phase.backward.size()) / std::max<int64_t>(1, groups());
  }
  int64_t wanted = std::min((kUnits + groups() - 1) / std::max<int64_t>(1, groups()), most / kTilesInSlab);
  for (wanted = std::max<int64_t>(1, wanted);; wanted = wanted > 2 ? wanted / 2 : 1) {
    cut(wanted);
    if (find_covers() <= kCopies * std::max<int64_t>(1, blocks) || wanted == 1) break;
  }
}

// Cuts the items of each group into slabs of about equal cost.
void Schedule::cut(int64_t slabs) {
  slab_count = slabs;
  const int64_t shared = heads / kv_heads;
  for (Phase& phase : phases) {
    phase.slabs.clear();
    int64_t at = 0;
    const int64_t end = static_cast<int64_t>(phase.backward.size());
    for (int64_t g = 0; g < groups(); ++g) {
      const int64_t begin = at;
      int64_t total = 0;
      for (; at < end; ++at) {
        const WorkItem& x = phase.backward[at];
        if (x.batch * kv_heads + x.head / shared != g) break;
        total += cost_of(x) + kTileCost;
      }
      int64_t done = 0, i = begin;
      for (int64_t s = 0; s < slabs; ++s) {
        const int64_t first = i;
        while (i < at && (s + 1 == slabs || done * slabs < total * (s + 1))) done += cost_of(phase.backward[i++]) + kTileCost;
        phase.slabs.push_back({first, i});
      }
    }
  }
}

// The blocks that each slab touches; the largest number of them over a group's slabs.
int64_t Schedule::find_covers() {
  const int64_t cells = (by_batch_ ? batch : 1) * (by_head_ ? kv_heads : 1);
  covers_.assign(cells * slab_count, {});
  std::vector<uint8_t> done(cells, 0);
  std::vector<uint8_t> seen(blocks);
  int64_t most = 0;
  for (int64_t g = 0; g < groups(); ++g) {
    if (done[cell(g)]) continue;
    done[cell(g)] = 1;
    int64_t together = 0;
    for (int64_t s = 0; s < slab_count; ++s) {
      std::fill(seen.begin(), seen.end(), uint8_t{0});
      for (const Phase& phase : phases) {
        const Slab& slab = phase.slabs[g * slab_count + s];
        for (int64_t i = slab.first; i < slab.last; ++i) mark(phase.backward[i], seen);
      }
      std::vector<int32_t>& list = covers_[cell(g) * slab_count + s].blocks;
      for (int64_t k = 0; k < blocks; ++k)
        if (seen[k]) list.push_back(static_cast<int32_t>(k));
      together += static_cast<int64_t>(list.size());
    }
    most = std::max(most, together);
  }
  return most;
}

void Schedule::mark(const WorkItem& item, std::vector<uint8_t>& seen) const {
  const PieceView& piece = tables_.view().pieces[item.piece];
  for (int32_t i = 0; i < piece.layer_count; ++i) {
    const LayerView& layer = piece.layers[i];
    const Where at = where(piece, layer, item);
    for (int64_t r = at.first_run; r < at.last_run; ++r) {
      if (layer.keys) {
        for (int32_t slot = layer.lo[r]; slot < layer.hi[r]; ++slot) seen[layer.keys[slot] / kBlock] = 1;
      } else if (layer.lo[r] < layer.hi[r]) {
        for (int32_t k = layer.lo[r] / kBlock; k <= (layer.hi[r] - 1) / kBlock; ++k) seen[k] = 1;
      }
    }
    for (int64_t x = at.first_point; x < at.last_point; ++x) seen[layer.point_keys[x] / kBlock] = 1;
  }
}

}  // namespace farlight
