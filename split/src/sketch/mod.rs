//! Sketches: low-bit copies of a layer's neurons that are always in memory. Their gate and up rows tell which neurons a token
//! needs, their down rows stand for the others.

mod copies;
mod feedback;
mod form;
mod residual;
mod trellis;

use crate::Error;
use crate::error::{Result, corrupt};
use crate::tensor_file::{Format, TensorFile};
pub use copies::{CopyBits, RowCopy};
pub use feedback::Feedback;
use feedback::{Rounded, round_alone};
pub(crate) use feedback::{Search, pack_alone, round_row, unit_scale};
pub use form::SketchForm;
use rayon::prelude::*;
pub use residual::residual_layout;
pub(crate) use residual::{read as read_residuals, residual_tensor};
use thermocline_calibrate::predictor::{expected_error, expected_rows};
use thermocline_datasets::{Activation, ModelConfig};
use thermocline_kernels::{SKETCH_UNIT, SketchBits, SketchMatrix, unsketch};

/// A neuron's gate row, among those that are to be read.
pub const GATE_ROW: u8 = 1;
/// Its up row.
pub const UP_ROW: u8 = 2;
/// Its down row.
pub const DOWN_ROW: u8 = 4;
/// All three.
pub const ALL_ROWS: u8 = GATE_ROW | UP_ROW | DOWN_ROW;

const PARTS: [&str; 3] = ["gate", "up", "down"];

/// One layer's sketch, neurons in split order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sketch {
    /// How many bits its rows have.
    pub form: SketchForm,
    /// Gate, up and down rows, `[n_neurons, row_bytes]`.
    pub rows: [Vec<u8>; 3],
    /// The channel of the layer's input that each column of the gate and up rows is multiplied with, `[hidden]`: a row's code runs
    /// through its columns in the order in which they were rounded. Columns of down rows are channels of the output, in order.
    pub columns: Vec<u32>,
    /// Root mean square of what the sketched gate misses, `[n_neurons]`.
    pub gate_sd: Vec<f32>,
    /// The same of up.
    pub up_sd: Vec<f32>,
    /// Length of the down column, `[n_neurons]`.
    pub down_norm: Vec<f32>,
    /// Length of what the sketched down column misses, `[n_neurons]`.
    pub down_error: Vec<f32>,
}

impl Sketch {
    /// Fits a layer's in this form: `gate`, `up` and `down [n_neurons, hidden]` are rows of neurons, `down_norm [n_neurons]` the
    /// lengths of the last.
    pub(crate) fn fit(
        form: SketchForm,
        feedback: &Feedback,
        gate: &[f32],
        up: &[f32],
        down: &[f32],
        down_norm: Vec<f32>,
    ) -> Self {
        let columns = feedback.order().to_vec();
        let bits = form.bits();
        let Rounded { bytes: gate, errors: gate_sd } = feedback.round(bits[0], gate);
        let Rounded { bytes: up, errors: up_sd } = feedback.round(bits[1], up);
        let Rounded { bytes: down, errors: down_error } = round_alone(bits[2], down, columns.len());
        Self { form, rows: [gate, up, down], columns, gate_sd, up_sd, down_norm, down_error }
    }

    /// Without its first `n` neurons.
    ///
    /// # Panics
    /// If it has not so many.
    #[must_use]
    pub fn behind(mut self, n: usize) -> Self {
        let n_neurons = self.n_neurons();
        for rows in &mut self.rows {
            rows.drain(..rows.len() / n_neurons.max(1) * n);
            rows.shrink_to_fit();
        }
        for values in [&mut self.gate_sd, &mut self.up_sd, &mut self.down_norm, &mut self.down_error] {
            values.drain(..n);
        }
        self
    }

    /// Neurons.
    pub fn n_neurons(&self) -> usize {
        self.gate_sd.len()
    }

    /// What leaving neuron `i` to its sketch is expected to cost, as a length in the layer's output, and the neuron's activation
    /// as the sketch has it; `gate` and `up` are the sketched rows' products with the layer's input. What rounding gate and up
    /// leaves out is taken for normal noise, what it leaves out of the down column is known.
    pub fn judge(&self, activation: Activation, i: usize, gate: f32, up: f32) -> (f32, f32) {
        let h = activation.apply(gate, up);
        let of_h = expected_error(activation, gate, up, self.gate_sd[i], self.up_sd[i]) * self.down_norm[i];
        let cost = of_h.hypot(h * self.down_error[i]);
        // A neuron of which nothing can be said costs accuracy, never a crash.
        if cost.is_nan() || !h.is_finite() { (0.0, 0.0) } else { (cost, h) }
    }

    /// What reading the gate, the up and the down row of neuron `i` is expected to spare, as squared lengths in the layer's output, if
    /// the products of its sketch are `gate` and `up`: what is known of a neuron before any of its rows is read.
    #[inline]
    pub fn row_costs(&self, activation: Activation, i: usize, gate: f32, up: f32) -> [f32; 3] {
        let of = expected_rows(activation, gate, up, self.gate_sd[i], self.up_sd[i]);
        let (down, error) = (self.down_norm[i].powi(2), self.down_error[i].powi(2));
        [of.gate * down, of.up * down, of.square * error]
    }

    /// The rows of neuron `i` ([`GATE_ROW`], [`UP_ROW`], [`DOWN_ROW`]) that are worth reading where a length of `least` in the layer's
    /// output is; a row of which nothing can be said is, and so are all of a neuron whose products say nothing. If `whole`, rows are never
    /// read alone: all are where one is.
    #[inline]
    pub fn rows_to_read(
        &self,
        activation: Activation,
        i: usize,
        (gate, up): (f32, f32),
        least: f32,
        whole: bool,
    ) -> u8 {
        if !(gate.is_finite() && up.is_finite()) {
            return ALL_ROWS;
        }
        let costs = self.row_costs(activation, i, gate, up);
        let is_read = |cost: f32| u8::from(cost > least * least || cost.is_nan());
        let rows = GATE_ROW * is_read(costs[0]) + UP_ROW * is_read(costs[1]) + DOWN_ROW * is_read(costs[2]);
        if whole && rows > 0 { ALL_ROWS } else { rows }
    }

    /// With errors of gate and up products that are so many times as large.
    #[must_use]
    pub fn with_errors_times(mut self, [gate, up]: [f32; 2]) -> Self {
        self.gate_sd.iter_mut().for_each(|sd| *sd *= gate);
        self.up_sd.iter_mut().for_each(|sd| *sd *= up);
        self
    }

    /// With neuron `order[p]` at place p.
    pub fn in_order(&self, order: &[u32]) -> Self {
        let rows = std::array::from_fn(|part| {
            let width = self.rows[part].len() / self.n_neurons().max(1);
            order.iter().flat_map(|&id| &self.rows[part][id as usize * width..][..width]).copied().collect()
        });
        let values = |v: &[f32]| order.iter().map(|&id| v[id as usize]).collect();
        Self {
            form: self.form,
            rows,
            columns: self.columns.clone(),
            gate_sd: values(&self.gate_sd),
            up_sd: values(&self.up_sd),
            down_norm: values(&self.down_norm),
            down_error: values(&self.down_error),
        }
    }

    /// Rows of `part` (0 gate, 1 up, 2 down) of neurons of this width.
    ///
    /// # Panics
    /// If they are of another width.
    pub fn matrix(&self, part: usize, hidden: usize) -> SketchMatrix<'_> {
        SketchMatrix::new(self.form.bits()[part], hidden, &self.rows[part])
    }

    /// Puts the channels of a layer's input, `[hidden]`, into the order that gate and up rows have them in.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn in_columns(&self, x: &[f32], out: &mut [f32]) {
        assert_eq!((x.len(), out.len()), (self.columns.len(), self.columns.len()), "a sketch's input");
        out.iter_mut().zip(&self.columns).for_each(|(out, channel)| *out = x[*channel as usize]);
    }

    /// Rows of `part` (0 gate, 1 up, 2 down) as f32, `[n_neurons, hidden]`, by channels.
    pub fn decoded(&self, part: usize) -> Vec<f32> {
        let hidden = self.columns.len();
        let mut out = vec![0.0; self.n_neurons() * hidden];
        out.par_chunks_exact_mut(hidden).enumerate().for_each(|(i, out)| self.decode_row(part, i, out));
        out
    }

    /// Row `part` of neuron `i` as f32, by channels, `[hidden]`.
    ///
    /// # Panics
    /// If there is no such row, or `out` is not as long.
    pub fn decode_row(&self, part: usize, i: usize, out: &mut [f32]) {
        let bits = self.form.bits()[part];
        let row = &self.rows[part][i * bits.row_bytes(out.len())..][..bits.row_bytes(out.len())];
        match part {
            2 => unsketch(bits, row, out),
            _ => unsketch_columns(bits, row, &self.columns, out),
        }
    }

    /// Its tensors as they are stored, in file order.
    pub(crate) fn into_bytes(self) -> [Vec<u8>; 5] {
        let values = [&self.gate_sd, &self.up_sd, &self.down_norm, &self.down_error];
        let numbers = values.into_iter().flatten().flat_map(|v| v.to_le_bytes()).collect();
        let columns = self.columns.iter().flat_map(|c| c.to_le_bytes()).collect();
        let [gate, up, down] = self.rows;
        [gate, up, down, numbers, columns]
    }

    pub(crate) fn read(file: &TensorFile, form: SketchForm, config: &ModelConfig, layer: usize) -> Result<Self> {
        let (hidden, n) = (config.hidden_size, config.intermediate_size);
        let row_bytes = form.row_bytes(hidden);
        let mut rows: [Vec<u8>; 3] = Default::default();
        for (part, rows) in rows.iter_mut().enumerate() {
            let name = name(layer, PARTS[part]);
            let entry = file.entry(&name)?;
            if (entry.format, entry.rows, entry.columns) != (Format::U8, n, row_bytes[part]) {
                return Err(corrupt(file.path(), name, "the shape does not fit the model"));
            }
            *rows = file.read(&name)?;
        }
        let name = name(layer, "neurons");
        let values = file.read_f32(&name)?;
        if values.len() != 4 * n || values.iter().any(|v| !v.is_finite() || *v < 0.0) {
            return Err(corrupt(
                file.path(),
                name,
                format!("not 4 times {n} numbers that are finite and not negative"),
            ));
        }
        let name = self::name(layer, "columns");
        let columns: Vec<u32> =
            file.read(&name)?.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
        let mut sorted = columns.clone();
        sorted.sort_unstable();
        if !sorted.into_iter().eq(0..hidden as u32) {
            return Err(corrupt(file.path(), name, format!("not every channel from 0 to {hidden} once")));
        }
        let column = |which: usize| values[which * n..(which + 1) * n].to_vec();
        let [gate_sd, up_sd, down_norm, down_error] = std::array::from_fn(column);
        Ok(Self { form, rows, columns, gate_sd, up_sd, down_norm, down_error })
    }
}

/// The values of a row whose columns are these channels, by channels, `[columns]`.
fn unsketch_columns(bits: SketchBits, row: &[u8], columns: &[u32], out: &mut [f32]) {
    let mut values = vec![0.0; columns.len()];
    unsketch(bits, row, &mut values);
    columns.iter().zip(values).for_each(|(channel, value)| out[*channel as usize] = value);
}

fn name(layer: usize, part: &str) -> String {
    format!("sketches.{layer}.{part}")
}

/// Refuses a width that no sketch can have.
pub(crate) fn check_width(hidden_size: usize) -> Result<()> {
    if hidden_size.is_multiple_of(SKETCH_UNIT) {
        return Ok(());
    }
    Err(Error::Settings { what: format!("--sketch: hidden size {hidden_size} is no multiple of {SKETCH_UNIT}") })
}

/// The tensors of a layer's sketch, in file order.
pub(crate) fn tensors(layer: usize, form: SketchForm, config: &ModelConfig) -> Vec<(String, Format, usize, usize)> {
    let rows = PARTS.iter().zip(form.row_bytes(config.hidden_size));
    rows.map(|(part, row_bytes)| (name(layer, part), Format::U8, config.intermediate_size, row_bytes))
        .chain([
            (name(layer, "neurons"), Format::F32, 4, config.intermediate_size),
            (name(layer, "columns"), Format::U8, config.hidden_size, size_of::<u32>()),
        ])
        .collect()
}
