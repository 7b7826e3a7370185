// Brings the bundles that the next layer will probably need (foresee.cuh) from pinned host memory to their places on the
// device, beside the kernels of attention, for which the link would be idle.
//
// Floor: the bundles' bytes over the link. That needs about 100 KB in flight, which few blocks can have: they must leave
// room for the kernels beside them, so that a block is small in threads and registers.
#include "platform.cuh"

namespace fetch_shape {
constexpr u32 kThreads = 128;
// Chunks of 16 bytes that a thread has in flight.
constexpr u32 kAtOnce = 8;
}  // namespace fetch_shape

// list [*n_listed]: numbers of bundles of `bundle_bytes`, a multiple of 16, in `cold`; the i-th goes to the i-th of
// `places`. *total counts them.
extern "C" __global__ void __launch_bounds__(128)
    fetch_bundles(const u32* list, const u32* n_listed, const unsigned char* cold, unsigned char* places,
                  u32 bundle_bytes, u64* total) {
  using namespace fetch_shape;
  wait_for_previous();
  const u32 n = *n_listed, n_chunks = bundle_bytes / 16;
  if (blockIdx.x == 0 && threadIdx.x == 0 && n > 0) atomicAdd(total, static_cast<u64>(n));
  // A block takes whole bundles: their lines are crossed by neighbouring threads.
  for (u32 i = blockIdx.x; i < n; i += gridDim.x) {
    const uint4* from = reinterpret_cast<const uint4*>(cold + static_cast<u64>(list[i]) * bundle_bytes);
    uint4* to = reinterpret_cast<uint4*>(places + static_cast<u64>(i) * bundle_bytes);
    for (u32 first = threadIdx.x; first < n_chunks; first += kAtOnce * kThreads) {
      uint4 chunks[kAtOnce];
#pragma unroll
      for (u32 k = 0; k < kAtOnce; k++)
        if (first + k * kThreads < n_chunks) chunks[k] = load_stream(from + first + k * kThreads);
#pragma unroll
      for (u32 k = 0; k < kAtOnce; k++)
        if (first + k * kThreads < n_chunks) to[first + k * kThreads] = chunks[k];
    }
  }
}
