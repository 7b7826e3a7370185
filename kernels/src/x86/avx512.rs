//! AVX-512. A group of 32 columns is two vectors of 16.
//!
//! q4 codes become floats by `vpermps` from a 16-entry table: the instruction looks at the low four bits of each index
//! only, so neither masks nor conversions are needed. One group is 18 bytes of weights and three shuffles (one widens
//! the bytes), which bound it: about 20 GB/s from cache on one Zen 5 core. Inputs stay f32 here; q4 neurons on CPUs
//! that have VNNI are multiplied in fixed point instead (`vnni.rs`).

// Several arrays advance together; an iterator over one of them would hide that.
#![allow(clippy::needless_range_loop)]

use super::Ahead;
use crate::certificate::{Factors, MARGIN};
use crate::{Encoding, GROUP, PREFETCH_BYTES, QuantisedInput, RowRef};
use std::arch::x86_64::*;

/// Asks for the lines of `ahead` meanwhile.
///
/// # Safety
/// The CPU has AVX-512 F, BW and VL; every row holds at least `x.len()` columns, whole groups if quantised.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) unsafe fn dots<const N: usize>(
    encoding: Encoding,
    rows: [RowRef<'_>; N],
    x: &[f32],
    ahead: &[&[u8]],
) -> [f32; N] {
    // SAFETY: lengths by this function's contract.
    unsafe {
        match encoding {
            Encoding::Bf16 => dots_bf16(rows, x, ahead),
            Encoding::Q8 => dots_groups::<N, Q8>(rows, x, ahead),
            Encoding::Q4 | Encoding::R4 => dots_groups::<N, Q4>(rows, x, ahead),
            Encoding::Q4Plus => dots_groups::<N, Q4Plus>(rows, x, ahead),
            Encoding::Bf16x | Encoding::Q4Exact | Encoding::Q8Exact => unreachable!("rows are decoded first"),
        }
    }
}

/// # Safety
/// As [`dots`], with `y` for `x`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) unsafe fn axpys<const N: usize>(
    encoding: Encoding,
    rows: [RowRef<'_>; N],
    a: [f32; N],
    y: &mut [f32],
    ahead: &[&[u8]],
) {
    // SAFETY: lengths by this function's contract.
    unsafe {
        match encoding {
            Encoding::Bf16 => {
                let mut ahead = Ahead::new(ahead, N * (y.len() / 16));
                rows.into_iter().zip(a).for_each(|(row, a)| axpy_bf16(row, a, y, &mut ahead));
            }
            Encoding::Q8 => axpys_groups::<N, Q8>(rows, a, y, ahead),
            Encoding::Q4 | Encoding::R4 => axpys_groups::<N, Q4>(rows, a, y, ahead),
            Encoding::Q4Plus => axpys_groups::<N, Q4Plus>(rows, a, y, ahead),
            Encoding::Bf16x | Encoding::Q4Exact | Encoding::Q8Exact => unreachable!("rows are decoded first"),
        }
    }
}

/// How the codes of one group become two vectors of floats.
trait Group {
    const CODE_BYTES: usize;
    /// What scales are multiplied with, a power of two.
    const STEP: f32 = 1.0;
    /// Group `g` of a row.
    ///
    /// # Safety
    /// The row has such a group; AVX-512 as above.
    unsafe fn decode(row: &RowRef<'_>, g: usize, table: __m512) -> (__m512, __m512);
}

struct Q8;
struct Q4;
struct Q4Plus;

impl Group for Q8 {
    const CODE_BYTES: usize = GROUP;
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn decode(row: &RowRef<'_>, g: usize, _table: __m512) -> (__m512, __m512) {
        // SAFETY: 32 readable bytes by contract.
        let (lo, hi) = unsafe {
            let codes = row.codes.as_ptr().add(g * Self::CODE_BYTES);
            (_mm_loadu_si128(codes.cast()), _mm_loadu_si128(codes.add(16).cast()))
        };
        (_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(lo)), _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(hi)))
    }
}

impl Group for Q4 {
    const CODE_BYTES: usize = GROUP / 2;
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn decode(row: &RowRef<'_>, g: usize, table: __m512) -> (__m512, __m512) {
        // SAFETY: 16 readable bytes by contract.
        let codes = unsafe { _mm_loadu_si128(row.codes.as_ptr().add(g * Self::CODE_BYTES).cast()) };
        let c = _mm512_cvtepu8_epi32(codes);
        (_mm512_permutexvar_ps(c, table), _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(c), table))
    }
}

impl Group for Q4Plus {
    const CODE_BYTES: usize = GROUP / 2;
    const STEP: f32 = 1.0 / 16.0;
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn decode(row: &RowRef<'_>, g: usize, _table: __m512) -> (__m512, __m512) {
        // SAFETY: 16 readable bytes each by contract.
        let (codes, coarse) = unsafe {
            let at = g * Self::CODE_BYTES;
            (_mm_loadu_si128(row.codes.as_ptr().add(at).cast()), _mm_loadu_si128(row.coarse.as_ptr().add(at).cast()))
        };
        let low = _mm_set1_epi8(15);
        // Bit by bit the codes where `low` has zeros, else the coarse ones: both planes' lower, then upper nibbles.
        let lo = _mm_ternarylogic_epi32::<0xca>(low, coarse, _mm_slli_epi16::<4>(codes));
        let hi = _mm_ternarylogic_epi32::<0xca>(low, _mm_srli_epi16::<4>(coarse), codes);
        let middle = _mm512_set1_ps(135.5);
        let value = |v| _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(v)), middle);
        (value(lo), value(hi))
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn table() -> __m512 {
    _mm512_setr_ps(-8., -7., -6., -5., -4., -3., -2., -1., 0., 1., 2., 3., 4., 5., 6., 7.)
}

/// Groups whose scales are widened at once: one vector.
const SCALES: usize = 16;

/// Widens up to [`SCALES`] scales and multiplies them. From memory each then costs nothing: the multiply takes it with a
/// broadcast.
///
/// # Safety
/// `scales` points to `n` f16, `n` at most [`SCALES`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn widen_scales(scales: *const u8, n: usize, factor: f32) -> [f32; SCALES] {
    let mask = ((1u32 << n) - 1) as u16;
    let mut out = [0.0; SCALES];
    // SAFETY: `n` f16 are readable by contract, the masked rest is not touched; `out` holds one vector.
    unsafe {
        let halves = _mm256_maskz_loadu_epi16(mask, scales.cast());
        _mm512_storeu_ps(out.as_mut_ptr(), _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(factor)));
    }
    out
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn dots_groups<const N: usize, G: Group>(rows: [RowRef<'_>; N], x: &[f32], ahead: &[&[u8]]) -> [f32; N] {
    let table = table();
    // Two sums a row: one alone would wait four cycles for its own last addition.
    let (mut even, mut odd) = ([_mm512_setzero_ps(); N], [_mm512_setzero_ps(); N]);
    let n_groups = x.len() / GROUP;
    let mut ahead = Ahead::new(ahead, n_groups.div_ceil(SCALES));
    let mut first = 0;
    while first < n_groups {
        ahead.step();
        let n = SCALES.min(n_groups - first);
        // SAFETY: groups `first .. first + n` lie inside x and inside every row, by the contract of `dots`.
        unsafe {
            let scales: [_; N] =
                std::array::from_fn(|r| widen_scales(rows[r].scales.as_ptr().add(2 * first), n, G::STEP));
            for i in (0..n).step_by(2) {
                let (g, pair) = (first + i, i + 1 < n);
                for r in 0..N {
                    let p = x.as_ptr().add(g * GROUP);
                    even[r] = add_group::<G>(&rows[r], g, p, scales[r][i], table, even[r]);
                    if pair {
                        odd[r] = add_group::<G>(&rows[r], g + 1, p.add(GROUP), scales[r][i + 1], table, odd[r]);
                    }
                }
            }
        }
        first += n;
    }
    std::array::from_fn(|r| _mm512_reduce_add_ps(_mm512_add_ps(even[r], odd[r])))
}

/// `sum + scale * (codes . x)` for one group.
///
/// # Safety
/// The row has a group `g`, `x` points to 32 floats.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn add_group<G: Group>(
    row: &RowRef<'_>,
    g: usize,
    x: *const f32,
    scale: f32,
    table: __m512,
    sum: __m512,
) -> __m512 {
    // SAFETY: by this function's contract.
    unsafe {
        let (lo, hi) = G::decode(row, g, table);
        let t = _mm512_fmadd_ps(hi, _mm512_loadu_ps(x.add(16)), _mm512_mul_ps(lo, _mm512_loadu_ps(x)));
        _mm512_fmadd_ps(t, _mm512_set1_ps(scale), sum)
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn axpys_groups<const N: usize, G: Group>(rows: [RowRef<'_>; N], a: [f32; N], y: &mut [f32], ahead: &[&[u8]]) {
    let table = table();
    let n_groups = y.len() / GROUP;
    let mut ahead = Ahead::new(ahead, n_groups);
    let mut first = 0;
    while first < n_groups {
        let n = SCALES.min(n_groups - first);
        // SAFETY: groups `first .. first + n` lie inside y and inside every row, by the contract of `axpys`.
        unsafe {
            let scales: [_; N] =
                std::array::from_fn(|r| widen_scales(rows[r].scales.as_ptr().add(2 * first), n, G::STEP * a[r]));
            for i in 0..n {
                ahead.step();
                let g = first + i;
                let p = y.as_mut_ptr().add(g * GROUP);
                let (mut y0, mut y1) = (_mm512_loadu_ps(p), _mm512_loadu_ps(p.add(16)));
                for r in 0..N {
                    let (lo, hi) = G::decode(&rows[r], g, table);
                    let s = _mm512_set1_ps(scales[r][i]);
                    y0 = _mm512_fmadd_ps(lo, s, y0);
                    y1 = _mm512_fmadd_ps(hi, s, y1);
                }
                _mm512_storeu_ps(p, y0);
                _mm512_storeu_ps(p.add(16), y1);
            }
        }
        first += n;
    }
}

/// A mask for the last `n` (below 16) of the columns.
fn tail(n: usize) -> u16 {
    (1u16 << n) - 1
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn widen(v: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(v)))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn dots_bf16<const N: usize>(rows: [RowRef<'_>; N], x: &[f32], ahead: &[&[u8]]) -> [f32; N] {
    let (mut even, mut odd) = ([_mm512_setzero_ps(); N], [_mm512_setzero_ps(); N]);
    let n_full = x.len() / 16;
    let mut ahead = Ahead::new(ahead, n_full.div_ceil(2));
    for v in (0..n_full).step_by(2) {
        ahead.step();
        let pair = v + 1 < n_full;
        for r in 0..N {
            // SAFETY: vectors v and, if there is a pair, v + 1 lie inside x and inside every row, by the contract of
            // `dots`.
            unsafe {
                let (codes, p) = (rows[r].codes.as_ptr().add(32 * v), x.as_ptr().add(16 * v));
                even[r] = _mm512_fmadd_ps(widen(_mm256_loadu_si256(codes.cast())), _mm512_loadu_ps(p), even[r]);
                if pair {
                    let w = widen(_mm256_loadu_si256(codes.add(32).cast()));
                    odd[r] = _mm512_fmadd_ps(w, _mm512_loadu_ps(p.add(16)), odd[r]);
                }
            }
        }
    }
    let rest = x.len() % 16;
    if rest > 0 {
        for n in 0..N {
            // SAFETY: masked loads touch the `rest` columns behind the full vectors only.
            unsafe {
                let w = widen(_mm256_maskz_loadu_epi16(tail(rest), rows[n].codes.as_ptr().add(32 * n_full).cast()));
                let x = _mm512_maskz_loadu_ps(tail(rest), x.as_ptr().add(16 * n_full));
                even[n] = _mm512_fmadd_ps(w, x, even[n]);
            }
        }
    }
    std::array::from_fn(|r| _mm512_reduce_add_ps(_mm512_add_ps(even[r], odd[r])))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn axpy_bf16(row: RowRef<'_>, a: f32, y: &mut [f32], ahead: &mut Ahead<'_>) {
    let a = _mm512_set1_ps(a);
    let n_full = y.len() / 16;
    for v in 0..n_full {
        ahead.step();
        // SAFETY: vector v lies inside y and inside the row, by the contract of `axpys`.
        unsafe {
            let w = widen(_mm256_loadu_si256(row.codes.as_ptr().add(32 * v).cast()));
            let p = y.as_mut_ptr().add(16 * v);
            _mm512_storeu_ps(p, _mm512_fmadd_ps(w, a, _mm512_loadu_ps(p)));
        }
    }
    let rest = y.len() % 16;
    if rest > 0 {
        // SAFETY: masked accesses touch the `rest` columns behind the full vectors only.
        unsafe {
            let w = widen(_mm256_maskz_loadu_epi16(tail(rest), row.codes.as_ptr().add(32 * n_full).cast()));
            let p = y.as_mut_ptr().add(16 * n_full);
            let v = _mm512_maskz_loadu_ps(tail(rest), p);
            _mm512_mask_storeu_ps(p, tail(rest), _mm512_fmadd_ps(w, a, v));
        }
    }
}

/// Which of 32 interleaved rows of unsigned codes have a certified negative dot product: a bit for each.
///
/// # Safety
/// The CPU has AVX-512 F, BW, VL and VNNI; `codes` holds 128 bytes for each element of the input.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(crate) unsafe fn certificate(codes: &[u8], factors: &Factors, x: &QuantisedInput) -> u32 {
    // Steps in pairs with sums of their own: one alone would wait four cycles for its own last addition.
    let (mut even, mut odd) = ([_mm512_setzero_si512(); 4], [_mm512_setzero_si512(); 4]);
    let (pairs, last) = x.codes.as_chunks::<2>();
    let codes = codes.as_ptr();
    for (i, pair) in pairs.iter().enumerate() {
        // SAFETY: the bytes of the steps 2 i and 2 i + 1 lie inside `codes` by contract.
        unsafe {
            add_step(codes.add(256 * i), pair[0], &mut even);
            add_step(codes.add(256 * i + 128), pair[1], &mut odd);
        }
    }
    for x in last {
        // SAFETY: as above, for the last step.
        unsafe { add_step(codes.add(256 * pairs.len()), *x, &mut even) };
    }
    let offsets = x.offsets.map(|o| _mm512_set1_epi32(o));
    let sum = |i: usize| _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_add_epi32(even[i], odd[i]), offsets[i / 2]));
    let half = |r: usize| {
        // SAFETY: sixteen floats from 16 r on lie inside each array.
        let [scale, error, norm] =
            unsafe { [&factors.scale, &factors.error, &factors.norm].map(|f| _mm512_loadu_ps(f.as_ptr().add(16 * r))) };
        let (upper, lower) = (_mm512_mul_ps(sum(r), _mm512_set1_ps(256.0)), sum(2 + r));
        let value = _mm512_mul_ps(_mm512_add_ps(upper, lower), _mm512_mul_ps(scale, _mm512_set1_ps(x.scale)));
        let left_out = _mm512_mul_ps(error, _mm512_set1_ps(x.norm));
        let bound = _mm512_add_ps(left_out, _mm512_mul_ps(norm, _mm512_set1_ps(x.error)));
        _mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_add_ps(value, bound), _mm512_set1_ps(-MARGIN))
    };
    u32::from(half(0)) | u32::from(half(1)) << 16
}

/// Adds four columns of 32 rows to their sums: by the upper bytes, then by the lower.
///
/// # Safety
/// `codes` points to 128 bytes; AVX-512 as above.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn add_step(codes: *const u8, x: [i32; 2], sums: &mut [__m512i; 4]) {
    // A prefetch reaches nothing that a program could see, whatever the address; the stream is sequential, but short.
    _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add(PREFETCH_BYTES).cast());
    _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add(PREFETCH_BYTES + 64).cast());
    let [upper, lower] = x.map(|x| _mm512_set1_epi32(x));
    // SAFETY: 128 readable bytes by contract.
    let rows = unsafe { [_mm512_loadu_si512(codes.cast()), _mm512_loadu_si512(codes.add(64).cast())] };
    for r in 0..2 {
        sums[r] = _mm512_dpbusd_epi32(sums[r], rows[r], upper);
        sums[2 + r] = _mm512_dpbusd_epi32(sums[2 + r], rows[r], lower);
    }
}
