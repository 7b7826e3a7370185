//! What guesses know from another text, in one dense pass over it.

use super::mixture::fit_factor;
use super::{Guesser, StoredLowRank};
use crate::eval::batch::check_masks;
use crate::eval::{Mask, Windows, active_count};
use crate::{Error, Result};
use rayon::prelude::*;
use thermocline_calibrate::dense::{DenseLayer, Embedding};
use thermocline_calibrate::predictor::{Training, TwoLayer, train_two_layer};
use thermocline_datasets::Checkpoint;
use thermocline_runtime::top_k;
use thermocline_split::{Feedback, Split};

/// Tokens on which factors of mixtures are tried.
const FACTOR_TOKENS: usize = 2048;

/// What was found, layer by layer.
#[derive(Debug, Clone)]
pub struct GuessFit {
    layers: Vec<LayerFit>,
}

/// Of one layer.
#[derive(Debug, Clone, Default)]
pub(super) struct LayerFit {
    /// For copies.
    pub feedback: Option<Feedback>,
    /// By share.
    pub trained: Vec<(f64, TwoLayer)>,
    /// By share: how much of the position before is added to the predictor's scores.
    pub factors: Vec<(f64, f32)>,
}

impl GuessFit {
    /// Of layer `index`.
    pub(super) fn layer(&self, index: usize) -> Option<&LayerFit> {
        self.layers.get(index)
    }

    /// Whether it has what `guesser` needs at this share.
    pub(crate) fn serves(&self, guesser: Guesser, share: f64) -> bool {
        self.layers.iter().all(|layer| match guesser {
            Guesser::Copies(_) => layer.feedback.is_some(),
            Guesser::Trained => of_share(&layer.trained, share).is_some(),
            Guesser::LowRankAndPrevious => of_share(&layer.factors, share).is_some(),
            _ => true,
        })
    }
}

/// What was fitted to this share.
pub(super) fn of_share<T>(fitted: &[(f64, T)], share: f64) -> Option<&T> {
    fitted.iter().find(|(of, _)| *of == share).map(|(_, fitted)| fitted)
}

/// Fits what those of `masks` need that guess, on `windows`, in one dense pass. Memory: one layer as f32, for each token the residual
/// stream, and one layer's inputs and activations, `4 * n_tokens * (2 * hidden_size + intermediate_size)` bytes, and for copies
/// `4 * n_layers * hidden_size^2` more. `progress(done, total)` counts layers.
///
/// # Errors
/// If a mask needs a split and there is none, a tensor cannot be read, or something is not finite.
pub fn fit_guesses(
    model: &dyn Checkpoint,
    split: Option<&Split>,
    windows: &Windows<'_>,
    masks: &[Mask],
    progress: &dyn Fn(usize, usize),
) -> Result<GuessFit> {
    check_masks(masks, split)?;
    let asked: Vec<(Guesser, f64)> = masks
        .iter()
        .filter_map(|mask| if let Mask::Guessed(guesser, share) = *mask { Some((guesser, share)) } else { None })
        .collect();
    let n_layers = model.config().n_layers;
    let mut x = Embedding::load(model)?.rows(windows.tokens())?;
    let mut layers = Vec::with_capacity(n_layers);
    for index in 0..n_layers {
        progress(index, n_layers);
        let layer = DenseLayer::load(model, index)?;
        let seen = advance(&layer, &mut x, windows.ctx())?;
        layers.push(seen.fit(&layer, split.map(|split| (split, index)), &asked)?);
    }
    progress(n_layers, n_layers);
    Ok(GuessFit { layers })
}

/// A layer's part of the dense pass.
struct Dense {
    /// Normalised, `[n_tokens, hidden_size]`.
    inputs: Vec<f32>,
    /// |h| * ||d||, `[n_tokens, intermediate_size]`.
    given: Vec<f32>,
    ctx: usize,
}

/// Takes `x` through `layer`, with all neurons.
fn advance(layer: &DenseLayer, x: &mut [f32], ctx: usize) -> Result<Dense> {
    let down_norm = layer.down_norms()?;
    let (mut inputs, mut given) = (Vec::with_capacity(x.len()), Vec::new());
    for window in x.chunks_exact_mut(ctx * layer.hidden_size()) {
        let mut next = layer.attention(window, 1, ctx)?;
        let input = layer.ffn_input(&next)?;
        let h = layer.neurons(&input)?.h;
        inputs.extend(input);
        given.extend(h.chunks_exact(down_norm.len()).flat_map(|h| h.iter().zip(&down_norm).map(|(h, d)| h.abs() * d)));
        layer.ffn_output(&mut next, h)?;
        window.copy_from_slice(&next);
    }
    Ok(Dense { inputs, given, ctx })
}

impl Dense {
    fn fit(&self, layer: &DenseLayer, split: Option<(&Split, usize)>, asked: &[(Guesser, f64)]) -> Result<LayerFit> {
        let (hidden, ffn) = (layer.hidden_size(), layer.intermediate_size());
        let mut fit = LayerFit::default();
        if asked.iter().any(|(guesser, _)| matches!(guesser, Guesser::Copies(_))) {
            fit.feedback = Some(Feedback::of_inputs(&self.inputs, hidden)?);
        }
        if !asked.iter().any(|(guesser, _)| guesser.is_fitted_to_share()) {
            return Ok(fit);
        }
        let Some((split, index)) = split else { return Err(needs_split()) };
        let predictor = StoredLowRank::load(split, index)?;
        for &(guesser, share) in asked {
            if guesser == Guesser::Trained && of_share(&fit.trained, share).is_none() {
                let set_size = active_count(share, ffn);
                let sets = (&self.top_sets(ffn, set_size)[..], set_size);
                let first = &predictor.low_rank.b;
                let network = train_two_layer(&self.inputs, sets, first, (hidden, ffn), Training::default())?;
                fit.trained.push((share, network));
            }
            if guesser == Guesser::LowRankAndPrevious && of_share(&fit.factors, share).is_none() {
                let n = (self.inputs.len() / hidden).min(FACTOR_TOKENS);
                let scores = predictor.scores(layer, &self.inputs[..n * hidden])?;
                fit.factors.push((share, fit_factor(&scores, &self.given[..n * ffn], (ffn, self.ctx), share)));
            }
        }
        Ok(fit)
    }

    /// The `set_size` neurons that give most at each token, `[n_tokens, set_size]`.
    fn top_sets(&self, intermediate_size: usize, set_size: usize) -> Vec<u32> {
        let sets = self.given.par_chunks(intermediate_size).flat_map_iter(|given| {
            let mut set = Vec::with_capacity(set_size + 1);
            top_k(given, set_size, &mut set);
            set
        });
        sets.collect()
    }
}

/// Of a guess that asks a split's predictor.
pub(super) fn needs_split() -> Error {
    let reason = "this guess asks the predictor or the rates of a split; -m names a checkpoint".to_owned();
    Error::Setting { flag: "--mask", reason }
}
