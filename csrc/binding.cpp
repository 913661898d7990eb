// The Python module farlight._cpu (nanobind, stable ABI). A plan is converted once into an owned, validated NativePlan; a call
// passes tensors as addresses and strides, which costs a fraction of a microsecond where array arguments would cost ten.
// dtypes, devices and shapes are checked by farlight/kernels/cpu.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>

#include "dispatch.h"
#include "native_plan.h"
#include "run.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace farlight;

namespace {

unsigned long main_thread = 0;  // Python's identifier of the main thread

// Runs pending Python signal handlers, which Python does in the main thread only. Rethrows what a handler raised
// (KeyboardInterrupt).
void run_handlers() {
  const nb::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

// The part of a call that forward and backward share, without the plan's tables. shape: (batch, heads, kv_heads, dim,
// value_dim); dropout: (threshold, seed low, seed high), threshold 0 for none; keep_scale: 1 / (1 - p).
Call prepare(NativePlan& plan, int type, const std::vector<int64_t>& shape, double scale, const std::vector<int64_t>& dropout,
             double keep_scale) {
  if (shape.size() != 5 || dropout.size() != 3) throw std::invalid_argument("shape has 5 numbers, dropout 3");
  if (type != 0 && type != 1) throw std::invalid_argument("type is 0 (float32) or 1 (bfloat16)");
  Call call{};
  call.type = call.out_type = static_cast<Type>(type);
  call.batch = shape[0], call.heads = shape[1], call.kv_heads = shape[2];
  call.dim = shape[3], call.value_dim = shape[4];
  for (const int64_t dim : {call.dim, call.value_dim})
    if (dim < 1 || dim > kMaxDim) throw std::invalid_argument("head_dim is outside 1 ... 256");
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
  call.result = reinterpret_cast<void*>(out), call.result_dim = call.value_dim;
  call.lse = reinterpret_cast<float*>(lse);
  const Kernels& kernels_of_isa = kernels();
  InterruptCheck interrupt = signal_check();
  const nb::gil_scoped_release release;
  const bool is_plain = !call.terms.on && !call.terms.sinks && !call.dropout.on;
  if (is_plain && plan.visits_rows(call.type, threads, interrupt)) {
    run_row_visits(kernels_of_isa, call, *plan.content(), threads, interrupt);
    return plan.take_grown_bytes();
  }
  if (plan.plans_in_place()) {
    run_content_tiles(kernels_of_isa, call, *plan.content(), plan.gather(), threads, interrupt);
    return plan.take_grown_bytes();
  }
  const auto schedule = plan.schedule(call.batch, call.heads, call.kv_heads, false, threads, interrupt);
  call.plan = &plan.tables(threads, interrupt).view();
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
  call.result = reinterpret_cast<void*>(dq), call.result_dim = call.dim;
  const Kernels& kernels_of_isa = kernels();
  InterruptCheck interrupt = signal_check();
  const nb::gil_scoped_release release;
  const auto schedule = plan.schedule(call.batch, call.heads, call.kv_heads, true, threads, interrupt);
  call.plan = &plan.tables(threads, interrupt).view();
  run_backward(kernels_of_isa, call, *schedule, reinterpret_cast<void*>(dk), reinterpret_cast<void*>(dv), threads, interrupt);
  return plan.take_grown_bytes();
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

InterruptCheck farlight::signal_check() {
  return InterruptCheck(PyThread_get_thread_ident() == main_thread ? run_handlers : nullptr);
}

// Names and signatures are private to farlight/kernels/cpu.
NB_MODULE(_cpu, m) {
  nb::set_leak_warnings(false);
  main_thread = nb::cast<unsigned long>(nb::module_::import_("threading").attr("main_thread")().attr("ident"));
  bind_plan(m);
  bind_content(m);
  bind_decode(m);
  bind_analysis(m);
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("fma_gflops", &fma_gflops, "threads"_a);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("available", &available_isas);
  m.def("use", &use_isa);
}
