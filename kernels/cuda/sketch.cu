// A layer's sketch: copies of all its neurons in two and three bits, which lie in device memory. Their gate and up rows tell
// which neurons a token needs, their down rows stand for the others (runtime/src/chooser.rs has the same for the CPU).
//
// A part's rows are taken apart into planes (kernels/src/sketch/planes.rs): the lower two bits of all rows' codes, 16 bytes
// for each unit of 64 columns; third bits, 8 bytes a unit; a bfloat16 for each row; a scale code for each unit. So lanes that
// take neighbouring units read whole lines.
//
// Floor: the sketch from device memory. Beside bundles that cross the link it is little: the 8 GB of a model of 34 billion
// weights take an H200 as long as 100 MB over its link.
#include "expected.cuh"
#include "input.cuh"

// The lower two bits of a unit are a chunk of sixteen bytes. Codes are used where they lie in their word, as those of q4
// (decode.cuh), but for the middle of the levels: start() is what a middle of 1 gives.
struct SketchUnit {
  static constexpr int kColumns = 64;
  static constexpr float kBias = 1.0f;
  static constexpr float kIn = kSmallIntegerIn;
  static constexpr float kOut = kSmallIntegerOut;

  // Byte i of a unit holds columns i, 16 + i, 32 + i and 48 + i. A float takes integers of 24 bits: the upper bytes move down.
  DEVICE static constexpr int bit(int column) { return (column % 4 > 0 ? 8 : 0) + column / 16 * 2; }
  DEVICE static u32 moved(u32 word, int column) {
    return column % 4 < 2 ? word : column % 4 == 2 ? word >> 8 : word >> 16;
  }
  DEVICE static float factor(int column) {
    const int stripe = column % kColumns / 16;
    const float of_stripe = stripe == 0 ? 1.0f : stripe == 1 ? 0.25f : stripe == 2 ? 0.0625f : 0.015625f;
    return column % 4 > 0 ? of_stripe * 0x1p-8f : of_stripe;
  }

  // Columns 4 k to 4 k + 3, for k known at compile time; in two bits `high` is zeros.
  DEVICE static float4 four(const uint4& low, const uint2& high, int k) {
    const u32 w = word(low, k % 4), thirds = k < 8 ? high.x : high.y;
    auto code = [&](int j) {
      const int column = 4 * k + j, to = bit(column), third = column % 32;
      const u32 upper = third < to + 2 ? thirds << (to + 2 - third) : thirds >> (third - to - 2);
      return small_integer((moved(w, column) & 3u << to) | (upper & 4u << to));
    };
    return make_float4(code(0), code(1), code(2), code(3));
  }
};

// Rows of a part, as its planes lie.
struct SketchRows {
  const unsigned char *low, *high;
  const u16* row_scales;
  const unsigned char* scales;
  u32 units;

  DEVICE SketchRows(const unsigned char* planes, u32 n_rows, u32 units, bool has_thirds) : low(planes), units(units) {
    const u64 n = static_cast<u64>(n_rows) * units;
    high = low + 16 * n;
    row_scales = reinterpret_cast<const u16*>(has_thirds ? high + 8 * n : high);
    scales = reinterpret_cast<const unsigned char*>(row_scales + n_rows);
  }
  DEVICE u64 unit(u32 row, u32 unit) const { return static_cast<u64>(row) * units + unit; }
  DEVICE float row_scale(u32 row) const { return bf16_to_float(row_scales[row]); }
};

namespace sketch_shape {
constexpr u32 kThreads = 256;
// Neurons that a team of lanes judges together.
constexpr int kNeurons = 2;
// Down rows that a thread asks for at once.
constexpr u32 kRowsAtOnce = 8;
// The middles of four and of eight levels.
constexpr float kMiddleOfFour = 1.5f, kMiddleOfEight = 3.5f;
}  // namespace sketch_shape

// gate, up: planes of `ffn` rows of 64 * units columns, in two and three bits; neurons [4, ffn]: root mean squares of what the
// gate's and the up row's products miss, lengths of the down columns and of what these miss.
struct Sketch {
  const unsigned char *gate, *up;
  const float* neurons;
};

// scores [ffn]: what leaving a neuron to its sketch is expected to cost, as a length in the layer's output; sketched [ffn]: its
// activation as the sketch has it. As many lanes as a row has units, rounded up to a power of two, take two neurons at a time.
// Any grid of blocks of 256 threads; dynamic shared memory for the input, 17 float4 a unit.
extern "C" __global__ void __launch_bounds__(256, 2)
    sketch_scores(Sketch sketch, LayerInput from, int ffn, int activation, float* scores, float* sketched) {
  using namespace sketch_shape;
  let_next_start();
  const int units = from.hidden / SketchUnit::kColumns;
  const SketchRows gates(sketch.gate, ffn, units, false), ups(sketch.up, ffn, units, true);
  const LaneTeams teams(units);
  const int thread = blockIdx.x * blockDim.x + threadIdx.x, n_threads = gridDim.x * blockDim.x;

  struct Units {
    uint4 gate[kNeurons], up[kNeurons];
    uint2 thirds[kNeurons];
    float gate_scale[kNeurons], up_scale[kNeurons];
  };
  auto fetch = [&](int first, int unit, Units& of) {
#pragma unroll
    for (int i = 0; i < kNeurons; i++) {
      // Past the end it is the last neuron again, whose score is then left out.
      const u64 at = gates.unit(min(first + i, ffn - 1), unit);
      of.gate[i] = load_stream(gates.low + 16 * at);
      of.up[i] = load_stream(ups.low + 16 * at);
      of.thirds[i] = load_words2(ups.high + 8 * at);
      of.gate_scale[i] = gates.scales[at];
      of.up_scale[i] = ups.scales[at];
    }
  };
  // As a rule all that a lane needs, asked for before the input is there.
  Units of;
  if (teams.me < units && teams.team * kNeurons < ffn) fetch(teams.team * kNeurons, teams.me, of);

  const Input<SketchUnit> input;
  input.stage_normed(from.x, from.norm_weight, from.eps, from.hidden, from.normed);
  __syncthreads();
  if (from.host_x != nullptr)
    for (int i = thread; i < from.hidden; i += n_threads) {
      const float4 v = input.part(i / 4);
      const float x = i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
      // By powers of two.
      from.host_x[i] = x * (1.0f / SketchUnit::kIn) * (1.0f / SketchUnit::factor(i));
    }

  // All teams of a warp take part in its shuffles as long as the first of them has work.
  for (int turn = 0; (teams.first_of_warp + turn * teams.n_teams) * kNeurons < ffn; turn++) {
    const int first = (teams.team + turn * teams.n_teams) * kNeurons;
    float sums[2 * kNeurons] = {};
    for (int unit = teams.me; unit < units; unit += teams.lanes) {
      if (turn > 0 || unit > teams.me) fetch(first, unit, of);
      const float start = input.start(unit);
      float gate[kNeurons], up[kNeurons];
#pragma unroll
      for (int i = 0; i < kNeurons; i++) {
        gate[i] = kMiddleOfFour * start;
        up[i] = kMiddleOfEight * start;
      }
#pragma unroll
      for (int k = 0; k < SketchUnit::kColumns / 4; k++) {
        const float4 x = input.part(unit, k);
#pragma unroll
        for (int i = 0; i < kNeurons; i++) {
          const float4 g = SketchUnit::four(of.gate[i], make_uint2(0, 0), k);
          const float4 u = SketchUnit::four(of.up[i], of.thirds[i], k);
          gate[i] += g.x * x.x;
          gate[i] += g.y * x.y;
          gate[i] += g.z * x.z;
          gate[i] += g.w * x.w;
          up[i] += u.x * x.x;
          up[i] += u.y * x.y;
          up[i] += u.z * x.z;
          up[i] += u.w * x.w;
        }
      }
#pragma unroll
      for (int i = 0; i < kNeurons; i++) {
        sums[2 * i] += of.gate_scale[i] * gate[i];
        sums[2 * i + 1] += of.up_scale[i] * up[i];
      }
    }
    teams.sum(sums);
#pragma unroll
    for (int i = 0; i < kNeurons; i++) {
      const int neuron = first + i;
      if (!teams.finishes(i) || neuron >= ffn) continue;
      const float gate = sums[2 * i] * SketchUnit::kOut * gates.row_scale(neuron);
      const float up = sums[2 * i + 1] * SketchUnit::kOut * ups.row_scale(neuron);
      const float gate_sd = sketch.neurons[neuron], up_sd = sketch.neurons[ffn + neuron];
      const float down = sketch.neurons[2 * ffn + neuron], down_error = sketch.neurons[3 * ffn + neuron];
      const float h = activate(activation, gate, up);
      const float of_h = expected_square_error(activation, gate, up, gate_sd, up_sd) * (down * down);
      const float cost = sqrtf(of_h + h * h * (down_error * down_error));
      // A neuron of which nothing can be said costs accuracy, never a crash.
      const bool is_known = cost >= 0.0f && fabsf(h) < 3.0e38f;
      scores[neuron] = is_known ? cost : 0.0f;
      sketched[neuron] = is_known ? h : 0.0f;
    }
  }
}

// partial [n_blocks, hidden]: row b is the sum of h d of its neurons but for the active ones, with h from `sketched` and d from
// `down`, planes of `ffn` rows in two bits; active are the first counts[5] of `ids`, ascending, of which the first `first`, before
// those that the sketch has, are all neurons up to there.
// Grid (n_blocks, columns / 4096, rounded up), 256 threads. A thread has the sixteen columns of a word; if a block's columns have
// at most 128 words, several groups of warps share its neurons. Dynamic shared memory: a float for each neuron of a block, or
// 16 for each thread if that is more.
extern "C" __global__ void __launch_bounds__(256, 2)
    add_sketched(const unsigned char* down, const float* sketched, const u32* ids, const u32* counts, u32 first, int ffn,
                 int hidden, float* partial) {
  using namespace sketch_shape;
  let_next_start();
  const u32 units = hidden / SketchUnit::kColumns, n_words = 4 * units;
  const SketchRows rows(down, ffn, units, false);
  const u32 n_neurons = ceil_div(ffn, gridDim.x), begin = blockIdx.x * n_neurons;
  const u32 n_mine = begin < static_cast<u32>(ffn) ? min(n_neurons, ffn - begin) : 0;
  const u32 first_word = blockIdx.y * kThreads, words = min(n_words - first_word, kThreads);
  // Whole warps, so that a warp leaves out what is active together.
  const u32 group_threads = (words + kWarp - 1) / kWarp * kWarp, n_groups = kThreads / group_threads;
  const u32 group = threadIdx.x / group_threads, word = first_word + threadIdx.x % group_threads;
  const bool has_work = group < n_groups && word < n_words;
  float* const factors = reinterpret_cast<float*>(dynamic_shared());

  wait_for_previous();
  for (u32 i = threadIdx.x; i < n_mine; i += kThreads) factors[i] = sketched[begin + i] * rows.row_scale(begin + i);
  __syncthreads();
  const u32 n_active = counts[5];
#pragma unroll 4
  for (u32 i = first + threadIdx.x; i < n_active; i += kThreads) {
    const u32 place = ids[i] - first - begin;
    if (place < n_mine) factors[place] = 0.0f;
  }
  __syncthreads();

  // At the powers of two of SketchUnit, and the sum of the factors for the middle of the levels.
  float sums[16] = {}, middle = 0.0f;
  for (u32 first = group; has_work && first < n_mine; first += kRowsAtOnce * n_groups) {
    u32 codes[kRowsAtOnce];
    float scales[kRowsAtOnce];
#pragma unroll
    for (u32 r = 0; r < kRowsAtOnce; r++) {
      const u32 row = first + r * n_groups;
      const float factor = row < n_mine ? factors[row] : 0.0f;
      codes[r] = 0;
      scales[r] = 0.0f;
      if (factor == 0.0f) continue;
      const u64 at = rows.unit(begin + row, word / 4);
      codes[r] = load_word(rows.low + 16 * at + 4 * (word % 4));
      scales[r] = factor * rows.scales[at];
    }
#pragma unroll
    for (u32 r = 0; r < kRowsAtOnce; r++) {
      middle += scales[r];
      const float scale = scales[r] * SketchUnit::kIn;
#pragma unroll
      for (int i = 0; i < 16; i++) {
        const int column = i / 4 * 16 + i % 4;
        sums[i] += scale * small_integer(SketchUnit::moved(codes[r], column) & 3u << SketchUnit::bit(column));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 16; i++)
    sums[i] = sums[i] * SketchUnit::kOut * SketchUnit::factor(i / 4 * 16 + i % 4) - kMiddleOfFour * middle;
  if (n_groups > 1) {
    float* const shared = factors;
    __syncthreads();
    if (has_work && group > 0)
#pragma unroll
      for (int i = 0; i < 16; i++) shared[i * kThreads + threadIdx.x] = sums[i];
    __syncthreads();
    if (group > 0) return;
    for (u32 other = 1; has_work && other < n_groups; other++)
#pragma unroll
      for (int i = 0; i < 16; i++) sums[i] += shared[i * kThreads + other * group_threads + threadIdx.x];
  }
  if (!has_work) return;
  float* const out = partial + static_cast<u64>(blockIdx.x) * hidden + word / 4 * SketchUnit::kColumns + word % 4 * 4;
#pragma unroll
  for (int k = 0; k < 4; k++)
    *reinterpret_cast<float4*>(out + 16 * k) = make_float4(sums[4 * k], sums[4 * k + 1], sums[4 * k + 2], sums[4 * k + 3]);
}
