// Where code and constants of the library lie, and which lines of the source they are.
#pragma once

#include <string>

namespace convgen {
namespace host {

// Whether an address belongs to the library's own code or constants.
bool in_library(const void* address);

// "kernel.cu:12, called from kernel.cu:80", for a return address in the library; or nothing.
std::string source_of(const void* code);

}  // namespace host
}  // namespace convgen
