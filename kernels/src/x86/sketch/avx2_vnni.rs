//! AVX2 with AVX-VNNI: as `avx512_vnni.rs`, four units at a time. `vpshufb` makes bytes of levels, and wants indices without anything
//! above them.

use super::avx2::{Avx2, stripes_of};
use super::{Ahead, FixedRows, Layout};
use crate::sketch::{DIGIT_VECTORS, FixedUnits, INPUT_UNITS, Parts};
use crate::x86::avx2::sum;
use std::arch::x86_64::*;

/// Units that are decoded at once: half of those of the input that lie together.
const UNITS: usize = INPUT_UNITS / 2;

impl FixedRows for Avx2 {
    const ORDER: [usize; INPUT_UNITS] = [0, 2, 1, 3, 4, 6, 5, 7];

    fn has_fixed() -> bool {
        is_x86_feature_detected!("avxvnni")
    }

    /// # Safety
    /// As [`FixedRows::fixed_dots`].
    #[target_feature(enable = "avx2,fma,avxvnni")]
    unsafe fn fixed_dots<const N: usize, const HIGH: bool>(
        layout: &Layout,
        rows: [Parts<'_>; N],
        x: &[FixedUnits],
        mut ahead: Ahead<'_>,
    ) -> [f32; N] {
        // 128 above the bytes of levels: all are unsigned.
        // SAFETY: sixteen bytes.
        let table = unsafe { _mm_loadu_si128(layout.bytes.as_ptr().cast()) };
        let table = _mm256_broadcastsi128_si256(_mm_xor_si128(table, _mm_set1_epi8(i8::MIN)));
        // Scale codes of units, in the order of lanes, twice.
        let order = _mm_setr_epi8(0, 0, 2, 2, 1, 1, 3, 3, -1, -1, -1, -1, -1, -1, -1, -1);
        let nibbles = _mm256_set1_epi8(0x0f);
        let (mut before, mut sums) = ([_mm256_setzero_si256(); N], [_mm256_setzero_ps(); N]);
        for (i, first) in (0..layout.units).step_by(UNITS).enumerate() {
            let n = UNITS.min(layout.units - first);
            let (x, lane) = (&x[i / 2], i % 2 * UNITS);
            ahead.step();
            // SAFETY: eight numbers each, of four lanes.
            let (lowest, upper, of_x, steps) = unsafe {
                (
                    _mm256_loadu_si256(x.offsets[0][lane..].as_ptr().cast()),
                    _mm256_loadu_si256(x.offsets[1][lane..].as_ptr().cast()),
                    _mm256_loadu_ps(x.sums[lane..].as_ptr().cast()),
                    _mm256_loadu_ps(x.steps[lane..].as_ptr().cast()),
                )
            };
            for r in 0..N {
                // SAFETY: units `first .. first + n` lie inside every row, by contract.
                let (stripes, codes) = unsafe {
                    let codes = rows[r].scales.get_unchecked(first..first + n);
                    (stripes_of::<HIGH>(&rows[r], first, n, &mut before[r]), codes)
                };
                let mut products = [lowest, _mm256_setzero_si256(), _mm256_setzero_si256()];
                for v in 0..DIGIT_VECTORS {
                    let stripe = stripes[v / 2];
                    let indices = if v % 2 == 0 { stripe } else { _mm256_srli_epi64::<4>(stripe) };
                    let levels = _mm256_shuffle_epi8(table, _mm256_and_si256(indices, nibbles));
                    for (products, digits) in products.iter_mut().zip(&x.digits) {
                        // SAFETY: 32 bytes, of four lanes.
                        let digits = unsafe { _mm256_loadu_si256(digits[v][lane..].as_ptr().cast()) };
                        *products = _mm256_dpbusd_avx_epi32(*products, levels, digits);
                    }
                }
                let [low, middle, high] = products;
                let high = _mm256_add_epi32(_mm256_add_epi32(_mm256_slli_epi32::<8>(high), middle), upper);
                // Levels are twice the bytes, plus one.
                let sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low), _mm256_set1_ps(2.0), of_x);
                let sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), _mm256_set1_ps(512.0), sum);
                let scales = match codes.first_chunk::<UNITS>() {
                    Some(four) => *four,
                    None => std::array::from_fn(|u| codes.get(u).copied().unwrap_or(0)),
                };
                let scales = _mm_shuffle_epi8(_mm_cvtsi32_si128(i32::from_le_bytes(scales)), order);
                let scales = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(scales));
                sums[r] = _mm256_fmadd_ps(sum, _mm256_mul_ps(scales, steps), sums[r]);
            }
        }
        std::array::from_fn(|r| rows[r].scale * sum(sums[r]))
    }
}
