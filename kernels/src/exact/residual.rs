//! The planes over `q4` and `q8` that lead to the exact bfloat16.
//!
//! A code of the base says in which *cell* a weight lies: the half-open interval of one step around its value. The
//! coarse plane of `q4` divides each cell into sixteen. What then remains are the few bfloat16 in the cell, which both
//! sides know: the bounds of cells are exact in f32, as scales are f16 and multiples of them small. The final plane holds
//! the weight's number among these N: k = floor(log2 N) bits, and one more for those where k do not do (truncated binary
//! code, within 0.09 bits of log2 N). So nothing is stored of what the codes already say: not the sign, nor the
//! exponent, nor the upper bits of the mantissa.
//!
//! | part | content |
//! | --- | --- |
//! | coarse plane (`q4` only) | 4 bits a column, in the order of the codes: the sixteenth |
//! | head | for each segment the stream's length and the number of exceptions, u16 each |
//! | stream | for each block and j = 0, 1, ..: bit j of the numbers of all columns with k > j; then the further bits. Segments begin at a byte and end with their exceptions |
//!
//! An exception is a weight outside its cell (infinities, NaN, negative zero under a scale of zero, and what the scale
//! clips): its column in the segment and its bits, u16 each, ascending; its number is 0. A segment that would be longer
//! than its bfloat16 is its bfloat16, and its number of exceptions is 65535.

use super::bits::{BitReader, BitWriter};
use super::{PackedRow, copy_bits, segment_ranges, segments, value16};
use crate::{BLOCK, Encoding, GROUP, RowRef, ScaleFit, pack as pack_plain};
use half::f16;
use std::ops::Range;

/// The number of exceptions of a segment that is stored as it is.
pub(crate) const PLAIN_SEGMENT: u16 = u16::MAX;
/// Weights beyond this are clipped when scales are chosen: f16 scales reach no further, fitted a fifth above the largest.
const LARGEST: f32 = 65504.0 * 5.0;

/// The bfloat16 of a cell: `first` is the order key of the smallest, `n` how many there are. No weight lies in a cell
/// without any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cell {
    first: i32,
    n: u32,
}

/// A number that orders bfloat16 by value, -0 before 0.
fn key(bits: u16) -> i32 {
    let bits = i32::from(bits as i16);
    bits ^ (bits >> 31 & 0x7fff)
}

/// The inverse of [`key`].
fn of_key(key: i32) -> u16 {
    (key ^ (key >> 31 & 0x7fff)) as u16
}

/// The key of the smallest bfloat16 that is not below `x`, which is finite.
fn key_from(x: f32) -> i32 {
    // -0 + 0 is 0.
    let bits = (x + 0.0).to_bits() as i32;
    let ordered = bits ^ (bits >> 31 & i32::MAX);
    // A damaged scale may be NaN.
    (if ordered < 0 { ordered } else { ordered.wrapping_add(0xffff) }) >> 16
}

impl Cell {
    /// Between two multiples of `unit`.
    fn new(low: i32, high: i32, unit: f32) -> Self {
        if unit == 0.0 {
            return Self { first: 0, n: 1 };
        }
        let (a, b) = (key_from(low as f32 * unit), key_from(high as f32 * unit));
        Self { first: a.min(b), n: (a - b).unsigned_abs() }
    }

    /// Of a `q4` code with its coarse code.
    fn q4(code: u8, coarse: u8, scale: f32) -> Self {
        let low = 16 * i32::from(code) + i32::from(coarse) - 136;
        Self::new(low, low + 1, scale / 16.0)
    }

    /// Of a `q8` code.
    fn q8(code: i8, scale: f32) -> Self {
        let low = 2 * i32::from(code) - 1;
        Self::new(low, low + 2, scale / 2.0)
    }

    /// The weight's number, if it lies in the cell.
    fn number(self, bits: u16) -> Option<u32> {
        u32::try_from(key(bits) - self.first).ok().filter(|&number| number < self.n)
    }

    /// Bits that every number of the cell has.
    fn width(self) -> usize {
        self.n.max(1).ilog2() as usize
    }

    /// Numbers that have no more than these.
    fn n_short(self) -> u32 {
        (2 << self.width()) - self.n.max(1)
    }
}

/// Encodes a row of bfloat16 bits: the planes of `q4+exact` or `q8+exact`. The base is what [`crate::pack`] makes of the
/// weights, those that are not finite taken as 0 and those beyond f16 scales as the largest that these reach.
///
/// # Panics
/// If `encoding` is neither, or cannot store rows of this length.
pub fn pack(encoding: Encoding, bits: &[u16], fit: ScaleFit<'_>) -> PackedRow {
    assert!(matches!(encoding, Encoding::Q4Exact | Encoding::Q8Exact), "{encoding} has no final plane");
    let values: Vec<f32> = bits
        .iter()
        .map(|&b| value16(b))
        .map(|v| if v.is_finite() { v.clamp(-LARGEST, LARGEST) } else { 0.0 })
        .collect();
    let base = encoding.base();
    let mut row = PackedRow { base: vec![0; base.row_stride(bits.len())], ..PackedRow::default() };
    if let Err(e) = pack_plain(base, &values, fit, &mut row.base) {
        unreachable!("finite weights in the range of the scales: {e}");
    }
    row.coarse.resize(encoding.coarse_bytes(bits.len()), 0);
    let (codes, rest) = row.base.split_at(base.code_bytes(bits.len()));
    let scales = &rest[..base.scale_bytes(bits.len())];
    let mut cells = Vec::with_capacity(bits.len());
    for (column, &b) in bits.iter().enumerate() {
        let s = scale(scales, column);
        cells.push(match base {
            Encoding::Q4 => {
                let (at, shift) = nibble(column);
                let code = codes[at] >> shift & 15;
                let coarse = sixteenth(code, s, b);
                row.coarse[at] |= coarse << shift;
                Cell::q4(code, coarse, s)
            }
            _ => Cell::q8(codes[column] as i8, s),
        });
    }
    for range in segment_ranges(bits.len()) {
        let (stream, exceptions) = pack_segment(&bits[range.clone()], &cells[range]);
        row.head.extend((stream.len() as u16).to_le_bytes());
        row.head.extend(exceptions.to_le_bytes());
        row.stream.extend(stream);
    }
    row
}

/// The sixteenth of a code's cell in which a weight lies; 0 for one that lies outside.
fn sixteenth(code: u8, scale: f32, bits: u16) -> u8 {
    let holds = |c: &u8| Cell::q4(code, *c, scale).number(bits).is_some();
    // The quotient is rounded: one beside it may be the right one.
    let near = (16.0 * (value16(bits) / scale + 8.5 - f32::from(code))) as i32;
    let guesses = [near, near.saturating_sub(1), near.saturating_add(1)]
        .into_iter()
        .filter_map(|c| u8::try_from(c).ok())
        .filter(|c| *c < 16);
    guesses.chain(0..16).find(holds).unwrap_or(0)
}

/// A segment's stream, and its number of exceptions.
fn pack_segment(bits: &[u16], cells: &[Cell]) -> (Vec<u8>, u16) {
    let mut stream = BitWriter::default();
    let mut exceptions = Vec::new();
    for (block, (bits, cells)) in bits.chunks(BLOCK).zip(cells.chunks(BLOCK)).enumerate() {
        let mut numbers = [(0, 0); BLOCK];
        let mut longer = Vec::new();
        for (i, (&b, cell)) in bits.iter().zip(cells).enumerate() {
            let number = cell.number(b).unwrap_or_else(|| {
                exceptions.push(((block * BLOCK + i) as u16, b));
                0
            });
            let short = cell.n_short();
            numbers[i] = if number < short { (number, cell.width()) } else { ((number + short) / 2, cell.width()) };
            if number >= short {
                longer.push((number + short) & 1);
            }
        }
        let widest = numbers.iter().map(|(_, width)| *width).max().unwrap_or(0);
        for j in 0..widest {
            numbers.iter().filter(|(_, width)| *width > j).for_each(|(number, _)| stream.put(number >> j, 1));
        }
        longer.iter().for_each(|&bit| stream.put(bit, 1));
    }
    let mut stream = stream.into_bytes();
    if stream.len() + 4 * exceptions.len() >= 2 * bits.len() {
        return (bits.iter().flat_map(|b| b.to_le_bytes()).collect(), PLAIN_SEGMENT);
    }
    for (column, bits) in &exceptions {
        stream.extend(column.to_le_bytes());
        stream.extend(bits.to_le_bytes());
    }
    (stream, exceptions.len() as u16)
}

/// The byte and the shift of a column's 4 bits.
fn nibble(column: usize) -> (usize, usize) {
    let (group, j) = (column / GROUP, column % GROUP);
    (group * (GROUP / 2) + j % (GROUP / 2), 4 * (j / (GROUP / 2)))
}

fn scale(scales: &[u8], column: usize) -> f32 {
    let at = column / GROUP * 2;
    f16::from_le_bytes([scales[at], scales[at + 1]]).to_f32()
}

/// The cell of a column.
fn cell(encoding: Encoding, row: &RowRef<'_>, column: usize) -> Cell {
    let s = scale(row.scales, column);
    match encoding {
        Encoding::Q4Exact => {
            let (at, shift) = nibble(column);
            Cell::q4(row.codes[at] >> shift & 15, row.coarse[at] >> shift & 15, s)
        }
        Encoding::Q8Exact => Cell::q8(row.codes[column] as i8, s),
        other => panic!("{other} has no final plane"),
    }
}

/// The segments of a row of `columns`: their columns, streams, and numbers of exceptions or [`PLAIN_SEGMENT`].
pub(crate) fn coded_segments<'a>(
    row: &RowRef<'a>,
    columns: usize,
) -> impl Iterator<Item = (Range<usize>, &'a [u8], u16)> {
    let n_exceptions = row.head.as_chunks::<4>().0.iter().map(|entry| u16::from_le_bytes([entry[2], entry[3]]));
    let segments = segments(row.head, 4, row.stream).zip(n_exceptions);
    segment_ranges(columns).zip(segments).map(|(range, (stream, n_exceptions))| (range, stream, n_exceptions))
}

/// Plain loops: see [`super::decode`].
pub(super) fn decode(encoding: Encoding, row: RowRef<'_>, out: &mut [u16]) {
    for (range, stream, n_exceptions) in coded_segments(&row, out.len()) {
        if n_exceptions == PLAIN_SEGMENT {
            copy_bits(stream, &mut out[range]);
            continue;
        }
        let mut bits = BitReader::new(stream);
        for first in range.clone().step_by(BLOCK) {
            let cells: Vec<Cell> = (first..range.end.min(first + BLOCK)).map(|c| cell(encoding, &row, c)).collect();
            let mut numbers = vec![0; cells.len()];
            for j in 0..u16::BITS as usize {
                for (number, _) in numbers.iter_mut().zip(&cells).filter(|(_, cell)| cell.width() > j) {
                    *number |= bits.take(1) << j;
                }
            }
            for ((number, cell), o) in numbers.iter().zip(&cells).zip(&mut out[first..]) {
                let longer = *number >= cell.n_short();
                let number = if longer { 2 * number + bits.take(1) - cell.n_short() } else { *number };
                *o = of_key(cell.first + number as i32);
            }
        }
        patch(stream, n_exceptions, &mut out[range]);
    }
}

/// Sum over the weights of a row of log2 N, N the bfloat16 that the planes before the final one leave: what that could
/// take at best, if all of them are alike.
///
/// # Panics
/// If the encoding has no final plane, or the row is too short.
pub fn cell_bits(encoding: Encoding, row: RowRef<'_>) -> f64 {
    let columns = row.scales.len() / 2 * GROUP;
    (0..columns).map(|column| f64::from(cell(encoding, &row, column).n.max(1)).log2()).sum()
}

/// Puts the exceptions at the end of a segment's stream in their columns.
pub(crate) fn patch(stream: &[u8], n_exceptions: u16, out: &mut [u16]) {
    let bytes = 4 * usize::from(n_exceptions);
    let list = stream.len().checked_sub(bytes).and_then(|at| stream.get(at..)).unwrap_or_default();
    for entry in list.as_chunks::<4>().0 {
        let column = usize::from(u16::from_le_bytes([entry[0], entry[1]]));
        if let Some(o) = out.get_mut(column) {
            *o = u16::from_le_bytes([entry[2], entry[3]]);
        }
    }
}
