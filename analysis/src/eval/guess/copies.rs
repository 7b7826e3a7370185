//! Gate and up rows in few bits, with the shapes of the rows themselves.
//!
//! Signs alone are as in XNOR-Net (arXiv 1603.05279, section 3.1): of the least squared error is a row's mean magnitude.

use super::{Cost, Guess, Seen};
use crate::Result;
use rayon::prelude::*;
use thermocline_calibrate::dense::{DenseLayer, products};
use thermocline_calibrate::predictor::expected_magnitude;
use thermocline_split::{CopyBits, Feedback, RowCopy};

/// Bytes of a number that is known of each neuron or row.
const NUMBER: usize = size_of::<f32>();

/// Copies of a layer's gate and up rows.
pub(super) struct Copies {
    gate: RowCopy,
    up: RowCopy,
    down_norm: Vec<f32>,
    /// Bytes of the numbers that are kept of each neuron.
    neuron_bytes: usize,
}

impl Copies {
    /// Signs, with a scale a row; nothing is known of their errors.
    pub(super) fn signs(layer: &DenseLayer, down_norm: &[f32]) -> Result<Self> {
        let hidden = layer.hidden_size();
        let [gate, up] = layer.with_gate_up(|gate, up| [gate, up].map(|rows| signs_of(rows, hidden)))?;
        Ok(Self { gate, up, down_norm: down_norm.to_vec(), neuron_bytes: NUMBER })
    }

    /// Rounded with feedback, which knows the standard deviation of each row's error.
    pub(super) fn rounded(layer: &DenseLayer, down_norm: &[f32], feedback: &Feedback, bits: CopyBits) -> Result<Self> {
        let [gate, up] = layer.with_gate_up(|gate, up| [gate, up].map(|rows| feedback.copy(bits, rows)))?;
        Ok(Self { gate: gate?, up: up?, down_norm: down_norm.to_vec(), neuron_bytes: 3 * NUMBER })
    }
}

/// Each row's signs times its mean magnitude, of `rows [n_rows, columns]`.
fn signs_of(rows: &[f32], columns: usize) -> RowCopy {
    let signs = rows.par_chunks(columns).flat_map_iter(|row| {
        let scale = row.iter().map(|w| w.abs()).sum::<f32>() / columns as f32;
        row.iter().map(move |w| scale.copysign(*w))
    });
    let errors = vec![0.0; rows.len() / columns];
    RowCopy { rows: signs.collect(), errors, row_bytes: columns.div_ceil(8) + NUMBER }
}

impl Guess for Copies {
    /// The expected magnitude of what each neuron gives, or what its copy gives where nothing is known of its error.
    fn scores(&self, seen: &Seen<'_>) -> Result<Vec<f32>> {
        let (ffn, activation) = (self.down_norm.len(), seen.layer.activation());
        let product = |copy: &RowCopy| products(seen.input, &copy.rows, copy.rows.len() / ffn);
        let (mut scores, up) = (product(&self.gate)?, product(&self.up)?);
        scores.par_chunks_mut(ffn).zip(up.par_chunks(ffn)).for_each(|(scores, up)| {
            for (i, (score, up)) in scores.iter_mut().zip(up).enumerate() {
                let sd = [&self.gate, &self.up].map(|copy| copy.errors[i]);
                *score = expected_magnitude(activation, *score, *up, sd[0], sd[1]) * self.down_norm[i];
            }
        });
        Ok(scores)
    }

    fn cost(&self) -> Cost {
        let row_bytes = self.gate.row_bytes + self.up.row_bytes;
        let bytes = self.down_norm.len() * (row_bytes + self.neuron_bytes);
        Cost { bytes: bytes as f64, multiply_adds: (self.gate.rows.len() + self.up.rows.len()) as f64 }
    }
}
