// Which neurons a token needs: scores from the predictor's inner vector.
//
// The second half of a low-rank predictor. z = B x has `rank` numbers (a gemv); here each neuron's gate and up rows of
// the factors are multiplied with it, and the score is the neuron's expected |h| * ||down|| given what the low rank
// leaves out (calibrate/src/predictor/low_rank.rs, whose formulas these are).
// Floor: the factors from device memory, 2 * ffn rows of `rank` columns.
//
// If the CPU may get a part of the layer, it gets the layer's input here: blocks share the writes over the link, and
// nobody waits for them. What it is to compute is not known before the next kernel.
#include "input.cuh"

// exp within 3e-5 of itself: a power of two by its exponent bits, the rest by a polynomial.
DEVICE float quick_exp(float x) {
  const float t = fminf(fmaxf(x * 1.44269504f, -126.0f), 126.0f);
  // Adding and taking away 1.5 * 2^23 rounds to the nearest whole number.
  const float whole = (t + 12582912.0f) - 12582912.0f, f = t - whole;
  const float p = 1.0f + f * (0.69314718f + f * (0.2402265f + f * (0.0555041f + f * 0.0096181f)));
  return __uint_as_float(static_cast<u32>(static_cast<int>(whole) + 127) << 23) * p;
}

// E[silu(v)^2] for v ~ N(mean, sd^2), to first order in the noise.
DEVICE float silu_square(float mean, float sd) {
  const float sigmoid = reciprocal(1.0f + quick_exp(-mean));
  const float value = mean * sigmoid, slope = sigmoid * (1.0f + mean * (1.0f - sigmoid)) * sd;
  return value * value + slope * slope;
}

// E[max(v, 0)^2] for v ~ N(mean, sd^2), with a logistic function in place of the normal distribution's.
DEVICE float relu_square(float mean, float sd) {
  if (sd <= 1e-6f * fabsf(mean)) {
    const float value = fmaxf(mean, 0.0f);
    return value * value;
  }
  const float t = mean * reciprocal(sd);
  const float below = reciprocal(1.0f + quick_exp(-1.702f * t)), density = 0.3989423f * quick_exp(-0.5f * t * t);
  return fmaxf((mean * mean + sd * sd) * below + mean * sd * density, 0.0f);
}

// Root of the expected h^2 if gate and up are normal with these means and standard deviations.
DEVICE float expected_magnitude(int activation, float gate, float up, float gate_sd, float up_sd) {
  const float gate_square = activation == 0 ? silu_square(gate, gate_sd) : relu_square(gate, gate_sd);
  const float up_square = activation == 2 ? relu_square(up, up_sd) : up * up + up_sd * up_sd;
  return sqrtf(gate_square * up_square);
}

namespace predict_shape {
// Neurons that a team of lanes computes together.
constexpr int kNeurons = 2;
}  // namespace predict_shape

// factors [2 * ffn] encoded rows of `rank` columns, gate and up of each neuron; z [rank]; neurons [3, ffn]: standard
// deviations of gate and up, lengths of the down columns; scores [ffn]. rank is a multiple of 32.
// As many lanes as a row has chunks, rounded up to a power of two, take two neurons at a time, so that a warp reads
// neighbouring rows in whole lines. x [hidden] is copied to host_x, unless that is null.
// Any grid of blocks of 256 threads; dynamic shared memory as gemv, for `rank`.
template <class E>
DEVICE void predict_scores(const unsigned char* factors, int rank, const float* z, const float* neurons, int ffn,
                           int activation, float* scores, const float* x, float* host_x, int hidden) {
  using namespace predict_shape;
  let_next_start();

  const int n_chunks = rank / E::kColumns;
  int team_lanes = 1;
  while (team_lanes < kWarp && team_lanes < n_chunks) team_lanes *= 2;
  const int team = (blockIdx.x * blockDim.x + threadIdx.x) / team_lanes, n_teams = gridDim.x * blockDim.x / team_lanes;
  const int me = lane_id() % team_lanes, first_of_warp = (blockIdx.x * blockDim.x + warp_id() * kWarp) / team_lanes;
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
  // As a rule all that a lane needs, asked for before z is there.
  Rows rows;
  if (me < n_chunks && team * kNeurons < ffn) fetch(team * kNeurons, me, rows);

  const Input<E> input;
  input.stage(z, rank);
  if (host_x != nullptr)
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < hidden; i += gridDim.x * blockDim.x) host_x[i] = x[i];
  __syncthreads();

  // All teams of a warp take part in its shuffles as long as the first of them has work.
  for (int turn = 0; (first_of_warp + turn * n_teams) * kNeurons < ffn; turn++) {
    const int first = (team + turn * n_teams) * kNeurons;
    float sums[2 * kNeurons] = {};
    for (int chunk = me; chunk < n_chunks; chunk += team_lanes) {
      if (turn > 0 || chunk > me) fetch(first, chunk, rows);
      float dots[2 * kNeurons];
      input.template dot<2 * kNeurons>(chunk, rows.codes, dots);
#pragma unroll
      for (int r = 0; r < 2 * kNeurons; r++) sums[r] += scale_value<E>(rows.scales[r]) * dots[r];
    }
    for (int step = team_lanes / 2; step > 0; step /= 2)
#pragma unroll
      for (int r = 0; r < 2 * kNeurons; r++) sums[r] += __shfl_xor_sync(kAllLanes, sums[r], step);
    // One lane for each neuron, if the team has that many.
    for (int i = me; i < kNeurons; i += team_lanes) {
      const int neuron = first + i;
      if (neuron >= ffn) break;
      const float gate = (i == 0 ? sums[0] : sums[2]) * E::kOut, up = (i == 0 ? sums[1] : sums[3]) * E::kOut;
      const float score =
          expected_magnitude(activation, gate, up, neurons[neuron], neurons[ffn + neuron]) * neurons[2 * ffn + neuron];
      // A score that is not a number counts as zero: a broken predictor costs accuracy, nothing else.
      scores[neuron] = score > 0.0f ? score : 0.0f;
    }
  }
}

extern "C" __global__ void __launch_bounds__(256, 2)
    predict_scores_bf16(const unsigned char* factors, int rank, const float* z, const float* neurons, int ffn,
                        int activation, float* scores, const float* x, float* host_x, int hidden) {
  predict_scores<Bf16>(factors, rank, z, neurons, ffn, activation, scores, x, host_x, hidden);
}
extern "C" __global__ void __launch_bounds__(256, 2)
    predict_scores_q8(const unsigned char* factors, int rank, const float* z, const float* neurons, int ffn,
                      int activation, float* scores, const float* x, float* host_x, int hidden) {
  predict_scores<Q8>(factors, rank, z, neurons, ffn, activation, scores, x, host_x, hidden);
}
extern "C" __global__ void __launch_bounds__(256, 2)
    predict_scores_q4(const unsigned char* factors, int rank, const float* z, const float* neurons, int ffn,
                      int activation, float* scores, const float* x, float* host_x, int hidden) {
  predict_scores<Q4>(factors, rank, z, neurons, ffn, activation, scores, x, host_x, hidden);
}
