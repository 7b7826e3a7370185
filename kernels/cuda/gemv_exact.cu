// Rows with streams or a coarse plane times one vector, with the steps before and after it: RMSNorm, bias, residual;
// and the same rows as embeddings.
//
// Floor: the rows' bytes without what is behind the streams' ends, from device memory; else what a weight takes to
// decode (exact.cuh).
//
// - A team of warps has a row, a warp one or two segments of 1024 columns. Rows are dealt to teams in turn: the same
//   work gives the same bits.
// - The next row is copied to shared memory while this one is decoded from there. The first is asked for before the
//   kernel that writes the vector has ended. Rows that do not fit are read in place, by teams whose warps have several
//   segments.
#include "exact_team.cuh"
#include "shares.cuh"

// Arguments as for gemv_bf16, then bytes from row to row, a multiple of 16 as are their addresses, and the rows of a
// team in shared memory: 1 or 2, or 0 if they are read in place. columns is a multiple of 32, or for bf16x any number.
// Block: whole teams of `team_warps`, at most 8 warps; any number of them has a row. Dynamic shared memory: x, whole
// blocks of 64 columns; then `stages` rows for each team, and kSlackBytes.
template <class E, bool kStaged>
DEVICE void gemv_exact_rows(const unsigned char* w, int rows, int columns, const float* x, const float* norm_weight,
                            float eps, float* normed_out, const RowOutput& output, u32 stride, u32 stages,
                            u32 team_warps) {
  using namespace exact_shape;
  __shared__ float scratch[kWarp];
  let_next_start();
  const Planes<E> planes(columns, 1, stride);
  const RowTeam team(team_warps);
  const int n_teams = team.teams() * gridDim.x;
  auto row_at = [&](int row) { return w + static_cast<u64>(static_cast<u32>(row)) * stride; };
  const Staging<E> staging = {static_cast<u32>(columns), 1, stride, team, stages};
  // Neighbouring rows go to different blocks.
  const int first_row = team.index() * gridDim.x + blockIdx.x;
  if (kStaged && first_row < rows) staging.begin(0, row_at(first_row));

  const Input<Unscaled> input;
  if (norm_weight != nullptr) {
    input.stage_normed(x, norm_weight, eps, columns, normed_out);
  } else {
    input.stage(x, columns);
  }
  float* vector = reinterpret_cast<float*>(input.values);
  end_vector(vector, columns);
  __syncthreads();

  u32 round = 0;
#pragma unroll 1
  for (int row = first_row; row < rows; row += n_teams, round++) {
    const bool ahead = stages == 2 && row + n_teams < rows;
    if (kStaged) {
      if (round == 0 || stages == 1) {
        if (round > 0) staging.begin(round, row_at(row));
        staging.finish(round, row_at(row));
      }
      if (ahead) staging.begin(round + 1, row_at(row + n_teams));
    }
    float sum = 0.0f;
#pragma unroll 1
    for (u32 first = team.warp() * kTogether<E>; first < planes.segments; first += team.warps() * kTogether<E>) {
      const u32 segment = first + segment_of_warp<E>();
      auto decoder = [&] {
        if constexpr (kStaged) {
          return SegmentDecoder<E, true>(planes, staging.at(round), 0, segment);
        } else {
          return SegmentDecoder<E, false>(planes, row_at(row), 0, segment);
        }
      }();
      sum += dot_segments<E>(decoder, vector, segment, blocks_of(columns_of(columns, segment)),
                             blocks_of(columns_of(columns, first)));
    }
    const float total = team.sums(scratch, sum, 0.0f, [&] {
      if (kStaged) async_wait<0>();
    }).x;
    if (kStaged && ahead) staging.go_on(round + 1, row_at(row + n_teams));
    if (team.me() == 0) output.store(row, total);
    if (kStaged) {
      staging.wait();
    } else {
      team.barrier();
    }
  }
}

// Decodes the segments of a row that a warp has together, those of number `part`, in place. out: the row's.
template <class E>
DEVICE void decode_row(const unsigned char* row, u32 columns, u32 stride, u32 part, float* out) {
  const Planes<E> planes(columns, 1, stride);
  const u32 first = part * kTogether<E>, segment = first + segment_of_warp<E>();
  if (first >= planes.segments) return;
  SegmentDecoder<E, false> decoder(planes, row, 0, segment);
  const u32 last_block = blocks_of(columns_of(columns, first));
  for (u32 block = 0; block < last_block; block++) {
    const LaneValues<E> w = decoder.next(block);
    const u32 column =
        segment * exact_shape::kSegment + block * exact_shape::kBlock + E::kLaneColumns * segment_lane<E>();
#pragma unroll
    for (u32 i = 0; i < E::kLaneColumns; i++)
      if (column + i < columns) out[column + i] = w.v[i];
  }
}

// embed_*: as embed_q4 (embed.cu), then bytes from row to row. A block of one warp for every 1024 columns, some of
// which may have nothing to do.
#define GEMV_EXACT_KERNELS(name, E)                                                                                    \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                                 \
      gemv_##name(const unsigned char* w, int rows, int columns, const float* x, const float* norm_weight, float eps,  \
                  float* normed_out, const float* bias, const float* residual, float* out, u32 stride, u32 stages,     \
                  u32 team_warps) {                                                                                    \
    const RowOutput output = {rows, bias, residual, out};                                                              \
    if (stages > 0) {                                                                                                  \
      gemv_exact_rows<E, true>(w, rows, columns, x, norm_weight, eps, normed_out, output, stride, stages, team_warps); \
    } else {                                                                                                           \
      gemv_exact_rows<E, false>(w, rows, columns, x, norm_weight, eps, normed_out, output, stride, 0, team_warps);     \
    }                                                                                                                  \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(32)                                                                     \
      embed_##name(const u32* host_step, u32* step, const unsigned char* table, int columns, float* x, u32 stride) {   \
    let_next_start();                                                                                                  \
    wait_for_previous();                                                                                               \
    if (blockIdx.x == 0 && threadIdx.x < 5) step[threadIdx.x] = host_step[threadIdx.x];                                \
    decode_row<E>(table + static_cast<u64>(host_step[0]) * stride, columns, stride, blockIdx.x, x);                    \
  }
GEMV_EXACT_KERNELS(bf16x, Bf16x)
GEMV_EXACT_KERNELS(q4plus, Q4Plus)
GEMV_EXACT_KERNELS(q4exact, Q4Exact)
GEMV_EXACT_KERNELS(q8exact, Q8Exact)
#undef GEMV_EXACT_KERNELS
