// Which instruction sets were compiled in, which this machine has, and which one is used.
#pragma once

#include <string>
#include <vector>

#include "views.h"

namespace farlight {

std::vector<std::string> available_isas();  // best first
const Kernels& kernels();
// By name; throws std::invalid_argument with the names that would do.
void use_isa(const std::string& name);

}  // namespace farlight
