//! AVX-512 with VNNI and VBMI: rows times an input in fixed point ([`SketchInput`](crate::SketchInput) has the arithmetic).
//!
//! Nothing leaves its lane: a unit's words are 64 bits of four vectors, two columns in a byte, and the input lies as they do. `vpermb`
//! makes bytes of levels and looks at the low bits of an index only, so that lower nibbles need no mask and upper ones a shift; three
//! `vpdpbusd` multiply 64 of them with the digits. For 64 columns that are six instructions, and about five more as their part of
//! what eight units share: half of what f32 products take (`avx512.rs`).

use super::avx512::{Avx512, stripes_of};
use super::{Ahead, FixedRows, Layout};
use crate::sketch::{DIGIT_VECTORS, FixedUnits, INPUT_UNITS, Parts};
use std::arch::x86_64::*;

impl FixedRows for Avx512 {
    const ORDER: [usize; INPUT_UNITS] = [0, 4, 1, 5, 2, 6, 3, 7];

    fn has_fixed() -> bool {
        is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vbmi")
    }

    /// # Safety
    /// As [`FixedRows::fixed_dots`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
    unsafe fn fixed_dots<const N: usize, const HIGH: bool>(
        layout: &Layout,
        rows: [Parts<'_>; N],
        x: &[FixedUnits],
        mut ahead: Ahead<'_>,
    ) -> [f32; N] {
        // 128 above the bytes of levels: all are unsigned.
        // SAFETY: sixteen bytes.
        let table = unsafe { _mm_loadu_si128(layout.bytes.as_ptr().cast()) };
        let table = _mm512_broadcast_i32x4(_mm_xor_si128(table, _mm_set1_epi8(i8::MIN)));
        // Scale codes of units, in the order of lanes, twice.
        let order = _mm_setr_epi8(0, 0, 4, 4, 1, 1, 5, 5, 2, 2, 6, 6, 3, 3, 7, 7);
        let (mut before, mut sums) = ([_mm512_setzero_si512(); N], [_mm512_setzero_ps(); N]);
        for (first, x) in (0..layout.units).step_by(INPUT_UNITS).zip(x) {
            let n = INPUT_UNITS.min(layout.units - first);
            ahead.step();
            // SAFETY: sixteen numbers each.
            let (lowest, upper, of_x, steps) = unsafe {
                (
                    _mm512_loadu_si512(x.offsets[0].as_ptr().cast()),
                    _mm512_loadu_si512(x.offsets[1].as_ptr().cast()),
                    _mm512_loadu_ps(x.sums.as_ptr().cast()),
                    _mm512_loadu_ps(x.steps.as_ptr().cast()),
                )
            };
            for r in 0..N {
                // SAFETY: units `first .. first + n` lie inside every row, by contract, and the masked rest is not touched.
                let (stripes, scales) = unsafe {
                    let scales = rows[r].scales.as_ptr().add(first).cast();
                    let stripes = stripes_of::<HIGH>(&rows[r], first, n, &mut before[r]);
                    (stripes, _mm_maskz_loadu_epi8(((1u32 << n) - 1) as u16, scales))
                };
                let mut products = [lowest, _mm512_setzero_si512(), _mm512_setzero_si512()];
                for v in 0..DIGIT_VECTORS {
                    let stripe = stripes[v / 2];
                    let indices = if v % 2 == 0 { stripe } else { _mm512_srli_epi16::<4>(stripe) };
                    let levels = _mm512_permutexvar_epi8(indices, table);
                    for (products, digits) in products.iter_mut().zip(&x.digits) {
                        // SAFETY: 64 bytes.
                        let digits = unsafe { _mm512_loadu_si512(digits[v].as_ptr().cast()) };
                        *products = _mm512_dpbusd_epi32(*products, levels, digits);
                    }
                }
                let [low, middle, high] = products;
                let high = _mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32::<8>(high), middle), upper);
                // Levels are twice the bytes, plus one.
                let sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low), _mm512_set1_ps(2.0), of_x);
                let sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(512.0), sum);
                let scales = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_shuffle_epi8(scales, order)));
                sums[r] = _mm512_fmadd_ps(sum, _mm512_mul_ps(scales, steps), sums[r]);
            }
        }
        std::array::from_fn(|r| rows[r].scale * _mm512_reduce_add_ps(sums[r]))
    }
}
