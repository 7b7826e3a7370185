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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::eval::guess::tests::{assert_near, dot, layers, noise};

    const N: usize = 9;

    fn scores(copies: &Copies, layer: &DenseLayer, input: &[f32]) -> Vec<f32> {
        copies.scores(&Seen { layer, input, earlier: &[], given: &[] }).unwrap()
    }

    #[test]
    fn signs_are_scored_by_what_they_give() {
        let layer = layers(1).remove(0);
        let (hidden, norms) = (layer.hidden_size(), layer.down_norms().unwrap());
        let input = noise(N * hidden, 4);
        let signs = Copies::signs(&layer, &norms).unwrap();
        let product = |rows: &[f32], i: usize, x: &[f32]| {
            let row = &rows[i * hidden..(i + 1) * hidden];
            let mean = row.iter().map(|w| w.abs()).sum::<f32>() / hidden as f32;
            row.iter().zip(x).map(|(w, x)| if *w < 0.0 { -x } else { *x }).sum::<f32>() * mean
        };
        let wanted = layer.with_gate_up(|gate, up| {
            let of =
                |x: &[f32], i: usize| layer.activation().apply(product(gate, i, x), product(up, i, x)).abs() * norms[i];
            input.chunks_exact(hidden).flat_map(|x| (0..norms.len()).map(move |i| of(x, i))).collect::<Vec<f32>>()
        });
        assert_near(&scores(&signs, &layer, &input), &wanted.unwrap());
        // Per neuron two rows of 8 bytes and a scale, and its norm.
        assert_eq!(signs.cost(), Cost { bytes: 192.0 * 28.0, multiply_adds: 2.0 * 192.0 * 64.0 });
    }

    #[test]
    fn copies_are_scored_by_what_is_expected_of_them() {
        let layer = layers(1).remove(0);
        let (hidden, norms) = (layer.hidden_size(), layer.down_norms().unwrap());
        let input = noise(N * hidden, 4);
        let feedback = Feedback::of_inputs(&noise(400 * hidden, 5), hidden).unwrap();
        for (bits, row_bytes) in [(CopyBits::One, 11), (CopyBits::Two, 19), (CopyBits::Three, 27)] {
            let copies = Copies::rounded(&layer, &norms, &feedback, bits).unwrap();
            let row = |copy: &RowCopy, i: usize, x: &[f32]| dot(&copy.rows[i * hidden..(i + 1) * hidden], x);
            let of = |x: &[f32], i: usize| {
                let (g, u) = (row(&copies.gate, i, x), row(&copies.up, i, x));
                let (g_sd, u_sd) = (copies.gate.errors[i], copies.up.errors[i]);
                assert!(g_sd > 0.0 && u_sd > 0.0);
                // SiLU and its slope, in f64.
                let g = f64::from(g);
                let sigmoid = 1.0 / (1.0 + (-g).exp());
                let (value, slope) = (g * sigmoid, sigmoid * (1.0 + g * (1.0 - sigmoid)));
                let gate_square = value * value + (slope * f64::from(g_sd)).powi(2);
                let up_square = f64::from(u * u + u_sd * u_sd);
                ((gate_square * up_square).sqrt() * f64::from(norms[i])) as f32
            };
            let of = &of;
            let wanted: Vec<f32> =
                input.chunks_exact(hidden).flat_map(|x| (0..norms.len()).map(move |i| of(x, i))).collect();
            assert_near(&scores(&copies, &layer, &input), &wanted);
            let bytes = 192.0 * (2 * row_bytes + 12) as f64;
            assert_eq!(copies.cost(), Cost { bytes, multiply_adds: 2.0 * 192.0 * 64.0 });
        }
    }
}
