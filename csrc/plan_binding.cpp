// Python's side of a plan (farlight._cpu.Plan): reads the tables of farlight.plan, or the addresses of a choice.
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <string>
#include <utility>

#include "content/label_piece.h"
#include "content/row_visits.h"
#include "dispatch.h"
#include "native_plan.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace farlight {

namespace {

// A plan's int tensor as a contiguous array view. Throws MalformedPlan for any other dtype, rank, layout or device.
template <class T, int Dims>
auto array_of(nb::handle owner, const char* name) {
  nb::ndarray<const T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu> array;
  if (!nb::try_cast(owner.attr(name), array, false) || !array.is_valid())  // None converts to an invalid array
    throw MalformedPlan(std::string(name) + " is not a contiguous " + std::to_string(Dims) + "-dimensional int" +
                        std::to_string(8 * sizeof(T)) + " tensor in the host's memory");
  return array;
}

// A copy of a one-dimensional table.
template <class T>
std::vector<T> table(nb::handle owner, const char* name) {
  const auto array = array_of<T, 1>(owner, name);
  return std::vector<T>(array.data(), array.data() + array.shape(0));
}

// The variant table of a piece or layer.
Variants variants(nb::handle owner) {
  const auto array = array_of<int32_t, 2>(owner, "variant");
  Variants v;
  v.batch = static_cast<int32_t>(array.shape(0));
  v.heads = static_cast<int32_t>(array.shape(1));
  v.of.assign(array.data(), array.data() + array.size());
  return v;
}

// Whether an optional table is present.
bool has_table(nb::handle owner, const char* name) { return !owner.attr(name).is_none(); }

// The tables of a farlight.plan.tables.Layer.
Layer layer(nb::handle from) {
  Layer l;
  l.variant = variants(from);
  l.entry_base = table<int64_t>(from, "entry_base");
  l.place_base = table<int64_t>(from, "place_base");
  l.indptr = table<int64_t>(from, "indptr");
  l.lo = table<int32_t>(from, "lo");
  l.hi = table<int32_t>(from, "hi");
  l.mask = table<int32_t>(from, "mask");
  l.has_keys = has_table(from, "keys");
  if (l.has_keys) l.keys = table<int32_t>(from, "keys");
  l.has_points = has_table(from, "point_indptr");
  if (l.has_points) l.point_indptr = table<int64_t>(from, "point_indptr");
  if (has_table(from, "point_keys")) l.point_keys = table<int32_t>(from, "point_keys");
  return l;
}

// The tables of a farlight.plan.tables.Piece.
Piece piece(nb::handle from) {
  Piece p;
  p.variant = variants(from);
  p.has_rows = has_table(from, "rows");
  if (p.has_rows) p.rows = table<int32_t>(from, "rows");
  p.row_first = table<int64_t>(from, "row_first");
  p.first = table<int64_t>(from, "first");
  p.start = table<int32_t>(from, "start");
  p.count = table<int32_t>(from, "count");
  p.part = table<int32_t>(from, "part");
  p.parts = table<int32_t>(from, "parts");
  for (const nb::handle element : from.attr("layers")) p.layers.push_back(layer(element));
  return p;
}

// A clause from (kind, causal, indices, batch, heads, lists, width, block, query_block, base, left, right, key_mask,
// mask_batch, bytes of an index, head).
Clause clause_of(const std::vector<int64_t>& from) {
  if (from.size() != 16) throw std::invalid_argument("a clause has 16 numbers");
  const auto kind = static_cast<ClauseKind>(from[0]);
  const bool is_narrow = from[14] == 2 || from[14] == 4;
  if (from[14] != 8 && !(is_narrow && kind == ClauseKind::kBlocks))
    throw std::invalid_argument("an index of a clause has 2, 4 or 8 bytes; of named keys or rows 8");
  return {kind,
          from[1] != 0,
          reinterpret_cast<const void*>(from[2]),
          from[14],
          from[3],
          from[4],
          from[5],
          from[6],
          from[7],
          from[8],
          from[9],
          from[10],
          from[11],
          reinterpret_cast<const uint8_t*>(from[12]),
          from[13],
          from[15]};
}

// Label links from (batch, heads, query, query_batch, query_heads, key, key_batch, key_heads, key_mask, mask_batch,
// excluded_rows, excluded_keys, starts, starts_batch, starts_heads, lower, upper); sizes: see NativePlan.
LabelLinks label_links_of(const std::vector<int64_t>& sizes, const std::vector<int64_t>& from) {
  if (from.size() != 17) throw std::invalid_argument("label links have 17 numbers");
  for (const int place : {0, 1, 3, 4, 6, 7, 9, 13, 14})
    if (from[place] < 1) throw std::invalid_argument("an extent of label links is below 1");
  const auto labels = [&](int i) { return reinterpret_cast<const int64_t*>(from[i]); };
  const auto mask = [&](int i) { return reinterpret_cast<const uint8_t*>(from[i]); };
  return {from[0],  from[1],  sizes[2], sizes[3], sizes[4], labels(2), from[3],    from[4],  labels(5), from[6], from[7],
          mask(8),  from[9],  mask(10), mask(11), labels(12), from[13], from[14], from[15], from[16]};
}

}  // namespace

ContentPattern content_pattern_of(const std::vector<int64_t>& sizes, const std::vector<std::vector<int64_t>>& clauses) {
  if (sizes.size() != 5) throw std::invalid_argument("sizes has 5 numbers");
  ContentPattern pattern{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], {}};
  for (const auto& clause : clauses) pattern.clauses.push_back(clause_of(clause));
  return pattern;
}

NativePlan::NativePlan(nb::handle plan) {
  read(plan);
  tables_.finish();
  bytes_ = tables_.bytes();
}

NativePlan::NativePlan(const std::vector<int64_t>& sizes, const std::vector<std::vector<int64_t>>& clauses, nb::object owners,
                       int64_t gather)
    : owners_(std::move(owners)), content_(content_pattern_of(sizes, clauses)), gather_(gather), is_planned_(false) {
  for (const Clause& clause : content_->clauses)
    if (clause.kind == ClauseKind::kBlocks)
      bytes_ += clause.batch * clause.heads * clause.lists * clause.width * clause.index_bytes;
}

const Tables& NativePlan::tables(int threads, InterruptCheck& interrupt) {
  if (is_planned_) return tables_;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (is_planned_) return tables_;
  Tables fresh;
  ContentCounts counts;
  plan_content(*content_, gather_, threads, interrupt, fresh, counts);
  tables_ = std::move(fresh);
  bytes_ += tables_.bytes();
  grown_bytes_ += tables_.bytes();
  is_planned_ = true;
  return tables_;
}

const ContentSample& NativePlan::sample(int threads, InterruptCheck& interrupt) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!sample_) sample_ = sample_tiles(*content_, gather_, threads, interrupt);
  return *sample_;
}

bool NativePlan::visits_rows(Type type, int threads, InterruptCheck& interrupt) {
  if (!content_ || !serves_single_rows(*content_)) return false;
  const ContentSample& some = sample(threads, interrupt);
  return visited_by_rows(some, type, kernels()) < static_cast<double>(some.counts.visited);
}

ContentCounts NativePlan::counts(int threads, InterruptCheck& interrupt) {
  const bool by_row = visits_rows(Type::f32, threads, interrupt);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!counts_ && !content_) counts_.emplace();
  if (!counts_)
    counts_ = by_row ? count_visits(*content_, threads, interrupt) : count_tiles(*content_, gather_, threads, interrupt);
  return *counts_;
}

ContentCounts NativePlan::expected(Type type, int threads, InterruptCheck& interrupt) {
  if (!content_) return counts(threads, interrupt);
  const ContentSample& some = sample(threads, interrupt);
  auto visited = static_cast<double>(some.counts.visited);
  if (serves_single_rows(*content_)) visited = std::min(visited, visited_by_rows(some, type, kernels()));
  return {std::llround(static_cast<double>(some.counts.pairs) * some.scale), std::llround(visited * some.scale)};
}

NativePlan::NativePlan(const std::vector<int64_t>& sizes, const std::vector<std::vector<int64_t>>& clauses, int64_t gather,
                       const std::vector<std::vector<int64_t>>& pieces, int threads) {
  const ContentPattern fixed = content_pattern_of(sizes, clauses);
  tables_.n_q = sizes[2], tables_.n_k = sizes[3], tables_.q_offset = sizes[4], tables_.tile = kRows;
  ContentCounts counts;
  std::vector<LabelLinks> links;
  for (const auto& numbers : pieces) links.push_back(label_links_of(sizes, numbers));
  InterruptCheck interrupt = signal_check();
  const nb::gil_scoped_release release;
  if (!clauses.empty()) add_content_piece(fixed, gather, threads, interrupt, tables_, counts);
  for (const LabelLinks& piece : links)
    add_label_piece(piece, sizes[0] * sizes[1] / (piece.batch * piece.heads), threads, interrupt, tables_, counts);
  counts_ = counts;
  tables_.overlapping = tables_.overlapping || tables_.pieces.size() > 1;
  tables_.finish();
  bytes_ = tables_.bytes();
}

void NativePlan::read(nb::handle plan) {
  const nb::object sizes = plan.attr("sizes"), masks = plan.attr("masks");
  tables_.n_q = nb::cast<int64_t>(sizes.attr("n_q"));
  tables_.n_k = nb::cast<int64_t>(sizes.attr("n_k"));
  tables_.q_offset = nb::cast<int64_t>(sizes.attr("q_offset"));
  tables_.tile = nb::cast<int64_t>(plan.attr("tile"));
  tables_.overlapping = nb::cast<bool>(plan.attr("overlapping"));
  tables_.masks = {table<int32_t>(masks, "kind"), table<int32_t>(masks, "start"), table<int32_t>(masks, "core_lo"),
                   table<int32_t>(masks, "core_hi"), table<int32_t>(masks, "data")};
  for (const nb::handle element : plan.attr("pieces")) tables_.pieces.push_back(piece(element));
}

void bind_plan(nb::module_& m) {
  nb::class_<NativePlan>(m, "Plan", nb::is_weak_referenceable())
      .def(nb::init<nb::handle>(), "plan"_a)
      .def(nb::init<const std::vector<int64_t>&, const std::vector<std::vector<int64_t>>&, int64_t,
                    const std::vector<std::vector<int64_t>>&, int>(),
           "sizes"_a, "clauses"_a, "gather"_a, "pieces"_a, "threads"_a)
      .def(nb::init<const std::vector<int64_t>&, const std::vector<std::vector<int64_t>>&, nb::object, int64_t>())
      .def_prop_ro("nbytes", &NativePlan::bytes)
      .def_prop_ro("overlapping", &NativePlan::overlapping)
      .def_prop_ro("covers_all_rows", &NativePlan::covers_all_rows)
      .def("visits_rows",
           [](NativePlan& plan, int type, int threads) {
             InterruptCheck interrupt = signal_check();
             const nb::gil_scoped_release release;
             return plan.visits_rows(static_cast<Type>(type), threads, interrupt);
           })
      .def("counts",
           [](NativePlan& plan, int threads) {
             InterruptCheck interrupt = signal_check();
             const nb::gil_scoped_release release;
             const ContentCounts counts = plan.counts(threads, interrupt);
             return std::make_pair(counts.pairs, counts.visited);
           })
      .def("expected",
           [](NativePlan& plan, int type, int threads) {
             InterruptCheck interrupt = signal_check();
             const nb::gil_scoped_release release;
             const ContentCounts counts = plan.expected(static_cast<Type>(type), threads, interrupt);
             return std::make_pair(counts.pairs, counts.visited);
           })
      .def("make_tables",
           [](NativePlan& plan, int threads) {
             InterruptCheck interrupt = signal_check();
             const nb::gil_scoped_release release;
             if (!plan.visits_rows(Type::f32, threads, interrupt)) plan.tables(threads, interrupt);
             return plan.take_grown_bytes();
           })
      .def("dense", [](NativePlan& plan, int64_t batch, int64_t heads, int64_t address) {
        InterruptCheck no_interrupt(nullptr);
        const nb::gil_scoped_release release;
        const Tables& tables = plan.tables(1, no_interrupt);
        tables.check_heads(batch, heads);
        tables.dense(batch, heads, reinterpret_cast<uint8_t*>(address));
      });
}

}  // namespace farlight
