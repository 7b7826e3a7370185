use super::guess::Guesser;
use super::input_costs::GroupCost;
use super::inputs::InputChoice;
use crate::{Error, Result};
use rayon::prelude::*;
use thermocline_runtime::quality::{Tally, compare};
use thermocline_runtime::{LayerActive, energy, n_active, n_needed, top_k};

/// Which neurons of every layer are computed, at every position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mask {
    /// All.
    Dense,
    /// All but those whose activation is exactly zero: the same output as [`Mask::Dense`].
    Exact,
    /// The given share with the largest |h| * ||d||. It needs h of all neurons, so it is no way to run, but the best
    /// that a predictor can hope for.
    Oracle(f64),
    /// The given share with the largest |h|, whatever the length of the down column.
    OracleH(f64),
    /// The given share that the split's predictor scores highest, divided between the layers as the runtime's sparse mode
    /// divides it, with what the split has to stand for the others.
    Predicted(f64),
    /// The given share of each layer that the predictor scores highest, and nothing for the others.
    PredictedAlike(f64),
    /// The first `always` of each layer in the split's order, as a share, and of the others the share `active` whose error, left
    /// to the split's sketch, would be largest; the sketch stands for the rest.
    Graded {
        /// Of those that are not always kept.
        active: f64,
        /// 0 to 1.
        always: f64,
        /// The same number of every layer and token; else by the split's thresholds, if it has any, which may be of single rows: then
        /// the shares are of these.
        alike: bool,
    },
    /// Of every layer as few as leave to the sketch a squared error that is expected to be at most the square of the given share of
    /// the neurons' energy: more where the sketch is unsure, few where most are zero.
    GradedError(f64),
    /// CATS (arXiv 2404.08763): all gates, and of up and down the given share of neurons, those whose gate reaches a
    /// threshold of the window.
    Cats(f64),
    /// TEAL: the given share of the inputs of all matrices, those of attention too.
    Teal(f64),
    /// WINA: as TEAL, by the lengths of the columns.
    Wina(f64),
    /// The inputs of all matrices that lower the divergence most for their bytes, of which the given share is read; the others
    /// are replaced by their means ([`super::InputCosts`]).
    Inputs(f64),
    /// The given share of each layer that another guess than the split's predictor names, and nothing for the others.
    Guessed(Guesser, f64),
}

/// Neurons in a share of a layer, by the runtime's rule.
pub fn active_count(share: f64, intermediate_size: usize) -> usize {
    n_active(share as f32, intermediate_size)
}

impl Mask {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Mask::Dense => "dense",
            Mask::Exact => "exact",
            Mask::Oracle(_) => "oracle",
            Mask::OracleH(_) => "oracle-h",
            Mask::Predicted(_) => "predicted",
            Mask::PredictedAlike(_) => "predicted-alike",
            Mask::Graded { alike: false, .. } => "graded",
            Mask::Graded { alike: true, .. } => "graded-alike",
            Mask::GradedError(_) => "graded-error",
            Mask::Cats(_) => "cats",
            Mask::Teal(_) => "teal",
            Mask::Wina(_) => "wina",
            Mask::Inputs(_) => "inputs",
            Mask::Guessed(guesser, _) => guesser.name(),
        }
    }

    /// The share that it keeps, if it is given one.
    pub fn active(self) -> Option<f64> {
        match self {
            Mask::Dense | Mask::Exact => None,
            Mask::Oracle(share)
            | Mask::OracleH(share)
            | Mask::Predicted(share)
            | Mask::PredictedAlike(share)
            | Mask::Graded { active: share, .. }
            | Mask::GradedError(share)
            | Mask::Cats(share)
            | Mask::Teal(share)
            | Mask::Wina(share)
            | Mask::Inputs(share)
            | Mask::Guessed(_, share) => Some(share),
        }
    }

    /// The share of each layer that it keeps at every token.
    pub(crate) fn always(self) -> f64 {
        if let Mask::Graded { always, .. } = self { always } else { 0.0 }
    }

    pub(crate) fn check(self) -> Result<()> {
        if !(0.0..=1.0).contains(&self.always()) {
            let reason = format!("{} is not from 0 to 1", self.always());
            return Err(Error::Setting { flag: "--always", reason });
        }
        match self.active() {
            Some(share) if !(share > 0.0 && share <= 1.0) => {
                Err(Error::Setting { flag: "--active", reason: format!("{share} is not above 0 and at most 1") })
            }
            _ => Ok(()),
        }
    }

    /// The choice, if inputs are left out instead of neurons; `priced` has a layer's costs and thresholds.
    pub(crate) fn input_choice<'a>(self, priced: Option<(&'a [GroupCost; 4], [f32; 4])>) -> Option<InputChoice<'a>> {
        match self {
            Mask::Teal(share) => Some(InputChoice::Teal(share)),
            Mask::Wina(share) => Some(InputChoice::Wina(share)),
            Mask::Inputs(_) => priced.map(|(costs, thresholds)| InputChoice::Priced(costs, thresholds)),
            _ => None,
        }
    }

    /// Whether it asks the predictor.
    pub(crate) fn asks_predictor(self) -> bool {
        matches!(self, Mask::Predicted(_) | Mask::PredictedAlike(_))
    }

    /// Whether it is measured on texts only: it has thresholds of another one, or looks at what comes before in a window.
    pub(crate) fn is_for_texts(self) -> bool {
        matches!(self, Mask::Inputs(_) | Mask::Guessed(..))
    }

    /// Whether it asks the sketch.
    pub(crate) fn asks_sketch(self) -> bool {
        matches!(self, Mask::Graded { .. } | Mask::GradedError(_))
    }

    /// Sets to zero what the mask leaves out of `h [n_tokens, intermediate_size]`, and counts what that lost; of `sketched`, of
    /// the same shape or empty, what it keeps.
    /// `scores`, of the same shape, are the predictor's, the sketch's or a guess's, of which the highest are kept, as many as
    /// `active` says, or the gates' for [`Mask::Cats`]; `down_norm [intermediate_size]`.
    pub(crate) fn apply(
        self,
        h: &mut [f32],
        sketched: &mut [f32],
        down_norm: &[f32],
        scores: Option<&[f32]>,
        active: Option<&LayerActive>,
    ) -> Tally {
        let ffn = down_norm.len();
        let mut sketched: Vec<&mut [f32]> = sketched.chunks_exact_mut(ffn).collect();
        sketched.resize_with(h.len() / ffn, Default::default);
        let rows = h.par_chunks_mut(ffn).zip(sketched).enumerate();
        let tallies: Vec<Tally> = rows
            .map(|(token, (h, sketched))| {
                let weight: Vec<f32> = h.iter().zip(down_norm).map(|(h, d)| h.abs() * d).collect();
                let scores = scores.map(|s| &s[token * ffn..(token + 1) * ffn]);
                let mut kept = Vec::new();
                let n_chosen = match (self, scores) {
                    (Mask::GradedError(error), Some(costs)) => {
                        n_needed(costs, error.powi(2) * energy(sketched, down_norm))
                    }
                    (_, scores) => active.map_or(0, |a| a.n_chosen(scores.unwrap_or_default(), 0)),
                };
                self.choose(h, &weight, scores, n_chosen, &mut kept);
                let tally = compare(&weight, &kept);
                keep(h, &kept);
                if !sketched.is_empty() {
                    kept.iter().for_each(|&i| sketched[i as usize] = 0.0);
                }
                tally
            })
            .collect();
        // Summed in order: a parallel sum would differ in the last digits from run to run.
        tallies.into_iter().fold(Tally::default(), |sum, t| sum + t)
    }

    /// The neurons that are kept of one token, ascending.
    fn choose(self, h: &[f32], weight: &[f32], scores: Option<&[f32]>, n_chosen: usize, kept: &mut Vec<u32>) {
        let n = h.len();
        match self {
            Mask::Dense => kept.extend(0..n as u32),
            Mask::Exact => kept.extend(h.iter().zip(0..).filter(|(h, _)| **h != 0.0).map(|(_, i)| i)),
            Mask::Oracle(share) => top_k(weight, active_count(share, n), kept),
            Mask::OracleH(share) => {
                let magnitude: Vec<f32> = h.iter().map(|h| h.abs()).collect();
                top_k(&magnitude, active_count(share, n), kept);
            }
            Mask::Predicted(_)
            | Mask::PredictedAlike(_)
            | Mask::Graded { .. }
            | Mask::GradedError(_)
            | Mask::Guessed(..) => {
                // As in the runtime: a score that is not a number counts as zero.
                let clean = |s: &f32| if s.is_nan() { 0.0 } else { *s };
                let scores: Vec<f32> = scores.unwrap_or_default().iter().map(clean).collect();
                top_k(&scores, n_chosen, kept);
            }
            Mask::Cats(_) => {
                // Gates that are kept; the others were set to zero.
                kept.extend(scores.unwrap_or(h).iter().zip(0..).filter(|(gate, _)| **gate != 0.0).map(|(_, i)| i));
            }
            Mask::Teal(_) | Mask::Wina(_) | Mask::Inputs(_) => kept.extend(0..n as u32),
        }
    }
}

/// Sets all to zero but `kept`, which is ascending.
pub(crate) fn keep(h: &mut [f32], kept: &[u32]) {
    let mut from = 0;
    for &i in kept {
        h[from..i as usize].fill(0.0);
        from = i as usize + 1;
    }
    h[from..].fill(0.0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oracle_keeps_the_largest_products() {
        let mut h = [1.0, -3.0, 0.0, 2.0, -2.0, 0.5, 0.0, 4.0];
        let tally = Mask::Oracle(0.5).apply(&mut h, &mut [], &[1.0, 1.0, 1.0, 10.0], None, None);
        assert_eq!(h, [0.0, -3.0, 0.0, 2.0, -2.0, 0.0, 0.0, 4.0]);
        let quality = tally.quality(0);
        assert_eq!((quality.recall, quality.computed_share, quality.energy_recall_of_oracle), (1.0, 0.5, 1.0));
        let shares = [(9.0 + 400.0) / (1.0 + 9.0 + 400.0), (4.0 + 1600.0) / (4.0 + 0.25 + 1600.0)];
        assert!((quality.energy_recall - (shares[0] + shares[1]) / 2.0).abs() < 1e-6);
    }

    #[test]
    fn magnitude_alone_ignores_the_norms() {
        let mut h = [1.0, -3.0, 2.0, 0.5];
        Mask::OracleH(0.25).apply(&mut h, &mut [], &[1.0, 1.0, 1.0, 100.0], None, None);
        assert_eq!(h, [0.0, -3.0, 0.0, 0.0]);
    }

    #[test]
    fn exact_changes_nothing_and_counts_zeros() {
        let mut h = [0.0, -0.0, 2.0, -1.0];
        let quality = Mask::Exact.apply(&mut h, &mut [], &[1.0; 4], None, None).quality(0);
        assert_eq!(h, [0.0, 0.0, 2.0, -1.0]);
        assert_eq!((quality.recall, quality.precision, quality.computed_share), (1.0, 1.0, 0.5));
    }

    #[test]
    fn predicted_follows_its_scores() {
        let mut h = [5.0, 1.0, 0.0, 0.0];
        let scores = [f32::NAN, 2.0, 3.0, 0.0];
        let quality = Mask::Predicted(0.5)
            .apply(&mut h, &mut [], &[1.0; 4], Some(&scores), Some(&LayerActive::top(2)))
            .quality(0);
        assert_eq!(h, [0.0, 1.0, 0.0, 0.0]);
        // Of the two neurons that are not zero one was found, and one of the two computed was needed.
        assert_eq!((quality.recall, quality.precision), (0.5, 0.5));
        assert!((quality.energy_recall - 1.0 / 26.0).abs() < 1e-9);
    }
}
