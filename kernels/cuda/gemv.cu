// A matrix of encoded rows times one vector, with the steps before and after it: RMSNorm, bias, residual.
//
// Floor: rows * row_stride bytes from device memory. At 4470 GB/s and 4.5 bits a weight a Hopper GPU has 3.7 lane
// instructions for each; this kernel takes 2.7 in q4, and half of those go to the integer units, which take one in two
// cycles: they, not memory, are what a Hopper GPU waits for.
//
// - Four rows at a time: what is read of the vector from shared memory is used four times.
// - A step is 32 chunks of four rows, one for each lane. A block has a range of rows, and each of its warps the same
//   number of steps of it, wherever in a row they begin and end: no warp waits for another before the very end.
// - The next two steps are on their way while this one is computed. The first are asked for before the kernel that
//   writes the vector has ended.
#include "input.cuh"

namespace gemv_shape {
constexpr int kMaxWarps = 8;
constexpr int kRows = 4;
constexpr int kStages = 3;
}  // namespace gemv_shape

// What a lane holds of a step: its chunk of four neighbouring rows.
template <class E>
struct Step {
  uint4 codes[gemv_shape::kRows];
  u16 scales[gemv_shape::kRows];
};

// A place in a block's steps, which go along four rows and then on to the next four.
struct StepCursor {
  int quad, in_row, steps_of_row;

  DEVICE StepCursor(int first_quad, int step, int steps_of_row)
      : quad(first_quad + step / steps_of_row), in_row(step % steps_of_row), steps_of_row(steps_of_row) {}

  // Whether that was the last of its rows.
  DEVICE bool advance() {
    if (++in_row < steps_of_row) return false;
    in_row = 0;
    quad++;
    return true;
  }
};

// w [rows] encoded rows of `columns`; x, norm_weight, normed_out [columns]; bias, residual, out [rows]; out may be the
// residual. All vectors of `columns` start at a multiple of 16 bytes. Any grid of blocks of up to 256 threads.
// Dynamic shared memory for each 32 columns, the last of which may be fewer: q4 144 bytes, q8 160, bf16 192.
template <class E>
DEVICE void gemv(const unsigned char* w, int rows, int columns, const float* x, const float* norm_weight, float eps,
                 float* normed_out, const float* bias, const float* residual, float* out) {
  using namespace gemv_shape;
  // Sums of rows that a warp has not computed alone: of those that it found begun, and of those that it left begun.
  __shared__ float ended[kMaxWarps][kRows], begun[kMaxWarps][kRows];
  let_next_start();

  const int n_warps = blockDim.x / kWarp;
  const int n_chunks = ceil_div(columns, E::kColumns), steps_of_row = ceil_div(n_chunks, kWarp);
  const int n_quads = ceil_div(rows, kRows);
  auto first_quad_of = [&](u32 block) {
    return static_cast<int>(static_cast<long long>(n_quads) * block / gridDim.x);
  };
  const int first_quad = first_quad_of(blockIdx.x);
  const int n_steps = (first_quad_of(blockIdx.x + 1) - first_quad) * steps_of_row;
  // Below 2^31: a block of 256 * 2^23 steps would have a terabyte of rows.
  auto first_step_of = [&](int warp) { return n_steps * warp / n_warps; };
  const int first_step = first_step_of(warp_id()), last_step = first_step_of(warp_id() + 1);
  const u32 stride = row_stride<E>(columns);

  StepCursor ahead(first_quad, first_step, steps_of_row);
  auto fetch = [&](int number, Step<E>& step) {
    if (number >= last_step) return;
    const int chunk = ahead.in_row * kWarp + lane_id();
    if (chunk < n_chunks) {
      // Past the last row it is the first of the four again: its sums are left out at the end.
      const int first = ahead.quad * kRows, exist = rows - first;
      const Row<E> row = matrix_row<E>(w + static_cast<u64>(static_cast<u32>(first)) * stride, columns);
      const unsigned char* codes_at = computed(row.base + (row.codes + 16 * chunk));
      const unsigned char* scales_at = computed(row.base + (row.scales + Row<E>::scale_at(chunk)));
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        const u32 offset = r < exist ? r * stride : 0;
        step.codes[r] = load_stream(codes_at + offset);
        if (E::kScaled) step.scales[r] = load_stream_u16(scales_at + offset);
      }
    }
    ahead.advance();
  };

  Step<E> steps[kStages];
#pragma unroll
  for (int i = 0; i < kStages - 1; i++) fetch(first_step + i, steps[i]);

  const Input<E> input;
  if (norm_weight != nullptr) {
    input.stage_normed(x, norm_weight, eps, columns, normed_out);
  } else {
    input.stage(x, columns);
  }
  __syncthreads();

  StepCursor now(first_quad, first_step, steps_of_row);
  bool from_first = now.in_row == 0;
  float sums[kRows] = {};
  auto store = [&](int row, float sum) {
    if (row < rows) out[row] = sum + (bias != nullptr ? bias[row] : 0.0f) + (residual != nullptr ? residual[row] : 0.0f);
  };
  auto leave_rows = [&](int quad, bool to_last) {
    const float sum = warp_sum_each<kRows>(sums) * E::kOut;
    constexpr int kShare = kWarp / kRows;
    const int r = lane_id() / kShare;
    if (lane_id() % kShare == 0) {
      if (from_first && to_last) {
        store(quad * kRows + r, sum);
      } else {
        (from_first ? begun : ended)[warp_id()][r] = sum;
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; i++) sums[i] = 0.0f;
  };
  auto compute = [&](const Step<E>& step) {
    const int chunk = now.in_row * kWarp + lane_id(), quad = now.quad;
    if (chunk < n_chunks) {
      float dots[kRows];
      input.template dot<kRows>(chunk, step.codes, dots);
#pragma unroll
      for (int r = 0; r < kRows; r++) sums[r] += scale_value<E>(step.scales[r]) * dots[r];
    }
    if (now.advance()) {
      leave_rows(quad, true);
      from_first = true;
    }
  };
  for (int number = first_step; number < last_step; number += kStages) {
    // The registers change roles instead of contents.
#pragma unroll
    for (int i = 0; i < kStages; i++) {
      if (number + i >= last_step) break;
      fetch(number + i + kStages - 1, steps[(i + kStages - 1) % kStages]);
      compute(steps[i]);
    }
  }
  const bool leaves = first_step < last_step && now.in_row != 0;
  if (leaves) leave_rows(now.quad, false);
  __syncthreads();

  // Rows that were divided: the warp that began them adds up what the warps after it found.
  if (leaves && from_first && lane_id() < kRows) {
    float sum = begun[warp_id()][lane_id()];
    const int end = (now.quad - first_quad + 1) * steps_of_row;
    for (int warp = warp_id() + 1; warp < n_warps && first_step_of(warp) < end; warp++)
      if (first_step_of(warp) < first_step_of(warp + 1)) sum += ended[warp][lane_id()];
    store(now.quad * kRows + lane_id(), sum);
  }
}

extern "C" __global__ void __launch_bounds__(256, 2)
    gemv_bf16(const unsigned char* w, int rows, int columns, const float* x, const float* norm_weight, float eps,
              float* normed_out, const float* bias, const float* residual, float* out) {
  gemv<Bf16>(w, rows, columns, x, norm_weight, eps, normed_out, bias, residual, out);
}
extern "C" __global__ void __launch_bounds__(256, 2)
    gemv_q8(const unsigned char* w, int rows, int columns, const float* x, const float* norm_weight, float eps,
            float* normed_out, const float* bias, const float* residual, float* out) {
  gemv<Q8>(w, rows, columns, x, norm_weight, eps, normed_out, bias, residual, out);
}
extern "C" __global__ void __launch_bounds__(256, 2)
    gemv_q4(const unsigned char* w, int rows, int columns, const float* x, const float* norm_weight, float eps,
            float* normed_out, const float* bias, const float* residual, float* out) {
  gemv<Q4>(w, rows, columns, x, norm_weight, eps, normed_out, bias, residual, out);
}
