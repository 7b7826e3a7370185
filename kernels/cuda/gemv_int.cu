// q4 and q8 rows times one vector, exactly, on the integer tensor cores.
//
// Floor: rows * row_stride bytes from device memory. Around that a kernel costs about 6 us on a Hopper GPU: the vector
// must be fetched, normalised and taken apart, and the sums brought together.
//
// - The vector becomes whole numbers of 31 bits, by a power of two for each group of 32 columns, and these become
//   four signed digits of 8 bits. mma.m16n8k32 multiplies 16 rows of a group with all four digits at once. Sums are exact in 32 bits
//   until the group's scale is applied: what is lost is below 2^-30 of the group's largest input.
// - Code bytes go into shared memory as they are and come back in the order that the tensor cores want (ldmatrix): byte
//   j of a q4 group has columns j and j + 16, so that a mask is all it takes.
// - A step is 64 bytes of 16 rows. A block has a range of rows, and each of its warps the same number of steps of it,
//   wherever in a row they begin and end. A warp has a ring of steps on their way, and waits for nobody until the end.
//   The first ones are asked for before the kernel that writes the vector has ended.
#include "decode.cuh"
#include "reduce.cuh"
#include "shares.cuh"

namespace int_shape {
constexpr int kRows = 16;
constexpr int kStages = 6;
constexpr int kMaxWarps = 16;
constexpr int kStageBytes = 64 * kRows;
// Of four digits of a group: 128, and 32 more so that neighbouring groups begin in other banks.
constexpr int kGroupBytes = 160;
// Parts of four columns that a thread keeps in registers from its sum of squares to its digits.
constexpr int kKept = 4;
}  // namespace int_shape

// Four signed digits of a number, the lowest first: v = d0 + 2^8 d1 + 2^16 d2 + 2^24 d3.
DEVICE u32 digits_of(int v) { return (static_cast<u32>(v) + 0x00808080u) ^ 0x00808080u; }

// The vector as digits: groups of kGroupBytes, in each two words (columns 4 t to 4 t + 3, and those after 16) for each
// digit and each t; then the value of one in each group. Whole steps: behind the last column are zeros.
template <class E>
struct Digits {
  unsigned char* bytes;
  float* units;

  DEVICE Digits(unsigned char* shared, int n_groups)
      : bytes(shared), units(reinterpret_cast<float*>(shared + n_groups * int_shape::kGroupBytes)) {}

  // Puts four columns into their place. The lanes of a warp bring neighbouring parts, all 32 of them.
  DEVICE void put(int index, float4 v, bool exists) const {
    using namespace int_shape;
    float most = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
    // The largest of the bits: not a number is larger than anything.
    u32 bits = __float_as_uint(most);
    if (!(v.x == v.x && v.y == v.y && v.z == v.z && v.w == v.w)) bits = 0x7fffffffu;
#pragma unroll
    for (int step = 1; step < 8; step *= 2) bits = max(bits, __shfl_xor_sync(kAllLanes, bits, step));
    if (!exists) return;
    // Numbers below 2^30: 29 - log2(most) more, but not beyond what a float can be multiplied with.
    const u32 exponent = max(bits >> 23, 30u);
    const bool finite = exponent < 255;
    const float factor = finite ? __uint_as_float((283 - exponent) << 23) : 0.0f;
    const u32 words[4] = {digits_of(rounded_to_int(v.x * factor)), digits_of(rounded_to_int(v.y * factor)),
                          digits_of(rounded_to_int(v.z * factor)), digits_of(rounded_to_int(v.w * factor))};
    const int group = index / 8, t = index % 4, half = index / 4 % 2;
    const u32 low01 = __byte_perm(words[0], words[1], 0x5140), low23 = __byte_perm(words[2], words[3], 0x5140);
    const u32 high01 = __byte_perm(words[0], words[1], 0x7362), high23 = __byte_perm(words[2], words[3], 0x7362);
    u32* out = reinterpret_cast<u32*>(bytes + group * kGroupBytes) + 2 * t + half;
    out[0] = __byte_perm(low01, low23, 0x5410);
    out[8] = __byte_perm(low01, low23, 0x7632);
    out[16] = __byte_perm(high01, high23, 0x5410);
    out[24] = __byte_perm(high01, high23, 0x7632);
    // A group with infinities has a unit that is not a number, and so have all products with it.
    const u32 unit = finite ? (exponent - 29) << 23 : 0x7fc00000u;
    if (index % 8 == 0) units[group] = __uint_as_float(unit) * E::kUnit;
  }
};

// The scales of N groups of a row, of which the row may have fewer left: zeros then.
template <int N>
DEVICE uint2 load_scales(const unsigned char* at, int left) {
  if (left >= N) return N == 4 ? load_words2(at) : make_uint2(load_word(at), 0);
  u32 v[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < N; i++)
    if (i < left) v[i] = load_stream_u16(at + 2 * i);
  return make_uint2(v[0] | v[1] << 16, v[2] | v[3] << 16);
}

// Codes of one group as the tensor cores take them, from what ldmatrix brings of the rows 0 to 7 and 8 to 15.
struct IntQ4 {
  using Encoded = Q4;
  static constexpr int kGroups = 4;
  // Codes count sixteenths: they lie in the upper halves of bytes, less 8.
  static constexpr float kUnit = 0.0625f;
  DEVICE static void operand(const u32 (&words)[8], int group, u32 (&a)[4]) {
    const u32 upper = words[2 * group], lower = words[2 * group + 1];
    auto centred = [](u32 codes) { return (codes ^ 0x80808080u) & 0xf0f0f0f0u; };
    a[0] = centred(upper << 4);
    a[1] = centred(lower << 4);
    a[2] = centred(upper);
    a[3] = centred(lower);
  }
};
struct IntQ8 {
  using Encoded = Q8;
  static constexpr int kGroups = 2;
  static constexpr float kUnit = 1.0f;
  DEVICE static void operand(const u32 (&words)[8], int group, u32 (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = words[4 * group + i];
  }
};

// Arguments as for gemv_bf16, but columns is a multiple of 32. Any grid of blocks of 8 or 16 warps.
// Dynamic shared memory: 164 bytes for each group, of which there are whole steps (q4 128 columns, q8 64); from the next
// multiple of 16 on 6144 for each warp.
template <class E>
DEVICE void gemv_int(const unsigned char* w, int rows, int columns, const float* x, const float* norm_weight, float eps,
                     float* normed_out, const float* bias, const float* residual, float* out) {
  using namespace int_shape;
  using Encoded = typename E::Encoded;
  __shared__ DividedRows<kRows, kMaxWarps> divided;
  __shared__ float scratch[kWarp];
  let_next_start();

  const int n_groups = columns / 32, steps_of_row = ceil_div(n_groups, E::kGroups);
  const Shares shares(ceil_div(rows, kRows), steps_of_row);
  const u32 stride = row_stride<Encoded>(columns), code_bytes = Encoded::code_bytes(columns);
  const Digits<E> digits(dynamic_shared(), steps_of_row * E::kGroups);
  unsigned char* ring = dynamic_shared() + (steps_of_row * E::kGroups * (kGroupBytes + 4) + 15) / 16 * 16 +
                        warp_id() * (kStages * kStageBytes);

  // A lane copies part lane % 4 of the rows lane / 4 and, 8 and more after that, one more. The scales that it needs are
  // those of the row that it adds up in the end.
  const int lane = lane_id(), copy_row = lane / 4, copy_part = lane % 4;
  const int own_row = lane / 4 + (lane & 2) * 4;
  const int copy_at = 64 * copy_row + 16 * (copy_part ^ (copy_row / 2 & 3)), n_parts_of_row = code_bytes / 16;
  StepCursor ahead = shares.begin();
  const unsigned char *codes_from[2], *scales_from;
  // Past the last row it is that row again: its sums are left out at the end.
  auto find_rows = [&] {
    auto row_at = [&](int row) {
      return w + static_cast<u64>(static_cast<u32>(min(ahead.unit * kRows + row, rows - 1))) * stride;
    };
    const int part = 4 * ahead.in_row + copy_part;
    codes_from[0] = row_at(copy_row) + 16 * part;
    codes_from[1] = row_at(copy_row + 8) + 16 * part;
    scales_from = row_at(own_row) + (code_bytes + 2 * E::kGroups * ahead.in_row);
  };
  if (shares.first_step < shares.last_step) find_rows();
  uint2 scales[kStages];
  auto fetch = [&](int number, int stage, uint2& scale) {
    if (number < shares.last_step) {
      unsigned char* to = ring + stage * kStageBytes + copy_at;
      const int bytes = 4 * ahead.in_row + copy_part < n_parts_of_row ? 16 : 0;
      async_copy16(to, codes_from[0], bytes);
      async_copy16(to + 64 * 8, codes_from[1], bytes);
      scale = load_scales<E::kGroups>(scales_from, n_groups - ahead.in_row * E::kGroups);
      if (ahead.advance()) {
        find_rows();
      } else {
        codes_from[0] += 64;
        codes_from[1] += 64;
        scales_from += 2 * E::kGroups;
      }
    }
    async_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; i++) fetch(shares.first_step + i, i, scales[i]);

  // The vector.
  const int n_parts = steps_of_row * E::kGroups * 8;
  auto part_of = [&](const float* v, int index) {
    return 4 * index < columns ? *reinterpret_cast<const float4*>(v + 4 * index) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  };
  float4 kept[kKept], weights[kKept];
  if (norm_weight != nullptr) {
#pragma unroll
    for (int i = 0; i < kKept; i++) weights[i] = part_of(norm_weight, threadIdx.x + i * blockDim.x);
  }
  wait_for_previous();
#pragma unroll
  for (int i = 0; i < kKept; i++) kept[i] = part_of(x, threadIdx.x + i * blockDim.x);
  float scale = 1.0f;
  if (norm_weight != nullptr) {
    float squares = 0.0f;
    auto add = [&](const float4& v) { squares += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w); };
#pragma unroll
    for (int i = 0; i < kKept; i++) add(kept[i]);
    for (int index = threadIdx.x + kKept * blockDim.x; index < n_parts; index += blockDim.x) add(part_of(x, index));
    scale = 1.0f / sqrtf(block_sum(squares, scratch) / columns + eps);
  }
  auto put = [&](int index, float4 v, const float4& weight) {
    if (norm_weight != nullptr) {
      v = make_float4(v.x * scale * weight.x, v.y * scale * weight.y, v.z * scale * weight.z, v.w * scale * weight.w);
      if (normed_out != nullptr && blockIdx.x == 0 && 4 * index < columns)
        *reinterpret_cast<float4*>(normed_out + 4 * index) = v;
    }
    digits.put(index, v, index < n_parts);
  };
#pragma unroll
  for (int i = 0; i < kKept; i++)
    if (i * static_cast<int>(blockDim.x) < n_parts) put(threadIdx.x + i * blockDim.x, kept[i], weights[i]);
  for (int first = kKept * blockDim.x; first < n_parts; first += blockDim.x) {
    const int index = first + threadIdx.x;
    put(index, part_of(x, index), norm_weight != nullptr ? part_of(norm_weight, index) : kept[0]);
  }
  __syncthreads();

  StepCursor now = shares.begin();
  bool from_first = now.in_row == 0;
  // Of one row, by the lower two digits or, in every second lane, the upper two.
  float sum = 0.0f;
  const RowOutput output = {rows, bias, residual, out};
  auto leave_rows = [&](int unit, bool to_last) {
    float total = lane % 2 == 0 ? sum : sum * 65536.0f;
    total += __shfl_xor_sync(kAllLanes, total, 1);
    if (lane % 2 == 0) divided.leave(output, unit, own_row, total, from_first, to_last);
    sum = 0.0f;
  };
  // ldmatrix takes the address of a row of eight from each lane: rows 0 to 7, then 8 to 15, of one part and the next.
  const int matrix_row = lane % 16, matrix_part = lane / 16;
  const int digit_at = (lane / 4 % 4 * 4 + lane % 4) * 8;
  auto compute = [&](int stage, const uint2& scale) {
    async_wait<kStages - 1>();
    __syncwarp();
    const unsigned char* codes = ring + stage * kStageBytes + 64 * matrix_row;
    u32 words[8];
#pragma unroll
    for (int i = 0; i < 2; i++)
      load_matrices(codes + 16 * ((matrix_part + 2 * i) ^ (matrix_row / 2 & 3)), words[4 * i], words[4 * i + 1],
                    words[4 * i + 2], words[4 * i + 3]);
    const int group = now.in_row * E::kGroups;
#pragma unroll
    for (int g = 0; g < E::kGroups; g++) {
      u32 a[4];
      int c[4] = {0, 0, 0, 0};
      E::operand(words, g, a);
      const uint2 b = *reinterpret_cast<const uint2*>(digits.bytes + (group + g) * kGroupBytes + digit_at);
      multiply_add(a, b, c);
      const int lower = lane & 2 ? c[2] : c[0], upper = lane & 2 ? c[3] : c[1];
      const u32 two = g / 2 == 0 ? scale.x : scale.y;
      const float row_scale = half_to_float(static_cast<u16>(g % 2 == 0 ? two : two >> 16));
      sum += static_cast<float>(upper * 256 + lower) * (row_scale * digits.units[group + g]);
    }
    // Nobody may still read what the next copy overwrites.
    __syncwarp();
    const int unit = now.unit;
    if (now.advance()) {
      leave_rows(unit, true);
      from_first = true;
    }
  };
  for (int number = shares.first_step; number < shares.last_step; number += kStages) {
#pragma unroll
    for (int i = 0; i < kStages; i++) {
      if (number + i >= shares.last_step) break;
      fetch(number + i + kStages - 1, (i + kStages - 1) % kStages, scales[(i + kStages - 1) % kStages]);
      compute(i, scales[i]);
    }
  }
  const bool leaves = shares.first_step < shares.last_step && now.in_row != 0;
  if (leaves) leave_rows(now.unit, false);
  __syncthreads();
  if (leaves && from_first) divided.join(output, shares, now.unit);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    gemv_q8(const unsigned char* w, int rows, int columns, const float* x, const float* norm_weight, float eps,
            float* normed_out, const float* bias, const float* residual, float* out) {
  gemv_int<IntQ8>(w, rows, columns, x, norm_weight, eps, normed_out, bias, residual, out);
}
extern "C" __global__ void __launch_bounds__(512, 1)
    gemv_q4(const unsigned char* w, int rows, int columns, const float* x, const float* norm_weight, float eps,
            float* normed_out, const float* bias, const float* residual, float* out) {
  gemv_int<IntQ4>(w, rows, columns, x, norm_weight, eps, normed_out, bias, residual, out);
}
