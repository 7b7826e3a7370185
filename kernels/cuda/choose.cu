// The active neurons of a layer, the cache of cold ones, and who computes what.
//
// One block of 1024 threads, once a layer, which the rest of the device waits for: an instruction for every score costs
// 0.1 us, and so does a barrier with the latency of what lies behind it. (A second block only tells the CPU that its
// input is there, another lists what the next layer will probably need: foresee.cuh.)
//
// 1. Top k. A sample of 4096 scores tells roughly where the k-th largest lies. From a little below that on, two
//    instructions for each score leave a list, in ascending order, of the active neurons and some more. The list gives
//    all threads as many neurons, however the active ones cluster. One count of it into bins finds the few among which
//    the k-th largest is, and these are compared one by one. If the guess was wrong, too many scores are equal, or the
//    list would be too long, three counts of all scores find the k-th largest instead.
// 2. The list is looked up in the cache, and among what was fetched for this layer, while 1. goes on. The active neurons
//    are divided into misses, fetched ones, hits and hot ones; the last misses may go to the CPU, which starts at once.
// 3. Misses that are read over the link, and fetched ones, compete for the slots of their sets. Those of a set are chained as they are
//    found; a warp sorts the chain, and a lane has a way of the set. A neuron's key is recency and frequency in one
//    number (LRFU, Lee et al. 2001): the logarithm of the sum of 2^(lambda * t) over the tokens t that used it. It
//    never ages: only what is used grows. As an f32 it tells apart times that differ by now / 2^24 tokens: a sixteenth
//    of a token after a million of them.
//
// choose_rows is the same where rows of a neuron are read or not, each alone: scores are sums of 1 for gate, 2 for up, 4 for
// down (sketch.cu). All neurons that have one are active; there is no cache, and nothing is fetched beforehand. Rows that are
// read, and not neurons, are divided between link and CPU, which gets no neuron whose down row is not.
#include "foresee.cuh"

struct Choose {
  // Neurons here, their scores and their numbers are those behind the `n_always` first, which are active and hot at every token;
  // but for `ids` and `items`, which have all.
  const float* scores;     // [ffn] and room up to a multiple of four, not read if `every` is 1
  float* sketched;         // [ffn], or null: becomes 0 of active ones, with rows of those whose down row is read
  const float2* products;  // [ffn]: gate and up as a sketch has them, with rows
  u32 ffn, k, n_hot, every;
  float threshold;  // if k and every are 0
  u32 n_sets, n_ways, n_always;
  u32* slot_of;  // [ffn - n_hot]
  u32* owner;    // [n_sets * n_ways]; slot = set * n_ways + way, set = cold index % n_sets
  float* key;    // [ffn - n_hot]
  u32* used;     // [n_sets * n_ways]
  float lambda;
  const u32* step;  // token, position, serial, the CPU's share of the misses as an f32
  u32 layer, n_layers;
  u32* cpu_list;  // [ffn - n_hot]: cold numbers, and from bit 29 on the rows to read; like all of the CPU's in mapped host
                  // memory, or null; its input is there already
  float2* cpu_known;  // [ffn - n_hot]: `products` of each, with rows
  u32* cpu_count;
  u32* cpu_flag;  // and, 32 words on, one for the input
  u32* ids;     // [ffn]
  uint2* items;  // [ffn]: where it lies; the slot to fill, or the rows to read above zeros (rows_of_item)
  u32* counts;  // [8]: items, link, cached, hot, cpu, active, fetched, 0
  u64* totals;  // [8]: rows, not neurons, for link and hot; with rows, not cached ones but those chosen whose down row is read; the
                // last is fetch.cu's
  const uint2* foreseen;  // of this layer, see foresee.cuh; null if nothing was
  Foresee ahead;  // of the next layer; its scores are null if nothing is wanted
};

namespace choose_shape {
using namespace score_shape;
// Neurons of the list that a thread keeps in registers; a list that is only a guess is not longer.
constexpr u32 kKept = 4;
constexpr u32 kListed = kKept * kThreads;
// Misses that compete for slots at one token, the first ones; those after them are read and not kept.
constexpr u32 kCandidates = 2048;
// Sets that a warp loads at a time.
constexpr u32 kSets = 4;
constexpr u32 kFetched = 0x40000000u;
// Rows of the CPU's neurons, above their numbers.
constexpr u32 kMaskShift = 29;
}  // namespace choose_shape

struct ChooseShared : ScoreShared {
  union {
    // A list that is a guess.
    u32 listed[choose_shape::kListed];
    struct {
      u32 cold[choose_shape::kCandidates];
      float key[choose_shape::kCandidates];
      u16 next[choose_shape::kCandidates];
    } candidates;
  };
  uint4 kinds[choose_shape::kWarps];
  // With rows: neurons that the CPU may get, rows to read of misses, of these neurons, of hot ones.
  uint4 rows[choose_shape::kWarps];
  u32 cpu_rows;
  uint2 near[kWarp];
  u32 n_near, cutoff;
};

// Floats in their order as whole numbers, above zero.
DEVICE u32 in_order(float v) {
  const u32 bits = __float_as_uint(v);
  return bits ^ (static_cast<int>(bits) < 0 ? 0xffffffffu : 0x80000000u);
}

// A neuron of the list, or none, and what the cache has about it. What was fetched for this layer has its place with
// kFetched instead of a slot. With rows the key is the score.
struct Listed {
  u32 neuron, slot;
  float key;
  DEVICE bool is_fetched() const { return slot != kNone && slot >= choose_shape::kFetched; }
  DEVICE bool is_cached() const { return slot < choose_shape::kFetched; }
};

// The list of a thread: one of every 32 neurons of its warp's share.
template <bool kRows>
struct List {
  const Choose& c;
  const ChooseShared& shared;
  bool all;  // numbers are places
  u32 n, begin, n_rounds;
  Listed kept[choose_shape::kKept];

  DEVICE List(const Choose& choose, const ChooseShared& shared, bool all) : c(choose), shared(shared), all(all) {}

  DEVICE u32 number(u32 round) const {
    const u32 i = begin + round * kWarp;
    if (round >= n_rounds || i >= n) return kNone;
    return all ? i : c.ids[c.n_always + i];
  }
  DEVICE Listed look_up(u32 neuron) const {
    Listed it = {neuron, kNone, 0.0f};
    if constexpr (kRows) {
      if (neuron != kNone) it.key = c.scores[neuron];
      return it;
    }
    if (neuron == kNone || neuron < c.n_hot) return it;
    if (c.n_sets > 0) {
      it.slot = c.slot_of[neuron - c.n_hot];
      it.key = c.key[neuron - c.n_hot];
    }
    if (c.foreseen != nullptr) {
      const u32 place = foreseen_place(c.foreseen, neuron);
      if (it.slot == kNone && place != kNone) it.slot = choose_shape::kFetched | place;
    }
    return it;
  }

  // Gives each thread its neurons.
  DEVICE void divide(u32 length, bool is_guess) {
    using namespace choose_shape;
    n = length;
    n_rounds = (n + kThreads - 1) / kThreads;
    begin = warp_id() * n_rounds * kWarp + lane_id();
#pragma unroll
    for (u32 round = 0; round < kKept; round++) {
      const u32 i = begin + round * kWarp;
      kept[round].neuron = !is_guess ? number(round) : round < n_rounds && i < n ? shared.listed[i] : kNone;
    }
  }
  DEVICE void look_up_all() {
#pragma unroll
    for (u32 round = 0; round < choose_shape::kKept; round++) kept[round] = look_up(kept[round].neuron);
  }

  // Calls `f` for each, and for some that are none, all lanes together.
  template <class F>
  DEVICE void for_each(F f) const {
    using namespace choose_shape;
#pragma unroll
    for (u32 round = 0; round < kKept; round++)
      if (round < n_rounds) f(kept[round]);
    for (u32 round = kKept; round < n_rounds; round++) f(look_up(number(round)));
  }
};

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

template <bool kRows>
DEVICE void choose_neurons(const Choose& c) {
  using namespace choose_shape;
  __shared__ ChooseShared shared;
  let_next_start();
  wait_for_previous();
  const u32 thread = threadIdx.x, lane = lane_id(), warp = warp_id();
  if (blockIdx.x > 0) {
    // The last block, if there is something to foresee.
    if (c.ahead.scores != nullptr && blockIdx.x == gridDim.x - 1) {
      foresee(c.ahead, shared, c.ffn, min(c.step[4], c.ahead.n_places));
      return;
    }
    // At once: the CPU's threads take it apart while their neurons are chosen.
    if (thread > 0) return;
    raise_flag(c.cpu_flag + 32, flag_value(c.step[2], c.layer, c.n_layers));
    return;
  }
  const bool every = c.every || c.k >= c.ffn || (c.k == 0 && !(c.threshold >= 0.0f));

  // 1. The active ones.
  const Scores scores(c.scores, c.ffn);
  float4 sample = make_float4(0.0f, 0.0f, 0.0f, 0.0f), fours[kGroups];
  const u32 each = scores.each();
  if (!every && c.k > 0 && c.k < kListed) sample = scores.sample();
  const u32 serial = c.step[2];
  const float cpu_share = c.cpu_list != nullptr ? __uint_as_float(c.step[3]) : 0.0f;
  // How many of the top k the sample has is uncertain by the root of that number. The guess allows for three times as
  // much, and is not tried if the list might have no room for half as much again.
  const float share = static_cast<float>(c.k) * reciprocal(static_cast<float>(each));
  const float margin = 3.0f * share * rsqrtf(share) + 8.0f;
  const bool guess =
      !kRows && !every && c.k > 0 && c.k < kListed && (share + 1.5f * margin) * static_cast<float>(each) < kListed;
  reinterpret_cast<uint2*>(shared.bins)[thread] = make_uint2(0, 0);
  if (thread == 0) shared.n_near = shared.cpu_rows = 0;
  __syncthreads();
  // One multiprocessor needs a microsecond for all scores. They are asked for behind the sample, which the barrier
  // keeps before them, and are on their way while that is counted.
  if (guess) {
#pragma unroll
    for (u32 group = 0; group < kGroups; group++)
      if (group < scores.n_groups) fours[group] = scores.four(scores.first_of_four(0, group));
  }

  BlockSums sums = {shared, 0};
  unsigned char* nibbles = shared.nibbles[warp];
  List<kRows> list(c, shared, every);
  // Appends the neurons of all threads' words to the list of `n`: to what will be the ids, or to a guess.
  auto append = [&](u32 word, u32 first, u32& n, bool is_guess) {
    u32 before, all;
    sums(__popc(word), before, all);
    for (u32 at = n + before; word != 0; word &= word - 1, at++) {
      const u32 neuron = first + __ffs(word) - 1;
      if (!is_guess) {
        c.ids[c.n_always + at] = neuron;
      } else if (at < kListed) {
        shared.listed[at] = neuron;
      }
    }
    n += all;
  };
  // Not a number, like anything that is not positive, counts as zero.
  auto at_least = [&](u32 tile, u32 bits) {
    if (bits == 0) return scores.existing(tile);
    return scores.at_least(tile, __uint_as_float(bits), nibbles,
                           [&](u32 group) { return scores.four(scores.first_of_four(tile, group)); });
  };

  // False if it does not come out.
  auto list_by_guess = [&] {
    count_sample(shared, sample);
    __syncthreads();
    Bin ends[2];
    const u32 ranks[2] = {static_cast<u32>(share + margin), static_cast<u32>(fmaxf(share - margin, 1.0f))};
    sums.find_bins(ranks, ends);
    // The k-th largest is at least `low`, and below `high`.
    const u32 low = least_of_bin(ends[0].number);
    const u32 high = ends[1].number >= kBins - 1 ? kInfinity : (ends[1].number + kFirstBin + 1) << kSampleShift;

    u32 n = 0;
    append(scores.at_least(0, __uint_as_float(low), nibbles, [&](u32 group) { return fours[group]; }),
           scores.first(0), n, true);
    for (u32 tile = 1; tile < scores.n_tiles; tile++) append(at_least(tile, low), scores.first(tile), n, true);
    if (n < c.k || n > kListed) return false;
    __syncthreads();
    list.divide(n, true);
    u32 values[kKept], bins[kKept];
#pragma unroll
    for (u32 i = 0; i < kKept; i++)
      values[i] = list.kept[i].neuron != kNone ? __float_as_uint(c.scores[list.kept[i].neuron]) : 0;
    // Bins for what lies between them; what is higher goes to the last.
    const u32 shift = max(0, 32 - __clz(static_cast<int>((high - low) / kBins)));
#pragma unroll
    for (u32 i = 0; i < kKept; i++) {
      bins[i] = values[i] != 0 ? min((values[i] - low) >> shift, kBins - 1) : kBins;
      if (values[i] != 0) atomicAdd(&shared.bins[bins[i]], 1u);
    }
    __syncthreads();
    // The barrier keeps these loads behind those of the scores.
    list.look_up_all();
    Bin last[1];
    const u32 rank[1] = {c.k};
    sums.find_bins(rank, last);
    if (last[0].count > kWarp) return false;
#pragma unroll
    for (u32 i = 0; i < kKept; i++)
      if (bins[i] == last[0].number)
        shared.near[atomicAdd(&shared.n_near, 1u)] = make_uint2(values[i], list.kept[i].neuron);
    __syncthreads();
    // Every warp puts those of the last bin into order, by score and then by number, and finds the last one wanted.
    const uint2 mine = lane < last[0].count ? shared.near[lane] : make_uint2(0, kNone);
    auto precedes = [](uint2 a, uint2 b) { return a.x > b.x || (a.x == b.x && a.y <= b.y); };
    u32 place = 0;
    for (u32 i = 0; i < last[0].count; i++) place += precedes(shared.near[i], mine);
    const int lane_of_last = __ffs(__ballot_sync(kAllLanes, lane < last[0].count && place == last[0].wanted)) - 1;
    const uint2 end = make_uint2(__shfl_sync(kAllLanes, mine.x, lane_of_last),
                                 __shfl_sync(kAllLanes, mine.y, lane_of_last));
#pragma unroll
    for (u32 i = 0; i < kKept; i++)
      if (!precedes(make_uint2(values[i], list.kept[i].neuron), end)) list.kept[i] = {kNone, kNone, 0.0f};
    return true;
  };

  // Active are the neurons above `limit`, and those at it up to number `cutoff`.
  auto list_by_counting = [&] {
    u32 limit = 0, cutoff = kNone, n = c.ffn;
    if (c.k == 0) {
      limit = c.threshold > 0.0f ? __float_as_uint(c.threshold) + 1 : 1;
    } else if (!every) {
      Bin last[1] = {{0, c.k, 0}};
      for (int shift = 20; shift >= 0; shift -= 10) {
        const int width = shift == 20 ? 11 : 10;
        for (u32 tile = 0; tile < scores.n_tiles; tile++) {
#pragma unroll 2
          for (u32 group = 0; group < scores.n_groups; group++) {
            const u32 first = scores.first_of_four(tile, group);
            const float4 four = scores.four(first);
            const float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
              const u32 upper = __float_as_uint(values[i]) >> shift;
              if (first + i < c.ffn && values[i] > 0.0f && upper >> width == limit)
                atomicAdd(&shared.bins[upper & ((1u << width) - 1)], 1u);
            }
          }
        }
        __syncthreads();
        const u32 rank[1] = {last[0].wanted};
        const u32 n_some = sums.find_bins(rank, last);
        if (last[0].number == kNone) {
          // Too few are positive: the first of the zeros are active, too.
          last[0] = {0, c.k - n_some, kNone};
          break;
        }
        limit = limit << width | last[0].number;
      }
      if (last[0].count != last[0].wanted) {
        u32 n_ties = 0;
        for (u32 tile = 0; tile < scores.n_tiles; tile++) {
          u32 ties = at_least(tile, limit), before, all;
          ties &= ~at_least(tile, limit + 1);
          sums(__popc(ties), before, all);
          const u32 left = last[0].wanted - (n_ties + before);
          if (n_ties + before < last[0].wanted && left <= __popc(ties)) {
            for (u32 i = 1; i < left; i++) ties &= ties - 1;
            shared.cutoff = scores.first(tile) + __ffs(ties) - 1;
          }
          n_ties += all;
        }
        __syncthreads();
        cutoff = shared.cutoff;
      }
    }
    if (!every) {
      n = 0;
      for (u32 tile = 0; tile < scores.n_tiles; tile++) {
        const u32 first = scores.first(tile);
        u32 word = at_least(tile, limit);
        if (cutoff != kNone) {
          if (cutoff < first) word = 0;
          if (cutoff - first < 31) word &= (2u << (cutoff - first)) - 1;
          word |= at_least(tile, limit + 1);
        }
        append(word, first, n, false);
      }
      __syncthreads();
    }
    list.divide(n, false);
    list.look_up_all();
  };
  if (!guess || !list_by_guess()) list_by_counting();

  // 2. What each of them is.
  auto mask_of = [](const Listed& it) { return kRows ? static_cast<u32>(it.key) : 7u; };
  // Whether the CPU may get it, if it is a miss.
  auto is_eligible = [&](const Listed& it) {
    return it.neuron != kNone && it.neuron >= c.n_hot && (mask_of(it) & 4) != 0;
  };
  u32 n_active = 0, n_hot = 0, n_cached = 0, n_fetched = 0;
  uint4 rows = make_uint4(0, 0, 0, 0);
  list.for_each([&](const Listed& it) {
    n_active += __popc(__ballot_sync(kAllLanes, it.neuron != kNone));
    n_hot += __popc(__ballot_sync(kAllLanes, it.neuron < c.n_hot));
    n_cached += __popc(__ballot_sync(kAllLanes, it.is_cached()));
    n_fetched += __popc(__ballot_sync(kAllLanes, it.is_fetched()));
    if constexpr (kRows) {
      // In place of cached ones: those whose down row is read.
      n_cached += __popc(__ballot_sync(kAllLanes, (mask_of(it) & 4) != 0));
      const u32 n_rows = __popc(mask_of(it));
      rows.x += is_eligible(it) ? 1 : 0;
      rows.y += it.neuron < c.n_hot ? 0 : n_rows;
      rows.z += is_eligible(it) ? n_rows : 0;
      rows.w += it.neuron < c.n_hot ? n_rows : 0;
    }
  });
  if (lane == 0) shared.kinds[warp] = make_uint4(n_active, n_hot, n_cached, n_fetched);
  if constexpr (kRows) {
    rows = make_uint4(__reduce_add_sync(kAllLanes, rows.x), __reduce_add_sync(kAllLanes, rows.y),
                      __reduce_add_sync(kAllLanes, rows.z), __reduce_add_sync(kAllLanes, rows.w));
    if (lane == 0) shared.rows[warp] = rows;
  }
  __syncthreads();
  const uint4 kinds = shared.kinds[lane];
  auto before = [&](u32 n) { return __reduce_add_sync(kAllLanes, lane < warp ? n : 0); };
  auto all = [&](u32 n) { return __reduce_add_sync(kAllLanes, n); };
  u32 at = before(kinds.x), hit_at = before(kinds.z), fetched_at = before(kinds.w);
  const u32 chosen_hot = all(kinds.y), with_down = all(kinds.z), hits = kRows ? 0 : with_down, all_fetched = all(kinds.w);
  const u32 all_active = c.n_always + all(kinds.x), all_hot = c.n_always + chosen_hot;
  const u32 misses = all_active - all_hot - hits - all_fetched;
  // Misses that the CPU may get; with rows, how many before this warp, and the rows to read.
  u32 n_eligible = misses, eligible_at = 0, miss_rows = 0, hot_rows = 0;
  float wanted = static_cast<float>(misses);
  if constexpr (kRows) {
    rows = shared.rows[lane];
    n_eligible = all(rows.x), eligible_at = before(rows.x), miss_rows = all(rows.y), hot_rows = all(rows.w);
    const u32 eligible_rows = all(rows.z);
    // So many have as many rows as all misses.
    const float product = static_cast<float>(miss_rows) * static_cast<float>(n_eligible);
    wanted = n_eligible > 0 ? product / static_cast<float>(eligible_rows) : 0.0f;
  }
  const u32 n_cpu = min(n_eligible, static_cast<u32>(fmaf(cpu_share, wanted, 0.5f)));
  const u32 n_link = misses - n_cpu, first_hit = n_link + all_fetched;
  const u32 n_candidates = c.n_sets > 0 ? min(first_hit, kCandidates) : 0;

  const u32 lower_lanes = (1u << lane) - 1;
  const float now = rounded_product(c.lambda, static_cast<float>(serial));
  // Chains candidate `m` to the others of its set, if that is among the 2048 sets from `first` on.
  auto chain = [&](u32 m, u32 cold, u32 first) {
    const u32 set = cold % c.n_sets - first;
    if (set < kBins) shared.candidates.next[m] = static_cast<u16>(atomicExch(&shared.bins[set], m + 1));
  };
  // Rows of this lane's that the CPU gets.
  u32 cpu_rows = 0;
  list.for_each([&](const Listed& it) {
    const u32 active = __ballot_sync(kAllLanes, it.neuron != kNone);
    const u32 hit = __ballot_sync(kAllLanes, it.is_cached()), fetched = __ballot_sync(kAllLanes, it.is_fetched());
    const u32 place = at + __popc(active & lower_lanes), n_hits = hit_at + __popc(hit & lower_lanes);
    const u32 n_fetched = fetched_at + __popc(fetched & lower_lanes);
    at += __popc(active);
    hit_at += __popc(hit);
    fetched_at += __popc(fetched);
    // With rows: misses before this one that the CPU gets, and that it may get.
    u32 n_eligible_before = 0, n_given = 0;
    if constexpr (kRows) {
      const u32 eligible = __ballot_sync(kAllLanes, is_eligible(it));
      n_eligible_before = eligible_at + __popc(eligible & lower_lanes);
      eligible_at += __popc(eligible);
      n_given = n_eligible_before - min(n_eligible_before, n_eligible - n_cpu);
    }
    if (it.neuron == kNone) return;
    const u32 mask = mask_of(it), to = kRows ? kFillsNone | mask : kNone;
    if (c.sketched != nullptr && (mask & 4) != 0) c.sketched[it.neuron] = 0.0f;
    c.ids[c.n_always + place] = c.n_always + it.neuron;
    if (it.neuron < c.n_hot) {
      c.items[first_hit + hits + c.n_always + place] = make_uint2(c.n_always + it.neuron, to);
      return;
    }
    const u32 cold = it.neuron - c.n_hot;
    if constexpr (kRows) {
      if (is_eligible(it) && n_eligible_before >= n_eligible - n_cpu) {
        c.cpu_list[n_given] = cold | mask << kMaskShift;
        c.cpu_known[n_given] = c.products[it.neuron];
        cpu_rows += __popc(mask);
      } else {
        c.items[place - chosen_hot - n_given] = make_uint2(0x40000000u | cold, to);
      }
      return;
    }
    float key = 0.0f;
    if (c.n_sets > 0) {
      key = now + log2_of_one_plus_power(it.key - now);
      c.key[cold] = key;
    }
    if (it.is_cached()) {
      c.items[first_hit + n_hits] = make_uint2(0x80000000u | it.slot, kNone);
      c.used[it.slot] = serial;
      return;
    }
    // The hot ones come first among the active.
    u32 m = place - chosen_hot - n_hits - n_fetched, from = 0x40000000u | cold;
    if (it.is_fetched()) {
      m = n_link + n_fetched;
      from = 0x80000000u | it.slot;
    } else if (m >= n_link) {
      c.cpu_list[m - n_link] = cold | mask << kMaskShift;
      return;
    }
    c.items[m] = make_uint2(from, kNone);
    if (m < n_candidates) {
      shared.candidates.cold[m] = cold;
      shared.candidates.key[m] = key;
      chain(m, cold, 0);
    }
  });
  for (u32 i = thread; i < c.n_always; i += kThreads) {
    c.ids[i] = i;
    c.items[first_hit + hits + i] = make_uint2(i, kNone);
  }
  if constexpr (kRows) {
    cpu_rows = __reduce_add_sync(kAllLanes, cpu_rows);
    if (lane == 0) atomicAdd(&shared.cpu_rows, cpu_rows);
  }
  if (n_cpu > 0 && thread == 0) *c.cpu_count = n_cpu;
  // Candidates and the CPU's list are complete.
  __syncthreads();
  // By the last warp, which has the fewest sets.
  if (n_cpu > 0 && thread == kThreads - 1) {
    // Behind what the barrier made visible to this thread, and what the kernels before this one wrote, predict_scores the
    // CPU's input among it.
    raise_flag(c.cpu_flag, flag_value(serial, c.layer, c.n_layers));
  }
  if (thread < 8) {
    const u32 n_items = first_hit + hits + all_hot;
    const u32 values[8] = {n_items, n_link, hits, all_hot, n_cpu, all_active, all_fetched, 0};
    u32 value = 0;
#pragma unroll
    for (u32 i = 0; i < 8; i++)
      if (i == thread) value = values[i];
    c.counts[thread] = value;
    if (thread == 1) value = kRows ? miss_rows - shared.cpu_rows : 3 * value;
    if (thread == 2) value = with_down;
    if (thread == 3) value = kRows ? 3 * c.n_always + hot_rows : 3 * value;
    if (value > 0) atomicAdd(&c.totals[thread], static_cast<u64>(value));
  }
  if (kRows || n_candidates == 0) return;

  // 3. Slots for the candidates, ascending within a set. A lane has a way of the set.
  const bool is_way = lane < c.n_ways;
  // Gives candidate `m` a slot of the set from `first_slot` on, or none.
  // `weakness`: 0 of an empty way, kNone of one that this token uses, else in the order of the keys.
  auto admit = [&](u32 m, u32 first_slot, u32& owner, u32& weakness) {
    const u32 weakest = __reduce_min_sync(kAllLanes, weakness), ways = __ballot_sync(kAllLanes, weakness == weakest);
    if (weakest >= in_order(shared.candidates.key[m]) || lane != __ffs(ways) - 1) return;
    const u32 slot = first_slot + lane;
    if (owner != kNone) c.slot_of[owner] = kNone;
    owner = shared.candidates.cold[m];
    weakness = kNone;
    c.owner[slot] = owner;
    c.used[slot] = serial;
    c.slot_of[owner] = slot;
    c.items[m].y = slot;
  };
  struct Sets {
    u32 heads[kSets], owners[kSets], used[kSets];
  };
  for (u32 first = 0;;) {
    const u32 n_sets = min(c.n_sets - first, kBins);
    auto fetch = [&](u32 from) {
      Sets sets;
#pragma unroll
      for (u32 i = 0; i < kSets; i++) {
        const u32 set = from + i * kWarps, slot = (first + set) * c.n_ways + lane;
        sets.heads[i] = set < n_sets ? shared.bins[set] : 0;
        const bool loads = sets.heads[i] != 0 && is_way;
        sets.owners[i] = loads ? c.owner[slot] : kNone;
        sets.used[i] = loads ? c.used[slot] : serial;
      }
      return sets;
    };
    Sets next = fetch(warp);
    for (u32 from = warp; from < n_sets; from += kSets * kWarps) {
      Sets sets = next;
      u32 weakness[kSets];
      float keys[kSets];
#pragma unroll
      for (u32 i = 0; i < kSets; i++) keys[i] = sets.owners[i] != kNone ? c.key[sets.owners[i]] : 0.0f;
      next = fetch(from + kSets * kWarps);
#pragma unroll
      for (u32 i = 0; i < kSets; i++) {
        const bool is_empty = sets.heads[i] != 0 && is_way && sets.owners[i] == kNone;
        weakness[i] = is_empty ? 0 : sets.used[i] == serial ? kNone : in_order(keys[i]);
      }
#pragma unroll
      for (u32 i = 0; i < kSets; i++) {
        if (sets.heads[i] == 0) continue;
        const u32 set = from + i * kWarps;
        u32 mine = kNone, length = 0;
        for (u32 head = sets.heads[i]; head != 0; head = shared.candidates.next[head - 1], length++)
          if (length == lane) mine = head - 1;
        // More than there are lanes are looked for among all candidates.
        const u32 n_parts = length <= kWarp ? 1 : (n_candidates + kWarp - 1) / kWarp;
        for (u32 part = 0; part < n_parts; part++) {
          if (length > kWarp) {
            const u32 m = part * kWarp + lane;
            const bool is_one = m < n_candidates && shared.candidates.cold[m] % c.n_sets == first + set;
            mine = is_one ? m : kNone;
          }
          for (u32 m; (m = __reduce_min_sync(kAllLanes, mine)) != kNone;) {
            if (mine == m) mine = kNone;
            admit(m, (first + set) * c.n_ways, sets.owners[i], weakness[i]);
          }
        }
      }
    }
    first += kBins;
    if (first >= c.n_sets) break;
    __syncthreads();
    reinterpret_cast<uint2*>(shared.bins)[thread] = make_uint2(0, 0);
    __syncthreads();
    for (u32 m = thread; m < n_candidates; m += kThreads) chain(m, shared.candidates.cold[m], first);
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(1024, 1) choose(Choose c) { choose_neurons<false>(c); }
extern "C" __global__ void __launch_bounds__(1024, 1) choose_rows(Choose c) { choose_neurons<true>(c); }
