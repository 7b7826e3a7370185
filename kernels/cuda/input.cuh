// The vector that weights are multiplied with, in shared memory.
//
// The inputs of a chunk are followed by one more float4, so that a warp whose lanes read the same part of neighbouring
// chunks, and one whose lanes read neighbouring parts of the vector, both touch every bank once, and all parts of a
// chunk lie at fixed distances from its first. For encodings with a bias that float4 holds minus the bias times the sum
// of the chunk's inputs: where dot products with this chunk start from.
#pragma once
#include "decode.cuh"
#include "reduce.cuh"

template <class E>
struct Input {
  // float4s of a chunk's inputs.
  static constexpr int kParts = E::kColumns / 4;

  float4* values;

  DEVICE Input() { values = reinterpret_cast<float4*>(dynamic_shared()); }

  DEVICE float4& part(int index) const { return values[index + index / kParts]; }
  DEVICE float4& part(int chunk, int k) const { return values[chunk * (kParts + 1) + k]; }
  // One value of the vector.
  DEVICE float& value(int column) const { return reinterpret_cast<float*>(&part(column / 4))[column % 4]; }
  DEVICE float start(int chunk) const { return E::kBias != 0.0f ? part(chunk, kParts).x : 0.0f; }

  // Part `index` of the vector `x`, which has zeros after its end.
  DEVICE static float4 fetch(const float* x, int columns, int index) {
    const int c = 4 * index;
    if (c + 4 <= columns) return *reinterpret_cast<const float4*>(x + c);
    return make_float4(c < columns ? x[c] : 0.0f, c + 1 < columns ? x[c + 1] : 0.0f, c + 2 < columns ? x[c + 2] : 0.0f,
                       0.0f);
  }

  // Puts four inputs into their place. The lanes of a warp must bring neighbouring parts, all 32 of them.
  DEVICE void put(int index, float4 v, bool exists) const {
    if (E::kBias != 0.0f) {
      float sum = (v.x + v.y) + (v.z + v.w);
#pragma unroll
      for (int step = 1; step < kParts; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      if (exists && index % kParts == 0) part(index / kParts, kParts).x = sum * (-E::kBias / E::kOut);
    }
    if (!exists) return;
    const int c = 4 * index;
    part(index) = make_float4(v.x * (E::kIn * E::factor(c)), v.y * (E::kIn * E::factor(c + 1)),
                              v.z * (E::kIn * E::factor(c + 2)), v.w * (E::kIn * E::factor(c + 3)));
  }

  // Copies `x` here once the previous kernel has written it. All threads of the block; ends without a barrier.
  DEVICE void stage(const float* x, int columns) const {
    wait_for_previous();
    const int n_parts = 8 * ceil_div(columns, 32);
    for (int first = 0; first < n_parts; first += blockDim.x) {
      const int index = first + threadIdx.x;
      put(index, fetch(x, columns, index), index < n_parts);
    }
  }

  // Puts RMSNorm(x) (arXiv 1910.07467) here once the previous kernel has written x, and the first block also into
  // `normed_out` if there is one.
  DEVICE void stage_normed(const float* x, const float* weight, float eps, int columns, float* normed_out) const {
    __shared__ float scratch[kWarp];
    const int n_parts = 8 * ceil_div(columns, 32);
    // Weights that are on their way before x is there.
    constexpr int kEarly = 8;
    float4 early[kEarly];
#pragma unroll
    for (int i = 0; i < kEarly; i++) {
      const int index = i * blockDim.x + threadIdx.x;
      if (index < n_parts) early[i] = fetch(weight, columns, index);
    }
    wait_for_previous();
    float squares = 0.0f;
#pragma unroll 4
    for (int index = threadIdx.x; index < n_parts; index += blockDim.x) {
      const float4 v = fetch(x, columns, index);
      squares += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
      part(index) = v;
    }
    const float scale = 1.0f / sqrtf(block_sum(squares, scratch) / columns + eps);
    auto norm = [&](int index, const float4& w) {
      const bool exists = index < n_parts;
      float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (exists) {
        // Written by this same thread above.
        v = part(index);
        v = make_float4(v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w);
        if (normed_out != nullptr && blockIdx.x == 0) {
          const float four[4] = {v.x, v.y, v.z, v.w};
          for (int i = 0; i < 4; i++)
            if (4 * index + i < columns) normed_out[4 * index + i] = four[i];
        }
      }
      put(index, v, exists);
    };
#pragma unroll
    for (int i = 0; i < kEarly; i++)
      if (i * blockDim.x < n_parts) norm(i * blockDim.x + threadIdx.x, early[i]);
    for (int first = kEarly * blockDim.x; first < n_parts; first += blockDim.x) {
      const int index = first + threadIdx.x;
      norm(index, fetch(weight, index < n_parts ? columns : 0, index));
    }
  }

  // Dot products of this chunk of the vector with the same chunk of N rows, without their scales, less a factor kOut.
  template <int N>
  DEVICE void dot(int chunk, const uint4 (&codes)[N], float (&sums)[N]) const {
    const float from = start(chunk);
#pragma unroll
    for (int n = 0; n < N; n++) sums[n] = from;
#pragma unroll
    for (int k = 0; k < kParts; k++) {
      const float4 x = part(chunk, k);
#pragma unroll
      for (int n = 0; n < N; n++) {
        const float4 w = E::four(codes[n], k);
        sums[n] += w.x * x.x;
        sums[n] += w.y * x.y;
        sums[n] += w.z * x.z;
        sums[n] += w.w * x.w;
      }
    }
  }
};
