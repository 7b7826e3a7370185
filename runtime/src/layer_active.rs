//! How many neurons of each layer a token computes in sparse mode, and what stands for the others.

use crate::Result;
use crate::predictor::n_active;
use thermocline_datasets::ModelConfig;
use thermocline_split::Split;

/// What sparse mode computes of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerActive {
    /// Neurons: those that the predictor scores highest. At least one.
    pub n_active: usize,
    /// Stands for the neurons that are left out: the mean of what they give, `[hidden_size]`. Empty if it was not measured.
    pub left_out: Vec<f32>,
}

impl LayerActive {
    /// What `share` of the neurons is in each layer where all layers compute the same, and no mean stands for the others.
    pub fn alike(config: &ModelConfig, share: f32) -> Vec<Self> {
        Self::behind(config, 0, share)
    }

    /// The same where every token computes the first `n_always` neurons of each layer: `share` is that of the others.
    pub fn behind(config: &ModelConfig, n_always: usize, share: f32) -> Vec<Self> {
        let n_others = config.intermediate_size - n_always;
        let n_active = n_always + if n_others > 0 { n_active(share, n_others) } else { 0 };
        vec![Self { n_active, left_out: Vec::new() }; config.n_layers]
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
        LayerActive { n_active, left_out: shares.left_out(l, share) }
    };
    Ok(shares.allocate(share).into_iter().enumerate().map(of_layer).collect())
}
