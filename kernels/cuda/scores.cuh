// Scores of a layer's neurons, looked at by one block of 1024 threads.
#pragma once
#include "reduce.cuh"

namespace score_shape {
constexpr u32 kThreads = 1024;
constexpr u32 kWarps = kThreads / kWarp;
// Neurons of a warp whose scores its lanes load together, four each; and how many such groups a thread holds: a tile of
// 32768 neurons. Wider layers have several.
constexpr u32 kGroup = 4 * kWarp;
constexpr u32 kGroups = 8;
constexpr u32 kTile = kGroups * kGroup * kWarps;
constexpr u32 kBins = 2048;
// The sample's bins: 32 to an octave, from 2^-40 on.
constexpr u32 kSampleShift = 18;
constexpr u32 kFirstBin = (127 - 40) << (23 - kSampleShift);
constexpr u32 kInfinity = 0x7f800000u;
}  // namespace score_shape

struct Bin {
  u32 number, wanted, count;
};

// What counts and sums of a block need.
struct ScoreShared {
  // All zero but for the time between a count and the search in it. At last, in choose, one more than the first
  // candidate of each of 2048 sets.
  u32 bins[score_shape::kBins];
  unsigned char nibbles[score_shape::kWarps][kWarp * score_shape::kGroups];
  u32 warps[2][score_shape::kWarps];
  Bin found[2];
};

// The sum over the lanes before this one and its own.
DEVICE u32 sum_through(u32 v) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const u32 lower = __shfl_up_sync(kAllLanes, v, step);
    if (lane_id() >= step) v += lower;
  }
  return v;
}

// Sums over the block's threads, each with one barrier.
struct BlockSums {
  ScoreShared& shared;
  u32 turn;

  // `before`: over the threads before this one; `all`: over all.
  DEVICE void operator()(u32 mine, u32& before, u32& all) {
    const u32 through = sum_through(mine);
    // Another place than last time, which some may still read.
    u32* warps = shared.warps[turn];
    turn ^= 1;
    if (lane_id() == kWarp - 1) warps[warp_id()] = through;
    __syncthreads();
    const u32 v = warps[lane_id()];
    before = __reduce_add_sync(kAllLanes, lane_id() < warp_id() ? v : 0) + through - mine;
    all = __reduce_add_sync(kAllLanes, v);
  }

  // For each number wanted: the highest bin such that it and those above hold as many, how many of its own are wanted,
  // and how many it has; kNone if all bins together hold less. Returns what they hold, and clears them. A barrier must
  // lie between the count and this; ends with one.
  template <int N>
  DEVICE u32 find_bins(const u32 (&wanted)[N], Bin (&bins)[N]) {
    using namespace score_shape;
    static_assert(kBins == 2 * kThreads, "two bins a thread");
    // The first thread has the highest bins.
    const u32 top = kBins - 1 - 2 * threadIdx.x;
    uint2& mine = *reinterpret_cast<uint2*>(shared.bins + top - 1);
    const uint2 own = mine;
    mine = make_uint2(0, 0);
    if (threadIdx.x < N) shared.found[threadIdx.x] = {kNone, 0, 0};
    u32 before, all;
    (*this)(own.x + own.y, before, all);
#pragma unroll
    for (int i = 0; i < N; i++) {
      if (before < wanted[i] && wanted[i] <= before + own.y) {
        shared.found[i] = {top, wanted[i] - before, own.y};
      } else if (before + own.y < wanted[i] && wanted[i] <= before + own.y + own.x) {
        shared.found[i] = {top - 1, wanted[i] - before - own.y, own.x};
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) bins[i] = shared.found[i];
    return all;
  }
};

// Where a layer's scores lie. A tile is 32 ranges, one for each warp, of eight groups; of fewer if it is the only one.
struct Scores {
  const float* scores;  // [ffn], and room up to a multiple of four
  u32 ffn, n_groups, n_tiles, last_four;

  DEVICE Scores(const float* scores, u32 ffn) : scores(scores), ffn(ffn) {
    using namespace score_shape;
    n_groups = min((ffn + kGroup * kWarps - 1) / (kGroup * kWarps), kGroups);
    n_tiles = (ffn + kTile - 1) / kTile;
    last_four = (ffn - 1) / 4 * 4;
  }

  DEVICE u32 range(u32 tile) const {
    return (tile * score_shape::kWarps + warp_id()) * n_groups * score_shape::kGroup;
  }

  DEVICE u32 first_of_four(u32 tile, u32 group) const {
    return range(tile) + group * score_shape::kGroup + 4 * lane_id();
  }
  // From a multiple of four on. What neurons score that do not exist means nothing.
  DEVICE float4 four(u32 neuron) const {
    return *reinterpret_cast<const float4*>(scores + min(neuron, last_four));
  }

  // A sample of 4096: four neurons a thread, in 32 places of the layer. They stand for one in `each`.
  DEVICE u32 each() const {
    using namespace score_shape;
    return (ffn + kGroup * kWarps - 1) / (kGroup * kWarps);
  }
  DEVICE u32 first_sampled() const { return (warp_id() * each() + each() / 2) * score_shape::kGroup + 4 * lane_id(); }
  DEVICE float4 sample() const {
    return first_sampled() < ffn ? four(first_sampled()) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }

  // A lane's word of a tile: a bit for each of 32 neurons in a row, from this one on.
  DEVICE u32 first(u32 tile) const { return range(tile) + lane_id() * 32; }
  DEVICE u32 existing(u32 tile) const {
    const u32 from = first(tile);
    if (lane_id() >= 4 * n_groups || from >= ffn) return 0;
    return ffn - from >= 32 ? kAllLanes : (1u << (ffn - from)) - 1;
  }

  // Which scores are at least `least`, which is positive: not a number is not. `fours(group)` is what `four` gives.
  template <class F>
  DEVICE u32 at_least(u32 tile, float least, unsigned char* nibbles, F fours) const {
    using namespace score_shape;
#pragma unroll
    for (u32 group = 0; group < kGroups; group++) {
      if (group >= n_groups) continue;
      const float4 v = fours(group);
      u32 nibble = v.x >= least ? 1 : 0;
      if (v.y >= least) nibble |= 2;
      if (v.z >= least) nibble |= 4;
      if (v.w >= least) nibble |= 8;
      nibbles[group * kWarp + lane_id()] = static_cast<unsigned char>(nibble);
    }
    __syncwarp();
    uint2 v = make_uint2(0, 0);
    if (lane_id() < 4 * n_groups) v = reinterpret_cast<const uint2*>(nibbles)[lane_id()];
    __syncwarp();
    return __byte_perm(v.x | v.x >> 4, v.y | v.y >> 4, 0x6420) & existing(tile);
  }
};

// Counts what a sample has in each of its bins. A barrier must follow.
DEVICE void count_sample(ScoreShared& shared, const float4& sample) {
  using namespace score_shape;
  const float values[4] = {sample.x, sample.y, sample.z, sample.w};
#pragma unroll
  for (u32 i = 0; i < 4; i++) {
    const int bin = static_cast<int>((__float_as_uint(values[i]) >> kSampleShift) - kFirstBin);
    if (values[i] > 0.0f) atomicAdd(&shared.bins[min(max(bin, 0), static_cast<int>(kBins) - 1)], 1u);
  }
}

// The bits of the least score that a sample's bin has; 1, the least that is positive, of the lowest and of none.
DEVICE u32 least_of_bin(u32 bin) {
  using namespace score_shape;
  return bin == kNone || bin == 0 ? 1 : (bin + kFirstBin) << kSampleShift;
}
