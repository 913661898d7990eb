// Python's side of decoding: `farlight._cpu.Decoder`. Tensors are passed as addresses and strides, as in binding.cpp; dtypes,
// devices, shapes and lifetimes are the caller's duty (farlight/decoding/native.py).
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include "binding.h"
#include "decoder.h"
#include "dispatch.h"
#include "tensor_reader.h"

namespace nb = nanobind;

namespace farlight {

namespace {

TokenTensor token_tensor(const StridedAddress& from, int type) {
  if (type < 0 || type > 2) throw std::invalid_argument("type is 0 (float32), 1 (bfloat16) or 2 (float16)");
  return {tensor_view(from), static_cast<KeyType>(type)};
}

// pages: (k, v, k scale, v scale, capacity, 1 = shared) of each; tables: addresses of position, last_use, gapless and state;
// rule: addresses of last_use and gapless, first position and end.
void add_store(Decoder& decoder, const std::vector<int64_t>& pages, int page_shift, const std::vector<int32_t>& kv_heads,
               int64_t rows, int64_t capacity, const std::vector<int64_t>& tables, const std::vector<int64_t>& rule,
               std::vector<int64_t> program, int64_t program_depth) {
  if (pages.size() % 6 || tables.size() != 4 || rule.size() != 4) throw std::invalid_argument("malformed store");
  DecodeStore store;
  for (size_t p = 0; p < pages.size(); p += 6)
    store.pages.push_back({pointer<char>(pages[p]), pointer<char>(pages[p + 1]), pointer<float>(pages[p + 2]),
                           pointer<float>(pages[p + 3]), pages[p + 4], static_cast<int32_t>(pages[p + 5])});
  store.page_shift = page_shift;
  store.kv_heads = kv_heads;
  store.rows = rows, store.capacity = capacity;
  store.position = pointer<int64_t>(tables[0]), store.last_use = pointer<int64_t>(tables[1]);
  store.gapless = pointer<uint8_t>(tables[2]), store.state = pointer<int64_t>(tables[3]);
  store.rule_last_use = pointer<const int64_t>(rule[0]), store.rule_gapless = pointer<const uint8_t>(rule[1]);
  store.rule_start = rule[2], store.rule_stop = rule[3];
  store.program = std::move(program), store.program_depth = program_depth;
  decoder.add_store(std::move(store));
}

// () or (address of slopes, of the table by distance, its first distance and length, address of the key biases, their batch and
// head strides, address of sinks); 0 = none.
CallTerms terms_of(double cap, const std::vector<int64_t>& from) {
  CallTerms terms{};
  if (from.empty()) return terms;
  if (from.size() != 8) throw std::invalid_argument("malformed score terms");
  return {static_cast<float>(cap), pointer<const float>(from[0]), pointer<const float>(from[1]), from[2], from[3],
          pointer<const float>(from[4]), from[5], from[6], pointer<const float>(from[7])};
}

// q: address and strides; shape: (query heads, queries of each); where: (address of positions or 0, their rows, first
// position); results: (address of out, of the lse or 0).
DecodeQueries queries_of(const Decoder& decoder, const StridedAddress& q, int type, const std::vector<int64_t>& shape,
                         const std::vector<int64_t>& where, double scale, const std::vector<int64_t>& results, int threads,
                         double cap, const std::vector<int64_t>& terms) {
  if (shape.size() != 2 || shape[0] < 1 || shape[0] % decoder.kv_heads())
    throw std::invalid_argument("heads do not fit the key heads");
  return {token_tensor(q, type), shape[0], shape[1], pointer<const int64_t>(where.at(0)), where.at(1), where.at(2),
          static_cast<float>(scale), pointer<void>(results.at(0)), pointer<float>(results.at(1)), threads,
          terms_of(cap, terms)};
}

bool attend(const Decoder& decoder, const StridedAddress& q, int type, const std::vector<int64_t>& shape,
            const std::vector<int64_t>& where, double scale, const std::vector<int64_t>& results, int threads, double cap,
            const std::vector<int64_t>& terms) {
  const DecodeQueries queries = queries_of(decoder, q, type, shape, where, scale, results, threads, cap, terms);
  const nb::gil_scoped_release release;
  return decoder.attend(queries);
}

// masks: (address, batch stride, head stride, query stride) in bytes of each store's.
bool attend_masked(const Decoder& decoder, const StridedAddress& q, int type, const std::vector<int64_t>& shape,
                   const std::vector<int64_t>& where, double scale, const std::vector<int64_t>& results, int threads,
                   double cap, const std::vector<int64_t>& terms, const std::vector<std::vector<int64_t>>& masks) {
  const DecodeQueries queries = queries_of(decoder, q, type, shape, where, scale, results, threads, cap, terms);
  std::vector<SlotMask> slot_masks;
  for (const auto& mask : masks) slot_masks.push_back({pointer<const uint8_t>(mask.at(0)), mask.at(1), mask.at(2), mask.at(3)});
  if (slot_masks.size() != decoder.stores()) throw std::invalid_argument("one mask for each store is needed");
  const nb::gil_scoped_release release;
  decoder.attend_masked(queries, slot_masks);
  return true;
}

bool attend_routed(const Decoder& decoder, const StridedAddress& q, int type, const std::vector<int64_t>& shape,
                   const std::vector<int64_t>& where, double scale, const std::vector<int64_t>& results, int threads,
                   double cap, const std::vector<int64_t>& terms) {
  const DecodeQueries queries = queries_of(decoder, q, type, shape, where, scale, results, threads, cap, terms);
  const nb::gil_scoped_release release;
  return decoder.attend_routed(queries);
}

// nodes: (kind, index) of each; rules: (block, budget, address of mean, lower and upper, capacity, address of the means' codes
// and of their scales) of each, limits: (limit, scale); patterns: (depth, code).
void set_router(Decoder& decoder, const std::vector<std::vector<int64_t>>& nodes,
                const std::vector<std::vector<int64_t>>& rules, const std::vector<std::vector<double>>& limits,
                const std::vector<std::vector<int64_t>>& patterns) {
  std::vector<RouterNode> router;
  for (const auto& node : nodes) router.push_back({static_cast<RouterNode::Kind>(node.at(0)), node.at(1)});
  std::vector<BlockRule> blocks;
  for (size_t r = 0; r < rules.size(); ++r) {
    const auto& rule = rules[r];
    blocks.push_back({rule.at(0), static_cast<BlockBudget>(rule.at(1)), limits.at(r).at(0),
                      static_cast<float>(limits.at(r).at(1)), pointer<float>(rule.at(2)), pointer<float>(rule.at(3)),
                      pointer<float>(rule.at(4)), rule.at(5), pointer<int8_t>(rule.at(6)), pointer<float>(rule.at(7))});
  }
  std::vector<RouterPattern> programs;
  for (const auto& pattern : patterns) programs.push_back({{pattern.begin() + 1, pattern.end()}, pattern.at(0)});
  decoder.set_router(std::move(router), std::move(blocks), std::move(programs));
}

// One token: its append, then the attention of its query. results: (address of out, of the lse or 0). 0: nothing was changed,
// since the append is more than one write per store; 1: only the append was done; 2: both.
int step(Decoder& decoder, const TokenTensor& q, const TokenTensor& k, const TokenTensor& v, int64_t heads, int64_t position,
         double scale, const std::vector<int64_t>& results, int threads, double cap, const std::vector<int64_t>& terms) {
  const DecodeQueries queries{q, heads, 1, nullptr, 1, position, static_cast<float>(scale), pointer<void>(results.at(0)),
                              pointer<float>(results.at(1)), threads, terms_of(cap, terms)};
  if (!decoder.append(k, v, position)) return 0;
  const nb::gil_scoped_release release;
  return (decoder.has_router() ? decoder.attend_routed(queries) : decoder.attend(queries)) ? 2 : 1;
}

int step_by_address(Decoder& decoder, const StridedAddress& q, const StridedAddress& k, const StridedAddress& v, int type,
                    int64_t heads, int64_t position, double scale, const std::vector<int64_t>& results, int threads, double cap,
                    const std::vector<int64_t>& terms) {
  if (heads < 1 || heads % decoder.kv_heads()) throw std::invalid_argument("heads do not fit the key heads");
  return step(decoder, token_tensor(q, type), token_tensor(k, type), token_tensor(v, type), heads, position, scale, results,
              threads, cap, terms);
}

// Of torch tensors; heads: of q, 0 = any multiple of the key heads. 0, too, where one of them is not plain or does not fit.
int step_of_tensors(Decoder& decoder, const TensorReader& reader, nb::handle q, nb::handle k, nb::handle v, bool grad, int type,
                    int64_t heads, int64_t position, double scale, const std::vector<int64_t>& results, int threads, double cap,
                    const std::vector<int64_t>& terms) {
  const KeyType token = static_cast<KeyType>(type);
  int64_t kv_heads = decoder.kv_heads();
  const auto read = [&](nb::handle x, int64_t& n) { return reader.token(x, token, decoder.batch(), n, decoder.dim(), grad); };
  const auto q_view = read(q, heads), k_view = read(k, kv_heads), v_view = read(v, kv_heads);
  if (!q_view || !k_view || !v_view || heads < 1 || heads % kv_heads) return 0;
  return step(decoder, {*q_view, token}, {*k_view, token}, {*v_view, token}, heads, position, scale, results, threads, cap,
              terms);
}

// What the query at position i sees of `count` positions at an address: one byte each. For tests.
std::vector<int> visible(const std::vector<int64_t>& code, int64_t depth, int64_t positions, int64_t count, int64_t i) {
  std::vector<uint8_t> to(count), stack(depth * count);
  const VisibilityProgram program{code.data(), static_cast<int64_t>(code.size()), depth};
  kernels().decode->visible(program, pointer<const int64_t>(positions), count, i, to.data(), stack.data());
  return {to.begin(), to.end()};
}

}  // namespace

void bind_decode(nb::module_& m) {
  nb::class_<TensorReader>(m, "TensorReader").def(nb::init<nb::handle>());
  nb::class_<Decoder>(m, "Decoder")
      .def("__init__",
           [](Decoder* self, int64_t batch, int64_t kv_heads, int64_t dim, int type, int64_t keep_back) {
             if (dim < 1 || dim > kMaxDim) throw std::invalid_argument("head_dim is outside 1 ... 256");
             if (batch < 1 || kv_heads < 1 || keep_back < 0) throw std::invalid_argument("malformed cache");
             if (type < 0 || type > 3) throw std::invalid_argument("type is 0, 1, 2 or 3");
             new (self) Decoder(batch, kv_heads, dim, static_cast<KeyType>(type), keep_back);
           })
      .def("add_store", &add_store)
      .def("step", &step_of_tensors)
      .def("step_by_address", &step_by_address)
      .def("attend", &attend)
      .def("attend_masked", &attend_masked)
      .def("set_router", &set_router)
      .def("attend_routed", &attend_routed);
  m.def("visible", &visible);
}

}  // namespace farlight
