//! What each layer's share of the neurons costs, measured: one layer at a time computes a share, all others everything.

use super::Windows;
use super::likelihood::{TokenScores, add, positions_at_once};
use super::mask::keep;
use crate::Result;
use rayon::prelude::*;
use thermocline_calibrate::dense::{DenseLayer, Embedding, Head};
use thermocline_datasets::Checkpoint;
use thermocline_runtime::top_k;
use thermocline_split::{LayerCost, Shares, Split};

/// Shares that are measured. Between them losses are taken to be straight lines, which they are not: they fall fastest where
/// they are largest, so points are closer there.
const GRID: [f32; 5] = [0.05, 0.1, 0.2, 0.35, 0.6];

/// The head is the largest matrix of a small model: one position in so many is compared.
const EVERY: usize = 4;

/// The residual stream after one layer computed a share, `[n_tokens, hidden_size]`.
struct Stream {
    x: Vec<f32>,
    left_out: Vec<f32>,
}

/// Measures what shares of `split`'s layers cost on `windows`; `model` is the same split, seen as a dense model. What the
/// neurons that are left out give in the mean stands for them. Memory: one layer as f32, and
/// `20 * n_layers * n_tokens * hidden_size` bytes; time: about `2.5 * n_layers` times the dense model's on these windows.
/// `progress(done, total)` counts layers times streams.
///
/// # Errors
/// If a tensor or a predictor cannot be read, or the outputs are not finite.
pub fn fit_shares(
    model: &dyn Checkpoint,
    split: &Split,
    windows: &Windows<'_>,
    progress: &dyn Fn(usize, usize),
) -> Result<Shares> {
    let config = model.config();
    let n_layers = config.n_layers;
    let mut dense = Embedding::load(model)?.rows(windows.tokens())?;
    let mut streams: Vec<Stream> = Vec::with_capacity(n_layers * GRID.len());
    let total = n_layers + GRID.len() * n_layers * (n_layers + 1) / 2;
    let mut done = 0;
    for index in 0..n_layers {
        let layer = DenseLayer::load(model, index)?;
        for stream in &mut streams {
            progress(done, total);
            done += 1;
            advance(&layer, &mut stream.x, windows.ctx())?;
        }
        let (predictor, norms) = split.predictor(index)?;
        progress(done, total);
        done += 1 + GRID.len();
        streams.extend(one_layer(&layer, &mut dense, windows.ctx(), |input| {
            Ok(predictor.scores(input, layer.activation(), &norms)?)
        })?);
    }
    progress(total, total);
    let computed: Vec<&[f32]> = streams.iter().map(|s| s.x.as_slice()).collect();
    let losses = divergences(model, windows, &dense, &computed)?;
    let layers = streams.chunks_exact(GRID.len()).zip(losses.chunks_exact(GRID.len())).map(|(streams, losses)| {
        LayerCost { loss: losses.to_vec(), left_out: streams.iter().flat_map(|s| s.left_out.iter().copied()).collect() }
    });
    Ok(Shares::new(GRID.to_vec(), layers.collect(), config.hidden_size)?)
}

/// Takes `x` through `layer`, with all neurons.
pub(super) fn advance(layer: &DenseLayer, x: &mut [f32], ctx: usize) -> Result<()> {
    for window in x.chunks_exact_mut(ctx * layer.hidden_size()) {
        let mut next = layer.attention(window, 1, ctx)?;
        let h = layer.neurons(&layer.ffn_input(&next)?)?.h;
        layer.ffn_output(&mut next, h)?;
        window.copy_from_slice(&next);
    }
    Ok(())
}

/// Takes the dense stream `x` through `layer`, and returns what it would be with each of the shares there.
fn one_layer(
    layer: &DenseLayer,
    x: &mut [f32],
    ctx: usize,
    scores: impl Fn(&[f32]) -> Result<Vec<f32>>,
) -> Result<Vec<Stream>> {
    let (hidden, ffn, n_tokens) = (layer.hidden_size(), layer.intermediate_size(), x.len() / layer.hidden_size());
    let mut outputs = vec![Vec::with_capacity(x.len()); GRID.len()];
    let mut left_out = vec![vec![0.0f64; ffn]; GRID.len()];
    for window in x.chunks_exact_mut(ctx * hidden) {
        let attended = layer.attention(window, 1, ctx)?;
        let input = layer.ffn_input(&attended)?;
        let h = layer.neurons(&input)?.h;
        let scores = scores(&input)?;
        for ((share, output), left_out) in GRID.into_iter().zip(&mut outputs).zip(&mut left_out) {
            let mut kept = h.clone();
            let k = super::active_count(f64::from(share), ffn);
            kept.par_chunks_mut(ffn).zip(scores.par_chunks(ffn)).for_each(|(h, scores)| {
                let mut best = Vec::new();
                top_k(scores, k, &mut best);
                keep(h, &best);
            });
            for (h, kept) in h.chunks_exact(ffn).zip(kept.chunks_exact(ffn)) {
                left_out.iter_mut().zip(h.iter().zip(kept)).for_each(|(sum, (h, kept))| *sum += f64::from(h - kept));
            }
            let mut next = attended.clone();
            layer.ffn_output(&mut next, kept)?;
            output.extend(next);
        }
        let mut next = attended;
        layer.ffn_output(&mut next, h)?;
        window.copy_from_slice(&next);
    }
    let stream = |(mut x, h): (Vec<f32>, Vec<f64>)| {
        let mut left_out = vec![0.0; hidden];
        layer.ffn_output(&mut left_out, h.into_iter().map(|h| (h / n_tokens as f64) as f32).collect())?;
        x.chunks_exact_mut(hidden).for_each(|x| x.iter_mut().zip(&left_out).for_each(|(x, mean)| *x += mean));
        Ok(Stream { x, left_out })
    };
    outputs.into_iter().zip(left_out).map(stream).collect()
}

/// Mean KL divergence of each stream `[n_tokens, hidden_size]` from `dense`, in nats a token.
pub(super) fn divergences(
    model: &dyn Checkpoint,
    windows: &Windows<'_>,
    dense: &[f32],
    streams: &[&[f32]],
) -> Result<Vec<f32>> {
    let (head, hidden) = (Head::load(model)?, model.config().hidden_size);
    let positions: Vec<usize> = (0..windows.tokens().len()).step_by(EVERY).collect();
    let mut scores = vec![TokenScores::default(); streams.len()];
    for positions in positions.chunks(positions_at_once(head.vocab_size())) {
        let rows = |x: &[f32]| positions.iter().flat_map(|p| &x[p * hidden..][..hidden]).copied().collect::<Vec<_>>();
        let targets: Vec<Option<u32>> = positions.iter().map(|&p| windows.next(p)).collect();
        let reference = head.logits(&rows(dense))?;
        for (stream, scores) in streams.iter().zip(&mut scores) {
            add(scores, &reference, &head.logits(&rows(stream))?, head.vocab_size(), &targets);
        }
    }
    Ok(scores.iter().map(|s| (s.kl_sum / s.losses.len().max(1) as f64) as f32).collect())
}
