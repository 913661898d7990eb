// Bump allocator over one thread's scratch memory. The same constructor code runs twice: on a null arena to measure the size,
// and on real memory to lay out the arrays. Allocations are 64-byte aligned; under AddressSanitizer they are separated by red
// zones.
#pragma once

#include "isa.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace farlight::FARLIGHT_NS {

class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}  // null: measure only
  // `count` uninitialised elements; null while measuring.
  template <class T>
  T* allocate(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T)), padded = (bytes + 63) / 64 * 64 + kGap;
    char* at = base_ ? base_ + used_ : nullptr;
    used_ += padded;
    if (!at) return nullptr;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(at, bytes);
    ASAN_POISON_MEMORY_REGION(at + bytes, padded - bytes);
#endif
    return reinterpret_cast<T*>(at);
  }
  int64_t used() const { return used_; }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kGap = 256;  // red zone between arrays
#else
  static constexpr int64_t kGap = 0;
#endif
  char* base_;
  int64_t used_ = 0;
};

// x rounded up to a multiple of `to`.
FARLIGHT_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

}  // namespace farlight::FARLIGHT_NS
