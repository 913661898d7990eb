// A process-wide pool of buffers that survive from one call to the next.
//
// Freshly mapped memory is expensive: the kernel zeroes every page at its first touch, and on a virtual machine so does the
// hypervisor, while other threads wait for the page-table lock. The backward pass needs float32 accumulators for dk and dv in
// every call; taking them from this pool avoids those page faults (0.87 of the time for one head of 65 536 tokens in float32
// on two threads).
#pragma once

#include <cstdint>
#include <deque>
#include <mutex>
#include <utility>

#include "memory.h"

namespace farlight {

// Free buffers in order of release; thread-safe. Best fit is not attempted: the first buffer of at least the size and at most
// twice the size is reused.
class BufferPool {
 public:
  static constexpr int64_t kPoolBytes = int64_t{64} << 20;  // upper bound of the bytes that the pool holds

  // A buffer of at least `bytes` bytes with unspecified contents: a pooled one where one fits, otherwise a new one.
  Buffer acquire(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto candidate = free_.begin(); candidate != free_.end(); ++candidate)
        if (candidate->bytes() >= bytes && candidate->bytes() / 2 <= bytes) {
          Buffer buffer = std::move(*candidate);
          free_.erase(candidate);
          total_ -= buffer.bytes();
          return buffer;
        }
    }
    return Buffer(bytes);
  }

  // Returns a buffer to the pool. Over kPoolBytes the buffers released longest ago are freed; a larger buffer is freed at once.
  void release(Buffer buffer) {
    if (buffer.bytes() == 0 || buffer.bytes() > kPoolBytes) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    total_ += buffer.bytes();
    free_.push_back(std::move(buffer));
    for (; total_ > kPoolBytes; free_.pop_front()) total_ -= free_.front().bytes();
  }

 private:
  std::mutex mutex_;
  std::deque<Buffer> free_;
  int64_t total_ = 0;  // bytes in free_
};

// The pool of the process.
inline BufferPool& buffer_pool() {
  static BufferPool pool;
  return pool;
}

}  // namespace farlight
