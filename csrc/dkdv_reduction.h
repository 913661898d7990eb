// Deterministic reduction of dk and dv over slabs.
//
// A group (batch item, key head) is cut into slabs that run in parallel. Every slab accumulates dk and dv in float32 blocks of
// kBlock keys of its own; a block's sums are then added in the order of the slabs. So no atomics are needed and the result is
// the same bit for bit for any number of threads. In float32, with a head dimension that is a multiple of 16, the first slab
// that touches a block accumulates directly in the output, which saves that block's buffer and copy. dk and dv may differ in
// width.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "buffer_pool.h"
#include "schedule.h"
#include "views.h"

namespace farlight {

// Accumulators and their reduction for one call of the backward pass. A slab index is group * slab_count + slab. Calls on
// different slabs and different blocks may run concurrently.
class DkDvReduction {
 public:
  DkDvReduction(const Kernels& kernels, const Call& call, const Schedule& schedule, void* dk, void* dv);
  ~DkDvReduction();

  void open_slab(int64_t unit);                     // allocates and zeroes the slab's blocks
  DkDvBlocks blocks_of(int64_t unit) const;         // the accumulators for the kernels
  bool finish_slab(int64_t unit);                   // true for the last slab of its group to finish
  void reduce_block(int64_t group, int64_t block);  // sums one block of keys over the group's slabs into dk and dv
  void release_group(int64_t group);                // recycles the group's buffers for later slabs

 private:
  // The accumulators of a slab: a pointer per block of keys, null where the slab does not touch the block.
  struct SlabSums {
    std::vector<float*> dk, dv;
    Buffer buffer;
  };
  // dk or dv: where it is written, and the layout of its accumulators.
  struct Gradient {
    void* data;
    int64_t dim, stride;  // elements of a row; floats between rows of a block
    bool sums_in_output;

    Gradient(void* tensor, int64_t width, Type type)
        : data(tensor),
          dim(width),
          stride((width + 15) / 16 * 16),
          sums_in_output(type == Type::f32 && width % 16 == 0) {}
  };
  // Zeroed accumulators of a block: in the output, or taken from `next`.
  float* zeroed_block(const Gradient& gradient, bool in_output, int64_t group, int64_t block, float*& next) const;
  void reduce_tensor(const Gradient& gradient, int64_t group, int64_t block, std::vector<float*> SlabSums::* side);
  // A buffer from this call's free list, else from the process's pool.
  Buffer take_buffer(int64_t bytes);

  const Kernels& kernels_;
  const Call& call_;
  const Schedule& schedule_;
  Gradient dk_, dv_;
  std::vector<SlabSums> slabs_;
  std::unique_ptr<std::atomic<int32_t>[]> slabs_left_;
  std::mutex mutex_;
  std::vector<Buffer> free_buffers_;
};

}  // namespace farlight
