// Python's side of content/: the choice of key blocks and the bound of what it loses.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "content/choose.h"
#include "content/labels.h"
#include "content/lost_bound.h"
#include "dispatch.h"
#include "native_plan.h"

namespace nb = nanobind;

namespace farlight {

namespace {

// The tensors and the rule of a choice. numbers: (type, batch, heads, kv_heads, n_q, n_k, dim, query_mask, key_mask,
// mask_batch, block, query_block, offset, first, causal, shared, score, budget).
ChoiceProblem choice_of(const std::vector<int64_t>& numbers, const StridedAddress& q, const StridedAddress& k,
                        double budget_value, double scale) {
  if (numbers.size() != 18) throw std::invalid_argument("a choice has 18 numbers");
  const int64_t* n = numbers.data();
  if (n[0] != 0 && n[0] != 1) throw std::invalid_argument("unknown element type of a choice");
  if (n[16] < 0 || n[16] > static_cast<int64_t>(BlockScore::kSoftmax) || n[17] < 0 ||
      n[17] > static_cast<int64_t>(BudgetKind::kLost))
    throw std::invalid_argument("unknown score or budget of a choice");
  if (std::any_of(n + 1, n + 7, [](int64_t size) { return size < 0; }) || n[3] < 1 || n[2] % n[3] || n[9] < 1 || n[10] < 1 ||
      n[11] < 1 || n[13] > n[12])
    throw std::invalid_argument("malformed sizes of a choice");
  return {static_cast<Type>(n[0]),
          tensor_view(q),
          tensor_view(k),
          n[1],
          n[2],
          n[3],
          n[4],
          n[5],
          n[6],
          reinterpret_cast<const uint8_t*>(n[7]),
          reinterpret_cast<const uint8_t*>(n[8]),
          n[9],
          n[10],
          n[11],
          n[12],
          n[13],
          n[14] != 0,
          n[15] != 0,
          static_cast<BlockScore>(n[16]),
          static_cast<BudgetKind>(n[17]),
          budget_value,
          static_cast<float>(scale)};
}

// The chosen key blocks of a router.
ChosenLists choose(const std::vector<int64_t>& numbers, const StridedAddress& q, const StridedAddress& k, double budget_value,
                   double scale, int threads) {
  const ChoiceProblem problem = choice_of(numbers, q, k, budget_value, scale);
  const Kernels& kernels_of_isa = kernels();
  InterruptCheck interrupt = signal_check();
  const nb::gil_scoped_release release;
  return choose_blocks(kernels_of_isa, problem, threads, interrupt);
}

// A table of lists from (address, width, bytes of an index).
ListTable list_table_of(const std::vector<int64_t>& from) {
  if (from.size() != 3 || from[1] < 0 || (from[2] != 2 && from[2] != 4 && from[2] != 8))
    throw std::invalid_argument("a table of lists is (address, width, bytes of an index: 2, 4 or 8)");
  return {reinterpret_cast<void*>(from[0]), from[1], from[2]};
}

// The same, written to a table of lists.
void choose_into(const std::vector<int64_t>& numbers, const StridedAddress& q, const StridedAddress& k, double budget_value,
                 double scale, const std::vector<int64_t>& table, int threads) {
  const ChoiceProblem problem = choice_of(numbers, q, k, budget_value, scale);
  const ListTable to = list_table_of(table);
  const Kernels& kernels_of_isa = kernels();
  InterruptCheck interrupt = signal_check();
  const nb::gil_scoped_release release;
  choose_blocks(kernels_of_isa, problem, to, threads, interrupt);
}

// See lost_bound.h. sizes and clauses: as for a plan; numbers: see choice_of.
void lost(const std::vector<int64_t>& sizes, const std::vector<std::vector<int64_t>>& clauses,
          const std::vector<int64_t>& numbers, const StridedAddress& q, const StridedAddress& k, double scale, int64_t lse,
          int64_t to, int threads) {
  const ContentPattern pattern = content_pattern_of(sizes, clauses);
  const LostProblem problem{pattern, choice_of(numbers, q, k, 0.0, scale), reinterpret_cast<const float*>(lse),
                            reinterpret_cast<float*>(to)};
  const Kernels& kernels_of_isa = kernels();
  InterruptCheck interrupt = signal_check();
  const nb::gil_scoped_release release;
  lost_bound(kernels_of_isa, problem, threads, interrupt);
}

// See NearestProblem. sizes: (type, batch, heads, kv_heads, n, dim, count, mask_batch); addresses: (columns, mask, labels).
void nearest(const std::vector<int64_t>& sizes, const StridedAddress& x, const std::vector<int64_t>& addresses, int threads) {
  if (sizes.size() != 8 || addresses.size() != 3) throw std::invalid_argument("nearest labels have 8 sizes and 3 addresses");
  const int64_t* n = sizes.data();
  if ((n[0] != 0 && n[0] != 1) || std::any_of(n + 1, n + 8, [](int64_t size) { return size < 0; }) || n[3] < 1 || n[2] % n[3] ||
      n[6] < 1 || n[7] < 1)
    throw std::invalid_argument("malformed sizes of nearest labels");
  const NearestProblem problem{static_cast<Type>(n[0]),
                               tensor_view(x),
                               n[1],
                               n[2],
                               n[3],
                               n[4],
                               n[5],
                               reinterpret_cast<const float*>(addresses[0]),
                               n[6],
                               reinterpret_cast<const uint8_t*>(addresses[1]),
                               n[7],
                               reinterpret_cast<int64_t*>(addresses[2])};
  const Kernels& kernels_of_isa = kernels();
  InterruptCheck interrupt = signal_check();
  const nb::gil_scoped_release release;
  nearest_labels(kernels_of_isa, problem, threads, interrupt);
}

// See recent_starts. sizes: (lines, n_q, n_k, count); addresses: (query, key, starts).
void recent(const std::vector<int64_t>& sizes, const std::vector<int64_t>& addresses, int threads) {
  if (sizes.size() != 4 || addresses.size() != 3) throw std::invalid_argument("recent starts have 4 sizes and 3 addresses");
  if (std::any_of(sizes.begin(), sizes.end(), [](int64_t size) { return size < 0; }) || sizes[3] < 1)
    throw std::invalid_argument("malformed sizes of recent starts");
  const auto table = [&](int i) { return reinterpret_cast<int64_t*>(addresses[i]); };
  InterruptCheck interrupt = signal_check();
  const nb::gil_scoped_release release;
  recent_starts(table(0), table(1), sizes[0], sizes[1], sizes[2], sizes[3], table(2), threads, interrupt);
}

}  // namespace

void bind_content(nb::module_& m) {
  nb::class_<ChosenLists>(m, "ChosenLists")
      .def_ro("width", &ChosenLists::width)
      .def("copy_to", [](const ChosenLists& lists, const std::vector<int64_t>& table, int threads) {
        const ListTable to = list_table_of(table);
        if (to.width < lists.width) throw std::invalid_argument("the table is narrower than the longest list");
        lists.copy_to(to, threads);
      });
  m.def("choose", &choose);
  m.def("choose_into", &choose_into);
  m.def("lost", &lost);
  m.def("nearest", &nearest);
  m.def("recent", &recent);
}

}  // namespace farlight
