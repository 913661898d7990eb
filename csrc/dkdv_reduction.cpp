// Deterministic reduction of dk and dv over slabs (dkdv_reduction.h).
#include "dkdv_reduction.h"

#include <algorithm>
#include <cstring>

namespace farlight {

DkDvReduction::DkDvReduction(const Kernels& kernels, const Call& call, const Schedule& schedule, void* dk, void* dv)
    : kernels_(kernels),
      call_(call),
      schedule_(schedule),
      dk_(dk, call.dim, call.type),
      dv_(dv, call.value_dim, call.type),
      slabs_(schedule.groups() * schedule.slab_count),
      slabs_left_(new std::atomic<int32_t>[schedule.groups()]) {
  for (int64_t g = 0; g < schedule.groups(); ++g)
    slabs_left_[g].store(static_cast<int32_t>(schedule.slab_count), std::memory_order_relaxed);
}

DkDvReduction::~DkDvReduction() {
  for (SlabSums& slab : slabs_) buffer_pool().release(std::move(slab.buffer));
  for (Buffer& candidate : free_buffers_) buffer_pool().release(std::move(candidate));
}

Buffer DkDvReduction::take_buffer(int64_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (Buffer& candidate : free_buffers_)
      if (candidate.bytes() >= bytes) {
        Buffer buffer = std::move(candidate);
        candidate = std::move(free_buffers_.back());
        free_buffers_.pop_back();
        return buffer;
      }
  }
  return buffer_pool().acquire(bytes);
}

void DkDvReduction::open_slab(int64_t slab_index) {
  const int64_t group = slab_index / schedule_.slab_count, slab = slab_index % schedule_.slab_count;
  const KeyBlockSet& key_blocks = schedule_.key_blocks_of(group, slab);
  SlabSums& sums = slabs_[slab_index];
  sums.dk.assign(schedule_.blocks, nullptr);
  sums.dv.assign(schedule_.blocks, nullptr);
  float* next = nullptr;
  for (const int32_t block : key_blocks.blocks) {
    const auto touched_by = [&](int64_t s) {
      const std::vector<int32_t>& list = schedule_.key_blocks_of(group, s).blocks;
      return std::binary_search(list.begin(), list.end(), block);
    };
    bool first = dk_.sums_in_output || dv_.sums_in_output;
    for (int64_t s = 0; first && s < slab; ++s) first = !touched_by(s);
    const bool dk_in_output = first && dk_.sums_in_output, dv_in_output = first && dv_.sums_in_output;
    if (!next && !(dk_in_output && dv_in_output)) {
      const int64_t floats = static_cast<int64_t>(key_blocks.blocks.size()) * kBlock * (dk_.stride + dv_.stride);
      sums.buffer = take_buffer(floats * static_cast<int64_t>(sizeof(float)));
      next = sums.buffer.as<float>();
    }
    sums.dk[block] = zeroed_block(dk_, dk_in_output, group, block, next);
    sums.dv[block] = zeroed_block(dv_, dv_in_output, group, block, next);
  }
}

float* DkDvReduction::zeroed_block(const Gradient& gradient, bool in_output, int64_t group, int64_t block, float*& next) const {
  const int64_t first = block * int64_t{kBlock};
  const int64_t rows = in_output ? std::min<int64_t>(kBlock, call_.plan->n_k - first) : kBlock;
  float* to = next;
  if (in_output) to = static_cast<float*>(gradient.data) + (group * call_.plan->n_k + first) * gradient.stride;
  else next += kBlock * gradient.stride;
  std::memset(to, 0, rows * gradient.stride * sizeof(float));
  return to;
}

DkDvBlocks DkDvReduction::blocks_of(int64_t slab_index) const {
  return {slabs_[slab_index].dk.data(), slabs_[slab_index].dv.data(), dk_.stride, dv_.stride, {}};
}

bool DkDvReduction::finish_slab(int64_t slab_index) {
  return slabs_left_[slab_index / schedule_.slab_count].fetch_sub(1, std::memory_order_acq_rel) == 1;
}

void DkDvReduction::reduce_block(int64_t group, int64_t block) {
  reduce_tensor(dk_, group, block, &SlabSums::dk);
  reduce_tensor(dv_, group, block, &SlabSums::dv);
}

void DkDvReduction::reduce_tensor(const Gradient& gradient, int64_t group, int64_t block,
                                  std::vector<float*> SlabSums::* side) {
  const int64_t dim = gradient.dim, first = group * call_.plan->n_k + block * kBlock;
  const int64_t rows = std::min<int64_t>(kBlock, call_.plan->n_k - block * kBlock);
  const int64_t width = call_.type == Type::f32 ? 4 : 2;
  char* out_rows = static_cast<char*>(gradient.data) + first * dim * width;
  std::vector<float*> addends;
  for (int64_t s = 0; s < schedule_.slab_count; ++s)
    if (float* sums = (slabs_[group * schedule_.slab_count + s].*side)[block]) addends.push_back(sums);
  if (addends.empty()) std::memset(out_rows, 0, rows * dim * width);
  else kernels_.reduce(addends.data(), static_cast<int64_t>(addends.size()), rows, gradient.stride, dim, call_.type, out_rows);
}

void DkDvReduction::release_group(int64_t group) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (int64_t s = 0; s < schedule_.slab_count; ++s) {
    SlabSums& sums = slabs_[group * schedule_.slab_count + s];
    if (sums.buffer.as<float>()) free_buffers_.push_back(std::move(sums.buffer));
    sums.dk = {};
    sums.dv = {};
  }
}

}  // namespace farlight
