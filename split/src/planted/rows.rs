//! q4 rows of random codes, in the layout that FORMAT.md gives.

use half::f16;
use std::ops::Range;
use thermocline_datasets::Random;
use thermocline_kernels::{Encoding, GROUP};

/// Bytes of a group's codes.
const GROUP_BYTES: usize = GROUP / 2;
/// Two codes of weight zero.
const ZERO_CODES: u8 = 0x88;

/// Codes and scales of one row, to be written.
pub(super) struct Row<'a> {
    codes: &'a mut [u8],
    scales: &'a mut [u8],
}

impl<'a> Row<'a> {
    pub(super) fn new((codes, scales): (&'a mut [u8], &'a mut [u8])) -> Self {
        Self { codes, scales }
    }

    /// A row of a matrix, with its padding.
    pub(super) fn of_matrix(row: &'a mut [u8], columns: usize) -> Self {
        let (codes, rest) = row.split_at_mut(Encoding::Q4.code_bytes(columns));
        Self { codes, scales: &mut rest[..Encoding::Q4.scale_bytes(columns)] }
    }

    /// Random codes everywhere, under scales of one size. Codes have a mean of -1/2; half of the scales are negative, or
    /// the residual stream's mean would grow from layer to layer.
    pub(super) fn randomize(&mut self, random: &mut Random, scale: f32) {
        random.fill(self.codes);
        let scales = [scale, -scale].map(|scale| f16::from_f32(scale).to_le_bytes());
        for groups in self.scales.chunks_mut(2 * u64::BITS as usize) {
            let mut signs = random.next_u64();
            for group in groups.chunks_exact_mut(2) {
                group.copy_from_slice(&scales[(signs & 1) as usize]);
                signs >>= 1;
            }
        }
    }

    /// The scale of the groups of some columns, which are whole groups.
    pub(super) fn scale(&mut self, columns: Range<usize>, scale: f32) {
        let scale = f16::from_f32(scale).to_le_bytes();
        let groups = &mut self.scales[columns.start / GROUP * 2..columns.end / GROUP * 2];
        groups.chunks_exact_mut(2).for_each(|group| group.copy_from_slice(&scale));
    }

    /// Codes in -8..=7 from column `start`, the first of a group; what they leave of their last group is zero.
    pub(super) fn put(&mut self, start: usize, codes: impl IntoIterator<Item = i8>) {
        let mut codes = codes.into_iter().peekable();
        let mut at = start / GROUP * GROUP_BYTES;
        while codes.peek().is_some() {
            let group = &mut self.codes[at..at + GROUP_BYTES];
            group.fill(ZERO_CODES);
            for column in 0..GROUP {
                let Some(code) = codes.next() else { break };
                let (byte, shift) = (&mut group[column % GROUP_BYTES], column / GROUP_BYTES * 4);
                *byte = *byte & !(15 << shift) | ((code + 8) as u8) << shift;
            }
            at += GROUP_BYTES;
        }
    }

    /// The codes of some columns, which are whole groups.
    pub(super) fn square_sum(&self, columns: Range<usize>) -> u32 {
        let square = |code: u8| u32::from(code.abs_diff(8)).pow(2);
        let codes = &self.codes[columns.start / 2..columns.end / 2];
        codes.iter().map(|c| square(c & 15) + square(c >> 4)).sum()
    }
}

/// A matrix in q4, `[rows, columns]`, each row filled by `fill`.
pub(super) fn matrix(rows: usize, columns: usize, mut fill: impl FnMut(usize, &mut Row<'_>)) -> Vec<u8> {
    let stride = Encoding::Q4.row_stride(columns);
    let mut out = vec![0u8; rows * stride];
    for (r, row) in out.chunks_exact_mut(stride).enumerate() {
        fill(r, &mut Row::of_matrix(row, columns));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use thermocline_kernels::{RowRef, unpack};

    #[test]
    fn codes_lie_where_readers_look_for_them() {
        let columns = 96;
        let bytes = matrix(1, columns, |_, row| {
            row.randomize(&mut Random::new(3), 0.5);
            row.put(32, (0..40).map(|i| (i % 15 - 7) as i8));
            row.scale(32..96, 2.0);
        });
        let mut values = vec![0.0; columns];
        unpack(Encoding::Q4, RowRef::from_matrix_row(Encoding::Q4, columns, &bytes), &mut values);
        let want: Vec<f32> = (0..40).map(|i| 2.0 * (i % 15 - 7) as f32).chain([0.0; 24]).collect();
        assert_eq!(values[32..], want);
        assert!(values[..32].iter().any(|v| *v != 0.0) && values[..32].iter().all(|v| v.abs() <= 4.0));
        let mut bytes = bytes;
        let row = Row::of_matrix(&mut bytes, columns);
        assert_eq!(row.square_sum(32..96), want.iter().map(|v| (v * v / 4.0) as u32).sum::<u32>());
    }
}
