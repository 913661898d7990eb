// Deterministic reduction of the gradients of score terms over slabs: every slab sums them for the heads of its group, and the
// slabs' sums are added in their order, in float64. As with dk and dv (dkdv_reduction.h) the bits do not depend on threads.
#pragma once

#include <cstring>

#include "memory.h"
#include "parallel.h"
#include "schedule.h"
#include "views.h"

namespace farlight {

class TermReduction {
 public:
  TermReduction(const Call& call, const Schedule& schedule)
      : call_(call),
        schedule_(schedule),
        heads_(call.heads / call.kv_heads),
        distance_(call.terms.d_distance ? heads_ * call.terms.distance_length : 0),
        keys_(call.terms.d_key_bias ? heads_ * call.plan->n_k : 0),
        buffer_(schedule.groups() * schedule.slab_count * (distance_ + keys_) * static_cast<int64_t>(sizeof(float))) {}

  // Zeroes the sums of a slab.
  void open_slab(int64_t slab) {
    if (distance_ + keys_) std::memset(of(slab), 0, static_cast<size_t>(distance_ + keys_) * sizeof(float));
  }
  TermSums sums_of(int64_t slab) const {
    return {distance_ ? of(slab) : nullptr, keys_ ? of(slab) + distance_ : nullptr, call_.plan->n_k};
  }
  // Adds the sums of all slabs into the gradients of the call.
  void reduce(int threads, InterruptCheck& interrupt) const {
    if (!(distance_ + keys_)) return;
    parallel_for(call_.heads, threads, interrupt, [&](int64_t head) {
      const int64_t kv_head = head / heads_, length = call_.terms.distance_length, n_k = call_.plan->n_k;
      for (int64_t x = 0; distance_ && x < length; ++x) {
        double sum = 0.0;
        for (int64_t b = 0; b < call_.batch; ++b) sum += over_slabs(b * call_.kv_heads + kv_head, head % heads_ * length + x);
        call_.terms.d_distance[head * length + x] = static_cast<float>(sum);
      }
      for (int64_t b = 0; keys_ && b < call_.batch; ++b)
        for (int64_t key = 0; key < n_k; ++key)
          call_.terms.d_key_bias[(b * call_.heads + head) * n_k + key] =
              static_cast<float>(over_slabs(b * call_.kv_heads + kv_head, distance_ + head % heads_ * n_k + key));
    });
  }

 private:
  float* of(int64_t slab) const { return buffer_.as<float>() + slab * (distance_ + keys_); }
  double over_slabs(int64_t group, int64_t at) const {
    double sum = 0.0;
    for (int64_t slab = 0; slab < schedule_.slab_count; ++slab) sum += of(group * schedule_.slab_count + slab)[at];
    return sum;
  }

  const Call& call_;
  const Schedule& schedule_;
  int64_t heads_;  // query heads of a group
  int64_t distance_, keys_;
  Buffer buffer_;
};

}  // namespace farlight
