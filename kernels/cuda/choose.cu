// The active neurons of a layer, the cache of cold ones, and who computes what.
//
// One block of 1024 threads, once a layer: what counts is how often it waits, for memory or at a barrier.
//
// 1. Scores are read once, into registers. Non-negative floats order like their bits: counting the upper 12 finds the
//    few among which the k-th largest lies, and two more rounds over these find it. A warp owns neighbours, so that
//    counting before it is all it takes to write the active ones in ascending order.
// 2. The active ones are looked up in the cache and divided into misses, hits and hot ones; the last misses may go to
//    the CPU, which starts at once.
// 3. Misses that are read over the link compete for the slots of their sets, a warp for each set. A neuron's key is recency and frequency in
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
// Misses that compete for slots at one token, the first ones; those after them are read and not kept.
constexpr u32 kCandidates = 2048;
// Active neurons of a lane whose place is looked up once and kept.
constexpr u32 kRounds = 4;
}  // namespace choose_shape

struct ChooseShared {
  u32 bins[choose_shape::kBins];
  u32 warps[2][choose_shape::kWarps];
  u32 found[2];
  u32 n_near;
  // Of each candidate. Before that, `cold` has the bits of the scores near the limit.
  u32 cold[choose_shape::kCandidates];
  float key[choose_shape::kCandidates];
  u16 set[choose_shape::kCandidates];
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

// The active neurons of a lane: their places in the list of ids, their numbers among the cold ones, their slots.
struct Active {
  const Choose& c;
  u32 n_active, begin, n_rounds;
  u32 colds[choose_shape::kRounds], slots[choose_shape::kRounds];

  DEVICE Active(const Choose& choose, u32 n_active, u32 begin, u32 n_rounds)
      : c(choose), n_active(n_active), begin(begin), n_rounds(n_rounds) {
#pragma unroll
    for (u32 round = 0; round < choose_shape::kRounds; round++)
      look_up(round < n_rounds ? begin + round * kWarp : n_active, colds[round], slots[round]);
  }

  // The number of a hot neuron among the cold ones is negative.
  DEVICE void look_up(u32 i, u32& cold, u32& slot) const {
    cold = slot = kNone;
    if (i >= n_active) return;
    const u32 neuron = c.ids[i];
    cold = neuron - c.n_hot;
    if (neuron >= c.n_hot && c.n_sets > 0) slot = c.slot_of[cold];
  }

  // Calls `f` for each, all lanes together; the last places may be behind the end of the list.
  template <class F>
  DEVICE void for_each(F f) const {
    using namespace choose_shape;
#pragma unroll
    for (u32 round = 0; round < kRounds; round++)
      if (round < n_rounds) f(begin + round * kWarp, colds[round], slots[round]);
    for (u32 round = kRounds; round < n_rounds; round++) {
      u32 cold, slot;
      look_up(begin + round * kWarp, cold, slot);
      f(begin + round * kWarp, cold, slot);
    }
  }
};

// The sum over the lanes of a warp, in all of them.
DEVICE u32 warp_total(u32 v) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

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
  let_next_start();
  wait_for_previous();
  const u32 thread = threadIdx.x, lane = lane_id(), warp = warp_id();
  const u32 serial = c.step[2];

  // 1. The active ones.
  Scores scores(c);
  for (u32 i = thread; i < kBins; i += kThreads) shared.bins[i] = 0;
  if (thread == 0) shared.n_near = 0;
  __syncthreads();

  // All above `limit` are active, and the first `ties` of those at it.
  u32 limit = 0, ties = 0;
  const bool top = !c.every && c.k > 0 && c.k < c.ffn, all = c.every || c.k >= c.ffn;
  if (top) {
    // Most scores may be zero: those are not counted one by one.
    u32 n_some = 0;
    scores.for_each([&](u32 neuron, u32 bits) {
      if (neuron >= c.ffn || bits == 0) return;
      n_some++;
      atomicAdd(&shared.bins[bits >> 19], 1u);
    });
    const u32 some = count_over_warps(warp_total(n_some), shared.warps[1]).all;
    if (some < c.k) {
      ties = c.k - some;
    } else {
      u32 bin, left = c.k;
      find_bin(shared, left, bin, left);
      limit = bin << 19;
      // Those near the limit are few, as a rule: they are put together, so that two more rounds cost little.
      scores.for_each([&](u32 neuron, u32 bits) {
        if (neuron >= c.ffn || bits == 0 || bits >> 19 != limit >> 19) return;
        const u32 i = atomicAdd(&shared.n_near, 1u);
        if (i < kCandidates) shared.cold[i] = bits;
      });
      __syncthreads();
      const u32 n_near = shared.n_near;
      if (n_near <= kCandidates) {
        for (u32 i = thread; i < n_near; i += kThreads) atomicAdd(&shared.bins[shared.cold[i] >> 9 & 1023], 1u);
      } else {
        scores.for_each([&](u32 neuron, u32 bits) {
          if (neuron < c.ffn && bits != 0 && bits >> 19 == limit >> 19) atomicAdd(&shared.bins[bits >> 9 & 1023], 1u);
        });
      }
      __syncthreads();
      find_bin(shared, left, bin, left);
      limit |= bin << 9;
      if (n_near <= kCandidates) {
        for (u32 i = thread; i < n_near; i += kThreads)
          if (shared.cold[i] >> 9 == limit >> 9) atomicAdd(&shared.bins[shared.cold[i] & 511], 1u);
      } else {
        scores.for_each([&](u32 neuron, u32 bits) {
          if (neuron < c.ffn && bits != 0 && bits >> 9 == limit >> 9) atomicAdd(&shared.bins[bits & 511], 1u);
        });
      }
      __syncthreads();
      find_bin(shared, left, bin, left);
      limit |= bin;
      ties = left;
    }
  }
  // The least bits that are active without regard to ties.
  u32 least = top ? limit + 1 : 0;
  if (!top && !all && c.threshold >= 0.0f) least = c.threshold > 0.0f ? __float_as_uint(c.threshold) + 1 : 1;
  auto above = [&](u32 neuron, u32 bits) { return neuron < c.ffn && bits >= least; };
  auto at_limit = [&](u32 neuron, u32 bits) { return top && neuron < c.ffn && bits == limit; };
  u32 n_above = 0, n_ties = 0;
  scores.for_each([&](u32 neuron, u32 bits) {
    n_above += above(neuron, bits);
    n_ties += at_limit(neuron, bits);
  });
  n_above = warp_total(n_above);
  n_ties = warp_total(n_ties);
  const BlockCount tied = count_over_warps(n_ties, shared.warps[0]);
  auto taken = [&](u32 n) { return n < ties ? n : ties; };
  const u32 n_mine = n_above + taken(tied.before + n_ties) - taken(tied.before);
  const BlockCount active = count_over_warps(n_mine, shared.warps[1]);
  u32 at = active.before;
  const u32 lower_lanes = (1u << lane) - 1;
  auto write = [&](u32 neuron, bool mine) {
    const u32 takes = __ballot_sync(kAllLanes, mine);
    if (mine) c.ids[at + __popc(takes & lower_lanes)] = neuron;
    at += __popc(takes);
  };
  if (tied.all == ties) {
    // As a rule all scores at the limit are wanted: there is one.
    if (top) least = limit;
    scores.for_each([&](u32 neuron, u32 bits) { write(neuron, above(neuron, bits)); });
  } else {
    u32 tie = tied.before;
    scores.for_each([&](u32 neuron, u32 bits) {
      const u32 equals = __ballot_sync(kAllLanes, at_limit(neuron, bits));
      const bool wins = at_limit(neuron, bits) && tie + __popc(equals & lower_lanes) < ties;
      write(neuron, wins || above(neuron, bits));
      tie += __popc(equals);
    });
  }
  __syncthreads();

  // 2. What each of them is. The hot ones come first; a warp owns a range of the list.
  const u32 n_active = active.all, share = (n_active + kThreads - 1) / kThreads * kWarp, begin = warp * share + lane;
  const u32 n_rounds = share / kWarp;
  const float now = rounded_product(c.lambda, static_cast<float>(serial));
  enum Kind { kNothing, kHot, kCached, kMiss };
  auto kind_of = [&](u32 i, u32 cold, u32 slot) {
    if (i >= n_active) return kNothing;
    if (static_cast<int>(cold) < 0) return kHot;
    return slot == kNone ? kMiss : kCached;
  };
  const Active list(c, n_active, begin, n_rounds);
  u32 n_hot = 0, n_miss = 0, n_cached = 0;
  list.for_each([&](u32 i, u32 cold, u32 slot) {
    const Kind kind = kind_of(i, cold, slot);
    n_hot += __popc(__ballot_sync(kAllLanes, kind == kHot));
    n_miss += __popc(__ballot_sync(kAllLanes, kind == kMiss));
    n_cached += __popc(__ballot_sync(kAllLanes, kind == kCached));
  });
  const BlockCount misses = count_over_warps(n_miss, shared.warps[0]);
  const BlockCount hits = count_over_warps(n_cached, shared.warps[1]);
  const u32 all_hot = count_over_warps(n_hot, shared.warps[0]).all;
  const u32 n_cpu = min(misses.all, static_cast<u32>(fmaf(c.cpu_share, static_cast<float>(misses.all), 0.5f)));
  const u32 n_link = misses.all - n_cpu;

  u32 miss_at = misses.before, hit_at = hits.before;
  list.for_each([&](u32 i, u32 cold, u32 slot) {
    const Kind kind = kind_of(i, cold, slot);
    const u32 missed = __ballot_sync(kAllLanes, kind == kMiss), hit = __ballot_sync(kAllLanes, kind == kCached);
    float key = 0.0f;
    if (c.n_sets > 0 && (kind == kMiss || kind == kCached)) {
      key = now + log2_of_one_plus_power(c.key[cold] - now);
      c.key[cold] = key;
    }
    if (kind == kMiss) {
      const u32 m = miss_at + __popc(missed & lower_lanes);
      if (m >= n_link) {
        c.cpu_list[m - n_link] = cold;
      } else {
        c.items[m] = make_uint2(0x40000000u | cold, kNone);
        if (c.n_sets > 0 && m < kCandidates) {
          shared.cold[m] = cold;
          shared.key[m] = key;
          shared.set[m] = static_cast<u16>(cold % c.n_sets);
        }
      }
    } else if (kind == kCached) {
      c.items[n_link + hit_at + __popc(hit & lower_lanes)] = make_uint2(0x80000000u | slot, kNone);
      c.used[slot] = serial;
    } else if (kind == kHot) {
      c.items[n_link + hits.all + i] = make_uint2(cold + c.n_hot, kNone);
    }
    miss_at += __popc(missed);
    hit_at += __popc(hit);
  });
  if (n_cpu > 0) {
    for (u32 i = thread; i < c.hidden; i += kThreads) c.cpu_x[i] = c.x[i];
    if (thread == 0) *c.cpu_count = n_cpu;
  }
  // Candidates and the CPU's list are complete.
  __syncthreads();
  if (n_cpu > 0 && thread == 0) {
    // What the barrier made visible to this thread, the fence makes visible to the CPU before the flag.
    __threadfence_system();
    *const_cast<volatile u32*>(c.cpu_flag) = serial * c.n_layers + c.layer + 1;
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

  // 3. Slots for the candidates, ascending within a set. A lane has a way of the set.
  const u32 n_candidates = min(n_link, kCandidates);
  for (u32 set = warp; set < c.n_sets; set += kWarps) {
    const bool is_way = lane < c.n_ways;
    const u32 slot = set * c.n_ways + lane;
    u32 owner = kNone, used = 0;
    float key = 0.0f;
    bool loaded = false;
    for (u32 base = 0; base < n_candidates; base += kWarp) {
      u32 mine = __ballot_sync(kAllLanes, base + lane < n_candidates && shared.set[base + lane] == set);
      if (mine != 0 && !loaded && is_way) {
        owner = c.owner[slot];
        used = c.used[slot];
        if (owner != kNone) key = c.key[owner];
      }
      loaded = loaded || mine != 0;
      for (; mine != 0; mine &= mine - 1) {
        const u32 m = base + __ffs(mine) - 1;
        // An empty way, else the one of lowest key that this token does not use, if that is below the candidate's.
        const u32 empty = __ballot_sync(kAllLanes, is_way && owner == kNone);
        float lowest = is_way && used != serial ? key : __uint_as_float(0x7f800000u);
        u32 way = lane;
#pragma unroll
        for (int step = 1; step < kWarp; step *= 2) {
          const float other = __shfl_xor_sync(kAllLanes, lowest, step);
          const u32 its = __shfl_xor_sync(kAllLanes, way, step);
          if (other < lowest || (other == lowest && its < way)) {
            lowest = other;
            way = its;
          }
        }
        if (empty != 0) {
          way = __ffs(empty) - 1;
        } else if (!(lowest < shared.key[m])) {
          continue;
        }
        if (lane != way) continue;
        if (owner != kNone) c.slot_of[owner] = kNone;
        owner = shared.cold[m];
        key = shared.key[m];
        used = serial;
        c.owner[slot] = owner;
        c.used[slot] = serial;
        c.slot_of[owner] = slot;
        c.items[m].y = slot;
      }
    }
  }
}
