// Causal attention of a prompt batch over the cache.
//
// Tiles of 32 queries and 32 positions (the plan of FlashAttention, arXiv 2205.14135, on plain FMA): scores go through
// shared memory once, the outputs stay in registers. About half the time goes to shared memory, so 512 tokens of a 70B
// shape take a small part of what their matrix products take.
#include "reduce.cuh"

namespace attend_rows_shape {
constexpr int kThreads = 256;
constexpr int kQueries = 32;
constexpr int kPositions = 32;
// Threads that share a row of scores.
constexpr int kRowThreads = kThreads / kQueries;
// Far below any score, and finite: the difference of two is a number.
constexpr float kLowest = -1e30f;

// Queries, then a tile of keys or values, then scores: rows of float4s, with one more where columns are read.
struct Tiles {
  int parts;
  float4* queries;
  float4* tile;
  float* scores;
  float* fade;

  DEVICE Tiles(int head_dim) {
    parts = ceil_div(head_dim, 4);
    queries = reinterpret_cast<float4*>(dynamic_shared());
    tile = queries + kQueries * parts;
    scores = reinterpret_cast<float*>(tile + kPositions * (parts + 1));
    fade = scores + kQueries * (kPositions + 1);
  }

  DEVICE float4* row(int position) const { return tile + position * (parts + 1); }
  DEVICE float& score(int query, int position) const { return scores[query * (kPositions + 1) + position]; }

  // Positions from `first` on of a head of the cache, zeros where there are none.
  DEVICE void load(const u16* cache, int head_dim, int first, int end) const {
    for (int i = threadIdx.x; i < kPositions * parts; i += kThreads) {
      const int p = i / parts, c = 4 * (i % parts);
      const u16* from = cache + static_cast<u64>(first + p) * head_dim + c;
      const int n = first + p < end ? head_dim - c : 0;
      row(p)[i % parts] =
          make_float4(n > 0 ? half_to_float(from[0]) : 0.0f, n > 1 ? half_to_float(from[1]) : 0.0f,
                      n > 2 ? half_to_float(from[2]) : 0.0f, n > 3 ? half_to_float(from[3]) : 0.0f);
    }
  }
};

struct Args {
  const float* qkv;
  int n, past;
  const u16* keys;
  const u16* values;
  int n_heads, n_kv_heads, head_dim, capacity;
  u16* hi;
  u16* lo;
};

// R: queries of which a thread holds four neighbouring dimensions of the output.
template <int R>
DEVICE void attend_tile(const Args& args) {
  const int dim = args.head_dim, head = blockIdx.x, first_query = blockIdx.y * kQueries;
  const int kv_head = head / (args.n_heads / args.n_kv_heads), row_values = (args.n_heads + 2 * args.n_kv_heads) * dim;
  const int n_queries = min(kQueries, args.n - first_query), end = args.past + first_query + n_queries;
  const u16* keys = args.keys + static_cast<u64>(kv_head) * args.capacity * dim;
  const u16* values = args.values + static_cast<u64>(kv_head) * args.capacity * dim;
  const Tiles tiles(dim);
  const float scale = rsqrtf(static_cast<float>(dim));

  float* queries = reinterpret_cast<float*>(tiles.queries);
  for (int i = threadIdx.x; i < kQueries * 4 * tiles.parts; i += kThreads) {
    const int q = i / (4 * tiles.parts), c = i % (4 * tiles.parts);
    const bool exists = q < n_queries && c < dim;
    queries[i] = exists ? args.qkv[static_cast<u64>(first_query + q) * row_values + head * dim + c] * scale : 0.0f;
  }

  // Scores: this thread computes those of two queries and two positions.
  const int score_query = threadIdx.x / 16, score_position = threadIdx.x % 16;
  // Softmax: a few positions of one query.
  const int row = threadIdx.x / kRowThreads, row_lane = threadIdx.x % kRowThreads;
  float largest = kLowest, total = 0.0f;
  // Outputs: R neighbouring queries, four dimensions.
  constexpr int kWide = kThreads * R / kQueries;
  const int out_part = threadIdx.x % kWide, out_query = threadIdx.x / kWide * R;
  const bool out_exists = out_part < tiles.parts;
  float4 outputs[R];
#pragma unroll
  for (int r = 0; r < R; r++) outputs[r] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

  for (int first = 0; first < end; first += kPositions) {
    __syncthreads();
    tiles.load(keys, dim, first, end);
    __syncthreads();
    float sums[2][2] = {};
    for (int part = 0; part < tiles.parts; part++) {
      float4 q[2], k[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        q[i] = tiles.queries[(score_query + 16 * i) * tiles.parts + part];
        k[i] = tiles.row(score_position + 16 * i)[part];
      }
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          sums[i][j] += q[i].x * k[j].x;
          sums[i][j] += q[i].y * k[j].y;
          sums[i][j] += q[i].z * k[j].z;
          sums[i][j] += q[i].w * k[j].w;
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 2; j++) tiles.score(score_query + 16 * i, score_position + 16 * j) = sums[i][j];
    __syncthreads();

    tiles.load(values, dim, first, end);
    const int seen = args.past + first_query + row - first;
    float highest = kLowest;
    for (int p = row_lane; p < kPositions; p += kRowThreads)
      if (p <= seen) highest = fmaxf(highest, tiles.score(row, p));
#pragma unroll
    for (int step = kRowThreads / 2; step > 0; step /= 2)
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, step));
    const float now = fmaxf(largest, highest), fade = expf(largest - now);
    total *= fade;
    largest = now;
    for (int p = row_lane; p < kPositions; p += kRowThreads) {
      const float weight = p <= seen ? expf(tiles.score(row, p) - now) : 0.0f;
      tiles.score(row, p) = weight;
      total += weight;
    }
    if (row_lane == 0) tiles.fade[row] = fade;
    __syncthreads();

    if (out_exists) {
#pragma unroll
      for (int r = 0; r < R; r++) {
        const float f = tiles.fade[out_query + r];
        outputs[r] = make_float4(outputs[r].x * f, outputs[r].y * f, outputs[r].z * f, outputs[r].w * f);
      }
#pragma unroll 4
      for (int p = 0; p < kPositions; p++) {
        const float4 v = tiles.row(p)[out_part];
#pragma unroll
        for (int r = 0; r < R; r++) {
          const float w = tiles.score(out_query + r, p);
          outputs[r].x += w * v.x;
          outputs[r].y += w * v.y;
          outputs[r].z += w * v.z;
          outputs[r].w += w * v.w;
        }
      }
    }
  }

#pragma unroll
  for (int step = kRowThreads / 2; step > 0; step /= 2) total += __shfl_xor_sync(kAllLanes, total, step);
  __syncthreads();
  if (row_lane == 0) tiles.fade[row] = 1.0f / total;
  __syncthreads();
  if (!out_exists) return;
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int query = out_query + r;
    if (query >= n_queries) continue;
    const float f = tiles.fade[query];
    const float four[4] = {outputs[r].x * f, outputs[r].y * f, outputs[r].z * f, outputs[r].w * f};
    const u64 at = (static_cast<u64>(first_query + query) * args.n_heads + head) * dim + 4 * out_part;
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (4 * out_part + i < dim) split_value(four[i], at + i, args.hi, args.lo);
  }
}
}  // namespace attend_rows_shape

// qkv [n, q | k | v] with queries already turned, positions from `past` on, whose keys and values are in the cache
// (f16 [n_kv_heads, capacity, head_dim]); hi, lo [n, n_heads * head_dim]. Grid (n_heads, n / 32 rounded up), 256
// threads, dynamic shared memory 32 * (32 * (head_dim / 4 rounded up) + 152) bytes.
extern "C" __global__ void __launch_bounds__(256, 2)
    attend_rows(const float* qkv, int n, int past, const u16* keys, const u16* values, int n_heads, int n_kv_heads,
                int head_dim, int capacity, u16* hi, u16* lo) {
  const attend_rows_shape::Args args = {qkv, n, past, keys, values, n_heads, n_kv_heads, head_dim, capacity, hi, lo};
  if (head_dim <= 32) {
    attend_rows_shape::attend_tile<1>(args);
  } else if (head_dim <= 64) {
    attend_rows_shape::attend_tile<2>(args);
  } else if (head_dim <= 128) {
    attend_rows_shape::attend_tile<4>(args);
  } else {
    attend_rows_shape::attend_tile<8>(args);
  }
}
