//! The sketch of a planted layer, neuron by neuron as its bundles are made.

use crate::sketch::{Search, round_row, unit_scale};
use crate::{Sketch, SketchForm};
use thermocline_datasets::planted::PlantedModel;
use thermocline_kernels::{BundleLayout, Encoding, SKETCH_UNIT, SketchBits, unpack};

/// Sums that are added up side by side: one alone would wait for each addition.
const LANES: usize = 16;

/// A sketch while it grows.
pub(super) struct LayerSketch {
    sketch: Sketch,
    /// Mean squares of the layer's inputs, `[hidden]`.
    mean_squares: Vec<f32>,
    /// Columns in whole units that hold all of a gate row that is not zero.
    gate_columns: usize,
    /// The row that is being rounded, `[hidden]`.
    row: Vec<f32>,
}

impl LayerSketch {
    /// Of layer `l` in this form, without a neuron yet.
    pub(super) fn new(model: &PlantedModel, form: SketchForm, l: usize) -> Self {
        let (shape, hidden) = (model.shape(), model.shape().hidden_size);
        let n = shape.intermediate_size;
        let numbers = || Vec::with_capacity(n);
        let sketch = Sketch {
            form,
            rows: form.row_bytes(hidden).map(|row_bytes| Vec::with_capacity(n * row_bytes)),
            columns: (0..hidden as u32).collect(),
            gate_sd: numbers(),
            up_sd: numbers(),
            down_norm: numbers(),
            down_error: numbers(),
        };
        Self {
            sketch,
            mean_squares: model.scales().input_mean_squares(shape, l),
            gate_columns: shape.channels().identity.start.next_multiple_of(SKETCH_UNIT),
            row: vec![0.0; hidden],
        }
    }

    /// Adds a neuron; `length` is that of its down column.
    pub(super) fn add(&mut self, layout: &BundleLayout, bundle: &[u8], length: f32) {
        let lost = self.round(0, layout, bundle);
        self.sketch.gate_sd.push(self.lost_products(&lost));
        let lost = self.round(1, layout, bundle);
        self.sketch.up_sd.push(self.lost_products(&lost));
        let lost = self.round(2, layout, bundle);
        self.sketch.down_norm.push(length);
        self.sketch.down_error.push(dot(&lost, &lost).sqrt());
    }

    /// The layer's tensors as they are stored.
    pub(super) fn finish(self) -> [Vec<u8>; 5] {
        self.sketch.into_bytes()
    }

    /// Rounds row `part` of the bundle; returns what each weight loses.
    fn round(&mut self, part: usize, layout: &BundleLayout, bundle: &[u8]) -> Vec<f32> {
        let (bits, hidden) = (self.sketch.form.bits()[part], self.row.len());
        unpack(Encoding::Q4, layout.row(bundle, part), &mut self.row);
        let mut wished: Vec<f32> = if part == 0 {
            // The few units that are not zero are of a pattern, thresholds and zeros: their scales are searched.
            self.row[..self.gate_columns].chunks_exact(SKETCH_UNIT).map(|unit| unit_scale(bits, unit)).collect()
        } else {
            self.row.chunks_exact(SKETCH_UNIT).map(|unit| uniform_scale(bits, unit)).collect()
        };
        wished.resize(hidden / SKETCH_UNIT, 0.0);
        let rows = &mut self.sketch.rows[part];
        let start = rows.len();
        rows.resize(start + bits.row_bytes(hidden), 0);
        round_row(bits, &self.row, &wished, Search::Quick, &mut rows[start..])
    }

    /// Root mean square of the product of `lost` with the layer's inputs, over the vocabulary. Channels are taken for
    /// independent, and to be zero in the mean; of the two constants, which are not, one is zero at every token. So no product
    /// of two channels counts. What attention brings from other tokens is alike in neighbouring tokens, but not in channels.
    fn lost_products(&self, lost: &[f32]) -> f32 {
        let squares: Vec<f32> = lost.iter().map(|v| v * v).collect();
        dot(&squares, &self.mean_squares).sqrt()
    }
}

/// The scale for uniform weights, as a share of the one for normal weights of their root mean square, with the nearest levels column by
/// column. For random 4-bit codes no search does much better.
fn uniform_scale(bits: SketchBits, unit: &[f32]) -> f32 {
    const OF_NORMAL: f32 = 0.92;
    (dot(unit, unit) / unit.len() as f32).sqrt() * bits.normal_scale() * OF_NORMAL
}

/// `a . b`, of whole [`LANES`].
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0; LANES];
    for (a, b) in a.as_chunks::<LANES>().0.iter().zip(b.as_chunks::<LANES>().0) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use thermocline_datasets::Random;

    #[test]
    fn random_codes_need_no_search_for_a_scale() {
        let mut random = Random::new(4);
        let weights: Vec<f32> = (0..500 * SKETCH_UNIT).map(|_| (random.next_u64() >> 60) as f32 - 8.0).collect();
        for bits in [SketchBits::Two, SketchBits::Three] {
            let lost = |factor: f32| {
                let scale = |unit| factor * uniform_scale(bits, unit);
                let wished: Vec<f32> = weights.chunks_exact(SKETCH_UNIT).map(scale).collect();
                let mut bytes = vec![0; bits.row_bytes(weights.len())];
                let lost = round_row(bits, &weights, &wished, Search::Quick, &mut bytes);
                dot(&lost, &lost)
            };
            let searched =
                (70..120).step_by(5).map(|percent| lost(percent as f32 / 100.0)).fold(f32::INFINITY, f32::min);
            assert!(lost(1.0) < 1.03 * searched, "{bits:?}: {}, with a search {searched}", lost(1.0));
        }
    }
}
