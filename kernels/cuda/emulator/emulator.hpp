// CUDA's execution model for a plain C++ compiler: enough of it for the kernels of this folder.
//
// Each CUDA thread of a block is a fiber on the calling thread. A fiber runs until it waits at a barrier and then hands
// over to the next one, so nothing runs at the same time and atomics are ordinary arithmetic. Blocks run one after
// another. Collectives take whole warps: every launch has a multiple of 32 threads, and no thread of a warp leaves
// before the others.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct dim3 {
  uint32_t x, y, z;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One copy for each host thread that emulates: its blocks run one after another.
#define __shared__ static thread_local

namespace emulator {

struct Fiber;

// What the running block sees of itself.
struct Block {
  dim3 grid, block, index;
  unsigned char* shared;
  Fiber* running;
};
extern thread_local Block block;

dim3 thread_index();
void block_barrier();
// Number 1 to 15: for `size` threads, whole warps.
void team_barrier(uint32_t number, uint32_t size);
// Waits for the warp, then returns what its 32 lanes brought.
const uint32_t* exchange(uint32_t mine);
void yield_to_host();
void wait_for_previous();

float half_to_float(uint16_t h);
uint16_t float_to_half(float f);

template <class T>
uint32_t to_bits(T v) {
  static_assert(sizeof(T) == 4, "shuffles move 32 bits");
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
template <class T>
T from_bits(uint32_t bits) {
  T v;
  std::memcpy(&v, &bits, 4);
  return v;
}

// The tensor cores' operations, see platform.cuh.
inline void load_matrices(const void* row, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  const uint64_t address = reinterpret_cast<uint64_t>(row);
  uint64_t rows[32];
  const uint32_t* half = exchange(static_cast<uint32_t>(address));
  for (int i = 0; i < 32; i++) rows[i] = half[i];
  half = exchange(static_cast<uint32_t>(address >> 32));
  for (int i = 0; i < 32; i++) rows[i] |= static_cast<uint64_t>(half[i]) << 32;
  const uint32_t lane = thread_index().x % 32;
  uint32_t* out[4] = {&a, &b, &c, &d};
  for (int m = 0; m < 4; m++)
    std::memcpy(out[m], reinterpret_cast<const unsigned char*>(rows[8 * m + lane / 4]) + 4 * (lane % 4), 4);
}
inline void multiply_add(const uint32_t (&a)[4], const uint2& b, int (&c)[4]) {
  // Rows of a and columns of b, 32 bytes each.
  int8_t rows[16][32], columns[8][32];
  for (int i = 0; i < 4; i++) {
    const uint32_t* lanes = exchange(a[i]);
    for (int l = 0; l < 32; l++) std::memcpy(&rows[l / 4 + i % 2 * 8][l % 4 * 4 + i / 2 * 16], &lanes[l], 4);
  }
  for (int i = 0; i < 2; i++) {
    const uint32_t* lanes = exchange(i == 0 ? b.x : b.y);
    for (int l = 0; l < 32; l++) std::memcpy(&columns[l / 4][l % 4 * 4 + i * 16], &lanes[l], 4);
  }
  const uint32_t lane = thread_index().x % 32;
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 32; k++) c[i] += rows[lane / 4 + i / 2 * 8][k] * columns[lane % 4 * 2 + i % 2][k];
}

}  // namespace emulator

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block.index)
#define blockDim (emulator::block.block)
#define gridDim (emulator::block.grid)

inline unsigned char* dynamic_shared() { return emulator::block.shared; }
inline void wait_a_little() { emulator::yield_to_host(); }

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp() { emulator::exchange(0); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <class T>
T __shfl_xor_sync(uint32_t, T v, int mask) {
  const uint32_t lane = threadIdx.x % 32;
  return emulator::from_bits<T>(emulator::exchange(emulator::to_bits(v))[lane ^ mask]);
}
template <class T>
T __shfl_up_sync(uint32_t, T v, int delta) {
  const int lane = threadIdx.x % 32;
  return emulator::from_bits<T>(emulator::exchange(emulator::to_bits(v))[lane < delta ? lane : lane - delta]);
}
template <class T>
T __shfl_sync(uint32_t, T v, int from) {
  return emulator::from_bits<T>(emulator::exchange(emulator::to_bits(v))[from & 31]);
}
inline uint32_t __ballot_sync(uint32_t, int predicate) {
  const uint32_t* lanes = emulator::exchange(predicate != 0);
  uint32_t mask = 0;
  for (int i = 0; i < 32; i++) mask |= lanes[i] << i;
  return mask;
}
inline int __any_sync(uint32_t all, int predicate) { return __ballot_sync(all, predicate) != 0; }

inline uint32_t __reduce_add_sync(uint32_t, uint32_t v) {
  const uint32_t* lanes = emulator::exchange(v);
  uint32_t sum = 0;
  for (int i = 0; i < 32; i++) sum += lanes[i];
  return sum;
}
inline uint32_t __reduce_min_sync(uint32_t, uint32_t v) {
  const uint32_t* lanes = emulator::exchange(v);
  uint32_t least = lanes[0];
  for (int i = 1; i < 32; i++) least = lanes[i] < least ? lanes[i] : least;
  return least;
}

template <class T>
T atomicAdd(T* p, T v) {
  const T old = *p;
  *p += v;
  return old;
}

inline uint32_t atomicExch(uint32_t* p, uint32_t v) {
  const uint32_t old = *p;
  *p = v;
  return old;
}

inline float __uint_as_float(uint32_t bits) { return emulator::from_bits<float>(bits); }
inline uint32_t __float_as_uint(float f) { return emulator::to_bits(f); }
inline int __ffs(uint32_t v) { return __builtin_ffs(static_cast<int>(v)); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
// Shifts take the shift's lowest five bits.
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; i++) out |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

// Zero after `last`.
inline uint32_t atomicInc(uint32_t* p, uint32_t last) {
  const uint32_t old = *p;
  *p = old >= last ? 0 : old + 1;
  return old;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
