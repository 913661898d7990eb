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

void dots(const float* q, const float* rows, int64_t count, int64_t dim, float* out) {
  const float* row[W];
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    for (int s = 0; s < W; ++s) row[s] = rows + (i + s) * dim;
    store(out + i, dot_keys<float>(q, row, dim));
  }
  if (i < count) {
    float rest[W];
    for (int s = 0; s < W; ++s) row[s] = rows + min<int64_t>(i + s, count - 1) * dim;
    store(rest, dot_keys<float>(q, row, dim));
    for (int s = 0; i + s < count; ++s) out[i + s] = rest[s];
  }
}

}  // namespace

extern const DecodeKernels decode_kernels;
const DecodeKernels decode_kernels{scratch_bytes, attend, visible, widen_row, narrow_row, dots};

}  // namespace farlight::FARLIGHT_NS
