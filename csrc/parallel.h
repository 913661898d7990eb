// Threads: torch's own OpenMP runtime where there is one (the library is linked by its usual name, so that one copy is
// mapped), plain threads elsewhere.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace farlight {

// Calls body(i) for every i < count, in order of i as threads become free. The first exception is thrown to the caller.
template <class Body>
void for_each(int64_t count, int threads, const Body& body) {
  threads = static_cast<int>(threads < count ? threads : count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex guard;
  auto work = [&] {
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      if (!failure) failure = std::current_exception();
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
