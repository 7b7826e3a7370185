// Rows that give back bfloat16 bits, and q4 rows with the coarse plane, to floats in registers.
//
// A segment of 1024 columns is decoded block by block of 64; from block to block nothing is carried on but the place in
// the stream. The formats: kernels/src/exact/ (streams), kernels/src/bundle.rs (where planes lie); bundles and rows
// begin at multiples of 16 bytes, codes and coarse planes too, heads and streams anywhere.
//
// - bf16x, q4+plus: a warp has a segment, a lane two neighbouring columns. What a column has in a plane that not all
//   have is found by two ballots and the bits set before it. A block's further codes are at most 64 * 12 bits: each
//   lane loads one word of them, and words change hands by shuffles.
// - q4+exact, q8+exact: half a warp has a segment, a lane four neighbouring columns. Their numbers have up to 14
//   levels, most of them eight, each with a plane of its own: the counts of four levels are added up over the lanes in
//   one register, and four columns get their bits by one byte permutation.
//
// What a stream says of itself may be damaged: words are looked up behind one comparison, or where 2 KB behind the
// bundle may be read without it. Nothing else depends on it but values and exceptions' places, which are compared.
//
// Floor: bytes, of rows that are used 10.6 bits a weight for bf16x, 8.5, 11.4 and 11.3 for the others. Beside that the
// instructions of the fused kernel, from its SASS for compute capability 9.0, averaged over normal weights, and what
// four schedulers with an instruction a clock on each of 132 multiprocessors at 1.98 GHz could do with them, if nothing
// waited, in bfloat16:
//
// | encoding | instructions a warp and 128 weights | most, GB/s | share of issue slots for 300 GB/s |
// | --- | --- | --- | --- |
// | bf16x | 219 | 1220 | 25 % |
// | q4+plus | 82 | 3260 | 9 % |
// | q4+exact | 566: 467, for one column around zero 43 more, for several 203 (4 times in 10) | 470 | 63 % |
// | q8+exact | 519 | 515 | 58 % |
//
// Measured on an H200 (README): 639, 1774, 284 and 309 GB/s from device memory; over the link 75, 96, 69 and 70 of 82, 104,
// 78 and 78.
#pragma once
#include "decode.cuh"
#include "reduce.cuh"

namespace exact_shape {
constexpr u32 kSegment = 1024;
constexpr u32 kBlock = 64;
constexpr u32 kBlocks = kSegment / kBlock;
constexpr u32 kSymbols = 9;
// The number of exceptions of a segment that is its bfloat16.
constexpr u32 kPlain = 0xffff;
// As far as the numbers of a segment can lead: 16 blocks, 64 columns, 16 bits, and a word begun.
constexpr u32 kSlackBytes = 2048 + 16;
}  // namespace exact_shape

// Bytes of a row's planes; columns of a block that a lane has; how many blocks' decoders are laid out one after another
// where outputs are in registers: long ones would not fit in the instruction caches.
struct Bf16x {
  static constexpr u32 kHeadFirst = exact_shape::kSymbols, kHeadStep = 2, kLaneColumns = 2, kUnroll = 16;
  DEVICE static u32 code_bytes(u32 columns) { return columns + (columns + 63) / 64 * 16; }
  DEVICE static u32 scale_bytes(u32) { return 0; }
  DEVICE static u32 coarse_bytes(u32) { return 0; }
};
struct Q4Plus {
  static constexpr u32 kHeadFirst = 0, kHeadStep = 0, kLaneColumns = 2, kUnroll = 16;
  DEVICE static u32 code_bytes(u32 columns) { return columns / 2; }
  DEVICE static u32 scale_bytes(u32 columns) { return columns / 32 * 2; }
  DEVICE static u32 coarse_bytes(u32 columns) { return columns / 2; }
};
struct Q4Exact : Q4Plus {
  static constexpr u32 kHeadStep = 4, kLaneColumns = 4, kUnroll = 2;
};
struct Q8Exact {
  static constexpr u32 kHeadFirst = 0, kHeadStep = 4, kLaneColumns = 4, kUnroll = 2;
  DEVICE static u32 code_bytes(u32 columns) { return columns; }
  DEVICE static u32 scale_bytes(u32 columns) { return columns / 32 * 2; }
  DEVICE static u32 coarse_bytes(u32) { return 0; }
};

// The lanes of a segment, and the segments that a warp decodes at once: neighbouring ones of a row.
template <class E>
constexpr u32 kLanes = exact_shape::kBlock / E::kLaneColumns;
template <class E>
constexpr u32 kTogether = kWarp / kLanes<E>;

// This lane's columns of a block.
template <class E>
struct alignas(4 * E::kLaneColumns) LaneValues {
  float v[E::kLaneColumns];
};

// The lane's number among those of its segment, and its segment's number among those of its warp.
template <class E>
DEVICE u32 segment_lane() {
  return lane_id() % kLanes<E>;
}
template <class E>
DEVICE u32 segment_of_warp() {
  return lane_id() / kLanes<E>;
}

DEVICE u32 segments_of(u32 columns) { return (columns + exact_shape::kSegment - 1) / exact_shape::kSegment; }

// Warps that decode so many segments.
template <class E>
DEVICE u32 warps_of(u32 segments) {
  return (segments + kTogether<E> - 1) / kTogether<E>;
}

// Columns of a segment of a row; 0 behind the last.
DEVICE u32 columns_of(u32 columns, u32 segment) {
  const u32 first = segment * exact_shape::kSegment;
  return first < columns ? min(columns - first, exact_shape::kSegment) : 0;
}

// Where the planes of a bundle's three rows begin, or of the one row of a matrix, in bytes.
template <class E>
struct Planes {
  u32 columns, segments, rows, bytes;
  u32 code_bytes, scale_bytes, coarse_bytes, head_bytes;
  u32 scales, coarse, heads, streams;

  // Codes begin at a multiple of 16; there are `bytes` in all, a multiple of 16.
  DEVICE Planes(u32 columns, u32 rows, u32 bytes) : columns(columns), rows(rows), bytes(bytes) {
    segments = segments_of(columns);
    code_bytes = E::code_bytes(columns);
    scale_bytes = E::scale_bytes(columns);
    coarse_bytes = E::coarse_bytes(columns);
    head_bytes = E::kHeadStep > 0 ? E::kHeadFirst + E::kHeadStep * segments : 0;
    scales = rows * code_bytes;
    coarse = (scales + rows * scale_bytes + 15) / 16 * 16;
    heads = coarse + (rows * coarse_bytes + 15) / 16 * 16;
    streams = heads + rows * head_bytes;
  }

  // What is as long in every bundle, with all heads, and on to the end of its line: over the link two parts of a line
  // cost as much as two lines.
  DEVICE u32 fixed_bytes() const { return min((streams + 127) / 128 * 128, bytes); }

  DEVICE u32 head_entry(u32 which, u32 segment) const {
    return heads + which * head_bytes + E::kHeadFirst + segment * E::kHeadStep;
  }

  // Where the stream of segment number `entry` of all rows' begins; that after the last is where all end. The lanes of
  // a segment ask for the same.
  DEVICE u32 stream_at(const unsigned char* base, u32 entry) const {
    const u32 last = kTogether<E> > 1 ? __shfl_sync(kAllLanes, entry, kWarp - 1) : entry;
    u32 sum = 0, more = 0;
    // Of the first segment together with those of the last that it has not; entries grow along a warp.
    const u32 first = kTogether<E> > 1 ? __shfl_sync(kAllLanes, entry, 0) : entry;
    for (u32 i = lane_id(); i < last; i += kWarp) {
      const u32 at = head_entry(i / segments, i % segments);
      const u32 length = base[at] | static_cast<u32>(base[at + 1]) << 8;
      if (i < first) sum += length;
      if (i >= first) more += length;
    }
    u32 at = streams + __reduce_add_sync(kAllLanes, sum);
    if (kTogether<E> > 1) {
      more = __reduce_add_sync(kAllLanes, more);
      if (segment_of_warp<E>() > 0) at += more;
    }
    return min(at, bytes);
  }

  // Bytes up to the end of the streams, up to a multiple of 16.
  DEVICE u32 used_bytes(const unsigned char* base) const {
    return E::kHeadStep > 0 ? min((stream_at(base, rows * segments) + 15) / 16 * 16, bytes) : bytes;
  }
};

// The columns of a block that have something.
struct Members {
  u32 even, odd;

  DEVICE Members(bool first, bool second)
      : even(__ballot_sync(kAllLanes, first)), odd(__ballot_sync(kAllLanes, second)) {}
  DEVICE u32 any() const { return even | odd; }
  DEVICE u32 count() const { return __popc(even) + __popc(odd); }
  // Those before this lane's first column.
  DEVICE u32 before() const {
    const u32 below = (1u << lane_id()) - 1;
    return __popc(even & below) + __popc(odd & below);
  }
};

// What a stream has for a block: every lane a word.
struct Window {
  u32 word;

  DEVICE Window(const unsigned char* base, u32 bytes, u32 bit) {
    word = reinterpret_cast<const u32*>(base)[min(bit / 32 + lane_id(), bytes / 4 - 1)];
  }
  // Bit `bit` from the first word's first, and those above it in the same word. The lanes of a warp ask together.
  DEVICE u32 at(u32 bit) const {
    const u32 v = __shfl_sync(kAllLanes, word, bit >> 5);
    return __funnelshift_r(v, v, bit);
  }
  // 32 bits from `bit` on.
  DEVICE u32 bits(u32 bit) const {
    const u32 low = __shfl_sync(kAllLanes, word, bit >> 5), high = __shfl_sync(kAllLanes, word, (bit >> 5) + 1);
    return __funnelshift_r(low, high, bit);
  }
};

DEVICE u32 unaligned_u16(const unsigned char* p) { return p[0] | static_cast<u32>(p[1]) << 8; }
DEVICE u32 aligned_u16(const unsigned char* p) { return *reinterpret_cast<const u16*>(p); }

// One segment of one row, block by block. next() gives the lane's columns of a block, 0 for columns that there are not;
// blocks must be asked for in their order, by all lanes of a warp, until its longest segment ends.
//
// kSlack: the bundle lies in dynamic shared memory, and behind its last byte kSlackBytes may be read, whatever they
// are. Else none is, even of a damaged bundle.
template <class E, bool kSlack>
struct SegmentDecoder;

template <bool kSlack>
struct SegmentDecoder<Bf16x, kSlack> {
  const unsigned char* base;
  u32 bytes, columns, signs, codes, bit;
  // Exponents of three codes each, by level.
  u32 table[3];

  DEVICE SegmentDecoder(const Planes<Bf16x>& planes, const unsigned char* base, u32 which, u32 segment) : base(base) {
    bytes = planes.bytes;
    columns = columns_of(planes.columns, segment);
    signs = which * planes.code_bytes + segment * exact_shape::kSegment + 2 * lane_id();
    codes = which * planes.code_bytes + planes.columns + segment * (exact_shape::kSegment / 4) + lane_id() / 2;
    const unsigned char* symbols = base + planes.heads + which * planes.head_bytes;
#pragma unroll
    for (int level = 0; level < 3; level++)
      table[level] = unaligned_u16(symbols + 3 * level) | static_cast<u32>(symbols[3 * level + 2]) << 16;
    bit = 8 * planes.stream_at(base, which * planes.segments + segment);
  }

  DEVICE LaneValues<Bf16x> next(u32 block) {
    const u32 column = exact_shape::kBlock * block + 2 * lane_id();
    const u32 sm = aligned_u16(base + signs + exact_shape::kBlock * block);
    const u32 first_level = base[codes + exact_shape::kBlock / 4 * block] >> (lane_id() % 2 * 4);
    const Window window(base, bytes, bit);
    u32 at = bit % 32;
    // The next level's codes of those whose code is 3.
    u32 code[2] = {first_level & 3, first_level >> 2 & 3};
    const bool second[2] = {code[0] == 3, code[1] == 3};
    const Members seconds(second[0], second[1]);
    const u32 place = at + 2 * seconds.before();
    at += 2 * seconds.count();
    const u32 v[2] = {window.at(place) & 3, window.at(place + (second[0] ? 2 : 0)) & 3};
    const bool third[2] = {second[0] && v[0] == 3, second[1] && v[1] == 3};
    const Members thirds(third[0], third[1]);
    const u32 third_place = at + 2 * thirds.before();
    at += 2 * thirds.count();
    const u32 t[2] = {window.at(third_place) & 3, window.at(third_place + (third[0] ? 2 : 0)) & 3};
    u32 exponent[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      // Bytes 4 to 6 are those of the second level.
      exponent[i] = __byte_perm(table[0], table[1], second[i] ? 4 + v[i] : code[i]);
      if (third[i]) exponent[i] = __byte_perm(table[2], 0, t[i]);
    }
    const bool literal[2] = {third[0] && t[0] == 3, third[1] && t[1] == 3};
    const Members literals(literal[0], literal[1]);
    if (literals.any() != 0) {
      const u32 literal_place = at + 8 * literals.before();
      const u32 l[2] = {window.bits(literal_place), window.bits(literal_place + (literal[0] ? 8 : 0))};
      at += 8 * literals.count();
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (literal[i]) exponent[i] = l[i];
    }
    bit += at - bit % 32;
    // Only the lowest byte of an exponent is one: what it has above is shifted out or masked.
    auto join = [&](u32 sign_mantissa, u32 exponent, bool exists) {
      const u32 bits = (sign_mantissa & 0x807f0000u) | (exponent << 23 & 0x7f80ffffu);
      return exists ? __uint_as_float(bits) : 0.0f;
    };
    return {{join(__byte_perm(sm, 0, 0x0044), exponent[0], column < columns),
             join(__byte_perm(sm, 0, 0x1144), exponent[1], column + 1 < columns)}};
  }
};

// What q4 with planes and q8 have in common: places of codes, and scales.
template <class E, bool kQ4>
struct GroupedSegment {
  static constexpr u32 kGroupLanes = kLanes<E> / 2;

  const unsigned char* base;
  // Of the lane in block 0.
  u32 codes, coarse, scales;
  u32 n_groups;

  DEVICE GroupedSegment(const Planes<E>& planes, const unsigned char* base, u32 which, u32 segment) : base(base) {
    n_groups = columns_of(planes.columns, segment) / 32;
    // Byte j of a q4 group holds columns j (low) and j + 16 (high).
    const u32 lane = segment_lane<E>(), group = lane / kGroupLanes;
    const u32 in_block = kQ4 ? group * 16 + lane * E::kLaneColumns % 16 : lane * E::kLaneColumns;
    codes = which * planes.code_bytes + segment * (kQ4 ? 512 : 1024) + in_block;
    coarse = planes.coarse + which * planes.coarse_bytes + segment * 512 + in_block;
    scales = planes.scales + which * planes.scale_bytes + (segment * 32 + group) * 2;
  }

  DEVICE bool exists(u32 block) const { return 2 * block + segment_lane<E>() / kGroupLanes < n_groups; }

  // The scale of the lane's group; 0 for groups that there are not.
  DEVICE float scale(u32 block) const {
    return exists(block) ? half_to_float(static_cast<u16>(aligned_u16(base + scales + 4 * block))) : 0.0f;
  }

  // The codes of the lane's columns, 8 bits each: q4 ones above the coarse ones. Anything for groups that there are
  // not.
  DEVICE u32 bytes(u32 block) const {
    auto load = [&](u32 at) {
      const unsigned char* p = base + at;
      return E::kLaneColumns == 2 ? aligned_u16(p) : *reinterpret_cast<const u32*>(p);
    };
    const bool is = exists(block);
    if (!kQ4) return load(is ? codes + 64 * block : 0);
    const u32 half = segment_lane<E>() * E::kLaneColumns / 16 % 2 * 4;
    const u32 upper = load(is ? codes + 32 * block : 0) >> half, lower = load(is ? coarse + 32 * block : 0) >> half;
    return (upper << 4 & 0xf0f0f0f0u) | (lower & 0x0f0f0f0fu);
  }
};

template <bool kSlack>
struct SegmentDecoder<Q4Plus, kSlack> {
  GroupedSegment<Q4Plus, true> groups;

  DEVICE SegmentDecoder(const Planes<Q4Plus>& planes, const unsigned char* base, u32 which, u32 segment)
      : groups(planes, base, which, segment) {}

  DEVICE LaneValues<Q4Plus> next(u32 block) {
    const u32 pair = groups.bytes(block);
    const float unit = groups.scale(block) * (1.0f / 16), offset = -135.5f * unit;
    // In the mantissa of 2^23; both steps are exact.
    auto value = [&](u32 code) { return (__uint_as_float(code | 0x4b000000u) - 8388608.0f) * unit + offset; };
    return {{value(pair & 0xff), value(pair >> 8 & 0xff)}};
  }
};

// The bfloat16 of a cell: `first` is the order key of the smallest (key() in kernels/src/exact/residual.rs), `n` how
// many there are.
//
// Bounds are computed as magnitudes k * |unit| and (k + 1) * |unit|, exactly, on the side of zero where the cell lies:
// the bfloat16 not below a positive bound is its bits rounded up, that not below a negative one its bits cut off.
struct CellBounds {
  int first;
  u32 n;

  // From rounded magnitudes, and whether the cell is on the negative side.
  DEVICE CellBounds(int low, int high, int negative) : first(negative ? ~high : low), n(max(high - low, 1)) {}

  DEVICE static int rounded(float magnitude, int negative) {
    return static_cast<int>(__float_as_uint(magnitude) + (0xffff & ~negative)) >> 16;
  }
  DEVICE static float small_float(u32 k) { return __uint_as_float(k | 0x4b000000u) - 8388608.0f; }

  // code: q4 code and coarse code together.
  DEVICE static CellBounds q4(u32 code, float unit) {
    const int flip = static_cast<int>(__float_as_uint(unit)) >> 31, alive = unit != 0.0f ? -1 : 0;
    const int t = ((static_cast<int>(code) - 136) ^ flip) & alive, negative = t >> 31;
    const float k = small_float(t ^ negative), size = fabsf(unit);
    int low = rounded(k * size, negative);
    // Down to and with -0.
    if (t == -1) low = -1;
    return CellBounds(low, rounded(k * size + size, negative), negative);
  }
  DEVICE static CellBounds q8(u32 code, float unit) {
    const int flip = static_cast<int>(__float_as_uint(unit)) >> 31, alive = unit != 0.0f ? -1 : 0;
    const int signed_code = static_cast<int>(code << 24) >> 24;
    const int t = ((signed_code ^ flip) - flip) & alive, negative = t >> 31;
    const float size = fabsf(unit), k = small_float((t ^ negative) - negative);
    int low = rounded(k * (2.0f * size) - size, negative);
    // Around zero, from the negative bound on.
    if (t == 0) low = ~static_cast<int>(__float_as_uint(size) >> 16) & alive;
    return CellBounds(low, rounded(k * (2.0f * size) + size, negative), negative);
  }

  // Bits that every number has, and numbers that have no more.
  DEVICE u32 width() const { return 31 - __clz(static_cast<int>(n)); }
  DEVICE u32 n_short(u32 width) const { return (2u << width) - n; }
};

// Four columns a lane, so that a warp decodes two segments side by side. What is counted, found and put together for
// the columns of a lane is so in one register, four bits or a byte a column.
template <class E, bool kQ4, bool kSlack>
struct ResidualDecoder {
  GroupedSegment<E, kQ4> groups;
  // Bits are counted from the beginning of the bundle, or of all dynamic shared memory if it lies there: one addition
  // less for each of a block's accesses.
  u32 bytes, bit;
  // The next exception: its place; its column, which is kNoColumn if there is none, with the number of exceptions from
  // there on above. Of a plain segment, whose number of exceptions says so, the place of its bfloat16 and how many.
  u32 exception, numbers;
  static constexpr u32 kNoColumn = 0xffff;

  DEVICE ResidualDecoder(const Planes<E>& planes, const unsigned char* base, u32 which, u32 segment)
      : groups(planes, base, which, segment) {
    bytes = planes.bytes;
    const u32 columns = columns_of(planes.columns, segment);
    const u32 start = planes.stream_at(base, which * planes.segments + segment);
    bit = 8 * (start + (kSlack ? static_cast<u32>(base - dynamic_shared()) : 0));
    exception = start;
    numbers = kNoColumn;
    if (columns == 0) return;
    const unsigned char* entry = base + planes.head_entry(which, segment);
    const u32 length = min(aligned_u16(entry), bytes - start), n = aligned_u16(entry + 2);
    if (n == exact_shape::kPlain) {
      // Cells of one bfloat16 each have no numbers.
      groups.n_groups = 0;
      if (2 * columns <= length) numbers = n << 16 | columns;
    } else if (4 * n <= length) {
      exception = start + length - 4 * n;
      find_exception(n);
    }
  }

  DEVICE bool is_plain() const { return numbers >> 16 == exact_shape::kPlain; }
  DEVICE void find_exception(u32 n) {
    numbers = n > 0 ? n << 16 | unaligned_u16(groups.base + exception) : kNoColumn;
  }

  // 32 bits of the stream from `place` on.
  DEVICE u32 bits(u32 place) const {
    const u32* words = reinterpret_cast<const u32*>(kSlack ? dynamic_shared() : groups.base);
    const u32 at = computed(place / 32);
    if (kSlack) return __funnelshift_r(words[at], words[at + 1], place);
    const u32 last = bytes / 4 - 1;
    return __funnelshift_r(words[min(at, last)], words[min(at + 1, last)], place);
  }

  // Byte `i`.
  DEVICE static u32 byte_of(u32 v, int i) { return __byte_perm(v, 0, 0x4440 + i); }

  // The bits of those columns whose flag (bit 3 of four) is up, from the lowest of `stream` on: bit 0 of a byte each.
  DEVICE static u32 spread(u32 stream, u32 flags) {
    const u32 bytes = (stream & 15) * 0x00204081u & 0x01010101u;
    // A column has the byte whose number is that of the flags before it; byte 4 on is zeros.
    return __byte_perm(bytes, 0, flags * 0x222u | (~(flags >> 1) & 0x4444u));
  }

  // Counts of up to 64 in the bytes of `own`, added up over the lanes before this one of the segment, and over all.
  DEVICE static void count(u32 own, u32& before, u32& total) {
    u32 sum = own;
    static_assert(kLanes<E> == 16, "halves of a warp");
#pragma unroll
    for (u32 step = 1; step < kLanes<E>; step *= 2) sum = add_from_below(sum, step);
    before = sum - own;
    total = __shfl_sync(kAllLanes, sum, lane_id() | (kLanes<E> - 1));
  }

  // Eight levels of numbers of up to eight bits: a byte a column of those whose widths are four bits each.
  DEVICE u32 octet(u32 widths) {
    auto flags = [&](int j) { return (widths + (7 - j) * 0x1111u) & 0x8888u; };
    u32 out = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 own = 0, before, total;
#pragma unroll
      for (int j = 0; j < 4; j++) own += static_cast<u32>(__popc(flags(4 * half + j))) << 8 * j;
      count(own, before, total);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        out += spread(bits(bit + byte_of(before, j)), flags(4 * half + j)) << (4 * half + j);
        bit += byte_of(total, j);
      }
    }
    return out;
  }

  // What numbers have above their eighth bit, by the widths of that. In most blocks it is one column around zero that
  // has a handful, which then lie together.
  DEVICE u32 upper(u32 widths) {
    const u32 flags = (widths + 0x7777u) & 0x8888u;
    const u32 lanes = __ballot_sync(kAllLanes, widths != 0);
    if (lanes == 0) return 0;
    constexpr u32 kSegmentMask = (1u << (kLanes<E> % kWarp)) - 1;
    const u32 base_lane = lane_id() / kLanes<E> * kLanes<E>, of_segment = lanes >> base_lane & kSegmentMask;
    if (__any_sync(kAllLanes, __popc(of_segment) > 1 || __popc(flags) > 1)) return octet(widths);
    const u32 owner = base_lane + (of_segment != 0 ? 31 - __clz(static_cast<int>(of_segment)) : 0);
    // Three of four are zero.
    const u32 width = (widths * 0x1111u >> 12) & 15;
    const u32 stream = bits(bit) & ((1u << width) - 1);
    bit += __shfl_sync(kAllLanes, width, owner);
    // From the bit above the four to a byte.
    return flags == 0 ? 0 : stream << 2 * ((31 - __clz(static_cast<int>(flags))) & 0xc);
  }

  DEVICE LaneValues<E> next(u32 block) {
    const u32 codes = groups.bytes(block);
    const float unit = groups.scale(block) * (kQ4 ? 1.0f / 16 : 0.5f);
    // Of every cell: the first bfloat16's key in the lower half, the numbers that have no more bits in the upper one.
    u32 cells[4], widths = 0, more = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 code = byte_of(codes, i);
      const CellBounds cell = kQ4 ? CellBounds::q4(code, unit) : CellBounds::q8(code, unit);
      const u32 width = cell.width();
      cells[i] = __byte_perm(static_cast<u32>(cell.first), cell.n_short(width), 0x5410);
      widths += min(width, 8u) << 4 * i;
      more += max(width, 8u) << 4 * i;
    }
    const u32 low = octet(widths), high = upper((more - 0x8888u) & 0x7777u);
    // How far a number is from those that have a bit more, if it is not below.
    auto number = [&](int i) { return static_cast<int>(__byte_perm(low, high, 0x40 + 0x11 * i) & 0xffff); };
    auto beyond = [&](int i) { return number(i) - static_cast<int>(cells[i] >> 16); };
    u32 flags = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) flags |= (~static_cast<u32>(beyond(i)) >> (28 - 4 * i)) & (8u << 4 * i);
    u32 before, total;
    count(__popc(flags), before, total);
    const u32 last = spread(bits(bit + before), flags);
    bit += total;
    LaneValues<E> values;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 whole = static_cast<u32>(number(i) + max(beyond(i), 0)) + byte_of(last, i);
      // The key, in the upper half.
      const u32 key = (cells[i] + whole) << 16;
      values.v[i] = __uint_as_float(key ^ (static_cast<u32>(static_cast<int>(key) >> 31) & 0x7fff0000u));
    }
    replace(block, values);
    return values;
  }

  // Puts a plain segment's weights, or exceptions, in their places.
  DEVICE void replace(u32 block, LaneValues<E>& values) {
    const u32 column = exact_shape::kBlock * block + 4 * segment_lane<E>();
    if (is_plain()) {
      if (column >= (numbers & 0xffff)) return;
      const unsigned char* p = groups.base + exception + 2 * column;
#pragma unroll
      for (int i = 0; i < 4; i++) values.v[i] = __uint_as_float(unaligned_u16(p + 2 * i) << 16);
      return;
    }
    // In ascending order, each in its turn.
    while ((numbers & 0xffff) < exact_shape::kBlock * (block + 1)) {
      const u32 place = (numbers & 0xffff) - column;
      const float value = __uint_as_float(unaligned_u16(groups.base + exception + 2) << 16);
#pragma unroll
      for (u32 i = 0; i < 4; i++)
        if (place == i) values.v[i] = value;
      exception += 4;
      find_exception((numbers >> 16) - 1);
    }
  }
};

template <bool kSlack>
struct SegmentDecoder<Q4Exact, kSlack> : ResidualDecoder<Q4Exact, true, kSlack> {
  using ResidualDecoder<Q4Exact, true, kSlack>::ResidualDecoder;
};
template <bool kSlack>
struct SegmentDecoder<Q8Exact, kSlack> : ResidualDecoder<Q8Exact, false, kSlack> {
  using ResidualDecoder<Q8Exact, false, kSlack>::ResidualDecoder;
};

DEVICE u32 blocks_of(u32 columns) { return (columns + exact_shape::kBlock - 1) / exact_shape::kBlock; }

// Adds the products of a segment of a row with the vector `x`, which begins at the row's first column.
template <class E, class D>
DEVICE float dot_segments(D decoder, const float* x, u32 segment, u32 n_blocks, u32 last_block) {
  const LaneValues<E>* of_lane = reinterpret_cast<const LaneValues<E>*>(x + segment * exact_shape::kSegment);
  float sum = 0.0f;
#pragma unroll 1
  for (u32 block = 0; block < last_block; block++) {
    const LaneValues<E> w = decoder.next(block);
    if (block >= n_blocks) continue;
    const LaneValues<E> v = of_lane[block * kLanes<E> + segment_lane<E>()];
#pragma unroll
    for (u32 i = 0; i < E::kLaneColumns; i++) sum += w.v[i] * v.v[i];
  }
  return sum;
}
