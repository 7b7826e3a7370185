use super::{HOT_SHARE, PlantedModel, Statistics};
use serde::{Deserialize, Serialize};

/// `planted.json` of a planted split: what was asked for, and what its bytes give.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlantedReport {
    /// The model's name.
    pub model: String,
    /// The seed of everything random.
    pub seed: u64,
    /// Tokens; the one after token t is t + 1, and after the last comes the first.
    pub vocab_size: usize,
    /// The first token of the second domain.
    pub border: usize,
    /// The share of the neurons that `hot_cover` speaks of.
    pub hot_share: f64,
    /// What was asked for.
    pub planted: Statistics,
    /// What the trace and the stored predictors give, all layers together.
    pub measured: Measured,
}

/// Statistics of the trace in a planted split, and of its predictors at tokens of the trace.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// Consecutive tokens of the trace, from token 0.
    pub trace_tokens: usize,
    /// Mean share of neurons that fire.
    pub active_share: f64,
    /// Standard deviation over tokens of one layer's share, mean over layers.
    pub active_share_sd: f64,
    /// Share of all activations that belong to the hottest neurons.
    pub hot_cover: f64,
    /// Share of a token's active neurons that were active in one of the last 1, 4, 16 tokens.
    pub reuse: [f64; 3],
    /// How much more often two neurons of one cluster fire together than by chance; `null` without clusters.
    pub coactivation_inside: Option<f64>,
    /// The same for two neurons of different clusters.
    pub coactivation_outside: f64,
    /// Tokens at which predictors were asked.
    pub predictor_tokens: usize,
    /// Share of the active neurons that are among the predicted, if as many are predicted as are active in the mean.
    pub predictor_recall: f64,
    /// The same for what is predicted one layer early; `None` in splits from before that could be chosen.
    #[serde(default)]
    pub foresight_recall: Option<f64>,
}

impl PlantedReport {
    /// Puts a model's settings and what was measured together.
    pub fn new(model: &PlantedModel, measured: Measured) -> Self {
        Self {
            model: model.name(),
            seed: model.seed,
            vocab_size: model.shape.vocab_size,
            border: model.border(),
            hot_share: HOT_SHARE,
            planted: model.statistics,
            measured,
        }
    }
}
