//! A unit is four vectors of 16 columns. Its 16 bytes are widened once. Codes become levels by `vpermps`, which looks at the
//! low four bits of an index only, two codes: one table tells the level of the lower, another that of the upper, so that one
//! shift is enough for four codes. Third bits are masks, which add half of all levels.
//!
//! Eleven vector instructions for 64 columns in two bits, nineteen in three, bound it, not their kind: on one Zen 5 core, which
//! begins about three of this mix in a cycle, two of the permutes replaced by bits set in a float's mantissa changed nothing.

// Several arrays advance together; an iterator over one of them would hide that.
#![allow(clippy::needless_range_loop)]

use super::{Ahead, DOTS, Layout, Rows};
use crate::SKETCH_UNIT;
use crate::sketch::{CODE_BYTES, HIGH_BYTES};
use std::arch::x86_64::*;

/// AVX-512 F, BW and VL.
pub(crate) struct Avx512;

/// Vectors of a unit.
const VECTORS: usize = SKETCH_UNIT / 16;
/// Units whose scales are widened at once: one vector.
const SCALES: usize = 16;

/// Levels of the codes in the lower and in the upper two of an index's four bits.
#[derive(Clone, Copy)]
struct Tables {
    lower: __m512,
    upper: __m512,
}

impl Tables {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn new<const HIGH: bool>() -> Self {
        let first = if HIGH { -3.5 } else { -1.5 };
        let [a, b, c, d] = [first, first + 1.0, first + 2.0, first + 3.0];
        Self {
            lower: _mm512_setr_ps(a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d),
            upper: _mm512_setr_ps(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d),
        }
    }
}

/// The levels of unit `u`.
///
/// # Safety
/// `row` has `layout`, which has a unit `u`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn decode<const HIGH: bool>(layout: &Layout, row: &[u8], u: usize, tables: Tables) -> [__m512; VECTORS] {
    // SAFETY: 16 readable bytes by contract.
    let codes = unsafe { _mm_loadu_si128(row.as_ptr().add(u * CODE_BYTES).cast()) };
    let first = _mm512_cvtepu8_epi32(codes);
    let second = _mm512_srli_epi32::<4>(first);
    let mut levels = [
        _mm512_permutexvar_ps(first, tables.lower),
        _mm512_permutexvar_ps(first, tables.upper),
        _mm512_permutexvar_ps(second, tables.lower),
        _mm512_permutexvar_ps(second, tables.upper),
    ];
    if HIGH {
        let four = _mm512_set1_ps(4.0);
        let at = layout.units * CODE_BYTES + u * HIGH_BYTES;
        for (k, levels) in levels.iter_mut().enumerate() {
            // SAFETY: 8 readable bytes by contract, two of them here.
            let mask = unsafe { row.as_ptr().add(at + 2 * k).cast::<u16>().read_unaligned() };
            *levels = _mm512_mask_add_ps(*levels, mask, *levels, four);
        }
    }
    levels
}

/// The scales of `n` units from `first` on, at most [`SCALES`]. From memory each then costs nothing: the multiply takes it with
/// a broadcast.
///
/// # Safety
/// `row` has `layout`, which has these units.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn scales(layout: &Layout, row: &[u8], first: usize, n: usize) -> __m512 {
    let mask = ((1u32 << n) - 1) as u16;
    // SAFETY: `n` bytes are readable by contract, the masked rest is not touched.
    let codes = unsafe { _mm_maskz_loadu_epi8(mask, row.as_ptr().add(layout.scales + first).cast()) };
    let codes = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes));
    _mm512_mul_ps(codes, _mm512_set1_ps(layout.scale(row)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn stored(v: __m512) -> [f32; SCALES] {
    let mut out = [0.0; SCALES];
    // SAFETY: `out` holds one vector.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) };
    out
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

/// Adds units `first + i` to `first + i + U` of all rows to those of `y`.
///
/// # Safety
/// `rows` have `layout`, which has these units, and so has `y`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn add<const N: usize, const U: usize, const HIGH: bool>(
    layout: &Layout,
    rows: [&[u8]; N],
    factors: &[[f32; SCALES]; N],
    first: usize,
    i: usize,
    y: &mut [f32],
    tables: Tables,
) {
    // SAFETY: by this function's contract.
    unsafe {
        let y = y.as_mut_ptr().add((first + i) * SKETCH_UNIT);
        let mut sums: [[_; VECTORS]; U] =
            std::array::from_fn(|u| std::array::from_fn(|k| _mm512_loadu_ps(y.add(u * SKETCH_UNIT + 16 * k))));
        for r in 0..N {
            for u in 0..U {
                let levels = decode::<HIGH>(layout, rows[r], first + i + u, tables);
                let factor = _mm512_set1_ps(factors[r][i + u]);
                for k in 0..VECTORS {
                    sums[u][k] = _mm512_fmadd_ps(levels[k], factor, sums[u][k]);
                }
            }
        }
        for u in 0..U {
            for k in 0..VECTORS {
                _mm512_storeu_ps(y.add(u * SKETCH_UNIT + 16 * k), sums[u][k]);
            }
        }
    }
}

impl Rows for Avx512 {
    /// # Safety
    /// As [`Rows::dots`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn dots<const N: usize, const HIGH: bool>(
        layout: &Layout,
        rows: [&[u8]; N],
        x: &[f32],
        mut ahead: Ahead<'_>,
    ) -> [f32; N] {
        let tables = Tables::new::<HIGH>();
        let mut sums = [_mm512_setzero_ps(); N];
        let mut first = 0;
        while first < layout.units {
            let n = SCALES.min(layout.units - first);
            // SAFETY: units `first .. first + n` lie inside x and inside every row, by contract.
            unsafe {
                let scales: [_; N] = std::array::from_fn(|r| stored(scales(layout, rows[r], first, n)));
                for i in 0..n {
                    ahead.step();
                    let u = first + i;
                    let x: [_; VECTORS] =
                        std::array::from_fn(|k| _mm512_loadu_ps(x.as_ptr().add(u * SKETCH_UNIT + 16 * k)));
                    for r in 0..N {
                        let levels = decode::<HIGH>(layout, rows[r], u, tables);
                        let low = _mm512_fmadd_ps(levels[1], x[1], _mm512_mul_ps(levels[0], x[0]));
                        let high = _mm512_fmadd_ps(levels[3], x[3], _mm512_mul_ps(levels[2], x[2]));
                        let sum = _mm512_add_ps(low, high);
                        sums[r] = _mm512_fmadd_ps(sum, _mm512_set1_ps(scales[r][i]), sums[r]);
                    }
                }
            }
            first += n;
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
        rows: [&[u8]; N],
        a: [f32; N],
        y: &mut [f32],
        mut ahead: Ahead<'_>,
    ) {
        let tables = Tables::new::<HIGH>();
        let mut first = 0;
        while first < layout.units {
            let n = SCALES.min(layout.units - first);
            // SAFETY: units `first .. first + n` lie inside y and inside every row, by contract.
            unsafe {
                let factors: [_; N] = std::array::from_fn(|r| {
                    stored(_mm512_mul_ps(scales(layout, rows[r], first, n), _mm512_set1_ps(a[r])))
                });
                // Two units: the sums of one would wait four cycles for each row.
                for i in (0..n - n % 2).step_by(2) {
                    ahead.step();
                    add::<N, 2, HIGH>(layout, rows, &factors, first, i, y, tables);
                }
                if n % 2 == 1 {
                    ahead.step();
                    add::<N, 1, HIGH>(layout, rows, &factors, first, n - 1, y, tables);
                }
            }
            first += n;
        }
    }
}
