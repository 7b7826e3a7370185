//! A unit is eight vectors of 8 columns. Codes become levels by `vpermilps`, which looks at the low two bits of an index
//! only. Third bits are spread over the lanes and compared.

// Several arrays advance together; an iterator over one of them would hide that.
#![allow(clippy::needless_range_loop)]

use super::{Ahead, Layout, Rows};
use crate::SKETCH_UNIT;
use crate::sketch::{CODE_BYTES, HIGH_BYTES};
use crate::x86::avx2::sum;
use std::arch::x86_64::*;

/// AVX2 and FMA.
pub(crate) struct Avx2;

/// Vectors of a unit, in the order of columns.
const VECTORS: usize = SKETCH_UNIT / 8;

/// The levels of unit `u`.
///
/// # Safety
/// `row` has `layout`, which has a unit `u`.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn decode<const HIGH: bool>(layout: &Layout, row: &[u8], u: usize) -> [__m256; VECTORS] {
    // SAFETY: 16 readable bytes by contract.
    let codes = unsafe { _mm_loadu_si128(row.as_ptr().add(u * CODE_BYTES).cast()) };
    let halves = [_mm256_cvtepu8_epi32(codes), _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(codes, codes))];
    let first = if HIGH { -3.5 } else { -1.5 };
    let [a, b, c, d] = [first, first + 1.0, first + 2.0, first + 3.0];
    let table = _mm256_setr_ps(a, b, c, d, a, b, c, d);
    let mut levels = [_mm256_setzero_ps(); VECTORS];
    for half in 0..2 {
        let codes = halves[half];
        levels[half] = _mm256_permutevar_ps(table, codes);
        levels[2 + half] = _mm256_permutevar_ps(table, _mm256_srli_epi32::<2>(codes));
        levels[4 + half] = _mm256_permutevar_ps(table, _mm256_srli_epi32::<4>(codes));
        levels[6 + half] = _mm256_permutevar_ps(table, _mm256_srli_epi32::<6>(codes));
    }
    if HIGH {
        let four = _mm256_set1_ps(4.0);
        let lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        let at = layout.units * CODE_BYTES + u * HIGH_BYTES;
        for v in 0..VECTORS {
            // SAFETY: 8 readable bytes by contract, one of them here.
            let bits = unsafe { *row.as_ptr().add(at + v) };
            let bits = _mm256_and_si256(_mm256_set1_epi8(bits as i8), lanes);
            let mask = _mm256_castsi256_ps(_mm256_cmpeq_epi32(bits, lanes));
            levels[v] = _mm256_add_ps(levels[v], _mm256_and_ps(mask, four));
        }
    }
    levels
}

/// The scale of unit `u`.
///
/// # Safety
/// `row` has `layout`, which has a unit `u`.
#[inline]
unsafe fn scale(layout: &Layout, row: &[u8], row_scale: f32, u: usize) -> f32 {
    // SAFETY: one readable byte by contract.
    row_scale * f32::from(unsafe { *row.as_ptr().add(layout.scales + u) })
}

impl Rows for Avx2 {
    /// # Safety
    /// As [`Rows::dots`].
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn dots<const N: usize, const HIGH: bool>(
        layout: &Layout,
        rows: [&[u8]; N],
        x: &[f32],
        mut ahead: Ahead<'_>,
    ) -> [f32; N] {
        let row_scales = rows.map(|row| layout.scale(row));
        let mut sums = [_mm256_setzero_ps(); N];
        for u in 0..layout.units {
            ahead.step();
            for r in 0..N {
                // SAFETY: unit u lies inside x and inside every row, by contract.
                unsafe {
                    let levels = decode::<HIGH>(layout, rows[r], u);
                    let x = x.as_ptr().add(u * SKETCH_UNIT);
                    let mut sum = _mm256_mul_ps(levels[0], _mm256_loadu_ps(x));
                    for v in 1..VECTORS {
                        sum = _mm256_fmadd_ps(levels[v], _mm256_loadu_ps(x.add(8 * v)), sum);
                    }
                    let scale = _mm256_set1_ps(scale(layout, rows[r], row_scales[r], u));
                    sums[r] = _mm256_fmadd_ps(sum, scale, sums[r]);
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
        rows: [&[u8]; N],
        a: [f32; N],
        y: &mut [f32],
        mut ahead: Ahead<'_>,
    ) {
        let row_scales = rows.map(|row| layout.scale(row));
        for u in 0..layout.units {
            ahead.step();
            // SAFETY: unit u lies inside y and inside every row, by contract.
            unsafe {
                let y = y.as_mut_ptr().add(u * SKETCH_UNIT);
                let mut sums: [_; VECTORS] = std::array::from_fn(|v| _mm256_loadu_ps(y.add(8 * v)));
                for r in 0..N {
                    let levels = decode::<HIGH>(layout, rows[r], u);
                    let factor = _mm256_set1_ps(a[r] * scale(layout, rows[r], row_scales[r], u));
                    for v in 0..VECTORS {
                        sums[v] = _mm256_fmadd_ps(levels[v], factor, sums[v]);
                    }
                }
                for v in 0..VECTORS {
                    _mm256_storeu_ps(y.add(8 * v), sums[v]);
                }
            }
        }
    }
}
