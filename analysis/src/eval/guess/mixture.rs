//! The split's predictor and the token before together.

use super::previous::before;
use super::{Cost, Guess, Seen, StoredLowRank};
use crate::Result;
use thermocline_calibrate::predictor::energy_recall;

/// What may be added of the position before.
const FACTORS: [f32; 8] = [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5];

/// The predictor's score, and `factor` times what the neuron gave at the position before.
pub(super) struct LowRankAndPrevious {
    pub predictor: StoredLowRank,
    pub factor: f32,
}

impl Guess for LowRankAndPrevious {
    fn scores(&self, seen: &Seen<'_>) -> Result<Vec<f32>> {
        let mut scores = self.predictor.scores(seen.layer, seen.input)?;
        add(&mut scores, &before(seen.given, &vec![0.0; self.predictor.down_norm.len()]), self.factor);
        Ok(scores)
    }

    fn cost(&self) -> Cost {
        let of_previous = Cost { bytes: 0.0, multiply_adds: self.predictor.down_norm.len() as f64 };
        let mut cost = self.predictor.cost;
        cost += of_previous;
        cost
    }
}

fn add(scores: &mut [f32], before: &[f32], factor: f32) {
    scores.iter_mut().zip(before).for_each(|(score, before)| *score += factor * before);
}

/// The factor of those tried that keeps most of the energy if a `share` of the neurons is chosen by `scores` with it; `given` is what
/// they give, `[n_tokens, intermediate_size]` both, in windows of `ctx`.
pub(super) fn fit_factor(scores: &[f32], given: &[f32], (intermediate_size, ctx): (usize, usize), share: f64) -> f32 {
    let none = vec![0.0; intermediate_size];
    let before: Vec<f32> = given.chunks(ctx * intermediate_size).flat_map(|window| before(window, &none)).collect();
    let kept = |factor: f32| {
        let mut scores = scores.to_vec();
        add(&mut scores, &before, factor);
        energy_recall(&scores, given, intermediate_size, share)
    };
    // The first of equals.
    let best = FACTORS.map(|factor| (factor, kept(factor)));
    best.into_iter().fold((0.0, f64::NEG_INFINITY), |best, tried| if tried.1 > best.1 { tried } else { best }).0
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::eval::guess::tests::{assert_near, layers, noise, stored};

    #[test]
    fn a_part_of_the_position_before_is_added() {
        let layer = layers(1).remove(0);
        let (hidden, ffn) = (layer.hidden_size(), layer.intermediate_size());
        let (input, given) = (noise(3 * hidden, 4), noise(3 * ffn, 5));
        let guess = LowRankAndPrevious { predictor: stored(&layer, 8), factor: 0.7 };
        let mut wanted = Vec::new();
        for (t, x) in input.chunks_exact(hidden).enumerate() {
            let alone = guess.predictor.low_rank.score(x, layer.activation(), &guess.predictor.down_norm);
            let of_previous = |i: usize| if t == 0 { 0.0 } else { given[(t - 1) * ffn + i] };
            wanted.extend(alone.iter().enumerate().map(|(i, score)| score + 0.7 * of_previous(i)));
        }
        let got = guess.scores(&Seen { layer: &layer, input: &input, earlier: &[], given: &given }).unwrap();
        assert_near(&got, &wanted);
    }

    /// Where the scores are right nothing is added, and where they say nothing all that may be.
    #[test]
    fn the_factor_is_what_the_text_asks_for() {
        let (n, ffn, ctx) = (64, 40, 16);
        let fit = |scores: &[f32], given: &[f32]| fit_factor(scores, given, (ffn, ctx), 0.25);
        let given: Vec<f32> = noise(n * ffn, 1).iter().map(|v| v.abs()).collect();
        assert_eq!(fit(&given, &given), 0.0);
        // Every position gives what the one before gave, and scores are half of that and half noise.
        let same: Vec<f32> = (0..n).flat_map(|_| given[..ffn].to_vec()).collect();
        let rough: Vec<f32> = same.iter().zip(noise(n * ffn, 2)).map(|(v, e)| 0.5 * (v + e.abs())).collect();
        assert!(fit(&rough, &same) >= 0.5);
        // The window before is another text.
        let first_of_windows: Vec<f32> =
            (0..n * ffn).map(|i| if i / ffn % ctx == 0 { given[i] } else { 0.0 }).collect();
        assert_eq!(fit(&first_of_windows, &first_of_windows), 0.0);
    }
}
