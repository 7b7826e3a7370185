// Teams of warps that share a bundle or a row of an exact encoding, and how it comes to shared memory, where it is decoded
// (exact.cuh) while the next one is on its way.
#pragma once
#include "exact.cuh"

// Warps that share a bundle or a row: each has some of its segments.
struct RowTeam {
  // Eight bits each: a warp's number in its team, the team's warps, and its number in the block.
  u32 packed;

  DEVICE explicit RowTeam(u32 warps) : packed(warp_id() % warps | warps << 8 | warp_id() / warps << 16) {}
  DEVICE u32 warp() const { return computed_anew(packed) & 0xff; }
  DEVICE u32 warps() const { return computed_anew(packed) >> 8 & 0xff; }
  DEVICE u32 index() const { return computed_anew(packed) >> 16; }
  DEVICE u32 threads() const { return warps() * kWarp; }
  // This thread's number among those.
  DEVICE u32 me() const { return warp() * kWarp + lane_id(); }
  DEVICE u32 teams() const { return blockDim.x / threads(); }
  DEVICE void barrier() const {
    if (warps() == 1) {
      __syncwarp();
    } else {
      team_barrier(1 + index(), threads());
    }
  }

  // Copies bytes from `from` to before `until`, multiples of 16, on their way.
  DEVICE void copy(unsigned char* to, const unsigned char* bytes, u32 from, u32 until) const {
    const u32 step = 16 * threads();
    for (u32 i = from + 16 * me(); i < until; i += step) async_copy16(to + i, bytes + i, 16);
    async_commit();
  }

  // The sums of two numbers over the team, the same bits in all its threads. `scratch` has 32 floats for the block;
  // `before_barrier` is done by all before the barrier that this takes, and another one must follow before the next
  // call.
  template <class F>
  DEVICE float2 sums(float* scratch, float a, float b, F before_barrier) const {
    // The lower half of each warp adds up one, the upper half the other.
    const bool upper = lane_id() >= 16;
    float v = (upper ? b : a) + __shfl_xor_sync(kAllLanes, upper ? a : b, 16);
#pragma unroll
    for (int step = 8; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
    float* half = scratch + (upper ? 16 : 0) + index() * warps();
    const u32 in_half = lane_id() % 16;
    if (in_half == 0) half[warp()] = v;
    before_barrier();
    barrier();
    v = in_half < warps() ? half[in_half] : 0.0f;
#pragma unroll
    for (int step = 8; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
    const float other = __shfl_xor_sync(kAllLanes, v, 16);
    return upper ? make_float2(other, v) : make_float2(v, other);
  }
};

// Bytes of a vector in shared memory: whole blocks.
DEVICE u32 vector_bytes(u32 columns) { return blocks_of(columns) * exact_shape::kBlock * 4; }

// Bundles, or rows, that pass through one or two buffers of a team in shared memory, behind the vector. What all have
// comes first; the streams follow once the heads that say how long they are have come: no byte behind the last one
// crosses the link.
template <class E>
struct Staging {
  u32 columns, rows, bytes;
  const RowTeam& team;
  u32 stages;

  // Where something lies is a few instructions, and registers if it is kept: a dozen for the planes.
  DEVICE Planes<E> planes() const { return Planes<E>(computed_anew(columns), rows, bytes); }
  DEVICE unsigned char* at(u32 round) const {
    const u32 number = team.index() * stages + (stages == 2 ? round % 2 : 0);
    return dynamic_shared() + vector_bytes(computed_anew(columns)) + number * bytes;
  }
  DEVICE void begin(u32 round, const unsigned char* from) const {
    team.copy(at(round), from, 0, planes().fixed_bytes());
  }
  // After a barrier behind the wait for what has begun.
  DEVICE void go_on(u32 round, const unsigned char* from) const {
    const Planes<E> all = planes();
    const u32 fixed = all.fixed_bytes();
    const u32 used = fixed < bytes ? all.used_bytes(at(round)) : fixed;
    team.copy(at(round), from, fixed, used);
  }
  DEVICE void wait() const {
    async_wait<0>();
    team.barrier();
  }
  // Waits for what has begun and for the rest.
  DEVICE void finish(u32 round, const unsigned char* from) const {
    wait();
    go_on(round, from);
    wait();
  }
};

// A vector as it is, in shared memory: see input.cuh.
struct Unscaled {
  static constexpr int kColumns = 1 << 17;
  static constexpr float kBias = 0.0f;
  static constexpr float kIn = 1.0f;
  static constexpr float kOut = 1.0f;
  DEVICE static float factor(int) { return 1.0f; }
};

// Zeros from the last group of 32 columns to the end of its block. Ends without a barrier.
DEVICE void end_vector(float* x, u32 columns) {
  const u32 first = (columns + 31) / 32 * 32;
  for (u32 i = first + threadIdx.x; i < vector_bytes(columns) / 4; i += blockDim.x) x[i] = 0.0f;
}
