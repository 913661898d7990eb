// Dynamic-scheduled parallel loops with cancellation from the calling thread.
//
// The loop runs on torch's OpenMP runtime where there is one: this library links libgomp by its usual name, so the loader maps
// one copy for both and they share one thread pool. Elsewhere it runs on std::thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace farlight {

// Polls for an interrupt (Ctrl-C) during a long call. The calling thread polls between loop items; the callback runs at most
// every `kInterval` and cancels the loop by throwing.
class InterruptCheck {
 public:
  using Callback = void (*)();
  // A null callback disables polling.
  explicit InterruptCheck(Callback callback) : callback_(callback), last_(callback ? Clock::now() : Clock::time_point{}) {}

  // Runs the callback if the interval has passed. The clock is read for every eighth item only.
  void poll() {
    if (!callback_ || (++items_ & 7) != 0) return;
    const auto now = Clock::now();
    if (now - last_ < kInterval) return;
    last_ = now;
    callback_();
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kInterval{50};
  Callback callback_;
  Clock::time_point last_;
  uint32_t items_ = 0;
};

constexpr int64_t kMaxBatch = 64;  // neighbouring items that a thread takes at once, at most: they read mostly the same keys

// Calls body(i) for every 0 <= i < count on `threads` threads: guided scheduling, batches of up to kMaxBatch consecutive items
// that shrink to one item towards the end, taken in order of i from an atomic counter. The first exception is rethrown in the
// caller once every thread has finished its current item.
template <class Body>
void parallel_for(int64_t count, int threads, InterruptCheck& interrupt, const Body& body) {
  threads = static_cast<int>(threads < count ? threads : count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i, interrupt.poll()) body(i);
    return;
  }
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  std::mutex mutex;
  auto batch = [&](int64_t left) { return std::clamp<int64_t>(left / (8 * int64_t{threads}), 1, kMaxBatch); };
  auto work = [&] {
    const bool is_caller = std::this_thread::get_id() == caller;
    try {
      int64_t first = next.load(std::memory_order_relaxed);
      while (first < count) {
        const int64_t last = first + batch(count - first);
        if (!next.compare_exchange_weak(first, last, std::memory_order_relaxed)) continue;
        for (int64_t i = first; i < last && !failed.load(std::memory_order_relaxed); ++i) {
          body(i);
          if (is_caller) interrupt.poll();
        }
        first = next.load(std::memory_order_relaxed);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!failure) failure = std::current_exception();
      failed.store(true, std::memory_order_relaxed);
      next.store(count, std::memory_order_relaxed);
    }
  };
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  work();
#else
  std::vector<std::thread> workers;
  for (int t = 1; t < threads; ++t) workers.emplace_back(work);
  work();
  for (std::thread& worker : workers) worker.join();
#endif
  if (failure) std::rethrow_exception(failure);
}

}  // namespace farlight
