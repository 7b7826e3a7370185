// Which neurons a token needs: scores from the layer's input, by a predictor of low rank.
//
// Its first half is z = B norm(x), of `rank` numbers. A block of predict_inner has a slice of the columns for some
// rows, and reads no more of x than that: it leaves the slice's share of B (w x), where w is the norm's weight, and of
// the squares of x. The next kernel adds up the shares, always in the same order, and divides by the root mean square.
// Its own part is the second half: each neuron's gate and up rows of the factors are multiplied with z, and the score
// is the neuron's expected |h| * ||down|| given what the low rank leaves out (calibrate/src/predictor/low_rank.rs,
// whose formulas these are).
// Floor: B and the factors from device memory, 2 * ffn rows of `rank` columns each predictor.
//
// Blocks of predict_scores share the writing of norm(x), which the layer's neurons are computed with. If the CPU may
// get a part of them, it gets the input here too, over the link: nobody waits for these writes, and what it is to
// compute is not known before the next kernel.
//
// The same x, under the next layer's norm, tells most of what that layer will need: both kernels take a second
// predictor, of which nothing but the scores is wanted (foresee.cuh).
#include "expected.cuh"
#include "input.cuh"

namespace predict_shape {
// Columns of a slice: four for each thread.
constexpr int kSlice = 1024;
constexpr int kThreads = kSlice / 4;
// A row for each warp, and a warp's part of the slice's squares.
constexpr int kRows = kThreads / kWarp;
// Neurons that a team of lanes computes together.
constexpr int kNeurons = 2;
// Slices that a thread asks for at once.
constexpr int kSlicesAtOnce = 8;
}  // namespace predict_shape

// w [rank] encoded rows of `hidden` columns; norm_weight [hidden]. inner: [n_slices, rank] shares of z, not yet
// divided by the root mean square of x; then [n_slices, kRows] shares of the sum of squares.
struct Inner {
  const unsigned char* w;
  const float* norm_weight;
  float* inner;
};
struct Inners {
  Inner of[2];
};

// x [hidden]. Grid (n_slices, rank / kRows, rounded up, for each predictor), 256 threads; dynamic shared memory as gemv,
// for kSlice columns.
template <class E>
DEVICE void predict_inner(const Inners& inners, int rank, int hidden, const float* x) {
  using namespace predict_shape;
  // Of a lane in its row.
  constexpr int kChunks = kSlice / (kWarp * E::kColumns);
  let_next_start();

  const int row_blocks = ceil_div(rank, kRows), row_block = static_cast<int>(blockIdx.y) % row_blocks;
  const bool is_ahead = static_cast<int>(blockIdx.y) >= row_blocks;
  const unsigned char* w = is_ahead ? inners.of[1].w : inners.of[0].w;
  const float* norm_weight = is_ahead ? inners.of[1].norm_weight : inners.of[0].norm_weight;
  float* inner = is_ahead ? inners.of[1].inner : inners.of[0].inner;
  const int slice = blockIdx.x, row = row_block * kRows + warp_id(), n_chunks = ceil_div(hidden, E::kColumns);
  const int first_chunk = slice * (kSlice / E::kColumns) + lane_id();
  const Row<E> from = matrix_row<E>(w + static_cast<u64>(min(row, rank - 1)) * row_stride<E>(hidden), hidden);
  uint4 codes[kChunks];
  u16 scales[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; i++) {
    if (first_chunk + i * kWarp >= n_chunks) break;
    codes[i] = from.load_codes(first_chunk + i * kWarp);
    scales[i] = from.load_scale(first_chunk + i * kWarp);
  }
  const int part = slice * kThreads + threadIdx.x;
  const float4 weight = Input<E>::fetch(norm_weight, hidden, part);

  wait_for_previous();
  const float4 v = Input<E>::fetch(x, hidden, part);
  const Input<E> input;
  input.put(threadIdx.x, make_float4(v.x * weight.x, v.y * weight.y, v.z * weight.z, v.w * weight.w), true);
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunks; i++) {
    if (first_chunk + i * kWarp >= n_chunks) break;
    const uint4 one[1] = {codes[i]};
    float dot[1];
    input.template dot<1>(lane_id() + i * kWarp, one, dot);
    sum += scale_value<E>(scales[i]) * dot[0];
  }
  sum = warp_sum(sum) * E::kOut;
  if (lane_id() == 0 && row < rank) inner[static_cast<long long>(slice) * rank + row] = sum;
  if (row_block == 0) {
    const float squares = warp_sum((v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w));
    if (lane_id() == 0) inner[static_cast<long long>(gridDim.x) * rank + slice * kRows + warp_id()] = squares;
  }
}

extern "C" __global__ void __launch_bounds__(256, 2)
    predict_inner_bf16(Inners inners, int rank, int hidden, const float* x) {
  predict_inner<Bf16>(inners, rank, hidden, x);
}
extern "C" __global__ void __launch_bounds__(256, 2)
    predict_inner_q8(Inners inners, int rank, int hidden, const float* x) {
  predict_inner<Q8>(inners, rank, hidden, x);
}
extern "C" __global__ void __launch_bounds__(256, 2)
    predict_inner_q4(Inners inners, int rank, int hidden, const float* x) {
  predict_inner<Q4>(inners, rank, hidden, x);
}

// The layer's input. normed [hidden] gets norm(x), and so does host_x, unless that
// is null.
struct LayerInput {
  const float* x;
  const float* norm_weight;
  float eps;
  int hidden;
  float* normed;
  float* host_x;
};

// inner: of predict_inner; factors [2 * ffn] encoded rows of `rank` columns, gate and up of each neuron; neurons
// [3, ffn]: standard deviations of gate and up, lengths of the down columns; scores [ffn].
struct Outer {
  const float* inner;
  const unsigned char* factors;
  const float* neurons;
  float* scores;
};
struct Outers {
  Outer of[2];
};

// rank is a multiple of 32.
// As many lanes as a row has chunks, rounded up to a power of two, take two neurons at a time, so that a warp reads
// neighbouring rows in whole lines.
// Any grid (n, predictors) of blocks of 256 threads; dynamic shared memory as gemv, for `rank`.
template <class E>
DEVICE void predict_scores(const Outers& outers, int rank, const LayerInput& from, int ffn, int activation) {
  using namespace predict_shape;
  let_next_start();

  const bool is_ahead = blockIdx.y == 1;
  const float* inner = is_ahead ? outers.of[1].inner : outers.of[0].inner;
  const unsigned char* factors = is_ahead ? outers.of[1].factors : outers.of[0].factors;
  const float* neurons = is_ahead ? outers.of[1].neurons : outers.of[0].neurons;
  float* scores = is_ahead ? outers.of[1].scores : outers.of[0].scores;
  const int n_chunks = rank / E::kColumns;
  const LaneTeams teams(n_chunks);
  const int thread = blockIdx.x * blockDim.x + threadIdx.x, n_threads = gridDim.x * blockDim.x;
  const u32 stride = row_stride<E>(rank);

  struct Rows {
    uint4 codes[2 * kNeurons];
    u16 scales[2 * kNeurons];
  };
  auto fetch = [&](int first, int chunk, Rows& rows) {
#pragma unroll
    for (int r = 0; r < 2 * kNeurons; r++) {
      // Past the end it is the last neuron again, whose score is then left out.
      const u32 number = 2 * min(first + r / 2, ffn - 1) + r % 2;
      const Row<E> row = matrix_row<E>(factors + static_cast<u64>(number) * stride, rank);
      rows.codes[r] = row.load_codes(chunk);
      rows.scales[r] = row.load_scale(chunk);
    }
  };
  // One lane for each neuron, if the team has that many.
  struct Spread {
    float gate[kNeurons], up[kNeurons], down[kNeurons];
  };
  auto fetch_spread = [&](int first, Spread& spread) {
#pragma unroll
    for (int i = 0; i < kNeurons; i++) {
      const int neuron = first + i;
      if (!teams.finishes(i) || neuron >= ffn) continue;
      spread.gate[i] = neurons[neuron];
      spread.up[i] = neurons[ffn + neuron];
      spread.down[i] = neurons[2 * ffn + neuron];
    }
  };
  // As a rule all that a lane needs, asked for before z is there.
  Rows rows;
  Spread spread;
  if (teams.me < n_chunks && teams.team * kNeurons < ffn) fetch(teams.team * kNeurons, teams.me, rows);
  fetch_spread(teams.team * kNeurons, spread);
  const float early_weight = thread < from.hidden ? from.norm_weight[thread] : 0.0f;

  wait_for_previous();
  const int n_slices = ceil_div(from.hidden, kSlice), n_parts = rank / 4, n_squares = n_slices * kRows;
  const float early_x = thread < from.hidden ? from.x[thread] : 0.0f;
  auto inner_part = [&](int index) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int first = 0; first < n_slices; first += kSlicesAtOnce) {
      float4 v[kSlicesAtOnce];
#pragma unroll
      for (int i = 0; i < kSlicesAtOnce; i++) {
        v[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (first + i < n_slices && index < n_parts)
          v[i] = reinterpret_cast<const float4*>(inner + static_cast<long long>(first + i) * rank)[index];
      }
#pragma unroll
      for (int i = 0; i < kSlicesAtOnce; i++)
        sum = make_float4(sum.x + v[i].x, sum.y + v[i].y, sum.z + v[i].z, sum.w + v[i].w);
    }
    return sum;
  };
  float squares = 0.0f;
#pragma unroll 4
  for (int i = lane_id(); i < n_squares; i += kWarp)
    squares += inner[static_cast<long long>(n_slices) * rank + i];
  // Whole warps: they add up more than their own part.
  const int warp_begin = warp_id() * kWarp;
  float4 part = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (warp_begin < n_parts) part = inner_part(threadIdx.x);
  const float scale = 1.0f / sqrtf(warp_sum(squares) / from.hidden + from.eps);
  const Input<E> input;
  for (int first = 0; first + warp_begin < n_parts; first += blockDim.x) {
    const int index = first + threadIdx.x;
    if (first > 0) part = inner_part(index);
    input.put(index, make_float4(part.x * scale, part.y * scale, part.z * scale, part.w * scale), index < n_parts);
  }
  for (int i = thread; !is_ahead && i < from.hidden; i += n_threads) {
    const float v = i == thread ? early_x * scale * early_weight : from.x[i] * scale * from.norm_weight[i];
    from.normed[i] = v;
    if (from.host_x != nullptr) from.host_x[i] = v;
  }
  __syncthreads();

  // All teams of a warp take part in its shuffles as long as the first of them has work.
  for (int turn = 0; (teams.first_of_warp + turn * teams.n_teams) * kNeurons < ffn; turn++) {
    const int first = (teams.team + turn * teams.n_teams) * kNeurons;
    if (turn > 0) fetch_spread(first, spread);
    float sums[2 * kNeurons] = {};
    for (int chunk = teams.me; chunk < n_chunks; chunk += teams.lanes) {
      if (turn > 0 || chunk > teams.me) fetch(first, chunk, rows);
      float dots[2 * kNeurons];
      input.template dot<2 * kNeurons>(chunk, rows.codes, dots);
#pragma unroll
      for (int r = 0; r < 2 * kNeurons; r++) sums[r] += scale_value<E>(rows.scales[r]) * dots[r];
    }
    teams.sum(sums);
#pragma unroll
    for (int i = 0; i < kNeurons; i++) {
      const int neuron = first + i;
      if (!teams.finishes(i) || neuron >= ffn) continue;
      const float gate = sums[2 * i] * E::kOut, up = sums[2 * i + 1] * E::kOut;
      const float score = expected_magnitude(activation, gate, up, spread.gate[i], spread.up[i]) * spread.down[i];
      // A score that is not a number counts as zero: a broken predictor costs accuracy, nothing else.
      scores[neuron] = score > 0.0f ? score : 0.0f;
    }
  }
}

extern "C" __global__ void __launch_bounds__(256, 2)
    predict_scores_bf16(Outers outers, int rank, LayerInput from, int ffn, int activation) {
  predict_scores<Bf16>(outers, rank, from, ffn, activation);
}
extern "C" __global__ void __launch_bounds__(256, 2)
    predict_scores_q8(Outers outers, int rank, LayerInput from, int ffn, int activation) {
  predict_scores<Q8>(outers, rank, from, ffn, activation);
}
extern "C" __global__ void __launch_bounds__(256, 2)
    predict_scores_q4(Outers outers, int rank, LayerInput from, int ffn, int activation) {
  predict_scores<Q4>(outers, rank, from, ffn, activation);
}
