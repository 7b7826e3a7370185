//! AVX-512 with VNNI: q4 rows times an input in fixed point ([`PreparedInput`](crate::PreparedInput) has the
//! arithmetic).
//!
//! Four groups are 64 bytes of codes a row, taken apart by a mask and a shift; six integer instructions multiply them
//! with the three digits, and their sums are joined, converted and scaled once. From cache this is twice as fast as a
//! permute, a widening and a product for each sixteen columns.

use super::Ahead;
use crate::input::{BLOCK, FixedBlock, FixedPoint, STEPS};
use crate::{GROUP, RowRef};
use std::arch::x86_64::*;

/// Columns of a block.
const COLUMNS: usize = BLOCK * GROUP;
/// What the lanes of an f32 have of its bits besides the sign.
const MAGNITUDE: i32 = i32::MAX;
const INFINITE: i32 = 0x7f80_0000;
/// Added to a magnitude's bits it raises the exponent where 23 bits would not hold the largest code: three signed
/// digits reach 2^23 - 2^15 - 2^7 - 1 only.
const ROOM: i32 = 0x1_0200;
/// The exponent of the least largest magnitude, 2^-78: smaller ones have steps of 2^-100 as well, so that the product
/// of a step and a scale of f16 is never subnormal.
const LEAST_EXPONENT: i32 = 127 - 78;
/// From the largest magnitude's exponent to the step's.
const STEP_EXPONENT: i32 = 22;
/// Added to a code it leaves three unsigned bytes, each 128 above a digit.
const DIGITS: i32 = 0x80_8080;

/// Takes `x`; false if it has an infinity or a NaN, and what was made of it is then of no use.
///
/// # Panics
/// If `x` is not whole groups.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(crate) fn fix(x: &[f32], fixed: &mut FixedPoint) -> bool {
    assert!(x.len().is_multiple_of(GROUP), "whole groups");
    let groups = x.len() / GROUP;
    fixed.blocks.resize(groups.div_ceil(BLOCK), FixedBlock::ZERO);
    fixed.steps.resize(groups.div_ceil(STEPS), [0.0; STEPS]);
    let (steps, _) = fixed.steps.as_flattened_mut().as_chunks_mut::<BLOCK>();
    let (whole, rest) = x.as_chunks::<COLUMNS>();
    let mut largest = _mm512_setzero_si512();
    for ((x, block), steps) in whole.iter().zip(&mut fixed.blocks).zip(&mut *steps) {
        largest = _mm512_max_epu32(largest, fix_block(x, block, steps));
    }
    if let (Some(block), Some(steps)) = (fixed.blocks.get_mut(whole.len()), steps.get_mut(whole.len())) {
        let mut padded = [0.0; COLUMNS];
        padded[..rest.len()].copy_from_slice(rest);
        largest = _mm512_max_epu32(largest, fix_block(&padded, block, steps));
    }
    _mm512_cmplt_epu32_mask(largest, _mm512_set1_epi32(INFINITE)) == u16::MAX
}

/// Takes four groups; returns the bits of their largest magnitudes, in four lanes each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn fix_block(x: &[f32; COLUMNS], block: &mut FixedBlock, steps: &mut [f32; BLOCK]) -> __m512i {
    let (vectors, _) = x.as_chunks::<16>();
    // SAFETY: each is 16 floats.
    let load = |v: &[f32; 16]| unsafe { _mm512_loadu_ps(v.as_ptr()) };
    let magnitude = |v| _mm512_and_si512(_mm512_castps_si512(load(v)), _mm512_set1_epi32(MAGNITUDE));
    let of_group = |g: usize| _mm512_max_epu32(magnitude(&vectors[2 * g]), magnitude(&vectors[2 * g + 1]));
    // Transposed while it shrinks: in the end lane i of each quarter has group i.
    let halve = |a, b| _mm512_max_epu32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let (a, b) = (halve(of_group(0), of_group(1)), halve(of_group(2), of_group(3)));
    let m = _mm512_max_epu32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    let m = _mm512_max_epu32(m, _mm512_shuffle_i32x4::<0b01_00_11_10>(m, m));
    let m = _mm512_max_epu32(m, _mm512_shuffle_i32x4::<0b10_11_00_01>(m, m));
    let exponent = _mm512_srli_epi32::<23>(_mm512_add_epi32(m, _mm512_set1_epi32(ROOM)));
    let exponent = _mm512_max_epi32(exponent, _mm512_set1_epi32(LEAST_EXPONENT));
    let exponent = _mm512_sub_epi32(exponent, _mm512_set1_epi32(STEP_EXPONENT));
    let step = _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent));
    // SAFETY: four floats.
    unsafe { _mm_storeu_ps(steps.as_mut_ptr(), _mm512_castps512_ps128(step)) };
    // 1 / step, exactly.
    let inverse = _mm512_slli_epi32::<23>(_mm512_sub_epi32(_mm512_set1_epi32(254), exponent));
    let inverse = _mm512_castsi512_ps(inverse);
    let inverses = [
        _mm512_permute_ps::<0b00_00_00_00>(inverse),
        _mm512_permute_ps::<0b01_01_01_01>(inverse),
        _mm512_permute_ps::<0b10_10_10_10>(inverse),
        _mm512_permute_ps::<0b11_11_11_11>(inverse),
    ];
    let digits = _mm512_set1_epi32(DIGITS);
    for (v, x) in vectors.iter().enumerate() {
        let code = _mm512_cvtps_epi32(_mm512_mul_ps(load(x), inverses[v / 2]));
        let code = _mm512_xor_si512(_mm512_add_epi32(code, digits), digits);
        let bytes = [code, _mm512_srli_epi32::<8>(code), _mm512_srli_epi32::<16>(code)];
        for (place, bytes) in block.digits.iter_mut().zip(bytes) {
            let place = &mut place[v % 2].as_chunks_mut::<16>().0[v / 2];
            // SAFETY: sixteen bytes.
            unsafe { _mm_storeu_si128(place.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(bytes)) };
        }
    }
    let eight = _mm512_set1_epi8(8);
    let eights = join(eight, eight, _mm512_setzero_si512(), block);
    // SAFETY: sixteen integers.
    unsafe {
        let offsets = _mm512_sub_epi32(_mm512_setzero_si512(), eights);
        _mm512_storeu_si512(block.offsets.as_mut_ptr().cast(), offsets);
    }
    m
}

/// `sum + codes * q` in each lane: four columns of each half. Sums of single digits may wrap around, like `sum`; the
/// whole does not.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn join(low: __m512i, high: __m512i, sum: __m512i, block: &FixedBlock) -> __m512i {
    let zero = _mm512_setzero_si512();
    let product = |place: usize, sum: __m512i| {
        let [l, h] = &block.digits[place];
        // SAFETY: 64 bytes each.
        let (l, h) = unsafe { (_mm512_loadu_si512(l.as_ptr().cast()), _mm512_loadu_si512(h.as_ptr().cast())) };
        _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, low, l), high, h)
    };
    let upper = _mm512_add_epi32(_mm512_slli_epi32::<8>(product(2, zero)), product(1, zero));
    _mm512_add_epi32(_mm512_slli_epi32::<8>(upper), product(0, sum))
}

/// Dot products of q4 rows, asking for the lines of `ahead` meanwhile.
///
/// # Safety
/// The CPU has AVX-512 F, BW, VL and VNNI; every row holds `groups` groups; `x` was made by [`fix`] of as many.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(crate) unsafe fn dots<const N: usize>(
    rows: [RowRef<'_>; N],
    x: &FixedPoint,
    groups: usize,
    ahead: &[&[u8]],
) -> [f32; N] {
    let mut ahead = Ahead::new(ahead, x.blocks.len());
    let mut sums = [_mm512_setzero_ps(); N];
    for (i, (blocks, steps)) in x.blocks.chunks(STEPS / BLOCK).zip(&x.steps).enumerate() {
        let first = STEPS * i;
        let n = groups - first;
        // SAFETY: `n` groups from `first` on lie inside every row, by this function's contract.
        sums = unsafe {
            if n >= STEPS {
                add_groups::<N, true>(&rows, first, STEPS, blocks, steps, &mut ahead, sums)
            } else {
                add_groups::<N, false>(&rows, first, n, blocks, steps, &mut ahead, sums)
            }
        };
    }
    sums.map(|s| _mm512_reduce_add_ps(s))
}

/// Adds the products of `n` groups from `first` on: 16 if `WHOLE`, else at most 16.
///
/// # Safety
/// The groups lie inside every row; AVX-512 as above.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn add_groups<const N: usize, const WHOLE: bool>(
    rows: &[RowRef<'_>; N],
    first: usize,
    n: usize,
    blocks: &[FixedBlock],
    steps: &[f32; STEPS],
    ahead: &mut Ahead<'_>,
    mut sums: [__m512; N],
) -> [__m512; N] {
    let nibble = _mm512_set1_epi8(15);
    let quarters = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    // SAFETY: `n` scales of each row are readable, and 16 steps.
    let scales: [__m512; N] = std::array::from_fn(|r| unsafe {
        let halves = rows[r].scales.as_ptr().add(2 * first).cast();
        let halves =
            if WHOLE { _mm256_loadu_epi16(halves) } else { _mm256_maskz_loadu_epi16(((1u32 << n) - 1) as u16, halves) };
        _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_loadu_ps(steps.as_ptr()))
    });
    for (i, block) in blocks.iter().enumerate() {
        ahead.step();
        let lanes = _mm512_add_epi32(quarters, _mm512_set1_epi32((BLOCK * i) as i32));
        // SAFETY: sixteen integers.
        let offsets = unsafe { _mm512_loadu_si512(block.offsets.as_ptr().cast()) };
        for r in 0..N {
            // SAFETY: the codes of the block's groups lie inside the row, four groups or as many as the mask lets
            // through.
            let codes = unsafe {
                let codes = rows[r].codes.as_ptr().add((first + BLOCK * i) * GROUP / 2).cast();
                if WHOLE {
                    _mm512_loadu_epi8(codes)
                } else {
                    let left = (n - BLOCK * i).min(BLOCK);
                    _mm512_maskz_loadu_epi8(u64::MAX >> (64 - 16 * left), codes)
                }
            };
            let (low, high) = (_mm512_and_si512(codes, nibble), _mm512_srli_epi16::<4>(codes));
            let sum = join(low, _mm512_and_si512(high, nibble), offsets, block);
            let scale = _mm512_permutexvar_ps(lanes, scales[r]);
            sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, sums[r]);
        }
    }
    sums
}
