//! Four units at a time, a u64 of each in a vector: a few shifts make the subsets of all of their columns, and
//! exchanges of bits between words gather each column's bits in a nibble, the index of its level. Then a unit is eight
//! vectors of 8 columns.
//!
//! Eight levels of two bits are one vector: eight nibbles, the same in all lanes, are shifted by each lane's place, and
//! `vpermps` looks at the low three bits of an index only. Sixteen levels of three bits are too many for it: `vpshufb`
//! makes bytes of them, which are widened and converted; a level is one more than twice its byte.

// Several arrays advance together; an iterator over one of them would hide that.
#![allow(clippy::needless_range_loop)]

use super::{Ahead, Layout, Rows};
use crate::SKETCH_UNIT;
use crate::sketch::{CODE_BYTES, PLANE_BYTES, Parts};
use crate::x86::avx2::sum;
use std::arch::x86_64::*;

/// AVX2 and FMA.
pub(crate) struct Avx2;

/// Vectors of a unit, in the order of columns.
const VECTORS: usize = SKETCH_UNIT / 8;
/// Units that are decoded at once: a u64 of each in a vector.
const UNITS: usize = 4;

/// Some units of a row, half decoded.
#[derive(Clone, Copy, Default)]
#[repr(align(32))]
struct Decoded {
    /// In two bits the indices of levels, `[4, UNITS, 2]`, of units in order 0 2 1 3: nibble m of number `[r, _, h]`
    /// has that of column 16 r + 8 h + m.
    indices: [[[i32; 2]; UNITS]; 4],
    /// In three bits the bytes of the levels, `[4, UNITS, 16]`: number `[r, _, m]` is that of column 16 r + m.
    bytes: [[[i8; 16]; UNITS]; 4],
    /// What the levels of a unit are multiplied with.
    factors: [f32; UNITS],
}

/// As [`trellis::subsets`](crate::sketch::trellis), of four units.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn subsets(branches: __m256i, before: __m256i) -> [__m256i; 2] {
    let nibbles = _mm256_set1_epi64x(0x1111_1111_1111_1111);
    let stripe_before = _mm256_or_si256(
        _mm256_andnot_si256(nibbles, _mm256_slli_epi64::<1>(branches)),
        _mm256_and_si256(nibbles, _mm256_srli_epi64::<3>(before)),
    );
    let both = |a, b| _mm256_xor_si256(a, b);
    let two = both(_mm256_slli_epi64::<8>(branches), _mm256_srli_epi64::<56>(stripe_before));
    let four = both(_mm256_slli_epi64::<16>(branches), _mm256_srli_epi64::<48>(stripe_before));
    let one = both(_mm256_slli_epi64::<4>(branches), _mm256_srli_epi64::<60>(stripe_before));
    let six = both(_mm256_slli_epi64::<24>(branches), _mm256_srli_epi64::<40>(stripe_before));
    [both(two, four), both(branches, both(one, six))]
}

/// Exchanges the bits of `a` that are `BY` to the left of `mask` for the bits of `b` in it.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn exchange<const BY: i32>(mask: i64, a: __m256i, b: __m256i) -> [__m256i; 2] {
    let differ = _mm256_xor_si256(_mm256_srli_epi64::<BY>(a), b);
    let differ = _mm256_and_si256(differ, _mm256_set1_epi64x(mask));
    [_mm256_xor_si256(a, _mm256_slli_epi64::<BY>(differ)), _mm256_xor_si256(b, differ)]
}

/// From bit k of columns 16 r + m in bit 4 m + r of word k, all of these bits in nibble m of word r.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn stripes<const HIGH: bool>([y0, y1, low, high]: [__m256i; 4]) -> [__m256i; 4] {
    const PAIRS: i64 = 0x3333_3333_3333_3333;
    const ONES: i64 = 0x5555_5555_5555_5555;
    let [a, c] = exchange::<2>(PAIRS, y0, low);
    let [b, d] = if HIGH { exchange::<2>(PAIRS, y1, high) } else { [y1, _mm256_srli_epi64::<2>(y1)] };
    let [[a, b], [c, d]] = [exchange::<1>(ONES, a, b), exchange::<1>(ONES, c, d)];
    [a, b, c, d]
}

/// The first four of `n` u64, with zeros behind them if there are fewer.
///
/// # Safety
/// So many are readable.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn words(from: *const u8, n: usize) -> __m256i {
    if n >= 4 {
        // SAFETY: by this function's contract.
        return unsafe { _mm256_loadu_si256(from.cast()) };
    }
    let mask = _mm256_cmpgt_epi64(_mm256_set1_epi64x(n as i64), _mm256_setr_epi64x(0, 1, 2, 3));
    // SAFETY: as above, and the masked rest is not touched.
    unsafe { _mm256_maskload_epi64(from.cast(), mask) }
}

/// The columns of units `first` to `first + n` of a row, n at most [`UNITS`]: nibble m of word r has the index of the level of column
/// 16 r + m, units in order 0 2 1 3. `before` has the branch bits of the last unit in front, or zero, in its first lane, and gets
/// those of the last of these.
///
/// # Safety
/// `row` has these units.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn stripes_of<const HIGH: bool>(
    row: &Parts<'_>,
    first: usize,
    n: usize,
    before: &mut __m256i,
) -> [__m256i; 4] {
    // SAFETY: bytes of `n` units are readable by contract.
    let (front, back, high) = unsafe {
        let codes = row.codes.as_ptr().add(first * CODE_BYTES);
        let high = row.high.as_ptr().wrapping_add(first * PLANE_BYTES);
        (
            words(codes, 2 * n),
            words(codes.wrapping_add(32), (2 * n).saturating_sub(4)),
            if HIGH { words(high, n) } else { _mm256_setzero_si256() },
        )
    };
    let branches = _mm256_unpacklo_epi64(front, back);
    let low = _mm256_unpackhi_epi64(front, back);
    let high = _mm256_permute4x64_epi64::<0b11_01_10_00>(high);
    let rotated = _mm256_permute4x64_epi64::<0b01_00_10_11>(branches);
    let [y0, y1] = subsets(branches, _mm256_blend_epi32::<3>(rotated, *before));
    *before = rotated;
    stripes::<HIGH>([y0, y1, low, high])
}

/// Units `first` to `first + n` of a row, and `a` times their scales, from [`stripes_of`] these.
///
/// # Safety
/// As there.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn decode<const HIGH: bool>(
    layout: &Layout,
    row: &Parts<'_>,
    a: f32,
    first: usize,
    n: usize,
    before: &mut __m256i,
    out: &mut Decoded,
) {
    // SAFETY: by this function's contract.
    let (stripes, codes) =
        unsafe { (stripes_of::<HIGH>(row, first, n, before), row.scales.get_unchecked(first..first + n)) };
    let row_scale = row.scale;
    for (factor, code) in out.factors.iter_mut().zip(codes) {
        *factor = a * (row_scale * f32::from(*code));
    }
    if HIGH {
        // SAFETY: the table is 16 bytes; each part of `out` holds the vector that is stored there.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(layout.bytes.as_ptr().cast()));
            let nibbles = _mm256_set1_epi8(0x0f);
            for r in 0..4 {
                let even = _mm256_shuffle_epi8(table, _mm256_and_si256(stripes[r], nibbles));
                let odd = _mm256_and_si256(_mm256_srli_epi64::<4>(stripes[r]), nibbles);
                let odd = _mm256_shuffle_epi8(table, odd);
                let out = out.bytes[r].as_mut_ptr();
                // In order, because units were not.
                _mm256_storeu_si256(out.cast(), _mm256_unpacklo_epi8(even, odd));
                _mm256_storeu_si256(out.add(UNITS / 2).cast(), _mm256_unpackhi_epi8(even, odd));
            }
        }
    } else {
        for r in 0..4 {
            // SAFETY: a vector of four words.
            unsafe { _mm256_storeu_si256(out.indices[r].as_mut_ptr().cast(), stripes[r]) };
        }
    }
}

/// The levels of two bits.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn table(layout: &Layout) -> __m256 {
    // SAFETY: there are 16 numbers, of which these are the first 8.
    unsafe { _mm256_loadu_ps(layout.levels.as_ptr()) }
}

/// Vector `v` of the levels of unit `i` of those that were decoded.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn levels<const HIGH: bool>(decoded: &Decoded, i: usize, v: usize, table: __m256) -> __m256 {
    let (r, half) = (v / 2, v % 2);
    if HIGH {
        let (halves, _) = decoded.bytes[r][i % UNITS].as_chunks::<8>();
        // SAFETY: half of a unit's 16 bytes.
        let bytes = unsafe { _mm_loadl_epi64(halves[half].as_ptr().cast()) };
        let bytes = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
        return _mm256_fmadd_ps(bytes, _mm256_set1_ps(2.0), _mm256_set1_ps(1.0));
    }
    let indices = _mm256_set1_epi32(decoded.indices[r][i % 2 * 2 + i / 2 % 2][half]);
    let indices = _mm256_srlv_epi32(indices, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    _mm256_permutevar8x32_ps(table, indices)
}

impl Rows for Avx2 {
    const UNITS: usize = UNITS;

    /// # Safety
    /// As [`Rows::dots`].
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn dots<const N: usize, const HIGH: bool>(
        layout: &Layout,
        rows: [Parts<'_>; N],
        x: &[f32],
        mut ahead: Ahead<'_>,
    ) -> [f32; N] {
        let table = table(layout);
        let (mut before, mut decoded) = ([_mm256_setzero_si256(); N], [Decoded::default(); N]);
        let mut sums = [_mm256_setzero_ps(); N];
        for first in (0..layout.units).step_by(UNITS) {
            let n = UNITS.min(layout.units - first);
            ahead.step();
            // SAFETY: units `first .. first + n` lie inside x and inside every row, by contract.
            unsafe {
                for r in 0..N {
                    decode::<HIGH>(layout, &rows[r], 1.0, first, n, &mut before[r], &mut decoded[r]);
                }
                for i in 0..n {
                    let x = x.as_ptr().add((first + i) * SKETCH_UNIT);
                    for r in 0..N {
                        let mut sum = _mm256_mul_ps(levels::<HIGH>(&decoded[r], i, 0, table), _mm256_loadu_ps(x));
                        for v in 1..VECTORS {
                            sum = _mm256_fmadd_ps(
                                levels::<HIGH>(&decoded[r], i, v, table),
                                _mm256_loadu_ps(x.add(8 * v)),
                                sum,
                            );
                        }
                        sums[r] = _mm256_fmadd_ps(sum, _mm256_set1_ps(decoded[r].factors[i]), sums[r]);
                    }
                }
            }
        }
        std::array::from_fn(|r| sum(sums[r]))
    }

    /// # Safety
    /// As [`Rows::axpys`].
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn axpys<const N: usize, const HIGH: bool>(
        layout: &Layout,
        rows: [Parts<'_>; N],
        a: [f32; N],
        y: &mut [f32],
        mut ahead: Ahead<'_>,
    ) {
        let table = table(layout);
        let (mut before, mut decoded) = ([_mm256_setzero_si256(); N], [Decoded::default(); N]);
        for first in (0..layout.units).step_by(UNITS) {
            let n = UNITS.min(layout.units - first);
            // SAFETY: units `first .. first + n` lie inside y and inside every row, by contract.
            unsafe {
                for r in 0..N {
                    decode::<HIGH>(layout, &rows[r], a[r], first, n, &mut before[r], &mut decoded[r]);
                }
                for i in 0..n {
                    ahead.step();
                    let y = y.as_mut_ptr().add((first + i) * SKETCH_UNIT);
                    let mut sums: [_; VECTORS] = std::array::from_fn(|v| _mm256_loadu_ps(y.add(8 * v)));
                    for r in 0..N {
                        let factor = _mm256_set1_ps(decoded[r].factors[i]);
                        for v in 0..VECTORS {
                            sums[v] = _mm256_fmadd_ps(levels::<HIGH>(&decoded[r], i, v, table), factor, sums[v]);
                        }
                    }
                    for v in 0..VECTORS {
                        _mm256_storeu_ps(y.add(8 * v), sums[v]);
                    }
                }
            }
        }
    }
}
