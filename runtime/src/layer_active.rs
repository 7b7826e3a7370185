//! How many neurons of each layer a token computes in sparse mode, and what stands for the others.

use crate::Result;
use crate::predictor::n_active;
use thermocline_split::Split;

/// What sparse mode computes of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerActive {
    /// Neurons: those that the predictor scores highest. At least one.
    pub n_active: usize,
    /// Stands for the neurons that are left out: the mean of what they give, `[hidden_size]`. Empty if it was not measured.
    pub left_out: Vec<f32>,
}

/// What sparse mode computes of each layer so that `share` of all neurons is computed: divided by what the split says that
/// each layer's share costs ([`thermocline_split::Shares`]), alike in all layers where it says nothing.
///
/// # Errors
/// If the split's costs cannot be read.
pub fn layer_active(split: &Split, share: f32) -> Result<Vec<LayerActive>> {
    let config = &split.manifest().config;
    let n_active = |share: f32| n_active(share, config.intermediate_size);
    let Some(shares) = split.shares()? else {
        return Ok(vec![LayerActive { n_active: n_active(share), left_out: Vec::new() }; config.n_layers]);
    };
    let of_layer =
        |(l, share): (usize, f32)| LayerActive { n_active: n_active(share), left_out: shares.left_out(l, share) };
    Ok(shares.allocate(share).into_iter().enumerate().map(of_layer).collect())
}
