//! How many neurons of each layer a token computes in sparse mode, and what stands for the others.

use crate::Result;
use crate::predictor::n_active;
use thermocline_datasets::ModelConfig;
use thermocline_split::{GradedThresholds, Split};

/// What sparse mode computes of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerActive {
    /// Neurons: those that the predictor scores highest. At least one.
    pub n_active: usize,
    /// In graded precision: what costs more than this is read in place of so many neurons.
    pub least_cost: Option<LeastCost>,
    /// Stands for the neurons that are left out: the mean of what they give, `[hidden_size]`. Empty if it was not measured.
    pub left_out: Vec<f32>,
}

/// A cost, as a length in a layer's output.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LeastCost {
    /// From which a neuron is computed, whole ([`thermocline_split::Sketch::judge`]).
    OfNeuron(f32),
    /// From which a row of a neuron is read ([`thermocline_split::Sketch::rows_to_read`]).
    OfRow {
        /// The cost.
        least: f32,
        /// How many times the errors of gate and up products are what the sketch says.
        error_factors: [f32; 2],
    },
}

impl LayerActive {
    /// So many neurons, and nothing for the others.
    pub fn top(n_active: usize) -> Self {
        Self { n_active, least_cost: None, left_out: Vec::new() }
    }

    /// What `share` of the neurons is in each layer where all layers compute the same, and no mean stands for the others.
    pub fn alike(config: &ModelConfig, share: f32) -> Vec<Self> {
        Self::behind(config, 0, share)
    }

    /// The same where every token computes the first `n_always` neurons of each layer: `share` is that of the others.
    pub fn behind(config: &ModelConfig, n_always: usize, share: f32) -> Vec<Self> {
        let n_others = config.intermediate_size - n_always;
        let n_active = n_always + if n_others > 0 { n_active(share, n_others) } else { 0 };
        vec![Self::top(n_active); config.n_layers]
    }

    /// The same by a split's thresholds, where there are any and not all is computed.
    pub fn graded(
        config: &ModelConfig,
        n_always: usize,
        share: f32,
        thresholds: Option<&GradedThresholds>,
    ) -> Vec<Self> {
        let mut layers = Self::behind(config, n_always, share);
        let always = n_always as f32 / config.intermediate_size as f32;
        let Some(thresholds) = thresholds else { return layers };
        for (l, least) in thresholds.layers(always, share).into_iter().flatten().enumerate() {
            layers[l].least_cost = Some(match thresholds.error_factors() {
                Some(of_layers) => LeastCost::OfRow { least, error_factors: of_layers[l] },
                None => LeastCost::OfNeuron(least),
            });
        }
        layers
    }

    /// How many of a token's `scores`, of those that are chosen among behind the first `n_always`, belong to the active ones. Where
    /// rows are chosen, scores are the rows to read.
    pub fn n_chosen(&self, scores: &[f32], n_always: usize) -> usize {
        match self.least_cost {
            Some(LeastCost::OfNeuron(least)) => scores.iter().filter(|score| **score > least).count(),
            Some(LeastCost::OfRow { .. }) => scores.iter().filter(|rows| **rows > 0.0).count(),
            None => self.n_active.saturating_sub(n_always),
        }
    }

    /// The cost from which a row is read, and how many times the errors of gate and up products are what the sketch says, where
    /// rows are chosen.
    pub fn of_rows(&self) -> Option<(f32, [f32; 2])> {
        match self.least_cost {
            Some(LeastCost::OfRow { least, error_factors }) => Some((least, error_factors)),
            _ => None,
        }
    }
}

/// What sparse mode computes of each layer so that `share` of all neurons is computed: divided by what the split says that
/// each layer's share costs ([`thermocline_split::Shares`]), alike in all layers where it says nothing.
///
/// # Errors
/// If the split's costs cannot be read.
pub fn layer_active(split: &Split, share: f32) -> Result<Vec<LayerActive>> {
    let config = &split.manifest().config;
    let Some(shares) = split.shares()? else { return Ok(LayerActive::alike(config, share)) };
    let of_layer = |(l, share): (usize, f32)| {
        let n_active = n_active(share, config.intermediate_size);
        LayerActive { left_out: shares.left_out(l, share), ..LayerActive::top(n_active) }
    };
    Ok(shares.allocate(share).into_iter().enumerate().map(of_layer).collect())
}
