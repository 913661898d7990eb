// The Python module farlight._cpu (nanobind, stable ABI). A plan is converted once into an owned, validated NativePlan; a call
// passes tensors as addresses and strides, which costs a fraction of a microsecond where array arguments would cost ten.
// dtypes, devices and shapes are checked by farlight/kernels/cpu.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>

#include "content/choose.h"
#include "content/lost_bound.h"
#include "content/plan_content.h"
#include "content/sorted_piece.h"
#include "dispatch.h"
#include "parallel.h"
#include "run.h"
#include "tables.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace farlight {
void bind_decode(nb::module_& m);  // decode_binding.cpp
}

namespace {

using namespace farlight;

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

// A plan's validated tables and the schedule of the latest (batch, heads, kv_heads) it was called with. Thread-safe.
class NativePlan {
 public:
  explicit NativePlan(nb::handle plan) {
    read(plan);
    tables_.finish();
  }
  // The plan of clusterings, and of a fixed pattern (None without one) that shares no pair with them. sizes: (batch, heads,
  // n_q, n_k, q_offset); pieces: see `sorted_links_of`.
  NativePlan(nb::handle fixed, const std::vector<int64_t>& sizes, const std::vector<std::vector<int64_t>>& pieces);
  // The plan of a content pattern. sizes: (batch, heads, n_q, n_k, q_offset); clauses: see `clause_of`.
  NativePlan(const std::vector<int64_t>& sizes, const std::vector<std::vector<int64_t>>& clauses, int64_t gather, int threads);
  NativePlan(const NativePlan&) = delete;
  NativePlan& operator=(const NativePlan&) = delete;

  const Tables& tables() const { return tables_; }
  bool overlapping() const { return tables_.overlapping; }
  bool covers_all_rows() const { return tables_.covers_all_rows(); }
  const ContentCounts& counts() const { return counts_; }

  std::shared_ptr<const Schedule> schedule(int64_t batch, int64_t heads, int64_t kv_heads) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!schedule_ || schedule_->batch != batch || schedule_->heads != heads || schedule_->kv_heads != kv_heads) {
      auto fresh = std::make_shared<const Schedule>(tables_, batch, heads, kv_heads);
      grown_bytes_ += fresh->bytes() - (schedule_ ? schedule_->bytes() : 0);
      schedule_ = std::move(fresh);
    }
    return schedule_;
  }
  // Growth of the schedule's memory in bytes since the previous call of this function, for the plan's byte accounting.
  int64_t take_grown_bytes() { return grown_bytes_.exchange(0, std::memory_order_relaxed); }

 private:
  // Appends the tables of a farlight.plan.tables.Plan.
  void read(nb::handle plan) {
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

  std::atomic<int64_t> grown_bytes_{0};
  Tables tables_;
  ContentCounts counts_;  // of a content pattern; else zero
  std::mutex mutex_;
  std::shared_ptr<const Schedule> schedule_;
};

unsigned long main_thread = 0;  // Python's identifier of the main thread

// Runs pending Python signal handlers, which Python does in the main thread only. Rethrows what a handler raised
// (KeyboardInterrupt).
void run_handlers() {
  const nb::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

// Polls for signals when called from Python's main thread, else not at all.
InterruptCheck signal_check() { return InterruptCheck(PyThread_get_thread_ident() == main_thread ? run_handlers : nullptr); }

// A clause from (kind, causal, indices, batch, heads, lists, width, block, query_block, base, left, right, key_mask, mask_batch).
Clause clause_of(const std::vector<int64_t>& from) {
  if (from.size() != 14) throw std::invalid_argument("a clause has 14 numbers");
  return {static_cast<ClauseKind>(from[0]),
          from[1] != 0,
          reinterpret_cast<const int64_t*>(from[2]),
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
          from[13]};
}

ContentPattern content_pattern_of(const std::vector<int64_t>& sizes, const std::vector<std::vector<int64_t>>& clauses) {
  if (sizes.size() != 5) throw std::invalid_argument("sizes has 5 numbers");
  ContentPattern pattern{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], {}};
  for (const auto& clause : clauses) pattern.clauses.push_back(clause_of(clause));
  return pattern;
}

NativePlan::NativePlan(const std::vector<int64_t>& sizes, const std::vector<std::vector<int64_t>>& clauses, int64_t gather,
                       int threads) {
  const ContentPattern pattern = content_pattern_of(sizes, clauses);
  InterruptCheck interrupt = signal_check();
  const nb::gil_scoped_release release;
  plan_content(pattern, gather, threads, interrupt, tables_, counts_);
}

// Sorted links from (batch, heads, n_q, n_k, rows, row_count, keys, key_count, lo, hi).
SortedLinks sorted_links_of(const std::vector<int64_t>& from) {
  if (from.size() != 10) throw std::invalid_argument("sorted links have 10 numbers");
  const auto table = [&](int i) { return reinterpret_cast<const int64_t*>(from[i]); };
  return {from[0], from[1], from[2], from[3], table(4), table(5), table(6), table(7), table(8), table(9)};
}

NativePlan::NativePlan(nb::handle fixed, const std::vector<int64_t>& sizes, const std::vector<std::vector<int64_t>>& pieces) {
  if (sizes.size() != 5) throw std::invalid_argument("sizes has 5 numbers");
  tables_.n_q = sizes[2], tables_.n_k = sizes[3], tables_.q_offset = sizes[4], tables_.tile = kRows;
  if (!fixed.is_none()) {
    read(fixed);
    counts_ = {nb::cast<int64_t>(fixed.attr("pairs")), nb::cast<int64_t>(fixed.attr("visited"))};
  }
  const nb::gil_scoped_release release;
  for (const auto& numbers : pieces) {
    const SortedLinks links = sorted_links_of(numbers);
    add_sorted_piece(links, sizes[0] * sizes[1] / (links.batch * links.heads), tables_, counts_);
  }
  tables_.overlapping = tables_.overlapping || tables_.pieces.size() > 1;
  tables_.finish();
}

// (address, batch stride, head stride, row stride); strides count elements.
using StridedAddress = std::vector<int64_t>;

TensorView tensor_view(const StridedAddress& from) {
  if (from.size() != 4) throw std::invalid_argument("a tensor is (address, batch stride, head stride, row stride)");
  return {reinterpret_cast<const void*>(from[0]), from[1], from[2], from[3]};
}

// The part of a call that forward and backward share. shape: (batch, heads, kv_heads, dim); dropout: (threshold, seed low, seed
// high), threshold 0 for none; keep_scale: 1 / (1 - p).
Call prepare(NativePlan& plan, int type, const std::vector<int64_t>& shape, double scale, const std::vector<int64_t>& dropout,
             double keep_scale) {
  if (shape.size() != 4 || dropout.size() != 3) throw std::invalid_argument("shape has 4 numbers, dropout 3");
  if (type != 0 && type != 1) throw std::invalid_argument("type is 0 (float32) or 1 (bfloat16)");
  Call call{};
  call.plan = &plan.tables().view();
  call.type = call.out_type = static_cast<Type>(type);
  call.batch = shape[0], call.heads = shape[1], call.kv_heads = shape[2], call.dim = shape[3];
  if (call.dim < 1 || call.dim > kMaxDim) throw std::invalid_argument("head_dim is outside 1 ... 256");
  if (call.batch < 1 || call.kv_heads < 1 || call.heads % call.kv_heads)
    throw std::invalid_argument("heads do not fit kv_heads");
  call.scale = static_cast<float>(scale);
  call.dropout = {dropout[0] > 0,
                  dropout[0] > 0xffffffff,
                  static_cast<uint32_t>(dropout[0]),
                  static_cast<uint32_t>(dropout[1]),
                  static_cast<uint32_t>(dropout[2]),
                  static_cast<float>(keep_scale)};
  call.merges = plan.overlapping();
  call.keep_masked_rows = !plan.covers_all_rows();
  return call;
}

// The terms of a call: addresses, lengths and strides in the order of farlight/kernels/cpu/launch.py; empty for none.
TermsView terms_view(const std::vector<int64_t>& from, double cap) {
  if (from.empty()) return {};
  if (from.size() != 10) throw std::invalid_argument("terms are 10 numbers");
  const auto floats = [&](int i) { return reinterpret_cast<float*>(from[i]); };
  const bool on = cap != 0.0 || from[0] || from[3];
  return {on,      static_cast<float>(cap), floats(0), from[1],   from[2],  floats(3),
          from[4], from[5],                 floats(6), floats(7), floats(8), floats(9)};
}

// Forward and backward of one call; outputs are written in place. Both return the bytes by which the plan's schedule has grown.
int64_t forward(NativePlan& plan, int type, int out_type, const std::vector<int64_t>& shape, const StridedAddress& q,
                const StridedAddress& k, const StridedAddress& v, int64_t out, int64_t lse, double scale,
                const std::vector<int64_t>& dropout, double keep_scale, const std::vector<int64_t>& terms, double cap,
                int threads) {
  Call call = prepare(plan, type, shape, scale, dropout, keep_scale);
  call.terms = terms_view(terms, cap);
  call.out_type = static_cast<Type>(out_type);
  call.q = tensor_view(q), call.k = tensor_view(k), call.v = tensor_view(v);
  call.result = reinterpret_cast<void*>(out);
  call.lse = reinterpret_cast<float*>(lse);
  const Kernels& kernels_of_isa = kernels();
  InterruptCheck interrupt = signal_check();
  const nb::gil_scoped_release release;
  const auto schedule = plan.schedule(call.batch, call.heads, call.kv_heads);
  run_forward(kernels_of_isa, call, *schedule, threads, interrupt);
  return plan.take_grown_bytes();
}

int64_t backward(NativePlan& plan, int type, int out_type, const std::vector<int64_t>& shape, const StridedAddress& q,
                 const StridedAddress& k, const StridedAddress& v, const StridedAddress& out, const StridedAddress& dout,
                 int64_t lse, int64_t dlse, int64_t dq, int64_t dk, int64_t dv, double scale,
                 const std::vector<int64_t>& dropout, double keep_scale, const std::vector<int64_t>& terms, double cap,
                 int threads) {
  Call call = prepare(plan, type, shape, scale, dropout, keep_scale);
  call.terms = terms_view(terms, cap);
  call.out_type = static_cast<Type>(out_type);
  call.q = tensor_view(q), call.k = tensor_view(k), call.v = tensor_view(v);
  call.out = tensor_view(out), call.dout = tensor_view(dout);
  call.lse = reinterpret_cast<float*>(lse);
  call.dlse = reinterpret_cast<const float*>(dlse);
  call.result = reinterpret_cast<void*>(dq);
  const Kernels& kernels_of_isa = kernels();
  InterruptCheck interrupt = signal_check();
  const nb::gil_scoped_release release;
  const auto schedule = plan.schedule(call.batch, call.heads, call.kv_heads);
  run_backward(kernels_of_isa, call, *schedule, reinterpret_cast<void*>(dk), reinterpret_cast<void*>(dv), threads, interrupt);
  return plan.take_grown_bytes();
}

// The tensors and the rule of a choice. numbers: (type, batch, heads, kv_heads, n_q, n_k, dim, query_mask, key_mask, mask_batch,
// block, query_block, offset, first, causal, shared, score, budget).
ChoiceProblem choice_of(const std::vector<int64_t>& numbers, const StridedAddress& q, const StridedAddress& k, double amount,
                        double scale) {
  if (numbers.size() != 18) throw std::invalid_argument("a choice has 18 numbers");
  const int64_t* n = numbers.data();
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
          amount,
          static_cast<float>(scale)};
}

// The chosen key blocks of a router.
ChosenLists choose(const std::vector<int64_t>& numbers, const StridedAddress& q, const StridedAddress& k, double amount,
                   double scale, int threads) {
  const ChoiceProblem problem = choice_of(numbers, q, k, amount, scale);
  const Kernels& kernels_of_isa = kernels();
  InterruptCheck interrupt = signal_check();
  const nb::gil_scoped_release release;
  return choose_blocks(kernels_of_isa, problem, threads, interrupt);
}

// See lost_bound.h. sizes and clauses: as for a plan; numbers: see choice_of.
void lost(const std::vector<int64_t>& sizes, const std::vector<std::vector<int64_t>>& clauses, const std::vector<int64_t>& numbers,
          const StridedAddress& q, const StridedAddress& k, double scale, int64_t lse, int64_t to, int threads) {
  const ContentPattern pattern = content_pattern_of(sizes, clauses);
  const LostProblem problem{pattern, choice_of(numbers, q, k, 0.0, scale), reinterpret_cast<const float*>(lse),
                            reinterpret_cast<float*>(to)};
  const Kernels& kernels_of_isa = kernels();
  InterruptCheck interrupt = signal_check();
  const nb::gil_scoped_release release;
  lost_bound(kernels_of_isa, problem, threads, interrupt);
}

// GFLOP/s of register-only float32 multiply-adds on `threads` threads: the upper bound of vector products on this CPU.
double fma_gflops(int threads) {
  const nb::gil_scoped_release no_gil;
  constexpr int64_t kIterations = 1 << 23;
  const Kernels& kernels_of_isa = kernels();
  std::vector<float> sums(threads);
  const auto start = std::chrono::steady_clock::now();
  InterruptCheck no_interrupt(nullptr);
  parallel_for(threads, threads, no_interrupt, [&](int64_t i) { sums[i] = kernels_of_isa.peak_fma(kIterations); });
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return 1e-9 * static_cast<double>(kIterations * kernels_of_isa.peak_fma_flops * threads) / seconds;
}

}  // namespace

// Names and signatures are private to farlight/kernels/cpu.
NB_MODULE(_cpu, m) {
  nb::set_leak_warnings(false);
  main_thread = nb::cast<unsigned long>(nb::module_::import_("threading").attr("main_thread")().attr("ident"));
  nb::class_<NativePlan>(m, "Plan", nb::is_weak_referenceable())
      .def(nb::init<nb::handle>(), "plan"_a)
      .def(nb::init<nb::handle, const std::vector<int64_t>&, const std::vector<std::vector<int64_t>>&>(), "fixed"_a.none(), "sizes"_a,
           "pieces"_a)
      .def(nb::init<const std::vector<int64_t>&, const std::vector<std::vector<int64_t>>&, int64_t, int>())
      .def_prop_ro("nbytes", [](const NativePlan& plan) { return plan.tables().bytes(); })
      .def_prop_ro("overlapping", &NativePlan::overlapping)
      .def_prop_ro("covers_all_rows", &NativePlan::covers_all_rows)
      .def_prop_ro("pairs", [](const NativePlan& plan) { return plan.counts().pairs; })
      .def_prop_ro("visited", [](const NativePlan& plan) { return plan.counts().visited; })
      .def("dense", [](const NativePlan& plan, int64_t batch, int64_t heads, int64_t address) {
        plan.tables().check_heads(batch, heads);
        plan.tables().dense(batch, heads, reinterpret_cast<uint8_t*>(address));
      });
  nb::class_<ChosenLists>(m, "ChosenLists")
      .def_ro("width", &ChosenLists::width)
      .def("copy_to", [](const ChosenLists& lists, int64_t address) { lists.copy_to(reinterpret_cast<int64_t*>(address)); });
  m.def("choose", &choose);
  m.def("lost", &lost);
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("fma_gflops", &fma_gflops, "threads"_a);
  m.def("isa", [] { return std::string(farlight::kernels().name); });
  m.def("available", &available_isas);
  m.def("use", &use_isa);
  farlight::bind_decode(m);
}
