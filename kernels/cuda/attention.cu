// Grouped-query attention from one position over the cache. Blocks have shares of the positions; the last of a group of
// heads to end adds up what all have written, in the order of the shares.
//
// Below some thousand positions a token waits for latency here, not for bytes:
// - Everything but q, k and v of the new position is asked for before the kernel that computes them has ended.
// - A share is taken in tiles. Scores: a warp has some positions, a lane some dimensions of all heads. Weights: a warp
//   has a head, a lane some positions. Outputs: a warp has some dimensions, a lane one pair of them and some positions,
//   so that all that is left to add up lies within a warp. Between these, scores and weights are in shared memory.
#include "reduce.cuh"

namespace attention_shape {
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kMaxHeads = 16;
constexpr int kMaxPairs = 128;
// Heads times dimensions that one pass can hold: 8 * 256 or 16 * 128.
constexpr int kMaxOutputs = 2048;
// Positions of a tile times heads.
constexpr int kMaxTileHeads = 512;
constexpr int kMaxSplits = kMaxOutputs / kMaxHeads;
// Positions that a share has at least: fewer take as long.
constexpr int kLeastShare = 32;
// Far below any score, and finite: the difference of two is a number.
constexpr float kLowest = -1e30f;
}  // namespace attention_shape

struct AttendArgs {
  const float* qkv;
  const u32* step;
  u16* keys;
  u16* values;
  const float* cos;
  const float* sin;
  int n_heads, n_kv_heads, head_dim, capacity;
  float* partial;
  u32* arrived;
  float* out;
};

struct AttendShared {
  float cos[attention_shape::kMaxPairs], sin[attention_shape::kMaxPairs];
  // Turned and scaled queries [heads, head_dim]; at the end what each share counts, [shares, heads].
  float queries[attention_shape::kMaxOutputs];
  // [heads, tile and a little], [tile, heads].
  float scores[attention_shape::kMaxTileHeads + 64];
  float4 weights[attention_shape::kMaxTileHeads / 4];
  float fade[attention_shape::kMaxHeads];
  // The new position's key and value, rounded as in the cache.
  u32 newest[2][attention_shape::kMaxPairs];
  int guess;
  bool is_last;
};

DEVICE float2 halves(u32 two) {
  return make_float2(half_to_float(static_cast<u16>(two)), half_to_float(static_cast<u16>(two >> 16)));
}

// Adds up N values over the lanes that differ in the bits from kStep down to kLast, as warp_sum_each. `take` gets the
// values that are this lane's, how many, and the number of the first. (Not as an array: NVRTC takes no generic lambda.)
template <int kStep, int kLast, int N, class Take>
DEVICE void sum_over_lanes(float (&v)[N], int at, const Take& take) {
  if constexpr (kStep < kLast) {
    take(v, N, at);
  } else if constexpr (N == 1) {
    v[0] += __shfl_xor_sync(kAllLanes, v[0], kStep);
    sum_over_lanes<kStep / 2, kLast>(v, at, take);
  } else {
    float kept[N / 2];
    keep_half<kStep>(v, kept);
    sum_over_lanes<kStep / 2, kLast>(kept, lane_id() & kStep ? at + N / 2 : at, take);
  }
}

// The heads of this block: up to H of one group, which is the key and value head's.
struct Heads {
  int kv_head, first, n;

  DEVICE Heads(const AttendArgs& args, int at_once) {
    const int group = args.n_heads / args.n_kv_heads, n_parts = ceil_div(group, at_once), part = blockIdx.x % n_parts;
    kv_head = blockIdx.x / n_parts;
    first = kv_head * group + part * at_once;
    n = min(at_once, group - part * at_once);
  }
};

// What the blocks have left: outputs [n_splits, n_heads, head_dim] not yet divided by the sum of the weights, then
// [n_splits, n_heads] pairs of the largest score and that sum.
DEVICE float* partial_outputs(const AttendArgs& args, int split, int head) {
  return args.partial + static_cast<u32>((split * args.n_heads + head) * args.head_dim);
}
DEVICE float2* partial_stats(const AttendArgs& args, int split, int head) {
  return reinterpret_cast<float2*>(partial_outputs(args, gridDim.y, 0)) + (split * args.n_heads + head);
}

// Adds up the first `n_parts` shares of these heads.
template <int H, int J, bool kWhole>
DEVICE void combine_shares(const AttendArgs& args, AttendShared& shared, const Heads& heads, int n_parts) {
  using namespace attention_shape;
  // As a rule all that a thread needs is on its way at once.
  constexpr int kItems = H * 32 * J < kThreads ? 1 : H * 32 * J / kThreads, kAtOnce = kItems < 4 ? 16 : 8;
  const int pairs = kWhole ? kWarp * J : args.head_dim / 2, n_items = heads.n * pairs;
  float2 parts[kItems][kAtOnce], sums[kItems];
  auto fetch = [&](int first) {
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      // Past the first-level cache, which need not know what other multiprocessors have written.
      const float2* row = reinterpret_cast<const float2*>(partial_outputs(args, first + i, heads.first));
#pragma unroll
      for (int k = 0; k < kItems; k++) {
        const int item = threadIdx.x + k * kThreads;
        parts[k][i] = first + i < n_parts && item < n_items ? __ldcg(row + item) : make_float2(0.0f, 0.0f);
      }
    }
  };
  fetch(0);
  float* factors = shared.queries;
  for (int h = warp_id(); h < heads.n; h += kWarps) {
    constexpr int kOfLane = kMaxSplits / kWarp;
    float2 stats[kOfLane];
    float most = kLowest, weights = 0.0f;
#pragma unroll
    for (int i = 0; i < kOfLane; i++) {
      const int split = lane_id() + i * kWarp;
      stats[i] = make_float2(kLowest, 0.0f);
      if (split < n_parts) stats[i] = __ldcg(partial_stats(args, split, heads.first + h));
    }
#pragma unroll
    for (int i = 0; i < kOfLane; i++) most = fmaxf(most, stats[i].x);
    most = warp_max(most);
#pragma unroll
    for (int i = 0; i < kOfLane; i++) {
      stats[i].x = expf(stats[i].x - most);
      weights += stats[i].x * stats[i].y;
    }
    weights = warp_sum(weights);
#pragma unroll
    for (int i = 0; i < kOfLane; i++)
      if (lane_id() + i * kWarp < n_parts) factors[(lane_id() + i * kWarp) * H + h] = stats[i].x / weights;
  }
  __syncthreads();
  int head_of[kItems];
#pragma unroll
  for (int k = 0; k < kItems; k++) {
    head_of[k] = min(static_cast<int>(threadIdx.x + k * kThreads) / pairs, heads.n - 1);
    sums[k] = make_float2(0.0f, 0.0f);
  }
  for (int first = 0; first < n_parts; first += kAtOnce) {
    if (first > 0) fetch(first);
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      if (first + i >= n_parts) break;
#pragma unroll
      for (int k = 0; k < kItems; k++) {
        const float factor = factors[(first + i) * H + head_of[k]];
        sums[k].x += factor * parts[k][i].x;
        sums[k].y += factor * parts[k][i].y;
      }
    }
  }
  float2* out = reinterpret_cast<float2*>(args.out) + heads.first * pairs;
#pragma unroll
  for (int k = 0; k < kItems; k++)
    if (static_cast<int>(threadIdx.x) + k * kThreads < n_items) out[threadIdx.x + k * kThreads] = sums[k];
}

// This block's share of the positions for its heads, at most H; head_dim is at most 64 J, or just that.
template <int H, int J, bool kWhole>
DEVICE void attend_share(const AttendArgs& args, AttendShared& shared) {
  using namespace attention_shape;
  constexpr int kTile = J == 4 || H == 16 ? 32 : 64;
  // Scores: a warp takes P positions at a time for all H heads and gets one score for each lane, or for kShare lanes.
  constexpr int kWide = J == 4 ? 4 : 8;
  constexpr int P = kWide < 32 / H ? kWide : 32 / H;
  constexpr int kTurns = kTile / (kWarps * P), kScores = H * P, kShare = kWarp / kScores, kScoreStride = kTile + P;
  // Weights: heads of a warp.
  constexpr int kOwn = (H + kWarps - 1) / kWarps;
  // Outputs: pairs of dimensions of a warp, lanes with the same pair, positions of each.
  constexpr int kSlice = kWarp * J / kWarps, kSets = kWarp / kSlice, kRows = kTile / kSets;
  // Pairs of a thread of q, and in the end k and v.
  constexpr int kRaw = ((H + 2) * kWarp * J + kThreads - 1) / kThreads;
  static_assert(H * kTile <= kMaxTileHeads && H * kScoreStride <= kMaxTileHeads + 64, "scores");

  const Heads heads(args, H);
  const int split = blockIdx.y, pairs = kWhole ? kWarp * J : args.head_dim / 2, dim = 2 * pairs;
  const int lane = lane_id(), warp = warp_id(), out_pair = warp * kSlice + lane % kSlice, set = lane / kSlice;
  const long long cache = static_cast<long long>(heads.kv_head) * args.capacity * pairs;
  const u32* old_keys = reinterpret_cast<const u32*>(args.keys) + cache;
  const u32* old_values = reinterpret_cast<const u32*>(args.values) + cache;

  int position, begin, end, n_parts;
  u32 keys[kTurns][P][J], values[kRows];
  // The new position is not yet in the cache: it is put in later.
  auto fetch_keys = [&](int first) {
    const int limit = min(end, position);
#pragma unroll
    for (int t = 0; t < kTurns; t++)
#pragma unroll
      for (int p = 0; p < P; p++) {
        const int at = first + (t * kWarps + warp) * P + p;
#pragma unroll
        for (int j = 0; j < J; j++) {
          const int pair = lane + kWarp * j;
          keys[t][p][j] = at < limit && pair < pairs ? old_keys[static_cast<u32>(at * pairs + pair)] : 0;
        }
      }
  };
  auto fetch_values = [&](int first) {
    const int limit = min(end, position);
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      const int at = first + i * kSets + set;
      values[i] = at < limit && out_pair < pairs ? old_values[static_cast<u32>(at * pairs + out_pair)] : 0;
    }
  };
  // Dimensions `column` and `column + pairs` of one of the H heads, or of k (H) or v (H + 1).
  int head_of[kRaw], column_of[kRaw];
  float2 raw[kRaw];
#pragma unroll
  for (int i = 0; i < kRaw; i++) {
    const int item = threadIdx.x + i * kThreads;
    head_of[i] = item / pairs;
    column_of[i] = item - head_of[i] * pairs;
  }
  auto fetch_raw = [&] {
#pragma unroll
    for (int i = 0; i < kRaw; i++) {
      const int h = head_of[i];
      const int row = h < H ? heads.first + h : args.n_heads + (h - H) * args.n_kv_heads + heads.kv_head;
      const bool exists = h < H ? h < heads.n : h < H + 2;
      const float* from = args.qkv + static_cast<long long>(row) * dim + column_of[i];
      raw[i] = exists ? make_float2(from[0], from[pairs]) : make_float2(0.0f, 0.0f);
    }
  };
  // The token's first kernel writes which position this is. Read before the wait it may be that of another token: a
  // guess, and asked for again if it was wrong. What it leads to is there already, written before this token began.
  const volatile u32* step_position = args.step + 1;
  auto position_now = [&] { return static_cast<int>(min(*step_position, static_cast<u32>(args.capacity - 1))); };
  if (threadIdx.x == 0) shared.guess = position_now();
  __syncthreads();
  for (int guess = shared.guess;;) {
    position = guess;
    const int share = max(ceil_div(position + 1, static_cast<int>(gridDim.y)), kLeastShare);
    n_parts = ceil_div(position + 1, share);
    begin = split * share;
    end = min(begin + share, position + 1);
    fetch_keys(begin);
    fetch_values(begin);
    for (int i = threadIdx.x; i < pairs; i += kThreads) {
      shared.cos[i] = args.cos[static_cast<long long>(position) * pairs + i];
      shared.sin[i] = args.sin[static_cast<long long>(position) * pairs + i];
    }
    __syncthreads();
    wait_for_previous();
    guess = position_now();
    fetch_raw();
    if (guess == position) break;
  }
  if (begin >= end) return;

  const bool has_newest = end == position + 1;
  const float scale = rsqrtf(static_cast<float>(dim));
#pragma unroll
  for (int i = 0; i < kRaw; i++) {
    // Turned in the rotate-half form, but for v.
    const int h = head_of[i], c = column_of[i];
    if (h >= H + 2) break;
    const float cos = shared.cos[c], sin = shared.sin[c];
    const float lower = h <= H ? raw[i].x * cos - raw[i].y * sin : raw[i].x;
    const float upper = h <= H ? raw[i].y * cos + raw[i].x * sin : raw[i].y;
    if (h < H) {
      shared.queries[h * dim + c] = lower * scale;
      shared.queries[h * dim + c + pairs] = upper * scale;
    } else if (has_newest) {
      u16* newest = reinterpret_cast<u16*>(shared.newest[h - H]);
      u16* stored = (h == H ? args.keys : args.values) + 2 * (cache + static_cast<long long>(position) * pairs);
      newest[c] = stored[c] = float_to_half(lower);
      newest[c + pairs] = stored[c + pairs] = float_to_half(upper);
    }
  }
  __syncthreads();

  float largest[kOwn], total[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; i++) {
    largest[i] = kLowest;
    total[i] = 0.0f;
  }
  float outputs[2 * H] = {};
  for (int first = begin; first < end; first += kTile) {
    const bool ends_tile = has_newest && first + kTile > position;
#pragma unroll
    for (int t = 0; t < kTurns; t++) {
      const int mine = (t * kWarps + warp) * P;
      if (first + mine >= end) break;
      if (ends_tile) {
#pragma unroll
        for (int p = 0; p < P; p++)
#pragma unroll
          for (int j = 0; j < J; j++)
            if (first + mine + p == position && lane + kWarp * j < pairs)
              keys[t][p][j] = shared.newest[0][lane + kWarp * j];
      }
      float scores[kScores] = {};
#pragma unroll
      for (int j = 0; j < J; j++) {
        const int pair = lane + kWarp * j;
        float2 key[P];
#pragma unroll
        for (int p = 0; p < P; p++) key[p] = halves(keys[t][p][j]);
#pragma unroll
        for (int h = 0; h < H; h++) {
          const float2 q = pair < pairs ? reinterpret_cast<const float2*>(shared.queries)[h * pairs + pair]
                                        : make_float2(0.0f, 0.0f);
#pragma unroll
          for (int p = 0; p < P; p++) {
            scores[h * P + p] += q.x * key[p].x;
            scores[h * P + p] += q.y * key[p].y;
          }
        }
      }
      const float score = warp_sum_each<kScores>(scores);
      const int number = lane / kShare;
      if (lane % kShare == 0) shared.scores[number / P * kScoreStride + mine + number % P] = score;
    }
    fetch_keys(first + kTile);
    __syncthreads();

    // The softmax that goes along (arXiv 1805.02867).
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
      const int h = warp + i * kWarps;
      if (h >= H) break;
      float score[kTile / kWarp], highest = largest[i];
#pragma unroll
      for (int k = 0; k < kTile / kWarp; k++) {
        const int at = lane + k * kWarp;
        score[k] = first + at < end ? shared.scores[h * kScoreStride + at] : kLowest;
        highest = fmaxf(highest, score[k]);
      }
      highest = warp_max(highest);
      const float fade = expf(largest[i] - highest);
      largest[i] = highest;
      total[i] *= fade;
      if (lane == 0) shared.fade[h] = fade;
#pragma unroll
      for (int k = 0; k < kTile / kWarp; k++) {
        const int at = lane + k * kWarp;
        const float weight = first + at < end ? expf(score[k] - highest) : 0.0f;
        total[i] += weight;
        reinterpret_cast<float*>(shared.weights)[at * H + h] = weight;
      }
    }
    __syncthreads();

    if (first > begin) {
#pragma unroll
      for (int h = 0; h < H; h++) {
        outputs[2 * h] *= shared.fade[h];
        outputs[2 * h + 1] *= shared.fade[h];
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      if (first + i * kSets >= end) break;
      const int at = i * kSets + set;
      u32 two = values[i];
      if (ends_tile && first + at == position && out_pair < pairs) two = shared.newest[1][out_pair];
      const float2 value = halves(two);
      float weights[H];
      if constexpr (H >= 4) {
#pragma unroll
        for (int h = 0; h < H; h += 4) {
          const float4 four = shared.weights[(at * H + h) / 4];
          weights[h] = four.x;
          weights[h + 1] = four.y;
          weights[h + 2] = four.z;
          weights[h + 3] = four.w;
        }
      } else {
#pragma unroll
        for (int h = 0; h < H; h++) weights[h] = reinterpret_cast<const float*>(shared.weights)[at * H + h];
      }
#pragma unroll
      for (int h = 0; h < H; h++) {
        outputs[2 * h] += weights[h] * value.x;
        outputs[2 * h + 1] += weights[h] * value.y;
      }
    }
    fetch_values(first + kTile);
  }

  sum_over_lanes<kWarp / 2, kSlice>(outputs, 0, [&](const float* sums, int n_kept, int at) {
    if (out_pair >= pairs) return;
#pragma unroll
    for (int i = 0; i < n_kept; i += 2) {
      const int h = (at + i) / 2;
      if (h >= heads.n) break;
      float* to = partial_outputs(args, split, heads.first + h) + 2 * out_pair;
      if (n_kept > 1) {
        *reinterpret_cast<float2*>(to) = make_float2(sums[i], sums[i + 1]);
      } else {
        to[at % 2] = sums[i];
      }
    }
  });
#pragma unroll
  for (int i = 0; i < kOwn; i++) {
    const int h = warp + i * kWarps;
    if (h >= heads.n) break;
    const float sum = warp_sum(total[i]);
    if (lane == 0) *partial_stats(args, split, heads.first + h) = make_float2(largest[i], sum);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    // What the barrier made visible to this thread is visible to all before it is counted.
    __threadfence();
    // Back at zero with the last one.
    const u32 last = n_parts - 1;
    shared.is_last = atomicInc(&args.arrived[blockIdx.x], last) == last;
  }
  __syncthreads();
  if (shared.is_last) combine_shares<H, J, kWhole>(args, shared, heads, n_parts);
}

// qkv: q [n_heads, head_dim], k [n_kv_heads, head_dim], v likewise, of the new position step[1]; keys, values: f16
// [n_kv_heads, capacity, head_dim], to which the new ones are added; rope tables [capacity, head_dim / 2];
// out [n_heads, head_dim]. partial [n_splits * n_heads * (head_dim + 2)]; arrived: a counter for each x of the grid,
// zero before and after. head_dim even; at most 128 splits.
// Kernels are named after H, the heads that a block takes at a time, and the head_dim that they are made for; those
// that end in `_less` take any smaller one. They are not one kernel so that each has registers of its own.
// Grid (n_kv_heads times the parts of a group of H heads, n_splits), 256 threads.
// Floor: keys and values of the positions so far, once.
#define ATTEND(name, H, J, kWhole)                                                                                     \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                                 \
      name(const float* qkv, const u32* step, u16* keys, u16* values, const float* rope_cos, const float* rope_sin,    \
           int n_heads, int n_kv_heads, int head_dim, int capacity, float* partial, u32* arrived, float* out) {        \
    __shared__ AttendShared shared;                                                                                    \
    let_next_start();                                                                                                  \
    const AttendArgs args = {qkv,        step,     keys,     values,  rope_cos, rope_sin, n_heads,                     \
                             n_kv_heads, head_dim, capacity, partial, arrived,  out};                                  \
    attend_share<H, J, kWhole>(args, shared);                                                                          \
  }
ATTEND(attend_1x64, 1, 1, true)
ATTEND(attend_2x64, 2, 1, true)
ATTEND(attend_4x64, 4, 1, true)
ATTEND(attend_8x64, 8, 1, true)
ATTEND(attend_16x64, 16, 1, true)
ATTEND(attend_4x64_less, 4, 1, false)
ATTEND(attend_8x64_less, 8, 1, false)
ATTEND(attend_1x128, 1, 2, true)
ATTEND(attend_2x128, 2, 2, true)
ATTEND(attend_4x128, 4, 2, true)
ATTEND(attend_8x128, 8, 2, true)
ATTEND(attend_16x128, 16, 2, true)
ATTEND(attend_4x128_less, 4, 2, false)
ATTEND(attend_8x128_less, 8, 2, false)
ATTEND(attend_1x256, 1, 4, true)
ATTEND(attend_2x256, 2, 4, true)
ATTEND(attend_4x256, 4, 4, true)
ATTEND(attend_8x256, 8, 4, true)
ATTEND(attend_4x256_less, 4, 4, false)
ATTEND(attend_8x256_less, 8, 4, false)
