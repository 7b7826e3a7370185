// bf16 rows times one vector, with the steps before and after it: RMSNorm, bias, residual. (q4 and q8: gemv_int.cu.)
//
// Floor: rows * row_stride bytes from device memory.
//
// - Four rows at a time: what is read of the vector from shared memory is used four times.
// - A step is 32 chunks of four rows, one for each lane. A block has a range of rows, and each of its warps the same
//   number of steps of it, wherever in a row they begin and end: no warp waits for another before the very end.
// - The next two steps are on their way while this one is computed. The first are asked for before the kernel that
//   writes the vector has ended.
#include "input.cuh"
#include "shares.cuh"

namespace gemv_shape {
constexpr int kMaxWarps = 8;
constexpr int kRows = 4;
constexpr int kStages = 3;
}  // namespace gemv_shape

// What a lane holds of a step: its chunk of four neighbouring rows.
struct Step {
  uint4 codes[gemv_shape::kRows];
};

// w [rows] rows of `columns`; x, norm_weight, normed_out [columns]; bias, residual, out [rows]; out may be the residual.
// All vectors of `columns` start at a multiple of 16 bytes. Any grid of blocks of up to 8 warps, a power of two.
// Dynamic shared memory: 192 bytes for each 32 columns, the last of which may be fewer.
extern "C" __global__ void __launch_bounds__(256, 2)
    gemv_bf16(const unsigned char* w, int rows, int columns, const float* x, const float* norm_weight, float eps,
              float* normed_out, const float* bias, const float* residual, float* out) {
  using namespace gemv_shape;
  __shared__ DividedRows<kRows, kMaxWarps> divided;
  let_next_start();

  const int n_chunks = ceil_div(columns, Bf16::kColumns);
  const Shares shares(ceil_div(rows, kRows), ceil_div(n_chunks, kWarp));
  const u32 stride = row_stride<Bf16>(columns);

  StepCursor ahead = shares.begin();
  auto fetch = [&](int number, Step& step) {
    if (number >= shares.last_step) return;
    const int chunk = ahead.in_row * kWarp + lane_id();
    if (chunk < n_chunks) {
      // Past the last row it is the first of the four again: its sums are left out at the end.
      const int first = ahead.unit * kRows, exist = rows - first;
      const unsigned char* codes_at = computed(w + static_cast<u64>(static_cast<u32>(first)) * stride + 16 * chunk);
#pragma unroll
      for (int r = 0; r < kRows; r++) step.codes[r] = load_stream(codes_at + (r < exist ? r * stride : 0));
    }
    ahead.advance();
  };

  Step steps[kStages];
#pragma unroll
  for (int i = 0; i < kStages - 1; i++) fetch(shares.first_step + i, steps[i]);

  const Input<Bf16> input;
  if (norm_weight != nullptr) {
    input.stage_normed(x, norm_weight, eps, columns, normed_out);
  } else {
    input.stage(x, columns);
  }
  __syncthreads();

  StepCursor now = shares.begin();
  bool from_first = now.in_row == 0;
  float sums[kRows] = {};
  const RowOutput output = {rows, bias, residual, out};
  auto leave_rows = [&](int unit, bool to_last) {
    const float sum = warp_sum_each<kRows>(sums);
    constexpr int kShare = kWarp / kRows;
    const int r = lane_id() / kShare;
    if (lane_id() % kShare == 0) divided.leave(output, unit, r, sum, from_first, to_last);
#pragma unroll
    for (int i = 0; i < kRows; i++) sums[i] = 0.0f;
  };
  auto compute = [&](const Step& step) {
    const int chunk = now.in_row * kWarp + lane_id(), unit = now.unit;
    if (chunk < n_chunks) {
      float dots[kRows];
      input.template dot<kRows>(chunk, step.codes, dots);
#pragma unroll
      for (int r = 0; r < kRows; r++) sums[r] += dots[r];
    }
    if (now.advance()) {
      leave_rows(unit, true);
      from_first = true;
    }
  };
  for (int number = shares.first_step; number < shares.last_step; number += kStages) {
    // The registers change roles instead of contents.
#pragma unroll
    for (int i = 0; i < kStages; i++) {
      if (number + i >= shares.last_step) break;
      fetch(number + i + kStages - 1, steps[(i + kStages - 1) % kStages]);
      compute(steps[i]);
    }
  }
  const bool leaves = shares.first_step < shares.last_step && now.in_row != 0;
  if (leaves) leave_rows(now.unit, false);
  __syncthreads();
  if (leaves && from_first) divided.join(output, shares, now.unit);
}
