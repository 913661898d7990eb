// Buffers: owned, uninitialised, 64-byte aligned memory, backed by huge pages where the system offers them.
#pragma once

#include <cstdint>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace farlight {

// Advises the system to back [data, data + bytes) by 2 MiB pages, since the whole range is about to be written. The first touch
// of a 4 KiB page costs more than filling it; huge pages make it 512 times rarer. A hint: results do not depend on it.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t page = int64_t{1} << 21;
  const int64_t first = (reinterpret_cast<int64_t>(data) + page - 1) / page * page;
  const int64_t last = (reinterpret_cast<int64_t>(data) + bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), static_cast<size_t>(last - first), MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// An owned, uninitialised, 64-byte aligned allocation. Move-only; a default-constructed buffer is empty.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    data_ = ::operator new(static_cast<size_t>(bytes), std::align_val_t{64});
    advise_huge_pages(data_, bytes);
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }

  int64_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace farlight
