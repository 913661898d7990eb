// The decode kernels of one ISA; compiled once per ISA like kernel.cpp (see isa.h), and exports one `DecodeKernels` table.
#include "decode_attend.h"
#include "decode_visibility.h"

namespace farlight::FARLIGHT_NS {

namespace {

template <class T>
void attend_keys(const DecodeItem& item, char* scratch) {
  Arena arena(scratch);
  if (item.dim == 64) DecodeAttend<T, Constant<64>>(item, {}, arena).run();
  else if (item.dim == 128) DecodeAttend<T, Constant<128>>(item, {}, arena).run();
  else DecodeAttend<T, int64_t>(item, item.dim, arena).run();
}

void attend(const DecodeItem& item, char* scratch) {
  if (item.type == KeyType::f32) attend_keys<float>(item, scratch);
  else if (item.type == KeyType::bf16) attend_keys<Bf16>(item, scratch);
  else if (item.type == KeyType::f16) attend_keys<Half>(item, scratch);
  else attend_keys<int8_t>(item, scratch);
}

int64_t scratch_bytes(int64_t rows, int64_t dim) {
  DecodeItem item{};
  item.rows = rows, item.dim = dim;
  Arena arena(nullptr);
  DecodeAttend<float, int64_t> measured(item, dim, arena);
  return arena.used();
}

void visible(const VisibilityProgram& program, const int64_t* position, int64_t count, int64_t i, uint8_t* to,
             uint8_t* scratch) {
  VisibilityEvaluator(position, count, i, scratch).run(program, to);
}

// out[i] = q · rows[i], W rows at a time.
template <class T, class Rows, class Dim>
FARLIGHT_INLINE void dot_rows(const float* q, const Rows& rows, int64_t count, Dim dim, float* out) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(out + i, dot_keys<T>(q, rows_from(rows, i), dim));
  if (i == count) return;
  const T* last[W];
  float rest[W];
  for (int s = 0; s < W; ++s) last[s] = rows[min<int64_t>(i + s, count - 1)];
  store(rest, dot_keys<T, const T* const*>(q, last, dim));
  for (int s = 0; i + s < count; ++s) out[i + s] = rest[s];
}
template <class T>
FARLIGHT_INLINE void dot_rows(const float* q, const T* rows, int64_t count, int64_t dim, float* out) {
  if (dim == 64) dot_rows<T>(q, RowRun<T, Constant<64>>{rows, {}}, count, Constant<64>{}, out);
  else if (dim == 128) dot_rows<T>(q, RowRun<T, Constant<128>>{rows, {}}, count, Constant<128>{}, out);
  else dot_rows<T>(q, RowRun<T, int64_t>{rows, dim}, count, dim, out);
}

// Rows `first` + index[i] * dim.
template <class T>
struct IndexedRows {
  const T* first;
  const int32_t* index;
  int64_t dim;
  FARLIGHT_INLINE const T* operator[](int64_t i) const { return first + index[i] * dim; }
};
template <class T>
FARLIGHT_INLINE IndexedRows<T> rows_from(const IndexedRows<T>& rows, int64_t i) {
  return {rows.first, rows.index + i, rows.dim};
}

void dots(const float* q, const float* rows, const int32_t* index, int64_t count, int64_t dim, float* out) {
  if (index) dot_rows<float>(q, IndexedRows<float>{rows, index, dim}, count, dim, out);
  else dot_rows(q, rows, count, dim, out);
}

void code_dots(const float* q, const int8_t* codes, const float* scale, int64_t count, int64_t dim, float* out) {
  dot_rows(q, codes, count, dim, out);
  for (int64_t i = 0; i < count; ++i) out[i] *= scale[i];
}

}  // namespace

extern const DecodeKernels decode_kernels;
const DecodeKernels decode_kernels{scratch_bytes, attend,     visible, list_nonzero, expired,
                                   widen_row,     narrow_row, dots,    code_dots};

}  // namespace farlight::FARLIGHT_NS
