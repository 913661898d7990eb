// Tiles of a content pattern (plan_content.h): chunks of tiles are planned in parallel, each into tables of its own, which are
// then concatenated in order. The result does not depend on the number of threads.
#include "plan_content.h"

#include <atomic>
#include <utility>

#include "row_visits.h"
#include "tile_planner.h"

namespace farlight {

namespace {

constexpr int64_t kChunkTiles = 32;  // tiles planned by one parallel item

}  // namespace

int64_t ContentPattern::batch_variants() const {
  int64_t extent = 1;
  for (const Clause& clause : clauses) {
    if (clause.kind == ClauseKind::kBlocks) extent = std::max(extent, clause.batch);
    if (clause.key_mask) extent = std::max(extent, clause.mask_batch);
  }
  return extent;
}

int64_t ContentPattern::head_variants() const {
  int64_t extent = 1;
  for (const Clause& clause : clauses) {
    if (clause.head >= 0) extent = heads;
    if (clause.kind == ClauseKind::kBlocks) extent = std::max(extent, clause.heads);
  }
  return extent;
}

namespace {

// Counts the tiles of each of `items` items.
template <class TilesOf>
ContentCounts count(const ContentPattern& pattern, int64_t gather, int64_t items, int threads, InterruptCheck& interrupt,
                    const TilesOf& tiles_of_item) {
  const int64_t heads = pattern.head_variants();
  std::atomic<int64_t> pairs{0}, visited{0};
  parallel_for(items, threads, interrupt, [&](int64_t i) {
    const auto [variant, first, last] = tiles_of_item(i);
    ChunkTables tables;
    ChunkPlanner planner(pattern, gather, variant / heads, variant % heads, tables);
    for (int64_t tile = first; tile < last; ++tile) planner.plan_tile(tile * kRows);
    pairs.fetch_add(tables.counts.pairs, std::memory_order_relaxed);
    visited.fetch_add(tables.counts.visited, std::memory_order_relaxed);
  });
  return {pairs, visited};
}

// Consecutive tiles of a variant.
struct TileRange {
  int64_t variant, first, last;
};

int64_t tiles_of(const ContentPattern& pattern) { return (pattern.n_q + kRows - 1) / kRows; }

}  // namespace

ContentCounts count_tiles(const ContentPattern& pattern, int64_t gather, int threads, InterruptCheck& interrupt) {
  const int64_t variants = pattern.batch_variants() * pattern.head_variants(), tiles = tiles_of(pattern);
  const int64_t chunks = (tiles + kChunkTiles - 1) / kChunkTiles, copies = pattern.batch * pattern.heads / variants;
  const ContentCounts counts = count(pattern, gather, variants * chunks, threads, interrupt, [&](int64_t i) {
    const int64_t first = i % chunks * kChunkTiles;
    return TileRange{i / chunks, first, std::min(first + kChunkTiles, tiles)};
  });
  return {counts.pairs * copies, counts.visited * copies};
}

ContentSample sample_tiles(const ContentPattern& pattern, int64_t gather, int threads, InterruptCheck& interrupt) {
  const int64_t heads = pattern.head_variants(), variants = pattern.batch_variants() * heads, tiles = tiles_of(pattern);
  // Of every `step` tiles of all variants the middle one; odd, so that variants of 2^n tiles give different ones.
  const int64_t step = std::max<int64_t>(1, variants * tiles / kSampledTiles) | 1, items = (variants * tiles + step / 2) / step;
  const auto tile_at = [&](int64_t i) {
    const int64_t at = i * step + step / 2;
    return TileRange{at / tiles, at % tiles, at % tiles + 1};
  };
  ContentSample sample;
  sample.counts = count(pattern, gather, items, threads, interrupt, tile_at);
  sample.scale = static_cast<double>(pattern.batch * pattern.heads * tiles) / static_cast<double>(std::max<int64_t>(1, items));
  std::atomic<int64_t> row_visits{0};
  parallel_for(items, threads, interrupt, [&](int64_t i) {
    const auto [variant, tile, last] = tile_at(i);
    KeysOfRow seen(pattern.n_k);
    TileClauses<KeysOfRow> clauses(pattern, variant / heads, variant % heads, seen);
    int64_t found = 0;
    for (int64_t row = tile * kRows; row < std::min(last * kRows, pattern.n_q); ++row) {
      clauses.unite(row, 1);
      seen.drain([&](int32_t, uint16_t) { ++found; });
    }
    row_visits.fetch_add(found, std::memory_order_relaxed);
  });
  sample.row_visits = row_visits;
  return sample;
}

void add_content_piece(const ContentPattern& pattern, int64_t gather, int threads, InterruptCheck& interrupt, Tables& tables,
                       ContentCounts& counts) {
  const int64_t batch = pattern.batch_variants(), heads = pattern.head_variants(), variants = batch * heads;
  const int64_t tiles = tiles_of(pattern), chunks = (tiles + kChunkTiles - 1) / kChunkTiles;
  std::vector<ChunkTables> parts(variants * chunks);
  parallel_for(variants * chunks, threads, interrupt, [&](int64_t i) {
    const int64_t variant = i / chunks, first = i % chunks * kChunkTiles;
    ChunkPlanner planner(pattern, gather, variant / heads, variant % heads, parts[i]);
    for (int64_t tile = first; tile < std::min(first + kChunkTiles, tiles); ++tile) planner.plan_tile(tile * kRows);
  });

  tables.n_q = pattern.n_q, tables.n_k = pattern.n_k, tables.q_offset = pattern.q_offset, tables.tile = kRows;
  Piece piece;
  piece.variant.of = {0};
  piece.row_first = {0, pattern.n_q};
  piece.first = {0, tiles};
  for (int64_t tile = 0; tile < tiles; ++tile) {
    piece.start.push_back(static_cast<int32_t>(tile * kRows));
    piece.count.push_back(static_cast<int32_t>(std::min<int64_t>(kRows, pattern.n_q - tile * kRows)));
  }
  piece.part.assign(tiles, 0);
  piece.parts.assign(tiles, 1);
  Layer layer;
  layer.variant.batch = static_cast<int32_t>(batch), layer.variant.heads = static_cast<int32_t>(heads);
  for (int64_t v = 0; v < variants; ++v) {
    layer.variant.of.push_back(static_cast<int32_t>(v));
    layer.entry_base.push_back(v * tiles);
    layer.place_base.push_back(v * pattern.n_q);
  }
  Offsets total;
  for (const ChunkTables& part : parts) {
    total.runs += static_cast<int64_t>(part.lo.size());
    total.points += static_cast<int64_t>(part.point_keys.size());
    total.masks += static_cast<int64_t>(part.row_masks.size() + part.bit_masks.size());
    total.words += static_cast<int64_t>(part.row_masks.size() + part.bit_masks.size() * Bits().size());
  }
  for (std::vector<int32_t>* column : {&tables.masks.kind, &tables.masks.start, &tables.masks.core_lo, &tables.masks.core_hi})
    column->reserve(total.masks);
  tables.masks.data.reserve(total.words);
  layer.lo.reserve(total.runs), layer.hi.reserve(total.runs), layer.mask.reserve(total.runs);
  layer.indptr.reserve(variants * tiles + 1), layer.point_keys.reserve(total.points);
  layer.indptr.push_back(0);
  layer.point_indptr.push_back(0);
  layer.has_points = total.points > 0;
  const int64_t copies = pattern.batch / batch * (pattern.heads / heads);
  Offsets at;
  for (ChunkTables& part : parts) {
    append(part, tables.masks, layer, at);
    counts.pairs += part.counts.pairs * copies;
    counts.visited += part.counts.visited * copies;
    part = ChunkTables();
  }
  if (!layer.has_points) layer.point_indptr.clear(), layer.point_indptr.shrink_to_fit();
  piece.layers.push_back(std::move(layer));
  tables.pieces.push_back(std::move(piece));
}

void plan_content(const ContentPattern& pattern, int64_t gather, int threads, InterruptCheck& interrupt, Tables& tables,
                  ContentCounts& counts) {
  add_content_piece(pattern, gather, threads, interrupt, tables, counts);
  tables.finish();
}

}  // namespace farlight
