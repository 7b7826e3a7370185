// The fused feed-forward layer: active neurons, one bundle at a time, from wherever each lies.
//
//     partial[block] = sum over the block's neurons of h * down,  h = act(gate . x, up . x)
//
// Floor: the bundles' bytes, over the link for those that are read in place from pinned host memory (51 GB/s measured),
// from device memory for the others (4470 GB/s).
//
// - A thread owns the same columns of every neuron: its outputs stay in registers from the first neuron to the last; a
//   row is one 16-byte load. x lies in shared memory; what is read of it serves the gate and the up row.
// - All three rows of the next neuron are on their way while this one is computed: 27 KB a block at hidden 8192 in q4.
// - The link needs few bytes in flight and much time; a quarter of the teams reads it while the others compute with
//   what is in device memory, so that the shorter of the two costs nothing.
// - Nothing depends on which block is faster: the same work gives the same bits.
//
// ffn_rows reads of each bundle only the rows that its item names (rows_of_item): the product of a gate or up row that is not
// read is the sketch's; where the down row is not, the activation goes to the sketch, which has a down row for it. Residual rows
// (r4) are what the sketch leaves of a row: their products are added to the sketch's, and the activation always goes there.
#include "input.cuh"

namespace ffn_shape {
constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / kWarp;
// Where an item's bundle lies: both together say that it was fetched.
constexpr u32 kSlot = 0x80000000u;
constexpr u32 kCold = 0x40000000u;
constexpr u32 kLine = 128;

// Threads that compute a neuron together. Up to 128 a power of two, and a block of 256 threads holds several teams;
// else the team is the block.
template <class E>
DEVICE int team_threads(int hidden) {
  const int warps = ceil_div(hidden / E::kColumns, kWarp);
  return (warps > kMaxWarps ? kMaxWarps : warps == 3 ? 4 : warps) * kWarp;
}
}  // namespace ffn_shape

DEVICE float activate(int activation, float gate, float up) {
  if (activation == 0) return gate * reciprocal(1.0f + expf(-gate)) * up;
  return fmaxf(gate, 0.0f) * (activation == 1 ? up : fmaxf(up, 0.0f));
}

// What one thread holds of one row: N chunks, a team's width apart.
template <class E, int N>
struct Chunks {
  uint4 codes[N];
  u16 scales[N];

  DEVICE void fetch(const Row<E>& row, u32 first, u32 step, u32 n_chunks) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      const u32 chunk = first + i * step;
      if (chunk < n_chunks) {
        codes[i] = row.load_codes(chunk);
        scales[i] = row.load_scale(chunk);
      }
    }
  }

  DEVICE void store(unsigned char* bundle, u32 hidden, u32 which, u32 first, u32 step, u32 n_chunks) const {
    const Row<E> row = bundle_row<E>(bundle, hidden, which);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const u32 chunk = first + i * step;
      if (chunk < n_chunks) {
        *reinterpret_cast<uint4*>(bundle + (row.codes + 16 * chunk)) = codes[i];
        if (E::kScaled) *reinterpret_cast<u16*>(bundle + (row.scales + Row<E>::scale_at(chunk))) = scales[i];
      }
    }
  }
};

// Which rows of a neuron are read, and its place in what the sketch has: in one register.
struct RowsRead {
  u32 bits;

  RowsRead() = default;
  DEVICE RowsRead(u32 place, u32 mask) : bits(place << 3 | mask) {}
  DEVICE bool gate() const { return (bits & 1) != 0; }
  DEVICE bool up() const { return (bits & 2) != 0; }
  DEVICE bool down() const { return (bits & 4) != 0; }
  DEVICE u32 place() const { return bits >> 3; }
};

// One neuron: its rows, and the cache slot that is to be filled with it.
template <class E, int N>
struct Neuron {
  Chunks<E, N> gate, up, down;
  u32 to;
  // With rows, instead of a slot.
  RowsRead read;
  float2 known;
};

struct FfnArgs {
  const uint2* items;
  const u32* counts;
  const unsigned char* hot;
  const unsigned char* cold;
  unsigned char* cache;
  const unsigned char* fetched;
  u32 bundle_bytes, hidden;
  int activation;
  const float* x;
  float* partial;
  const unsigned char* ahead;
  u32 ahead_bytes;
  // With rows, of the neurons that have a sketch: gate and up as the sketch has them, the activations that its down rows are added
  // with, and how far a neuron's place in both is behind its bundle's number. Neurons of which all is read may have no place, unless
  // rows are residual.
  const float2* products;
  float* sketched;
  int hot_offset, cold_offset;
};

// The items of a team: from `next` to before `last`, every `step`-th.
struct FfnWork {
  int next, last, step;
  DEVICE int count() const { return next < last ? ceil_div(last - next, step) : 0; }
};

// Teams that read the link first of all, where there is work for others too.
DEVICE int link_teams_of(int n_teams, int n_link) { return min(n_link, max(1, n_teams / 4)); }

// The work of team `team` of `n_teams`.
DEVICE FfnWork ffn_work(int team, int n_teams, int n_items, int n_link) {
  if (n_teams == 1 || n_link == 0 || n_link == n_items) return {team, n_items, n_teams};
  const int link_teams = link_teams_of(n_teams, n_link);
  if (team < link_teams) return {team, n_link, link_teams};
  return {n_link + team - link_teams, n_items, n_teams - link_teams};
}

// Adds up two numbers over a team.
struct TeamSums {
  // Where this thread leaves its warp's sums, and where it finds those of the warps of its team.
  float* mine;
  const float* theirs;
  bool leaves, finds, alone;

  DEVICE TeamSums(float* scratch, int team_warps) {
    // The lower half of each warp adds up gates, the upper half ups.
    float* half = scratch + (lane_id() < 16 ? 0 : ffn_shape::kMaxWarps);
    mine = half + warp_id();
    theirs = half + warp_id() / team_warps * team_warps + lane_id() % 16;
    leaves = lane_id() % 16 == 0;
    finds = lane_id() % 16 < team_warps;
    alone = team_warps == 1;
  }

  // The same bits in all threads of the team. `turn` alternates between 0 and 1. A barrier for the block unless teams
  // are warps.
  DEVICE float2 operator()(float gate, float up, int turn) const {
    const bool upper = lane_id() >= 16;
    float v = (upper ? up : gate) + __shfl_xor_sync(kAllLanes, upper ? gate : up, 16);
#pragma unroll
    for (int step = 8; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
    if (!alone) {
      const int offset = turn * 2 * ffn_shape::kMaxWarps;
      if (leaves) mine[offset] = v;
      __syncthreads();
      v = finds ? theirs[offset] : 0.0f;
#pragma unroll
      for (int step = 8; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
    }
    const float other = __shfl_xor_sync(kAllLanes, v, 16);
    return upper ? make_float2(other, v) : make_float2(v, other);
  }
};

// N: chunks a thread holds of a row. kAhead: whether the next neuron's are loaded early; else there are too many. kRows: whether
// rows are read or not, each alone; then no slot is filled.
template <class E, int N, bool kAhead, bool kRows>
DEVICE void ffn_teams(const FfnArgs& args) {
  static_assert(!E::kResidual || kRows, "residual rows are read alone");
  using namespace ffn_shape;
  __shared__ float scratch[2 * 2 * kMaxWarps];
  let_next_start();
  wait_for_previous();

  const u32 hidden = args.hidden, n_chunks = hidden / E::kColumns;
  const u32 team_size = team_threads<E>(hidden), teams = blockDim.x / team_size;
  const u32 my_team = threadIdx.x / team_size, me = threadIdx.x % team_size;
  const TeamSums team_sums(scratch, team_size / kWarp);

  // Neighbouring items go to different blocks.
  const int n_items = args.counts[0], n_link = args.counts[1], n_teams = teams * gridDim.x;
  FfnWork work = ffn_work(my_team * gridDim.x + blockIdx.x, n_teams, n_items, n_link);
  const int my_rounds = work.count();
  int rounds = 0;
  for (u32 t = 0; t < teams; t++)
    rounds = max(rounds, ffn_work(t * gridDim.x + blockIdx.x, n_teams, n_items, n_link).count());

  // The item that is fetched next, itself asked for one round earlier.
  uint2 item = make_uint2(0, kNone);
  auto next_item = [&] {
    if (work.next < work.last) item = args.items[work.next];
    work.next += work.step;
  };
  auto bundle_of = [&](u32 from) -> const unsigned char* {
    const unsigned char* on_device = from & kCold ? args.fetched : args.cache;
    const unsigned char* base = from & kSlot ? on_device : from & kCold ? args.cold : args.hot;
    return base + static_cast<u64>(from & ~(kSlot | kCold)) * args.bundle_bytes;
  };
  auto slot = [&](u32 to) { return args.cache + static_cast<u64>(to) * args.bundle_bytes; };
  auto rows_read = [&](const uint2& of) {
    const u32 number = of.x & ~(kSlot | kCold);
    return RowsRead(number + (of.x & kCold ? args.cold_offset : args.hot_offset), rows_of_item(of.y));
  };
  auto known_of = [&](const RowsRead& read) {
    return !E::kResidual && read.gate() && read.up() ? make_float2(0.0f, 0.0f) : args.products[read.place()];
  };
  auto fetch = [&](int round, Neuron<E, N>& neuron) {
    if (round >= my_rounds) return;
    const unsigned char* bundle = computed(bundle_of(item.x));
    neuron.to = kRows ? kNone : item.y;
    if constexpr (kRows) neuron.read = rows_read(item);
    if (!kRows || neuron.read.gate()) neuron.gate.fetch(bundle_row<E>(bundle, hidden, 0), me, team_size, n_chunks);
    if (!kRows || neuron.read.up()) neuron.up.fetch(bundle_row<E>(bundle, hidden, 1), me, team_size, n_chunks);
    if (!kRows || neuron.read.down()) neuron.down.fetch(bundle_row<E>(bundle, hidden, 2), me, team_size, n_chunks);
    if constexpr (kRows) neuron.known = known_of(neuron.read);
    next_item();
  };

  Neuron<E, N> a, b;
  if constexpr (kAhead) {
    next_item();
    fetch(0, a);
  }

  const Input<E> input;
  input.stage(args.x, hidden);
  __syncthreads();

  float outputs[N][E::kColumns] = {};
  // The bias of every column of a chunk is the same: the sum of h times its scale.
  float biases[N] = {};

  auto dot_chunk = [&](const RowsRead& read, u32 chunk, const uint4& gate_codes, u16 gate_scale, const uint4& up_codes, u16 up_scale,
                       float2& sums) {
    if constexpr (kRows) {
      if (!read.gate() && !read.up()) return;
      if (!read.gate() || !read.up()) {
        float dot[1];
        const uint4 codes[1] = {read.gate() ? gate_codes : up_codes};
        input.template dot<1>(chunk, codes, dot);
        (read.gate() ? sums.x : sums.y) += scale_value<E>(read.gate() ? gate_scale : up_scale) * dot[0];
        return;
      }
    }
    float dots[2];
    const uint4 codes[2] = {gate_codes, up_codes};
    input.template dot<2>(chunk, codes, dots);
    sums.x += scale_value<E>(gate_scale) * dots[0];
    sums.y += scale_value<E>(up_scale) * dots[1];
  };
  auto activation_of = [&](int round, float2 sums, const RowsRead& read, const float2& known) {
    sums = team_sums(sums.x, sums.y, round % 2);
    float2 products = make_float2(sums.x * E::kOut, sums.y * E::kOut);
    if constexpr (E::kResidual) {
      // The sums of rows that are not read are zero.
      products = make_float2(known.x + products.x, known.y + products.y);
    } else if constexpr (kRows) {
      products = make_float2(read.gate() ? products.x : known.x, read.up() ? products.y : known.y);
    }
    return activate(args.activation, products.x, products.y);
  };
  // Gives the activation of a neuron to its sketch, if that has a part in its down row, and says if it has all of it.
  auto leaves_down = [&](const RowsRead& read, float h) {
    if (!E::kResidual && read.down()) return false;
    if (me == 0) args.sketched[read.place()] = h;
    return !E::kResidual || !read.down();
  };
  auto add_chunk = [&](float h, const uint4& codes, u16 scale, float (&output)[E::kColumns], float& bias) {
    const float scaled = h * scale_value<E>(scale);
    if (E::kBias != 0.0f) bias += scaled;
    const float factor = scaled * E::kIn;
#pragma unroll
    for (int k = 0; k < E::kColumns / 4; k++) {
      const float4 d = E::four(codes, k);
      output[4 * k] += factor * d.x;
      output[4 * k + 1] += factor * d.y;
      output[4 * k + 2] += factor * d.z;
      output[4 * k + 3] += factor * d.w;
    }
  };

  if constexpr (kAhead) {
    auto compute = [&](int round, const Neuron<E, N>& neuron) {
      const bool active = round < my_rounds;
      float2 sums = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int i = 0; i < N; i++) {
        const u32 chunk = me + i * team_size;
        if (active && chunk < n_chunks)
          dot_chunk(neuron.read, chunk, neuron.gate.codes[i], neuron.gate.scales[i], neuron.up.codes[i],
                    neuron.up.scales[i], sums);
      }
      const float h = activation_of(round, sums, neuron.read, neuron.known);
      if (!active) return;
      if constexpr (kRows) {
        if (leaves_down(neuron.read, h)) return;
      }
      if (h != 0.0f) {
#pragma unroll
        for (int i = 0; i < N; i++)
          if (me + i * team_size < n_chunks)
            add_chunk(h, neuron.down.codes[i], neuron.down.scales[i], outputs[i], biases[i]);
      }
      if (neuron.to != kNone) {
        neuron.gate.store(slot(neuron.to), hidden, 0, me, team_size, n_chunks);
        neuron.up.store(slot(neuron.to), hidden, 1, me, team_size, n_chunks);
        neuron.down.store(slot(neuron.to), hidden, 2, me, team_size, n_chunks);
      }
    };
    // The registers change roles instead of contents.
    for (int round = 0; round < rounds; round += 2) {
      fetch(round + 1, b);
      compute(round, a);
      if (round + 1 == rounds) break;
      fetch(round + 2, a);
      compute(round + 1, b);
    }
  } else {
    // Rows this wide fill the link and the memory without looking ahead, and would not fit in registers.
#pragma unroll 1
    for (int round = 0; round < rounds; round++) {
      const bool active = round < my_rounds;
      const uint2 now = active ? args.items[work.next] : make_uint2(0, kNone);
      work.next += work.step;
      const unsigned char* bundle = bundle_of(now.x);
      const bool fills = !kRows && now.y != kNone;
      const RowsRead read = kRows ? rows_read(now) : RowsRead();
      Chunks<E, 1> one, other;
      float2 sums = make_float2(0.0f, 0.0f);
#pragma unroll 1
      for (int i = 0; i < N; i++) {
        const u32 chunk = me + i * team_size;
        if (!active || chunk >= n_chunks) continue;
        if (!kRows || read.gate()) one.fetch(bundle_row<E>(bundle, hidden, 0), chunk, 0, n_chunks);
        if (!kRows || read.up()) other.fetch(bundle_row<E>(bundle, hidden, 1), chunk, 0, n_chunks);
        if (fills) {
          one.store(slot(now.y), hidden, 0, chunk, 0, n_chunks);
          other.store(slot(now.y), hidden, 1, chunk, 0, n_chunks);
        }
        dot_chunk(read, chunk, one.codes[0], one.scales[0], other.codes[0], other.scales[0], sums);
      }
      const float h = activation_of(round, sums, read, kRows && active ? known_of(read) : make_float2(0.0f, 0.0f));
      if constexpr (kRows) {
        if (active && leaves_down(read, h)) continue;
      }
#pragma unroll
      for (int i = 0; i < N; i++) {
        const u32 chunk = me + i * team_size;
        if (!active || chunk >= n_chunks || (h == 0.0f && !fills)) continue;
        one.fetch(bundle_row<E>(bundle, hidden, 2), chunk, 0, n_chunks);
        if (h != 0.0f) add_chunk(h, one.codes[0], one.scales[0], outputs[i], biases[i]);
        if (fills) one.store(slot(now.y), hidden, 2, chunk, 0, n_chunks);
      }
    }
  }

  // Blocks without neurons on the link are ready long before the others: they bring what the next kernels read into the
  // second-level cache.
  const int link_blocks = min(static_cast<int>(gridDim.x) - 1, link_teams_of(n_teams, n_link));
  if (static_cast<int>(blockIdx.x) >= link_blocks) {
    const u32 n_threads = (gridDim.x - link_blocks) * blockDim.x;
    for (u32 i = (blockIdx.x - link_blocks) * blockDim.x + threadIdx.x; i < args.ahead_bytes / kLine; i += n_threads)
      prefetch_line(args.ahead + static_cast<u64>(i) * kLine);
  }

  // The input is not needed any more: its place takes the sums, team by team, and gives them away in whole lines.
  for (u32 t = 0; t < teams; t++) {
    __syncthreads();
    if (t != my_team) continue;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const u32 chunk = me + i * team_size;
      if (chunk >= n_chunks) continue;
#pragma unroll
      for (int k = 0; k < E::kColumns / 4; k++) {
        float4 v = t == 0 ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : input.part(chunk, k);
        const float less = biases[i] * E::kBias;
        v.x += outputs[i][4 * k] * (E::factor(4 * k) * E::kOut) - less;
        v.y += outputs[i][4 * k + 1] * (E::factor(4 * k + 1) * E::kOut) - less;
        v.z += outputs[i][4 * k + 2] * (E::factor(4 * k + 2) * E::kOut) - less;
        v.w += outputs[i][4 * k + 3] * (E::factor(4 * k + 3) * E::kOut) - less;
        input.part(chunk, k) = v;
      }
    }
  }
  __syncthreads();
  float4* out = reinterpret_cast<float4*>(args.partial + static_cast<u64>(blockIdx.x) * hidden);
  for (u32 i = threadIdx.x; i < hidden / 4; i += blockDim.x) out[i] = input.part(i);
}

// items, counts: from choose; {bundle, slot to fill} each, those over the link first.
// hot, cache, fetched (fetch.cu): device memory; cold: pinned host memory. Bundles of `bundle_bytes`, a multiple of 16. x [hidden] and
// partial [blocks, hidden] start at a multiple of 16 bytes; hidden is a multiple of 32, at most 32768. ahead: what will
// be read soon.
// Block: team_threads, or 256 if that is at most 128. Dynamic shared memory: as gemv, with `hidden` columns.
template <class E, bool kRows = false>
DEVICE void ffn(const FfnArgs& args) {
  const int chunks_a_thread = ceil_div(args.hidden / E::kColumns, ffn_shape::kMaxThreads);
  if (chunks_a_thread <= 1) {
    ffn_teams<E, 1, true, kRows>(args);
  } else if (chunks_a_thread <= 2) {
    ffn_teams<E, 2, E::kColumns <= 8, kRows>(args);
  } else if (E::kColumns <= 16 && chunks_a_thread <= 4) {
    ffn_teams<E, E::kColumns <= 16 ? 4 : 1, false, kRows>(args);
  } else if (E::kColumns <= 8) {
    ffn_teams<E, E::kColumns <= 8 ? 8 : 1, false, kRows>(args);
  }
}

#define FFN_ROWS_KERNEL(name, E)                                                                                       \
  extern "C" __global__ void __launch_bounds__(512, 1)                                                                 \
      ffn_rows_##name(const uint2* items, const u32* counts, const unsigned char* hot, const unsigned char* cold,      \
                      unsigned char* cache, const unsigned char* fetched, int bundle_bytes, int hidden,                \
                      int activation, const float* x, float* partial, const unsigned char* ahead, u32 ahead_bytes,     \
                      const float2* products, float* sketched, int hot_offset, int cold_offset) {                      \
    ffn<E, true>({items, counts, hot, cold, cache, fetched, static_cast<u32>(bundle_bytes), static_cast<u32>(hidden),  \
                  activation, x, partial, ahead, ahead_bytes, products, sketched, hot_offset, cold_offset});           \
  }
#define FFN_KERNELS(name, E)                                                                                           \
  extern "C" __global__ void __launch_bounds__(512, 1)                                                                 \
      ffn_##name(const uint2* items, const u32* counts, const unsigned char* hot, const unsigned char* cold,           \
                 unsigned char* cache, const unsigned char* fetched, int bundle_bytes, int hidden, int activation,     \
                 const float* x, float* partial, const unsigned char* ahead, u32 ahead_bytes) {                        \
    ffn<E>({items, counts, hot, cold, cache, fetched, static_cast<u32>(bundle_bytes), static_cast<u32>(hidden),        \
            activation, x, partial, ahead, ahead_bytes, nullptr, nullptr, 0, 0});                                      \
  }                                                                                                                    \
  FFN_ROWS_KERNEL(name, E)
FFN_KERNELS(bf16, Bf16)
FFN_KERNELS(q8, Q8)
FFN_KERNELS(q4, Q4)
FFN_ROWS_KERNEL(r4, R4)
#undef FFN_ROWS_KERNEL
#undef FFN_KERNELS

// What the CPU's threads give back, all in mapped host memory: sums [n_threads, hidden] and a flag each, kFlagWords apart.
struct HostPart {
  const float* y;
  const u32* flags;
  int n_threads;
};
constexpr int kFlagWords = 32;

// Waits until the CPU's threads have raised their flags for this layer; false if one has given up. For one warp of every
// block.
//
// Only the first block looks at the flags themselves and passes the word on: reads of one line over the link come one
// after another, a microsecond each, and 256 blocks would wait for as long as the layer takes.
DEVICE bool host_is_done(u32* passed_on, const HostPart& host, const u32* step, int layer, int n_layers) {
  const u32 wanted = flag_value(step[2], layer, n_layers);
  // What choose has put here is not yet done.
  const u32 done = wanted != 0 ? wanted : 1;
  volatile u32* word = passed_on;
  if (blockIdx.x == 0) {
    bool gave_up = false;
    for (int first = 0; first < host.n_threads; first += kWarp) {
      const bool has_flag = first + lane_id() < host.n_threads;
      const volatile u32* of_thread = host.flags + (has_flag ? first + lane_id() : first) * kFlagWords;
      // A flag goes up, and may wrap around. All bits set: the thread has given up.
      while (true) {
        const u32 flag = *of_thread;
        gave_up = __any_sync(kAllLanes, flag == kNone);
        if (gave_up || !__any_sync(kAllLanes, static_cast<int>(flag - wanted) < 0)) break;
        wait_a_little();
      }
      if (gave_up) break;
    }
    __threadfence_system();
    if (lane_id() == 0) *word = gave_up ? kNone : done;
    return !gave_up;
  }
  u32 flag = 0;
  if (lane_id() == 0) {
    while (flag = *word, flag != done && flag != kNone) wait_a_little();
    __threadfence();
  }
  return __shfl_sync(kAllLanes, flag, 0) != kNone;
}

// x [hidden] += the sum of partial [n_partials, hidden], left_out [hidden] if it is given, and the CPU's sums once they are
// there.
// Floor: the partial sums from the second-level cache, the CPU's over the link, which nobody else needs then: adding them
// up on the CPU takes longer than 32 KB a thread do. A block of 256 threads for every 32 columns: eight threads of
// four columns each, 32 of these over the rows, then a fixed tree. hidden is a multiple of 32.
extern "C" __global__ void __launch_bounds__(256)
    finish(const float* partial, int n_partials, int hidden, u32* counts, const float* left_out, HostPart host,
           const u32* step, int layer, int n_layers, float* x) {
  // Of the CPU's sums.
  constexpr int kAtOnce = 16;
  __shared__ float4 sums[8][8];
  let_next_start();
  wait_for_previous();
  const int part = threadIdx.x % 8, first_row = threadIdx.x / 8;
  const float4* rows = reinterpret_cast<const float4*>(partial) + blockIdx.x * 8 + part;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
  for (int row = first_row; row < n_partials; row += 32) {
    const float4 v = rows[static_cast<long long>(row) * (hidden / 4)];
    sum.x += v.x;
    sum.y += v.y;
    sum.z += v.z;
    sum.w += v.w;
  }
#pragma unroll
  for (int lanes = 8; lanes < kWarp; lanes *= 2) {
    sum.x += __shfl_xor_sync(kAllLanes, sum.x, lanes);
    sum.y += __shfl_xor_sync(kAllLanes, sum.y, lanes);
    sum.z += __shfl_xor_sync(kAllLanes, sum.z, lanes);
    sum.w += __shfl_xor_sync(kAllLanes, sum.w, lanes);
  }
  if (lane_id() < 8) sums[warp_id()][part] = sum;
  __syncthreads();
  if (warp_id() > 0) return;

  const int column = blockIdx.x * 32 + lane_id();
  float total = left_out != nullptr ? left_out[column] : 0.0f;
#pragma unroll
  for (int warp = 0; warp < 8; warp++) total += reinterpret_cast<const float*>(sums[warp])[lane_id()];
  if (host.n_threads > 0 && counts[4] > 0 && host_is_done(counts + 7, host, step, layer, n_layers)) {
    const volatile float* y = host.y + column;
    for (int first = 0; first < host.n_threads; first += kAtOnce) {
      float parts[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; i++)
        parts[i] = first + i < host.n_threads ? y[static_cast<long long>(first + i) * hidden] : 0.0f;
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) total += parts[i];
    }
  }
  x[column] += total;
}
