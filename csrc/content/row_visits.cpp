// Visits of rows (row_visits.h): sorting by key group, and what they cost beside tiles.
#include "row_visits.h"

#include <algorithm>
#include <atomic>
#include <bit>

#include "tile_clauses.h"

namespace farlight {

namespace {

// The time of a visited key beside that of a key that a tile visits for a row and plans, by measurement. Visits compute in
// float32, as tiles do but for bfloat16 pairs.
constexpr double kVisitCost = 1.3, kVisitCostBesidePairs = 2.4;

}  // namespace

void VisitTable::fill(const ContentPattern& pattern, RowVisits& to) {
  const int64_t groups = (pattern.n_k + kVisitKeys - 1) / kVisitKeys;
  found_.clear();
  place_.assign(groups + 1, 0);
  KeysOfRow seen(pattern.n_k);
  TileClauses<KeysOfRow> clauses(pattern, to.batch, to.head, seen);
  for (int64_t row = 0; row < to.rows; ++row) {
    clauses.unite(to.first_row + row, 1);
    seen.drain([&](int32_t group, uint16_t keys) {
      found_.push_back({group, {static_cast<uint16_t>(row), keys}});
      ++place_[group + 1];
    });
  }
  group_.clear(), ends_.clear();
  for (int64_t g = 0; g < groups; ++g) {
    place_[g + 1] += place_[g];
    if (place_[g + 1] == place_[g]) continue;
    group_.push_back(static_cast<int32_t>(g));
    ends_.push_back(place_[g + 1]);
  }
  visits_.resize(found_.size());
  for (const Found& x : found_) visits_[place_[x.group]++] = x.visit;
  to.groups = static_cast<int64_t>(group_.size());
  to.group = group_.data(), to.ends = ends_.data(), to.visit = visits_.data();
}

bool serves_single_rows(const ContentPattern& pattern) {
  return std::any_of(pattern.clauses.begin(), pattern.clauses.end(),
                     [](const Clause& clause) { return clause.kind == ClauseKind::kBlocks && clause.query_block == 1; });
}

ContentCounts count_visits(const ContentPattern& pattern, int threads, InterruptCheck& interrupt) {
  const int64_t batch = pattern.batch_variants(), heads = pattern.head_variants();
  const int64_t copies = pattern.batch / batch * (pattern.heads / heads);
  const int64_t parts = (pattern.n_q + kVisitRows - 1) / kVisitRows;
  std::atomic<int64_t> pairs{0}, visits{0};
  parallel_for(batch * heads * parts, threads, interrupt, [&](int64_t i) {
    const int64_t variant = i / parts, first = i % parts * kVisitRows;
    KeysOfRow seen(pattern.n_k);
    TileClauses<KeysOfRow> clauses(pattern, variant / heads, variant % heads, seen);
    int64_t links = 0, found = 0;
    for (int64_t row = first; row < std::min(first + kVisitRows, pattern.n_q); ++row) {
      clauses.unite(row, 1);
      seen.drain([&](int32_t, uint16_t keys) { links += std::popcount(keys), ++found; });
    }
    pairs.fetch_add(links, std::memory_order_relaxed);
    visits.fetch_add(found, std::memory_order_relaxed);
  });
  return {pairs * copies, visits * kVisitKeys * copies};
}

double visited_by_rows(const ContentSample& sample, Type type, const Kernels& kernels) {
  const bool beside_pairs = type == Type::bf16 && kernels.pairs_bf16;
  return static_cast<double>(sample.row_visits * kVisitKeys) * (beside_pairs ? kVisitCostBesidePairs : kVisitCost);
}

}  // namespace farlight
