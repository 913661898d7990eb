// One call of attention, forward or backward: all work items of a schedule on all threads.
#pragma once

#include "content/plan_content.h"
#include "parallel.h"
#include "schedule.h"
#include "views.h"

namespace farlight {

// Forward: writes call.result (out) and call.lse.
void run_forward(const Kernels& kernels, Call call, const Schedule& schedule, int threads, InterruptCheck& interrupt);

// Forward straight from the clauses of a content pattern, whose tiles each thread plans before it computes them
// (content/tiles_in_place.h): writes the same.
void run_content_tiles(const Kernels& kernels, const Call& call, const ContentPattern& pattern, int64_t gather, int threads,
                       InterruptCheck& interrupt);

// The same without terms or dropout, row by row (content/row_visits.h).
void run_row_visits(const Kernels& kernels, const Call& call, const ContentPattern& pattern, int threads,
                    InterruptCheck& interrupt);

// Backward: writes call.result (dq) and all of dk and dv, contiguous (B, H_kv, n_k, D) of the call's dtype. Deterministic: the
// result is the same bit for bit for any number of threads.
void run_backward(const Kernels& kernels, Call call, const Schedule& schedule, void* dk, void* dv, int threads,
                  InterruptCheck& interrupt);

}  // namespace farlight
