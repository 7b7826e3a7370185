// How the rows of a product are divided: over blocks, and evenly over the warps of each.
#pragma once
#include "platform.cuh"

// A place in a block's steps, which go along the rows of a unit and then on to the next unit.
struct StepCursor {
  int unit, in_row, steps_of_row;

  // Whether that was the last of its rows.
  DEVICE bool advance() {
    if (++in_row < steps_of_row) return false;
    in_row = 0;
    unit++;
    return true;
  }
};

// How units of rows are divided: a block has a range of them, and each of its warps as many steps as the others. Blocks
// have a power of two of warps.
struct Shares {
  int first_unit, n_steps, steps_of_row, log2_warps, first_step, last_step;

  DEVICE Shares(int n_units, int steps_of_row) : steps_of_row(steps_of_row) {
    auto first_of = [&](u32 block) { return static_cast<int>(static_cast<long long>(n_units) * block / gridDim.x); };
    first_unit = first_of(blockIdx.x);
    n_steps = (first_of(blockIdx.x + 1) - first_unit) * steps_of_row;
    log2_warps = 31 - __clz(static_cast<int>(blockDim.x / kWarp));
    first_step = first_step_of(warp_id());
    last_step = first_step_of(warp_id() + 1);
  }

  // Below 2^32: a block of 2^27 steps would have 128 GB of rows.
  DEVICE int first_step_of(int warp) const { return static_cast<int>(static_cast<u32>(n_steps * warp) >> log2_warps); }

  DEVICE StepCursor begin() const {
    return {first_unit + first_step / steps_of_row, first_step % steps_of_row, steps_of_row};
  }

  // The sum of a divided unit: what the warp that began it has, and what those after it found.
  template <class F>
  DEVICE float joined(int unit, float sum, F ended) const {
    const int end = (unit - first_unit + 1) * steps_of_row;
    for (int warp = warp_id() + 1; warp < 1 << log2_warps && first_step_of(warp) < end; warp++)
      if (first_step_of(warp) < first_step_of(warp + 1)) sum += ended(warp);
    return sum;
  }
};
