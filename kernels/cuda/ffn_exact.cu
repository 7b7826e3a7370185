// The fused feed-forward layer for bundles with streams or a coarse plane: what ffn.cu does for the plain encodings,
// with the same arguments and the same promises.
//
//     partial[block] = sum over the block's neurons of h * down,  h = act(gate . x, up . x)
//
// Weights are decoded where the bundle lies and never written anywhere. Floor: the bundles' bytes without what is
// behind the streams' ends, over the link or from device memory; else what a weight takes to decode (exact.cuh).
//
// - A team of warps has a neuron, a warp one or two segments of 1024 columns of each of its rows. Outputs stay in
//   registers from the first neuron to the last.
// - The next bundle is copied to shared memory, in whole lines, while this one is decoded from there; where two do not
//   fit, one after the other.
// - If not even one fits, bundles are read in place: the `_wide` kernels.
// - A team waits for nobody but itself: its barriers have their own numbers. The same work gives the same bits.
#include "exact_team.cuh"

// The lane's columns of each block of its segment, from the first neuron to the last.
template <class E>
struct RegisterSums {
  LaneValues<E> blocks[exact_shape::kBlocks];
};

// Adds h times a segment of the down row. Registers cannot be looked up by number: where the decoders of all blocks are
// not laid out one after another, the sums move on.
template <class E, class D>
DEVICE void add_segments(D decoder, u32 last_block, float h, RegisterSums<E>& out) {
  using namespace exact_shape;
#pragma unroll 1
  for (u32 first = 0; first < kBlocks; first += E::kUnroll) {
#pragma unroll
    for (u32 i = 0; i < E::kUnroll; i++) {
      if (first + i >= last_block) continue;
      const LaneValues<E> w = decoder.next(first + i);
#pragma unroll
      for (u32 k = 0; k < E::kLaneColumns; k++) out.blocks[i].v[k] += h * w.v[k];
    }
    if (E::kUnroll < kBlocks) {
      LaneValues<E> kept[E::kUnroll];
#pragma unroll
      for (u32 i = 0; i < E::kUnroll; i++) kept[i] = out.blocks[i];
#pragma unroll
      for (u32 i = 0; i + E::kUnroll < kBlocks; i++) out.blocks[i] = out.blocks[i + E::kUnroll];
#pragma unroll
      for (u32 i = 0; i < E::kUnroll; i++) out.blocks[kBlocks - E::kUnroll + i] = kept[i];
    }
  }
}

// Gate and up products of a segment, together: one's latency hides the other's. Of long decoders one at a time.
template <class E, class D>
DEVICE float2 gate_and_up(D gate, D up, const float* x, u32 segment, u32 n_blocks) {
  const LaneValues<E>* of_lane = reinterpret_cast<const LaneValues<E>*>(x + segment * exact_shape::kSegment);
  float2 sums = make_float2(0.0f, 0.0f);
#pragma unroll 1
  for (u32 block = 0; block < n_blocks; block++) {
    const LaneValues<E> v = of_lane[block * kLanes<E> + segment_lane<E>()], g = gate.next(block), u = up.next(block);
#pragma unroll
    for (u32 i = 0; i < E::kLaneColumns; i++) {
      sums.x += g.v[i] * v.v[i];
      sums.y += u.v[i] * v.v[i];
    }
  }
  return sums;
}

// stages: bundles of a team in shared memory. If not kStaged there are none, a block is one team, its warps have
// several segments, and the sums are added up where they go to, in the second-level cache.
template <class E, bool kStaged>
DEVICE void ffn_exact(const FfnArgs& args, u32 stages) {
  using namespace ffn_shape;
  using namespace exact_shape;
  __shared__ float scratch[kWarp];
  let_next_start();
  wait_for_previous();

  const u32 hidden = args.hidden;
  const u32 n_segments = segments_of(hidden);
  const RowTeam team(kStaged ? warps_of<E>(n_segments) : blockDim.x / kWarp);

  // Neighbouring items go to different blocks.
  FfnWork work =
      ffn_work(team.index() * gridDim.x + blockIdx.x, team.teams() * gridDim.x, args.counts[0], args.counts[1]);
  auto bundle_of = [&](u32 from) -> const unsigned char* {
    const unsigned char* on_device = from & kCold ? args.fetched : args.cache;
    const unsigned char* base = from & kSlot ? on_device : from & kCold ? args.cold : args.hot;
    return base + static_cast<u64>(from & ~(kSlot | kCold)) * args.bundle_bytes;
  };

  const Staging<E> staging = {hidden, 3, args.bundle_bytes, team, stages};
  // Where the bundle comes from that is fetched next.
  u32 from = 0;
  // Neurons that are left; an even number's bundle lies in another place than an odd one's.
  u32 left = work.count();
  if (left > 0) {
    from = args.items[work.next].x;
    if (kStaged) staging.begin(left, bundle_of(from));
  }

  const Input<Unscaled> input;
  input.stage(args.x, hidden);
  float* x = reinterpret_cast<float*>(input.values);
  end_vector(x, hidden);
  auto partial = [&] { return args.partial + static_cast<u64>(computed_anew(blockIdx.x)) * hidden; };
  if (!kStaged)
    for (u32 i = threadIdx.x; i < hidden; i += blockDim.x) partial()[i] = 0.0f;
  __syncthreads();

  if (kStaged && left > 0) staging.finish(left, bundle_of(from));
  RegisterSums<E> outputs = {};
#pragma unroll 1
  for (; left > 0; left--, work.next += work.step) {
    const unsigned char* bundle = bundle_of(from);
    if (left > 1) from = args.items[work.next + work.step].x;
    const bool ahead = kStaged && stages == 2 && left > 1;
    if (ahead) staging.begin(left - 1, bundle_of(from));
    // Two expressions, so that the compiler knows which memory it is.
    auto decoder = [&](u32 which, u32 segment) {
      if constexpr (kStaged) {
        return SegmentDecoder<E, true>(staging.planes(), staging.at(left), which, segment);
      } else {
        return SegmentDecoder<E, false>(staging.planes(), bundle, which, segment);
      }
    };

    float2 sums = make_float2(0.0f, 0.0f);
#pragma unroll 1
    for (u32 first = team.warp() * kTogether<E>; kStaged || first < n_segments; first += team.warps() * kTogether<E>) {
      const u32 segment = first + segment_of_warp<E>(), n_blocks = blocks_of(columns_of(hidden, segment));
      if constexpr (kTogether<E> == 1) {
        const float2 more = gate_and_up<E>(decoder(0, segment), decoder(1, segment), x, segment, n_blocks);
        sums.x += more.x;
        sums.y += more.y;
      } else {
        const u32 last_block = blocks_of(columns_of(hidden, first));
#pragma unroll 1
        for (u32 which = 0; which < 2; which++) {
          const float more = dot_segments<E>(decoder(which, segment), x, segment, n_blocks, last_block);
          if (which == 0) sums.x += more;
          if (which == 1) sums.y += more;
        }
      }
      // All of a warp's segments at once.
      if (kStaged) break;
    }
    sums = team.sums(scratch, sums.x, sums.y, [&] {
      if (kStaged) async_wait<0>();
    });
    if (ahead) staging.go_on(left - 1, bundle_of(from));
    const float h = activate(args.activation, sums.x, sums.y);

    // Asked for here again: all that is kept costs registers.
    const u32 to = args.items[work.next].y;
    if (to != kNone) {
      unsigned char* slot = args.cache + static_cast<u64>(to) * args.bundle_bytes;
      const unsigned char* bytes = kStaged ? staging.at(left) : bundle;
      const u32 used = staging.planes().used_bytes(bytes);
      const u32 step = 16 * team.threads();
      for (u32 i = 16 * team.me(); i < used; i += step)
        *reinterpret_cast<uint4*>(slot + i) = *reinterpret_cast<const uint4*>(bytes + i);
    }
    if (h != 0.0f) {
      if constexpr (kStaged) {
        const u32 first = team.warp() * kTogether<E>;
        add_segments<E>(decoder(2, first + segment_of_warp<E>()), blocks_of(columns_of(hidden, first)), h, outputs);
      } else {
#pragma unroll 1
        for (u32 first = team.warp() * kTogether<E>; first < n_segments; first += team.warps() * kTogether<E>) {
          const u32 segment = first + segment_of_warp<E>(), last_block = blocks_of(columns_of(hidden, first));
          auto down = decoder(2, segment);
          const u32 n_columns = columns_of(hidden, segment);
#pragma unroll 1
          for (u32 block = 0; block < last_block; block++) {
            const LaneValues<E> w = down.next(block);
            const u32 column = kBlock * block + E::kLaneColumns * segment_lane<E>();
            if (column >= n_columns) continue;
            LaneValues<E>* place = reinterpret_cast<LaneValues<E>*>(partial() + (segment * kSegment + column));
            LaneValues<E> sum = *place;
#pragma unroll
            for (u32 i = 0; i < E::kLaneColumns; i++) sum.v[i] += h * w.v[i];
            *place = sum;
          }
        }
      }
    }
    // The next bundle is there, and this one's place, and the scratch, are free.
    if (!kStaged) {
      team.barrier();
      continue;
    }
    staging.wait();
    if (stages == 1 && left > 1) {
      staging.begin(left - 1, bundle_of(from));
      staging.finish(left - 1, bundle_of(from));
    }
  }

  // As in ffn.cu: what the next kernels read comes into the second-level cache. Numbers that are not needed until now
  // are computed now: during the loop every register counts.
  const u32 teams = team.teams();
  const int link_blocks = min(static_cast<int>(gridDim.x) - 1, link_teams_of(teams * gridDim.x, args.counts[1]));
  if (static_cast<int>(blockIdx.x) >= link_blocks) {
    const u32 n_threads = (gridDim.x - link_blocks) * blockDim.x;
    for (u32 i = (blockIdx.x - link_blocks) * blockDim.x + threadIdx.x; i < args.ahead_bytes / kLine; i += n_threads)
      prefetch_line(args.ahead + static_cast<u64>(i) * kLine);
  }
  if (!kStaged) return;

  // The input is not needed any more: its place takes the sums, team by team, and gives them away in whole lines.
  for (u32 t = 0; t < teams; t++) {
    __syncthreads();
    if (t != team.index()) continue;
    const u32 segment = team.warp() * kTogether<E> + segment_of_warp<E>();
    const u32 n_blocks = blocks_of(columns_of(hidden, segment));
    LaneValues<E>* of_lane = reinterpret_cast<LaneValues<E>*>(x + segment * kSegment) + segment_lane<E>();
#pragma unroll
    for (u32 block = 0; block < kBlocks; block++) {
      if (block >= n_blocks) continue;
      LaneValues<E> sum = outputs.blocks[block];
      if (t > 0) {
        const LaneValues<E> others = of_lane[block * kLanes<E>];
#pragma unroll
        for (u32 i = 0; i < E::kLaneColumns; i++) sum.v[i] += others.v[i];
      }
      of_lane[block * kLanes<E>] = sum;
    }
  }
  __syncthreads();
  float4* out = reinterpret_cast<float4*>(partial());
  for (u32 i = threadIdx.x; i < hidden / 4; i += blockDim.x) out[i] = input.values[i];
}

// Arguments as for ffn_q4 (ffn.cu), bundles at multiples of 16 bytes, then `stages`: 1 or 2, or 0 for `_wide`.
// Block: whole teams of a warp for each 1024 columns (2048 where two segments are decoded together), at most 16 warps;
// for `_wide` any warps. hidden is a multiple of 32, at most 16384 but for `_wide`. Dynamic shared memory: x, whole
// blocks of 64 columns; then `stages` bundles for each team, and kSlackBytes.
#define FFN_EXACT_KERNEL(name, E, kStaged, threads, blocks)                                                            \
  extern "C" __global__ void __launch_bounds__(threads, blocks)                                                        \
      name(const uint2* items, const u32* counts, const unsigned char* hot, const unsigned char* cold,                 \
           unsigned char* cache, const unsigned char* fetched, int bundle_bytes, int hidden, int activation, const float* x, float* partial,         \
           const unsigned char* ahead, u32 ahead_bytes, u32 stages) {                                                  \
    ffn_exact<E, kStaged>({items, counts, hot, cold, cache, fetched, static_cast<u32>(bundle_bytes), static_cast<u32>(hidden),  \
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
