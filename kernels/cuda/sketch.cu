// A layer's sketch: copies of all its neurons in two bits, or three of up rows, which lie in device memory. Their gate and up rows tell
// which neurons a token needs, their down rows stand for the others (runtime/src/chooser.rs has the same for the CPU).
//
// A part's rows are taken apart into planes (kernels/src/sketch/planes.rs): branch and first point bits of all rows, 16 bytes
// for each unit of 64 columns; second point bits, 8 bytes a unit; a bfloat16 for each row; a scale code for each unit. So lanes
// that take neighbouring units read whole lines.
//
// Gate and up rows are multiplied in whole numbers: levels are signed bytes, inputs three of them, four columns at a time. That
// keeps of an input what a float does, down to 2^-23 of the largest in its unit.
//
// Floor: the sketch from device memory. Beside bundles that cross the link it is little: the 8 GB of a model of 34 billion
// weights take an H200 as long as 100 MB over its link.
#include "expected.cuh"
#include "reduce.cuh"
#include "trellis.cuh"

namespace sketch_shape {
constexpr u32 kThreads = 256;
constexpr int kColumns = 64;
// Neurons that a team of lanes judges together.
constexpr int kNeurons = 2;
// Down rows that a thread asks for at once.
constexpr u32 kRowsAtOnce = 8;
// Columns of a thread that adds down rows.
constexpr u32 kHalfColumns = kColumns / 2;
// Groups of four columns of which a thread asks for weights and places before the input is there.
constexpr int kEarly = 4;
// Words of a unit's inputs: one for each four columns of a digit, then what one is worth and the sum. Lanes that read the same
// two words of neighbouring units touch every bank once.
constexpr int kDigits = 3, kDigitWords = kColumns / 4, kValueWord = kDigits * kDigitWords, kSumWord = kValueWord + 1;
constexpr int kUnitWords = kSumWord + 1;
// Three signed bytes, and some room for what rounds up.
constexpr float kLargest = 8355000.0f;
}  // namespace sketch_shape

// The layer's input as whole numbers, in the order in which gate and up rows have their columns: the largest of each unit's is
// kLargest.
struct SketchInput {
  u32* words;
  DEVICE SketchInput() { words = reinterpret_cast<u32*>(dynamic_shared()); }

  DEVICE u32* unit(int unit) const { return words + sketch_shape::kUnitWords * unit; }

  // Puts four columns into their place. The lanes of a warp bring neighbouring fours, all 32 of them.
  DEVICE void put(int four, float4 v, bool exists) const {
    using namespace sketch_shape;
    const int unit = four / 16, k = four % 16;
    // The largest of the bits: not a number is larger than anything.
    u32 most = max(max(__float_as_uint(fabsf(v.x)), __float_as_uint(fabsf(v.y))),
                   max(__float_as_uint(fabsf(v.z)), __float_as_uint(fabsf(v.w))));
#pragma unroll
    for (int step = 1; step < 16; step *= 2) most = max(most, __shfl_xor_sync(kAllLanes, most, step));
    const float largest = __uint_as_float(most);
    const bool is_finite = most < 0x7f800000u;
    // Below this all are nothing: the quotient would be infinite.
    const float factor = is_finite && largest > 1e-30f ? kLargest / largest : 0.0f;
    // Signed digits of 256, the lowest first.
    auto digits_of = [](int number) { return (static_cast<u32>(number) + 0x808080u) ^ 0x808080u; };
    const int numbers[4] = {rounded_to_int(v.x * factor), rounded_to_int(v.y * factor), rounded_to_int(v.z * factor),
                            rounded_to_int(v.w * factor)};
    int sum = (numbers[0] + numbers[1]) + (numbers[2] + numbers[3]);
#pragma unroll
    for (int step = 1; step < 16; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (!exists) return;
    u32* const out = this->unit(unit);
    const u32 digits[4] = {digits_of(numbers[0]), digits_of(numbers[1]), digits_of(numbers[2]), digits_of(numbers[3])};
    const u32 low01 = __byte_perm(digits[0], digits[1], 0x5140), low23 = __byte_perm(digits[2], digits[3], 0x5140);
    const u32 high01 = __byte_perm(digits[0], digits[1], 0x0062), high23 = __byte_perm(digits[2], digits[3], 0x0062);
    out[k] = __byte_perm(low01, low23, 0x5410);
    out[kDigitWords + k] = __byte_perm(low01, low23, 0x7632);
    out[2 * kDigitWords + k] = __byte_perm(high01, high23, 0x5410);
    if (k > 0) return;
    out[kValueWord] = is_finite ? __float_as_uint(largest / kLargest) : 0x7fc00000u;
    out[kSumWord] = __float_as_uint(static_cast<float>(sum));
  }

  // Puts RMSNorm(x) (arXiv 1910.07467) here once the previous kernel has written x; the first block also into `from.normed`, all
  // of them together into `from.host_x`, if these are there. `columns` [hidden]: the channel of each column. Ends without a
  // barrier.
  DEVICE void stage(const LayerInput& from, const u32* columns) const {
    using namespace sketch_shape;
    __shared__ float scratch[kWarp];
    const int n_fours = from.hidden / 4;
    auto channels = [&](int four) { return *reinterpret_cast<const uint4*>(columns + 4 * four); };
    auto pick = [&](const float* of, const uint4& c) { return make_float4(of[c.x], of[c.y], of[c.z], of[c.w]); };
    uint4 places[kEarly];
    float4 weights[kEarly];
#pragma unroll
    for (int i = 0; i < kEarly; i++) {
      const int four = i * blockDim.x + threadIdx.x;
      if (four >= n_fours) continue;
      places[i] = channels(four);
      weights[i] = pick(from.norm_weight, places[i]);
    }
    wait_for_previous();
    float squares = 0.0f;
#pragma unroll 4
    for (int four = threadIdx.x; four < n_fours; four += blockDim.x) {
      const float4 v = *reinterpret_cast<const float4*>(from.x + 4 * four);
      squares += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
    }
    const float scale = 1.0f / sqrtf(block_sum(squares, scratch) / from.hidden + from.eps);
    auto norm = [&](int four, const uint4& c, const float4& w) {
      const bool exists = four < n_fours;
      float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (exists) v = pick(from.x, c);
      put(four, make_float4(v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w), exists);
    };
#pragma unroll
    for (int i = 0; i < kEarly; i++)
      if (i * blockDim.x < n_fours) norm(i * blockDim.x + threadIdx.x, places[i], weights[i]);
    for (int first = kEarly * blockDim.x; first < n_fours; first += blockDim.x) {
      const int four = first + threadIdx.x;
      const uint4 c = channels(min(four, n_fours - 1));
      norm(four, c, pick(from.norm_weight, c));
    }
    auto give = [&](float* to, int first, int step) {
      for (int i = first; i < from.hidden; i += step) to[i] = from.x[i] * scale * from.norm_weight[i];
    };
    if (from.normed != nullptr && blockIdx.x == 0) give(from.normed, threadIdx.x, blockDim.x);
    if (from.host_x != nullptr) give(from.host_x, blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);
  }
};

// Rows of a part, as its planes lie.
struct SketchRows {
  // Branch and first point bits; second point bits.
  const unsigned char *low, *high;
  const u16* row_scales;
  const unsigned char* scales;
  u32 units;

  DEVICE SketchRows(const unsigned char* planes, u32 n_rows, u32 units, bool is_of_three) : low(planes), units(units) {
    const u64 n = static_cast<u64>(n_rows) * units;
    high = low + 16 * n;
    row_scales = reinterpret_cast<const u16*>(is_of_three ? high + 8 * n : high);
    scales = reinterpret_cast<const unsigned char*>(row_scales + n_rows);
  }
  DEVICE u64 unit(u32 row, u32 unit) const { return static_cast<u64>(row) * units + unit; }
  DEVICE float row_scale(u32 row) const { return bf16_to_float(row_scales[row]); }
};

// A unit's input; of a unit that is not there, zeros.
struct UnitInput {
  const u32* words;
  float value, sum;
  DEVICE UnitInput(const SketchInput& input, int unit, int units) : words(input.unit(unit < units ? unit : 0)) {
    value = unit < units ? __uint_as_float(words[sketch_shape::kValueWord]) : 0.0f;
    sum = unit < units ? __uint_as_float(words[sketch_shape::kSumWord]) : 0.0f;
  }
  // A digit of columns 8 k to 8 k + 7.
  DEVICE uint2 eight(int digit, int k) const {
    return *reinterpret_cast<const uint2*>(words + sketch_shape::kDigitWords * digit + 2 * k);
  }
};

// What is below the lower half of a unit's branch bits. The team's lanes have neighbouring units; `done` is the upper half of
// the branch bits of the last unit before these, and becomes that of the last of them.
DEVICE u32 below_unit(const LaneTeams& teams, const uint4& low, u32& done) {
  const u32 neighbour = __shfl_up_sync(kAllLanes, low.y, 1);
  const u32 below = trellis::wrapped(low.y, teams.me > 0 ? neighbour : done);
  done = __shfl_sync(kAllLanes, low.y, lane_id() / teams.lanes * teams.lanes + teams.lanes - 1);
  return below;
}

// Half a unit of a row.
template <class Codes>
DEVICE Codes half_unit(const uint4& low, const uint2& highest, u32 below, int half) {
  const trellis::Subsets subsets = half == 0 ? trellis::Subsets(below, low.x) : trellis::Subsets(low.x, low.y);
  return Codes(subsets, half == 0 ? low.z : low.w, half == 0 ? highest.x : highest.y);
}

// Sums of a row's unit, for each digit.
struct DigitSums {
  int of[sketch_shape::kDigits] = {};
  DEVICE void add(const uint2& levels, const uint2 (&x)[sketch_shape::kDigits]) {
#pragma unroll
    for (int d = 0; d < sketch_shape::kDigits; d++) of[d] = dot_bytes(levels.y, x[d].y, dot_bytes(levels.x, x[d].x, of[d]));
  }
  // The product without the row's scales.
  DEVICE float product(const UnitInput& input) const {
    const float bytes = static_cast<float>(of[2]) * 65536.0f + (static_cast<float>(of[1]) * 256.0f + static_cast<float>(of[0]));
    return input.value * (2.0f * bytes + input.sum);
  }
};

// gate, up: planes of `ffn` rows of 64 * units columns, gate's in two bits; neurons [4, ffn]: root mean squares of what the
// gate's and the up row's products miss, lengths of the down columns and of what these miss; columns [64 * units]: the input
// channel of each column of both.
struct Sketch {
  const unsigned char *gate, *up;
  const float* neurons;
  const u32* columns;
};

// If rows of a neuron are read or not, each alone: those of which it costs more than `least` to leave them to the sketch; all three
// of a neuron if any is and `whole` is 1. products [ffn]: gate and up as the sketch has them; null if neurons are read as a whole.
struct RowChoice {
  float2* products;
  float least;
  u32 whole;
};

// scores [ffn]: what leaving a neuron to its sketch is expected to cost, as a length in the layer's output, or the rows that are
// read: a sum of 1 for gate, 2 for up, 4 for down; sketched [ffn]: its activation as the sketch has it. As many lanes as a row has
// units, rounded up to a power of two, take two neurons at a time. Up: the code of up rows.
// Any grid of blocks of 256 threads; dynamic shared memory for the input, 50 words a unit.
template <class Up>
DEVICE void sketch_scores(const Sketch& sketch, const LayerInput& from, int ffn, int activation, float* scores, float* sketched,
                          const RowChoice& rows) {
  using namespace sketch_shape;
  let_next_start();
  const int units = from.hidden / kColumns;
  const SketchRows gates(sketch.gate, ffn, units, false), ups(sketch.up, ffn, units, Up::kIsOfThree);
  const LaneTeams teams(units);

  struct Units {
    uint4 gate[kNeurons], up[kNeurons];
    uint2 highest[kNeurons];
    float gate_scale[kNeurons], up_scale[kNeurons];
  };
  auto fetch = [&](int first, int unit, Units& of) {
#pragma unroll
    for (int i = 0; i < kNeurons; i++) {
      // Past the end it is the last neuron or unit again, of which nothing is then taken.
      const u64 at = gates.unit(min(first + i, ffn - 1), min(unit, units - 1));
      of.gate[i] = load_stream(gates.low + 16 * at);
      of.up[i] = load_stream(ups.low + 16 * at);
      of.highest[i] = Up::kIsOfThree ? load_words2(ups.high + 8 * at) : make_uint2(0, 0);
      of.gate_scale[i] = gates.scales[at];
      of.up_scale[i] = ups.scales[at];
    }
  };
  // As a rule all that a lane needs, asked for before the input is there.
  Units of;
  if (teams.team * kNeurons < ffn) fetch(teams.team * kNeurons, teams.me, of);

  const SketchInput input;
  input.stage(from, sketch.columns);
  __syncthreads();

  // All lanes of a warp take part in its shuffles as long as its first team has work.
  for (int turn = 0; (teams.first_of_warp + turn * teams.n_teams) * kNeurons < ffn; turn++) {
    const int first = (teams.team + turn * teams.n_teams) * kNeurons;
    float sums[2 * kNeurons] = {};
    // The upper half of the branch bits of the last unit that the team has done, gate and up.
    u32 done[2 * kNeurons] = {};
    for (int first_unit = 0; first_unit < units; first_unit += teams.lanes) {
      const int unit = first_unit + teams.me;
      if (turn > 0 || first_unit > 0) fetch(first, unit, of);
      const UnitInput x(input, unit, units);
      u32 below[2 * kNeurons];
#pragma unroll
      for (int i = 0; i < kNeurons; i++) {
        below[2 * i] = below_unit(teams, of.gate[i], done[2 * i]);
        below[2 * i + 1] = below_unit(teams, of.up[i], done[2 * i + 1]);
      }
      DigitSums gate[kNeurons], up[kNeurons];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        trellis::Two gate_codes[kNeurons];
        Up up_codes[kNeurons];
#pragma unroll
        for (int i = 0; i < kNeurons; i++) {
          gate_codes[i] = half_unit<trellis::Two>(of.gate[i], make_uint2(0, 0), below[2 * i], half);
          up_codes[i] = half_unit<Up>(of.up[i], of.highest[i], below[2 * i + 1], half);
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
          const int k = 2 * r + half;
          const uint2 digits[kDigits] = {x.eight(0, k), x.eight(1, k), x.eight(2, k)};
#pragma unroll
          for (int i = 0; i < kNeurons; i++) {
            gate[i].add(gate_codes[i].levels(r), digits);
            up[i].add(up_codes[i].levels(r), digits);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kNeurons; i++) {
        sums[2 * i] += of.gate_scale[i] * gate[i].product(x);
        sums[2 * i + 1] += of.up_scale[i] * up[i].product(x);
      }
    }
    teams.sum(sums);
#pragma unroll
    for (int i = 0; i < kNeurons; i++) {
      const int neuron = first + i;
      if (!teams.finishes(i) || neuron >= ffn) continue;
      const float gate = sums[2 * i] * gates.row_scale(neuron);
      const float up = sums[2 * i + 1] * ups.row_scale(neuron);
      const float gate_sd = sketch.neurons[neuron], up_sd = sketch.neurons[ffn + neuron];
      const float down = sketch.neurons[2 * ffn + neuron], down_error = sketch.neurons[3 * ffn + neuron];
      const float h = activate(activation, gate, up);
      if (rows.products != nullptr) {
        const RowCosts costs = row_costs(activation, gate, up, gate_sd, up_sd, down, down_error);
        const float limit = rows.least * rows.least;
        // What is not a number is read, and of a neuron whose products say nothing everything.
        u32 mask = !(costs.gate <= limit) ? 1 : 0;
        if (!(costs.up <= limit)) mask |= 2;
        if (!(costs.down <= limit)) mask |= 4;
        const bool is_known = fabsf(gate) < 3.0e38f && fabsf(up) < 3.0e38f;
        if (!is_known || (rows.whole && mask != 0)) mask = 7;
        scores[neuron] = static_cast<float>(mask);
        sketched[neuron] = fabsf(h) < 3.0e38f ? h : 0.0f;
        rows.products[neuron] = make_float2(gate, up);
        continue;
      }
      const float of_h = expected_square_error(activation, gate, up, gate_sd, up_sd) * (down * down);
      const float cost = sqrtf(of_h + h * h * (down_error * down_error));
      // A neuron of which nothing can be said costs accuracy, never a crash.
      const bool is_known = cost >= 0.0f && fabsf(h) < 3.0e38f;
      scores[neuron] = is_known ? cost : 0.0f;
      sketched[neuron] = is_known ? h : 0.0f;
    }
  }
}

#define SKETCH_SCORES(name, Up)                                                                                              \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                                       \
      sketch_scores_##name(Sketch sketch, LayerInput from, int ffn, int activation, float* scores, float* sketched,          \
                           RowChoice rows) {                                                                                 \
    sketch_scores<Up>(sketch, from, ffn, activation, scores, sketched, rows);                                                \
  }
SKETCH_SCORES(two, trellis::Two)
SKETCH_SCORES(three, trellis::Three)
#undef SKETCH_SCORES

// partial [n_blocks, hidden]: row b is the sum of h d of its neurons, with h from `sketched` and d from `down`, planes of `ffn` rows
// in two bits; a row of which h is zero is not read.
// Grid (n_blocks, columns / 8192, rounded up), 256 threads. A thread has the 32 columns of a half word; if a block's columns have
// at most 128 of these, several groups of warps share its neurons. Dynamic shared memory: a float for each neuron of a block, or
// 32 for each thread if that is more.
extern "C" __global__ void __launch_bounds__(256, 2)
    add_sketched(const unsigned char* down, const float* sketched, int ffn, int hidden, float* partial) {
  using namespace sketch_shape;
  let_next_start();
  const u32 units = hidden / kColumns, n_halves = 2 * units;
  const SketchRows rows(down, ffn, units, false);
  const u32 n_neurons = ceil_div(ffn, gridDim.x), begin = blockIdx.x * n_neurons;
  const u32 n_mine = begin < static_cast<u32>(ffn) ? min(n_neurons, ffn - begin) : 0;
  const u32 first_half = blockIdx.y * kThreads, halves = min(n_halves - first_half, kThreads);
  // Whole warps, so that a warp leaves out rows together.
  const u32 group_threads = (halves + kWarp - 1) / kWarp * kWarp, n_groups = kThreads / group_threads;
  const u32 group = threadIdx.x / group_threads, half = first_half + threadIdx.x % group_threads;
  const u32 unit = half / 2;
  const bool has_work = group < n_groups && half < n_halves, is_upper = half % 2 > 0;
  float* const factors = reinterpret_cast<float*>(dynamic_shared());

  wait_for_previous();
  for (u32 i = threadIdx.x; i < n_mine; i += kThreads) {
    const float h = sketched[begin + i], scale = rows.row_scale(begin + i);
    factors[i] = h == 0.0f ? 0.0f : h * scale;
  }
  __syncthreads();

  // Levels as bytes from 0 to 255, used where they lie in their word, at the powers of two that this takes; and the sum of the
  // factors, for the middle of the levels. Columns: 16 r + 8 half + i at 8 r + i.
  float sums[kHalfColumns] = {}, middle = 0.0f;
  for (u32 first = group; has_work && first < n_mine; first += kRowsAtOnce * n_groups) {
    uint2 branches[kRowsAtOnce];
    u32 points[kRowsAtOnce], before[kRowsAtOnce];
    float scales[kRowsAtOnce];
#pragma unroll
    for (u32 r = 0; r < kRowsAtOnce; r++) {
      const u32 row = first + r * n_groups;
      const float factor = row < n_mine ? factors[row] : 0.0f;
      branches[r] = make_uint2(0, 0);
      points[r] = before[r] = 0;
      scales[r] = 0.0f;
      if (factor == 0.0f) continue;
      const u64 at = rows.unit(begin + row, unit);
      const unsigned char* const codes = rows.low + 16 * at;
      branches[r] = load_words2(codes);
      points[r] = load_word(codes + (is_upper ? 12 : 8));
      if (!is_upper && unit > 0) before[r] = load_word(codes - 12);
      scales[r] = factor * rows.scales[at];
    }
#pragma unroll
    for (u32 r = 0; r < kRowsAtOnce; r++) {
      middle += scales[r];
      const float scale = scales[r] * kSmallIntegerIn;
      const u32 below = is_upper ? branches[r].x : trellis::wrapped(branches[r].y, before[r]);
      const trellis::Two codes(trellis::Subsets(below, is_upper ? branches[r].y : branches[r].x), points[r]);
#pragma unroll
      for (int stripe = 0; stripe < 4; stripe++) {
        const uint2 levels = codes.levels(stripe);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const u32 four = (i < 4 ? levels.x : levels.y) ^ 0x80808080u;
          sums[8 * stripe + i] += scale * small_integer(i % 4 < 3 ? four & 0xffu << 8 * (i % 4) : four >> 24);
        }
      }
    }
  }
#pragma unroll
  for (u32 i = 0; i < kHalfColumns; i++) {
    const float place = i % 4 == 1 ? 0x1p-8f : i % 4 == 2 ? 0x1p-16f : 1.0f;
    // A level is twice its byte, less 255.
    sums[i] = 2.0f * (sums[i] * (kSmallIntegerOut * place)) - 255.0f * middle;
  }
  if (n_groups > 1) {
    float* const shared = factors;
    __syncthreads();
    if (has_work && group > 0)
#pragma unroll
      for (u32 i = 0; i < kHalfColumns; i++) shared[i * kThreads + threadIdx.x] = sums[i];
    __syncthreads();
    if (group > 0) return;
    for (u32 other = 1; has_work && other < n_groups; other++)
#pragma unroll
      for (u32 i = 0; i < kHalfColumns; i++) sums[i] += shared[i * kThreads + other * group_threads + threadIdx.x];
  }
  if (!has_work) return;
  float* const out = partial + static_cast<u64>(blockIdx.x) * hidden + unit * kColumns + half % 2 * 8;
#pragma unroll
  for (int k = 0; k < 8; k++)
    *reinterpret_cast<float4*>(out + k / 2 * 16 + k % 2 * 4) =
        make_float4(sums[4 * k], sums[4 * k + 1], sums[4 * k + 2], sums[4 * k + 3]);
}
