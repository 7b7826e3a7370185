// Which cold neurons the next layer will probably need: those of highest score that fit in the places for them, so that
// the link brings them to the device while attention is computed and it has nothing else to do (fetch.cu).
//
// A guess that costs nothing if it is wrong, because the link is idle then; so it may be rough. The scores' order comes
// from a sample of 4096. Of too many the first get a place, of too few some places stay empty. The same scores give the
// same places.
#pragma once
#include "scores.cuh"

struct Foresee {
  const float* scores;  // [ffn] and room up to a multiple of four
  const u32* slot_of;   // [ffn - n_hot] of the cache, or null
  uint2* foreseen;      // [ceil(ffn / 32)]: a bit for each of 32 neurons that has a place, and the place of the first
  u32* list;            // [n_places]: cold numbers, ascending; a neuron's place is its index
  u32* n_listed;
  u32 n_hot, n_places;
};

// The place of a neuron, or kNone.
DEVICE u32 foreseen_place(const uint2* foreseen, u32 neuron) {
  const uint2 word = foreseen[neuron / 32];
  const u32 bit = 1u << neuron % 32;
  return word.x & bit ? word.y + __popc(word.x & (bit - 1)) : kNone;
}

// By the 1024 threads of one block. n_wanted: at most as many as there are places.
DEVICE void foresee(const Foresee& f, ScoreShared& shared, u32 ffn, u32 n_wanted) {
  using namespace score_shape;
  const Scores scores(f.scores, ffn);
  auto is_cached = [&](u32 neuron) { return f.slot_of != nullptr && f.slot_of[neuron - f.n_hot] != kNone; };
  // Of those in question.
  float4 sample = scores.sample();
  float* const sampled[4] = {&sample.x, &sample.y, &sample.z, &sample.w};
#pragma unroll
  for (u32 i = 0; i < 4; i++) {
    const u32 neuron = scores.first_sampled() + i;
    if (neuron < f.n_hot || neuron >= ffn || is_cached(neuron)) *sampled[i] = 0.0f;
  }
  reinterpret_cast<uint2*>(shared.bins)[threadIdx.x] = make_uint2(0, 0);
  __syncthreads();
  count_sample(shared, sample);
  __syncthreads();
  BlockSums sums = {shared, 0};
  Bin last[1];
  const u32 rank[1] = {max((n_wanted + scores.each() / 2) / scores.each(), 1u)};
  sums.find_bins(rank, last);
  const float least = __uint_as_float(least_of_bin(last[0].number));

  u32 n = 0;
  for (u32 tile = 0; tile < scores.n_tiles; tile++) {
    const u32 first = scores.first(tile);
    u32 word = scores.at_least(tile, least, shared.nibbles[warp_id()],
                               [&](u32 group) { return scores.four(scores.first_of_four(tile, group)); });
    if (first < f.n_hot) word = f.n_hot - first < 32 ? word & (kAllLanes << (f.n_hot - first)) : 0;
    for (u32 left = word; left != 0; left &= left - 1)
      if (is_cached(first + __ffs(left) - 1)) word &= ~(left & (~left + 1));
    u32 before, all, given = 0;
    sums(__popc(word), before, all);
    const u32 place = min(n + before, n_wanted);
    for (u32 at = place; word != 0 && at < n_wanted; word &= word - 1, at++) {
      given |= word & (~word + 1);
      f.list[at] = first + __ffs(word) - 1 - f.n_hot;
    }
    if (scores.existing(tile) != 0) f.foreseen[first / 32] = make_uint2(given, place);
    n += all;
  }
  if (threadIdx.x == 0) *f.n_listed = min(n, n_wanted);
}
