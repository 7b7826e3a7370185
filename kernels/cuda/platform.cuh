// Everything that differs between the two CUDA compilers and a plain C++ compiler with the emulator.
//
// nvcc, NVRTC (all files pasted in the order of thermocline.cu, without any header) and g++ compile the same kernels;
// this is the only file that knows which of them it is. Compile without -ftz=true or --use_fast_math: q4 decoding
// multiplies subnormal numbers (see small_integer).
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef THERMOCLINE_EMULATED

#include "emulator/emulator.hpp"

// A non-negative integer below 2^24 as a float, up to a power of two:
// `x * kSmallIntegerIn * small_integer(n) * kSmallIntegerOut == x * n`.
inline float small_integer(u32 n) { return static_cast<float>(n); }
constexpr float kSmallIntegerIn = 1.0f;
constexpr float kSmallIntegerOut = 1.0f;

inline uint4 load_stream(const void* p) { return *static_cast<const uint4*>(p); }
inline u16 load_stream_u16(const void* p) { return *static_cast<const u16*>(p); }

inline u32 load_word(const void* p) { return *static_cast<const u32*>(p); }
inline uint2 load_words2(const void* p) { return *static_cast<const uint2*>(p); }

inline int rounded_to_int(float v) { return static_cast<int>(lrintf(v)); }

inline int dot_bytes(u32 a, u32 b, int c) {
  for (int i = 0; i < 4; i++) c += static_cast<signed char>(a >> 8 * i) * static_cast<signed char>(b >> 8 * i);
  return c;
}

inline void async_copy16(void* shared, const void* from, int bytes) {
  std::memset(shared, 0, 16);
  std::memcpy(shared, from, bytes);
}
inline void async_commit() {}
template <int N>
inline void async_wait() {}
using emulator::load_matrices;
using emulator::multiply_add;

inline void team_barrier(u32 number, u32 n_threads) { emulator::team_barrier(number, n_threads); }

inline float reciprocal(float v) { return 1.0f / v; }
inline float rounded_product(float a, float b) { return a * b; }

inline const unsigned char* computed(const unsigned char* p) { return p; }
inline u32 computed(u32 v) { return v; }
inline u32 computed_anew(u32 v) { return v; }

inline u32 add_from_below(u32 v, u32 step) {
  const u32 lane = threadIdx.x % 32, other = emulator::exchange(v)[lane < step ? lane : lane - step];
  return lane % 16 < step ? v : v + other;
}

inline void prefetch_line(const void*) {}

inline void wait_for_previous() { emulator::wait_for_previous(); }
inline void let_next_start() {}

inline float half_to_float(u16 h) { return emulator::half_to_float(h); }
inline u16 float_to_half(float f) { return emulator::float_to_half(f); }

#else

// The bits of a small integer, taken as a float, are that integer times 2^-149: a subnormal number, exact, and made by
// no instruction at all. FFMA takes subnormal operands at full speed. The two factors keep products in the normal
// range: an input may be as large as 2^47, and keeps all its bits down to 2^-57.
__device__ __forceinline__ float small_integer(u32 n) { return __uint_as_float(n); }
#define kSmallIntegerIn 0x1p80f
#define kSmallIntegerOut 0x1p69f

// Weights are read once: they should not push anything out of the first-level cache. Volatile, so that loads stay
// where they are written, ahead of the arithmetic of the chunk before.
__device__ __forceinline__ uint4 load_stream(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
__device__ __forceinline__ u16 load_stream_u16(const void* p) {
  u16 v;
  asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}

// Scales, of which a line serves several steps.
__device__ __forceinline__ u32 load_word(const void* p) {
  u32 v;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ uint2 load_words2(const void* p) {
  uint2 v;
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

__device__ __forceinline__ int rounded_to_int(float v) { return __float2int_rn(v); }

// c + a . b, of four signed bytes.
__device__ __forceinline__ int dot_bytes(u32 a, u32 b, int c) {
  int sum;
  asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// Copies 16 bytes to shared memory, of which the first `bytes` come from `from` and the rest are zeros. Later: a thread
// sees its copies once it has waited for their group, others after a barrier behind that.
__device__ __forceinline__ void async_copy16(void* shared, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(from), "r"(bytes)
               : "memory");
}
// The copies since the last commit are a group.
__device__ __forceinline__ void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the last N groups are on their way.
template <int N>
__device__ __forceinline__ void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four matrices of 8 rows of 16 bytes: lane l gives the address of row l % 8 of matrix l / 8, and gets bytes
// 4 (l % 4) to 4 (l % 4) + 3 of row l / 4 of each (PTX ISA, ldmatrix).
__device__ __forceinline__ void load_matrices(const void* row, u32& a, u32& b, u32& c, u32& d) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
               : "r"(shared_address(row))
               : "memory");
}
// c [16, 8] += a [16, 32] * b [32, 8], of signed bytes, spread over a warp as PTX ISA says (mma.m16n8k32).
__device__ __forceinline__ void multiply_add(const u32 (&a)[4], const uint2& b, int (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

// An address that the compiler takes as given, so that others near it are a sum and not their whole formula again.
__device__ __forceinline__ const unsigned char* computed(const unsigned char* p) {
  asm("" : "+l"(p));
  return p;
}

__device__ __forceinline__ u32 computed(u32 v) {
  asm("" : "+r"(v));
  return v;
}
// A number that the compiler takes as given here and nowhere before, so that what follows from it is computed again
// instead of kept in registers.
__device__ __forceinline__ u32 computed_anew(u32 v) {
  asm volatile("" : "+r"(v));
  return v;
}

// `v` and that of the lane `step` below, if there is one in this half of the warp.
__device__ __forceinline__ u32 add_from_below(u32 v, u32 step) {
  // The lane's number and those of its half, as `shfl` takes them.
  asm volatile(
      "{\n\t.reg .u32 other;\n\t.reg .pred exists;\n\t"
      "shfl.sync.up.b32 other|exists, %0, %1, 0x1000, 0xffffffff;\n\t"
      "@exists add.u32 %0, %0, other;\n\t}"
      : "+r"(v)
      : "r"(step));
  return v;
}

// Asks for a line of 128 bytes, as far as the second-level cache.
__device__ __forceinline__ void prefetch_line(const void* p) {
  asm volatile("prefetch.global.L2::evict_last [%0];" ::"l"(p));
}

// Programmatic dependent launch (compute capability 9.0 on; elsewhere, and where a launch does not ask for it,
// nothing). A kernel of a token may begin before the one before it has ended: it asks for what never changes, weights,
// and then waits. Every block must wait before it touches anything else: then all kernels before the previous one have
// ended too.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may begin once all blocks have come here. Called first of all: what is resident by then is what has
// room beside this kernel, and takes nothing from it.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ float half_to_float(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
__device__ __forceinline__ u16 float_to_half(float f) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}

// A barrier for some warps of a block, `n_threads` in all: numbers 1 to 15, 0 is __syncthreads.
__device__ __forceinline__ void team_barrier(u32 number, u32 n_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(n_threads) : "memory");
}

// Within one unit in the last place, without the branches of a division.
__device__ __forceinline__ float reciprocal(float v) {
  float r;
  asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// A product that is never fused with an addition after it.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ uint4 dynamic_shared_words[];
  return reinterpret_cast<unsigned char*>(dynamic_shared_words);
}

// Between two looks at a flag in host memory.
__device__ __forceinline__ void wait_a_little() {
  asm volatile("nanosleep.u32 200;");
}

#endif

constexpr int kWarp = 32;
constexpr u32 kAllLanes = 0xffffffffu;
constexpr u32 kNone = 0xffffffffu;
// From here on the second word of a work list's item fills no slot, and has the rows that are read: a sum of 1 for gate, 2 for
// up, 4 for down. kNone: all of them.
constexpr u32 kFillsNone = 0xfffffff8u;

#define DEVICE __device__ __forceinline__

// The rows that are read of an item with this second word.
DEVICE u32 rows_of_item(u32 to) { return to >= kFillsNone ? to & 7 : 7; }

// The value that the flags of a layer reach in the token of that number (flag_value, kernels/src/cuda/launch/choose.rs).
DEVICE u32 flag_value(u32 serial, u32 layer, u32 n_layers) { return serial * n_layers + layer + 1; }

// Gives a flag in mapped memory its value once the host sees all that this thread and, through barriers and earlier kernels, others
// have written.
DEVICE void raise_flag(u32* flag, u32 value) {
  __threadfence_system();
  *const_cast<volatile u32*>(flag) = value;
}

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
DEVICE int lane_id() { return threadIdx.x % kWarp; }
DEVICE int warp_id() { return threadIdx.x / kWarp; }

DEVICE float bf16_to_float(u16 b) { return __uint_as_float(static_cast<u32>(b) << 16); }

// Rounds to nearest even; a NaN stays one.
DEVICE u16 float_to_bf16(float f) {
  const u32 bits = __float_as_uint(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<u16>(bits >> 16 | 0x40);
  return static_cast<u16>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
