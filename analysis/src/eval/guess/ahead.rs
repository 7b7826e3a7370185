//! The split's predictor, before the layer's own input is there: fed with an earlier layer's, under this layer's norm.

use super::{Cost, Guess, Seen, StoredLowRank};
use crate::Result;
use thermocline_split::Split;

/// One or two layers early; the first layers have no such layer before them and guess from their own input.
pub(super) struct Ahead {
    predictor: StoredLowRank,
    /// Which of the earlier layers it is fed by: 0 is the one before.
    earlier: usize,
}

impl Ahead {
    /// The matrix for the layer before is taken where the split has one and that layer feeds it, as the runtime does; no split has one
    /// for its first layer.
    pub(super) fn load(split: &Split, index: usize, earlier: usize) -> Result<Self> {
        let mut predictor = StoredLowRank::load(split, index)?;
        let of_before = if earlier == 0 { split.predictor_ahead(index)? } else { None };
        predictor.low_rank = of_before.unwrap_or(predictor.low_rank);
        Ok(Self { predictor, earlier })
    }
}

impl Guess for Ahead {
    fn scores(&self, seen: &Seen<'_>) -> Result<Vec<f32>> {
        match seen.earlier.get(self.earlier) {
            Some(earlier) => self.predictor.scores(seen.layer, &seen.layer.ffn_input(earlier)?),
            None => self.predictor.scores(seen.layer, seen.input),
        }
    }

    fn cost(&self) -> Cost {
        self.predictor.cost
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::eval::guess::tests::{assert_near, layers, noise, stored};

    #[test]
    fn an_earlier_stream_is_asked_under_this_layers_norm() {
        let layer = layers(1).remove(0);
        let hidden = layer.hidden_size();
        let [input, last, before_last] = [4, 5, 6].map(|seed| noise(3 * hidden, seed));
        let by_hand = |stream: &[f32], is_normalised: bool| -> Vec<f32> {
            let predictor = stored(&layer, 8);
            let rows = stream.chunks_exact(hidden).flat_map(|row| {
                let row = if is_normalised { row.to_vec() } else { layer.ffn_input(row).unwrap() };
                predictor.low_rank.score(&row, layer.activation(), &predictor.down_norm)
            });
            rows.collect()
        };
        for (which, earlier, wanted) in [
            (0, &[&last[..]][..], by_hand(&last, false)),
            (1, &[&last[..], &before_last][..], by_hand(&before_last, false)),
            // The first layers have only their own.
            (0, &[][..], by_hand(&input, true)),
            (1, &[&last[..]][..], by_hand(&input, true)),
        ] {
            let guess = Ahead { predictor: stored(&layer, 8), earlier: which };
            let got = guess.scores(&Seen { layer: &layer, input: &input, earlier, given: &[] }).unwrap();
            assert_near(&got, &wanted);
            assert_eq!(guess.cost().bytes, 1000.0);
        }
    }
}
