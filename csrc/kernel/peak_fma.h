// The peak rate of multiply-adds: a loop on registers without memory access. Upper bound of what vector products can reach,
// reported by benchmarks as the roofline.
#pragma once

#include "isa.h"

namespace farlight::FARLIGHT_NS {

constexpr int kChains = 12;  // independent dependency chains, to hide the latency of FMA

// Runs `iterations` multiply-adds on each chain. Chains are written out with distinct starting values: compilers merge equal
// chains and interchange loops over them.
FARLIGHT_NOINLINE float peak_fma(int64_t iterations) {
  const F x = broadcast(0.999f), y = broadcast(0.001f);
  F a = broadcast(0.01f), b = broadcast(0.02f), c = broadcast(0.03f), d = broadcast(0.04f), e = broadcast(0.05f),
    f = broadcast(0.06f);
  F g = broadcast(0.07f), h = broadcast(0.08f), i = broadcast(0.09f), j = broadcast(0.11f), k = broadcast(0.12f),
    l = broadcast(0.13f);
  for (int64_t current = 0; current < iterations; ++current) {
    a = fma(a, x, y);
    b = fma(b, x, y);
    c = fma(c, x, y);
    d = fma(d, x, y);
    e = fma(e, x, y);
    f = fma(f, x, y);
    g = fma(g, x, y);
    h = fma(h, x, y);
    i = fma(i, x, y);
    j = fma(j, x, y);
    k = fma(k, x, y);
    l = fma(l, x, y);
  }
  return sum(add(add(add(a, b), add(c, d)), add(add(add(e, f), add(g, h)), add(add(i, j), add(k, l)))));
}

}  // namespace farlight::FARLIGHT_NS
