// Runtime ISA dispatch: which ISAs were compiled in, which the CPU supports, and which one is active.
#pragma once

#include <string>
#include <vector>

#include "views.h"

namespace farlight {

// Names of the ISAs that are compiled in and supported by this CPU, fastest first.
std::vector<std::string> available_isas();

// The kernels of the active ISA: the first of available_isas() unless use_isa() chose another.
const Kernels& kernels();

// Makes the named ISA the active one for all threads. Throws std::invalid_argument that lists the available names.
void use_isa(const std::string& name);

}  // namespace farlight
