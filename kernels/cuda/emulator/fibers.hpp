// Runs a function as every thread of every block of a grid.
#pragma once

#include <cstddef>
#include <functional>

#include "emulator.hpp"

namespace emulator {

constexpr size_t kStackBytes = 64 << 10;

using Body = std::function<void()>;

// False if the machine cannot run such a grid.
bool run_grid(dim3 grid, dim3 threads, uint32_t dynamic_shared_bytes, const Body& body);

}  // namespace emulator
