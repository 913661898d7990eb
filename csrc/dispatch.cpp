// Runtime ISA dispatch (dispatch.h): cpuid, the request for AMX tile registers on Linux, and the ranking of ISAs.
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
// The ISA extensions that decide, as cpuid reports them.
struct CpuFeatures {
  bool avx2 = false, avx512 = false, bf16 = false;
  bool slow_bf16_dot = false;  // vdpbf16ps takes as long as four FMAs (Intel): float32 products of widened operands are faster
};

// Queries cpuid (and XCR0 for the OS's support of the registers).
CpuFeatures detect_cpu() {
  CpuFeatures m;
#if defined(__GNUC__) || defined(__clang__)
  __builtin_cpu_init();
  m.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  m.avx512 = m.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  m.bf16 = m.avx512 && __builtin_cpu_supports("avx512bf16");
  m.slow_bf16_dot = __builtin_cpu_is("intel");
#else
  int zero[4], one[4], seven[4], sub[4];
  __cpuid(zero, 0);
  m.slow_bf16_dot = zero[1] == 0x756e6547;  // "Genu", of GenuineIntel
  __cpuid(one, 1);
  __cpuidex(seven, 7, 0);
  __cpuidex(sub, 7, 1);
  const bool saved = (one[2] >> 27) & 1;
  const unsigned long long state = saved ? _xgetbv(0) : 0;
  m.avx2 = (state & 6) == 6 && ((one[2] >> 12) & 1) && ((seven[1] >> 5) & 1);  // XCR0: the OS saves YMM state
  const unsigned needed = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);
  m.avx512 = m.avx2 && (state & 0xe6) == 0xe6 && (static_cast<unsigned>(seven[1]) & needed) == needed;
  m.bf16 = m.avx512 && ((sub[0] >> 5) & 1);
#endif
  return m;
}
#endif

#if defined(FARLIGHT_HAS_AMX)
// Whether the CPU has AMX-BF16 and Linux grants this process the tile registers. The permission is requested once per process
// (arch_prctl), since it grows the saved state of every thread by 8 KiB.
bool amx_granted() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  if ((d & (bf16 | tile)) != (bf16 | tile)) return false;
  constexpr long request = 0x1023 /* ARCH_REQ_XCOMP_PERM */, query = 0x1022 /* ARCH_GET_XCOMP_PERM */,
                 data = 18 /* XTILEDATA */;
  if (syscall(SYS_arch_prctl, request, data) != 0) return false;
  unsigned long granted = 0;
  return syscall(SYS_arch_prctl, query, &granted) == 0 && ((granted >> data) & 1);
}
#endif

// The kernels that this CPU can run, fastest first.
std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> kernels;
#if defined(FARLIGHT_HAS_X86_ISAS)
  const CpuFeatures m = detect_cpu();
#if defined(FARLIGHT_HAS_AMX)
  if (m.bf16 && amx_granted()) kernels.push_back(&amx::kernels);
#endif
  if (m.bf16 && !m.slow_bf16_dot) kernels.push_back(&avx512bf16::kernels);
  if (m.avx512) kernels.push_back(&avx512::kernels);
  if (m.bf16 && m.slow_bf16_dot) kernels.push_back(&avx512bf16::kernels);
  if (m.avx2) kernels.push_back(&avx2::kernels);
#endif
  kernels.push_back(&portable::kernels);
  return kernels;
}

// The active ISA; null until first use.
std::atomic<const Kernels*> active{nullptr};

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* isa : usable_kernels()) names.emplace_back(isa->name);
  return names;
}

const Kernels& kernels() {
  const Kernels* isa = active.load(std::memory_order_relaxed);
  if (!isa) {
    isa = usable_kernels().front();
    active.store(isa, std::memory_order_relaxed);
  }
  return *isa;
}

void use_isa(const std::string& name) {
  std::string names;
  for (const Kernels* isa : usable_kernels()) {
    if (name == isa->name) {
      active.store(isa, std::memory_order_relaxed);
      return;
    }
    names += (names.empty() ? "" : ", ") + std::string(isa->name);
  }
  throw std::invalid_argument("ISA '" + name + "' was not compiled in or is not on this machine; there are " + names);
}

}  // namespace farlight
