//! Which neurons a token needs, and what stands for the others: a low-rank predictor with a measured mean, or a sketch.

use crate::ffn::FfnSums;
use crate::layer_active::{LayerActive, layer_active};
use crate::plan::Mode;
use crate::predictor::{Predictor, energy, n_needed, top_k};
use crate::{Error, Result};
use thermocline_datasets::Activation;
use thermocline_kernels::{Kernels, Pool, SketchMatrix};
use thermocline_split::{GradedCurves, Sketch, Split, sketch_bytes};

/// Neurons that one task judges: their products stay in the first-level cache.
const TASK_NEURONS: usize = 256;

/// What one layer's neurons are chosen by.
#[derive(Debug)]
pub(crate) enum Chooser {
    Predictor(Predictor),
    Sketch(SketchedLayer),
}

/// A layer's sketch, in memory, without that of the neurons that every token computes.
#[derive(Debug)]
pub(crate) struct SketchedLayer {
    sketch: Sketch,
    /// The first neurons of the split's order, which are not asked.
    n_always: usize,
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
pub(crate) fn check_max_error(error: f32, mode: Mode, has_sketches: bool, n_always: usize) -> Result<()> {
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
    if n_always > 0 {
        return refuse("is a share of the energy that sketches see of all neurons; leave out --always".to_owned());
    }
    Ok(())
}

/// The neurons of a layer that every token computes, if they are this share of it.
pub fn always_neurons(share: f32, n_neurons: usize) -> usize {
    ((share * n_neurons as f32).round() as usize).min(n_neurons)
}

/// Refuses a share of neurons that are always computed where nothing would be different for it.
pub(crate) fn check_always(split: &Split, mode: Mode, share: Option<f32>) -> Result<()> {
    let Some(share) = share else { return Ok(()) };
    let refuse = |reason: String| Err(Error::Setting { flag: "--always", reason });
    if !(0.0..=1.0).contains(&share) {
        return refuse(format!("{share} is not from 0 to 1"));
    }
    if mode == Mode::Exact {
        return refuse("is for --mode sparse; exact mode always computes all neurons".to_owned());
    }
    if !has_sketches(split) {
        return refuse(
            "spares sketches, and this split has none: make it with --sketch, or leave the flag out".to_owned(),
        );
    }
    Ok(())
}

/// What sparse mode computes of each layer: with sketches the first `n_always` neurons, and `share` of the others, by the split's
/// thresholds, or if it has none the same in every layer and token. Costs of shares were measured for low-rank predictors.
///
/// # Errors
/// If the split's costs or thresholds cannot be read.
pub(crate) fn chosen_active(split: &Split, share: f32, n_always: usize) -> Result<Vec<LayerActive>> {
    if !has_sketches(split) {
        return layer_active(split, share);
    }
    let graded = split.graded_curves()?;
    let thresholds = graded.as_ref().map(GradedCurves::thresholds);
    Ok(LayerActive::graded(&split.manifest().config, n_always, share, thresholds))
}

impl Chooser {
    /// Of a layer whose first `n_always` neurons every token computes; 0 for a predictor, which is asked about all.
    pub(crate) fn load(split: &Split, layer: usize, n_always: usize) -> Result<Self> {
        let Some(sketch) = split.sketch(layer).map_err(Error::from)? else {
            return Ok(Chooser::Predictor(Predictor::load(split, layer)?));
        };
        let config = &split.manifest().config;
        let (activation, hidden_size) = (config.activation, config.hidden_size);
        let sketch = sketch.behind(n_always);
        Ok(Chooser::Sketch(SketchedLayer { sketch, n_always, activation, hidden_size }))
    }

    /// Bytes of all choosers of a split, in memory, where every token computes the first `n_always` neurons of each layer.
    pub(crate) fn total_bytes(split: &Split, n_always: usize) -> u64 {
        let config = &split.manifest().config;
        match split.sketches() {
            Some(_) => (config.n_layers * sketch_bytes(config.intermediate_size - n_always, config.hidden_size)) as u64,
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

    /// Scores of all neurons that it is asked about for the normalised input `x`, and, from a sketch, their activations: `scores` and
    /// `sketched` are of the layer's last neurons, as many as it knows; a predictor leaves the second alone. If `ahead`, `x` is the
    /// input of the layer before, under this layer's norm.
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

    /// The neurons that are computed, ascending, into `active`: those that always are and of the others the highest scores, as many
    /// as `of_layer` says, or as many fewer of these as leave a squared error of at most `max_error`^2 of the energy that a sketch sees.
    pub(crate) fn choose(
        &self,
        scores: &[f32],
        sketched: &[f32],
        of_layer: &LayerActive,
        max_error: Option<f32>,
        active: &mut Vec<u32>,
    ) {
        let Chooser::Sketch(layer) = self else { return top_k(scores, of_layer.n_active, active) };
        let n_chosen = of_layer.n_chosen(scores, layer.n_always);
        let n = max_error.map_or(n_chosen, |error| {
            let allowed = f64::from(error).powi(2) * energy(sketched, &layer.sketch.down_norm);
            n_needed(scores, allowed).min(n_chosen)
        });
        top_k(scores, n, active);
        let first = layer.n_always as u32;
        active.iter_mut().for_each(|neuron| *neuron += first);
        active.splice(0..0, 0..first);
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
        let first = layer.n_always;
        active.iter().map(|&n| n as usize).filter(|&n| n >= first).for_each(|n| sketched[n - first] = 0.0);
        sums.add_sketched(kernels, pool, layer.matrix(2), first, sketched)
    }
}

impl SketchedLayer {
    /// Gate (0), up (1) or down (2) rows.
    fn matrix(&self, part: usize) -> SketchMatrix<'_> {
        self.sketch.matrix(part, self.hidden_size)
    }

    fn judge(&self, kernels: &Kernels, pool: &mut Pool, x: &[f32], scores: &mut [f32], sketched: &mut [f32]) {
        let (gate, up) = (self.matrix(0), self.matrix(1));
        let mut columns = vec![0.0; x.len()];
        self.sketch.in_columns(x, &mut columns);
        let x = &columns;
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
