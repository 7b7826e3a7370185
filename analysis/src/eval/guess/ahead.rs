//! The split's predictor, before the layer's own input is there: fed with an earlier layer's, under this layer's norm.

use super::{Cost, Guess, Seen, StoredLowRank};
use crate::Result;
use thermocline_split::Split;

/// One or two layers early; the first layers have no such layer before them and guess from their own input.
pub(super) struct Ahead {
    predictor: StoredLowRank,
    layers: usize,
}

impl Ahead {
    /// The matrix for the layer before is taken where the split has one and `layers` is 1, as the runtime does; no split has one for
    /// its first layer.
    pub(super) fn load(split: &Split, index: usize, layers: usize) -> Result<Self> {
        let mut predictor = StoredLowRank::load(split, index)?;
        let of_before = if layers == 1 { split.predictor_ahead(index)? } else { None };
        predictor.low_rank = of_before.unwrap_or(predictor.low_rank);
        Ok(Self { predictor, layers })
    }
}

impl Guess for Ahead {
    fn scores(&self, seen: &Seen<'_>) -> Result<Vec<f32>> {
        match seen.earlier.get(self.layers - 1) {
            Some(earlier) => self.predictor.scores(seen.layer, &seen.layer.ffn_input(earlier)?),
            None => self.predictor.scores(seen.layer, seen.input),
        }
    }

    fn cost(&self) -> Cost {
        self.predictor.cost
    }
}
