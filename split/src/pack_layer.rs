//! Encodes one layer: bundles in split order, predictor factors, statistics.

use crate::Error;
use crate::build::{Rounding, SplitOptions, rates};
use crate::error::Result;
use crate::manifest::Packing;
use crate::order::{OrderKind, outliers_first};
use crate::planes::{lay_out, pack_row};
use crate::sketch::{Feedback, Sketch, pack_alone};
use rayon::prelude::*;
use thermocline_calibrate::predictor::{self, LowRank};
use thermocline_calibrate::{Input, LayerStatistics, Profile};
use thermocline_datasets::Checkpoint;
use thermocline_kernels::exact::PackedRow;
use thermocline_kernels::{Encoding, PackError, RowRef, ScaleFit, pack, unpack};

/// How the predictor's factors are stored: their error adds to what a low rank leaves out anyway.
pub(crate) const FACTORS: Encoding = Encoding::Q4;

/// One layer's contribution to the split; everything but the bundles also becomes a resumable part file.
#[derive(Debug, Default)]
pub(crate) struct PackedLayer {
    /// Checkpoint number of the neuron at each place.
    pub order: Vec<u32>,
    /// The bundles in that order, by section: plane by plane, the base first.
    pub sections: Vec<Vec<Vec<u8>>>,
    /// q8 rows `[rank, hidden]`.
    pub predictor_input: Vec<u8>,
    /// The same for the input of the layer before; empty if there are none.
    pub predictor_ahead: Vec<u8>,
    /// Rows `[2 * ffn, rank]` in [`FACTORS`]: each neuron's row of the gate factor, then of the up factor.
    pub predictor_factors: Vec<u8>,
    /// f32 `[3, ffn]`: what the gate and the up prediction leave out (root mean square), the length of the down column.
    pub predictor_neurons: Vec<u8>,
    /// f32 `[ffn]`.
    pub activation_rate: Vec<u8>,
    /// f32 `[ffn]`: mean of `(|h| * ||d||)^2`.
    pub energy: Vec<u8>,
    /// Bitmaps `[n_samples, ceil(ffn / 8)]` in split order.
    pub trace: Vec<u8>,
    /// The sketch's tensors in file order ([`Sketch::into_bytes`]); empty if there is none.
    pub sketch: [Vec<u8>; 5],
    /// What the sketch leaves, as bundles in split order; empty if nothing is kept of it.
    pub residuals: Vec<u8>,
}

impl PackedLayer {
    /// What goes into a part file, in file order.
    pub(crate) fn parts(&self) -> [&Vec<u8>; 13] {
        let [gate, up, down, sketched_neurons, columns] = &self.sketch;
        [
            &self.predictor_input,
            &self.predictor_ahead,
            &self.predictor_factors,
            &self.predictor_neurons,
            &self.activation_rate,
            &self.energy,
            &self.trace,
            gate,
            up,
            down,
            sketched_neurons,
            columns,
            &self.residuals,
        ]
    }

    /// The same, to be filled in.
    pub(crate) fn parts_mut(&mut self) -> [&mut Vec<u8>; 13] {
        let [gate, up, down, sketched_neurons, columns] = &mut self.sketch;
        [
            &mut self.predictor_input,
            &mut self.predictor_ahead,
            &mut self.predictor_factors,
            &mut self.predictor_neurons,
            &mut self.activation_rate,
            &mut self.energy,
            &mut self.trace,
            gate,
            up,
            down,
            sketched_neurons,
            columns,
            &mut self.residuals,
        ]
    }
}

/// Encodes layer `l`, whose neurons have these encodings: how many, hottest first.
pub(crate) fn pack_layer(
    checkpoint: &dyn Checkpoint,
    profile: &Profile,
    l: usize,
    sections: &[(usize, Encoding)],
    kind: OrderKind,
    options: &SplitOptions,
    packing: &Packing,
) -> Result<PackedLayer> {
    let statistics = profile.layer(l)?;
    let moment = profile.second_moment(l, Input::Ffn)?.ok_or_else(|| Error::Settings {
        what: "the profile has no second moments, which predictors are fitted from; calibrate again".to_owned(),
    })?;
    let name = |p: &str| format!("model.layers.{l}.mlp.{p}_proj.weight");
    let (gate, up) = (checkpoint.load(&name("gate"))?, checkpoint.load(&name("up"))?);
    let hidden = checkpoint.config().hidden_size;
    let ffn = gate.len() / hidden;
    let down = transpose(&checkpoint.load(&name("down"))?, hidden, ffn);
    let rates = rates(&statistics, packing);
    let order = kind.order(&rates, &statistics.active, packing.chunk_neurons);
    let order = outliers_first(order, &statistics.energy, options.outlier_neurons(ffn, packing.chunk_neurons));

    let moments: Vec<f32> = statistics.ffn_input_mean_square.iter().map(|&v| v as f32).collect();
    let (by_moments, plain) = (options.scales.fit(Some(&moments)), options.scales.fit(None));
    let is_rounded =
        options.rounding == Rounding::Feedback && sections.iter().any(|(_, e)| is_rounded_with_feedback(*e));
    let feedback = (is_rounded || options.sketch.is_some()).then(|| Feedback::new(&moment)).transpose()?;
    // A down column adds to every output alike: no channel of it counts more than another, and none makes good what another loses.
    let of_inputs = feedback.as_ref().filter(|_| options.rounding == Rounding::Feedback);
    let sources = [
        Source { matrix: &gate, fit: by_moments, feedback: of_inputs, tensor: name("gate") },
        Source { matrix: &up, fit: by_moments, feedback: of_inputs, tensor: name("up") },
        Source { matrix: &down, fit: plain, feedback: None, tensor: name("down") },
    ];
    let (mut planes, mut rest) = (Vec::with_capacity(sections.len()), order.as_slice());
    for &(n, encoding) in sections {
        let (neurons, later) = rest.split_at(n);
        rest = later;
        let [gate, up, down] = sources.each_ref().map(|source| source.pack(encoding, hidden, neurons));
        let rows = gate?.into_iter().zip(up?).zip(down?);
        let rows: Vec<PackedRow> = rows.flat_map(|((gate, up), down)| [gate, up, down]).collect();
        planes.push(lay_out(encoding, hidden, 3, &rows));
    }

    let norms: Vec<f32> = down.chunks_exact(hidden).map(|d| d.iter().map(|v| v * v).sum::<f32>().sqrt()).collect();
    let fitted =
        predictor::fit_low_rank(&moment, &gate, &up, &norms, checkpoint.config().activation, packing.predictor_rank)?;
    let sketch = options.sketch.zip(feedback.as_ref());
    let sketch = sketch.map(|(form, feedback)| Sketch::fit(form, feedback, &gate, &up, &down, norms.clone()));
    let left_by = |sketch: &Sketch| {
        let [gate_name, up_name, down_name] = ["gate", "up", "down"].map(name);
        let bundles = sketch.residuals(
            of_inputs,
            [&gate, &up, &down],
            [by_moments, by_moments, plain],
            [&gate_name, &up_name, &down_name],
        )?;
        Ok::<_, Error>(bundles_in_order(&bundles, &order))
    };
    let residuals = sketch.as_ref().filter(|_| options.residuals).map(left_by).transpose()?.unwrap_or_default();
    let sketch = sketch.map(|sketch| sketch.in_order(&order));
    let (predictor_factors, [gate_residual, up_residual]) = pack_factors(&fitted, &order, l)?;
    let floats = |values: &dyn Fn(usize) -> f32| -> Vec<u8> {
        order.iter().flat_map(|&id| values(id as usize).to_le_bytes()).collect()
    };
    let neurons = [gate_residual, up_residual, floats(&|id| norms[id])];
    Ok(PackedLayer {
        predictor_input: pack_plain(
            &format!("predictors.{l}.input"),
            &fitted.b,
            hidden,
            Encoding::Q8,
            ScaleFit::LeastSquares,
        )?,
        predictor_ahead: Vec::new(),
        predictor_factors,
        predictor_neurons: neurons.concat(),
        activation_rate: floats(&|id| rates[id] as f32),
        energy: floats(&|id| statistics.energy[id] as f32),
        trace: reorder_bits(&statistics, &order),
        sketch: sketch.map(Sketch::into_bytes).unwrap_or_default(),
        residuals,
        order,
        sections: planes,
    })
}

/// Whether feedback may choose the codes of rows in this encoding: codes that further planes start from are the nearest
/// ones.
pub(crate) fn is_rounded_with_feedback(encoding: Encoding) -> bool {
    matches!(encoding, Encoding::Q4 | Encoding::Q8)
}

/// Gate, up or down rows of a layer in the checkpoint's order, `[ffn, hidden]`.
struct Source<'a> {
    matrix: &'a [f32],
    fit: ScaleFit<'a>,
    /// What makes good what rounding does to their products, if anything is to.
    feedback: Option<&'a Feedback>,
    /// Their name in errors.
    tensor: String,
}

impl Source<'_> {
    /// The rows of these neurons.
    fn pack(&self, encoding: Encoding, hidden: usize, neurons: &[u32]) -> Result<Vec<PackedRow>> {
        let failed = |(row, source): (usize, PackError)| {
            let (tensor, row) = (self.tensor.clone(), neurons[row] as usize);
            Error::Pack { tensor, row, source }
        };
        let row = |id: u32| &self.matrix[id as usize * hidden..(id as usize + 1) * hidden];
        let rows: Vec<f32> = neurons.iter().flat_map(|&id| row(id)).copied().collect();
        pack_rows(encoding, &rows, hidden, self.fit, self.feedback).map_err(failed)
    }
}

/// Encodes rows `[n_rows, columns]`: with feedback where that may choose their codes, otherwise each weight for itself.
///
/// # Errors
/// The row with a weight that cannot be stored.
pub(crate) fn pack_rows(
    encoding: Encoding,
    rows: &[f32],
    columns: usize,
    fit: ScaleFit<'_>,
    feedback: Option<&Feedback>,
) -> std::result::Result<Vec<PackedRow>, (usize, PackError)> {
    if let Some(feedback) = feedback.filter(|_| is_rounded_with_feedback(encoding)) {
        let packed = feedback.pack(encoding, rows, fit)?;
        let rows = packed.chunks_exact(encoding.row_stride(columns));
        return Ok(rows.map(|row| PackedRow { base: row.to_vec(), ..PackedRow::default() }).collect());
    }
    let rows = rows.par_chunks_exact(columns).enumerate();
    rows.map(|(i, row)| pack_row(encoding, row, fit).map_err(|source| (i, source))).collect()
}

/// The factors in split order as rows `[2 * ffn, rank]`, gate and up of a neuron side by side, and what the stored
/// predictions leave out (root mean squares, gate and up, f32 `[ffn]` each). The channels of z are uncorrelated and of
/// unit variance, so the squared error of a row's weights is the variance that storing them adds.
fn pack_factors(fitted: &LowRank, order: &[u32], l: usize) -> Result<(Vec<u8>, [Vec<u8>; 2])> {
    let rank = fitted.rank;
    let stride = FACTORS.row_stride(rank);
    let mut rows = vec![0u8; 2 * order.len() * stride];
    let mut residuals = vec![[0.0f32; 2]; order.len()];
    let neurons = rows.par_chunks_exact_mut(2 * stride).zip(&mut residuals).zip(order);
    neurons.enumerate().try_for_each(|(place, ((rows, residuals), &id))| {
        let id = id as usize;
        let sources = [(&fitted.a_gate, &fitted.gate_residual), (&fitted.a_up, &fitted.up_residual)];
        let mut stored = vec![0.0; rank];
        for (which, (row, (factor, residual))) in rows.chunks_exact_mut(stride).zip(sources).enumerate() {
            let values = &factor[id * rank..(id + 1) * rank];
            pack(FACTORS, values, ScaleFit::LeastSquares, row).map_err(|source| Error::Pack {
                tensor: format!("predictors.{l}.factors"),
                row: 2 * place + which,
                source,
            })?;
            unpack(FACTORS, RowRef::from_matrix_row(FACTORS, rank, row), &mut stored);
            let lost: f32 = values.iter().zip(&stored).map(|(v, s)| (v - s).powi(2)).sum();
            residuals[which] = (residual[id].powi(2) + lost).sqrt();
        }
        Ok::<(), Error>(())
    })?;
    let column = |which: usize| residuals.iter().flat_map(|r| r[which].to_le_bytes()).collect();
    Ok((rows, [column(0), column(1)]))
}

/// Bundles of one length, that of neuron `order[p]` at place p.
fn bundles_in_order(bundles: &[u8], order: &[u32]) -> Vec<u8> {
    let each = bundles.len() / order.len();
    order.iter().flat_map(|&id| &bundles[id as usize * each..][..each]).copied().collect()
}

/// `[rows, columns]` to `[columns, rows]`.
fn transpose(m: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; m.len()];
    out.par_chunks_mut(rows).enumerate().for_each(|(c, out)| {
        for (r, o) in out.iter_mut().enumerate() {
            *o = m[r * columns + c];
        }
    });
    out
}

fn reorder_bits(statistics: &LayerStatistics, order: &[u32]) -> Vec<u8> {
    let active = &statistics.active;
    let width = order.len().div_ceil(8);
    let mut out = vec![0u8; active.n_rows() * width];
    out.par_chunks_mut(width).enumerate().for_each(|(row, bits)| {
        for (place, &id) in order.iter().enumerate() {
            bits[place / 8] |= u8::from(active.get(row, id as usize)) << (place % 8);
        }
    });
    out
}

/// Encodes a matrix in memory, row-major `[_, columns]`.
fn pack_plain(name: &str, m: &[f32], columns: usize, encoding: Encoding, fit: ScaleFit<'_>) -> Result<Vec<u8>> {
    let failed = |(row, source)| Error::Pack { tensor: name.to_owned(), row, source };
    pack_alone(encoding, m, columns, fit).map_err(failed)
}
