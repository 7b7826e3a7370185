//! Which rows of a neuron are worth reading, one by one, where a sketch stands for those that are not.
//!
//! Reading a row spares an expected squared error of the layer's output ([`Sketch::up_row_error`] and its like). What that is worth
//! differs between layers: the same error counts for more where the residual stream is small, so a layer's price is one over the
//! mean square of the stream behind it, that of the median token, because few tokens are a thousand times larger than the
//! others. A row is read if its error times its layer's price reaches one threshold for all layers, tokens and kinds of rows,
//! which is fitted on a text: there it leaves the share of the rows that was asked for.
//!
//! What a sketch says of its products' errors is true of the text that it was rounded for, and too little elsewhere, where that
//! text was short: the errors that are made on the fitted text correct it, by one factor for gate and one for up in each layer.

use super::batch::check_masks;
use super::choosers::SketchedLayer;
use super::{Mask, Windows};
use crate::{Error, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use thermocline_calibrate::dense::{DenseLayer, Embedding};
use thermocline_datasets::{Activation, Checkpoint, Random};
use thermocline_split::{Sketch, Split};

/// Neurons at tokens that the threshold is fitted on, drawn from all: their share is within a thousandth of the whole text's.
const SAMPLES: usize = 1 << 20;

/// What of the neurons' rows was read, and by which threshold.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RowsRead {
    /// Share of the gate rows.
    pub gate: f64,
    /// Share of the up rows.
    pub up: f64,
    /// Share of the down rows.
    pub down: f64,
    /// Share of the bytes of all rows, which are of one length.
    pub bytes: f64,
    /// Squared error from which a row is read, relative to the mean square of the residual stream behind its layer.
    pub threshold: f64,
}

impl RowsRead {
    /// From the gate, up and down rows that were read, of `n_neurons` each.
    pub(crate) fn new(read: [u64; 3], n_neurons: u64, threshold: f32) -> Self {
        let [gate, up, down] = read.map(|n| n as f64 / n_neurons.max(1) as f64);
        Self { gate, up, down, bytes: (gate + up + down) / 3.0, threshold: threshold.into() }
    }
}

/// The activation of neuron `i` from those of its products that are worth reading, `sketched` or `exact` (gate and up each), and which
/// of its rows (gate, up, down) are: those that spare a squared error of `least` or more. Up comes first, because the gate row's
/// error depends on it.
#[inline]
pub(crate) fn choose(
    sketch: &Sketch,
    activation: Activation,
    i: usize,
    sketched: [f32; 2],
    exact: [f32; 2],
    least: f32,
) -> (f32, [bool; 3]) {
    let up_is_read = sketch.up_row_error(activation, i, sketched[0], sketched[1]) >= least;
    let up = if up_is_read { exact[1] } else { sketched[1] };
    let gate_is_read = sketch.gate_row_error(activation, i, sketched[0], up, up_is_read) >= least;
    let gate = if gate_is_read { exact[0] } else { sketched[0] };
    let h = activation.apply(gate, up);
    (h, [gate_is_read, up_is_read, sketch.down_row_error(i, h) >= least])
}

/// A neuron at a token.
#[derive(Debug, Clone, Copy)]
struct Sample {
    layer: u32,
    neuron: u32,
    /// Its gate and up products, by its sketch and by its rows.
    sketched: [f32; 2],
    exact: [f32; 2],
}

/// What the rows of a model's layers are worth, and what there is to choose from.
#[derive(Debug, Clone)]
pub struct RowPrices {
    activation: Activation,
    /// What a squared error costs, by layer.
    prices: Vec<f32>,
    /// Each layer's sketch, of which the rows are left out, with standard deviations that are true of the text.
    sketches: Vec<Sketch>,
    samples: Vec<Sample>,
}

impl RowPrices {
    /// The threshold by which a `share` of the rows is read on the text of the prices.
    pub(crate) fn threshold(&self, share: f64) -> f32 {
        if share >= 1.0 {
            return 0.0;
        }
        // Its logarithm, by halving: shares fall as it rises.
        let (mut low, mut high) = (-80.0f32, 80.0f32);
        for _ in 0..40 {
            let middle = 0.5 * (low + high);
            if self.share(middle.exp()) > share { low = middle } else { high = middle }
        }
        high.exp()
    }

    /// What is known of the neurons of layer `index`, and the squared error from which a row of it is read.
    pub(crate) fn layer(&self, index: usize, threshold: f32) -> Option<(&Sketch, f32)> {
        self.sketches.get(index).zip(self.prices.get(index)).map(|(sketch, price)| (sketch, threshold / price))
    }

    /// The share of the rows that is read at this threshold.
    fn share(&self, threshold: f32) -> f64 {
        let read = |s: &Sample| {
            let Some((sketch, least)) = self.layer(s.layer as usize, threshold) else { return 0 };
            let (_, read) = choose(sketch, self.activation, s.neuron as usize, s.sketched, s.exact, least);
            read.into_iter().filter(|&read| read).count()
        };
        self.samples.par_iter().map(read).sum::<usize>() as f64 / (3 * self.samples.len()).max(1) as f64
    }
}

/// Measures prices on `windows`, in one dense pass. Memory: one layer and its sketch as f32, one window's activations,
/// `4 * n_tokens * hidden_size` bytes and about 24 MiB. `progress(done, total)` counts layers.
///
/// # Errors
/// If `split` has no sketches, a tensor cannot be read, or the residual stream is not finite.
pub fn fit_row_prices(
    model: &dyn Checkpoint,
    split: Option<&Split>,
    windows: &Windows<'_>,
    progress: &dyn Fn(usize, usize),
) -> Result<RowPrices> {
    check_masks(&[Mask::GradedRows(1.0)], split)?;
    let config = model.config();
    let mut x = Embedding::load(model)?.rows(windows.tokens())?;
    let mut fitted =
        RowPrices { activation: config.activation, prices: Vec::new(), sketches: Vec::new(), samples: Vec::new() };
    let of_window = SAMPLES.div_ceil(config.n_layers * windows.len());
    let mut random = Random::new(0);
    for index in 0..config.n_layers {
        progress(index, config.n_layers);
        let layer = DenseLayer::load(model, index)?;
        let sketch = split.map(|split| SketchedLayer::load(split, index)).transpose()?.flatten();
        let sketch = sketch.ok_or_else(|| {
            let reason = format!("graded-rows needs a sketch of every layer, and layer {index} has none");
            Error::Setting { flag: "--mask", reason }
        })?;
        let (ffn, first) = (layer.intermediate_size(), fitted.samples.len());
        for window in x.chunks_exact_mut(windows.ctx() * layer.hidden_size()) {
            let mut next = layer.attention(window, 1, windows.ctx())?;
            let input = layer.ffn_input(&next)?;
            let (sketched, exact) = (sketch.pre_activations(&input)?, layer.pre_activations(&input)?);
            fitted.samples.extend((0..of_window).map(|_| {
                let at = random.below(exact[0].len());
                let [sketched, exact] = [&sketched, &exact].map(|products| [products[0][at], products[1][at]]);
                Sample { layer: index as u32, neuron: (at % ffn) as u32, sketched, exact }
            }));
            let [gate, up] = exact;
            let h = gate.iter().zip(&up).map(|(&gate, &up)| config.activation.apply(gate, up)).collect();
            layer.ffn_output(&mut next, h)?;
            window.copy_from_slice(&next);
        }
        fitted.prices.push(price(&x, layer.hidden_size()).ok_or(Error::NotFinite { mask: "dense", position: 0 })?);
        fitted.sketches.push(measured(sketch.without_rows(), &fitted.samples[first..]));
    }
    progress(config.n_layers, config.n_layers);
    Ok(fitted)
}

/// `sketch` with standard deviations of gate and up that are right in the mean square over `samples` of its layer.
fn measured(mut sketch: Sketch, samples: &[Sample]) -> Sketch {
    for (part, sds) in [&mut sketch.gate_sd, &mut sketch.up_sd].into_iter().enumerate() {
        let (mut told, mut made) = (0.0f64, 0.0f64);
        for s in samples {
            told += f64::from(sds[s.neuron as usize]).powi(2);
            made += f64::from(s.exact[part] - s.sketched[part]).powi(2);
        }
        let factor = (made / told).sqrt() as f32;
        // Of a product that is no number nothing is learnt.
        if factor.is_finite() {
            sds.iter_mut().for_each(|sd| *sd *= factor);
        }
    }
    sketch
}

/// One over the mean square of the median token of `x [n_tokens, hidden_size]`, if that is a number.
pub(super) fn price(x: &[f32], hidden_size: usize) -> Option<f32> {
    let square = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>() / hidden_size as f32;
    let mut squares: Vec<f32> = x.chunks_exact(hidden_size).map(square).collect();
    squares.sort_unstable_by(f32::total_cmp);
    let price = 1.0 / squares.get(squares.len() / 2)?;
    (price.is_finite() && price > 0.0).then_some(price)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of two layers, the second of which has errors of thrice the length and a ninth of the price.
    fn prices(n: usize) -> RowPrices {
        let mut random = Random::new(7);
        let mut values = |scale: f32| -> Vec<f32> { (0..n).map(|_| scale * (0.1 + random.uniform())).collect() };
        let first = Sketch {
            gate_sd: values(0.3),
            up_sd: values(0.2),
            down_norm: values(1.0),
            down_error: values(0.3),
            ..Sketch::default()
        };
        let thrice = |v: &[f32]| v.iter().map(|v| 3.0 * v).collect();
        let second =
            Sketch { down_norm: thrice(&first.down_norm), down_error: thrice(&first.down_error), ..first.clone() };
        let mut samples = Vec::new();
        for i in 0..2 * n {
            let exact = [random.normal(), random.normal()];
            let sketched = exact.map(|v| v + 0.2 * random.normal());
            samples.push(Sample { layer: (i / n) as u32, neuron: (i % n) as u32, sketched, exact });
        }
        RowPrices { activation: Activation::Silu, prices: vec![1.0, 1.0 / 9.0], sketches: vec![first, second], samples }
    }

    /// The formulas written out once more, in f64 and for SiLU alone.
    #[test]
    fn rows_are_read_where_their_scores_reach_the_threshold() {
        let prices = prices(500);
        let mut n_read = [0; 3];
        for s in &prices.samples {
            let (sketch, i) = (&prices.sketches[s.layer as usize], s.neuron as usize);
            let [gate_sd, up_sd, norm, error] = [&sketch.gate_sd, &sketch.up_sd, &sketch.down_norm, &sketch.down_error]
                .map(|values| f64::from(values[i]));
            let ([g, u], [exact_g, exact_u]) = (s.sketched.map(f64::from), s.exact.map(f64::from));
            let sigma = 1.0 / (1.0 + (-g).exp());
            let (v, k) = (g * sigma, sigma * (1.0 + g * (1.0 - sigma)));
            let least = 0.002;
            let up_score = (v * up_sd * norm).powi(2);
            let up_is_read = up_score >= least;
            let up_square = if up_is_read { exact_u.powi(2) } else { u * u + up_sd * up_sd };
            let gate_score = (k * gate_sd * norm).powi(2) * up_square;
            let gate = if gate_score >= least { exact_g } else { g };
            let h = gate / (1.0 + (-gate).exp()) * if up_is_read { exact_u } else { u };
            let scores = [gate_score, up_score, (h * error).powi(2)];
            let (got, read) = choose(sketch, Activation::Silu, i, s.sketched, s.exact, least as f32);
            // The vector code's exponential is within 3e-5: scores that are that near decide nothing here.
            if scores.iter().all(|score| (score / least - 1.0).abs() > 1e-3) {
                assert_eq!(read, scores.map(|score| score >= least), "{s:?}");
                assert!((f64::from(got) - h).abs() < 1e-4 * (1.0 + h.abs()), "{got} {h}");
            }
            n_read.iter_mut().zip(read).for_each(|(n, read)| *n += usize::from(read));
        }
        assert!(n_read.iter().all(|n| (100..900).contains(n)), "{n_read:?}");
    }

    /// Against counting every row at that threshold and just below it.
    #[test]
    fn the_threshold_leaves_the_share_asked_for() {
        let prices = prices(500);
        let counted = |threshold: f32| {
            let mut read = 0;
            for s in &prices.samples {
                let least = threshold / prices.prices[s.layer as usize];
                let sketch = &prices.sketches[s.layer as usize];
                let (_, rows) = choose(sketch, Activation::Silu, s.neuron as usize, s.sketched, s.exact, least);
                read += rows.into_iter().map(usize::from).sum::<usize>();
            }
            read as f64 / (3 * prices.samples.len()) as f64
        };
        for share in [0.05, 0.3, 0.8] {
            let threshold = prices.threshold(share);
            assert!(counted(threshold) <= share && counted(0.99 * threshold) > share - 0.01, "{share}: {threshold}");
            assert!((counted(threshold) - share).abs() < 0.002, "{share}: {}", counted(threshold));
        }
        assert_eq!((prices.threshold(1.0), counted(0.0)), (0.0, 1.0));
        // What an error is worth decides, not its length: both layers read about as much.
        let of_layer = |layer: u32| {
            let mut one = prices.clone();
            one.samples.retain(|s| s.layer == layer);
            one.share(prices.threshold(0.3))
        };
        assert!((of_layer(0) - of_layer(1)).abs() < 0.05, "{} {}", of_layer(0), of_layer(1));
    }

    #[test]
    fn errors_are_those_of_the_text() {
        let sketch = prices(2).sketches[0].clone();
        let sample = |neuron: usize, made: f32| Sample {
            layer: 0,
            neuron: neuron as u32,
            sketched: [0.0; 2],
            exact: [made * sketch.gate_sd[neuron], 0.5 * sketch.up_sd[neuron]],
        };
        let found = measured(sketch.clone(), &[sample(0, 3.0), sample(1, -3.0)]);
        for i in 0..2 {
            assert!((found.gate_sd[i] / sketch.gate_sd[i] - 3.0).abs() < 1e-5);
            assert!((found.up_sd[i] / sketch.up_sd[i] - 0.5).abs() < 1e-5);
        }
        assert_eq!(measured(sketch.clone(), &[sample(0, f32::NAN)]).gate_sd, sketch.gate_sd);
        assert_eq!(measured(sketch.clone(), &[]), sketch);
    }

    /// A product that is no number says nothing, so its row is read, and the neuron is exact.
    #[test]
    fn what_nothing_is_known_of_is_read() {
        let sketch = &prices(4).sketches[0];
        for sketched in [[f32::NAN, 1.0], [1.0, f32::NAN], [f32::INFINITY, 1.0], [1.0, f32::NEG_INFINITY]] {
            for activation in [Activation::Silu, Activation::Relu, Activation::Drelu] {
                let (h, [gate, up, _]) = choose(sketch, activation, 0, sketched, [0.5, 2.0], 1e6);
                assert!(h.is_finite(), "{activation:?} {sketched:?}: {h}");
                assert!(gate || sketched[0].is_finite());
                assert!(up || sketched[1].is_finite());
            }
        }
    }

    #[test]
    fn a_price_is_that_of_the_median_token() {
        let x = [1.0, 1.0, 2.0, 0.0, 100.0, 100.0];
        assert_eq!(price(&x, 2), Some(0.5));
        assert_eq!((price(&[0.0; 4], 2), price(&[f32::NAN; 4], 2), price(&[], 2)), (None, None, None));
    }
}
