//! From which expected error neurons are computed in graded precision, or single rows of them read: one threshold for all layers and
//! tokens, relative to the residual stream behind the layer.
//!
//! The same error counts for more where the residual stream is small, so a layer's price is one over the mean square of the stream
//! behind it, that of the median token, because few tokens are a thousand times larger than the others.
//!
//! Rows are chosen in models whose neurons all fire. Where most are zero, a neuron is worth all its rows or none.
//! What a sketch says of its products' errors is true of the text that it was rounded for, and too little elsewhere, where that
//! text was short: the errors that are made on the fitted text correct it, by one factor for gate and one for up in each layer.

use super::Windows;
use super::choosers::SketchedLayer;
use crate::{Error, Result};
use rayon::prelude::*;
use thermocline_calibrate::dense::{DenseLayer, Embedding};
use thermocline_datasets::{Activation, Checkpoint};
use thermocline_runtime::always_neurons;
use thermocline_split::{GradedThresholds, Sketch, Split};

/// Costs are counted in so many bins of an octave, from 2^-40 to 2^40: a threshold is exact to 0.4 %, and a count within a bin.
const BINS_OF_OCTAVE: f32 = 256.0;
const OCTAVES: f32 = 40.0;
const BINS: usize = (2.0 * OCTAVES * BINS_OF_OCTAVE) as usize;

/// Measures on `windows`, in one dense pass, the thresholds that leave each of the shares `active` of the neurons that are not always
/// computed, where each of the shares `always` is; of their rows, unless the activation is zero for most. Memory: one layer and its
/// sketch as f32, `4 * n_tokens * (hidden_size + 5 * intermediate_size)` bytes. `progress(done, total)` counts layers.
///
/// # Errors
/// If the split has no sketches, a tensor cannot be read, or the residual stream is not finite.
pub(crate) fn fit_graded_thresholds(
    model: &dyn Checkpoint,
    split: &Split,
    windows: &Windows<'_>,
    (always, active): (&[f64], &[f64]),
    progress: &dyn Fn(usize, usize),
) -> Result<GradedThresholds> {
    let config = model.config();
    let of_rows = !config.activation.is_sparse();
    let first: Vec<usize> = always.iter().map(|&a| always_neurons(a as f32, config.intermediate_size)).collect();
    let mut x = Embedding::load(model)?.rows(windows.tokens())?;
    // By how many of `first` a neuron is behind.
    let mut counts = vec![vec![0u64; BINS]; first.len()];
    let mut residual_rms = Vec::with_capacity(config.n_layers);
    let mut error_factors = Vec::with_capacity(config.n_layers);
    for index in 0..config.n_layers {
        progress(index, config.n_layers);
        let layer = DenseLayer::load(model, index)?;
        let sketch = SketchedLayer::load(split, index, false)?.ok_or_else(|| {
            let reason = format!("layer {index} has no sketch: make the split with --sketch");
            Error::Setting { flag: "--fit-shares", reason }
        })?;
        let mut products: [Vec<f32>; 2] = Default::default();
        let mut made = [0.0f64; 2];
        for window in x.chunks_exact_mut(windows.ctx() * layer.hidden_size()) {
            let mut next = layer.attention(window, 1, windows.ctx())?;
            let input = layer.ffn_input(&next)?;
            let (sketched, exact) = (sketch.pre_activations(&input)?, layer.pre_activations(&input)?);
            for part in 0..2 {
                let errors = exact[part].iter().zip(&sketched[part]).map(|(e, s)| f64::from(e - s).powi(2));
                made[part] += errors.sum::<f64>();
            }
            let [gate, up] = exact;
            let h = gate.iter().zip(&up).map(|(&gate, &up)| config.activation.apply(gate, up)).collect();
            layer.ffn_output(&mut next, h)?;
            products.iter_mut().zip(sketched).for_each(|(all, of_window)| all.extend(of_window));
            window.copy_from_slice(&next);
        }
        let price = price(&x, layer.hidden_size()).ok_or(Error::NotFinite { mask: "dense", position: 0 })?;
        let rms = 1.0 / price.sqrt();
        let told = sketch.known([1.0; 2]);
        let factors = if of_rows { corrected(&told, made, windows.tokens().len()) } else { [1.0; 2] };
        let known = told.with_errors_times(factors);
        let rule = Rule { known: &known, activation: config.activation, of_rows, whole: sketch.is_whole() };
        let behind: Vec<usize> =
            sketch.places().iter().map(|&place| first.partition_point(|&n| n <= place as usize) - 1).collect();
        let n = behind.len();
        let tokens = products[0].par_chunks(n).zip(products[1].par_chunks(n));
        let costs: Vec<[f32; 3]> = tokens
            .flat_map_iter(|(g, u)| g.iter().zip(u).enumerate().map(|(i, (g, u))| rule.costs(i, *g, *u)))
            .collect();
        for costs in costs.chunks_exact(n) {
            for (costs, &segment) in costs.iter().zip(&behind) {
                costs.iter().for_each(|cost| counts[segment][bin(cost / rms)] += 1);
            }
        }
        residual_rms.push(rms);
        error_factors.push(factors);
    }
    progress(config.n_layers, config.n_layers);
    // What is behind more of them is behind fewer, too.
    for segment in (1..counts.len()).rev() {
        let (before, from) = counts.split_at_mut(segment);
        before[segment - 1].iter_mut().zip(&from[0]).for_each(|(sum, n)| *sum += n);
    }
    let thresholds = counts.iter().flat_map(|counts| active.iter().map(|&share| threshold(counts, share))).collect();
    let [always, active] = [always, active].map(|shares| shares.iter().map(|&s| s as f32).collect());
    let thresholds = GradedThresholds::new(residual_rms, always, active, thresholds)?;
    Ok(if of_rows { thresholds.of_rows(error_factors)? } else { thresholds })
}

/// What thresholds of a layer are for.
struct Rule<'a> {
    known: &'a Sketch,
    activation: Activation,
    of_rows: bool,
    /// Whether rows are never read alone.
    whole: bool,
}

impl Rule<'_> {
    /// What leaving the gate, the up and the down row of neuron `i` to its sketch costs; where they are not chosen alone, three times
    /// what decides.
    fn costs(&self, i: usize, gate: f32, up: f32) -> [f32; 3] {
        if !self.of_rows {
            return [self.known.judge(self.activation, i, gate, up).0; 3];
        }
        let costs = self.known.row_costs(self.activation, i, gate, up).map(f32::sqrt);
        if self.whole { [costs.into_iter().fold(0.0, f32::max); 3] } else { costs }
    }
}

/// How many times the errors of gate and up products are what a layer's sketch says, by the squares of those that were `made` in so many
/// tokens.
fn corrected(told: &Sketch, made: [f64; 2], n_tokens: usize) -> [f32; 2] {
    let of = |sds: &[f32], made: f64| {
        let told = n_tokens as f64 * sds.iter().map(|sd| f64::from(*sd).powi(2)).sum::<f64>();
        let factor = (made / told).sqrt() as f32;
        // Of products that are no numbers, or have no errors, nothing is learnt.
        if factor.is_finite() && factor > 0.0 { factor } else { 1.0 }
    };
    [of(&told.gate_sd, made[0]), of(&told.up_sd, made[1])]
}

/// One over the mean square of the median token of `x [n_tokens, hidden_size]`, if that is a number.
fn price(x: &[f32], hidden_size: usize) -> Option<f32> {
    let square = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>() / hidden_size as f32;
    let mut squares: Vec<f32> = x.chunks_exact(hidden_size).map(square).collect();
    squares.sort_unstable_by(f32::total_cmp);
    let price = 1.0 / squares.get(squares.len() / 2)?;
    (price.is_finite() && price > 0.0).then_some(price)
}

fn bin(cost: f32) -> usize {
    // 0 is far below all bins; what is no number, too.
    ((cost.log2() + OCTAVES) * BINS_OF_OCTAVE).clamp(0.0, (BINS - 1) as f32) as usize
}

/// The lower end of the bin down to which about this share is counted.
fn threshold(counts: &[u64], share: f64) -> f32 {
    let wanted = share * counts.iter().sum::<u64>() as f64;
    let mut n = 0.0;
    let mut at = BINS - 1;
    while at > 0 {
        n += counts[at] as f64;
        if n >= wanted {
            break;
        }
        at -= 1;
    }
    (at as f32 / BINS_OF_OCTAVE - OCTAVES).exp2()
}

#[cfg(test)]
mod tests {
    use super::*;
    use thermocline_datasets::Random;

    #[test]
    fn a_threshold_leaves_the_share_that_was_asked_for() {
        let mut random = Random::new(3);
        let costs: Vec<f32> = (0..200_000).map(|_| (4.0 * random.normal()).exp()).collect();
        let mut counts = vec![0; BINS];
        costs.iter().for_each(|cost| counts[bin(*cost)] += 1);
        for share in [0.02, 0.1, 0.3, 0.7] {
            let least = threshold(&counts, share);
            let left = costs.iter().filter(|cost| **cost > least).count() as f64 / costs.len() as f64;
            assert!((left - share).abs() < 0.003, "{share}: {left}");
        }
        // Zeros are never worth computing, and nothing is below the lowest bin.
        assert_eq!((bin(0.0), bin(f32::NAN), bin(f32::INFINITY)), (0, 0, BINS - 1));
        assert!(threshold(&[vec![5], vec![0; BINS - 1]].concat(), 0.5) > 0.0);
    }

    #[test]
    fn errors_are_those_of_the_text() {
        let told = Sketch { gate_sd: vec![1.0, 3.0], up_sd: vec![2.0, 0.0], ..Sketch::default() };
        // Of four tokens: thrice the gates' errors, half the ups'.
        let factors = corrected(&told, [4.0 * 9.0 * 10.0, 4.0 * 0.25 * 4.0], 4);
        assert!((factors[0] - 3.0).abs() < 1e-6 && (factors[1] - 0.5).abs() < 1e-6, "{factors:?}");
        assert_eq!(corrected(&told, [f64::NAN, 0.0], 4), [1.0; 2]);
        assert_eq!(corrected(&Sketch::default(), [1.0, 1.0], 4), [1.0; 2]);
    }

    #[test]
    fn a_price_is_that_of_the_median_token() {
        let x = [1.0, 1.0, 2.0, 0.0, 100.0, 100.0];
        assert_eq!(price(&x, 2), Some(0.5));
        assert_eq!((price(&[0.0; 4], 2), price(&[f32::NAN; 4], 2), price(&[], 2)), (None, None, None));
    }
}
