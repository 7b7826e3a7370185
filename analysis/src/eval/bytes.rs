//! What a token reads of a model's layers under a mask.

use super::Mask;
use super::input_costs::{InputBytes, weights_of_input};
use crate::Result;
use thermocline_datasets::{Checkpoint, ModelConfig};
use thermocline_split::{Split, TensorFile};

/// Bytes of all layers' weights. Embedding and head are left out: every method reads the same of them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LayerBytes {
    attention: f64,
    neurons: f64,
    predictors: f64,
    sketches: f64,
    /// What sketches leave of the neurons' rows, if that is what single rows are read from.
    residuals: Option<f64>,
    /// What shares are of.
    whole: f64,
}

impl LayerBytes {
    /// As `split` stores them; without one, 16 bits a weight.
    pub(crate) fn of(model: &dyn Checkpoint, split: Option<&Split>) -> Result<Self> {
        let Some(split) = split else {
            let [attention, neurons] = n_weights(model.config()).map(|n| 2.0 * n);
            let whole = attention + neurons;
            return Ok(Self { attention, neurons, predictors: 0.0, sketches: 0.0, residuals: None, whole });
        };
        let of_layers = |m: &&thermocline_split::StoredMatrix<'_>| m.entry().name.starts_with("model.layers.");
        let matrices = split.matrices()?;
        let attention = matrices.iter().filter(of_layers).map(|m| m.bytes()).sum::<u64>() as f64;
        let neurons = split.layers().iter().map(|l| l.trimmed_bytes(0..l.n_chunks())).sum::<usize>() as f64;
        let used = |name: &str| !name.ends_with(".ahead");
        let predictors = split.predictors().tensors().iter().filter(|t| used(&t.name)).map(|t| t.bytes).sum::<u64>();
        let sketches = split.sketches().map_or(0, TensorFile::data_bytes);
        let residuals = split.residuals().map(|file| file.data_bytes() as f64);
        let (predictors, sketches, whole) = (predictors as f64, sketches as f64, attention + neurons);
        Ok(Self { attention, neurons, predictors, sketches, residuals, whole })
    }

    /// With shares of what `other` has.
    pub(crate) fn relative_to(self, other: &Self) -> Self {
        Self { whole: other.whole, ..self }
    }

    /// What one input of each group of matrices makes a token read.
    pub(crate) fn of_inputs(&self, config: &ModelConfig) -> InputBytes {
        let [of_attention, of_neurons] = n_weights(config);
        let (attention, neurons) = (self.attention / of_attention, self.neurons / of_neurons);
        let [qkv, output, gate_up, down] = weights_of_input(config).map(|n| n as f64);
        [qkv * attention, output * attention, gate_up * neurons, down * neurons]
    }

    /// The share of everything that `read` bytes are.
    pub(crate) fn share_of(&self, read: f64) -> f64 {
        read / self.whole
    }

    /// What the predictors or sketches that `mask` asks take, relative to everything; `None` if it asks none.
    pub(crate) fn chooser_share(&self, mask: Mask) -> Option<f64> {
        let asked = if mask.asks_sketch() { (1.0 - mask.always()) * self.sketches } else { self.predictors };
        (mask.asks_predictor() || mask.asks_sketch()).then(|| self.share_of(asked))
    }

    /// What a mask reads that asks the sketches of those neurons that are not `always` computed, and reads this share of all
    /// neurons' bytes, relative to everything.
    pub(crate) fn graded_share(&self, always: f64, of_neurons: f64) -> f64 {
        self.share_of(self.attention + (1.0 - always) * self.sketches + of_neurons * self.neurons)
    }

    /// The same of a mask that reads single rows.
    pub(crate) fn graded_rows_share(&self, always: f64, of_neurons: f64) -> f64 {
        let read = always * self.neurons + (of_neurons - always) * self.residuals.unwrap_or(self.neurons);
        self.share_of(self.attention + (1.0 - always) * self.sketches + read)
    }

    /// What a mask reads whose guess takes `asked` bytes and that computes this share of the neurons, relative to everything.
    pub(crate) fn guessed_share(&self, asked: f64, share: f64) -> f64 {
        self.share_of(self.attention + asked + share * self.neurons)
    }

    /// What `mask` reads, relative to everything; where thresholds choose, as if they left the share that was asked for.
    pub(crate) fn share(&self, mask: Mask) -> Option<f64> {
        let read = match mask {
            Mask::Dense => self.attention + self.neurons,
            Mask::Exact => return None,
            Mask::Oracle(share) | Mask::OracleH(share) => self.attention + share * self.neurons,
            Mask::Predicted(share) | Mask::PredictedAlike(share) => {
                self.attention + self.predictors + share * self.neurons
            }
            Mask::Graded { active, always, .. } => {
                return Some(self.graded_share(always, always + (1.0 - always) * active));
            }
            Mask::Cats(share) => self.attention + (1.0 + 2.0 * share) / 3.0 * self.neurons,
            Mask::Teal(share) | Mask::Wina(share) => share * (self.attention + self.neurons),
            // It depends on the text, or on the guess.
            Mask::Inputs(_) | Mask::GradedError(_) | Mask::Guessed(..) => return None,
        };
        Some(self.share_of(read))
    }
}

/// Weights of all layers: of attention, of neurons.
fn n_weights(c: &ModelConfig) -> [f64; 2] {
    let attention = c.hidden_size * c.head_dim * 2 * (c.n_heads + c.n_kv_heads);
    [attention, 3 * c.hidden_size * c.intermediate_size].map(|weights| (c.n_layers * weights) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sketches of those that are not always computed, and the rows of those that are and of the chosen ones.
    #[test]
    fn graded_masks_read_sketches_of_the_others() {
        let bytes = LayerBytes {
            attention: 2.0,
            neurons: 8.0,
            predictors: 1.0,
            sketches: 4.0,
            residuals: Some(4.0),
            whole: 10.0,
        };
        let share = |active, always| bytes.share(Mask::Graded { active, always, alike: false }).unwrap();
        assert!((share(0.25, 0.0) - 0.8).abs() < 1e-9);
        assert!((share(0.25, 0.5) - (2.0 + 2.0 + 5.0) / 10.0).abs() < 1e-9);
        assert!((share(0.25, 1.0) - 1.0).abs() < 1e-9);
        assert!((bytes.graded_rows_share(0.5, 0.75) - (2.0 + 2.0 + 4.0 + 1.0) / 10.0).abs() < 1e-9);
        assert_eq!(LayerBytes { residuals: None, ..bytes }.graded_rows_share(0.5, 0.75), share(0.5, 0.5));
        assert_eq!(bytes.chooser_share(Mask::Graded { active: 0.25, always: 0.5, alike: true }), Some(0.2));
        // What another model reads, of one that is twice as large.
        let twice = LayerBytes { whole: 20.0, ..bytes };
        let of_twice = bytes.relative_to(&twice);
        assert_eq!(of_twice.share(Mask::Dense), Some(0.5));
        assert_eq!(of_twice.share(Mask::Teal(0.5)), Some(0.25));
        assert_eq!(of_twice.chooser_share(Mask::Graded { active: 0.25, always: 0.5, alike: true }), Some(0.1));
    }
}
