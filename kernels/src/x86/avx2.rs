//! AVX2 with FMA and F16C. A group of 32 columns is four vectors of 8.

use super::Ahead;
use crate::{Encoding, GROUP, RowRef};
use std::arch::x86_64::*;

/// Asks for the lines of `ahead` meanwhile.
///
/// # Safety
/// The CPU has AVX2, FMA and F16C; every row holds at least `x.len()` columns, whole groups if quantised.
#[target_feature(enable = "avx2,fma,f16c")]
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
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn axpys<const N: usize>(
    encoding: Encoding,
    rows: [RowRef<'_>; N],
    a: [f32; N],
    y: &mut [f32],
    ahead: &[&[u8]],
) {
    let mut ahead = Ahead::new(ahead, N * (y.len() / GROUP));
    for (row, a) in rows.into_iter().zip(a) {
        // SAFETY: lengths by this function's contract.
        unsafe {
            match encoding {
                Encoding::Bf16 => axpy_bf16(row, a, y, &mut ahead),
                Encoding::Q8 => axpy_groups::<Q8>(row, a, y, &mut ahead),
                Encoding::Q4 | Encoding::R4 => axpy_groups::<Q4>(row, a, y, &mut ahead),
                Encoding::Q4Plus => axpy_groups::<Q4Plus>(row, a, y, &mut ahead),
                Encoding::Bf16x | Encoding::Q4Exact | Encoding::Q8Exact => unreachable!("rows are decoded first"),
            }
        }
    }
}

/// How the codes of one group become four vectors of floats.
trait Group {
    const CODE_BYTES: usize;
    /// What scales are multiplied with, a power of two.
    const STEP: f32 = 1.0;
    /// Group `g` of a row.
    ///
    /// # Safety
    /// The row has such a group; AVX2 as above.
    unsafe fn decode(row: &RowRef<'_>, g: usize) -> [__m256; 4];
}

struct Q8;
struct Q4;
struct Q4Plus;

impl Group for Q4Plus {
    const CODE_BYTES: usize = GROUP / 2;
    const STEP: f32 = 1.0 / 16.0;
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn decode(row: &RowRef<'_>, g: usize) -> [__m256; 4] {
        // SAFETY: 16 readable bytes each by contract.
        let (codes, coarse) = unsafe {
            let at = g * Self::CODE_BYTES;
            (_mm_loadu_si128(row.codes.as_ptr().add(at).cast()), _mm_loadu_si128(row.coarse.as_ptr().add(at).cast()))
        };
        let low = _mm_set1_epi8(15);
        let join = |upper, lower| _mm_or_si128(_mm_andnot_si128(low, upper), _mm_and_si128(low, lower));
        let lo = join(_mm_slli_epi16::<4>(codes), coarse);
        let hi = join(codes, _mm_srli_epi16::<4>(coarse));
        let middle = _mm256_set1_ps(135.5);
        let value = |v| _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(v)), middle);
        [value(lo), value(_mm_unpackhi_epi64(lo, lo)), value(hi), value(_mm_unpackhi_epi64(hi, hi))]
    }
}

impl Group for Q8 {
    const CODE_BYTES: usize = GROUP;
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn decode(row: &RowRef<'_>, g: usize) -> [__m256; 4] {
        let mut out = [_mm256_setzero_ps(); 4];
        for (v, o) in out.iter_mut().enumerate() {
            // SAFETY: 32 readable bytes by contract, 8 of them here.
            let c = unsafe { _mm_loadl_epi64(row.codes.as_ptr().add(g * Self::CODE_BYTES + 8 * v).cast()) };
            *o = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(c));
        }
        out
    }
}

impl Group for Q4 {
    const CODE_BYTES: usize = GROUP / 2;
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn decode(row: &RowRef<'_>, g: usize) -> [__m256; 4] {
        // SAFETY: 16 readable bytes by contract.
        let (a, b) = unsafe {
            let codes = row.codes.as_ptr().add(g * Self::CODE_BYTES);
            (_mm_loadl_epi64(codes.cast()), _mm_loadl_epi64(codes.add(8).cast()))
        };
        let (a, b) = (_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(b));
        let (mask, eight) = (_mm256_set1_epi32(15), _mm256_set1_epi32(8));
        let float = |v| _mm256_cvtepi32_ps(_mm256_sub_epi32(v, eight));
        [
            float(_mm256_and_si256(a, mask)),
            float(_mm256_and_si256(b, mask)),
            float(_mm256_srli_epi32::<4>(a)),
            float(_mm256_srli_epi32::<4>(b)),
        ]
    }
}

/// # Safety
/// `scales` points to one f16.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scale<G: Group>(scales: *const u8) -> __m256 {
    // SAFETY: two readable bytes by contract.
    let bits = unsafe { scales.cast::<u16>().read_unaligned() };
    let scale = _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))));
    if G::STEP == 1.0 { scale } else { _mm256_mul_ps(scale, _mm256_set1_ps(G::STEP)) }
}

/// The sum of the lanes.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn sum(v: __m256) -> f32 {
    let s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots_groups<const N: usize, G: Group>(rows: [RowRef<'_>; N], x: &[f32], ahead: &[&[u8]]) -> [f32; N] {
    let mut acc = [_mm256_setzero_ps(); N];
    let mut ahead = Ahead::new(ahead, x.len() / GROUP);
    for g in 0..x.len() / GROUP {
        ahead.step();
        for n in 0..N {
            // SAFETY: group g lies inside x and inside every row, by the contract of `dots`.
            unsafe {
                let w = G::decode(&rows[n], g);
                let p = x.as_ptr().add(g * GROUP);
                let mut t = _mm256_mul_ps(w[0], _mm256_loadu_ps(p));
                for (v, w) in w.iter().enumerate().skip(1) {
                    t = _mm256_fmadd_ps(*w, _mm256_loadu_ps(p.add(8 * v)), t);
                }
                acc[n] = _mm256_fmadd_ps(t, scale::<G>(rows[n].scales.as_ptr().add(2 * g)), acc[n]);
            }
        }
    }
    acc.map(|a| sum(a))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn axpy_groups<G: Group>(row: RowRef<'_>, a: f32, y: &mut [f32], ahead: &mut Ahead<'_>) {
    let a = _mm256_set1_ps(a);
    for g in 0..y.len() / GROUP {
        ahead.step();
        // SAFETY: group g lies inside y and inside the row, by the contract of `axpys`.
        unsafe {
            let s = _mm256_mul_ps(a, scale::<G>(row.scales.as_ptr().add(2 * g)));
            for (v, w) in G::decode(&row, g).into_iter().enumerate() {
                let p = y.as_mut_ptr().add(g * GROUP + 8 * v);
                _mm256_storeu_ps(p, _mm256_fmadd_ps(w, s, _mm256_loadu_ps(p)));
            }
        }
    }
}

/// # Safety
/// `codes` points to 8 bf16.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_bf16(codes: *const u8) -> __m256 {
    // SAFETY: 16 readable bytes by contract.
    let v = unsafe { _mm_loadu_si128(codes.cast()) };
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(v)))
}

/// Weight `j` of a bf16 row.
fn one_bf16(row: RowRef<'_>, j: usize) -> f32 {
    half::bf16::from_le_bytes([row.codes[2 * j], row.codes[2 * j + 1]]).to_f32()
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots_bf16<const N: usize>(rows: [RowRef<'_>; N], x: &[f32], ahead: &[&[u8]]) -> [f32; N] {
    let n_full = x.len() / 8;
    let mut ahead = Ahead::new(ahead, N * n_full);
    std::array::from_fn(|n| {
        let mut acc = [_mm256_setzero_ps(); 2];
        for v in 0..n_full {
            ahead.step();
            // SAFETY: vector v lies inside x and inside the row, by the contract of `dots`.
            unsafe {
                let w = load_bf16(rows[n].codes.as_ptr().add(16 * v));
                acc[v & 1] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x.as_ptr().add(8 * v)), acc[v & 1]);
            }
        }
        let rest: f32 = (8 * n_full..x.len()).map(|j| one_bf16(rows[n], j) * x[j]).sum();
        sum(_mm256_add_ps(acc[0], acc[1])) + rest
    })
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn axpy_bf16(row: RowRef<'_>, a: f32, y: &mut [f32], ahead: &mut Ahead<'_>) {
    let (n_full, va) = (y.len() / 8, _mm256_set1_ps(a));
    for v in 0..n_full {
        ahead.step();
        // SAFETY: vector v lies inside y and inside the row, by the contract of `axpys`.
        unsafe {
            let p = y.as_mut_ptr().add(8 * v);
            let w = load_bf16(row.codes.as_ptr().add(16 * v));
            _mm256_storeu_ps(p, _mm256_fmadd_ps(w, va, _mm256_loadu_ps(p)));
        }
    }
    for (j, y) in y.iter_mut().enumerate().skip(8 * n_full) {
        *y += one_bf16(row, j) * a;
    }
}

/// Dot products of 32 interleaved rows of unsigned codes with the input's upper and lower bytes. Bytes are taken as
/// 16-bit numbers, the even and the odd ones apart: a product of bytes would saturate.
///
/// # Safety
/// The CPU has AVX2; `codes` holds 128 bytes for each element of `x`.
#[target_feature(enable = "avx2")]
pub(crate) unsafe fn certificate_sums(codes: &[u8], x: &[[i32; 2]]) -> [[i32; 32]; 2] {
    let mut sums = [[_mm256_setzero_si256(); 4]; 2];
    let low_bytes = _mm256_set1_epi16(0xff);
    for (step, x) in x.iter().enumerate() {
        let x = x.map(|x| {
            let x = _mm256_set1_epi32(x);
            [_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x)), _mm256_srai_epi16::<8>(x)]
        });
        for r in 0..4 {
            // SAFETY: the 128 bytes of this step lie inside `codes` by contract.
            let rows = unsafe { _mm256_loadu_si256(codes.as_ptr().add(128 * step + 32 * r).cast()) };
            let (even, odd) = (_mm256_and_si256(rows, low_bytes), _mm256_srli_epi16::<8>(rows));
            for (sums, x) in sums.iter_mut().zip(x) {
                let products = _mm256_add_epi32(_mm256_madd_epi16(even, x[0]), _mm256_madd_epi16(odd, x[1]));
                sums[r] = _mm256_add_epi32(sums[r], products);
            }
        }
    }
    let mut out = [[0; 32]; 2];
    for (out, sums) in out.iter_mut().zip(sums) {
        for (r, sum) in sums.into_iter().enumerate() {
            // SAFETY: eight sums are a quarter of the array.
            unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast::<__m256i>().add(r), sum) };
        }
    }
    out
}
