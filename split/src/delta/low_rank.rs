//! The factors of a tensor of low rank, as they are stored and as rows need them.

use super::bits::Shape;
use super::fold::fold_row;
use super::manifest::{DeltaTensor, LowRankEntry};
use super::open::Delta;
use crate::error::Result;
use thermocline_datasets::huggingface::LoraFactors;

/// `A` then `B`, row-major, bf16 or f32.
pub(super) fn to_bytes(factors: &LoraFactors) -> Vec<u8> {
    let values = factors.a.iter().chain(&factors.b);
    if factors.is_bf16 {
        values.flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect()
    } else {
        values.flat_map(|v| v.to_bits().to_le_bytes()).collect()
    }
}

/// Factors arranged for rows: of the checkpoint's matrix, or for a down projection by neuron of its transpose. The same
/// products are added in the same order either way, so the bits are the same.
pub(super) struct Factors {
    rank: usize,
    scale: f32,
    /// `[rows, rank]`: a row's own coefficients.
    along: Vec<f32>,
    /// `[rank, columns]`.
    across: Vec<f32>,
}

impl Factors {
    /// Arranges `A` `[rank, n_in]` and `B` `[n_out, rank]`.
    fn new(a: &[f32], b: &[f32], entry: LowRankEntry, by_neuron: bool) -> Self {
        let rank = entry.rank;
        let (along, across) = if by_neuron {
            (transpose(a, a.len().checked_div(rank).unwrap_or(0)), transpose(b, rank))
        } else {
            (b.to_vec(), a.to_vec())
        };
        Self { rank, scale: entry.scale, along, across }
    }

    /// Products added to each weight.
    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    /// Of an adapter, for rows of the checkpoint's matrix.
    pub(super) fn of_adapter(factors: &LoraFactors, rank: usize, scale: f32) -> Self {
        Self::new(&factors.a, &factors.b, LowRankEntry { rank, scale, bf16: factors.is_bf16 }, false)
    }

    /// Turns the base's row into the final model's.
    ///
    /// # Panics
    /// If there is no such row or `bits` is not as long as one.
    pub(super) fn fold(&self, row: usize, bits: &mut [u16], acc: &mut Vec<f32>) {
        let start = row.saturating_mul(self.rank);
        let along = self.along.get(start..start.saturating_add(self.rank)).unwrap_or_default();
        assert_eq!(along.len(), self.rank, "a row of the matrix");
        fold_row(bits, &self.across, along, self.scale, acc);
    }
}

/// Row-major `[.., columns]` as `[columns, ..]`.
fn transpose(values: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|j| values.iter().skip(j).step_by(columns.max(1))).copied().collect()
}

impl Delta {
    /// Factors of a tensor of low rank; `by_neuron` for rows as they are stored, else as the checkpoint has them.
    pub(super) fn factors(&self, tensor: &DeltaTensor, by_neuron: bool) -> Result<Factors> {
        let entry = tensor.low_rank.ok_or_else(|| self.damaged(&tensor.name, "has no factors"))?;
        let bytes = self.read_whole(tensor)?;
        let values: Vec<f32> = if entry.bf16 {
            let widen = |b: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
            bytes.as_chunks::<2>().0.iter().map(widen).collect()
        } else {
            bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
        };
        let is_down = Shape::new(&tensor.name, &[tensor.rows, tensor.columns]).is_some_and(|s| s.is_down);
        // A has a column for each of the checkpoint's columns, which are the stored rows of a down projection.
        let n_in = if is_down { tensor.rows } else { tensor.columns };
        let cut = entry.rank.saturating_mul(n_in);
        let split = values.split_at_checked(cut);
        let (a, b) = split.ok_or_else(|| self.damaged(&tensor.name, "its factors are too short"))?;
        Ok(Factors::new(a, b, entry, is_down && by_neuron))
    }
}
