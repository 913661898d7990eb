// Working memory that outlives a call. Fresh memory is slow to get: the system clears each page, and where the machine is a
// virtual one, its host does too. Sums of dk and dv would pay for that with every call, and threads would wait for the one that does.
#pragma once

#include <cstdint>
#include <deque>
#include <mutex>
#include <utility>

#include "memory.h"

namespace farlight {

class BufferPool {
 public:
  static constexpr int64_t kMost = int64_t{64} << 20;  // bytes that are kept

  // A room of at least so many bytes, with what was left in it.
  Buffer take(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(guard_);
      for (auto room = kept_.begin(); room != kept_.end(); ++room)
        if (room->bytes() >= bytes && room->bytes() / 2 <= bytes) {
          Buffer found = std::move(*room);
          kept_.erase(room);
          total_ -= found.bytes();
          return found;
        }
    }
    return Buffer(bytes);
  }

  // Keeps a room for later calls; those that were kept longest make place for it.
  void give(Buffer room) {
    if (room.bytes() == 0 || room.bytes() > kMost) return;
    const std::lock_guard<std::mutex> lock(guard_);
    total_ += room.bytes();
    kept_.push_back(std::move(room));
    for (; total_ > kMost; kept_.pop_front()) total_ -= kept_.front().bytes();
  }

 private:
  std::mutex guard_;
  std::deque<Buffer> kept_;
  int64_t total_ = 0;
};

inline BufferPool& buffer_pool() {
  static BufferPool rooms;
  return rooms;
}

}  // namespace farlight
