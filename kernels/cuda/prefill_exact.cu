// Rows with streams or a coarse plane, taken apart for the matrix products of a prompt: see prefill.cu. Of exact rows
// the upper half is the bfloat16 itself, whatever its bits, and the lower one is zero.
//
// Floor: what is written, 4 bytes a weight. A warp decodes one or two segments of 1024 columns in place; every block of
// 64 columns is two lines of 128 bytes.
#include "exact.cuh"

template <class E>
constexpr bool kGivesBits = true;
template <>
constexpr bool kGivesBits<Q4Plus> = false;

// Decodes the segments of row `which` that a warp has together, those of number `part`. hi, lo: the row's [columns].
template <class E>
DEVICE void unpack_segments(const Planes<E>& planes, const unsigned char* base, u32 which, u32 part, u16* hi, u16* lo) {
  using namespace exact_shape;
  const u32 first = part * kTogether<E>, segment = first + segment_of_warp<E>();
  SegmentDecoder<E, false> decoder(planes, base, which, segment);
  const u32 last_block = blocks_of(columns_of(planes.columns, first));
#pragma unroll 1
  for (u32 block = 0; block < last_block; block++) {
    const LaneValues<E> w = decoder.next(block);
    const u32 column = segment * kSegment + block * kBlock + E::kLaneColumns * segment_lane<E>();
#pragma unroll
    for (u32 i = 0; i < E::kLaneColumns; i += 2) {
      u16 high[2], low[2] = {0, 0};
#pragma unroll
      for (u32 k = 0; k < 2; k++) {
        high[k] = static_cast<u16>(__float_as_uint(w.v[i + k]) >> 16);
        if (!kGivesBits<E>) split_value(w.v[i + k], k, high, low);
      }
      const u32 at = column + i;
      if (planes.columns % 2 == 0) {
        if (at >= planes.columns) continue;
        *reinterpret_cast<u32*>(hi + at) = high[0] | static_cast<u32>(high[1]) << 16;
        *reinterpret_cast<u32*>(lo + at) = low[0] | static_cast<u32>(low[1]) << 16;
      } else {
#pragma unroll
        for (u32 k = 0; k < 2; k++) {
          if (at + k >= planes.columns) continue;
          hi[at + k] = high[k];
          lo[at + k] = low[k];
        }
      }
    }
  }
}

// A block of 256 threads for each row or bundle; any grid works. Its warps take segments in turn.
template <class E>
DEVICE void unpack_exact_rows(const unsigned char* rows, int n, int columns, u64 stride, u16* hi, u16* lo) {
  const Planes<E> planes(columns, 1, static_cast<u32>(stride));
  for (int r = blockIdx.x; r < n; r += gridDim.x) {
    const u64 at = static_cast<u64>(r) * columns;
    for (u32 part = warp_id(); part < warps_of<E>(planes.segments); part += blockDim.x / kWarp)
      unpack_segments<E>(planes, rows + r * stride, 0, part, hi + at, lo + at);
  }
}

template <class E>
DEVICE void unpack_exact_bundles(const unsigned char* bundles, int n, int bundle_bytes, int hidden, u16* const (&hi)[3],
                                 u16* const (&lo)[3]) {
  const Planes<E> planes(hidden, 3, bundle_bytes);
  for (int i = blockIdx.x; i < n; i += gridDim.x) {
    const unsigned char* bundle = bundles + static_cast<u64>(i) * static_cast<u32>(bundle_bytes);
    const u64 at = static_cast<u64>(i) * hidden;
    for (u32 entry = warp_id(); entry < 3 * warps_of<E>(planes.segments); entry += blockDim.x / kWarp) {
      const u32 which = entry / warps_of<E>(planes.segments);
      u16* high = which == 0 ? hi[0] : which == 1 ? hi[1] : hi[2];
      u16* low = which == 0 ? lo[0] : which == 1 ? lo[1] : lo[2];
      unpack_segments<E>(planes, bundle, which, entry % warps_of<E>(planes.segments), high + at, low + at);
    }
  }
}

// tokens [n]; table: rows `stride` bytes apart; x [n, columns].
template <class E>
DEVICE void embed_exact_rows(const u32* tokens, int n, const unsigned char* table, int columns, u64 stride, float* x) {
  const u32 n_parts = warps_of<E>(segments_of(columns));
  for (int t = blockIdx.x; t < n; t += gridDim.x)
    for (u32 part = warp_id(); part < n_parts; part += blockDim.x / kWarp)
      decode_row<E>(table + tokens[t] * stride, columns, static_cast<u32>(stride), part,
                    x + static_cast<u64>(t) * columns);
}

#define PREFILL_EXACT_KERNELS(name, E)                                                                                 \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                                 \
      embed_rows_##name(const u32* tokens, int n, const unsigned char* table, int columns, float* x, u64 stride) {     \
    embed_exact_rows<E>(tokens, n, table, columns, stride, x);                                                         \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                                 \
      unpack_rows_##name(const unsigned char* rows, int n, int columns, u64 stride, u16* hi, u16* lo) {                \
    unpack_exact_rows<E>(rows, n, columns, stride, hi, lo);                                                            \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                                 \
      unpack_bundles_##name(const unsigned char* bundles, int n, int bundle_bytes, int hidden, u16* gate_hi,           \
                            u16* gate_lo, u16* up_hi, u16* up_lo, u16* down_hi, u16* down_lo) {                        \
    unpack_exact_bundles<E>(bundles, n, bundle_bytes, hidden, {gate_hi, up_hi, down_hi}, {gate_lo, up_lo, down_lo});   \
  }
PREFILL_EXACT_KERNELS(bf16x, Bf16x)
PREFILL_EXACT_KERNELS(q4plus, Q4Plus)
PREFILL_EXACT_KERNELS(q4exact, Q4Exact)
PREFILL_EXACT_KERNELS(q8exact, Q8Exact)
#undef PREFILL_EXACT_KERNELS
