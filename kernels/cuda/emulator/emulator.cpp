// The emulator as a shared library: kernels by name, arguments as cuLaunchKernel takes them.
//
// g++ -O2 -std=c++17 -shared -fPIC -DTHERMOCLINE_EMULATED -o libthermocline_emulator.so emulator.cpp

#include <cstring>
#include <tuple>
#include <utility>

#include "../thermocline.cu"
#include "fibers.cpp"

namespace {

template <class... Args, size_t... I>
emulator::Outcome call(void (*kernel)(Args...), dim3 grid, dim3 threads, uint32_t shared_bytes, void** args,
          std::index_sequence<I...>) {
  const std::tuple<Args...> values(*static_cast<Args*>(args[I])...);
  return emulator::run_grid(grid, threads, shared_bytes, [&] { kernel(std::get<I>(values)...); });
}

template <class... Args>
emulator::Outcome launch(void (*kernel)(Args...), dim3 grid, dim3 threads, uint32_t shared_bytes, void** args) {
  return call(kernel, grid, threads, shared_bytes, args, std::index_sequence_for<Args...>());
}

}  // namespace

// A digest of the sources: what kernels take changes with them.
extern "C" uint32_t thermocline_emulator_abi(void) { return THERMOCLINE_ABI; }

// 1: no such kernel; else see Outcome in fibers.hpp.
extern "C" int thermocline_emulate(const char* kernel, const uint32_t grid[3], const uint32_t block[3],
                                   uint32_t dynamic_shared_bytes, void** args) {
  const dim3 blocks = {grid[0], grid[1], grid[2]}, threads = {block[0], block[1], block[2]};
#define KERNEL(name) \
  if (std::strcmp(kernel, #name) == 0) return static_cast<int>(launch(name, blocks, threads, dynamic_shared_bytes, args));
#include "kernels.hpp"
#undef KERNEL
  return 1;
}
