//! What a mask costs: perplexity, KL divergence from the dense model, recall.
//!
//! | concept | where |
//! | --- | --- |
//! | which neurons are computed | [`Mask`] |
//! | the text, cut in windows | [`Windows`] |
//! | all masks at once, through the dense forward | [`evaluate`] |
//! | the same figure through the token engine, one token at a time | [`evaluate_decode`] |
//! | what planes of the weights buy | [`evaluate_planes`] |
//! | what each layer's share of the neurons costs | [`fit_shares`] |
//! | what they cost together | [`measure_curve`], [`measure_graded_curves`] |
//! | what graded precision chooses by | [`fit_graded`] |
//! | what each input of a matrix costs | [`fit_input_costs`] |
//! | which rows of a neuron are read, where not all are | [`RowsRead`] |
//! | other ways to guess which neurons a token needs | [`Guesser`], [`fit_guesses`] |
//! | what comes out | [`Evaluation`], [`LayerQuality`] |
//! | zero-shot tasks under the same masks | [`tasks`] |
//!
//! Masks apply at **every** position, as if each had been decoded; a run computes its prompt densely, so it is at
//! least this good. ([`tasks`] can leave the prompt dense: [`Positions`].) Each mask has its own residual stream: errors of
//! early layers reach later ones, and recall is measured on the states that the masked model really sees.

mod batch;
mod bootstrap;
mod bytes;
mod choosers;
mod curve;
mod decode;
mod graded_thresholds;
mod guess;
mod input_costs;
mod inputs;
mod likelihood;
mod mask;
mod masked_layer;
mod planes;
mod rows;
mod shares;
pub mod tasks;
mod windows;

pub use batch::{evaluate, evaluate_against};
pub use curve::{fit_graded, fit_windows, measure_curve, measure_graded_curves};
pub use decode::evaluate_decode;
pub use guess::{GuessFit, Guesser, fit_guesses};
pub use input_costs::{InputCosts, fit_input_costs};
pub use mask::{Mask, active_count};
pub use planes::{bits_per_weight, evaluate_planes};
pub use rows::RowsRead;
pub use shares::fit_shares;
pub use tasks::{Positions, TaskFile, TaskKind, TaskResult, evaluate_task, read_task};
pub use thermocline_runtime::quality::LayerQuality;
pub use windows::Windows;

use crate::{Error, Result};
use likelihood::TokenScores;
use serde::{Deserialize, Serialize};
use thermocline_runtime::quality::Tally;
use thermocline_split::GradedThresholds;

/// What one mask did to a model on a text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// `dense`, `exact`, `oracle`, `oracle-h`, `predicted`, `predicted-alike`, `graded`, `graded-alike`,
    /// `graded-error`, `cats`, `teal`, `wina`, `inputs`, or the name of a [`Guesser`].
    pub mask: String,
    /// Planes of the weights, where these are what is compared: `base`, `plus`, `exact`, `plus@SHARE`, `exact@SHARE`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub planes: Option<String>,
    /// Share of each layer's neurons that the mask keeps, where it has one; of `inputs`, and of `graded` where it chooses rows, the
    /// share of the bytes that it was fitted to.
    pub active: Option<f64>,
    /// Share of each layer's neurons that a graded mask keeps at every token, in which case `active` is that of the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub always: Option<f64>,
    /// `batch` (dense forward, mask applied to all positions) or `decode` (token engine).
    pub engine: String,
    /// `exp` of the mean cross-entropy of tokens 2..ctx of each window.
    pub perplexity: f64,
    /// 95 % interval from a bootstrap over blocks of 64 neighbouring tokens: how much this text may mislead.
    pub perplexity_ci95: [f64; 2],
    /// The same with all neurons.
    pub perplexity_dense: Option<f64>,
    /// `perplexity / perplexity_dense`.
    pub perplexity_ratio: Option<f64>,
    /// 95 % interval of the ratio, from the same blocks for both: much narrower than the perplexities' own.
    pub perplexity_ratio_ci95: Option<[f64; 2]>,
    /// Mean over positions of KL(dense || masked), in nats per token.
    pub kl: Option<f64>,
    /// Share of positions where the likeliest token is the dense model's.
    pub top1_agreement: Option<f64>,
    /// Mean over layers of [`LayerQuality::recall`].
    pub recall: Option<f64>,
    /// Mean over layers of [`LayerQuality::precision`].
    pub precision: Option<f64>,
    /// Mean over layers of [`LayerQuality::energy_recall`].
    pub energy_recall: Option<f64>,
    /// Mean over layers of [`LayerQuality::energy_recall_of_oracle`].
    pub energy_recall_of_oracle: Option<f64>,
    /// Share of all neurons that were computed; of their bytes, where rows were chosen.
    pub computed_share: Option<f64>,
    /// Bytes of the layers' weights and predictors that a token reads, relative to all of the layers' weights, of the model that it was
    /// compared with. Of an oracle: as if it cost nothing to ask. `None` where it depends on what is zero, or is not counted here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_share: Option<f64>,
    /// Bytes of the predictors, sketches or guesses that the mask asks, relative to the same; `None` of masks that ask none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predictor_bytes_share: Option<f64>,
    /// Multiply-adds that asking the predictors or guesses of all layers takes a token; `None` of masks that ask none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predictor_multiply_adds: Option<f64>,
    /// What of the neurons' rows was read, where they were chosen one by one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows_read: Option<RowsRead>,
    /// Tokens whose probability was taken: windows * (ctx - 1).
    pub tokens: usize,
    /// Layer by layer; empty if the engine does not tell.
    pub layers: Vec<LayerQuality>,
    /// Cross-entropy of each of the tokens, in nats.
    #[serde(skip)]
    pub losses: Vec<f32>,
}

/// What masks know from another text than the one they are evaluated on.
#[derive(Debug, Clone, Default)]
pub struct Fitted {
    /// For [`Mask::Inputs`].
    pub inputs: Option<InputCosts>,
    /// For [`Mask::Graded`], in place of those of the split.
    pub graded: Option<GradedThresholds>,
    /// For [`Mask::Guessed`].
    pub guesses: Option<GuessFit>,
}

impl Fitted {
    /// Refuses masks that need what is not there.
    fn check(&self, masks: &[Mask]) -> Result<()> {
        let lacks = |mask: &&Mask| match mask {
            Mask::Inputs(_) => self.inputs.is_none(),
            Mask::Guessed(guesser, share) => {
                guesser.is_fitted() && !self.guesses.as_ref().is_some_and(|fit| fit.serves(*guesser, *share))
            }
            _ => false,
        };
        let Some(mask) = masks.iter().find(lacks) else { return Ok(()) };
        let what = if matches!(mask, Mask::Inputs(_)) { "they cost" } else { "the layers read" };
        let name = mask.name();
        let reason = format!("{name} needs to know what {what}: give --fit-text a text, better not the one of --text");
        Err(Error::Setting { flag: "--mask", reason })
    }
}

impl Evaluation {
    /// Puts the scores of one mask together with those of the dense model.
    fn new(
        mask: Mask,
        windows: &Windows<'_>,
        scores: TokenScores,
        dense: Option<&[f32]>,
        tally: &[Tally],
    ) -> Result<Self> {
        if let Some(position) = scores.losses.iter().position(|l| !l.is_finite()) {
            return Err(Error::NotFinite { mask: mask.name(), position });
        }
        let summary = bootstrap::summarise(windows, &scores.losses, dense);
        let layers: Vec<LayerQuality> = tally.iter().enumerate().map(|(layer, t)| t.quality(layer)).collect();
        let mean = |of: fn(&LayerQuality) -> f64| {
            (!layers.is_empty()).then(|| layers.iter().map(of).sum::<f64>() / layers.len() as f64)
        };
        let n = scores.losses.len().max(1) as f64;
        Ok(Evaluation {
            mask: mask.name().to_owned(),
            planes: None,
            active: mask.active(),
            always: Some(mask.always()).filter(|share| *share > 0.0),
            engine: "batch".to_owned(),
            perplexity: summary.perplexity,
            perplexity_ci95: summary.ci95,
            perplexity_dense: summary.dense,
            perplexity_ratio: summary.dense.map(|dense| summary.perplexity / dense),
            perplexity_ratio_ci95: summary.ratio_ci95,
            kl: dense.map(|_| scores.kl_sum / n),
            top1_agreement: dense.map(|_| scores.agreed as f64 / n),
            recall: mean(|l| l.recall),
            precision: mean(|l| l.precision),
            energy_recall: mean(|l| l.energy_recall),
            energy_recall_of_oracle: mean(|l| l.energy_recall_of_oracle),
            computed_share: mean(|l| l.computed_share),
            bytes_share: None,
            predictor_bytes_share: None,
            predictor_multiply_adds: None,
            rows_read: None,
            tokens: scores.losses.len(),
            layers,
            losses: scores.losses,
        })
    }
}
