//! Rows that give back bfloat16 bits, 64 columns at a time. What a column has in a plane that not all have is brought to
//! its place by `vpexpandb` (bytes) or `pdep` (bits) with the mask of those that have.

use crate::exact::bf16x::{LEVELS, PER_LEVEL};
use crate::exact::residual::{PLAIN_SEGMENT, coded_segments, patch};
use crate::exact::{copy_bits, segment_ranges};
use crate::{BLOCK, GROUP, RowRef};
use half::f16;
use std::arch::x86_64::*;

/// Bytes from one level's exponents to the next one's in the table that codes look up: a code and four times its level.
const LEVEL_STEP: usize = 4;

/// A `bf16x` row on its way.
struct CascadeRow<'a> {
    signs_mantissas: &'a [u8],
    first_level: &'a [u8],
    /// The exponents of the codes, by code and level.
    table: __m512i,
    /// Bytes of the segments to come, and these.
    lengths: &'a [[u8; 2]],
    later: &'a [u8],
    /// The segment's stream, and the bits of it that were read.
    stream: &'a [u8],
    at: usize,
}

impl<'a> CascadeRow<'a> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn new(row: RowRef<'a>, columns: usize) -> Self {
        let (signs_mantissas, first_level) = row.codes.split_at(columns);
        let (symbols, lengths) = row.head.split_at(LEVELS * PER_LEVEL);
        let mut table = [0u8; 16];
        for (level, exponents) in symbols.chunks_exact(PER_LEVEL).enumerate() {
            table[level * LEVEL_STEP..][..PER_LEVEL].copy_from_slice(exponents);
        }
        // SAFETY: 16 bytes.
        let table = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(table.as_ptr().cast()) });
        let lengths = lengths.as_chunks().0;
        Self { signs_mantissas, first_level, table, lengths, later: row.stream, stream: &[], at: 0 }
    }

    /// Goes on to the next segment; its stream is empty where a damaged head leads past the end.
    fn next_segment(&mut self) {
        let n = self.lengths.split_off_first().map_or(0, |b| usize::from(u16::from_le_bytes(*b)));
        (self.stream, self.later) = self.later.split_at_checked(n).unwrap_or((&[], &[]));
        self.at = 0;
    }

    /// Decodes the block from column `first` on, as many columns as `out` has, at most 64.
    ///
    /// # Safety
    /// The row has these columns; AVX-512 with VBMI and VBMI2, and BMI2.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,bmi2,popcnt")]
    unsafe fn block(&mut self, first: usize, out: &mut [u16]) {
        let escape = _mm512_set1_epi8(PER_LEVEL as i8);
        let (codes, _) = self.first_level[first / 4..].as_chunks::<{ BLOCK / 4 }>();
        // SAFETY: 16 bytes.
        let codes = unsafe { _mm_loadu_si128(codes[0].as_ptr().cast()) };
        let mut index = spread(_mm256_castsi128_si256(codes), 0);
        let mut open = _mm512_cmpeq_epi8_mask(index, escape);
        for level in 1..LEVELS {
            if open == 0 {
                break;
            }
            let codes = _mm512_maskz_expand_epi8(open, spread(window(self.stream, self.at / 8), self.at % 8));
            self.at += 2 * open.count_ones() as usize;
            index = _mm512_mask_add_epi8(index, open, codes, _mm512_set1_epi8((level * LEVEL_STEP) as i8));
            open = _mm512_mask_cmpeq_epi8_mask(open, codes, escape);
        }
        let mut exponents = _mm512_shuffle_epi8(self.table, index);
        if open != 0 {
            exponents = literals(exponents, open, self.stream, &mut self.at);
        }
        let n = out.len();
        let mask = u64::MAX >> (BLOCK - n);
        // SAFETY: `n` bytes are read and `n` numbers written.
        unsafe {
            let sm = _mm512_maskz_loadu_epi8(mask, self.signs_mantissas[first..].as_ptr().cast());
            let out = out.as_mut_ptr().cast::<i16>();
            let lower = join(_mm512_castsi512_si256(sm), _mm512_castsi512_si256(exponents));
            _mm512_mask_storeu_epi16(out, mask as u32, lower);
            if n > BLOCK / 2 {
                let sm = _mm512_extracti64x4_epi64::<1>(sm);
                let upper = join(sm, _mm512_extracti64x4_epi64::<1>(exponents));
                _mm512_mask_storeu_epi16(out.add(BLOCK / 2), (mask >> (BLOCK / 2)) as u32, upper);
            }
        }
    }
}

/// `bf16x` rows of `columns` columns, one behind the other in `out`. A block's place in its stream is known when the one
/// before it is read: several rows at once fill that wait.
///
/// # Safety
/// The CPU has AVX-512 F, BW, VL, VBMI and VBMI2, and BMI2; codes and heads are as long as rows of `columns` columns have
/// them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,bmi2,popcnt")]
pub(crate) unsafe fn bf16x<const N: usize>(rows: [RowRef<'_>; N], columns: usize, out: &mut [u16]) {
    let mut rows = rows.map(|row| CascadeRow::new(row, columns));
    for range in segment_ranges(columns) {
        rows.iter_mut().for_each(CascadeRow::next_segment);
        for first in range.clone().step_by(BLOCK) {
            let end = range.end.min(first + BLOCK);
            for (r, row) in rows.iter_mut().enumerate() {
                // SAFETY: by this function's contract.
                unsafe { row.block(first, &mut out[r * columns + first..r * columns + end]) };
            }
        }
    }
}

/// Sign, exponent and mantissa put together.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn join(sm: __m256i, exponents: __m256i) -> __m512i {
    let (sm, exponents) = (_mm512_cvtepu8_epi16(sm), _mm512_cvtepu8_epi16(exponents));
    let sign = _mm512_and_si512(_mm512_slli_epi16::<8>(sm), _mm512_set1_epi16(i16::MIN));
    // The mantissa's bits where there are ones, else the exponent's.
    let rest = _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi16(0x7f), sm, _mm512_slli_epi16::<7>(exponents));
    _mm512_or_si512(sign, rest)
}

/// The exponents that have no code.
#[cold]
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,bmi2")]
fn literals(exponents: __m512i, mut open: u64, stream: &[u8], at: &mut usize) -> __m512i {
    let mut bytes = [0u8; BLOCK];
    // SAFETY: 64 bytes.
    unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), exponents) };
    while open != 0 {
        bytes[open.trailing_zeros() as usize] = take(stream, at, 8) as u8;
        open &= open - 1;
    }
    // SAFETY: as above.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

/// 32 bytes of `stream` from `at` on; zeros behind its end.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,bmi2")]
fn window(stream: &[u8], at: usize) -> __m256i {
    let rest = stream.get(at..).unwrap_or_default();
    // SAFETY: the mask leaves out what is behind the end.
    unsafe { _mm256_maskz_loadu_epi8(_bzhi_u32(u32::MAX, rest.len().min(32) as u32), rest.as_ptr().cast()) }
}

/// 64 codes of 2 bits, from bit `offset` (at most 7) of `bytes` on, to a byte each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
fn spread(bytes: __m256i, offset: usize) -> __m512i {
    // Eight codes of 16 bits, from byte 2 j on, to each 64 bits.
    const PLACES: [u8; BLOCK] = {
        let mut places = [0; BLOCK];
        let mut i = 0;
        while i < BLOCK {
            places[i] = (i / 8 * 2 + i % 8) as u8;
            i += 1;
        }
        places
    };
    // SAFETY: 64 bytes.
    let places = unsafe { _mm512_loadu_si512(PLACES.as_ptr().cast()) };
    let bytes = _mm512_permutexvar_epi8(places, _mm512_castsi256_si512(bytes));
    let shifts = _mm512_set1_epi64(0x0e0c_0a08_0604_0200 + 0x0101_0101_0101_0101 * offset as i64);
    _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, bytes), _mm512_set1_epi8(3))
}

/// The next `n` bits, at most 64; zeros behind the end.
#[inline]
#[target_feature(enable = "bmi2")]
fn take(stream: &[u8], at: &mut usize, n: usize) -> u64 {
    let rest = stream.get(*at / 8..).unwrap_or_default();
    let bytes = rest.first_chunk().copied().unwrap_or_else(|| {
        let mut bytes = [0u8; 16];
        bytes[..rest.len()].copy_from_slice(rest);
        bytes
    });
    let bits = (u128::from_le_bytes(bytes) >> (*at % 8)) as u64;
    *at += n;
    _bzhi_u64(bits, n as u32)
}

/// `q4+exact` rows, or `q8+exact` ones if not `Q4`.
///
/// # Safety
/// The CPU has AVX-512 F, BW, VL, and BMI2; codes, scales, coarse plane and head are as long as rows of `out.len()`
/// columns have them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,bmi2,popcnt")]
pub(crate) unsafe fn residual<const Q4: bool>(row: RowRef<'_>, out: &mut [u16]) {
    for (range, stream, n_exceptions) in coded_segments(&row, out.len()) {
        if n_exceptions == PLAIN_SEGMENT {
            copy_bits(stream, &mut out[range]);
            continue;
        }
        let mut at = 0;
        for first in range.clone().step_by(BLOCK) {
            let n = BLOCK.min(range.end - first);
            let mut halves = [Cells::NONE; 2];
            for (g, half) in halves.iter_mut().enumerate().take(n / GROUP) {
                // SAFETY: the row has this group.
                *half = unsafe { cells::<Q4>(row, first / GROUP + g) };
            }
            let bits = numbers(&halves, stream, &mut at);
            for (out, bits) in out[first..first + n].chunks_exact_mut(GROUP).zip(bits) {
                // SAFETY: 32 numbers.
                unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), bits) };
            }
        }
        patch(stream, n_exceptions, &mut out[range]);
    }
}

/// The cells of a group of 32 weights, 16 bits each: key of the first bfloat16, bits of every number, numbers that have
/// no more.
#[derive(Clone, Copy)]
struct Cells {
    first: __m512i,
    width: __m512i,
    n_short: __m512i,
}

impl Cells {
    /// One bfloat16 in each.
    // SAFETY: all zeros is a vector.
    const NONE: Self = unsafe { std::mem::zeroed() };
}

/// # Safety
/// The row has a group `g`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn cells<const Q4: bool>(row: RowRef<'_>, g: usize) -> Cells {
    let (scale, _) = row.scales.as_chunks::<2>();
    let scale = f16::from_le_bytes(scale[g]).to_f32();
    // The lower bound of each cell in units, 16 columns a vector.
    let (low, step, unit) = if Q4 {
        // SAFETY: 16 bytes of both planes, by this function's contract.
        let (codes, coarse) = unsafe {
            let at = g * GROUP / 2;
            (_mm_loadu_si128(row.codes.as_ptr().add(at).cast()), _mm_loadu_si128(row.coarse.as_ptr().add(at).cast()))
        };
        let mask = _mm_set1_epi8(15);
        let lower = _mm_ternarylogic_epi32::<0xca>(mask, coarse, _mm_slli_epi16::<4>(codes));
        let upper = _mm_ternarylogic_epi32::<0xca>(mask, _mm_srli_epi16::<4>(coarse), codes);
        let low = |v| _mm512_sub_epi32(_mm512_cvtepu8_epi32(v), _mm512_set1_epi32(136));
        ([low(lower), low(upper)], 1, scale / 16.0)
    } else {
        // SAFETY: 32 bytes, by this function's contract.
        let codes = unsafe {
            let codes = row.codes.as_ptr().add(g * GROUP);
            [_mm_loadu_si128(codes.cast()), _mm_loadu_si128(codes.add(16).cast())]
        };
        let low = |v| {
            let code = _mm512_cvtepi8_epi32(v);
            _mm512_sub_epi32(_mm512_add_epi32(code, code), _mm512_set1_epi32(1))
        };
        (codes.map(low), 2, scale / 2.0)
    };
    let unit = _mm512_set1_ps(unit);
    let half = |low: __m512i| {
        let (a, b) = (key_from(low, unit), key_from(_mm512_add_epi32(low, _mm512_set1_epi32(step)), unit));
        let n = _mm512_max_epi32(_mm512_abs_epi32(_mm512_sub_epi32(a, b)), _mm512_set1_epi32(1));
        // The exponent of a float is the logarithm.
        let exponent = _mm512_srli_epi32::<23>(_mm512_castps_si512(_mm512_cvtepi32_ps(n)));
        let width = _mm512_sub_epi32(exponent, _mm512_set1_epi32(127));
        let n_short = _mm512_sub_epi32(_mm512_sllv_epi32(_mm512_set1_epi32(2), width), n);
        [_mm512_min_epi32(a, b), width, n_short].map(|v| _mm512_cvtepi32_epi16(v))
    };
    let (lower, upper) = (half(low[0]), half(low[1]));
    let both = |i: usize| _mm512_inserti64x4::<1>(_mm512_castsi256_si512(lower[i]), upper[i]);
    Cells { first: both(0), width: both(1), n_short: both(2) }
}

/// The key of the smallest bfloat16 that is not below a multiple of `unit`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn key_from(multiple: __m512i, unit: __m512) -> __m512i {
    let x = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(multiple), unit), _mm512_setzero_ps());
    let bits = _mm512_castps_si512(x);
    let ordered = _mm512_xor_si512(bits, _mm512_srli_epi32::<1>(_mm512_srai_epi32::<31>(bits)));
    let positive = _mm512_cmpge_epi32_mask(bits, _mm512_setzero_si512());
    _mm512_srai_epi32::<16>(_mm512_mask_add_epi32(ordered, positive, ordered, _mm512_set1_epi32(0xffff)))
}

/// The bfloat16 of a block, by their numbers in the stream.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,bmi2,popcnt")]
fn numbers(cells: &[Cells; 2], stream: &[u8], at: &mut usize) -> [__m512i; 2] {
    let both = |lower: u32, upper: u32| u64::from(lower) | u64::from(upper) << GROUP;
    let one = _mm512_set1_epi16(1);
    let mut number = [_mm512_setzero_si512(); 2];
    let (mut j, mut bit) = (_mm512_setzero_si512(), one);
    loop {
        let [lower, upper] = [&cells[0], &cells[1]].map(|c| _mm512_cmpgt_epu16_mask(c.width, j));
        let mask = both(lower, upper);
        if mask == 0 {
            break;
        }
        let bits = _pdep_u64(take(stream, at, mask.count_ones() as usize), mask);
        number[0] = _mm512_mask_add_epi16(number[0], bits as u32, number[0], bit);
        number[1] = _mm512_mask_add_epi16(number[1], (bits >> GROUP) as u32, number[1], bit);
        (j, bit) = (_mm512_add_epi16(j, one), _mm512_add_epi16(bit, bit));
    }
    let [lower, upper] = [0, 1].map(|i: usize| _mm512_cmpge_epu16_mask(number[i], cells[i].n_short));
    let mask = both(lower, upper);
    let bits = _pdep_u64(take(stream, at, mask.count_ones() as usize), mask);
    std::array::from_fn(|i| {
        let (mask, bits) = ((mask >> (GROUP * i)) as u32, (bits >> (GROUP * i)) as u32);
        let twice = _mm512_mask_add_epi16(number[i], mask, number[i], number[i]);
        let longer = _mm512_mask_sub_epi16(twice, mask, twice, cells[i].n_short);
        let key = _mm512_add_epi16(cells[i].first, _mm512_mask_add_epi16(longer, bits, longer, one));
        let sign = _mm512_srai_epi16::<15>(key);
        _mm512_xor_si512(key, _mm512_srli_epi16::<1>(sign))
    })
}
