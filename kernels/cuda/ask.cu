// A layer whose neurons the CPU's threads choose and compute by themselves: all that the device does is to tell them that its
// input is there, and to wait for their sums (finish, ffn.cu).
//
// One warp. Floor: a fence to the host, about two microseconds.
#include "platform.cuh"

// The kernels before this one have written the input to mapped host memory. `counts` [8] are those of a list that is all the
// CPU's, whatever its length (choose.cu); `flag` is what the threads watch, also in mapped memory.
extern "C" __global__ void __launch_bounds__(32)
    ask_host(u32* counts, const u32* step, int layer, int n_layers, u32* flag) {
  constexpr u32 kCpu = 4, kCounts = 8;
  let_next_start();
  wait_for_previous();
  const u32 lane = threadIdx.x;
  if (lane < kCounts) counts[lane] = lane == kCpu ? 1 : 0;
  if (lane > 0) return;
  raise_flag(flag, flag_value(step[2], layer, n_layers));
}
