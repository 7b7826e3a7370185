// The first kernel of a token: its embedding, and its number and position where the other kernels find them.
#include "decode.cuh"

// host_step: {token, position, serial, share of the CPU, bundles to fetch for each layer} in mapped host memory; step: the
// same on the device. x [columns].
// A block of 256 threads for every 256 columns.
template <class E>
DEVICE void embed(const u32* host_step, u32* step, const unsigned char* table, int columns, float* x) {
  let_next_start();
  wait_for_previous();
  if (blockIdx.x == 0 && threadIdx.x < 5) step[threadIdx.x] = host_step[threadIdx.x];
  const Row<E> row = matrix_row<E>(table + static_cast<u64>(host_step[0]) * row_stride<E>(columns), columns);
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column < columns) x[column] = weight<E>(row, column);
}

extern "C" __global__ void __launch_bounds__(256)
    embed_bf16(const u32* host_step, u32* step, const unsigned char* table, int columns, float* x) {
  embed<Bf16>(host_step, step, table, columns, x);
}
extern "C" __global__ void __launch_bounds__(256)
    embed_q8(const u32* host_step, u32* step, const unsigned char* table, int columns, float* x) {
  embed<Q8>(host_step, step, table, columns, x);
}
extern "C" __global__ void __launch_bounds__(256)
    embed_q4(const u32* host_step, u32* step, const unsigned char* table, int columns, float* x) {
  embed<Q4>(host_step, step, table, columns, x);
}
