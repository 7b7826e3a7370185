//! Exact rows on CPUs without AVX-512. `pdep` brings to its place what a column has in a plane that not all have: in `bf16x`
//! eight columns to a register of 64 bits, a byte each; in residual planes a bit each.

use crate::exact::bf16x::{LEVELS, PER_LEVEL};
use crate::exact::residual::{PLAIN_SEGMENT, coded_segments, patch};
use crate::exact::{copy_bits, segment_ranges, segments};
use crate::{BLOCK, GROUP, RowRef};
use half::f16;
use std::arch::x86_64::*;

/// Registers of a block.
const WORDS: usize = BLOCK / 8;
/// The lowest bit of every byte.
const ONES: u64 = 0x0101_0101_0101_0101;
/// The two lowest: a code.
const CODES: u64 = 3 * ONES;

/// `bf16x` rows.
///
/// # Safety
/// The CPU has AVX2 and BMI2; codes and head are as long as rows of `out.len()` columns have them.
#[target_feature(enable = "avx2,bmi2,popcnt")]
pub(crate) unsafe fn bf16x(row: RowRef<'_>, out: &mut [u16]) {
    let columns = out.len();
    let (signs_mantissas, first_level) = row.codes.split_at(columns);
    let (symbols, lengths) = row.head.split_at(LEVELS * PER_LEVEL);
    // A code, and four times its level.
    let mut table = [0u8; 16];
    for (level, exponents) in symbols.chunks_exact(PER_LEVEL).enumerate() {
        table[4 * level..][..PER_LEVEL].copy_from_slice(exponents);
    }
    for (range, stream) in segment_ranges(columns).zip(segments(lengths, 2, row.stream)) {
        let mut stream = Bits { rest: stream, at: 0 };
        for first in range.clone().step_by(BLOCK) {
            let n = BLOCK.min(range.end - first);
            let (codes, _) = first_level[first / 4..].as_chunks::<2>();
            let mut exponents = [0u8; BLOCK];
            exponents_of(codes, &table, &mut stream, &mut exponents);
            let sm = &signs_mantissas[first..first + n];
            let out = &mut out[first..first + n];
            if n == BLOCK {
                // SAFETY: 64 bytes of signs and mantissas, as many numbers.
                unsafe { join(sm, &exponents, out) };
            } else {
                for ((out, sm), e) in out.iter_mut().zip(sm).zip(exponents) {
                    *out = u16::from(sm & 0x80) << 8 | u16::from(e) << 7 | u16::from(sm & 0x7f);
                }
            }
        }
    }
}

/// The exponents of a block.
#[inline]
#[target_feature(enable = "avx2,bmi2,popcnt")]
fn exponents_of(codes: &[[u8; 2]], table: &[u8; 16], stream: &mut Bits<'_>, out: &mut [u8; BLOCK]) {
    let mut index = [0u64; WORDS];
    let mut open = [0u64; WORDS];
    for ((index, open), codes) in index.iter_mut().zip(&mut open).zip(codes) {
        *index = _pdep_u64(u64::from(u16::from_le_bytes(*codes)), CODES);
        *open = *index & (*index >> 1) & ONES;
    }
    for _ in 1..LEVELS {
        for (index, open) in index.iter_mut().zip(&mut open) {
            let codes = _pdep_u64(stream.take(2 * open.count_ones()), 3 * *open);
            // What has no code on this level adds nothing.
            *index += *open + codes;
            *open &= codes & (codes >> 1);
        }
    }
    // SAFETY: sixteen bytes.
    let table = unsafe { _mm_loadu_si128(table.as_ptr().cast()) };
    for (pair, out) in index.as_chunks::<2>().0.iter().zip(out.as_chunks_mut::<16>().0) {
        let exponents = _mm_shuffle_epi8(table, _mm_set_epi64x(pair[1] as i64, pair[0] as i64));
        // SAFETY: sixteen bytes.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), exponents) };
    }
    for (open, out) in open.iter().zip(out.as_chunks_mut::<8>().0) {
        if *open != 0 {
            let (n, half) = (8 * open.count_ones(), 8 * (open & u64::from(u32::MAX)).count_ones());
            let bytes = _bzhi_u64(stream.take(half), half) | stream.take(n - half).unbounded_shl(half);
            let literals = _pdep_u64(bytes, 0xff * *open);
            let kept = u64::from_le_bytes(*out) & !(0xff * *open);
            *out = (kept | literals).to_le_bytes();
        }
    }
}

/// Sign, exponent and mantissa of 64 columns put together.
///
/// # Safety
/// `sm` holds 64 bytes, `out` 64 numbers.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn join(sm: &[u8], exponents: &[u8; BLOCK], out: &mut [u16]) {
    let (mantissa, sign) = (_mm256_set1_epi16(0x7f), _mm256_set1_epi16(i16::MIN));
    for i in (0..BLOCK).step_by(16) {
        // SAFETY: sixteen bytes of both and sixteen numbers from i on, by this function's contract.
        unsafe {
            let sm = _mm256_cvtepu8_epi16(_mm_loadu_si128(sm.as_ptr().add(i).cast()));
            let e = _mm256_cvtepu8_epi16(_mm_loadu_si128(exponents.as_ptr().add(i).cast()));
            let rest = _mm256_or_si256(_mm256_and_si256(sm, mantissa), _mm256_slli_epi16::<7>(e));
            let bits = _mm256_or_si256(rest, _mm256_and_si256(_mm256_slli_epi16::<8>(sm), sign));
            _mm256_storeu_si256(out.as_mut_ptr().add(i).cast(), bits);
        }
    }
}

/// `q4+exact` rows, or `q8+exact` ones if not `Q4`.
///
/// # Safety
/// The CPU has AVX2 and BMI2; codes, scales, coarse plane and head are as long as rows of `out.len()` columns have them.
#[target_feature(enable = "avx2,bmi2,popcnt")]
pub(crate) unsafe fn residual<const Q4: bool>(row: RowRef<'_>, out: &mut [u16]) {
    for (range, stream, n_exceptions) in coded_segments(&row, out.len()) {
        if n_exceptions == PLAIN_SEGMENT {
            copy_bits(stream, &mut out[range]);
            continue;
        }
        let mut bits = Bits { rest: stream, at: 0 };
        for first in range.clone().step_by(BLOCK) {
            let n = BLOCK.min(range.end - first);
            // Columns that are not there have one bfloat16.
            let mut cells = Cells { first: [0; BLOCK], width: [0; BLOCK], n_short: [1; BLOCK] };
            for g in 0..n / GROUP {
                cells.set::<Q4>(row, first / GROUP + g, g * GROUP);
            }
            let mut keys = [0i32; BLOCK];
            cells.keys(&mut bits, &mut keys);
            for (out, key) in out[first..first + n].iter_mut().zip(keys) {
                *out = (key ^ (key >> 31 & 0x7fff)) as u16;
            }
        }
        patch(stream, n_exceptions, &mut out[range]);
    }
}

/// The cells of a block: key of the first bfloat16, bits of every number, numbers that have no more.
struct Cells {
    first: [i32; BLOCK],
    width: [i32; BLOCK],
    n_short: [i32; BLOCK],
}

impl Cells {
    /// Group `g` of a row, to the columns of the block from `at` on.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn set<const Q4: bool>(&mut self, row: RowRef<'_>, g: usize, at: usize) {
        let (scale, _) = row.scales.as_chunks::<2>();
        let scale = f16::from_le_bytes(scale[g]).to_f32();
        // The lower bound of each cell in units.
        let mut low = [0i32; GROUP];
        if Q4 {
            let bytes = g * GROUP / 2..(g + 1) * GROUP / 2;
            let (lower, upper) = low.split_at_mut(GROUP / 2);
            let planes = row.codes[bytes.clone()].iter().zip(&row.coarse[bytes]);
            for ((lower, upper), (c, f)) in lower.iter_mut().zip(upper).zip(planes) {
                (*lower, *upper) = (i32::from((c & 15) << 4 | f & 15) - 136, i32::from(c & 0xf0 | f >> 4) - 136);
            }
        } else {
            let codes = &row.codes[g * GROUP..(g + 1) * GROUP];
            low.iter_mut().zip(codes).for_each(|(low, c)| *low = 2 * i32::from(*c as i8) - 1);
        }
        let (step, unit) = if Q4 { (1, scale / 16.0) } else { (2, scale / 2.0) };
        let (step, unit) = (_mm256_set1_epi32(step), _mm256_set1_ps(unit));
        for (v, low) in low.as_chunks::<8>().0.iter().enumerate() {
            // SAFETY: eight numbers.
            let low = unsafe { _mm256_loadu_si256(low.as_ptr().cast()) };
            let (a, b) = (key_from(low, unit), key_from(_mm256_add_epi32(low, step), unit));
            let n = _mm256_max_epi32(_mm256_abs_epi32(_mm256_sub_epi32(a, b)), _mm256_set1_epi32(1));
            // The exponent of a float is the logarithm.
            let exponent = _mm256_srli_epi32::<23>(_mm256_castps_si256(_mm256_cvtepi32_ps(n)));
            let width = _mm256_sub_epi32(exponent, _mm256_set1_epi32(127));
            let n_short = _mm256_sub_epi32(_mm256_sllv_epi32(_mm256_set1_epi32(2), width), n);
            let at = at + 8 * v;
            for (values, to) in
                [(_mm256_min_epi32(a, b), &mut self.first), (width, &mut self.width), (n_short, &mut self.n_short)]
            {
                let to = &mut to[at..at + 8];
                // SAFETY: eight numbers.
                unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), values) };
            }
        }
    }

    /// The keys of the weights, by their numbers in the stream.
    #[inline]
    #[target_feature(enable = "avx2,bmi2,popcnt")]
    fn keys(&self, bits: &mut Bits<'_>, keys: &mut [i32; BLOCK]) {
        const HALVES: usize = BLOCK / GROUP;
        let mut numbers = [0i32; BLOCK];
        for j in 0.. {
            let mut masks = [0u32; HALVES];
            for (mask, widths) in masks.iter_mut().zip(self.width.as_chunks::<GROUP>().0) {
                *mask = mask_of(widths, |v| _mm256_cmpgt_epi32(v, _mm256_set1_epi32(j)));
            }
            if masks == [0; HALVES] {
                break;
            }
            for (mask, numbers) in masks.iter().zip(numbers.as_chunks_mut::<GROUP>().0) {
                let set = _pdep_u32(bits.take(mask.count_ones()) as u32, *mask);
                add_where(set, 1i32.unbounded_shl(j as u32), numbers);
            }
        }
        for h in 0..HALVES {
            let at = h * GROUP..(h + 1) * GROUP;
            let (numbers, n_short) = (&mut numbers[at.clone()], &self.n_short[at.clone()]);
            let mut mask = 0u32;
            for (i, (number, short)) in numbers.iter().zip(n_short).enumerate() {
                mask |= u32::from(number >= short) << i;
            }
            let set = _pdep_u32(bits.take(mask.count_ones()) as u32, mask);
            let columns = numbers.iter().zip(n_short).zip(&self.first[at.clone()]).zip(&mut keys[at]);
            for (i, (((number, short), first), key)) in columns.enumerate() {
                let bit = (set >> i & 1) as i32;
                let longer = number.wrapping_mul(2).wrapping_add(bit).wrapping_sub(*short);
                *key = first.wrapping_add(if mask >> i & 1 == 1 { longer } else { *number });
            }
        }
    }
}

/// The lanes of 32 numbers for which `test` gives all ones, a bit each.
#[inline]
#[target_feature(enable = "avx2")]
fn mask_of(numbers: &[i32; GROUP], test: impl Fn(__m256i) -> __m256i) -> u32 {
    let mut mask = 0;
    for (v, numbers) in numbers.as_chunks::<8>().0.iter().enumerate() {
        // SAFETY: eight numbers.
        let lanes = test(unsafe { _mm256_loadu_si256(numbers.as_ptr().cast()) });
        mask |= (_mm256_movemask_ps(_mm256_castsi256_ps(lanes)) as u32) << (8 * v);
    }
    mask
}

/// Adds `value` to the numbers whose bits are set.
#[inline]
#[target_feature(enable = "avx2")]
fn add_where(set: u32, value: i32, numbers: &mut [i32; GROUP]) {
    let lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    let value = _mm256_set1_epi32(value);
    for (v, numbers) in numbers.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let mine = _mm256_and_si256(_mm256_set1_epi32((set >> (8 * v)) as i32), lanes);
        let added = _mm256_and_si256(_mm256_cmpeq_epi32(mine, lanes), value);
        // SAFETY: eight numbers.
        unsafe {
            let p = numbers.as_mut_ptr().cast();
            _mm256_storeu_si256(p, _mm256_add_epi32(_mm256_loadu_si256(p), added));
        }
    }
}

/// The key of the smallest bfloat16 that is not below a multiple of `unit`.
#[inline]
#[target_feature(enable = "avx2")]
fn key_from(multiple: __m256i, unit: __m256) -> __m256i {
    let x = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(multiple), unit), _mm256_setzero_ps());
    let bits = _mm256_castps_si256(x);
    let negative = _mm256_srai_epi32::<31>(bits);
    let ordered = _mm256_xor_si256(bits, _mm256_srli_epi32::<1>(negative));
    let rounded = _mm256_andnot_si256(negative, _mm256_set1_epi32(0xffff));
    _mm256_srai_epi32::<16>(_mm256_add_epi32(ordered, rounded))
}

/// A stream of bits, least significant first; behind its end there are zeros.
struct Bits<'a> {
    rest: &'a [u8],
    /// Bits of `rest` that were taken.
    at: usize,
}

impl Bits<'_> {
    /// The next `n` bits, at most 32, in the lowest places; what is above them is of no meaning.
    #[inline]
    fn take(&mut self, n: u32) -> u64 {
        let (byte, bit) = (self.at / 8, self.at % 8);
        self.at += n as usize;
        let tail = self.rest.get(byte..).unwrap_or_default();
        if let Some(bytes) = tail.first_chunk() {
            return u64::from_le_bytes(*bytes) >> bit;
        }
        let mut bytes = [0u8; 8];
        bytes[..tail.len()].copy_from_slice(tail);
        u64::from_le_bytes(bytes) >> bit
    }
}
