// Encoded weights to floats, in registers.
//
// A chunk is 16 bytes of codes, one load of one thread: 32 columns of q4, 16 of q8, 8 of bf16. A row is its codes, then
// one f16 scale for each group of 32 columns (kernels/src/encoding.rs). An encoding says how four neighbouring columns
// of a chunk become floats:
//
//     weight(c) = scale * (four(codes, c / 4)[c % 4] * kIn * factor(c) * kOut - kBias)
//
// where the powers of two `kIn * factor(c)` are put into the input (or, for down rows, taken from the output) once for
// many weights, and the bias becomes `kBias * sum of the inputs`, also once. What is left of a q4 weight is one LOP3,
// one FFMA, and an eighth of a shift.
#pragma once
#include "platform.cuh"

struct Bf16 {
  static constexpr int kColumns = 8;
  static constexpr bool kScaled = false;
  static constexpr bool kResidual = false;
  static constexpr float kBias = 0.0f;
  static constexpr float kIn = 1.0f;
  static constexpr float kOut = 1.0f;

  DEVICE static u32 code_bytes(u32 columns) { return 2 * columns; }
  DEVICE static float factor(int) { return 1.0f; }
  DEVICE static float4 four(const uint4& codes, int k) {
    const u32 a = k == 0 ? codes.x : codes.z, b = k == 0 ? codes.y : codes.w;
    return make_float4(__uint_as_float(a << 16), __uint_as_float(a & 0xffff0000u), __uint_as_float(b << 16),
                       __uint_as_float(b & 0xffff0000u));
  }
};

// The word `k` of a chunk, for `k` known at compile time.
DEVICE u32 word(const uint4& codes, int k) {
  return k == 0 ? codes.x : k == 1 ? codes.y : k == 2 ? codes.z : codes.w;
}

struct Q8 {
  static constexpr int kColumns = 16;
  static constexpr bool kScaled = true;
  static constexpr bool kResidual = false;
  static constexpr float kBias = 0.0f;
  static constexpr float kIn = 1.0f;
  static constexpr float kOut = 1.0f;

  DEVICE static u32 code_bytes(u32 columns) { return columns; }
  DEVICE static float factor(int) { return 1.0f; }
  DEVICE static float4 four(const uint4& codes, int k) {
    // A code plus 128 in the low byte of 2^23, less both: exact.
    const u32 biased = word(codes, k) ^ 0x80808080u;
    return make_float4(__uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7550)) - 8388736.0f,
                       __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7551)) - 8388736.0f,
                       __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7552)) - 8388736.0f,
                       __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7553)) - 8388736.0f);
  }
};

struct Q4 {
  static constexpr int kColumns = 32;
  static constexpr bool kScaled = true;
  static constexpr bool kResidual = false;
  // Codes are stored with an offset of 8.
  static constexpr float kBias = 8.0f;
  static constexpr float kIn = kSmallIntegerIn;
  static constexpr float kOut = kSmallIntegerOut;

  DEVICE static u32 code_bytes(u32 columns) { return columns / 2; }
  // Codes are used where they lie in their word, at this power of two.
  DEVICE static float factor(int column) {
    const float low = column % 4 == 0 ? 1.0f : column % 4 == 1 ? 0x1p-8f : 0x1p-16f;
    return column % 32 < 16 ? low : low * 0.0625f;
  }
  // Byte j of a chunk holds columns j (low) and j + 16 (high).
  DEVICE static float4 four(const uint4& codes, int k) {
    const u32 w = word(codes, k % 4), nibble = k < 4 ? 0xf : 0xf0;
    // A float takes integers of 24 bits: the topmost byte moves down.
    return make_float4(small_integer(w & nibble), small_integer(w & nibble << 8), small_integer(w & nibble << 16),
                       small_integer(w >> 8 & nibble << 16));
  }
};

// What a sketch leaves of a row: weights are the sketch's and these together.
struct R4 : Q4 {
  static constexpr bool kResidual = true;
};

// One row: where its codes and its scales begin, in bytes from `base`. Offsets of 32 bits are added up before they meet
// the address, which has 64.
template <class E>
struct Row {
  const unsigned char* base;
  u32 codes, scales;

  DEVICE uint4 load_codes(u32 chunk) const { return load_stream(base + (codes + 16 * chunk)); }
  // The bits of the scale of this chunk.
  DEVICE u16 load_scale(u32 chunk) const {
    return E::kScaled ? load_stream_u16(base + (scales + scale_at(chunk))) : 0;
  }
  DEVICE static u32 scale_at(u32 chunk) { return chunk / (32 / E::kColumns) * 2; }
};

// A matrix row: codes, then scales.
template <class E>
DEVICE Row<E> matrix_row(const unsigned char* bytes, u32 columns) {
  return {bytes, 0, E::code_bytes(columns)};
}

// Row `which` (0 gate, 1 up, 2 down) of a neuron's bundle: three rows of codes, then three of scales.
template <class E>
DEVICE Row<E> bundle_row(const unsigned char* bundle, u32 hidden, u32 which) {
  const u32 codes = E::code_bytes(hidden), scales = E::kScaled ? hidden / 32 * 2 : 0;
  return {bundle, which * codes, 3 * codes + which * scales};
}

// Bytes from one row of a matrix to the next.
template <class E>
DEVICE u32 row_stride(u32 columns) {
  return (E::code_bytes(columns) + (E::kScaled ? columns / 32 * 2 : 0) + 15) / 16 * 16;
}

template <class E>
DEVICE float scale_value(u16 scale) {
  return E::kScaled ? half_to_float(scale) : 1.0f;
}

// Four neighbouring weights of a chunk, each exactly what kernels/src/pack.rs unpacks.
template <class E>
DEVICE float4 weights(const uint4& codes, float scale, int k) {
  const float4 v = E::four(codes, k);
  const int c = 4 * k;
  return make_float4(scale * (v.x * (E::kIn * E::factor(c)) * E::kOut - E::kBias),
                     scale * (v.y * (E::kIn * E::factor(c + 1)) * E::kOut - E::kBias),
                     scale * (v.z * (E::kIn * E::factor(c + 2)) * E::kOut - E::kBias),
                     scale * (v.w * (E::kIn * E::factor(c + 3)) * E::kOut - E::kBias));
}

// One weight of a row.
template <class E>
DEVICE float weight(const Row<E>& row, int column) {
  const int chunk = column / E::kColumns, wanted = column % E::kColumns / 4;
  const uint4 codes = row.load_codes(chunk);
  const float scale = scale_value<E>(row.load_scale(chunk));
  float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
  for (int k = 0; k < E::kColumns / 4; k++)
    if (k == wanted) four = weights<E>(codes, scale, k);
  return column % 4 == 0 ? four.x : column % 4 == 1 ? four.y : column % 4 == 2 ? four.z : four.w;
}
