// An upper bound of the attention that each row has missed: what the keys outside the pattern can hold at most.
#pragma once

#include "../parallel.h"
#include "choose.h"
#include "plan_content.h"

namespace farlight {

struct LostProblem {
  const ContentPattern& pattern;
  // The tensors, masks and scale of the call; `block`, `query_block` and budget are not read. `causal`: full attention, of
  // which the share is taken, ends at the query.
  ChoiceProblem tensors;
  const float* lse;  // (batch, heads, n_q), natural logarithm, of the pattern's links
  float* lost;       // (batch, heads, n_q)
};

// lost[row] >= 1 - exp(lse[row] - lse of full attention). For every granule of keys c of which the row misses n_c > 0, with
// channel-wise bounds min and max of its keys:  lost = u / (1 + u),
// u = sum over c of n_c exp(scale * sum over d of max(q_d min_d, q_d max_d) - lse).
void lost_bound(const Kernels& kernels, const LostProblem& problem, int threads, InterruptCheck& interrupt);

}  // namespace farlight
