// The fused feed-forward layer for bundles with streams or a coarse plane: what ffn.cu does for the plain encodings, with
// the same arguments and the same promises.
//
//     partial[block] = sum over the block's neurons of h * down,  h = act(gate . x, up . x)
//
// Weights are decoded where the bundle lies and never written anywhere. Floor: the bundles' bytes without what is behind
// the streams' ends, over the link or from device memory; else what a weight takes to decode (exact.cuh).
//
// - A team of warps has a neuron, a warp a segment of 1024 columns of each of its rows. Outputs stay in registers from
//   the first neuron to the last.
// - The next bundle is copied to shared memory, in whole lines, while this one is decoded from there; where two do not
//   fit, one after the other. Gate and up rows are decoded together: one's latency hides the other's.
// - If not even one fits, bundles are read in place: the `_wide` kernels.
// - A team waits for nobody but itself: its barriers have their own numbers. The same work gives the same bits.
#include "exact.cuh"

// Two columns a lane of each block of a warp's segment, from the first neuron to the last.
struct RegisterSums {
  float2 sums[exact_shape::kBlocks];
};

// Adds h times a segment of the down row. Registers cannot be looked up by number: where the decoders of all blocks are
// not laid out one after another, the sums move on.
template <class E>
DEVICE void add_segment(SegmentDecoder<E> decoder, u32 n_blocks, float h, RegisterSums& out) {
  using namespace exact_shape;
#pragma unroll 1
  for (u32 first = 0; first < kBlocks; first += E::kUnroll) {
#pragma unroll
    for (u32 i = 0; i < E::kUnroll; i++) {
      if (first + i >= n_blocks) continue;
      const float2 v = decoder.next(first + i);
      out.sums[i].x += h * v.x;
      out.sums[i].y += h * v.y;
    }
    if (E::kUnroll < kBlocks) {
      float2 kept[E::kUnroll];
#pragma unroll
      for (u32 i = 0; i < E::kUnroll; i++) kept[i] = out.sums[i];
#pragma unroll
      for (u32 i = 0; i + E::kUnroll < kBlocks; i++) out.sums[i] = out.sums[i + E::kUnroll];
#pragma unroll
      for (u32 i = 0; i < E::kUnroll; i++) out.sums[kBlocks - E::kUnroll + i] = kept[i];
    }
  }
}

// stages: bundles of a team in shared memory. If not kStaged there are none, a block is one team, its warps have several
// segments, and the sums are added up where they go to, in the second-level cache.
template <class E, bool kStaged>
DEVICE void ffn_exact(const FfnArgs& args, u32 stages) {
  using namespace ffn_shape;
  using namespace exact_shape;
  __shared__ float scratch[kWarp];
  let_next_start();
  wait_for_previous();

  const u32 hidden = args.hidden;
  const Planes<E> planes(hidden, 3, args.bundle_bytes);
  const RowTeam team(kStaged ? planes.segments : blockDim.x / kWarp);
  const u32 teams = team.teams();

  // Neighbouring items go to different blocks.
  const int n_items = args.counts[0], n_link = args.counts[1], n_teams = teams * gridDim.x;
  FfnWork work = ffn_work(team.index * gridDim.x + blockIdx.x, n_teams, n_items, n_link);
  auto bundle_of = [&](u32 from) -> const unsigned char* {
    const unsigned char* base = from & kSlot ? args.cache : from & kCold ? args.cold : args.hot;
    return base + static_cast<u64>(from & ~(kSlot | kCold)) * args.bundle_bytes;
  };

  const Staging<E> staging = {planes, team,
                              dynamic_shared() + vector_bytes(hidden) + team.index * stages * planes.bytes, stages};
  uint2 item = make_uint2(0, kNone);
  if (work.next < work.last) {
    item = args.items[work.next];
    if (kStaged) staging.begin(0, bundle_of(item.x));
  }

  const Input<Unscaled> input;
  input.stage(args.x, hidden);
  float* x = reinterpret_cast<float*>(input.values);
  end_vector(x, hidden);
  float* partial = args.partial + static_cast<u64>(blockIdx.x) * hidden;
  if (!kStaged)
    for (u32 i = threadIdx.x; i < hidden; i += blockDim.x) partial[i] = 0.0f;
  __syncthreads();

  RegisterSums outputs = {};
  u32 round = 0;
#pragma unroll 1
  for (; work.next < work.last; work.next += work.step, round++) {
    const uint2 now = item;
    const bool more = work.next + work.step < work.last, ahead = stages == 2 && more;
    if (more) item = args.items[work.next + work.step];
    const unsigned char* bundle = bundle_of(now.x);
    if (kStaged) {
      if (round == 0 || stages == 1) {
        if (round > 0) staging.begin(round, bundle);
        staging.wait();
        staging.go_on(round, bundle);
        staging.wait();
      }
      if (ahead) staging.begin(round + 1, bundle_of(item.x));
    }
    // Two expressions, so that the compiler knows which memory it is.
    auto decoder = [&](u32 which, u32 segment) {
      if constexpr (kStaged) {
        return SegmentDecoder<E>(planes, staging.at(round), which, segment);
      } else {
        return SegmentDecoder<E>(planes, bundle, which, segment);
      }
    };

    float2 sums = make_float2(0.0f, 0.0f);
#pragma unroll 1
    for (u32 segment = team.warp; segment < planes.segments; segment += team.warps) {
      const u32 n_blocks = blocks_of(planes.columns_of(segment));
      SegmentDecoder<E> gate = decoder(0, segment), up = decoder(1, segment);
      const float2* of_lane = reinterpret_cast<const float2*>(x + segment * kSegment) + lane_id();
#pragma unroll 1
      for (u32 block = 0; block < n_blocks; block++) {
        const float2 v = of_lane[block * kWarp], g = gate.next(block), u = up.next(block);
        sums.x += g.x * v.x;
        sums.y += u.x * v.x;
        sums.x += g.y * v.y;
        sums.y += u.y * v.y;
      }
    }
    sums = team.sums(scratch, sums.x, sums.y, [&] {
      if (kStaged) async_wait<0>();
    });
    if (kStaged && ahead) staging.go_on(round + 1, bundle_of(item.x));
    const float h = activate(args.activation, sums.x, sums.y);

    if (now.y != kNone) {
      unsigned char* slot = args.cache + static_cast<u64>(now.y) * args.bundle_bytes;
      const unsigned char* from = kStaged ? staging.at(round) : bundle;
      const u32 used = planes.used_bytes(from);
      for (u32 i = 16 * team.me; i < used; i += 16 * team.threads)
        *reinterpret_cast<uint4*>(slot + i) = *reinterpret_cast<const uint4*>(from + i);
    }
    if (h != 0.0f) {
      if constexpr (kStaged) {
        add_segment<E>(decoder(2, team.warp), blocks_of(planes.columns_of(team.warp)), h, outputs);
      } else {
#pragma unroll 1
        for (u32 segment = team.warp; segment < planes.segments; segment += team.warps) {
          SegmentDecoder<E> down = decoder(2, segment);
          const u32 n_columns = planes.columns_of(segment), n_blocks = blocks_of(n_columns);
#pragma unroll 1
          for (u32 block = 0; block < n_blocks; block++) {
            const float2 v = down.next(block);
            const u32 column = kBlock * block + 2 * lane_id();
            if (column >= n_columns) continue;
            float2* sum = reinterpret_cast<float2*>(partial + (segment * kSegment + column));
            float2 total = *sum;
            total.x += h * v.x;
            total.y += h * v.y;
            *sum = total;
          }
        }
      }
    }
    // The next bundle is there, and this one's place, and the scratch, are free.
    if (kStaged) {
      staging.wait();
    } else {
      team.barrier();
    }
  }

  // As in ffn.cu: what the next kernels read comes into the second-level cache.
  const int link_blocks = min(static_cast<int>(gridDim.x) - 1, link_teams_of(n_teams, n_link));
  if (static_cast<int>(blockIdx.x) >= link_blocks) {
    const u32 n_threads = (gridDim.x - link_blocks) * blockDim.x;
    for (u32 i = (blockIdx.x - link_blocks) * blockDim.x + threadIdx.x; i < args.ahead_bytes / kLine; i += n_threads)
      prefetch_line(args.ahead + static_cast<u64>(i) * kLine);
  }
  if (!kStaged) return;

  // The input is not needed any more: its place takes the sums, team by team, and gives them away in whole lines.
  for (u32 t = 0; t < teams; t++) {
    __syncthreads();
    if (t != team.index) continue;
    const u32 n_blocks = blocks_of(planes.columns_of(team.warp));
    float2* of_lane = reinterpret_cast<float2*>(x + team.warp * kSegment) + lane_id();
#pragma unroll
    for (u32 block = 0; block < kBlocks; block++) {
      if (block >= n_blocks) continue;
      float2 v = t == 0 ? make_float2(0.0f, 0.0f) : of_lane[block * kWarp];
      v.x += outputs.sums[block].x;
      v.y += outputs.sums[block].y;
      of_lane[block * kWarp] = v;
    }
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < hidden / 4; i += blockDim.x) reinterpret_cast<float4*>(partial)[i] = input.values[i];
}

// Arguments as for ffn_q4 (ffn.cu), bundles at multiples of 16 bytes, then `stages`: 1 or 2, or 0 for `_wide`.
// Block: whole teams of a warp for each 1024 columns, at most 16 warps; for `_wide` any.
// hidden is a multiple of 32, at most 16384 but for `_wide`.
// Dynamic shared memory: x, whole blocks of 64 columns; then `stages` bundles for each team.
#define FFN_EXACT_KERNEL(name, E, kStaged, threads, blocks)                                                            \
  extern "C" __global__ void __launch_bounds__(threads, blocks)                                                        \
      name(const uint2* items, const u32* counts, const unsigned char* hot, const unsigned char* cold,                 \
           unsigned char* cache, int bundle_bytes, int hidden, int activation, const float* x, float* partial,         \
           const unsigned char* ahead, u32 ahead_bytes, u32 stages) {                                                  \
    ffn_exact<E, kStaged>({items, counts, hot, cold, cache, static_cast<u32>(bundle_bytes), static_cast<u32>(hidden),  \
                           activation, x, partial, ahead, ahead_bytes},                                                \
                          stages);                                                                                     \
  }
#define FFN_EXACT_KERNELS(name, E)                   \
  FFN_EXACT_KERNEL(ffn_##name, E, true, 512, 1)      \
  FFN_EXACT_KERNEL(ffn_##name##_wide, E, false, 256, 2)
FFN_EXACT_KERNELS(bf16x, Bf16x)
FFN_EXACT_KERNELS(q4plus, Q4Plus)
FFN_EXACT_KERNELS(q4exact, Q4Exact)
FFN_EXACT_KERNELS(q8exact, Q8Exact)
#undef FFN_EXACT_KERNELS
#undef FFN_EXACT_KERNEL
