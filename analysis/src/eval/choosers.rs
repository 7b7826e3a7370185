//! What a layer's neurons are chosen by, beside their own activations.

use super::Mask;
use crate::Result;
use rayon::prelude::*;
use thermocline_calibrate::dense::GatedNeurons;
use thermocline_calibrate::predictor::LowRank;
use thermocline_datasets::Activation;
use thermocline_kernels::unpack;
use thermocline_split::{Sketch, Split, residual_layout};

/// One layer's predictor and sketch, as far as some mask asks for them.
#[derive(Default)]
pub(crate) struct Choosers {
    /// With the lengths of the down columns.
    pub predictor: Option<(LowRank, Vec<f32>)>,
    pub sketch: Option<SketchedLayer>,
}

impl Choosers {
    /// Those of layer `index` that `masks` need; neurons in the checkpoint's order.
    pub(crate) fn load(split: Option<&Split>, masks: &[Mask], index: usize) -> Result<Self> {
        let Some(split) = split else { return Ok(Self::default()) };
        let predictor = masks.iter().any(|m| m.asks_predictor()).then(|| split.predictor(index)).transpose()?;
        let sketch =
            if masks.iter().any(|m| m.asks_sketch()) { SketchedLayer::load(split, index, true)? } else { None };
        Ok(Self { predictor, sketch })
    }
}

/// A layer's sketch, decoded; neurons in the checkpoint's order.
pub(crate) struct SketchedLayer {
    sketch: Sketch,
    neurons: GatedNeurons,
    /// The same with what the sketch leaves of them, if the split has that: the rows that are read, where single ones are.
    with_residuals: Option<GatedNeurons>,
    /// Each neuron's place in the split's order.
    places: Vec<u32>,
    activation: Activation,
    whole: bool,
}

/// What a sketch says of tokens: `[n_tokens, n_neurons]` each.
pub(crate) struct Sketched {
    /// The error of leaving a neuron to its sketch, times the length of its down column: what neurons are chosen by.
    pub scores: Vec<f32>,
    /// The sketch's own activations.
    pub h: Vec<f32>,
}

impl SketchedLayer {
    /// Layer `index`'s, if the split has sketches; with its residuals, if asked for and there are any.
    pub(crate) fn load(split: &Split, index: usize, residuals: bool) -> Result<Option<Self>> {
        let Some(stored) = split.sketch(index)? else { return Ok(None) };
        let (config, places) = (&split.manifest().config, split.layers()[index].places());
        let sketch = stored.in_order(&places);
        let rows = [0, 1, 2].map(|part| sketch.decoded(part));
        let with_residuals = match split.residuals().filter(|_| residuals) {
            Some(_) => Some(GatedNeurons::new(with_residuals(split, index, &places, &rows)?, config.hidden_size)?),
            None => None,
        };
        let neurons = GatedNeurons::new(rows, config.hidden_size)?;
        let whole = !split.layers()[index].bundles().has_plain_rows();
        let activation = config.activation;
        Ok(Some(Self { sketch, neurons, with_residuals, places, activation, whole }))
    }

    /// What it knows of each neuron, without the rows, where its errors of gate and up products are so many times as large.
    pub(crate) fn known(&self, error_factors: [f32; 2]) -> Sketch {
        let s = &self.sketch;
        let [gate_sd, up_sd, down_norm, down_error] =
            [&s.gate_sd, &s.up_sd, &s.down_norm, &s.down_error].map(|values| values.clone());
        let known = Sketch { gate_sd, up_sd, down_norm, down_error, ..Sketch::default() };
        known.with_errors_times(error_factors)
    }

    /// Its neurons with the residuals of their rows, if it was loaded with any.
    pub(crate) fn with_residuals(&self) -> Option<&GatedNeurons> {
        self.with_residuals.as_ref()
    }

    /// Whether rows are never read alone.
    pub(crate) fn is_whole(&self) -> bool {
        self.whole
    }

    /// What its neurons apply to gate and up products.
    pub(crate) fn activation(&self) -> Activation {
        self.activation
    }

    /// Each neuron's place in the split's order, `[n_neurons]`.
    pub(crate) fn places(&self) -> &[u32] {
        &self.places
    }

    /// Gate and up products for the layer's normalised input `[n_tokens, hidden_size]`, `[n_tokens, n_neurons]` each.
    pub(crate) fn pre_activations(&self, input: &[f32]) -> Result<[Vec<f32>; 2]> {
        Ok(self.neurons.pre_activations(input)?)
    }

    /// For the layer's normalised input, `[n_tokens, hidden_size]`; the first `n_always` neurons of the split's order, which are
    /// not asked, come before all others.
    pub(crate) fn look(&self, input: &[f32], n_always: usize) -> Result<Sketched> {
        let [gate, up] = self.pre_activations(input)?;
        let n = self.sketch.n_neurons();
        let (mut scores, mut h) = (vec![0.0f32; gate.len()], vec![0.0f32; gate.len()]);
        let rows = scores.par_chunks_mut(n).zip(h.par_chunks_mut(n)).zip(gate.par_chunks(n).zip(up.par_chunks(n)));
        rows.for_each(|((scores, h), (gate, up))| {
            for i in 0..n {
                (scores[i], h[i]) = self.sketch.judge(self.activation, i, gate[i], up[i]);
                if (self.places[i] as usize) < n_always {
                    scores[i] = f32::INFINITY;
                }
            }
        });
        Ok(Sketched { scores, h })
    }

    /// Adds what the sketch gives for `h [n_tokens, n_neurons]` to `x [n_tokens, hidden_size]`.
    pub(crate) fn add(&self, x: &mut [f32], h: Vec<f32>) -> Result<()> {
        Ok(self.neurons.output(x, h)?)
    }
}

/// Adds the residuals of layer `index` to its sketched `rows`, of neurons in the checkpoint's order, whose places in the split's these
/// are.
fn with_residuals(split: &Split, index: usize, places: &[u32], rows: &[Vec<f32>; 3]) -> Result<[Vec<f32>; 3]> {
    let hidden = split.manifest().config.hidden_size;
    let layout = residual_layout(hidden).expect("the width that sketches have");
    let mut bundles = vec![0; places.len() * layout.bundle_bytes()];
    split.read_residuals(index, 0, &mut bundles)?;
    let mut out = rows.clone();
    for (part, rows) in out.iter_mut().enumerate() {
        rows.par_chunks_exact_mut(hidden).zip(places).for_each(|(row, &place)| {
            let bundle = &bundles[place as usize * layout.bundle_bytes()..][..layout.bundle_bytes()];
            let mut residual = vec![0.0; hidden];
            unpack(layout.encoding(), layout.row(bundle, part), &mut residual);
            row.iter_mut().zip(residual).for_each(|(row, residual)| *row += residual);
        });
    }
    Ok(out)
}
