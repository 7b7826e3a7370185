// The active neurons of a layer, the cache of cold ones, and who computes what.
//
// One block of 1024 threads, once a layer: what counts is how often it waits, for memory or at a barrier.
//
// 1. Scores are read once, into registers. Non-negative floats order like their bits: counting the upper 12 finds the
//    few among which the k-th largest lies, and two more rounds over these find it. A warp owns neighbouring neurons, so
//    that counting before it is all it takes to write the active ones in ascending order.
// 2. The active ones are looked up in the cache and divided into misses, hits and hot ones; the last of the misses may go
//    to the CPU, which starts at once.
// 3. Misses that are read over the link compete for the slots of their sets. A neuron's key is recency and frequency in
//    one number (LRFU, Lee et al. 2001): the logarithm of the sum of 2^(lambda * t) over the tokens t that used it. It
//    never ages: only what is used grows. As an f32 it tells apart times that differ by now / 2^24 tokens: a sixteenth
//    of a token after a million of them.
#include "reduce.cuh"

struct Choose {
  const float* scores;  // [ffn], not read if `every` is 1
  u32 ffn, k, n_hot, every;
  float threshold;  // if k and every are 0
  u32 n_sets, n_ways;
  u32* slot_of;  // [ffn - n_hot]
  u32* owner;    // [n_sets * n_ways]; slot = set * n_ways + way, set = cold index % n_sets
  float* key;    // [ffn - n_hot]
  u32* used;     // [n_sets * n_ways]
  float lambda;
  const u32* step;  // token, position, serial
  u32 layer, n_layers;
  float cpu_share;
  u32* cpu_list;  // [ffn - n_hot], like all of the CPU's in mapped host memory
  float* cpu_x;   // [hidden]
  const float* x;
  u32 hidden;
  u32* cpu_count;
  u32* cpu_flag;
  u32* ids;     // [ffn]
  uint2* items;  // [ffn]
  u32* counts;  // [8]: items, link, cached, hot, cpu, active, 0, 0
  u64* totals;  // [8]
};

namespace choose_shape {
constexpr u32 kThreads = 1024;
constexpr u32 kWarps = kThreads / kWarp;
// Scores of a thread that stay in registers: layers of up to 32768 neurons. Those of wider layers are read again.
constexpr u32 kKept = 32;
constexpr u32 kBins = 4096;
// A miss that has not had its turn at the cache. Also no slot, and distinct from kNone.
constexpr u32 kPending = 0xfffffffeu;
}  // namespace choose_shape

struct ChooseShared {
  u32 bins[choose_shape::kBins];
  u32 warps[2][choose_shape::kWarps];
  u32 found[2];
};

// The scores of a thread's neurons, as bits that order like them: number `first`, and every 32nd from there.
struct Scores {
  const Choose& c;
  u32 each, first;
  u32 kept[choose_shape::kKept];

  DEVICE Scores(const Choose& choose) : c(choose) {
    using namespace choose_shape;
    each = (c.ffn + kThreads - 1) / kThreads;
    first = warp_id() * each * kWarp + lane_id();
#pragma unroll
    for (u32 j = 0; j < kKept; j++) kept[j] = j < each && !c.every ? read(first + j * kWarp) : 0;
  }

  // Not a number, like anything that is not positive, counts as zero.
  DEVICE u32 read(u32 neuron) const {
    if (neuron >= c.ffn || c.every) return 0;
    const float score = c.scores[neuron];
    return score > 0.0f ? __float_as_uint(score) : 0;
  }

  // Calls `f` with the number and the bits of the score of each neuron, all lanes together; the last numbers may not
  // exist.
  template <class F>
  DEVICE void for_each(F f) const {
    using namespace choose_shape;
#pragma unroll
    for (u32 j = 0; j < kKept; j++)
      if (j < each) f(first + j * kWarp, kept[j]);
    for (u32 j = kKept; j < each; j++) f(first + j * kWarp, read(first + j * kWarp));
  }
};

// The sum over the warps before this one, and over all; `mine` must be the same in all lanes of a warp.
struct BlockCount {
  u32 before, all;
};
DEVICE BlockCount count_over_warps(u32 mine, u32* warps) {
  if (lane_id() == 0) warps[warp_id()] = mine;
  __syncthreads();
  u32 sum = warps[lane_id()];
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const u32 lower = __shfl_up_sync(kAllLanes, sum, step);
    if (lane_id() >= step) sum += lower;
  }
  const u32 through = __shfl_sync(kAllLanes, sum, warp_id()), all = __shfl_sync(kAllLanes, sum, kWarp - 1);
  __syncthreads();
  return {through - mine, all};
}

// The highest bin such that it and those above hold at least `wanted`, and how many of its own are wanted.
// Clears the bins on the way. Ends with a barrier.
DEVICE void find_bin(ChooseShared& shared, u32 wanted, u32& bin, u32& left) {
  using namespace choose_shape;
  constexpr u32 kEach = kBins / kThreads;
  // The first thread takes the highest bins.
  const u32 top = kBins - 1 - threadIdx.x * kEach;
  u32 own[kEach], sum = 0;
#pragma unroll
  for (u32 i = 0; i < kEach; i++) {
    own[i] = shared.bins[top - i];
    shared.bins[top - i] = 0;
    sum += own[i];
  }
  u32 through = sum;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const u32 lower = __shfl_up_sync(kAllLanes, through, step);
    if (lane_id() >= step) through += lower;
  }
  const u32 of_warp = __shfl_sync(kAllLanes, through, kWarp - 1);
  u32 before = count_over_warps(of_warp, shared.warps[0]).before + through - sum;
  if (before < wanted && wanted <= before + sum) {
#pragma unroll
    for (u32 i = 0; i < kEach; i++) {
      if (before < wanted && wanted <= before + own[i]) {
        shared.found[0] = top - i;
        shared.found[1] = wanted - before;
      }
      before += own[i];
    }
  }
  __syncthreads();
  bin = shared.found[0];
  left = shared.found[1];
}

// log2(1 + 2^d). Only operations that round correctly, in this order: the same bits on every machine, on which the
// cache's decisions depend.
DEVICE float log2_of_one_plus_power(float d) {
  const float t = fminf(fmaxf(d, -126.0f), 126.0f);
  const float whole = (t + 12582912.0f) - 12582912.0f, f = t - whole;
  const float p = fmaf(f, fmaf(f, fmaf(f, fmaf(f, 0.0096181f, 0.0555041f), 0.2402265f), 0.69314718f), 1.0f);
  const float y = fmaf(__uint_as_float(static_cast<u32>(static_cast<int>(whole) + 127) << 23), p, 1.0f);
  // y = m * 2^e with m in [1, 2); log2(m) by its series in (m - 1) / (m + 1).
  const u32 bits = __float_as_uint(y);
  const float e = static_cast<float>(static_cast<int>(bits >> 23) - 127);
  const float m = __uint_as_float((bits & 0x7fffffu) | 0x3f800000u);
  const float s = (m - 1.0f) / (m + 1.0f), square = rounded_product(s, s);
  const float higher = fmaf(square, fmaf(square, 0.3205989f, 0.4121986f), 0.5770780f);
  const float series = fmaf(square, fmaf(square, higher, 0.9617967f), 2.8853901f);
  return fmaf(s, series, e);
}

extern "C" __global__ void __launch_bounds__(1024, 1) choose(Choose c) {
  using namespace choose_shape;
  __shared__ ChooseShared shared;
  const u32 thread = threadIdx.x, lane = lane_id(), warp = warp_id();
  const u32 serial = c.step[2];

  // 1. The active ones.
  Scores scores(c);
  for (u32 i = thread; i < kBins; i += kThreads) shared.bins[i] = 0;
  __syncthreads();

  // All above `limit` are active, and the first `ties` of those at it.
  u32 limit = 0, ties = 0;
  const bool top = !c.every && c.k > 0 && c.k < c.ffn, all = c.every || c.k >= c.ffn;
  if (top) {
    u32 bin, left = c.k;
    scores.for_each([&](u32 neuron, u32 bits) {
      if (neuron < c.ffn) atomicAdd(&shared.bins[bits >> 19], 1u);
    });
    __syncthreads();
    find_bin(shared, left, bin, left);
    limit = bin << 19;
    scores.for_each([&](u32 neuron, u32 bits) {
      if (neuron < c.ffn && bits >> 19 == limit >> 19) atomicAdd(&shared.bins[bits >> 9 & 1023], 1u);
    });
    __syncthreads();
    find_bin(shared, left, bin, left);
    limit |= bin << 9;
    scores.for_each([&](u32 neuron, u32 bits) {
      if (neuron < c.ffn && bits >> 9 == limit >> 9) atomicAdd(&shared.bins[bits & 511], 1u);
    });
    __syncthreads();
    find_bin(shared, left, bin, left);
    limit |= bin;
    ties = left;
  }
  auto above = [&](u32 neuron, u32 bits) {
    if (neuron >= c.ffn) return false;
    if (all) return true;
    return top ? bits > limit : __uint_as_float(bits) > c.threshold;
  };
  u32 n_above = 0, n_ties = 0;
  scores.for_each([&](u32 neuron, u32 bits) {
    n_above += above(neuron, bits);
    n_ties += top && neuron < c.ffn && bits == limit;
  });
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    n_above += __shfl_xor_sync(kAllLanes, n_above, step);
    n_ties += __shfl_xor_sync(kAllLanes, n_ties, step);
  }
  const u32 ties_before = count_over_warps(n_ties, shared.warps[0]).before;
  auto taken = [&](u32 n) { return n < ties ? n : ties; };
  const BlockCount active = count_over_warps(n_above + taken(ties_before + n_ties) - taken(ties_before), shared.warps[1]);
  u32 at = active.before, tie = ties_before;
  const u32 lower_lanes = (1u << lane) - 1;
  scores.for_each([&](u32 neuron, u32 bits) {
    const bool equal = top && neuron < c.ffn && bits == limit;
    const u32 equals = top ? __ballot_sync(kAllLanes, equal) : 0;
    const bool mine = above(neuron, bits) || (equal && tie + __popc(equals & lower_lanes) < ties);
    const u32 takes = __ballot_sync(kAllLanes, mine);
    if (mine) c.ids[at + __popc(takes & lower_lanes)] = neuron;
    at += __popc(takes);
    tie += __popc(equals);
  });
  __syncthreads();

  // 2. What each of them is. The hot ones come first; a warp owns a range of the list.
  const u32 n_active = active.all, share = (n_active + kThreads - 1) / kThreads * kWarp, begin = warp * share + lane;
  const u32 n_rounds = share / kWarp;
  const float now = rounded_product(c.lambda, static_cast<float>(serial));
  enum Kind { kNothing, kHot, kCached, kMiss };
  auto kind_of = [&](u32 i, u32& cold, u32& slot) {
    cold = slot = kNone;
    if (i >= n_active) return kNothing;
    const u32 neuron = c.ids[i];
    cold = neuron - c.n_hot;
    if (neuron < c.n_hot) return kHot;
    if (c.n_sets > 0) slot = c.slot_of[cold];
    return slot == kNone ? kMiss : kCached;
  };
  u32 n_hot = 0, n_miss = 0, n_cached = 0;
  for (u32 round = 0; round < n_rounds; round++) {
    u32 cold, slot;
    const Kind kind = kind_of(begin + round * kWarp, cold, slot);
    n_hot += __popc(__ballot_sync(kAllLanes, kind == kHot));
    n_miss += __popc(__ballot_sync(kAllLanes, kind == kMiss));
    n_cached += __popc(__ballot_sync(kAllLanes, kind == kCached));
  }
  const BlockCount misses = count_over_warps(n_miss, shared.warps[0]);
  const BlockCount hits = count_over_warps(n_cached, shared.warps[1]);
  const u32 all_hot = count_over_warps(n_hot, shared.warps[0]).all;
  const u32 n_cpu = min(misses.all, static_cast<u32>(fmaf(c.cpu_share, static_cast<float>(misses.all), 0.5f)));
  const u32 n_link = misses.all - n_cpu;

  u32 miss_at = misses.before, hit_at = hits.before;
  for (u32 round = 0; round < n_rounds; round++) {
    const u32 i = begin + round * kWarp;
    u32 cold, slot;
    const Kind kind = kind_of(i, cold, slot);
    const u32 missed = __ballot_sync(kAllLanes, kind == kMiss), hit = __ballot_sync(kAllLanes, kind == kCached);
    if (kind == kMiss) {
      const u32 m = miss_at + __popc(missed & lower_lanes);
      if (m < n_link) {
        c.items[m] = make_uint2(0x40000000u | cold, c.n_sets > 0 ? kPending : kNone);
      } else {
        c.cpu_list[m - n_link] = cold;
      }
    } else if (kind == kCached) {
      c.items[n_link + hit_at + __popc(hit & lower_lanes)] = make_uint2(0x80000000u | slot, kNone);
      c.used[slot] = serial;
    } else if (kind == kHot) {
      c.items[n_link + hits.all + i] = make_uint2(cold + c.n_hot, kNone);
    }
    if (c.n_sets > 0 && (kind == kMiss || kind == kCached))
      c.key[cold] = now + log2_of_one_plus_power(c.key[cold] - now);
    miss_at += __popc(missed);
    hit_at += __popc(hit);
  }
  if (n_cpu > 0) {
    for (u32 i = thread; i < c.hidden; i += kThreads) c.cpu_x[i] = c.x[i];
    if (thread == 0) *c.cpu_count = n_cpu;
    // Every thread's own writes must have arrived before the flag goes up.
    __threadfence_system();
    __syncthreads();
    if (thread == 0) *const_cast<volatile u32*>(c.cpu_flag) = serial * c.n_layers + c.layer + 1;
  }
  if (thread < 8) {
    const u32 n_items = n_link + hits.all + all_hot;
    const u32 values[8] = {n_items, n_link, hits.all, all_hot, n_cpu, n_active, 0, 0};
    u32 value = 0;
#pragma unroll
    for (u32 i = 0; i < 8; i++)
      if (i == thread) value = values[i];
    c.counts[thread] = value;
    c.totals[thread] += value;
  }
  if (c.n_sets == 0) return;

  // 3. Slots for the misses. In each round the first pending miss of every set has its turn, so that those of one set
  // come in ascending order; there are as many rounds as the fullest set has misses. Sets may share a bin: that costs
  // rounds and changes nothing.
  for (u32 i = thread; i < kBins; i += kThreads) shared.bins[i] = kNone;
  __syncthreads();
  while (true) {
    bool pending = false;
    for (u32 i = thread; i < n_link; i += kThreads) {
      if (c.items[i].y != kPending) continue;
      pending = true;
      atomicMin(&shared.bins[(c.items[i].x & 0x3fffffffu) % c.n_sets % kBins], i);
    }
    if (!__syncthreads_or(pending)) break;
    for (u32 i = thread; i < n_link; i += kThreads) {
      const uint2 item = c.items[i];
      const u32 cold = item.x & 0x3fffffffu, set = cold % c.n_sets;
      if (item.y != kPending || shared.bins[set % kBins] != i) continue;
      // An empty way, else the one of lowest key that this token does not use.
      u32 best = kNone, best_owner = kNone;
      float lowest = 0.0f;
      for (u32 way = 0; way < c.n_ways; way++) {
        const u32 slot = set * c.n_ways + way, owner = c.owner[slot];
        if (owner == kNone) {
          best = slot;
          best_owner = kNone;
          break;
        }
        const float key = c.key[owner];
        if (c.used[slot] != serial && (best == kNone || key < lowest)) {
          best = slot;
          best_owner = owner;
          lowest = key;
        }
      }
      if (best != kNone && best_owner != kNone && !(lowest < c.key[cold])) best = kNone;
      if (best != kNone) {
        if (best_owner != kNone) c.slot_of[best_owner] = kNone;
        c.owner[best] = cold;
        c.slot_of[cold] = best;
        c.used[best] = serial;
      }
      c.items[i].y = best;
    }
    __syncthreads();
    for (u32 i = thread; i < n_link; i += kThreads) {
      const u32 bin = (c.items[i].x & 0x3fffffffu) % c.n_sets % kBins;
      if (shared.bins[bin] == i) shared.bins[bin] = kNone;
    }
    __syncthreads();
  }
}
