#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#if defined(FARLIGHT_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(_MSC_VER) && !defined(__clang__) && defined(_M_X64)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace farlight {

#if defined(FARLIGHT_HAS_AMX)
namespace amx {
extern const Kernels kernels;
}
#endif
#if defined(FARLIGHT_HAS_X86_ISAS)
namespace avx512bf16 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace portable {
extern const Kernels kernels;
}

namespace {

#if defined(FARLIGHT_HAS_X86_ISAS)
struct Machine {
  bool avx2 = false, avx512 = false, bf16 = false;
  bool slow_pairs = false;  // vdpbf16ps takes as long as four FMA: widened operands are faster
};

Machine machine() {
  Machine m;
#if defined(__GNUC__) || defined(__clang__)
  __builtin_cpu_init();
  m.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  m.avx512 = m.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  m.bf16 = m.avx512 && __builtin_cpu_supports("avx512bf16");
  m.slow_pairs = __builtin_cpu_is("intel");
#else
  int zero[4], one[4], seven[4], sub[4];
  __cpuid(zero, 0);
  m.slow_pairs = zero[1] == 0x756e6547;  // "Genu", of GenuineIntel
  __cpuid(one, 1);
  __cpuidex(seven, 7, 0);
  __cpuidex(sub, 7, 1);
  const bool saved = (one[2] >> 27) & 1;
  const unsigned long long state = saved ? _xgetbv(0) : 0;
  m.avx2 = (state & 6) == 6 && ((one[2] >> 12) & 1) && ((seven[1] >> 5) & 1);
  const unsigned needed = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);
  m.avx512 = m.avx2 && (state & 0xe6) == 0xe6 && (static_cast<unsigned>(seven[1]) & needed) == needed;
  m.bf16 = m.avx512 && ((sub[0] >> 5) & 1);
#endif
  return m;
}
#endif

#if defined(FARLIGHT_HAS_AMX)
// Tiles of bfloat16 are there, and the system lets this process have the registers for them: it wants to be asked, once, since
// every thread's saved state grows by 8 KiB.
bool tiles_granted() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  if ((d & (bf16 | tile)) != (bf16 | tile)) return false;
  constexpr long ask = 0x1023 /* ARCH_REQ_XCOMP_PERM */, have = 0x1022 /* ARCH_GET_XCOMP_PERM */, data = 18 /* XTILEDATA */;
  if (syscall(SYS_arch_prctl, ask, data) != 0) return false;
  unsigned long granted = 0;
  return syscall(SYS_arch_prctl, have, &granted) == 0 && ((granted >> data) & 1);
}
#endif

std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> sets;
#if defined(FARLIGHT_HAS_X86_ISAS)
  const Machine m = machine();
#if defined(FARLIGHT_HAS_AMX)
  if (m.bf16 && tiles_granted()) sets.push_back(&amx::kernels);
#endif
  if (m.bf16 && !m.slow_pairs) sets.push_back(&avx512bf16::kernels);
  if (m.avx512) sets.push_back(&avx512::kernels);
  if (m.bf16 && m.slow_pairs) sets.push_back(&avx512bf16::kernels);
  if (m.avx2) sets.push_back(&avx2::kernels);
#endif
  sets.push_back(&portable::kernels);
  return sets;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* set : usable()) names.emplace_back(set->name);
  return names;
}

const Kernels& kernels() {
  const Kernels* set = chosen.load(std::memory_order_relaxed);
  if (!set) {
    set = usable().front();
    chosen.store(set, std::memory_order_relaxed);
  }
  return *set;
}

void use_isa(const std::string& name) {
  std::string names;
  for (const Kernels* set : usable()) {
    if (name == set->name) {
      chosen.store(set, std::memory_order_relaxed);
      return;
    }
    names += (names.empty() ? "" : ", ") + std::string(set->name);
  }
  throw std::invalid_argument("instruction set '" + name + "' was not compiled in or is not on this machine; there are " + names);
}

}  // namespace farlight
