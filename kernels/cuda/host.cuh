// What the CPU's threads have computed, taken over the link and added up.
#pragma once
#include "platform.cuh"

// What the CPU's threads give back, in mapped host memory: rows y [n_threads * (1 + most_taken), hidden] of sums, and of each
// thread kFlagWords words. The first is the request's number when the thread has done with it, the second as soon as the
// thread's own row is there. Each of the others is about a row of its own: pieces that the thread has taken of another's
// list, as half of the request's number above 16 bits, the owner above 8, and the piece's number, from 1 on.
//
// Rows are taken over the link as they come, most of them while other threads still compute and the link has nothing
// to do. `arrivals`, in device memory, tells all blocks what has come: half of the request's number above 16 bits and
// how many, then [kMostRows] rows as they came, then [kMostRows] places in that list in the order of adding up.
struct HostPart {
  const float* y;
  const u32* flags;
  u32* arrivals;
  int n_threads;
  int most_taken;
};

namespace host_shape {
constexpr int kFlagWords = 32;
// n_threads * (1 + most_taken) at most.
constexpr int kMostRows = 128;
// In the order of adding up: a thread's own row, behind which come those that others took of its list.
constexpr u32 kOwn = 0x80000000u;
// Rows, or words of a thread, that are under way over the link at a time.
constexpr int kAtOnce = 8;
}  // namespace host_shape

struct HostShared {
  u32 keys[host_shape::kMostRows];
  float rows[host_shape::kMostRows][kWarp];
};

// A flag goes up, and may wrap around. All bits set: the thread has given up.
DEVICE bool is_up(u32 flag, u32 wanted) { return static_cast<int>(flag - wanted) >= 0; }

// Looks at the flags and passes on what has come, until all threads are done; for one warp of the whole launch, because
// reads of one line over the link come one after another, a microsecond each.
DEVICE void watch_host(const HostPart& host, u32 wanted, u32* passed_on, HostShared& shared) {
  using namespace host_shape;
  volatile u32* count = host.arrivals;
  u32* list = host.arrivals + 1;
  u32 n = 0;
  // Of each thread of this lane, in its chunk of 32 threads, which rows are in the list.
  u32 listed[kMostRows / kWarp] = {};
  bool gave_up = false;
  for (bool last_look = false;;) {
    const u32 before = n;
    bool all_done = true;
#pragma unroll
    for (int chunk = 0; chunk < kMostRows / kWarp; chunk++) {
      const int thread = chunk * kWarp + lane_id();
      if (chunk * kWarp >= host.n_threads) break;
      const bool exists = thread < host.n_threads;
      const volatile u32* words = host.flags + (exists ? thread : 0) * kFlagWords;
      const u32 flag = words[0];
      const auto add = [&](bool is_new, int kind, u32 key) {
        const u32 who = __ballot_sync(kAllLanes, is_new);
        if (is_new) {
          const u32 place = n + __popc(who & ((1u << lane_id()) - 1));
          list[place] = static_cast<u32>(kind == 0 ? thread : host.n_threads + thread * host.most_taken + kind - 1);
          shared.keys[place] = key;
          listed[chunk] |= 1u << kind;
        }
        n += __popc(who);
      };
      const u32 own = words[1];
      for (int first = 0; first < host.most_taken; first += kAtOnce) {
        u32 taken[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) taken[i] = first + i < host.most_taken ? words[2 + first + i] : 0;
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
          const int kind = 1 + first + i;
          const bool is_new = exists && first + i < host.most_taken && taken[i] >> 16 == (wanted & 0xffff) &&
                              (taken[i] & 0xffff) != 0 && (listed[chunk] >> kind & 1) == 0;
          add(is_new, kind, (taken[i] >> 8 & 0xff) << 8 | (taken[i] & 0xff));
        }
      }
      add(exists && is_up(own, wanted) && own != kNone && (listed[chunk] & 1) == 0, 0, static_cast<u32>(thread) << 8);
      gave_up |= __any_sync(kAllLanes, exists && (flag == kNone || own == kNone));
      all_done &= !__any_sync(kAllLanes, exists && !is_up(flag, wanted));
    }
    if (gave_up || last_look) break;
    if (n > before) {
      __threadfence();
      __syncwarp();
      if (lane_id() == 0) *count = wanted << 16 | n;
    }
    // What a thread wrote before its flag is certainly seen by the next look.
    last_look = all_done;
    __threadfence_system();
    if (!all_done) wait_a_little();
  }
  __syncwarp();
  u32* order = host.arrivals + 1 + kMostRows;
  for (u32 i = lane_id(); i < n && !gave_up; i += kWarp) {
    const u32 key = shared.keys[i];
    u32 place = 0;
    for (u32 other = 0; other < n; other++) place += shared.keys[other] < key;
    order[place] = (key & 0xff) == 0 ? i | kOwn : i;
  }
  __threadfence();
  __syncwarp();
  if (lane_id() == 0) {
    *count = wanted << 16 | n;
    // What choose has put here is not yet done.
    *static_cast<volatile u32*>(passed_on) = gave_up ? kNone : (wanted != 0 ? wanted : 1);
  }
}

// The CPU's sum for a lane's column, for one warp of each block: added up in an order that does not depend on who has
// computed what, or when. 0 if a thread has given up.
DEVICE float host_sum(const HostPart& host, u32 wanted, const u32* passed_on, int hidden, int column, HostShared& shared) {
  using namespace host_shape;
  const u32 done = wanted != 0 ? wanted : 1;
  const volatile u32* arrivals = host.arrivals;
  const volatile u32* end = passed_on;
  const volatile float* y = host.y + column;
  u32 n_here = 0;
  while (true) {
    const u32 word = lane_id() == 0 ? *end : arrivals[0];
    const u32 ended = __shfl_sync(kAllLanes, word, 0);
    if (ended == kNone) return 0.0f;
    // If all is done, the count that was read beside it may be an older one.
    __threadfence();
    const u32 count = ended == done ? arrivals[0] : __shfl_sync(kAllLanes, word, 1);
    const u32 n = count >> 16 == (wanted & 0xffff) ? count & 0xffff : 0;
    while (n_here < n) {
      const u32 row = n_here + lane_id() < n && lane_id() < kAtOnce ? arrivals[1 + n_here + lane_id()] : 0;
      float values[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        const u32 of = __shfl_sync(kAllLanes, row, i);
        values[i] = n_here + i < n ? y[static_cast<long long>(of) * hidden] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; i++)
        if (n_here + i < n) shared.rows[n_here + i][lane_id()] = values[i];
      n_here = min(n_here + kAtOnce, n);
    }
    if (ended == done) break;
    wait_a_little();
  }
  __syncwarp();
  float total = 0.0f, of_thread = 0.0f;
  for (u32 first = 0; first < n_here; first += kWarp) {
    const u32 places = first + lane_id() < n_here ? arrivals[1 + kMostRows + first + lane_id()] : 0;
    for (u32 i = 0; i < min(n_here - first, static_cast<u32>(kWarp)); i++) {
      const u32 place = __shfl_sync(kAllLanes, places, i);
      const float v = shared.rows[place & ~kOwn][lane_id()];
      if (place & kOwn) {
        total += of_thread;
        of_thread = v;
      } else {
        of_thread += v;
      }
    }
  }
  return total + of_thread;
}
