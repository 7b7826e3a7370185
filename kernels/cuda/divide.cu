// The work list of a layer whose bundles have several layouts, divided among its sections: the fused kernel takes one
// layout and runs once for each.
//
// A block of 1024 threads for each section. Both the neurons over the link and the hot ones are listed in ascending order,
// so that a section has a range of either; a thread that finds a range's first item says where it begins. What was cached or
// fetched is of the last section. Floor: the list, read and written once from the second-level cache.
#include "platform.cuh"

struct SectionPart {
  uint2* items;  // its list, as in choose.cu, with bundles counted from the section's first hot and first cold one
  u32* counts;   // [8]: items, link, cached, hot, 0, items, fetched, 0
  u64* totals;   // [8]: rows, not neurons, for link and hot
  u32 first, end;  // its neurons
};

namespace divide_shape {
constexpr u32 kThreads = 1024;
// Sections of a launch.
constexpr u32 kParts = 4;
constexpr u32 kNumber = 0x3fffffffu;
constexpr u32 kCold = 0x40000000u;
}  // namespace divide_shape

struct DivideWork {
  const uint2* items;  // of the layer
  const u32* counts;   // [8]
  u32 n_hot, ffn;
  SectionPart parts[divide_shape::kParts];
};

extern "C" __global__ void __launch_bounds__(1024, 1) divide_work(DivideWork work) {
  using namespace divide_shape;
  // Of the neurons over the link, and of the hot ones: the section's first item and the one behind its last.
  __shared__ u32 ranges[2][2];
  // Rows to read of the section's, by kind as above.
  __shared__ u32 rows[2];
  let_next_start();
  wait_for_previous();
  const SectionPart part = work.parts[blockIdx.x];
  const u32 thread = threadIdx.x;
  const u32 n_items = work.counts[0], n_link = work.counts[1], n_cached = work.counts[2], n_fetched = work.counts[6];
  const u32 first_hot = n_link + n_fetched + n_cached;
  const u32 begins[2] = {0, first_hot}, ends[2] = {n_link, n_items};
  if (thread < 4) ranges[thread / 2][thread % 2] = thread < 2 ? n_link : n_items;
  if (thread < 2) rows[thread] = 0;
  __syncthreads();

  auto neuron_at = [&](u32 i) {
    const u32 from = work.items[i].x;
    return (from & kNumber) + (from & kCold ? work.n_hot : 0);
  };
#pragma unroll
  for (u32 kind = 0; kind < 2; kind++) {
    for (u32 i = begins[kind] + thread; i < ends[kind]; i += kThreads) {
      const u32 neuron = neuron_at(i), before = i > begins[kind] ? neuron_at(i - 1) + 1 : 0;
      // Nothing before it is as high.
      if (neuron >= part.first && before <= part.first) ranges[kind][0] = i;
      if (neuron >= part.end && before <= part.end) ranges[kind][1] = i;
    }
  }
  __syncthreads();

  // Over the link, the others from there, hot.
  const bool is_last = part.end == work.ffn;
  const u32 link = ranges[0][1] - ranges[0][0], others = is_last ? first_hot - n_link : 0;
  const u32 hot = ranges[1][1] - ranges[1][0], n = link + others + hot;
  const u32 first_cold = max(part.first, work.n_hot) - work.n_hot;
  u32 link_rows = 0, hot_rows = 0;
  for (u32 i = thread; i < n; i += kThreads) {
    uint2 item;
    if (i < link) {
      item = work.items[ranges[0][0] + i];
      item.x -= first_cold;
      link_rows += __popc(rows_of_item(item.y));
    } else if (i < link + others) {
      item = work.items[n_link + i - link];
    } else {
      item = work.items[ranges[1][0] + i - link - others];
      item.x -= part.first;
      hot_rows += __popc(rows_of_item(item.y));
    }
    part.items[i] = item;
  }
  link_rows = __reduce_add_sync(kAllLanes, link_rows);
  hot_rows = __reduce_add_sync(kAllLanes, hot_rows);
  if (lane_id() == 0) {
    atomicAdd(&rows[0], link_rows);
    atomicAdd(&rows[1], hot_rows);
  }
  __syncthreads();
  if (thread < 8) {
    const u32 values[8] = {n, link, is_last ? n_cached : 0, hot, 0, n, is_last ? n_fetched : 0, 0};
    u32 value = 0;
#pragma unroll
    for (u32 i = 0; i < 8; i++)
      if (i == thread) value = values[i];
    part.counts[thread] = value;
    if (thread == 1 || thread == 3) value = rows[thread / 2];
    if (value > 0) atomicAdd(&part.totals[thread], static_cast<u64>(value));
  }
}
