//! From which expected error neurons are computed in graded precision: one threshold for all layers and tokens, relative to the
//! residual stream behind the layer ([`super::rows`] has the reasoning, for single rows).

use super::Windows;
use super::choosers::SketchedLayer;
use super::rows::price;
use crate::{Error, Result};
use thermocline_calibrate::dense::{DenseLayer, Embedding};
use thermocline_datasets::Checkpoint;
use thermocline_runtime::always_neurons;
use thermocline_split::{GradedThresholds, Split};

/// Costs are counted in so many bins of an octave, from 2^-40 to 2^40: a threshold is exact to 0.4 %, and a count within a bin.
const BINS_OF_OCTAVE: f32 = 256.0;
const OCTAVES: f32 = 40.0;
const BINS: usize = (2.0 * OCTAVES * BINS_OF_OCTAVE) as usize;

/// Measures on `windows`, in one dense pass, the thresholds that leave each of the shares `active` of the neurons that are not always
/// computed, where each of the shares `always` is. Memory: one layer and its sketch as f32, `4 * n_tokens * (hidden_size +
/// intermediate_size)` bytes. `progress(done, total)` counts layers.
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
    let first: Vec<usize> = always.iter().map(|&a| always_neurons(a as f32, config.intermediate_size)).collect();
    let mut x = Embedding::load(model)?.rows(windows.tokens())?;
    // By how many of `first` a neuron is behind.
    let mut counts = vec![vec![0u64; BINS]; first.len()];
    let mut residual_rms = Vec::with_capacity(config.n_layers);
    for index in 0..config.n_layers {
        progress(index, config.n_layers);
        let layer = DenseLayer::load(model, index)?;
        let sketch = SketchedLayer::load(split, index)?.ok_or_else(|| {
            let reason = format!("layer {index} has no sketch: make the split with --sketch");
            Error::Setting { flag: "--fit-shares", reason }
        })?;
        let mut costs = Vec::with_capacity(windows.tokens().len() * layer.intermediate_size());
        for window in x.chunks_exact_mut(windows.ctx() * layer.hidden_size()) {
            let mut next = layer.attention(window, 1, windows.ctx())?;
            let input = layer.ffn_input(&next)?;
            costs.extend(sketch.look(&input, 0)?.scores);
            layer.ffn_output(&mut next, layer.neurons(&input)?.h)?;
            window.copy_from_slice(&next);
        }
        let price = price(&x, layer.hidden_size()).ok_or(Error::NotFinite { mask: "dense", position: 0 })?;
        let rms = 1.0 / price.sqrt();
        let behind: Vec<usize> =
            sketch.places().iter().map(|&place| first.partition_point(|&n| n <= place as usize) - 1).collect();
        for costs in costs.chunks_exact(behind.len()) {
            costs.iter().zip(&behind).for_each(|(cost, &segment)| counts[segment][bin(cost / rms)] += 1);
        }
        residual_rms.push(rms);
    }
    progress(config.n_layers, config.n_layers);
    // What is behind more of them is behind fewer, too.
    for segment in (1..counts.len()).rev() {
        let (before, from) = counts.split_at_mut(segment);
        before[segment - 1].iter_mut().zip(&from[0]).for_each(|(sum, n)| *sum += n);
    }
    let thresholds = counts.iter().flat_map(|counts| active.iter().map(|&share| threshold(counts, share))).collect();
    let [always, active] = [always, active].map(|shares| shares.iter().map(|&s| s as f32).collect());
    Ok(GradedThresholds::new(residual_rms, always, active, thresholds)?)
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
}
