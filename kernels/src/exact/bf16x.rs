//! `bf16x`: bfloat16 with coded exponents.
//!
//! The eight bits of sign and mantissa are noise and are stored as they are. The exponents of a row are few: of a normal
//! distribution they hold 2.55 bits. They are coded by a cascade of 2-bit codes: 0, 1 and 2 are the three most frequent
//! exponents, 3 is "look at the next level"; after three levels the exponent itself follows. That is a prefix code of
//! lengths 2, 4, 6 and 14; on normal data it comes within 0.14 bits of the entropy, and unlike a Huffman code it falls
//! apart into planes that 64 columns read at once.
//!
//! | part | content |
//! | --- | --- |
//! | codes | a byte a column: sign (bit 7), mantissa; then for each block 16 bytes: first-level codes, column j in bits 2 j |
//! | head | the exponents of the codes, three for each level; the stream's length for each segment, u16 |
//! | stream | for each block: second-level codes of the columns that have some, third-level codes, exponents, without gaps; segments begin at a byte |
//!
//! Compare DFloat11 (arXiv 2504.11651): Huffman codes, tables in shared memory, and two passes over a thread block.

use super::bits::{BitReader, BitWriter};
use super::{PackedRow, segment_ranges, segments};
use crate::encoding::SYMBOLS;
use crate::{BLOCK, RowRef};

/// Levels of codes.
pub(crate) const LEVELS: usize = 3;
/// Exponents with codes of one level.
pub(crate) const PER_LEVEL: usize = SYMBOLS / LEVELS;
/// The code that leads to the next level.
const ESCAPE: u8 = PER_LEVEL as u8;
/// Bits that the exponent is apart from the mantissa.
const MANTISSA_BITS: u16 = 7;

/// Encodes a row of bfloat16 bits.
pub fn pack(bits: &[u16]) -> PackedRow {
    let exponents: Vec<u8> = bits.iter().map(|b| (b >> MANTISSA_BITS) as u8).collect();
    let table = most_frequent(&exponents);
    let mut row = PackedRow { head: table.to_vec(), ..PackedRow::default() };
    row.base.extend(bits.iter().map(|b| (b >> 8 & 0x80 | b & 0x7f) as u8));
    for block in exponents.chunks(BLOCK) {
        let mut codes = BitWriter::default();
        block.iter().for_each(|&e| codes.put(u32::from(code(&table, 0, e)), 2));
        row.base.extend(codes.into_bytes());
        row.base.resize(row.base.len() + (BLOCK / 4 - block.len().div_ceil(4)), 0);
    }
    row.base.resize(row.base.len().next_multiple_of(16), 0);
    for range in segment_ranges(bits.len()) {
        let mut stream = BitWriter::default();
        for block in exponents[range].chunks(BLOCK) {
            let mut open: Vec<u8> = block.to_vec();
            for level in 0..LEVELS {
                open.retain(|&e| code(&table, level, e) == ESCAPE);
                match level + 1 < LEVELS {
                    true => open.iter().for_each(|&e| stream.put(u32::from(code(&table, level + 1, e)), 2)),
                    false => open.iter().for_each(|&e| stream.put(u32::from(e), 8)),
                }
            }
        }
        let stream = stream.into_bytes();
        row.head.extend((stream.len() as u16).to_le_bytes());
        row.stream.extend(stream);
    }
    row
}

/// The exponents that get codes, most frequent first; of equal ones the smaller first.
fn most_frequent(exponents: &[u8]) -> [u8; SYMBOLS] {
    let mut counts = [0usize; 256];
    exponents.iter().for_each(|&e| counts[usize::from(e)] += 1);
    let mut order: Vec<u8> = (0..=255).collect();
    order.sort_by_key(|&e| std::cmp::Reverse(counts[usize::from(e)]));
    std::array::from_fn(|i| order[i])
}

/// The code of an exponent on a level that it reaches.
fn code(table: &[u8; SYMBOLS], level: usize, exponent: u8) -> u8 {
    let of_level = &table[level * PER_LEVEL..(level + 1) * PER_LEVEL];
    of_level.iter().position(|&e| e == exponent).map_or(ESCAPE, |i| i as u8)
}

/// Plain loops: see [`super::decode`].
pub(super) fn decode(row: RowRef<'_>, out: &mut [u16]) {
    let columns = out.len();
    let (signs_mantissas, first_level) = row.codes.split_at(columns);
    let (table, lengths) = row.head.split_at(SYMBOLS);
    for (range, stream) in segment_ranges(columns).zip(segments(lengths, 2, row.stream)) {
        let mut stream = BitReader::new(stream);
        for first in range.clone().step_by(BLOCK) {
            let n = BLOCK.min(range.end - first);
            let mut codes = BitReader::new(&first_level[first / 4..]);
            let mut exponents = [0u8; BLOCK];
            let mut open: Vec<usize> = (0..n).collect();
            for level in 0..=LEVELS {
                open.retain(|&i| {
                    let code = match level {
                        0 => codes.take(2),
                        LEVELS => stream.take(8),
                        _ => stream.take(2),
                    };
                    let known = level < LEVELS && code < u32::from(ESCAPE);
                    exponents[i] = if known { table[level * PER_LEVEL + code as usize] } else { code as u8 };
                    !known
                });
            }
            for (i, exponent) in exponents[..n].iter().enumerate() {
                let sm = u16::from(signs_mantissas[first + i]);
                out[first + i] = (sm & 0x80) << 8 | u16::from(*exponent) << MANTISSA_BITS | sm & 0x7f;
            }
        }
    }
}
