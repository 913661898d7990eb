#include "histogram.h"

#include <algorithm>
#include <bit>
#include <vector>

namespace farlight {

namespace {

struct Bin {
  double mass;
  int64_t count;
};

constexpr int64_t kChunkPairs = 1 << 15;  // pairs of one partial histogram, about
constexpr int64_t kIndexed = 256;         // pairs whose bins are computed before they are added
constexpr int64_t kCopies = 2;            // copies of each bin: neighbours in one bin do not wait for each other's sums

// Adds `count` probabilities to kCopies histograms of `binning.bins` bins, one behind the other.
void add_pairs(const float* p, int64_t count, const Binning& binning, Bin* to) {
  constexpr uint32_t one = std::bit_cast<uint32_t>(1.0f);
  const int32_t last = static_cast<int32_t>(binning.bins - 1);
  int32_t index[kIndexed];
  for (int64_t begin = 0; begin < count; begin += kIndexed) {
    const int64_t pairs = std::min(kIndexed, count - begin);
    for (int64_t i = 0; i < pairs; ++i) {
      // Negative: rounding lifted a probability above 1.
      int32_t bin = static_cast<int32_t>(one - std::bit_cast<uint32_t>(p[begin + i])) >> binning.shift;
      bin = bin < 0 ? 0 : bin;
      index[i] = bin > last ? last : bin;
    }
    for (int64_t i = 0; i < pairs; ++i) {
      Bin& bin = to[i % kCopies * binning.bins + index[i]];
      bin.mass += p[begin + i];
      ++bin.count;
    }
  }
}

// Adds the copies of a histogram to `mass` and `count`.
void add_copies(const Bin* from, int64_t bins, double* mass, int64_t* count) {
  for (int64_t bin = 0; bin < bins; ++bin) {
    Bin sum = from[bin];
    for (int64_t copy = 1; copy < kCopies; ++copy) {
      sum.mass += from[copy * bins + bin].mass;
      sum.count += from[copy * bins + bin].count;
    }
    mass[bin] += sum.mass;
    count[bin] += sum.count;
  }
}

}  // namespace

void add_to_histogram(const ProbabilityTile& tile, const Binning& binning, const HistogramView& to, int threads,
                      InterruptCheck& interrupt) {
  const int64_t bins = binning.bins, lines = tile.batch * tile.heads;
  const int64_t chunk_rows = std::max<int64_t>(1, kChunkPairs / std::max<int64_t>(1, tile.keys));
  const int64_t chunks = (tile.rows + chunk_rows - 1) / chunk_rows;
  if (!lines || !chunks) return;
  const auto offset = [&](int64_t line) { return line / tile.heads * to.batch_stride + line % tile.heads * to.head_stride; };
  // A head of one chunk is added to its histogram directly.
  const bool is_direct = chunks == 1;
  std::vector<double> mass(is_direct ? 0 : lines * chunks * bins);
  std::vector<int64_t> count(mass.size());
  parallel_for(lines * chunks, threads, interrupt, [&](int64_t i) {
    thread_local std::vector<Bin> local;
    local.assign(kCopies * bins, Bin{});
    const int64_t line = i / chunks, row = i % chunks * chunk_rows, rows = std::min(chunk_rows, tile.rows - row);
    add_pairs(tile.row(line * tile.rows + row), rows * tile.keys, binning, local.data());
    if (is_direct)
      add_copies(local.data(), bins, to.mass + offset(line), to.count + offset(line));
    else
      add_copies(local.data(), bins, mass.data() + i * bins, count.data() + i * bins);
  });
  if (is_direct) return;
  parallel_for(lines, threads, interrupt, [&](int64_t line) {
    for (int64_t i = line * chunks; i < (line + 1) * chunks; ++i)
      for (int64_t bin = 0; bin < bins; ++bin) {
        to.mass[offset(line) + bin] += mass[i * bins + bin];
        to.count[offset(line) + bin] += count[i * bins + bin];
      }
  });
}

}  // namespace farlight
