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
