// Runs a function as every thread of every block of a grid.
#pragma once

#include <cstddef>
#include <functional>

#include "emulator.hpp"

namespace emulator {

constexpr size_t kStackBytes = 64 << 10;

using Body = std::function<void()>;

enum class Outcome {
  kDone = 0,
  kNoSuchGrid = 2,
  // A block has ended without waiting for the kernel before: on a GPU it could run too early within a graph.
  kDoneWithoutWaiting = 3,
};

Outcome run_grid(dim3 grid, dim3 threads, uint32_t dynamic_shared_bytes, const Body& body);

}  // namespace emulator
