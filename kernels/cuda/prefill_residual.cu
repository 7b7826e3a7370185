// Neurons of which only what a sketch leaves is stored, taken apart for the matrix products of a prompt: see prefill.cu. A
// weight is the sketch's and the residual one, added up as floats and then split.
//
// Floor: what is written, 4 bytes a weight. A row of the sketch is decoded into shared memory first: its gate and up rows have
// their columns in an order of their own, and half a unit's bits come out as 32 columns.
#include "input.cuh"
#include "trellis.cuh"

// Parts of a sketch as their planes lie, of `n_rows` rows each; columns [hidden]: the channel of each column of gate and up
// rows, those of down rows are in order. first: the row of the first bundle's neuron.
struct UnderResidual {
  const unsigned char *gate, *up, *down;
  const u32* columns;
  u32 n_rows, first;
};

// Puts row `row` into `to`, channel by channel; `columns` is null if they are in order. Ends without a barrier.
template <class Codes>
DEVICE void stage_sketched(const SketchRows& rows, u32 row, const u32* columns, const Input<R4>& to) {
  const float row_scale = rows.row_scale(row);
  for (u32 i = threadIdx.x; i < 2 * rows.units; i += blockDim.x) {
    const u32 unit = i / 2, half = i % 2;
    const u64 at = rows.unit(row, unit);
    const unsigned char* const code_bytes = rows.low + 16 * at;
    const uint4 low = load_stream(code_bytes);
    const uint2 highest = Codes::kIsOfThree ? load_words2(rows.high + 8 * at) : make_uint2(0, 0);
    const u32 below = trellis::wrapped(low.y, unit > 0 ? load_word(code_bytes - 12) : 0);
    const Codes codes = half_unit<Codes>(low, highest, below, half);
    const float scale = row_scale * rows.scales[at];
    // Levels are one more than twice a signed byte.
    auto value = [&](u32 four, int byte) {
      return scale * static_cast<float>(2 * static_cast<signed char>(four >> 8 * byte) + 1);
    };
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const uint2 levels = codes.levels(r);
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const u32 four = k == 0 ? levels.x : levels.y, first = 64 * unit + 16 * r + 8 * half + 4 * k;
        if (columns != nullptr) {
          const uint4 channels = *reinterpret_cast<const uint4*>(columns + first);
          to.value(channels.x) = value(four, 0);
          to.value(channels.y) = value(four, 1);
          to.value(channels.z) = value(four, 2);
          to.value(channels.w) = value(four, 3);
        } else {
          to.part(first / 4) = make_float4(value(four, 0), value(four, 1), value(four, 2), value(four, 3));
        }
      }
    }
  }
}

// bundles: n of `bundle_bytes`; the outputs [n, hidden] each. Dynamic shared memory: as gemv, with `hidden` columns. Up: the code of
// the sketch's up rows.
template <class Up>
DEVICE void unpack_residuals(const unsigned char* bundles, int n, int bundle_bytes, int hidden, u16* gate_hi, u16* gate_lo,
                             u16* up_hi, u16* up_lo, u16* down_hi, u16* down_lo, const UnderResidual& under) {
  const u32 units = hidden / 64;
  const SketchRows gates(under.gate, under.n_rows, units, false), ups(under.up, under.n_rows, units, Up::kIsOfThree);
  const SketchRows downs(under.down, under.n_rows, units, false);
  const Input<R4> sketch;
  for (int i = blockIdx.x; i < n; i += gridDim.x) {
    const unsigned char* bundle = bundles + static_cast<u64>(i) * static_cast<u32>(bundle_bytes);
    const u64 at = static_cast<u64>(i) * hidden;
    auto add = [&](u32 which, u16* hi, u16* lo) {
      const Row<R4> row = bundle_row<R4>(bundle, hidden, which);
      __syncthreads();
      for (int part = threadIdx.x; 4 * part < hidden; part += blockDim.x) {
        const int chunk = 4 * part / R4::kColumns, k = part % Input<R4>::kParts;
        const float4 residual = weights<R4>(row.load_codes(chunk), scale_value<R4>(row.load_scale(chunk)), k);
        float4 v = sketch.part(part);
        v = make_float4(v.x + residual.x, v.y + residual.y, v.z + residual.z, v.w + residual.w);
        split_four(v, hidden, part, hi + at, lo + at);
      }
      // The place of the next row.
      __syncthreads();
    };
    stage_sketched<trellis::Two>(gates, under.first + i, under.columns, sketch);
    add(0, gate_hi, gate_lo);
    stage_sketched<Up>(ups, under.first + i, under.columns, sketch);
    add(1, up_hi, up_lo);
    stage_sketched<trellis::Two>(downs, under.first + i, nullptr, sketch);
    add(2, down_hi, down_lo);
  }
}

#define UNPACK_RESIDUALS(name, Up)                                                                                           \
  extern "C" __global__ void __launch_bounds__(256)                                                                          \
      unpack_bundles_r4_##name(const unsigned char* bundles, int n, int bundle_bytes, int hidden, u16* gate_hi,              \
                               u16* gate_lo, u16* up_hi, u16* up_lo, u16* down_hi, u16* down_lo, UnderResidual under) {      \
    unpack_residuals<Up>(bundles, n, bundle_bytes, hidden, gate_hi, gate_lo, up_hi, up_lo, down_hi, down_lo, under);         \
  }
UNPACK_RESIDUALS(two, trellis::Two)
UNPACK_RESIDUALS(three, trellis::Three)
#undef UNPACK_RESIDUALS
