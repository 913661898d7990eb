// Multiplying and adding in registers, and nothing else: the rate that no product of vectors can exceed.
#pragma once

#include "isa.h"

namespace farlight::FARLIGHT_NS {

constexpr int kChains = 12;  // independent, so that latencies overlap

// One by one, and each from a number of its own: compilers make one of equal chains, and turn loops over them inside out.
FARLIGHT_APART float spin(int64_t turns) {
  const F x = all(0.999f), y = all(0.001f);
  F a = all(0.01f), b = all(0.02f), c = all(0.03f), d = all(0.04f), e = all(0.05f), f = all(0.06f);
  F g = all(0.07f), h = all(0.08f), i = all(0.09f), j = all(0.11f), k = all(0.12f), l = all(0.13f);
  for (int64_t turn = 0; turn < turns; ++turn) {
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
