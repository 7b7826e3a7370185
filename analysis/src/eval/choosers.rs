//! What a layer's neurons are chosen by, beside their own activations.

use super::Mask;
use crate::Result;
use rayon::prelude::*;
use thermocline_calibrate::dense::GatedNeurons;
use thermocline_calibrate::predictor::LowRank;
use thermocline_datasets::Activation;
use thermocline_split::{Sketch, Split};

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
        let sketch = if masks.iter().any(|m| m.asks_sketch()) { SketchedLayer::load(split, index)? } else { None };
        Ok(Self { predictor, sketch })
    }
}

/// A layer's sketch, decoded; neurons in the checkpoint's order.
pub(crate) struct SketchedLayer {
    sketch: Sketch,
    neurons: GatedNeurons,
    activation: Activation,
}

/// What a sketch says of tokens: `[n_tokens, n_neurons]` each.
pub(crate) struct Sketched {
    /// The error of leaving a neuron to its sketch, times the length of its down column: what neurons are chosen by.
    pub scores: Vec<f32>,
    /// The sketch's own activations.
    pub h: Vec<f32>,
}

impl SketchedLayer {
    fn load(split: &Split, index: usize) -> Result<Option<Self>> {
        let Some(stored) = split.sketch(index)? else { return Ok(None) };
        let (config, places) = (&split.manifest().config, split.layers()[index].places());
        let sketch = stored.in_order(&places);
        let rows = [0, 1, 2].map(|part| sketch.decoded(part, config.hidden_size));
        let neurons = GatedNeurons::new(rows, config.hidden_size)?;
        Ok(Some(Self { sketch, neurons, activation: config.activation }))
    }

    /// For the layer's normalised input, `[n_tokens, hidden_size]`.
    pub(crate) fn look(&self, input: &[f32]) -> Result<Sketched> {
        let [gate, up] = self.neurons.pre_activations(input)?;
        let n = self.sketch.n_neurons();
        let (mut scores, mut h) = (vec![0.0f32; gate.len()], vec![0.0f32; gate.len()]);
        let rows = scores.par_chunks_mut(n).zip(h.par_chunks_mut(n)).zip(gate.par_chunks(n).zip(up.par_chunks(n)));
        rows.for_each(|((scores, h), (gate, up))| {
            for i in 0..n {
                (scores[i], h[i]) = self.sketch.judge(self.activation, i, gate[i], up[i]);
            }
        });
        Ok(Sketched { scores, h })
    }

    /// Adds what the sketch gives for `h [n_tokens, n_neurons]` to `x [n_tokens, hidden_size]`.
    pub(crate) fn add(&self, x: &mut [f32], h: Vec<f32>) -> Result<()> {
        Ok(self.neurons.output(x, h)?)
    }
}
