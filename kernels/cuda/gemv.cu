// A matrix of encoded rows times one vector, with the steps before and after it: RMSNorm, bias, residual.
//
// Floor: rows * row_stride bytes from device memory. At 4470 GB/s and 4.5 bits a weight a Hopper GPU has 3.7 lane
// instructions for each; this kernel takes 2.9 to 3.2 in q4, 2.3 of them for the weight itself.
//
// - Four rows at a time: what is read of the vector from shared memory is used four times.
// - A row is divided over as many warps as have a chunk for each lane, up to eight; such a team walks over its share of
//   the rows. With 8192 columns or more that is the whole block, so that few rows still keep every warp busy and the
//   rows divide evenly over the blocks.
// - The next chunk of all four rows is on its way while this one is computed: 2.3 KB a warp in q4. The first is asked
//   for before the vector is put into shared memory.
#include "input.cuh"

namespace gemv_shape {
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRows = 4;
// Quads of rows whose sums wait in shared memory before they are added up over the warps of a team.
constexpr int kBatch = 16;
}  // namespace gemv_shape

// The chunk that a warp reads of four neighbouring rows.
template <class E>
struct Quad {
  uint4 codes[gemv_shape::kRows];
  u16 scales[gemv_shape::kRows];
  int quad;
  int chunk;

  // Past the last row it is the first of the quad again: its sums are left out at the end.
  DEVICE void fetch(const unsigned char* w, u32 stride, int rows, int columns, int n_chunks) {
    if (chunk >= n_chunks) return;
    const int first = quad * gemv_shape::kRows, exist = rows - first;
    const Row<E> row = matrix_row<E>(w + static_cast<u64>(static_cast<u32>(first)) * stride, columns);
    const unsigned char* codes_at = computed(row.base + (row.codes + 16 * chunk));
    const unsigned char* scales_at = computed(row.base + (row.scales + Row<E>::scale_at(chunk)));
#pragma unroll
    for (int r = 0; r < gemv_shape::kRows; r++) {
      const u32 offset = r < exist ? r * stride : 0;
      codes[r] = load_stream(codes_at + offset);
      if (E::kScaled) scales[r] = load_stream_u16(scales_at + offset);
    }
  }
};

// w [rows] encoded rows of `columns`; x, norm_weight, normed_out [columns]; bias, residual, out [rows]; out may be the
// residual. All vectors of `columns` start at a multiple of 16 bytes. Any grid of blocks of 256 threads.
// Dynamic shared memory for each 32 columns, the last of which may be fewer: q4 144 bytes, q8 160, bf16 192.
template <class E>
DEVICE void gemv(const unsigned char* w, int rows, int columns, const float* x, const float* norm_weight, float eps,
                 float* normed_out, const float* bias, const float* residual, float* out) {
  using namespace gemv_shape;
  __shared__ float partial[kBatch][kWarps][kRows];

  const int n_chunks = ceil_div(columns, E::kColumns);
  int team_warps = 1;
  while (team_warps < kWarps && team_warps * kWarp < n_chunks) team_warps *= 2;
  const int teams = kWarps / team_warps;
  const int n_quads = ceil_div(rows, kRows), n_teams = teams * gridDim.x;
  const int team = blockIdx.x * teams + warp_id() / team_warps;
  const int first = static_cast<int>(static_cast<long long>(n_quads) * team / n_teams);
  const int last = static_cast<int>(static_cast<long long>(n_quads) * (team + 1) / n_teams);
  const int start = warp_id() % team_warps * kWarp + lane_id(), step = team_warps * kWarp;
  const u32 stride = row_stride<E>(columns);

  Quad<E> a, b;
  a.quad = first;
  a.chunk = start;
  if (first < last) a.fetch(w, stride, rows, columns, n_chunks);

  const Input<E> input;
  if (norm_weight != nullptr) {
    input.stage_normed(x, norm_weight, eps, columns, normed_out);
  } else {
    input.stage(x, columns);
  }
  __syncthreads();

  float sums[kRows] = {};
  auto finish_quad = [&](int quad, int batch_first) {
    const float sum = warp_sum_each<kRows>(sums) * E::kOut;
    constexpr int kShare = kWarp / kRows;
    const int r = lane_id() / kShare, row = quad * kRows + r;
    if (lane_id() % kShare == 0) {
      if (team_warps > 1) {
        partial[quad - batch_first][warp_id()][r] = sum;
      } else if (row < rows) {
        out[row] = sum + (bias != nullptr ? bias[row] : 0.0f) + (residual != nullptr ? residual[row] : 0.0f);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; i++) sums[i] = 0.0f;
  };
  // Asks for what follows `now`, then computes with `now`.
  auto advance = [&](const Quad<E>& now, Quad<E>& next, int batch_first) {
    const bool ends = now.chunk - lane_id() + step >= n_chunks;
    next.quad = ends ? now.quad + 1 : now.quad;
    next.chunk = ends ? start : now.chunk + step;
    if (next.quad < last) next.fetch(w, stride, rows, columns, n_chunks);
    if (now.chunk < n_chunks) {
      float dots[kRows];
      input.template dot<kRows>(now.chunk, now.codes, dots);
#pragma unroll
      for (int r = 0; r < kRows; r++) sums[r] += scale_value<E>(now.scales[r]) * dots[r];
    }
    if (ends) finish_quad(now.quad, batch_first);
  };

  // Every team comes to the barriers equally often, whether it has rows left or not.
  const int most = ceil_div(n_quads, n_teams);
  bool in_b = false;
  for (int done = 0; done < most; done += kBatch) {
    const int batch_first = first + done, batch_last = min(batch_first + kBatch, last);
    // The registers change roles instead of contents.
    while (true) {
      if (!in_b) {
        if (a.quad >= batch_last) break;
        advance(a, b, batch_first);
        in_b = true;
      }
      if (b.quad >= batch_last) break;
      advance(b, a, batch_first);
      in_b = false;
    }
    if (team_warps == 1) continue;
    __syncthreads();
    const int n = (batch_last - batch_first) * kRows, first_warp = warp_id() / team_warps * team_warps;
    for (int i = start; i < n; i += step) {
      const int row = batch_first * kRows + i;
      float sum = 0.0f;
      for (int warp = first_warp; warp < first_warp + team_warps; warp++) sum += partial[i / kRows][warp][i % kRows];
      if (row < rows)
        out[row] = sum + (bias != nullptr ? bias[row] : 0.0f) + (residual != nullptr ? residual[row] : 0.0f);
    }
    __syncthreads();
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
