//! What it costs to leave out an input of a matrix, measured, so that one price decides for all of them.
//!
//! An input `x_j` that is left out is replaced by its mean `m_j`, which is free: `W m` is a vector that does not change. What
//! that does to the products of the matrices that read it is about `e_j = (x_j - m_j)^2 * sum ||W_j||^2`, and how much
//! of that reaches the output is measured once for each group of matrices with one input: the divergence when the lower
//! half of its inputs are left out, divided by their `e`. So each input has an expected divergence and a number of bytes,
//! and the best choice of inputs for any number of bytes is all whose divergence a byte is above a price: the division between
//! layers, matrices and tokens follows from it.
//!
//! TEAL (arXiv 2408.14690, section 4) thresholds `|x_j|` and divides a block's share greedily among its matrices by
//! their output error; its thresholds and ours are the same where means are zero, columns of one length and costs equal.

use super::Windows;
use super::shares::{advance, divergences};
use crate::Result;
use std::cell::RefCell;
use thermocline_calibrate::dense::{DenseLayer, Embedding, Projection, Sequence};
use thermocline_datasets::{Checkpoint, ModelConfig};

/// Matrices that read the same input.
pub(crate) const GROUPS: [&[Projection]; 4] = [
    &[Projection::Query, Projection::Key, Projection::Value],
    &[Projection::Output],
    &[Projection::Gate, Projection::Up],
    &[Projection::Down],
];

/// The group of a matrix.
pub(crate) fn group_of(projection: Projection) -> usize {
    GROUPS.iter().position(|group| group.contains(&projection)).unwrap_or(0)
}

/// Share of a group's inputs that is left out where its cost is measured.
const LEFT_OUT: f64 = 0.5;

/// Energies of a group's inputs that are kept: enough for shares of a hundredth.
const QUANTILES: usize = 512;

/// One group of one layer.
#[derive(Debug, Clone)]
pub(crate) struct GroupCost {
    /// Of each input, `[n_in]`.
    mean: Vec<f32>,
    /// Sum over the group's matrices of the squared lengths of the columns, `[n_in]`.
    norm_squares: Vec<f32>,
    /// KL divergence for each unit of energy that a token leaves out.
    cost: f64,
    /// What energies an input has, rising.
    energies: Vec<f32>,
}

/// What leaves out a share of a group's inputs.
struct Cut {
    /// Energy from which an input is read.
    threshold: f32,
    /// Energy of those below, in the mean over tokens.
    energy: f64,
}

impl GroupCost {
    /// `e_j` of one input.
    fn energy(&self, j: usize, x: f32) -> f32 {
        (x - self.mean[j]).powi(2) * self.norm_squares[j]
    }

    /// Replaces the inputs `[n_tokens, n_in]` whose energy is below `threshold` by their means, and returns how many are left.
    pub(crate) fn leave_out(&self, inputs: &mut [f32], threshold: f32) -> u64 {
        let mut kept = 0;
        for row in inputs.chunks_exact_mut(self.mean.len()) {
            for (j, x) in row.iter_mut().enumerate() {
                let needed = self.energy(j, *x) >= threshold;
                kept += u64::from(needed);
                if !needed {
                    *x = self.mean[j];
                }
            }
        }
        kept
    }
}

/// The costs of all inputs of a model.
#[derive(Debug, Clone)]
pub struct InputCosts {
    layers: Vec<[GroupCost; 4]>,
}

/// Bytes that one input makes a token read, by group.
pub(crate) type InputBytes = [f64; 4];

impl InputCosts {
    /// A layer's groups.
    pub(crate) fn layer(&self, index: usize) -> Option<&[GroupCost; 4]> {
        self.layers.get(index)
    }

    /// Energies from which inputs are read, `[n_layers, n_groups]`, so that on the text of the costs a `share` of the bytes
    /// is.
    pub(crate) fn thresholds(&self, bytes: InputBytes, share: f64) -> Vec<[f32; 4]> {
        let at = |price: f64| -> Vec<[f32; 4]> {
            let of = |groups: &[GroupCost; 4]| std::array::from_fn(|g| (price * bytes[g] / groups[g].cost) as f32);
            self.layers.iter().map(of).collect()
        };
        // The price's logarithm, by halving: shares fall as it rises.
        let (mut low, mut high) = (-120.0f64, 60.0f64);
        for _ in 0..80 {
            let middle = 0.5 * (low + high);
            if self.share(bytes, &at(middle.exp())) > share { low = middle } else { high = middle }
        }
        at(low.exp())
    }

    /// The share of the bytes that is read at these thresholds.
    fn share(&self, bytes: InputBytes, thresholds: &[[f32; 4]]) -> f64 {
        let (mut read, mut all) = (0.0, 0.0);
        for (groups, thresholds) in self.layers.iter().zip(thresholds) {
            for ((group, threshold), bytes) in groups.iter().zip(thresholds).zip(bytes) {
                let above = group.energies.len() - group.energies.partition_point(|e| e < threshold);
                let of_all = group.mean.len() as f64 * bytes;
                read += of_all * above as f64 / group.energies.len().max(1) as f64;
                all += of_all;
            }
        }
        read / all
    }
}

/// Measures the costs on `windows`. Memory: one layer as f32, and `16 * n_layers * n_tokens * hidden_size` bytes; time:
/// about `2 * n_layers` times the dense model's. `progress(done, total)` counts layers times streams.
///
/// # Errors
/// If a tensor cannot be read, or the outputs are not finite.
pub fn fit_input_costs(
    model: &dyn Checkpoint,
    windows: &Windows<'_>,
    progress: &dyn Fn(usize, usize),
) -> Result<InputCosts> {
    let config = model.config();
    let mut dense = Embedding::load(model)?.rows(windows.tokens())?;
    let mut streams: Vec<Vec<f32>> = Vec::new();
    let mut left_out: Vec<f64> = Vec::new();
    let mut layers: Vec<[GroupCost; 4]> = Vec::with_capacity(config.n_layers);
    let total = config.n_layers + GROUPS.len() * config.n_layers * (config.n_layers + 1) / 2;
    let mut done = 0;
    for index in 0..config.n_layers {
        let layer = DenseLayer::load(model, index)?;
        for stream in &mut streams {
            progress(done, total);
            done += 1;
            advance(&layer, stream, windows.ctx())?;
        }
        let (next, inputs) = observed(&layer, &dense, windows.ctx())?;
        let mut groups = Vec::with_capacity(GROUPS.len());
        for (g, inputs) in inputs.iter().enumerate() {
            progress(done, total);
            done += 1;
            let (group, cut) = GroupCost::new(&layer, g, inputs)?;
            streams.push(through(&layer, &dense, windows.ctx(), |projection, values| {
                if group_of(projection) == g {
                    group.leave_out(values, cut.threshold);
                }
            })?);
            left_out.push(cut.energy);
            groups.push(group);
        }
        done += 1;
        dense = next;
        layers.extend(<[GroupCost; 4]>::try_from(groups).ok());
    }
    progress(total, total);
    let streams: Vec<&[f32]> = streams.iter().map(Vec::as_slice).collect();
    let divergences = divergences(model, windows, &dense, &streams)?;
    for ((group, divergence), energy) in layers.iter_mut().flatten().zip(divergences).zip(left_out) {
        // Rounding can leave nothing of a divergence that is next to nothing.
        group.cost = (f64::from(divergence) / energy).max(f64::MIN_POSITIVE);
    }
    Ok(InputCosts { layers })
}

impl GroupCost {
    /// From the inputs of a text `[n_tokens, n_in]`, without a cost as yet; with what leaves out [`LEFT_OUT`] of them.
    fn new(layer: &DenseLayer, group: usize, inputs: &[f32]) -> Result<(Self, Cut)> {
        let mut norm_squares: Vec<f32> = Vec::new();
        for &projection in GROUPS[group] {
            let norms = layer.column_norms(projection)?;
            norm_squares.resize(norms.len(), 0.0);
            norm_squares.iter_mut().zip(norms).for_each(|(sum, norm)| *sum += norm * norm);
        }
        let n_in = norm_squares.len();
        let n_tokens = (inputs.len() / n_in).max(1);
        let mut sums = vec![0.0f64; n_in];
        for row in inputs.chunks_exact(n_in) {
            sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
        }
        let mean = sums.into_iter().map(|sum| (sum / n_tokens as f64) as f32).collect();
        let mut this = Self { mean, norm_squares, cost: 0.0, energies: Vec::new() };
        let mut energies: Vec<f32> = inputs.iter().enumerate().map(|(i, &x)| this.energy(i % n_in, x)).collect();
        energies.sort_unstable_by(f32::total_cmp);
        let left_out = (LEFT_OUT * energies.len() as f64) as usize;
        let energy: f64 = energies[..left_out].iter().map(|&e| f64::from(e)).sum();
        let energy = (energy / n_tokens as f64).max(f64::MIN_POSITIVE);
        this.energies = (0..QUANTILES).map(|q| energies[(2 * q + 1) * energies.len() / (2 * QUANTILES)]).collect();
        Ok((this, Cut { threshold: energies[left_out], energy }))
    }
}

/// The stream behind a layer whose matrices read what `change` leaves of their inputs, `[n_tokens, hidden_size]`.
fn through(layer: &DenseLayer, x: &[f32], ctx: usize, change: impl Fn(Projection, &mut [f32])) -> Result<Vec<f32>> {
    let mut next = Vec::with_capacity(x.len());
    for window in x.chunks_exact(ctx * layer.hidden_size()) {
        next.extend(layer.changed(window, &Sequence::plain(ctx), &change)?);
    }
    Ok(next)
}

/// The stream behind a layer, and what each group read, `[n_tokens, n_in]`.
fn observed(layer: &DenseLayer, x: &[f32], ctx: usize) -> Result<(Vec<f32>, [Vec<f32>; 4])> {
    let inputs = RefCell::new(<[Vec<f32>; 4]>::default());
    let next = through(layer, x, ctx, |projection, values| {
        let group = group_of(projection);
        if GROUPS[group][0] == projection {
            inputs.borrow_mut()[group].extend_from_slice(values);
        }
    })?;
    Ok((next, inputs.into_inner()))
}

/// Weights that one input of each group meets.
pub(crate) fn weights_of_input(config: &ModelConfig) -> [usize; 4] {
    let attention = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim;
    [attention, config.hidden_size, 2 * config.intermediate_size, config.hidden_size]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(mean: [f32; 2], norm_squares: [f32; 2], cost: f64, energies: Vec<f32>) -> GroupCost {
        GroupCost { mean: mean.to_vec(), norm_squares: norm_squares.to_vec(), cost, energies }
    }

    #[test]
    fn inputs_near_their_means_are_replaced_by_them() {
        let group = group([1.0, -1.0], [4.0, 1.0], 1.0, Vec::new());
        let mut inputs = [1.4, -3.0, 3.0, -1.5];
        // Energies 0.64, 4, 16, 0.25.
        assert_eq!(group.leave_out(&mut inputs, 1.0), 2);
        assert_eq!(inputs, [1.0, -3.0, 3.0, -1.0]);
    }

    #[test]
    fn one_price_reads_the_share_asked_for_and_spares_what_is_cheap() {
        let energies = || (1..=100).map(|e| e as f32).collect::<Vec<_>>();
        let of = |cost| group([0.0; 2], [1.0; 2], cost, energies());
        let costs = InputCosts { layers: vec![[of(1.0), of(4.0), of(1.0), of(1.0)]] };
        let bytes = [1.0, 1.0, 2.0, 1.0];
        for share in [0.25, 0.5, 0.9] {
            let thresholds = costs.thresholds(bytes, share);
            assert!((costs.share(bytes, &thresholds) - share).abs() < 0.02, "{share}");
            let [plain, dear, large, _] = thresholds[0];
            assert!((plain / dear - 4.0).abs() < 1e-3, "four times the cost: read from a quarter of the energy on");
            assert!((large / plain - 2.0).abs() < 1e-3, "twice the bytes: read from twice the energy on");
        }
    }
}
