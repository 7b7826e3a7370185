// Grouped-query attention from one position over the cache, in two kernels: shares of the positions, then their sum.
#include "reduce.cuh"

namespace attention_shape {
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
// Heads times dimensions that one pass can hold: 8 * 256 or 16 * 128.
constexpr int kMaxOutputs = 2048;
}  // namespace attention_shape

struct AttendArgs {
  const float* qkv;
  u16* keys;
  u16* values;
  const float* cos;
  const float* sin;
  int position;
  int n_heads, n_kv_heads, head_dim, capacity;
  float* partial;
};

struct AttendShared {
  // Turned and scaled queries [heads, head_dim], then the merged outputs.
  float queries[attention_shape::kMaxOutputs];
  float outputs[attention_shape::kWarps][attention_shape::kMaxOutputs];
  float largest[attention_shape::kWarps][16];
  float total[attention_shape::kWarps][16];
};

DEVICE float2 halves(u32 two) {
  return make_float2(half_to_float(static_cast<u16>(two)), half_to_float(static_cast<u16>(two >> 16)));
}

// Dimension `i` of a head of q or k, turned to the position whose cosines and sines these are (rotate-half form).
DEVICE float turned(const float* head, const float* cos, const float* sin, int half, int i) {
  if (i < half) return head[i] * cos[i] - head[i + half] * sin[i];
  return head[i] * cos[i - half] + head[i - half] * sin[i - half];
}

// `n` heads of the group from `first_head` on, over positions [begin, end).
//
// A warp takes P positions at a time, for all H heads; a lane owns pairs of dimensions, 2 * (lane + 32 j) for j < J. It
// has its part of H * P scores, which the warp adds up so that each lane gets one of them; from there it is the softmax
// that goes along (arXiv 1805.02867), for each warp on its own until the end. Keys and values are loaded together.
template <int H, int J>
DEVICE void attend_heads(const AttendArgs& args, AttendShared& shared, int first_head, int n, int begin, int end) {
  using namespace attention_shape;
  constexpr int kWide = J == 4 ? (H >= 8 ? 2 : 4) : 8;
  constexpr int P = kWide < 32 / H ? kWide : 32 / H;
  constexpr int kScores = H * P;
  constexpr int kShare = kWarp / kScores;  // lanes with the same score

  const int kv_head = blockIdx.x, split = blockIdx.y, dim = args.head_dim, pairs = dim / 2;
  const long long cache = static_cast<long long>(kv_head) * args.capacity * dim;
  const float scale = rsqrtf(static_cast<float>(dim));
  const float* cos = args.cos + static_cast<long long>(args.position) * pairs;
  const float* sin = args.sin + static_cast<long long>(args.position) * pairs;
  for (int i = threadIdx.x; i < H * dim; i += kThreads) {
    const int head = i / dim;
    const float* q = args.qkv + (first_head + head) * dim;
    shared.queries[i] = head < n ? turned(q, cos, sin, pairs, i % dim) * scale : 0.0f;
  }
  __syncthreads();

  const int lane = lane_id(), my_score = lane / kShare, my_head = my_score / P, my_position = my_score % P;
  // Far below any score, and finite: the difference of two is a number.
  constexpr float kLowest = -1e30f;
  float largest = kLowest, total = 0.0f;
  float2 outputs[H][J];
#pragma unroll
  for (int h = 0; h < H; h++)
#pragma unroll
    for (int j = 0; j < J; j++) outputs[h][j] = make_float2(0.0f, 0.0f);

  for (int first = begin + warp_id() * P; first < end; first += kWarps * P) {
    u32 keys[P][J], values[P][J];
#pragma unroll
    for (int p = 0; p < P; p++) {
      // Past the end it is the last position again, with a weight of zero.
      const long long row = (cache + static_cast<long long>(min(first + p, end - 1)) * dim) / 2;
#pragma unroll
      for (int j = 0; j < J; j++) {
        const int pair = lane + kWarp * j;
        keys[p][j] = pair < pairs ? reinterpret_cast<const u32*>(args.keys)[row + pair] : 0;
        values[p][j] = pair < pairs ? reinterpret_cast<const u32*>(args.values)[row + pair] : 0;
      }
    }
    float scores[kScores] = {};
#pragma unroll
    for (int j = 0; j < J; j++) {
      const int pair = lane + kWarp * j;
      float2 key[P];
#pragma unroll
      for (int p = 0; p < P; p++) key[p] = halves(keys[p][j]);
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
    float score = warp_sum_each<kScores>(scores);
    const bool seen = first + my_position < end;
    if (!seen) score = kLowest;
    float highest = score;
#pragma unroll
    for (int i = kShare; i < kShare * P; i *= 2) highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, i));
    const float now = fmaxf(largest, highest), fade = expf(largest - now);
    const float weight = seen ? expf(score - now) : 0.0f;
    total = total * fade + weight;
    largest = now;
    // Most of the time no head finds a larger score than before.
    if (__any_sync(kAllLanes, fade != 1.0f)) {
#pragma unroll
      for (int h = 0; h < H; h++) {
        const float f = __shfl_sync(kAllLanes, fade, h * P * kShare);
#pragma unroll
        for (int j = 0; j < J; j++) outputs[h][j] = make_float2(outputs[h][j].x * f, outputs[h][j].y * f);
      }
    }
#pragma unroll
    for (int p = 0; p < P; p++) {
      float2 value[J];
#pragma unroll
      for (int j = 0; j < J; j++) value[j] = halves(values[p][j]);
#pragma unroll
      for (int h = 0; h < H; h++) {
        const float w = __shfl_sync(kAllLanes, weight, (h * P + p) * kShare);
#pragma unroll
        for (int j = 0; j < J; j++) {
          outputs[h][j].x += w * value[j].x;
          outputs[h][j].y += w * value[j].y;
        }
      }
    }
  }

  // Each score's weights were counted by kShare lanes alike; the P positions of a head are added up.
#pragma unroll
  for (int i = kShare; i < kShare * P; i *= 2) total += __shfl_xor_sync(kAllLanes, total, i);
  if (my_position == 0 && lane % kShare == 0) {
    shared.largest[warp_id()][my_head] = largest;
    shared.total[warp_id()][my_head] = total;
  }
#pragma unroll
  for (int h = 0; h < H; h++)
#pragma unroll
    for (int j = 0; j < J; j++)
      if (lane + kWarp * j < pairs)
        reinterpret_cast<float2*>(shared.outputs[warp_id()])[h * pairs + lane + kWarp * j] = outputs[h][j];
  __syncthreads();
  for (int i = threadIdx.x; i < n * dim; i += kThreads) {
    const int h = i / dim;
    float most = shared.largest[0][h], sum = 0.0f, weights = 0.0f;
#pragma unroll
    for (int w = 1; w < kWarps; w++) most = fmaxf(most, shared.largest[w][h]);
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      const float f = expf(shared.largest[w][h] - most);
      sum += f * shared.outputs[w][i];
      weights += f * shared.total[w][h];
    }
    float* out = args.partial + (static_cast<long long>(first_head + h) * gridDim.y + split) * (dim + 2);
    out[i % dim] = sum;
    if (i % dim == 0) {
      out[dim] = most;
      out[dim + 1] = weights;
    }
  }
  __syncthreads();
}

// As few heads at a time as the group has, at most H.
template <int J>
DEVICE void attend_group(const AttendArgs& args, AttendShared& shared, int begin, int end) {
  constexpr int kMost = J == 4 ? 8 : 16;
  const int group = args.n_heads / args.n_kv_heads, head = blockIdx.x * group;
  if (group == 1) return attend_heads<1, J>(args, shared, head, 1, begin, end);
  if (group == 2) return attend_heads<2, J>(args, shared, head, 2, begin, end);
  if (group <= 4) return attend_heads<4, J>(args, shared, head, group, begin, end);
  if (group <= 8) return attend_heads<8, J>(args, shared, head, group, begin, end);
  for (int h = 0; h < group; h += kMost)
    attend_heads<kMost, J>(args, shared, head + h, min(kMost, group - h), begin, end);
}

// qkv: q [n_heads, head_dim], k [n_kv_heads, head_dim], v likewise, of the new position step[1]; keys, values: f16
// [n_kv_heads, capacity, head_dim], to which the new ones are added; rope tables [capacity, head_dim / 2].
// partial [n_heads, n_splits, head_dim + 2]: outputs not yet divided by the sum of the weights, the largest score, that
// sum. Grid (n_kv_heads, n_splits), 128 threads. head_dim even, at most 256; at most 16 heads a group.
// Floor: keys and values of the positions so far, once.
extern "C" __global__ void __launch_bounds__(128, 2)
    attend(const float* qkv, const u32* step, u16* keys, u16* values, const float* rope_cos, const float* rope_sin,
           int n_heads, int n_kv_heads, int head_dim, int capacity, float* partial) {
  __shared__ AttendShared shared;
  let_next_start();
  wait_for_previous();
  const int position = step[1], n_splits = gridDim.y, split = blockIdx.y, kv_head = blockIdx.x;
  const int share = ceil_div(position + 1, n_splits);
  const int begin = split * share, end = min(begin + share, position + 1), pairs = head_dim / 2;
  if (begin >= end) {
    const int group = n_heads / n_kv_heads, width = head_dim + 2;
    for (int i = threadIdx.x; i < group * width; i += attention_shape::kThreads) {
      const long long row = static_cast<long long>(kv_head * group + i / width) * n_splits + split;
      partial[row * width + i % width] = i % width == head_dim ? -__uint_as_float(0x7f800000u) : 0.0f;
    }
    return;
  }
  if (end == position + 1) {
    const float* k = qkv + (n_heads + kv_head) * head_dim;
    const float* v = k + n_kv_heads * head_dim;
    const long long row = (static_cast<long long>(kv_head) * capacity + position) * head_dim;
    const float* cos = rope_cos + static_cast<long long>(position) * pairs;
    const float* sin = rope_sin + static_cast<long long>(position) * pairs;
    for (int i = threadIdx.x; i < head_dim; i += attention_shape::kThreads) {
      keys[row + i] = float_to_half(turned(k, cos, sin, pairs, i));
      values[row + i] = float_to_half(v[i]);
    }
    // From here on the new position is read like the others, with the same rounding.
    __syncthreads();
  }
  const AttendArgs args = {qkv,     keys,       values,   rope_cos, rope_sin, position,
                           n_heads, n_kv_heads, head_dim, capacity, partial};
  if (head_dim <= 64) {
    attend_group<1>(args, shared, begin, end);
  } else if (head_dim <= 128) {
    attend_group<2>(args, shared, begin, end);
  } else {
    attend_group<4>(args, shared, begin, end);
  }
}

// partial: see attend. out [n_heads, head_dim]. A block of any size for each head; at most 256 splits.
extern "C" __global__ void __launch_bounds__(256)
    attend_combine(const float* partial, int head_dim, int n_splits, float* out) {
  // What each split counts: zero for an empty one, whose largest score is minus infinity.
  __shared__ float factors[256];
  let_next_start();
  wait_for_previous();
  const int head = blockIdx.x, width = head_dim + 2;
  const float* rows = partial + static_cast<long long>(head) * n_splits * width;
  if (warp_id() == 0) {
    float most = -__uint_as_float(0x7f800000u);
    for (int i = lane_id(); i < n_splits; i += kWarp) most = fmaxf(most, rows[i * width + head_dim]);
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
    float weights = 0.0f;
    for (int i = lane_id(); i < n_splits; i += kWarp) {
      factors[i] = expf(rows[i * width + head_dim] - most);
      weights += factors[i] * rows[i * width + head_dim + 1];
    }
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) weights += __shfl_xor_sync(kAllLanes, weights, step);
    for (int i = lane_id(); i < n_splits; i += kWarp) factors[i] /= weights;
  }
  __syncthreads();
  for (int c = threadIdx.x; c < head_dim; c += blockDim.x) {
    float sum = 0.0f;
#pragma unroll 8
    for (int i = 0; i < n_splits; i++) sum += factors[i] * rows[i * width + c];
    out[head * head_dim + c] = sum;
  }
}
