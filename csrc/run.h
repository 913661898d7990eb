// Running a whole call: every item of a schedule, by all threads.
#pragma once

#include "parallel.h"
#include "schedule.h"
#include "views.h"

namespace farlight {

void run_forward(const Kernels& kernels, Call call, const Schedule& schedule, int threads, InterruptCheck& interrupt);

// dk, dv: contiguous (B, Hkv, Nk, D) of the call's type; written whole.
void run_backward(const Kernels& kernels, Call call, const Schedule& schedule, void* dk, void* dv, int threads, InterruptCheck& interrupt);

}  // namespace farlight
