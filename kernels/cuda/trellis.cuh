// The trellis code of a sketch's rows (kernels/src/sketch/trellis.rs): from words of branch and point bits to levels.
//
// A unit of 64 columns has a word of 64 bits for each kind of bit, in which bit 4 m + r belongs to column 16 r + m. So eight nibbles
// of a half word are the codes of eight neighbouring columns once the words of all kinds are transposed, bit by bit, within
// nibbles, and a nibble is what __byte_perm selects a byte by.
#pragma once
#include "platform.cuh"

namespace trellis {
constexpr u32 kStripe = 0x11111111u;

// Levels are one more than twice a signed byte. All eight of two bits; of three bits those above zero: the others are these with
// all bits inverted, in falling order.
constexpr u32 kTwoBelow = 0xf3d8b780u, kTwoAbove = 0x7f48270cu;
constexpr u32 kThreeSmall = 0x261b0f05u, kThreeLarge = 0x7f5c4534u;

// The half word as it was n columns earlier; `below` is the half below it.
template <int n>
DEVICE u32 earlier(u32 below, u32 half) {
  return __funnelshift_r(below, half, 32 - 4 * n);
}

// Lower and upper bit of the subsets of half a unit's columns.
struct Subsets {
  u32 y0, y1;
  DEVICE Subsets(u32 below, u32 half)
      : y0(earlier<2>(below, half) ^ earlier<4>(below, half)), y1(half ^ earlier<1>(below, half) ^ earlier<6>(below, half)) {}
};

// What is below the lower half of a unit's branch bits: their upper half, sixteen columns earlier. Of the unit in front
// only the last columns are in there, which are in the upper half of its branch bits.
DEVICE u32 wrapped(u32 upper, u32 upper_before) { return ((upper << 1) & ~kStripe) | ((upper_before >> 3) & kStripe); }

// Nibble m of word r: bit r of nibble m of a, b and c, the lowest first.
DEVICE void transpose(u32 a, u32 b, u32 c, u32 (&out)[4]) {
  const u32 odd = 0x55555555u, two = 0x33333333u;
  const u32 even_ab = (a & odd) | ((b & odd) << 1), odd_ab = ((a >> 1) & odd) | (b & ~odd);
  const u32 even_c = c & odd, odd_c = (c >> 1) & odd;
  out[0] = (even_ab & two) | ((even_c & two) << 2);
  out[1] = (odd_ab & two) | ((odd_c & two) << 2);
  out[2] = ((even_ab >> 2) & two) | (even_c & ~two);
  out[3] = ((odd_ab >> 2) & two) | (odd_c & ~two);
}

// Half a unit of a row of two bits.
struct Two {
  static constexpr bool kIsOfThree = false;
  // Of columns 16 r to 16 r + 7, or 16 r + 8 to 16 r + 15 in the upper half, for each r.
  u32 codes[4];
  DEVICE Two() {}
  DEVICE Two(const Subsets& subsets, u32 points, u32 = 0) { transpose(subsets.y0, subsets.y1, points, codes); }
  // The first and the last four of these columns, as signed bytes.
  DEVICE uint2 levels(int r) const {
    return make_uint2(__byte_perm(kTwoBelow, kTwoAbove, codes[r]), __byte_perm(kTwoBelow, kTwoAbove, codes[r] >> 16));
  }
};

// Half a unit of a row of three bits.
struct Three {
  static constexpr bool kIsOfThree = true;
  u32 codes[4], below_zero;
  DEVICE Three() {}
  DEVICE Three(const Subsets& subsets, u32 points, u32 highest) : below_zero(~highest) {
    transpose(subsets.y0 ^ below_zero, subsets.y1 ^ below_zero, points ^ below_zero, codes);
  }
  DEVICE uint2 levels(int r) const {
    const u32 below = (below_zero >> r) & kStripe;
    // Bytes with all bits set where the level is below zero.
    const u32 first = __byte_perm(0x0000ff00u, 0, below), last = __byte_perm(0x0000ff00u, 0, below >> 16);
    return make_uint2(__byte_perm(kThreeSmall, kThreeLarge, codes[r]) ^ first,
                      __byte_perm(kThreeSmall, kThreeLarge, codes[r] >> 16) ^ last);
  }
};
}  // namespace trellis
