//! One layer of a planted model: bundles to the disk, piece by piece, and with them predictor, statistics and sketch.

use super::rows::Row;
use super::sketch::LayerSketch;
use super::{BUNDLE, CHUNK_NEURONS, FACTOR};
use crate::SketchForm;
use crate::content::Content;
use crate::error::Result;
use crate::pack_layer::{FACTORS, PackedLayer};
use crate::partial::Partial;
use crate::plane_file::{Place, PlaneWriter};
use half::f16;
use thermocline_datasets::Random;
use thermocline_datasets::planted::{PlantedModel, PlantedNeuron};
use thermocline_kernels::{BundleLayout, Encoding, GROUP};

/// Bundles that are written at a time: a few megabytes, which stay in a core's cache until they are.
const PIECE_NEURONS: usize = 128;
/// Digits of a threshold, to the base 16, in the predictor; for each domain.
const DIGITS: usize = 3;
/// The other channels of their group read the token's name: noise.
const NOISE_CHANNELS: usize = GROUP - 2 * DIGITS;
/// Standard deviation of a random code, -8..=7 with equal chances.
const RANDOM_CODE_SD: f32 = 4.636_809;

/// Rank of a planted model's predictors: the pattern, and one group for thresholds and noise.
pub(super) fn rank(model: &PlantedModel) -> usize {
    model.shape().pattern_channels + GROUP
}

/// Makes layer `l`; its file is left under the temporary name that [`Partial::finish_layer`] expects.
pub(super) fn write(
    model: &PlantedModel,
    l: usize,
    layout: &BundleLayout,
    sketch: Option<SketchForm>,
    partial: &Partial,
) -> Result<PackedLayer> {
    let (layer, n) = (model.layer(l), model.shape().intermediate_size);
    let order: Vec<u32> = (0..n as u32).collect();
    let mut rest = Rest::new(model, l);
    let mut sketch = sketch.map(|form| LayerSketch::new(model, form, l));
    let path = partial.temporary_layer(l, 0, 0);
    let place = Place { layer: l, neurons: 0..n, layer_neurons: n };
    let mut file = PlaneWriter::create(&path, place, Content::Bundles(*layout), &order, CHUNK_NEURONS)?;
    let mut piece = vec![0u8; PIECE_NEURONS.min(n) * layout.bundle_bytes()];
    for first in (0..n).step_by(PIECE_NEURONS) {
        let end = (first + PIECE_NEURONS).min(n);
        let piece = &mut piece[..(end - first) * layout.bundle_bytes()];
        for (place, bundle) in (first..end).zip(piece.chunks_exact_mut(layout.bundle_bytes())) {
            let neuron = layer.neuron(place);
            let random = &mut Random::at(model.seed(), &[BUNDLE, l as u64, place as u64]);
            let length = fill_bundle(model, &neuron, random, layout, bundle);
            rest.add(place, &neuron, length);
            if let Some(sketch) = &mut sketch {
                sketch.add(layout, bundle, length);
            }
        }
        file.stored(piece)?;
    }
    file.finish()?;
    let mut packed = rest.finish(order);
    if let Some(sketch) = sketch {
        packed.sketch = sketch.finish();
    }
    Ok(packed)
}

/// Fills a neuron's bundle; returns the length of its down column.
fn fill_bundle(
    model: &PlantedModel,
    neuron: &PlantedNeuron,
    random: &mut Random,
    layout: &BundleLayout,
    bundle: &mut [u8],
) -> f32 {
    let (channels, scales) = (model.shape().channels(), model.scales());
    // Codes are random where the scale is zero too: a byte of a planted model is as random as a trained one's.
    let mut gate = Row::new(layout.row_mut(bundle, 0));
    gate.randomize(random, 0.0);
    gate.put(channels.pattern.start, neuron.gate.iter().copied());
    gate.scale(channels.pattern, scales.gate);
    for (group, threshold) in channels.constants.into_iter().zip(neuron.threshold) {
        gate.put(group.start, [-1]);
        // At most eleven bits and a power of two: exact in an f16.
        let half = scales.gate * scales.pattern / (2.0 * scales.constant);
        gate.scale(group, half * threshold as f32);
    }
    Row::new(layout.row_mut(bundle, 1)).randomize(random, scales.up);
    // Down columns differ in length, as trained ones do.
    let scale = f16::from_f32(scales.down * (0.5 + random.uniform())).to_f32();
    let mut down = Row::new(layout.row_mut(bundle, 2));
    down.randomize(random, scale);
    down.scale(0..channels.free.start, 0.0);
    scale * (down.square_sum(channels.free) as f32).sqrt()
}

/// Everything of a layer but the bundles and their sketch, while it grows neuron by neuron.
struct Rest<'m> {
    model: &'m PlantedModel,
    l: usize,
    packed: PackedLayer,
    /// Lengths of the down columns.
    lengths: Vec<f32>,
}

impl<'m> Rest<'m> {
    fn new(model: &'m PlantedModel, l: usize) -> Self {
        let n = model.shape().intermediate_size;
        let packed = PackedLayer {
            predictor_factors: vec![0; 2 * n * FACTORS.row_stride(rank(model))],
            trace: vec![0; model.trace_tokens().len() * n.div_ceil(8)],
            ..PackedLayer::default()
        };
        Self { model, l, packed, lengths: Vec::with_capacity(n) }
    }

    fn add(&mut self, place: usize, neuron: &PlantedNeuron, length: f32) {
        let (model, packed) = (self.model, &mut self.packed);
        let (scales, width) = (model.scales(), model.shape().intermediate_size.div_ceil(8));
        let of_code = scales.gate * scales.pattern * scales.norm(self.l);
        let energy = neuron.mean_square as f32 * (of_code * length).powi(2);
        packed.activation_rate.extend_from_slice(&(neuron.rate as f32).to_le_bytes());
        packed.energy.extend_from_slice(&energy.to_le_bytes());
        for (row, token) in model.trace_tokens().enumerate() {
            let fires = neuron.fires(model.pattern(token), model.domain(token));
            packed.trace[row * width + place / 8] |= u8::from(fires) << (place % 8);
        }
        let (rank, stride) = (rank(model), FACTORS.row_stride(rank(model)));
        let rows = &mut packed.predictor_factors[2 * place * stride..2 * (place + 1) * stride];
        let (gate, up) = rows.split_at_mut(stride);
        let mut random = Random::at(model.seed(), &[FACTOR, self.l as u64, place as u64]);
        let noise = (0..NOISE_CHANNELS).map(|_| (random.next_u64() >> 60) as i8 - 8);
        let mut gate = Row::of_matrix(gate, rank);
        gate.put(0, neuron.gate.iter().copied());
        gate.put(neuron.gate.len(), neuron.threshold.into_iter().flat_map(digits).chain(noise));
        gate.scale(0..rank, scales.gate);
        // Up activations are not predicted: the score takes their standard deviation, which is 1.
        Row::of_matrix(up, rank).put(0, std::iter::repeat_n(0, rank));
        self.lengths.push(length);
    }

    fn finish(self, order: Vec<u32>) -> PackedLayer {
        let (scales, statistics) = (self.model.scales(), self.model.statistics());
        let noise = statistics.predictor_noise as f32;
        let gate_sd = noise * scales.gate * scales.pattern * scales.sum_sd * scales.norm(self.l);
        let n = order.len();
        let residuals = [gate_sd, 1.0].into_iter().flat_map(|sd| std::iter::repeat_n(sd, n));
        let neurons = residuals.chain(self.lengths).flat_map(f32::to_le_bytes).collect();
        PackedLayer {
            order,
            predictor_input: input(self.model, statistics.predictor_noise),
            predictor_ahead: input(self.model, statistics.foresight_noise),
            predictor_neurons: neurons,
            ..self.packed
        }
    }
}

/// Digits, lowest first, each in -8..=7, of minus a threshold (twice its value).
fn digits(threshold: i32) -> [i8; DIGITS] {
    let mut left = -threshold;
    std::array::from_fn(|_| {
        let digit = (left + 8).rem_euclid(16) - 8;
        left = (left - digit) / 16;
        digit as i8
    })
}

/// What the predictor reads, q8 `[rank, hidden]`: the pattern channels; each constant three times, for the digits; the
/// first channels of the token's name, as strongly as makes a noise of so many standard deviations of a gate row's sum.
fn input(model: &PlantedModel, noise: f64) -> Vec<u8> {
    let (hidden, channels, scales) = (model.shape().hidden_size, model.shape().channels(), model.scales());
    let unit = scales.pattern / (2.0 * scales.constant);
    let noise_sd = noise as f32 * scales.pattern * scales.sum_sd;
    let noise = noise_sd / (RANDOM_CODE_SD * (NOISE_CHANNELS as f32).sqrt());
    let digit = |start: usize| (0..DIGITS as i32).map(move |d| (start, unit * 16f32.powi(d)));
    let [first, second] = channels.constants.map(|group| digit(group.start));
    let names = channels.identity.take(NOISE_CHANNELS).map(|c| (c, noise));
    let reads = channels.pattern.map(|c| (c, 1.0)).chain(first).chain(second).chain(names);
    let stride = Encoding::Q8.row_stride(hidden);
    let mut out = vec![0u8; rank(model) * stride];
    for (row, (channel, weight)) in out.chunks_exact_mut(stride).zip(reads) {
        row[channel] = 1;
        let scale = hidden + channel / GROUP * 2;
        row[scale..scale + 2].copy_from_slice(&f16::from_f32(weight).to_le_bytes());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_hold_every_threshold() {
        for threshold in (-1909..=1909).step_by(2) {
            let value = digits(threshold).into_iter().rev().fold(0, |v, d| 16 * v + i32::from(d));
            assert_eq!(value, -threshold);
        }
    }
}
