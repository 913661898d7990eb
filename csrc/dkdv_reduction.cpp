#include "dkdv_reduction.h"

#include <algorithm>
#include <cstring>

namespace farlight {

DkDvReduction::DkDvReduction(const Kernels& kernels, const Call& call, const Schedule& schedule, void* dk, void* dv)
    : kernels_(kernels),
      call_(call),
      schedule_(schedule),
      dk_(dk),
      dv_(dv),
      stride_((call.dim + 15) / 16 * 16),
      direct_(call.type == Type::f32 && call.dim % 16 == 0),
      units_(schedule.groups() * schedule.slab_count),
      left_(new std::atomic<int32_t>[schedule.groups()]) {
  for (int64_t g = 0; g < schedule.groups(); ++g) left_[g].store(static_cast<int32_t>(schedule.slab_count), std::memory_order_relaxed);
}

DkDvReduction::~DkDvReduction() {
  for (Unit& unit : units_) buffer_pool().give(std::move(unit.room));
  for (Buffer& room : spare_) buffer_pool().give(std::move(room));
}

Buffer DkDvReduction::borrow(int64_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(guard_);
    for (Buffer& room : spare_)
      if (room.bytes() >= bytes) {
        Buffer found = std::move(room);
        room = std::move(spare_.back());
        spare_.pop_back();
        return found;
      }
  }
  return buffer_pool().take(bytes);
}

void DkDvReduction::open(int64_t unit) {
  const int64_t group = unit / schedule_.slab_count, slab = unit % schedule_.slab_count;
  const Cover& cover = schedule_.cover(group, slab);
  Unit& u = units_[unit];
  u.dk.assign(schedule_.blocks, nullptr);
  u.dv.assign(schedule_.blocks, nullptr);
  const int64_t size = kBlock * stride_;
  float* room = nullptr;
  for (const int32_t block : cover.blocks) {
    float *dk, *dv;
    int64_t rows = kBlock;
    const auto earlier = [&](int64_t s) {
      const std::vector<int32_t>& list = schedule_.cover(group, s).blocks;
      return std::binary_search(list.begin(), list.end(), block);
    };
    bool first = direct_;
    for (int64_t s = 0; first && s < slab; ++s) first = !earlier(s);
    if (first) {
      const int64_t at = (group * call_.plan->n_k + block * int64_t{kBlock}) * stride_;
      rows = std::min<int64_t>(kBlock, call_.plan->n_k - block * int64_t{kBlock});
      dk = static_cast<float*>(dk_) + at;
      dv = static_cast<float*>(dv_) + at;
    } else {
      if (!room) {
        u.room = borrow(2 * static_cast<int64_t>(cover.blocks.size()) * size * static_cast<int64_t>(sizeof(float)));
        room = u.room.as<float>();
      }
      dk = room;
      dv = room + size;
      room += 2 * size;
    }
    std::memset(dk, 0, rows * stride_ * sizeof(float));
    std::memset(dv, 0, rows * stride_ * sizeof(float));
    u.dk[block] = dk;
    u.dv[block] = dv;
  }
}

DkDvBlocks DkDvReduction::of(int64_t unit) const { return {units_[unit].dk.data(), units_[unit].dv.data(), stride_}; }

bool DkDvReduction::finished(int64_t unit) { return left_[unit / schedule_.slab_count].fetch_sub(1, std::memory_order_acq_rel) == 1; }

void DkDvReduction::add_up(int64_t group, int64_t block) {
  add_up_one(dk_, group, block, &Unit::dk);
  add_up_one(dv_, group, block, &Unit::dv);
}

void DkDvReduction::add_up_one(void* out, int64_t group, int64_t block, std::vector<float*> Unit::*side) {
  const int64_t dim = call_.dim, first = group * call_.plan->n_k + block * kBlock;
  const int64_t rows = std::min<int64_t>(kBlock, call_.plan->n_k - block * kBlock);
  const int64_t width = call_.type == Type::f32 ? 4 : 2;
  char* to = static_cast<char*>(out) + first * dim * width;
  std::vector<float*> found;
  for (int64_t s = 0; s < schedule_.slab_count; ++s)
    if (float* mine = (units_[group * schedule_.slab_count + s].*side)[block]) found.push_back(mine);
  if (found.empty()) std::memset(to, 0, rows * dim * width);
  else kernels_.reduce(found.data(), static_cast<int64_t>(found.size()), rows, stride_, dim, call_.type, to);
}

void DkDvReduction::close(int64_t group) {
  const std::lock_guard<std::mutex> lock(guard_);
  for (int64_t s = 0; s < schedule_.slab_count; ++s) {
    Unit& u = units_[group * schedule_.slab_count + s];
    if (u.room.as<float>()) spare_.push_back(std::move(u.room));
    u.dk = {};
    u.dv = {};
  }
}

}  // namespace farlight
