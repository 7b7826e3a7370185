//! Eight units at a time, a u64 of each in a vector: a few shifts make the subsets of all of their columns, and
//! exchanges of bits between words gather each column's bits in a nibble, the index of its level, with two columns' in
//! a byte. Then a unit is four vectors of 16 columns: 16 bytes are widened for each two of them, and indices become
//! levels by `vpermps`, which looks at the low four bits of an index only, so that one shift tells the upper column's.
//!
//! Thirteen vector instructions for 64 columns, and six more as their part of what eight units share, bound it: two
//! begin in a cycle on an Intel core. CPUs that have VNNI and VBMI multiply in fixed point instead (`avx512_vnni.rs`).

// Several arrays advance together; an iterator over one of them would hide that.
#![allow(clippy::needless_range_loop)]

use super::{Ahead, DOTS, Layout, Rows};
use crate::SKETCH_UNIT;
use crate::sketch::{CODE_BYTES, PLANE_BYTES, Parts};
use std::arch::x86_64::*;

/// AVX-512 F, BW and VL.
pub(crate) struct Avx512;

/// Vectors of a unit.
const VECTORS: usize = SKETCH_UNIT / 16;
/// Units that are decoded at once: a u64 of each in a vector.
const UNITS: usize = 8;

/// Some units of a row, half decoded.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Decoded {
    /// Indices of levels, `[2, UNITS, 16]`: byte m has those of a unit's columns m and 16 + m, then those of 32 + m and
    /// 48 + m.
    indices: [[[u8; 16]; UNITS]; 2],
    /// What the levels of a unit are multiplied with.
    factors: [f32; UNITS],
}

/// `a` where `mask` has ones, `b` elsewhere.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn select(mask: u64, a: __m512i, b: __m512i) -> __m512i {
    _mm512_ternarylogic_epi64::<0xca>(_mm512_set1_epi64(mask as i64), a, b)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn xor3(a: __m512i, b: __m512i, c: __m512i) -> __m512i {
    _mm512_ternarylogic_epi64::<0x96>(a, b, c)
}

/// As [`trellis::subsets`](crate::sketch::trellis), of eight units.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn subsets(branches: __m512i, before: __m512i) -> [__m512i; 2] {
    let stripe_before = select(0x1111_1111_1111_1111, _mm512_srli_epi64::<3>(before), _mm512_slli_epi64::<1>(branches));
    let y0 = _mm512_xor_si512(_mm512_slli_epi64::<8>(branches), _mm512_srli_epi64::<56>(stripe_before));
    let y0 = xor3(y0, _mm512_slli_epi64::<16>(branches), _mm512_srli_epi64::<48>(stripe_before));
    let y1 = xor3(branches, _mm512_slli_epi64::<4>(branches), _mm512_srli_epi64::<60>(stripe_before));
    let y1 = xor3(y1, _mm512_slli_epi64::<24>(branches), _mm512_srli_epi64::<40>(stripe_before));
    [y0, y1]
}

/// From bit k of columns 16 r + m in bit 4 m + r of word k, all of these bits in nibble m of word r.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn stripes<const HIGH: bool>([y0, y1, low, high]: [__m512i; 4]) -> [__m512i; 4] {
    const PAIRS: u64 = 0x3333_3333_3333_3333;
    const ONES: u64 = 0x5555_5555_5555_5555;
    let a = select(PAIRS, y0, _mm512_slli_epi64::<2>(low));
    let c = select(PAIRS, _mm512_srli_epi64::<2>(y0), low);
    let (b, d) = if HIGH {
        (select(PAIRS, y1, _mm512_slli_epi64::<2>(high)), select(PAIRS, _mm512_srli_epi64::<2>(y1), high))
    } else {
        (y1, _mm512_srli_epi64::<2>(y1))
    };
    [
        select(ONES, a, _mm512_slli_epi64::<1>(b)),
        select(ONES, _mm512_srli_epi64::<1>(a), b),
        select(ONES, c, _mm512_slli_epi64::<1>(d)),
        select(ONES, _mm512_srli_epi64::<1>(c), d),
    ]
}

/// The columns of units `first` to `first + n` of a row, n at most [`UNITS`]: nibble m of word r has the index of the level of column
/// 16 r + m, units in order 0 4 1 5 2 6 3 7. `before` are the branch bits of the units in front, or zeros, and becomes those of
/// these.
///
/// # Safety
/// `row` has these units.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn stripes_of<const HIGH: bool>(
    row: &Parts<'_>,
    first: usize,
    n: usize,
    before: &mut __m512i,
) -> [__m512i; 4] {
    let (mask, codes_mask) = ((1u32 << n) - 1, (1u32 << (2 * n)) - 1);
    // SAFETY: bytes of `n` units are readable by contract, the masked rest is not touched.
    let (front, back, high) = unsafe {
        let codes = row.codes.as_ptr().add(first * CODE_BYTES).cast::<i64>();
        let high = row.high.as_ptr().wrapping_add(first * PLANE_BYTES);
        (
            _mm512_maskz_loadu_epi64(codes_mask as u8, codes),
            _mm512_maskz_loadu_epi64((codes_mask >> 8) as u8, codes.wrapping_add(8)),
            if HIGH { _mm512_maskz_loadu_epi64(mask as u8, high.cast()) } else { _mm512_setzero_si512() },
        )
    };
    let branches = _mm512_unpacklo_epi64(front, back);
    let low = _mm512_unpackhi_epi64(front, back);
    let high = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), high);
    let before_each = _mm512_permutex2var_epi64(branches, _mm512_setr_epi64(15, 6, 0, 1, 2, 3, 4, 5), *before);
    *before = branches;
    let [y0, y1] = subsets(branches, before_each);
    stripes::<HIGH>([y0, y1, low, high])
}

/// Units `first` to `first + n` of a row, and `a` times their scales, from [`stripes_of`] these.
///
/// # Safety
/// As there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn decode<const HIGH: bool>(
    row: &Parts<'_>,
    a: f32,
    first: usize,
    n: usize,
    before: &mut __m512i,
    out: &mut Decoded,
) {
    const NIBBLES: u64 = 0x0f0f_0f0f_0f0f_0f0f;
    // SAFETY: by this function's contract; the masked rest is not touched.
    let (stripes, scales) = unsafe {
        let scales = row.scales.as_ptr().add(first).cast();
        (stripes_of::<HIGH>(row, first, n, before), _mm_maskz_loadu_epi8(((1u32 << n) - 1) as u16, scales))
    };
    let scales = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(scales));
    let factors = _mm256_mul_ps(scales, _mm256_set1_ps(row.scale));
    let factors = _mm256_mul_ps(factors, _mm256_set1_ps(a));
    // SAFETY: each part of `out` holds the vector that is stored there.
    unsafe {
        for half in 0..2 {
            let [low, high] = [stripes[2 * half], stripes[2 * half + 1]];
            let even = select(NIBBLES, low, _mm512_slli_epi64::<4>(high));
            let odd = select(NIBBLES, _mm512_srli_epi64::<4>(low), high);
            let out = &mut out.indices[half];
            // In order, because units were not.
            _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_unpacklo_epi8(even, odd));
            _mm512_storeu_si512(out[UNITS / 2..].as_mut_ptr().cast(), _mm512_unpackhi_epi8(even, odd));
        }
        _mm256_storeu_ps(out.factors.as_mut_ptr(), factors);
    }
}

/// The levels, in order of their indices.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn table(layout: &Layout) -> __m512 {
    // SAFETY: there are 16 numbers.
    unsafe { _mm512_loadu_ps(layout.levels.as_ptr()) }
}

/// The levels of unit `i` of those that were decoded.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn levels(decoded: &Decoded, i: usize, table: __m512) -> [__m512; VECTORS] {
    let [a, b] = [0, 1].map(|half| {
        // SAFETY: a unit's 16 bytes.
        let bytes = unsafe { _mm_loadu_si128(decoded.indices[half][i % UNITS].as_ptr().cast()) };
        _mm512_cvtepu8_epi32(bytes)
    });
    [
        _mm512_permutexvar_ps(a, table),
        _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(a), table),
        _mm512_permutexvar_ps(b, table),
        _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(b), table),
    ]
}
/// The sums of each vector's lanes, in an order that is the same for all four.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn reduced([a, b, c, d]: [__m512; DOTS]) -> [f32; DOTS] {
    let pair = |a, b| _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    let (ab, cd) = (pair(a, b), pair(c, d));
    let (low, high) = (_mm512_unpacklo_pd(ab, cd), _mm512_unpackhi_pd(ab, cd));
    let quarters = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(quarters)));
    let halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), upper);
    let sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
    let mut out = [0.0; DOTS];
    // SAFETY: `out` holds one vector.
    unsafe { _mm_storeu_ps(out.as_mut_ptr(), sums) };
    out
}

impl Rows for Avx512 {
    const UNITS: usize = UNITS;

    /// # Safety
    /// As [`Rows::dots`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn dots<const N: usize, const HIGH: bool>(
        layout: &Layout,
        rows: [Parts<'_>; N],
        x: &[f32],
        mut ahead: Ahead<'_>,
    ) -> [f32; N] {
        let table = table(layout);
        let (mut before, mut decoded) = ([_mm512_setzero_si512(); N], [Decoded::default(); N]);
        let mut sums = [_mm512_setzero_ps(); N];
        for first in (0..layout.units).step_by(UNITS) {
            let n = UNITS.min(layout.units - first);
            ahead.step();
            // SAFETY: units `first .. first + n` lie inside x and inside every row, by contract.
            unsafe {
                for r in 0..N {
                    decode::<HIGH>(&rows[r], 1.0, first, n, &mut before[r], &mut decoded[r]);
                }
                for i in 0..n {
                    let x = x.as_ptr().add((first + i) * SKETCH_UNIT);
                    let x: [_; VECTORS] = std::array::from_fn(|k| _mm512_loadu_ps(x.add(16 * k)));
                    for r in 0..N {
                        let levels = levels(&decoded[r], i, table);
                        let mut sum = _mm512_mul_ps(levels[0], x[0]);
                        for k in 1..VECTORS {
                            sum = _mm512_fmadd_ps(levels[k], x[k], sum);
                        }
                        sums[r] = _mm512_fmadd_ps(sum, _mm512_set1_ps(decoded[r].factors[i]), sums[r]);
                    }
                }
            }
        }
        let mut four = [_mm512_setzero_ps(); DOTS];
        four[..N].copy_from_slice(&sums);
        let four = reduced(four);
        std::array::from_fn(|r| four[r])
    }

    /// # Safety
    /// As [`Rows::axpys`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn axpys<const N: usize, const HIGH: bool>(
        layout: &Layout,
        rows: [Parts<'_>; N],
        a: [f32; N],
        y: &mut [f32],
        mut ahead: Ahead<'_>,
    ) {
        let table = table(layout);
        let (mut before, mut decoded) = ([_mm512_setzero_si512(); N], [Decoded::default(); N]);
        for first in (0..layout.units).step_by(UNITS) {
            let n = UNITS.min(layout.units - first);
            // SAFETY: units `first .. first + n` lie inside y and inside every row, by contract.
            unsafe {
                for r in 0..N {
                    decode::<HIGH>(&rows[r], a[r], first, n, &mut before[r], &mut decoded[r]);
                }
                for i in 0..n {
                    ahead.step();
                    let y = y.as_mut_ptr().add((first + i) * SKETCH_UNIT);
                    let mut sums: [_; VECTORS] = std::array::from_fn(|k| _mm512_loadu_ps(y.add(16 * k)));
                    for r in 0..N {
                        let levels = levels(&decoded[r], i, table);
                        let factor = _mm512_set1_ps(decoded[r].factors[i]);
                        for k in 0..VECTORS {
                            sums[k] = _mm512_fmadd_ps(levels[k], factor, sums[k]);
                        }
                    }
                    for k in 0..VECTORS {
                        _mm512_storeu_ps(y.add(16 * k), sums[k]);
                    }
                }
            }
        }
    }
}
