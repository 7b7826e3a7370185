//! Which neurons a token needs, and what stands for the others: a low-rank predictor with a measured mean, or a sketch.

use crate::ffn::FfnSums;
use crate::layer_active::{LayerActive, layer_active};
use crate::plan::Mode;
use crate::predictor::{Predictor, energy, n_needed, top_k};
use crate::row_choice::{LeftToSketch, RowChoice};
use crate::{Error, Result};
use std::sync::PoisonError;
use thermocline_datasets::Activation;
use thermocline_kernels::{Kernels, Pool, SketchInput, SketchMatrix, ops};
#[cfg(feature = "cuda")]
use thermocline_split::SketchForm;
use thermocline_split::{GradedCurves, Sketch, Split};

/// Neurons that one task judges: their products stay in the first-level cache.
pub(crate) const TASK_NEURONS: usize = 256;

/// What one layer's neurons are chosen by.
#[derive(Debug)]
pub(crate) enum Chooser {
    Predictor(Predictor),
    Sketch(SketchedLayer),
}

/// A layer's sketch, in memory, without that of the neurons that every token computes.
#[derive(Debug, Clone)]
pub(crate) struct SketchedLayer {
    sketch: Sketch,
    /// The first neurons of the split's order, which are not asked.
    n_always: usize,
    activation: Activation,
    hidden_size: usize,
    /// Whether rows are never read alone.
    whole: bool,
}

/// What a chooser says of a layer's neurons for one input: of the last ones, as many as it is asked about.
#[derive(Debug)]
pub(crate) struct Judgement {
    /// What neurons are chosen by; where rows are, those that are to be read, as a number.
    pub scores: Vec<f32>,
    /// A sketch's activations; empty without one.
    pub sketched: Vec<f32>,
    /// Its gate and up products, where rows are chosen; else of no meaning.
    pub products: Vec<[f32; 2]>,
}

/// The same of some neurons, at most [`TASK_NEURONS`], from the `first` on.
pub(crate) struct JudgedNeurons<'a> {
    pub first: usize,
    pub scores: &'a mut [f32],
    pub sketched: &'a mut [f32],
    pub products: &'a mut [[f32; 2]],
}

impl Judgement {
    /// Of so many neurons, of which so many have sketches: all or none.
    pub(crate) fn new(n: usize, n_sketched: usize) -> Self {
        Self { scores: vec![0.0; n], sketched: vec![0.0; n_sketched], products: vec![[0.0; 2]; n_sketched] }
    }

    /// Memory that this takes.
    pub(crate) fn bytes(n: usize, n_sketched: usize) -> usize {
        4 * n + 12 * n_sketched
    }
}

/// Whether sparse mode chooses by sketches: where the split has them.
pub(crate) fn has_sketches(split: &Split) -> bool {
    split.sketches().is_some()
}

/// Whether `mode` chooses by sketches.
pub(crate) fn is_sketched(split: &Split, mode: Mode) -> bool {
    mode != Mode::Exact && has_sketches(split)
}

/// Refuses a limit of errors where nobody can tell them, or `layers` are chosen by rows.
pub(crate) fn check_max_error(
    error: f32,
    mode: Mode,
    has_sketches: bool,
    n_always: usize,
    layers: &[LayerActive],
) -> Result<()> {
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
    if layers.iter().any(|layer| layer.of_rows().is_some()) {
        return refuse(
            "limits whole neurons, and by this split's thresholds single rows are read; leave it out".to_owned(),
        );
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

/// The sketch of a layer, if the split has one, of the neurons behind the first `n_always`; with the errors that its rows are chosen by,
/// where `active` chooses rows.
pub(crate) fn sketch_behind(
    split: &Split,
    layer: usize,
    n_always: usize,
    active: Option<&LayerActive>,
) -> Result<Option<Sketch>> {
    let sketch = split.sketch(layer)?.map(|sketch| sketch.behind(n_always));
    Ok(match active.and_then(LayerActive::of_rows) {
        Some((_, factors)) => sketch.map(|sketch| sketch.with_errors_times(factors)),
        None => sketch,
    })
}

impl Chooser {
    /// Of a layer whose first `n_always` neurons every token computes; 0 for a predictor, which is asked about all. `active` is what
    /// it chooses; of a layer `on_disk`, from which chunks of bundles come, neurons are read whole or not at all.
    pub(crate) fn load(
        split: &Split,
        layer: usize,
        n_always: usize,
        active: &LayerActive,
        on_disk: bool,
    ) -> Result<Self> {
        let Some(sketched) = SketchedLayer::behind(split, layer, n_always, Some(active))? else {
            return Ok(Chooser::Predictor(Predictor::load(split, layer)?));
        };
        let whole = on_disk || !split.layers()[layer].bundles().has_plain_rows();
        Ok(Chooser::Sketch(SketchedLayer { whole, ..sketched }))
    }

    /// The sketch, if it is one.
    pub(crate) fn sketch(&self) -> Option<&SketchedLayer> {
        match self {
            Chooser::Sketch(layer) => Some(layer),
            Chooser::Predictor(_) => None,
        }
    }

    /// Bytes of all choosers of a split, in memory, where every token computes the first `n_always` neurons of each layer.
    pub(crate) fn total_bytes(split: &Split, n_always: usize) -> u64 {
        let config = &split.manifest().config;
        match split.sketches() {
            Some(_) => {
                let n = config.intermediate_size - n_always;
                (config.n_layers * split.sketch_form().bytes(n, config.hidden_size)) as u64
            }
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

    /// What it says of all neurons that it is asked about for the normalised input `x`, where `of_layer` is to be chosen. If `ahead`,
    /// `x` is the input of the layer before, under this layer's norm.
    pub(crate) fn judge(
        &self,
        (kernels, pool): (&Kernels, &mut Pool),
        ahead: bool,
        x: &[f32],
        of_layer: &LayerActive,
        out: &mut Judgement,
    ) {
        match self {
            Chooser::Predictor(predictor) if ahead => predictor.foresee(kernels, pool, x, &mut out.scores),
            Chooser::Predictor(predictor) => predictor.scores(kernels, pool, x, &mut out.scores),
            Chooser::Sketch(layer) => layer.judge(kernels, pool, x, of_layer.of_rows().map(|(least, _)| least), out),
        }
    }

    /// The neurons that are computed, ascending, into `active`: those that always are and of the others the highest scores, as many
    /// as `of_layer` says, or as many fewer of these as leave a squared error of at most `max_error`^2 of the energy that a sketch sees.
    /// Where rows are chosen, those of which any is read.
    pub(crate) fn choose(
        &self,
        judged: &Judgement,
        of_layer: &LayerActive,
        max_error: Option<f32>,
        active: &mut Vec<u32>,
    ) {
        let scores = &judged.scores;
        let Chooser::Sketch(layer) = self else { return top_k(scores, of_layer.n_active, active) };
        let n_chosen = of_layer.n_chosen(scores, layer.n_always);
        let n = max_error.map_or(n_chosen, |error| {
            let allowed = f64::from(error).powi(2) * energy(&judged.sketched, &layer.sketch.down_norm);
            n_needed(scores, allowed).min(n_chosen)
        });
        top_k(scores, n, active);
        let first = layer.n_always as u32;
        active.iter_mut().for_each(|neuron| *neuron += first);
        active.splice(0..0, 0..first);
    }

    /// Which rows of the chosen neurons are read, if `of_layer` chooses rows.
    pub(crate) fn rows<'a>(
        &self,
        judged: &'a Judgement,
        of_layer: &LayerActive,
        left: &'a LeftToSketch,
    ) -> Option<RowChoice<'a>> {
        let Chooser::Sketch(layer) = self else { return None };
        of_layer.of_rows()?;
        Some(RowChoice { first: layer.n_always, rows: &judged.scores, products: &judged.products, left })
    }

    /// Adds to `sums` what stands for the neurons that are not in `active`, where that is a sketch of them, and for those that are `left`
    /// to it, which then are none. Returns the bytes that were read.
    pub(crate) fn stand_in(
        &self,
        kernels: &Kernels,
        pool: &mut Pool,
        sums: &mut FfnSums,
        judged: &mut Judgement,
        active: &[u32],
        left: &LeftToSketch,
    ) -> u64 {
        let Chooser::Sketch(layer) = self else { return 0 };
        let (first, sketched) = (layer.n_always, &mut judged.sketched);
        active.iter().map(|&n| n as usize).filter(|&n| n >= first).for_each(|n| sketched[n - first] = 0.0);
        let mut left = left.lock().unwrap_or_else(PoisonError::into_inner);
        left.drain(..).for_each(|(n, h)| sketched[n as usize - first] = h);
        sums.add_sketched(kernels, pool, layer.matrix(2), first, sketched)
    }
}

impl SketchedLayer {
    /// As [`sketch_behind`], for single rows.
    pub(crate) fn behind(
        split: &Split,
        layer: usize,
        n_always: usize,
        active: Option<&LayerActive>,
    ) -> Result<Option<Self>> {
        let config = &split.manifest().config;
        let (activation, hidden_size) = (config.activation, config.hidden_size);
        let sketch = sketch_behind(split, layer, n_always, active)?;
        Ok(sketch.map(|sketch| Self { sketch, n_always, activation, hidden_size, whole: false }))
    }

    /// One whose rows lie elsewhere: what `sketch`, of the neurons behind the first `n_always`, has besides; `whole` if rows are never
    /// read alone.
    #[cfg(feature = "cuda")]
    pub(crate) fn of_numbers(
        sketch: Sketch,
        n_always: usize,
        config: &thermocline_datasets::ModelConfig,
        whole: bool,
    ) -> Self {
        let sketch = Sketch { rows: Default::default(), ..sketch };
        Self { sketch, n_always, activation: config.activation, hidden_size: config.hidden_size, whole }
    }

    /// How many bits its rows have.
    #[cfg(feature = "cuda")]
    pub(crate) fn form(&self) -> SketchForm {
        self.sketch.form
    }

    /// Columns of a row.
    #[cfg(feature = "cuda")]
    pub(crate) fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    /// Neurons that it has.
    #[cfg(feature = "cuda")]
    pub(crate) fn n_neurons(&self) -> usize {
        self.sketch.n_neurons()
    }

    /// Without gate and up rows.
    #[cfg(feature = "cuda")]
    pub(crate) fn down_rows(mut self) -> Self {
        self.sketch.rows[..2].iter_mut().for_each(|rows| *rows = Vec::new());
        self
    }

    /// The first neuron that it has.
    pub(crate) fn first(&self) -> usize {
        self.n_always
    }

    /// Adds row `part` (0 gate, 1 up, 2 down) of neuron `n` to `out`, `[hidden]`.
    pub(crate) fn add_row(&self, part: usize, n: usize, out: &mut [f32]) {
        let mut row = vec![0.0; out.len()];
        self.sketch.decode_row(part, n - self.n_always, &mut row);
        ops::axpy(1.0, &row, out);
    }

    /// The length of the down column of neuron `n`.
    pub(crate) fn down_norm(&self, n: usize) -> f32 {
        self.sketch.down_norm[n - self.n_always]
    }

    /// Gate and up products with the layer's normalised input of all its neurons.
    pub(crate) fn products(&self, kernels: &Kernels, pool: &mut Pool, x: &[f32]) -> Vec<[f32; 2]> {
        let n = self.sketch.n_neurons();
        let mut judged = Judgement::new(n, n);
        self.judge(kernels, pool, x, Some(0.0), &mut judged);
        judged.products
    }

    /// Gate (0), up (1) or down (2) rows.
    pub(crate) fn matrix(&self, part: usize) -> SketchMatrix<'_> {
        self.sketch.matrix(part, self.hidden_size)
    }

    /// Costs of neurons, or if there is a least cost of a row, which rows reach it.
    fn judge(&self, kernels: &Kernels, pool: &mut Pool, x: &[f32], least: Option<f32>, out: &mut Judgement) {
        let rows = [self.matrix(0), self.matrix(1)];
        let columns = self.columns_of(kernels, x);
        // Three results for each neuron: groups of slices, shared out by tasks.
        let scores = out.scores.chunks_mut(TASK_NEURONS);
        let others = out.sketched.chunks_mut(TASK_NEURONS).zip(out.products.chunks_mut(TASK_NEURONS));
        let mut tasks: Vec<_> = scores.zip(others).collect();
        pool.for_each_chunk(&mut tasks, 1, |task, group| {
            for (scores, (sketched, products)) in group {
                let of_task = JudgedNeurons { first: task * TASK_NEURONS, scores, sketched, products };
                self.judge_some(kernels, rows, &columns, least, of_task);
            }
        });
    }

    /// The layer's input in the order of a sketch's columns.
    pub(crate) fn columns_of(&self, kernels: &Kernels, x: &[f32]) -> SketchInput {
        let mut columns = vec![0.0; x.len()];
        self.sketch.in_columns(x, &mut columns);
        kernels.sketch_input(&columns)
    }

    /// The same as [`Chooser::judge`], of some neurons, by gate and up `rows` of all of them.
    pub(crate) fn judge_some(
        &self,
        kernels: &Kernels,
        rows: [SketchMatrix<'_>; 2],
        columns: &SketchInput,
        least: Option<f32>,
        out: JudgedNeurons<'_>,
    ) {
        let JudgedNeurons { first, scores, sketched, products: kept } = out;
        let mut products = [[0.0; TASK_NEURONS]; 2];
        let [g, u] = products.each_mut().map(|p| &mut p[..scores.len()]);
        kernels.sketch_dots(rows[0], first, columns, g);
        kernels.sketch_dots(rows[1], first, columns, u);
        for (i, (score, h)) in scores.iter_mut().zip(sketched.iter_mut()).enumerate() {
            let (g, u) = (g[i], u[i]);
            let Some(least) = least else {
                (*score, *h) = self.sketch.judge(self.activation, first + i, g, u);
                continue;
            };
            let rows = self.sketch.rows_to_read(self.activation, first + i, (g, u), least, self.whole);
            *score = f32::from(rows);
            *h = self.activation.apply(g, u);
            kept[i] = [g, u];
        }
    }
}
