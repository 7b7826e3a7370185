// The steps of a prompt batch around its matrix products.
//
// The products are bf16 with f32 sums. An f32 value v is passed to them as two bf16 values, high = bf16(v) and
// low = bf16(v - high), which together hold 16 bits of it: three products (high * high, high * low, low * high) then
// come within a few ulp of what decoding computes. A block of 256 threads for each row, unless said otherwise; any grid
// works, more rows than blocks too.
#include "input.cuh"

DEVICE void split_value(float v, u64 at, u16* hi, u16* lo) {
  const u16 high = float_to_bf16(v);
  hi[at] = high;
  lo[at] = float_to_bf16(v - bf16_to_float(high));
}

// Part `part` of a row, four values, split; behind the last column there is nothing.
DEVICE void split_four(const float4& v, int columns, int part, u16* hi, u16* lo) {
  const float four[4] = {v.x, v.y, v.z, v.w};
  u16 high[4], low[4];
#pragma unroll
  for (int i = 0; i < 4; i++) split_value(four[i], i, high, low);
  if (columns % 4 == 0) {
    auto packed = [](const u16(&h)[4]) { return make_uint2(h[0] | u32(h[1]) << 16, h[2] | u32(h[3]) << 16); };
    reinterpret_cast<uint2*>(hi)[part] = packed(high);
    reinterpret_cast<uint2*>(lo)[part] = packed(low);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (4 * part + i < columns) {
        hi[4 * part + i] = high[i];
        lo[4 * part + i] = low[i];
      }
    }
  }
}

// tokens [n]; table: encoded rows of `columns`; x [n, columns].
template <class E>
DEVICE void embed_rows(const u32* tokens, int n, const unsigned char* table, int columns, float* x) {
  for (int t = blockIdx.x; t < n; t += gridDim.x) {
    const Row<E> row = matrix_row<E>(table + static_cast<u64>(tokens[t]) * row_stride<E>(columns), columns);
    for (int c = threadIdx.x; c < columns; c += blockDim.x) x[static_cast<u64>(t) * columns + c] = weight<E>(row, c);
  }
}

// RMSNorm of x [n, columns], split.
extern "C" __global__ void __launch_bounds__(256)
    norm_rows(const float* x, const float* weight, float eps, int n, int columns, u16* hi, u16* lo) {
  __shared__ float scratch[kWarp];
  for (int t = blockIdx.x; t < n; t += gridDim.x) {
    const u64 row = static_cast<u64>(t) * columns;
    float squares = 0.0f;
    for (int c = threadIdx.x; c < columns; c += blockDim.x) squares += x[row + c] * x[row + c];
    const float scale = 1.0f / sqrtf(block_sum(squares, scratch) / columns + eps);
    for (int c = threadIdx.x; c < columns; c += blockDim.x)
      split_value(x[row + c] * scale * weight[c], row + c, hi, lo);
    // The scratch of the next row.
    __syncthreads();
  }
}

// Decodes a row to hi and lo [columns]. A thread takes four columns, so that what is written, most of the bytes, comes
// in whole lines.
template <class E>
DEVICE void unpack_row(const Row<E>& row, int columns, u16* hi, u16* lo) {
  for (int part = threadIdx.x; 4 * part < columns; part += blockDim.x) {
    const int chunk = 4 * part / E::kColumns, wanted = part % (E::kColumns / 4);
    const uint4 codes = row.load_codes(chunk);
    const float scale = scale_value<E>(row.load_scale(chunk));
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int k = 0; k < E::kColumns / 4; k++)
      if (k == wanted) v = weights<E>(codes, scale, k);
    split_four(v, columns, part, hi, lo);
  }
}

// rows: n encoded rows, `stride` bytes apart; hi, lo [n, columns].
template <class E>
DEVICE void unpack_rows(const unsigned char* rows, int n, int columns, u64 stride, u16* hi, u16* lo) {
  for (int r = blockIdx.x; r < n; r += gridDim.x) {
    const u64 at = static_cast<u64>(r) * columns;
    unpack_row<E>(matrix_row<E>(rows + r * stride, columns), columns, hi + at, lo + at);
  }
}

// bundles: n of `bundle_bytes`; the outputs [n, hidden] each.
template <class E>
DEVICE void unpack_bundles(const unsigned char* bundles, int n, int bundle_bytes, int hidden, u16* gate_hi,
                           u16* gate_lo, u16* up_hi, u16* up_lo, u16* down_hi, u16* down_lo) {
  for (int i = blockIdx.x; i < n; i += gridDim.x) {
    const unsigned char* bundle = bundles + static_cast<u64>(i) * static_cast<u32>(bundle_bytes);
    const u64 at = static_cast<u64>(i) * hidden;
    unpack_row<E>(bundle_row<E>(bundle, hidden, 0), hidden, gate_hi + at, gate_lo + at);
    unpack_row<E>(bundle_row<E>(bundle, hidden, 1), hidden, up_hi + at, up_lo + at);
    unpack_row<E>(bundle_row<E>(bundle, hidden, 2), hidden, down_hi + at, down_lo + at);
  }
}

#define PREFILL_KERNELS(name, E)                                                                                       \
  extern "C" __global__ void __launch_bounds__(256)                                                                    \
      embed_rows_##name(const u32* tokens, int n, const unsigned char* table, int columns, float* x) {                 \
    embed_rows<E>(tokens, n, table, columns, x);                                                                       \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256)                                                                    \
      unpack_rows_##name(const unsigned char* rows, int n, int columns, u64 stride, u16* hi, u16* lo) {                \
    unpack_rows<E>(rows, n, columns, stride, hi, lo);                                                                  \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256)                                                                    \
      unpack_bundles_##name(const unsigned char* bundles, int n, int bundle_bytes, int hidden, u16* gate_hi,           \
                            u16* gate_lo, u16* up_hi, u16* up_lo, u16* down_hi, u16* down_lo) {                        \
    unpack_bundles<E>(bundles, n, bundle_bytes, hidden, gate_hi, gate_lo, up_hi, up_lo, down_hi, down_lo);             \
  }
PREFILL_KERNELS(bf16, Bf16)
PREFILL_KERNELS(q8, Q8)
PREFILL_KERNELS(q4, Q4)
#undef PREFILL_KERNELS

// h = act(gate, up), split; n values in all.
extern "C" __global__ void __launch_bounds__(256)
    gate_rows(const float* gate, const float* up, u64 n, int activation, u16* hi, u16* lo) {
  for (u64 i = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += static_cast<u64>(gridDim.x) * blockDim.x)
    split_value(activate(activation, gate[i], up[i]), i, hi, lo);
}

// x [n, columns] += bias.
extern "C" __global__ void __launch_bounds__(256) add_bias_rows(float* x, const float* bias, int n, int columns) {
  for (int t = blockIdx.x; t < n; t += gridDim.x)
    for (int c = threadIdx.x; c < columns; c += blockDim.x) x[static_cast<u64>(t) * columns + c] += bias[c];
}

// qkv [n, q | k | v] of positions from `past` on: q is turned in place, k and v go to the cache (see attend).
extern "C" __global__ void __launch_bounds__(256)
    rope_append_rows(float* qkv, int n, int past, u16* keys, u16* values, const float* rope_cos, const float* rope_sin,
                     int n_heads, int n_kv_heads, int head_dim, int capacity) {
  const int half = head_dim / 2, n_turned = n_heads + n_kv_heads;
  for (int t = blockIdx.x; t < n; t += gridDim.x) {
    float* row = qkv + static_cast<u64>(t) * (n_heads + 2 * n_kv_heads) * head_dim;
    const float* cos = rope_cos + static_cast<u64>(past + t) * half;
    const float* sin = rope_sin + static_cast<u64>(past + t) * half;
    // Where this position of a head of the cache lies.
    auto place = [&](int kv_head) { return (static_cast<u64>(kv_head) * capacity + past + t) * head_dim; };
    for (int i = threadIdx.x; i < n_turned * half; i += blockDim.x) {
      const int head = i / half, pair = i % half;
      float *a = row + head * head_dim + pair, *b = a + half;
      const float x = *a * cos[pair] - *b * sin[pair], y = *b * cos[pair] + *a * sin[pair];
      if (head < n_heads) {
        *a = x;
        *b = y;
      } else {
        keys[place(head - n_heads) + pair] = float_to_half(x);
        keys[place(head - n_heads) + pair + half] = float_to_half(y);
      }
    }
    const float* v = row + n_turned * head_dim;
    for (int i = threadIdx.x; i < n_kv_heads * head_dim; i += blockDim.x)
      values[place(i / head_dim) + i % head_dim] = float_to_half(v[i]);
  }
}
