//! Ways to guess which neurons a token needs, to be compared: each chooses the same share of every layer, and nothing stands for
//! the others, so that only the choice differs.
//!
//! | guess | where |
//! | --- | --- |
//! | what one is, and what it costs | [`Guess`], [`Cost`] |
//! | signs of gate and up rows, copies of them in 1 to 3 bits | `copies` |
//! | what the token before needed | `previous` |
//! | the split's predictor, one or two layers early | `ahead` |
//! | a network of two layers, trained | `trained` |
//! | the split's predictor and the token before | `mixture` |
//! | what some of them know from another text | [`GuessFit`], [`fit_guesses`] |

mod ahead;
mod copies;
mod fit;
mod forward;
mod load;
mod mixture;
mod previous;
mod trained;

pub use fit::{GuessFit, fit_guesses};
pub(crate) use forward::Guessed;
pub(crate) use load::Guesses;

use crate::Result;
use std::ops::AddAssign;
use thermocline_calibrate::dense::DenseLayer;
use thermocline_calibrate::predictor::LowRank;
use thermocline_split::CopyBits;

/// A way to guess.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Guesser {
    /// The signs of gate and up rows, each row times the mean magnitude of its weights.
    Signs,
    /// Copies of gate and up rows, rounded with feedback in the metric of the inputs.
    Copies(CopyBits),
    /// What the neurons gave at the position before. A run does not know that of neurons that it left out, so it is a bound.
    Previous,
    /// The split's predictor, fed with what the layer before read.
    AheadByOne,
    /// The same with what two layers before read.
    AheadByTwo,
    /// A network of two layers, trained to name the top share.
    Trained,
    /// The split's predictor, and a part of what the neurons gave at the position before: a bound, as [`Guesser::Previous`].
    LowRankAndPrevious,
}

impl Guesser {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Guesser::Signs => "signs",
            Guesser::Copies(CopyBits::One) => "copies-1",
            Guesser::Copies(CopyBits::Two) => "copies-2",
            Guesser::Copies(CopyBits::Three) => "copies-3",
            Guesser::Previous => "previous",
            Guesser::AheadByOne => "ahead-1",
            Guesser::AheadByTwo => "ahead-2",
            Guesser::Trained => "trained",
            Guesser::LowRankAndPrevious => "low-rank+previous",
        }
    }

    /// Whether it asks what only a split has: its predictor, of which a trained one takes rank and start, or its rates.
    pub(crate) fn needs_split(self) -> bool {
        !matches!(self, Guesser::Signs | Guesser::Copies(_))
    }

    /// Whether it knows something from another text.
    pub fn is_fitted(self) -> bool {
        matches!(self, Guesser::Copies(_) | Guesser::Trained | Guesser::LowRankAndPrevious)
    }

    /// Whether that depends on the share.
    fn is_fitted_to_share(self) -> bool {
        matches!(self, Guesser::Trained | Guesser::LowRankAndPrevious)
    }

    /// How many layers before it looks at.
    fn looks_back(self) -> usize {
        match self {
            Guesser::AheadByOne => 1,
            Guesser::AheadByTwo => 2,
            _ => 0,
        }
    }
}

/// What asking a guess takes a token.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Cost {
    pub bytes: f64,
    pub multiply_adds: f64,
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.multiply_adds += other.multiply_adds;
    }
}

/// What there is to guess from: a window of the masked model.
pub(crate) struct Seen<'a> {
    /// For its norm.
    pub layer: &'a DenseLayer,
    /// The layer's normalised input, `[n_tokens, hidden_size]`.
    pub input: &'a [f32],
    /// The residual stream that layers before normalised for their neurons, the last one first, of the same shape; as many as there
    /// are, and as the guess looks at.
    pub earlier: &'a [&'a [f32]],
    /// What every neuron gives, |h| * ||d||, `[n_tokens, intermediate_size]`: of positions before a token's own.
    pub given: &'a [f32],
}

/// A guess of one layer.
pub(crate) trait Guess {
    /// What neurons are chosen by, `[n_tokens, intermediate_size]`: of a token those with the largest scores, which are not negative.
    fn scores(&self, seen: &Seen<'_>) -> Result<Vec<f32>>;

    /// What asking takes.
    fn cost(&self) -> Cost;
}

/// The split's predictor of a layer, as guesses ask it.
struct StoredLowRank {
    low_rank: LowRank,
    /// `[intermediate_size]`.
    down_norm: Vec<f32>,
    cost: Cost,
}

impl StoredLowRank {
    fn load(split: &thermocline_split::Split, index: usize) -> Result<Self> {
        let stored = split.stored_predictor(index)?;
        let bytes = stored.input.bytes + stored.factors.bytes + 4 * stored.neurons.len() as u64;
        let (low_rank, down_norm) = split.predictor(index)?;
        let cost = Cost { bytes: bytes as f64, multiply_adds: low_rank.multiply_adds() as f64 };
        Ok(Self { low_rank, down_norm, cost })
    }

    fn scores(&self, layer: &DenseLayer, input: &[f32]) -> Result<Vec<f32>> {
        Ok(self.low_rank.scores(input, layer.activation(), &self.down_norm)?)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use thermocline_datasets::write::{TinyModel, write_tiny_safetensors};
    use thermocline_datasets::{Random, open_checkpoint};

    /// The layers of a model of random weights.
    pub(super) fn layers(n: usize) -> Vec<DenseLayer> {
        let dir = tempfile::tempdir().unwrap();
        let model = TinyModel { n_layers: n, ..TinyModel::default() };
        write_tiny_safetensors(&dir.path().join("model"), &model, 5).unwrap();
        let checkpoint = open_checkpoint(&dir.path().join("model")).unwrap();
        (0..n).map(|index| DenseLayer::load(checkpoint.as_ref(), index).unwrap()).collect()
    }

    pub(super) fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut random = Random::new(seed);
        (0..n).map(|_| random.normal()).collect()
    }

    pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    /// Equal but for what the order of sums does.
    pub(super) fn assert_near(got: &[f32], want: &[f32]) {
        assert_eq!(got.len(), want.len());
        let largest = want.iter().fold(0.0f32, |max, v| max.max(v.abs()));
        assert!(largest > 0.0);
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            assert!((got - want).abs() <= 1e-4 * largest, "{i}: {got}, wanted {want}");
        }
    }

    /// A predictor of random numbers for this layer.
    pub(super) fn stored(layer: &DenseLayer, rank: usize) -> StoredLowRank {
        let (hidden, ffn) = (layer.hidden_size(), layer.intermediate_size());
        let low_rank = LowRank {
            rank,
            hidden_size: hidden,
            intermediate_size: ffn,
            b: noise(rank * hidden, 1),
            a_gate: noise(ffn * rank, 2),
            a_up: noise(ffn * rank, 3),
            gate_residual: vec![0.5; ffn],
            up_residual: vec![0.25; ffn],
        };
        let cost = Cost { bytes: 1000.0, multiply_adds: low_rank.multiply_adds() as f64 };
        StoredLowRank { low_rank, down_norm: layer.down_norms().unwrap(), cost }
    }
}
