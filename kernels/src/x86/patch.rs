//! Rows of bf16 patched 32 columns at a time. Source of the idea: a bitmap and values in order are what
//! `vpexpandw` takes; a column without a bit moves by 0 steps, which changes nothing.

use std::arch::x86_64::*;

/// Columns of a vector.
const LANES: usize = 32;

/// As [`crate::patch::sparse`].
///
/// # Safety
/// The CPU has AVX-512 F, BW and VBMI2; `bitmap` has a bit for each column of `row`, none past the last, and as many set
/// bits as there are `differences`.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
pub(crate) unsafe fn sparse(row: &mut [u16], bitmap: &[u8], differences: &[u16]) {
    let (whole, rest) = row.as_chunks_mut::<LANES>();
    let (masks, last) = bitmap.as_chunks::<4>();
    let mut taken = 0;
    for (columns, mask) in whole.iter_mut().zip(masks) {
        let mask = u32::from_le_bytes(*mask);
        // SAFETY: as many differences are left as bits, so at least those of this mask; the columns are a whole vector.
        unsafe {
            let base = _mm512_loadu_si512(columns.as_ptr().cast());
            let steps = expand(mask, differences, taken);
            _mm512_storeu_si512(columns.as_mut_ptr().cast(), apply(base, steps));
        }
        taken += mask.count_ones() as usize;
    }
    if !rest.is_empty() {
        // The last columns' bits: 1 to 4 bytes, the fourth in `masks` if it is full.
        let bytes = masks.get(whole.len()).map_or(last, |mask| &mask[..]);
        let mask = bytes.iter().rev().fold(0u32, |mask, byte| mask << 8 | u32::from(*byte));
        let there = (1u32 << rest.len()) - 1;
        // SAFETY: as above; loads and stores are masked to the columns that there are.
        unsafe {
            let base = _mm512_maskz_loadu_epi16(there, rest.as_ptr().cast());
            let steps = expand(mask, differences, taken);
            _mm512_mask_storeu_epi16(rest.as_mut_ptr().cast(), there, apply(base, steps));
        }
    }
}

/// The steps of the differences from `taken` on in the lanes whose bit is set, 0 in the others.
///
/// They are expanded from a register: the form of `vpexpandw` that reads memory itself guards every lane against faults
/// and takes 24 cycles on Zen 5, about three times the rest of the loop. (Undoing the zig-zag first keeps the compiler
/// from folding the load into it.)
///
/// # Safety
/// As many differences as `mask` has bits are left behind `taken`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2")]
unsafe fn expand(mask: u32, differences: &[u16], taken: usize) -> __m512i {
    let left = differences.len() - taken;
    // SAFETY: a whole vector is loaded only if it is there, else only what is left.
    let packed = unsafe {
        let from: *const i16 = differences.as_ptr().add(taken).cast();
        if left >= LANES { _mm512_loadu_si512(from.cast()) } else { _mm512_maskz_loadu_epi16((1 << left) - 1, from) }
    };
    let negative = _mm512_sub_epi16(_mm512_setzero_si512(), _mm512_and_si512(packed, _mm512_set1_epi16(1)));
    _mm512_maskz_expand_epi16(mask, _mm512_xor_si512(_mm512_srli_epi16::<1>(packed), negative))
}

/// The second half of [`crate::patch::apply_difference`] in every lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn apply(base: __m512i, steps: __m512i) -> __m512i {
    let top = _mm512_set1_epi16(i16::MIN);
    let key = _mm512_xor_si512(base, _mm512_or_si512(_mm512_srai_epi16::<15>(base), top));
    let key = _mm512_add_epi16(key, steps);
    // `sign(!key) | 0x8000`: all ones where the key's highest bit is clear.
    let flip = _mm512_or_si512(_mm512_srai_epi16::<15>(_mm512_xor_si512(key, _mm512_set1_epi16(-1))), top);
    _mm512_xor_si512(key, flip)
}

/// As [`crate::patch::count_bits`].
///
/// # Safety
/// The CPU has POPCNT.
#[target_feature(enable = "popcnt")]
pub(crate) unsafe fn count_bits(bitmap: &[u8]) -> usize {
    crate::patch::count_bits(bitmap)
}

/// As [`crate::patch::dense`].
///
/// # Safety
/// The CPU has AVX-512 F and BW.
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) unsafe fn dense(row: &mut [u16], low: &[u8], high: &[u8]) {
    crate::patch::dense(row, low, high);
}
