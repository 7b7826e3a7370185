//! Audits: how good sparse mode's choice of neurons is on the text at hand, told while it runs.
//!
//! Of an audited token the layers' inputs, choices and outputs are kept. When the token is done, every neuron of every layer is
//! computed from that same input, with the kernels that the run uses, and the choice is compared with the best one of its
//! size. A neuron of which any row is read counts as computed. Nothing of it reaches the run: not the residual stream, not the
//! cache, not the account. Neurons on disk pass through the buffers that the run has for them.

use crate::chooser::{Chooser, SketchedLayer};
use crate::fetch::Fetcher;
use crate::ffn::{FfnSums, Span};
use crate::layer_ffn::LayerFfn;
use crate::matrix::Compute;
use crate::plan::Mode;
use crate::quality::{LayerQuality, Tally, compare};
use crate::row_choice::{LeftToSketch, RowChoice};
use crate::{Error, Result};
use serde::Serialize;
use std::borrow::Cow;
use std::sync::PoisonError;
use std::time::{Duration, Instant};
use thermocline_datasets::ModelConfig;
use thermocline_kernels::{Encoding, Kernels, LayerLayout, Pool};
use thermocline_split::ALL_ROWS;

/// What audits found. Means are over layers, and in each layer over the audited tokens; `null` if no token was audited.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AuditReport {
    /// The first decoded token was audited, and every one so many tokens after it.
    pub every: usize,
    /// Tokens that were audited.
    pub tokens: u64,
    /// What audits took; part of no other time.
    pub seconds: f64,
    /// Mean of [`LayerQuality::recall`].
    pub recall: Option<f64>,
    /// Mean of [`LayerQuality::precision`].
    pub precision: Option<f64>,
    /// Mean of [`LayerQuality::energy_recall`].
    pub energy_recall: Option<f64>,
    /// Mean of [`LayerQuality::energy_recall_of_oracle`].
    pub energy_recall_of_oracle: Option<f64>,
    /// `1 - energy_recall`.
    pub lost_energy: Option<f64>,
    /// Mean of [`LayerAudit::output_error`].
    pub output_error: Option<f64>,
    /// Layer by layer; empty if no token was audited.
    pub layers: Vec<LayerAudit>,
}

/// What audits found of one layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerAudit {
    /// How good the choice was.
    #[serde(flatten)]
    pub quality: LayerQuality,
    /// `1 - energy_recall`.
    pub lost_energy: f64,
    /// Mean over tokens of `||y_all - y|| / ||y_all||`, where `y_all` is the sum over all neurons and `y` what the run added in
    /// its place, the mean of the neurons left out included if the split has it. Where `y_all` is zero: 0 if `y` is, else 1.
    pub output_error: f64,
}

/// Refuses audits, one in `every` tokens (0: none), where there is nothing to audit.
///
/// # Errors
/// [`Error::Setting`] in exact mode.
pub fn check_audit(every: usize, mode: Mode) -> Result<()> {
    if every == 0 || mode != Mode::Exact {
        return Ok(());
    }
    let reason = "exact mode leaves out only neurons that are zero, so there is nothing to audit; add --mode sparse, or give \
                  --audit-every 0";
    Err(Error::Setting { flag: "--audit-every", reason: reason.to_owned() })
}

/// Where an audit finds the neurons of all layers.
pub(crate) trait AllNeurons {
    /// How the bundles of layer `l` are laid out.
    fn layout(&self, l: usize) -> &LayerLayout;
    /// Shows `see` every bundle of layer `l`, in order and in pieces: where the bundles of a piece lie, its first neuron, its
    /// bytes.
    ///
    /// # Errors
    /// If they cannot be read.
    fn for_all(&self, l: usize, see: &mut dyn FnMut(&LayerLayout, usize, &[u8])) -> Result<()>;
    /// The sketch of layer `l`, which there must be where bundles are residuals.
    ///
    /// # Errors
    /// If it cannot be read.
    fn sketch(&self, l: usize) -> Result<Option<Cow<'_, SketchedLayer>>>;
}

/// Those of the CPU engine.
pub(crate) struct InMemoryAndOnDisk<'a> {
    pub layers: &'a [LayerFfn],
    pub choosers: &'a [Chooser],
    pub fetcher: Option<&'a Fetcher>,
}

impl AllNeurons for InMemoryAndOnDisk<'_> {
    fn layout(&self, l: usize) -> &LayerLayout {
        self.layers[l].layout()
    }

    fn for_all(&self, l: usize, see: &mut dyn FnMut(&LayerLayout, usize, &[u8])) -> Result<()> {
        self.layers[l].for_all(self.fetcher, see)
    }

    fn sketch(&self, l: usize) -> Result<Option<Cow<'_, SketchedLayer>>> {
        Ok(self.choosers[l].sketch().map(Cow::Borrowed))
    }
}

/// Sums over audited tokens of one layer.
#[derive(Debug, Clone, Copy, Default)]
struct LayerSums {
    tally: Tally,
    error: f64,
}

/// An engine's audits: when, what is kept of the token under way, and what was found so far.
#[derive(Debug)]
pub(crate) struct Audit {
    every: usize,
    /// Tokens decoded since the start.
    decoded: usize,
    audited: u64,
    time: Duration,
    sums: Vec<LayerSums>,
    /// Input of each layer, `[n_layers, hidden_size]`.
    inputs: Vec<f32>,
    /// What the run added to the residual stream, `[n_layers, hidden_size]`.
    outputs: Vec<f32>,
    /// Whether a neuron was computed, `[n_layers, intermediate_size]`.
    computed: Vec<bool>,
    /// |h| * ||d|| of a layer's neurons, `[intermediate_size]`.
    weights: Vec<f32>,
    /// The sum over all neurons of a layer, `[hidden_size]`.
    all: Vec<f32>,
}

impl Audit {
    /// Audits of the first token, and of every one `every` (not 0) tokens after it.
    pub(crate) fn new(config: &ModelConfig, every: usize) -> Self {
        let (layers, hidden, ffn) = (config.n_layers, config.hidden_size, config.intermediate_size);
        Self {
            every,
            decoded: 0,
            audited: 0,
            time: Duration::ZERO,
            sums: vec![LayerSums::default(); layers],
            inputs: vec![0.0; layers * hidden],
            outputs: vec![0.0; layers * hidden],
            computed: vec![false; layers * ffn],
            weights: vec![0.0; ffn],
            all: vec![0.0; hidden],
        }
    }

    /// Memory that this takes while it works: itself, lists of a layer's neurons, and a down row for each thread.
    pub(crate) fn bytes(config: &ModelConfig, n_threads: usize) -> u64 {
        let (layers, hidden, ffn) = (config.n_layers, config.hidden_size, config.intermediate_size);
        // Sums, and what one token adds to them.
        let sums = 2 * layers * size_of::<LayerSums>();
        let kept = layers * (2 * size_of::<f32>() * hidden + ffn);
        // Weights, the computed neurons, the best ones and those near the last of them.
        (sums + kept + 4 * (4 * ffn + hidden + n_threads * hidden)) as u64
    }

    /// Whether the next token is one to audit.
    pub(crate) fn is_due(&self) -> bool {
        self.decoded.is_multiple_of(self.every)
    }

    /// A token is done.
    pub(crate) fn count(&mut self) {
        self.decoded += 1;
    }

    /// What audits took so far.
    pub(crate) fn time(&self) -> Duration {
        self.time
    }

    /// Keeps what layer `l` made of `x`: `active` (ascending) are the neurons that it computed, and `output` writes what it added
    /// to the residual stream over zeros.
    pub(crate) fn keep(&mut self, l: usize, x: &[f32], active: &[u32], output: impl FnOnce(&mut [f32])) {
        let begin = Instant::now();
        let (hidden, ffn) = (x.len(), self.weights.len());
        self.inputs[l * hidden..][..hidden].copy_from_slice(x);
        let added = &mut self.outputs[l * hidden..][..hidden];
        added.fill(0.0);
        output(added);
        let computed = &mut self.computed[l * ffn..][..ffn];
        computed.fill(false);
        active.iter().for_each(|&n| computed[n as usize] = true);
        self.time += begin.elapsed();
    }

    /// Audits the token that was kept. `sums` are used and left in no particular state.
    ///
    /// # Errors
    /// If neurons cannot be read; then nothing of this token counts.
    pub(crate) fn run(&mut self, neurons: &dyn AllNeurons, compute: &mut Compute, sums: &mut FfnSums) -> Result<()> {
        let begin = Instant::now();
        let found = (0..self.sums.len()).map(|l| self.judge(l, neurons, compute, sums));
        let found: Result<Vec<LayerSums>> = found.collect();
        self.time += begin.elapsed();
        for (sum, found) in self.sums.iter_mut().zip(found?) {
            *sum = LayerSums { tally: sum.tally + found.tally, error: sum.error + found.error };
        }
        self.audited += 1;
        Ok(())
    }

    /// One layer: all its neurons, and what was computed of them.
    fn judge(
        &mut self,
        l: usize,
        neurons: &dyn AllNeurons,
        compute: &mut Compute,
        sums: &mut FfnSums,
    ) -> Result<LayerSums> {
        let (hidden, ffn) = (self.all.len(), self.weights.len());
        let x = &self.inputs[l * hidden..][..hidden];
        let Compute { kernels, pool } = compute;
        sums.start(kernels, neurons.layout(l), x);
        let is_residual = |encoding| encoding == Encoding::R4;
        let sketch = if neurons.layout(l).encodings().any(is_residual) { neurons.sketch(l)? } else { None };
        let mut residuals = sketch.map(|sketch| Residuals::new(sketch, kernels, pool, x));
        let weights = &mut self.weights;
        neurons.for_all(l, &mut |layout, first, bytes| {
            let from = layout.offset(first);
            for (section, of) in layout.within(first..first + layout.n_in(first, bytes.len())) {
                let bytes = &bytes[layout.offset(section.start) - from..layout.offset(section.end) - from];
                let (first, weights) = (section.start, &mut weights[section]);
                match residuals.as_mut().filter(|_| is_residual(of.bundles().encoding())) {
                    Some(residuals) => residuals.add(sums, kernels, pool, layout, first, bytes, weights),
                    None => {
                        sums.add(kernels, pool, layout, Span::Contiguous { first, bytes });
                        sums.weights(kernels, pool, layout, first, bytes, weights);
                    }
                }
            }
        })?;
        if let Some(Residuals { sketch, h, .. }) = residuals {
            sums.add_sketched(kernels, pool, sketch.matrix(2), sketch.first(), &h);
        }
        self.all.fill(0.0);
        sums.finish(&mut self.all);
        let computed = self.computed[l * ffn..][..ffn].iter().zip(0..);
        let kept: Vec<u32> = computed.filter(|(computed, _)| **computed).map(|(_, n)| n).collect();
        let error = relative_error(&self.all, &self.outputs[l * hidden..][..hidden]);
        Ok(LayerSums { tally: compare(&self.weights, &kept), error })
    }

    /// What was found so far.
    pub(crate) fn report(&self) -> AuditReport {
        let of_layer = |(layer, sum): (usize, &LayerSums)| {
            let quality = sum.tally.quality(layer);
            let (lost_energy, output_error) = (1.0 - quality.energy_recall, sum.error / self.audited as f64);
            LayerAudit { quality, lost_energy, output_error }
        };
        let audited = if self.audited == 0 { &[] } else { self.sums.as_slice() };
        let layers: Vec<LayerAudit> = audited.iter().enumerate().map(of_layer).collect();
        let mean = |of: fn(&LayerAudit) -> f64| {
            (!layers.is_empty()).then(|| layers.iter().map(of).sum::<f64>() / layers.len() as f64)
        };
        AuditReport {
            every: self.every,
            tokens: self.audited,
            seconds: self.time.as_secs_f64(),
            recall: mean(|l| l.quality.recall),
            precision: mean(|l| l.quality.precision),
            energy_recall: mean(|l| l.quality.energy_recall),
            energy_recall_of_oracle: mean(|l| l.quality.energy_recall_of_oracle),
            lost_energy: mean(|l| l.lost_energy),
            output_error: mean(|l| l.output_error),
            layers,
        }
    }
}

/// The neurons of a layer whose rows are residuals, all of them computed.
struct Residuals<'a> {
    sketch: Cow<'a, SketchedLayer>,
    /// The sketch's gate and up products.
    products: Vec<[f32; 2]>,
    /// Every row is read.
    rows: Vec<f32>,
    /// Activations of those that were added, for the sketch's down rows.
    h: Vec<f32>,
}

impl<'a> Residuals<'a> {
    fn new(sketch: Cow<'a, SketchedLayer>, kernels: &Kernels, pool: &mut Pool, x: &[f32]) -> Self {
        let products = sketch.products(kernels, pool, x);
        let (rows, h) = (vec![f32::from(ALL_ROWS); products.len()], vec![0.0; products.len()]);
        Self { sketch, products, rows, h }
    }

    /// Adds the neurons from `first` on whose bundles `bytes` holds to `sums`, and puts |h| * ||d|| of each into `weights`.
    #[allow(clippy::too_many_arguments)]
    fn add(
        &mut self,
        sums: &mut FfnSums,
        kernels: &Kernels,
        pool: &mut Pool,
        layout: &LayerLayout,
        first: usize,
        bytes: &[u8],
        weights: &mut [f32],
    ) {
        let listed = (first..first + weights.len()).map(|n| (n as u32, layout.bundle(bytes, first, n)));
        let (listed, left) = (listed.collect::<Vec<_>>(), LeftToSketch::default());
        let behind = self.sketch.first();
        let choice = RowChoice { first: behind, rows: &self.rows, products: &self.products, left: &left };
        sums.add(kernels, pool, layout, Span::Rows(&listed, choice));
        for (n, h) in left.into_inner().unwrap_or_else(PoisonError::into_inner) {
            let n = n as usize;
            self.h[n - behind] = h;
            weights[n - first] = h.abs() * self.sketch.down_norm(n);
        }
    }
}

/// `||all - got|| / ||all||`; where `all` is zero, 0 if `got` is, else 1.
fn relative_error(all: &[f32], got: &[f32]) -> f64 {
    let square = |v: f64| v * v;
    let norm = all.iter().map(|&a| square(f64::from(a))).sum::<f64>().sqrt();
    let apart = all.iter().zip(got).map(|(&a, &g)| square(f64::from(a) - f64::from(g))).sum::<f64>().sqrt();
    if norm == 0.0 { f64::from(u8::from(apart > 0.0)) } else { apart / norm }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_relative_to_what_all_neurons_give() {
        assert_eq!(relative_error(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert_eq!(relative_error(&[3.0, 4.0], &[0.0, 0.0]), 1.0);
        assert_eq!(relative_error(&[3.0, 4.0], &[3.0, 5.0]), 0.2);
        assert_eq!((relative_error(&[0.0], &[0.0]), relative_error(&[0.0], &[2.0])), (0.0, 1.0));
        assert!(relative_error(&[f32::NAN], &[1.0]).is_nan());
    }
}
