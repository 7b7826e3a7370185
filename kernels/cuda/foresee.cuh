// Which cold neurons the next layer will probably need, so that the CPU's threads bring them from memory to their caches
// while attention is computed and they have nothing else to do.
//
// A guess that costs nothing but memory traffic if it is wrong, so it may be rough: active is what has at least the
// score that a sample of 4096 has at the rank of the k-th largest.
#pragma once
#include "scores.cuh"

struct Foresee {
  const float* scores;  // [ffn] and room up to a multiple of four
  const u32* slot_of;   // [ffn - n_hot] of the cache, or null
  u32* list;            // [ffn - n_hot], like `bounds` in mapped host memory: cold numbers, ascending
  u32* bounds;          // [2]: the CPU's share of the list is from the first to before the second
  u32 n_hot;
};

// By the 1024 threads of one block. k: active neurons, not 0; share: the CPU's part, which are the last ones, as of the
// misses (choose.cu). Nothing is visible to the CPU until a fence of the first thread.
DEVICE void foresee(const Foresee& f, ScoreShared& shared, u32 ffn, u32 k, float share) {
  using namespace score_shape;
  const Scores scores(f.scores, ffn);
  const float4 sample = scores.sample();
  reinterpret_cast<uint2*>(shared.bins)[threadIdx.x] = make_uint2(0, 0);
  __syncthreads();
  count_sample(shared, sample);
  __syncthreads();
  BlockSums sums = {shared, 0};
  Bin last[1];
  const u32 rank[1] = {max(k / scores.each(), 1u)};
  sums.find_bins(rank, last);
  const float least = __uint_as_float(least_of_bin(last[0].number));

  u32 n = 0;
  for (u32 tile = 0; tile < scores.n_tiles; tile++) {
    const u32 first = scores.first(tile);
    u32 word = scores.at_least(tile, least, shared.nibbles[warp_id()],
                               [&](u32 group) { return scores.four(scores.first_of_four(tile, group)); });
    // Neither hot ones nor cached ones.
    if (first < f.n_hot) word = f.n_hot - first < 32 ? word & (kAllLanes << (f.n_hot - first)) : 0;
    if (f.slot_of != nullptr)
      for (u32 left = word; left != 0; left &= left - 1)
        if (f.slot_of[first + __ffs(left) - 1 - f.n_hot] != kNone) word &= ~(left & (~left + 1));
    u32 before, all;
    sums(__popc(word), before, all);
    for (u32 at = n + before; word != 0; word &= word - 1, at++) f.list[at] = first + __ffs(word) - 1 - f.n_hot;
    n += all;
  }
  if (threadIdx.x == 0) {
    f.bounds[0] = n - min(n, static_cast<u32>(fmaf(share, static_cast<float>(n), 0.5f)));
    f.bounds[1] = n;
  }
  __syncthreads();
}
