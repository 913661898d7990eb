// Memory that is about to be written whole.
#pragma once

#include <cstdint>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace farlight {

// Asks the system to back a large stretch by large pages: the first touch of a fresh page costs more than filling it, and
// this makes it some hundred times rarer. A hint; nothing depends on it.
inline void advise_huge_pages(void* at, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t page = int64_t{1} << 21;
  const int64_t first = (reinterpret_cast<int64_t>(at) + page - 1) / page * page;
  const int64_t last = (reinterpret_cast<int64_t>(at) + bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), static_cast<size_t>(last - first), MADV_HUGEPAGE);
#else
  (void)at, (void)bytes;
#endif
}

// An uninitialised, aligned stretch of memory.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    at_ = ::operator new(static_cast<size_t>(bytes), std::align_val_t{64});
    advise_huge_pages(at_, bytes);
  }
  Buffer(Buffer&& other) noexcept : at_(std::exchange(other.at_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(at_, other.at_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Buffer() { ::operator delete(at_, std::align_val_t{64}); }

  int64_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(at_);
  }

 private:
  void* at_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace farlight
