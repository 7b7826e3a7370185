//! Which neurons a token needs, and what stands for the others: a low-rank predictor with a measured mean, or a sketch.

use crate::ffn::FfnSums;
use crate::layer_active::{LayerActive, layer_active};
use crate::plan::Mode;
use crate::predictor::{Predictor, energy, n_needed, top_k};
use crate::{Error, Result};
use thermocline_datasets::Activation;
use thermocline_kernels::{Kernels, Pool, SketchMatrix};
use thermocline_split::{Sketch, Split};

/// Neurons that one task judges: their products stay in the first-level cache.
const TASK_NEURONS: usize = 256;

/// What one layer's neurons are chosen by.
#[derive(Debug)]
pub(crate) enum Chooser {
    Predictor(Predictor),
    Sketch(SketchedLayer),
}

/// A layer's sketch, in memory.
#[derive(Debug)]
pub(crate) struct SketchedLayer {
    sketch: Sketch,
    activation: Activation,
    hidden_size: usize,
}

/// Whether sparse mode chooses by sketches: where the split has them.
pub(crate) fn has_sketches(split: &Split) -> bool {
    split.sketches().is_some()
}

/// Whether `mode` chooses by sketches.
pub(crate) fn is_sketched(split: &Split, mode: Mode) -> bool {
    mode != Mode::Exact && has_sketches(split)
}

/// Refuses a limit of errors where nobody can tell them.
pub(crate) fn check_max_error(error: f32, mode: Mode, has_sketches: bool) -> Result<()> {
    let refuse = |reason: String| Err(Error::Setting { flag: "--max-error", reason });
    if !(error > 0.0 && error < 1.0) {
        return refuse(format!("{error} is not above 0 and below 1"));
    }
    if mode == Mode::Exact {
        return refuse("is for --mode sparse; exact mode makes no such errors".to_owned());
    }
    if !has_sketches {
        return refuse(
            "needs sketches, which tell errors: make the split with --sketch, and run it on a CPU".to_owned(),
        );
    }
    Ok(())
}

/// What sparse mode computes of each layer so that `share` of all neurons is computed. Costs of shares were measured for
/// low-rank predictors: with sketches all layers compute the same share.
///
/// # Errors
/// If the split's costs cannot be read.
pub(crate) fn chosen_active(split: &Split, share: f32) -> Result<Vec<LayerActive>> {
    if !has_sketches(split) {
        return layer_active(split, share);
    }
    Ok(LayerActive::alike(&split.manifest().config, share))
}

impl Chooser {
    pub(crate) fn load(split: &Split, layer: usize) -> Result<Self> {
        let Some(sketch) = split.sketch(layer).map_err(Error::from)? else {
            return Ok(Chooser::Predictor(Predictor::load(split, layer)?));
        };
        let config = &split.manifest().config;
        let (activation, hidden_size) = (config.activation, config.hidden_size);
        Ok(Chooser::Sketch(SketchedLayer { sketch, activation, hidden_size }))
    }

    /// Bytes of all choosers of a split, in memory.
    pub(crate) fn total_bytes(split: &Split) -> u64 {
        match split.sketches() {
            Some(file) => file.data_bytes(),
            None => {
                let shares = split.manifest().shares.as_ref().map_or(0, |file| file.file_bytes);
                split.predictors().data_bytes() + shares
            }
        }
    }

    /// Bytes that choosing reads, and choosing one layer early as many.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Chooser::Predictor(predictor) => predictor.bytes(),
            Chooser::Sketch(layer) => {
                let [gate, up, _] = &layer.sketch.rows;
                (gate.len() + up.len() + 16 * layer.sketch.n_neurons()) as u64
            }
        }
    }

    /// Scores `[ffn]` of all neurons for the normalised input `x`, and, from a sketch, their activations: `sketched [ffn]`, which a
    /// predictor leaves alone. If `ahead`, `x` is the input of the layer before, under this layer's norm.
    pub(crate) fn scores(
        &self,
        (kernels, pool): (&Kernels, &mut Pool),
        ahead: bool,
        x: &[f32],
        scores: &mut [f32],
        sketched: &mut [f32],
    ) {
        match self {
            Chooser::Predictor(predictor) if ahead => predictor.foresee(kernels, pool, x, scores),
            Chooser::Predictor(predictor) => predictor.scores(kernels, pool, x, scores),
            Chooser::Sketch(layer) => layer.judge(kernels, pool, x, scores, sketched),
        }
    }

    /// The neurons that are computed, ascending, into `active`: of the highest scores `n_active`, or as many fewer as leave a
    /// squared error of at most `max_error`^2 of the energy that a sketch sees.
    pub(crate) fn choose(
        &self,
        scores: &[f32],
        sketched: &[f32],
        n_active: usize,
        max_error: Option<f32>,
        active: &mut Vec<u32>,
    ) {
        let n = match (self, max_error) {
            (Chooser::Sketch(layer), Some(error)) => {
                let allowed = f64::from(error).powi(2) * energy(sketched, &layer.sketch.down_norm);
                n_needed(scores, allowed).min(n_active)
            }
            _ => n_active,
        };
        top_k(scores, n, active);
    }

    /// Adds to `sums` what stands for the neurons that are not in `active`, where that is a sketch of them: `sketched` are the
    /// activations of all. Returns the bytes that were read.
    pub(crate) fn stand_in(
        &self,
        kernels: &Kernels,
        pool: &mut Pool,
        sums: &mut FfnSums,
        sketched: &mut [f32],
        active: &[u32],
    ) -> u64 {
        let Chooser::Sketch(layer) = self else { return 0 };
        active.iter().for_each(|&n| sketched[n as usize] = 0.0);
        sums.add_sketched(kernels, pool, layer.matrix(2), sketched)
    }
}

impl SketchedLayer {
    /// Gate (0), up (1) or down (2) rows.
    fn matrix(&self, part: usize) -> SketchMatrix<'_> {
        self.sketch.matrix(part, self.hidden_size)
    }

    fn judge(&self, kernels: &Kernels, pool: &mut Pool, x: &[f32], scores: &mut [f32], sketched: &mut [f32]) {
        let (gate, up) = (self.matrix(0), self.matrix(1));
        // Two results for each neuron: pairs of slices, shared out by tasks.
        let mut tasks: Vec<(&mut [f32], &mut [f32])> =
            scores.chunks_mut(TASK_NEURONS).zip(sketched.chunks_mut(TASK_NEURONS)).collect();
        pool.for_each_chunk(&mut tasks, 1, |task, pair| {
            let mut products = [[0.0; TASK_NEURONS]; 2];
            for (scores, sketched) in pair {
                let first = task * TASK_NEURONS;
                let [g, u] = products.each_mut().map(|p| &mut p[..scores.len()]);
                kernels.sketch_dots(gate, first, x, g);
                kernels.sketch_dots(up, first, x, u);
                for (i, (score, h)) in scores.iter_mut().zip(sketched.iter_mut()).enumerate() {
                    (*score, *h) = self.sketch.judge(self.activation, first + i, g[i], u[i]);
                }
            }
        });
    }
}
