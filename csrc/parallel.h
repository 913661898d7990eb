// Threads: torch's own OpenMP runtime where there is one (the library is linked by its usual name, so that one copy is
// mapped), plain threads elsewhere.
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

// Lets the caller of a long call end it. The calling thread asks between items, at most every `kInterval`; `ask` throws.
class InterruptCheck {
 public:
  using Ask = void (*)();
  explicit InterruptCheck(Ask ask) : ask_(ask), last_(ask ? Clock::now() : Clock::time_point{}) {}  // null: never asks

  void poll() {
    if (!ask_ || (++items_ & 7) != 0) return;
    const auto now = Clock::now();
    if (now - last_ < kInterval) return;
    last_ = now;
    ask_();
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kInterval{50};
  Ask ask_;
  Clock::time_point last_;
  uint32_t items_ = 0;
};

constexpr int64_t kBatch = 64;  // neighbours that a thread takes at once, at most: they read mostly the same keys

// Calls body(i) for every i < count, in order of i as threads become free: a few neighbours at a time, single ones towards the
// end. The first exception is thrown to the caller, as soon as every thread has finished its item.
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
  std::mutex guard;
  auto batch = [&](int64_t left) { return std::clamp<int64_t>(left / (8 * int64_t{threads}), 1, kBatch); };
  auto work = [&] {
    const bool asks = std::this_thread::get_id() == caller;
    try {
      int64_t first = next.load(std::memory_order_relaxed);
      while (first < count) {
        const int64_t last = first + batch(count - first);
        if (!next.compare_exchange_weak(first, last, std::memory_order_relaxed)) continue;
        for (int64_t i = first; i < last && !failed.load(std::memory_order_relaxed); ++i) {
          body(i);
          if (asks) interrupt.poll();
        }
        first = next.load(std::memory_order_relaxed);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      if (!failure) failure = std::current_exception();
      failed.store(true, std::memory_order_relaxed);
      next.store(count, std::memory_order_relaxed);
    }
  };
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  work();
#else
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
#endif
  if (failure) std::rethrow_exception(failure);
}

}  // namespace farlight
