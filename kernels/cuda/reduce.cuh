// Sums over the lanes of a warp and the threads of a block, always in the same order.
#pragma once
#include "platform.cuh"

// Every lane gets the sum.
DEVICE float warp_sum(float v) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

DEVICE float warp_max(float v) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, step));
  return v;
}

// Of N values a lane keeps the sums of the half that its partner, kStep lanes away, gives away; the upper one the later.
template <int kStep, int N>
DEVICE void keep_half(const float (&v)[N], float (&kept)[N / 2]) {
  const bool upper = lane_id() & kStep;
#pragma unroll
  for (int i = 0; i < N / 2; i++) {
    const float give = upper ? v[i] : v[i + N / 2];
    kept[i] = (upper ? v[i + N / 2] : v[i]) + __shfl_xor_sync(kAllLanes, give, kStep);
  }
}

// Sums N values over the warp with N - 1 + log2(32 / N) shuffles. Lane l gets the sum of value l / (32 / N). N is a power
// of two up to 32.
template <int N, int kStep = kWarp / 2>
DEVICE float warp_sum_each(float (&v)[N]) {
  if constexpr (N > 1) {
    float kept[N / 2];
    keep_half<kStep>(v, kept);
    return warp_sum_each<N / 2, kStep / 2>(kept);
  } else {
#pragma unroll
    for (int step = kStep; step > 0; step /= 2) v[0] += __shfl_xor_sync(kAllLanes, v[0], step);
    return v[0];
  }
}

// Every thread gets the sum. `scratch` holds 32 floats of shared memory that nobody uses any more.
DEVICE float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  if (lane_id() == 0) scratch[warp_id()] = v;
  __syncthreads();
  const int n_warps = blockDim.x / kWarp;
  return warp_sum(lane_id() < n_warps ? scratch[lane_id()] : 0.0f);
}

// The threads of a grid, divided into teams of neighbouring lanes: as many as a row has parts, rounded up to a power of two,
// at most a warp.
struct LaneTeams {
  int lanes;
  // Of this thread: its place in its team, its team, and the first team of its warp.
  int me, team, first_of_warp;
  int n_teams;

  DEVICE explicit LaneTeams(int n_parts) : lanes(1) {
    while (lanes < kWarp && lanes < n_parts) lanes *= 2;
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    me = lane_id() % lanes;
    team = thread / lanes;
    first_of_warp = (thread - lane_id()) / lanes;
    n_teams = gridDim.x * blockDim.x / lanes;
  }

  // Whether this lane finishes what the team has added up for its i-th row.
  DEVICE bool finishes(int i) const { return (i & (lanes - 1)) == me; }

  // Every lane gets its team's sums. All lanes of the warp take part.
  template <int N>
  DEVICE void sum(float (&v)[N]) const {
    for (int step = lanes / 2; step > 0; step /= 2)
#pragma unroll
      for (int i = 0; i < N; i++) v[i] += __shfl_xor_sync(kAllLanes, v[i], step);
  }
};
