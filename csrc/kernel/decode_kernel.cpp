// The decode kernels of one ISA; compiled once per ISA like kernel.cpp (see isa.h), and exports one `DecodeKernels` table.
#include "decode_attend.h"
#include "decode_visibility.h"

namespace farlight::FARLIGHT_NS {

namespace {

template <class T>
void attend_keys(const DecodeItem& item, char* scratch) {
  Arena arena(scratch);
  DecodeAttend<T>(item, arena).run();
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
  DecodeAttend<float> measured(item, arena);
  return arena.used();
}

void visible(const VisibilityProgram& program, const int64_t* position, int64_t count, int64_t i, uint8_t* to,
             uint8_t* scratch) {
  VisibilityEvaluator(position, count, i, scratch).run(program, to);
}

// out[i] = q · row_at(i) for rows of element type T, W rows at a time.
template <class T, class RowAt>
FARLIGHT_INLINE void dot_rows(const float* q, int64_t count, int64_t dim, float* out, RowAt row_at) {
  const T* row[W];
  for (int64_t i = 0; i < count; i += W) {
    for (int s = 0; s < W; ++s) row[s] = row_at(min<int64_t>(i + s, count - 1));
    const F x = dot_keys<T>(q, row, dim);
    if (i + W <= count) {
      store(out + i, x);
    } else {
      float rest[W];
      store(rest, x);
      for (int s = 0; i + s < count; ++s) out[i + s] = rest[s];
    }
  }
}

void dots(const float* q, const float* rows, const int32_t* index, int64_t count, int64_t dim, float* out) {
  if (index) dot_rows<float>(q, count, dim, out, [&](int64_t i) { return rows + index[i] * dim; });
  else dot_rows<float>(q, count, dim, out, [&](int64_t i) { return rows + i * dim; });
}

void code_dots(const float* q, const int8_t* codes, const float* scale, int64_t count, int64_t dim, float* out) {
  dot_rows<int8_t>(q, count, dim, out, [&](int64_t i) { return codes + i * dim; });
  for (int64_t i = 0; i < count; ++i) out[i] *= scale[i];
}

}  // namespace

extern const DecodeKernels decode_kernels;
const DecodeKernels decode_kernels{scratch_bytes, attend, visible, widen_row, narrow_row, dots, code_dots};

}  // namespace farlight::FARLIGHT_NS
