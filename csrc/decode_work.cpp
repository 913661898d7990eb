// Scheduling of decoding (decode_work.h).
#include "decode_work.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "memory.h"
#include "parallel.h"

namespace farlight {

namespace {

constexpr int64_t kPartKeys = 512;         // fewest keys of a part
constexpr int64_t kKeyPage = 64;           // parts are whole pages, as chunks of the kernel are
constexpr int64_t kParts = 256;            // parts of all units together, about
constexpr int64_t kBytesOfThreads = 1 << 16;  // below, waking a thread takes longer than reading
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Scratch memory of the calling thread.
char* thread_scratch(int64_t bytes) {
  thread_local Buffer buffer;
  if (buffer.bytes() < bytes) buffer = Buffer(bytes);
  return buffer.as<char>();
}

// Adds the partial result `from` to `to`; both are dim sums, a maximum and a sum.
void merge(float* to, const float* from, int64_t dim) {
  const float most = std::max(to[dim], from[dim]);
  const float a = most == -kInfinity ? 1.0f : std::exp2(to[dim] - most);
  const float b = most == -kInfinity ? 1.0f : std::exp2(from[dim] - most);
  for (int64_t d = 0; d < dim; ++d) to[d] = a * to[d] + b * from[d];
  to[dim] = most;
  to[dim + 1] = a * to[dim + 1] + b * from[dim + 1];
}

// Adds a sink's weight to a row's sum; where it raises the maximum, the weighted values follow.
void add_sink(float* sums, int64_t dim, float sink) {
  const float score = sink * 1.44269504088896340736f, raised = std::max(score, sums[dim]);
  const float weight = std::exp2(sums[dim] - raised);
  for (int64_t d = 0; d < dim; ++d) sums[d] *= weight;
  sums[dim + 1] = sums[dim + 1] * weight + std::exp2(score - raised);
  sums[dim] = raised;
}

// Writes a row: sums / sum and the lse; zeros and -inf where it saw no key. sink: null = none.
void finish(const DecodeKernels& kernels, float* sums, const float* sink, int64_t row, int64_t dim,
            const DecodeOutput& output) {
  if (sink) add_sink(sums, dim, *sink);
  const float total = sums[dim + 1], factor = total == 0.0f ? 0.0f : 1.0f / total;
  for (int64_t d = 0; d < dim; ++d) sums[d] *= factor;
  kernels.narrow(output.type, sums, dim, static_cast<char*>(output.out) + row * dim * bytes_of(output.type));
  if (output.lse)
    output.lse[row] = total == 0.0f ? -kInfinity : (sums[dim] + std::log2(total)) * 0.693147180559945309f;
}

}  // namespace

int64_t bytes_of(KeyType type) { return type == KeyType::f32 ? 4 : type == KeyType::i8 ? 1 : 2; }

void DecodeSchedule::split(int64_t dim) {
  parts_.clear();
  const int64_t most = std::max<int64_t>(1, kParts / std::max<int64_t>(1, static_cast<int64_t>(units.size())));
  int64_t rows = 0;
  for (size_t u = 0; u < units.size(); ++u) {
    const DecodeUnit& unit = units[u];
    const int64_t parts = std::clamp<int64_t>(unit.count / kPartKeys, 1, most);
    const int64_t keys = (unit.count + parts * kKeyPage - 1) / (parts * kKeyPage) * kKeyPage;
    int64_t first = 0;
    do {
      parts_.push_back({static_cast<int64_t>(u), first, std::min(keys, unit.count - first), rows});
      rows += unit.rows, first += keys;
    } while (first < unit.count);
  }
  partial_.resize(rows * (dim + 2));
  pointers_.resize(rows);
  query_rows_.resize(rows);
  for (int64_t r = 0; r < rows; ++r) pointers_[r] = partial_.data() + r * (dim + 2);
  for (const Part& part : parts_)
    for (int64_t r = 0; r < units[part.unit].rows; ++r)
      query_rows_[part.pointer + r] = queries.data() + (units[part.unit].first_row + r) * dim;
}

void DecodeSchedule::run(const DecodeKernels& kernels, int64_t dim, const DecodeOutput& output, int threads) {
  split(dim);
  int64_t bytes = 0, rows = 1;
  for (const DecodeUnit& unit : units) {
    bytes += 2 * unit.count * dim * bytes_of(unit.type);
    rows = std::max(rows, unit.rows);
  }
  const int64_t scratch = kernels.scratch_bytes(rows, dim), count = static_cast<int64_t>(parts_.size());
  const auto sink_of = [&](int64_t row) { return sinks.empty() ? nullptr : sinks.data() + row; };
  const auto is_whole = [&](const Part& part) { return part.count == units[part.unit].count; };
  InterruptCheck no_interrupt(nullptr);
  parallel_for(count, bytes < kBytesOfThreads ? 1 : threads, no_interrupt, [&](int64_t p) {
    const Part& part = parts_[p];
    const DecodeUnit& unit = units[part.unit];
    const DecodeItem item{unit.pages,
                          unit.page_shift,
                          unit.type,
                          unit.head,
                          dim,
                          unit.rows,
                          query_rows_.data() + part.pointer,
                          factor,
                          output.type,
                          unit.slots ? unit.slots + part.first : nullptr,
                          unit.first + part.first,
                          part.count,
                          unit.masks < 0 ? nullptr : masks.data() + unit.masks,
                          row_terms.empty() ? nullptr : &terms,
                          row_terms.empty() ? nullptr : row_terms.data() + unit.first_row,
                          unit.position,
                          pointers_.data() + part.pointer};
    kernels.attend(item, thread_scratch(scratch));
    for (int64_t r = 0; is_whole(part) && r < unit.rows; ++r)
      finish(kernels, pointers_[part.pointer + r], sink_of(unit.first_row + r), unit.first_row + r, dim, output);
  });
  for (int64_t p = 0; p < count;) {
    const Part& first = parts_[p];
    const DecodeUnit& unit = units[first.unit];
    const bool is_split = !is_whole(first);
    for (++p; p < count && parts_[p].unit == first.unit; ++p)
      for (int64_t r = 0; r < unit.rows; ++r) merge(pointers_[first.pointer + r], pointers_[parts_[p].pointer + r], dim);
    for (int64_t r = 0; is_split && r < unit.rows; ++r)
      finish(kernels, pointers_[first.pointer + r], sink_of(unit.first_row + r), unit.first_row + r, dim, output);
  }
}

}  // namespace farlight
