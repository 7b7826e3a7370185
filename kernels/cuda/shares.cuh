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
};

// Where the products go.
struct RowOutput {
  int rows;
  const float* bias;
  const float* residual;
  float* out;

  // A unit may have rows behind the last.
  DEVICE void store(int row, float sum) const {
    if (row < rows)
      out[row] = sum + (bias != nullptr ? bias[row] : 0.0f) + (residual != nullptr ? residual[row] : 0.0f);
  }
};

// In shared memory: sums of rows that a warp has not computed alone, of those that it found begun and of those that it
// left begun. A unit is kRows rows.
template <int kRows, int kMaxWarps>
struct DividedRows {
  float ended[kMaxWarps][kRows], begun[kMaxWarps][kRows];

  // Takes what a warp has of row `r` of a unit: all, if it computed that from the first step to the last.
  DEVICE void leave(const RowOutput& output, int unit, int r, float sum, bool from_first, bool to_last) {
    if (from_first && to_last) {
      output.store(unit * kRows + r, sum);
    } else {
      (from_first ? begun : ended)[warp_id()][r] = sum;
    }
  }

  // After a barrier, for the warp that left the unit begun: adds up what the warps after it found.
  DEVICE void join(const RowOutput& output, const Shares& shares, int unit) const {
    const int lane = lane_id(), end = (unit - shares.first_unit + 1) * shares.steps_of_row;
    if (lane >= kRows) return;
    float sum = begun[warp_id()][lane];
    for (int warp = warp_id() + 1; warp < 1 << shares.log2_warps && shares.first_step_of(warp) < end; warp++)
      if (shares.first_step_of(warp) < shares.first_step_of(warp + 1)) sum += ended[warp][lane];
    output.store(unit * kRows + lane, sum);
  }
};
