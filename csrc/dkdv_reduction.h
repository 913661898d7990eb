// Where dk and dv come together. Every slab adds into blocks of its own; a group's blocks are added up in the order of its
// slabs, so that the result does not depend on who was faster. In float32 the first slab to touch a block adds straight into
// the output.
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

class DkDvReduction {
 public:
  DkDvReduction(const Kernels& kernels, const Call& call, const Schedule& schedule, void* dk, void* dv);
  ~DkDvReduction();

  void open(int64_t unit);  // clears the unit's blocks
  DkDvBlocks of(int64_t unit) const;
  bool finished(int64_t unit);  // whether this was the last unit of its group
  void add_up(int64_t group, int64_t block);
  void close(int64_t group);  // gives the group's memory back

 private:
  struct Unit {
    std::vector<float*> dk, dv;  // by block; null where not touched
    Buffer room;
  };
  void add_up_one(void* out, int64_t group, int64_t block, std::vector<float*> Unit::*side);
  Buffer borrow(int64_t bytes);

  const Kernels& kernels_;
  const Call& call_;
  const Schedule& schedule_;
  void *dk_, *dv_;
  int64_t stride_;
  bool direct_;
  std::vector<Unit> units_;
  std::unique_ptr<std::atomic<int32_t>[]> left_;
  std::mutex guard_;
  std::vector<Buffer> spare_;
};

}  // namespace farlight
