//! Rows that give back a checkpoint's bfloat16 bits: every one of the 65536 patterns, NaN payloads and negative zeros
//! included.
//!
//! Both encodings code blocks of [`BLOCK`](crate::BLOCK) columns without looking at the columns before them, but for the place in the
//! stream; a segment of [`SEGMENT`] columns is found by the lengths in the row's head. The codes of a block lie plane by
//! plane: all columns' first codes, then the further ones of those columns that have some. Where a column has its code
//! in such a plane is the number of bits before its own in a mask: a ballot and a population count on a GPU, `pdep` or
//! `vpexpandb` on a CPU.

pub mod bf16x;
mod bits;
pub mod residual;

use crate::{Encoding, RowRef, SEGMENT};
use half::bf16;

/// The bits of `v`, if it is a bfloat16; else those of the nearest one.
pub fn bits16(v: f32) -> u16 {
    let bits = v.to_bits();
    // `from_f32` sets the quiet bit of every NaN.
    if bits & 0xffff == 0 { (bits >> 16) as u16 } else { bf16::from_f32(v).to_bits() }
}

/// The value of a bfloat16's bits, NaN payloads unchanged.
pub fn value16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// bfloat16 bits that are stored as they are.
pub(crate) fn copy_bits(bytes: &[u8], out: &mut [u16]) {
    out.iter_mut().zip(bytes.as_chunks::<2>().0).for_each(|(o, b)| *o = u16::from_le_bytes(*b));
}

/// An encoded row that is not yet in its place: its planes, each empty where the encoding has none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PackedRow {
    /// Codes, then scales: a matrix row of the base, up to a multiple of 16.
    pub base: Vec<u8>,
    /// The coarse plane.
    pub coarse: Vec<u8>,
    /// Lengths, and what the stream needs.
    pub head: Vec<u8>,
    /// Codes of variable length.
    pub stream: Vec<u8>,
}

/// The bfloat16 bits of `row`, as long as `out`, in plain loops: what other variants are tested against. Rows that were
/// not written by [`bf16x::pack`] or [`residual::pack`] give any bits.
///
/// # Panics
/// If the encoding is not exact.
pub fn decode(encoding: Encoding, row: RowRef<'_>, out: &mut [u16]) {
    match encoding {
        Encoding::Bf16 => copy_bits(row.codes, out),
        Encoding::Bf16x => bf16x::decode(row, out),
        Encoding::Q4Exact | Encoding::Q8Exact => residual::decode(encoding, row, out),
        Encoding::Q8 | Encoding::Q4 | Encoding::Q4Plus | Encoding::R4 => panic!("{encoding} rows are not exact"),
    }
}

/// The stream of each segment of a row, whose lengths are the first two bytes of every `step` in `lengths`; empty where
/// a damaged head leads past the end.
pub(crate) fn segments<'a>(lengths: &'a [u8], step: usize, stream: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
    let mut rest = stream;
    lengths.chunks_exact(step).map(move |entry| {
        let n = entry.first_chunk().map_or(0, |b| usize::from(u16::from_le_bytes(*b)));
        let (now, later) = rest.split_at_checked(n).unwrap_or((&[], &[]));
        rest = later;
        now
    })
}

/// The columns of each segment of a row of `columns`.
pub(crate) fn segment_ranges(columns: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..columns).step_by(SEGMENT).map(move |first| first..(first + SEGMENT).min(columns))
}
