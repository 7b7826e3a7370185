//! Which rows of a neuron are read, one by one, where its sketch stands for those that are not.
//!
//! Reading a row spares an expected squared error of the layer's output ([`Sketch::row_costs`]). All rows are decided on by the sketch
//! alone, before any is read, so that an engine can ask for all of them at once. A row is read where its cost reaches the layer's
//! least one ([`thermocline_split::GradedThresholds`]).

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use thermocline_datasets::Activation;
use thermocline_split::{ALL_ROWS, DOWN_ROW, GATE_ROW, Sketch, UP_ROW};

/// What of the neurons' rows was read, at the positions where not all were.
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
}

impl RowsRead {
    /// From the gate, up and down rows that were read, of `n_neurons` each.
    pub(crate) fn new(read: [u64; 3], n_neurons: u64) -> Self {
        let [gate, up, down] = read.map(|n| n as f64 / n_neurons.max(1) as f64);
        Self { gate, up, down, bytes: (gate + up + down) / 3.0 }
    }
}

/// How the rows of a layer's neurons are chosen.
pub(crate) struct RowRule<'a> {
    pub sketch: &'a Sketch,
    pub activation: Activation,
    /// The cost from which a row is read.
    pub least: f32,
    /// Whether rows are never read alone.
    pub whole: bool,
    /// Each neuron's place in the split's order, `[n_neurons]`.
    pub places: &'a [u32],
    /// Neurons before this place are read whole.
    pub n_always: usize,
}

impl RowRule<'_> {
    fn of(&self, i: usize, sketched: (f32, f32)) -> u8 {
        if (self.places[i] as usize) < self.n_always {
            return ALL_ROWS;
        }
        self.sketch.rows_to_read(self.activation, i, sketched, self.least, self.whole)
    }

    /// For tokens with these gate and up products, `[n_tokens, n_neurons]` each, by the sketch and by the rows: activations for the
    /// neurons' own down rows, which take the place of the second gates, and for the sketch's, which take that of the second ups, 0
    /// for the others each; and how many gate, up and down rows are read.
    pub(crate) fn apply(&self, [gate, up]: [&[f32]; 2], [own, sketched]: [&mut [f32]; 2]) -> [u64; 3] {
        let n = self.places.len();
        let tokens =
            own.par_chunks_mut(n).zip(sketched.par_chunks_mut(n)).zip(gate.par_chunks(n).zip(up.par_chunks(n)));
        let counts = tokens.map(|((own, sketched), (gate, up))| {
            let mut counts = [0u64; 3];
            for i in 0..n {
                let rows = self.of(i, (gate[i], up[i]));
                let product = |row: u8, exact: f32, guess: f32| if rows & row > 0 { exact } else { guess };
                let [gate, up] = [product(GATE_ROW, own[i], gate[i]), product(UP_ROW, sketched[i], up[i])];
                let h = self.activation.apply(gate, up);
                (own[i], sketched[i]) = if rows & DOWN_ROW > 0 { (h, 0.0) } else { (0.0, h) };
                let of_kind = [GATE_ROW, UP_ROW, DOWN_ROW].map(|row| u64::from(rows & row > 0));
                counts.iter_mut().zip(of_kind).for_each(|(count, n)| *count += n);
            }
            counts
        });
        counts.reduce(|| [0; 3], |a, b| std::array::from_fn(|part| a[part] + b[part]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use thermocline_datasets::Random;

    const N: usize = 600;

    fn sketch() -> Sketch {
        let mut random = Random::new(7);
        let mut values = |scale: f32| -> Vec<f32> { (0..N).map(|_| scale * (0.1 + random.uniform())).collect() };
        Sketch {
            gate_sd: values(0.3),
            up_sd: values(0.2),
            down_norm: values(1.0),
            down_error: values(0.3),
            ..Sketch::default()
        }
    }

    /// The formulas written out once more, in f64 and for SiLU alone.
    #[test]
    fn rows_are_read_where_their_costs_reach_the_least() {
        let (sketch, mut random) = (sketch(), Random::new(3));
        let mut normal = || -> Vec<f32> { (0..N).map(|_| random.normal()).collect() };
        let (gate, up, exact_gate, exact_up) = (normal(), normal(), normal(), normal());
        let places: Vec<u32> = (0..N as u32).rev().collect();
        let n_always = 50;
        for (least, whole) in [(0.05, false), (0.05, true), (0.0, false)] {
            let rule =
                RowRule { sketch: &sketch, activation: Activation::Silu, least, whole, places: &places, n_always };
            let (mut own, mut sketched) = (exact_gate.clone(), exact_up.clone());
            let read = rule.apply([&gate, &up], [&mut own, &mut sketched]);
            let mut counts = [0u64; 3];
            for i in 0..N {
                let [gate_sd, up_sd, norm, error] =
                    [&sketch.gate_sd, &sketch.up_sd, &sketch.down_norm, &sketch.down_error].map(|v| f64::from(v[i]));
                let (g, u) = (f64::from(gate[i]), f64::from(up[i]));
                let sigma = 1.0 / (1.0 + (-g).exp());
                let (v, slope) = (g * sigma, sigma * (1.0 + g * (1.0 - sigma)) * gate_sd);
                let up_square = u * u + up_sd * up_sd;
                let costs = [
                    (slope * norm).powi(2) * up_square,
                    (v * up_sd * norm).powi(2),
                    (v * v + slope * slope) * up_square * error * error,
                ];
                let least = f64::from(least).powi(2);
                // The vector code's exponential is within 3e-5: costs that are that near decide nothing here.
                if least > 0.0 && costs.iter().any(|cost| (cost / least - 1.0).abs() < 1e-3) {
                    let of = rule.of(i, (gate[i], up[i]));
                    counts.iter_mut().enumerate().for_each(|(k, n)| *n += u64::from(of >> k & 1));
                    continue;
                }
                let mut rows = costs.map(|cost| cost > least);
                if i >= N - n_always || (whole && rows.contains(&true)) {
                    rows = [true; 3];
                }
                counts.iter_mut().zip(rows).for_each(|(n, read)| *n += u64::from(read));
                let g = if rows[0] { exact_gate[i] } else { gate[i] };
                let u = if rows[1] { exact_up[i] } else { up[i] };
                let h = Activation::Silu.apply(g, u);
                assert_eq!((own[i], sketched[i]), if rows[2] { (h, 0.0) } else { (0.0, h) }, "{i}");
            }
            assert_eq!(read, counts);
            let all = read == [N as u64; 3];
            assert!(if least == 0.0 { all } else { !all && read.iter().all(|n| *n > 60) }, "{read:?}");
            assert!(!whole || (read[0] == read[1] && read[1] == read[2]));
        }
    }

    /// A product that is no number says nothing, so the neuron is exact.
    #[test]
    fn what_nothing_is_known_of_is_read() {
        let sketch = sketch();
        for products in [(f32::NAN, 1.0), (1.0, f32::NAN), (f32::INFINITY, 1.0), (1.0, f32::NEG_INFINITY)] {
            for activation in [Activation::Silu, Activation::Relu, Activation::Drelu] {
                let rows = sketch.rows_to_read(activation, 0, products, 1e6, false);
                assert_eq!(rows, ALL_ROWS, "{activation:?} {products:?}");
            }
        }
    }
}
