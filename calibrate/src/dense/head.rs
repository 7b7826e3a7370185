use crate::{
    Result,
    dense::{
        linear::{Linear, load_checked, tensor},
        norm::rms_norm,
    },
    error::check_len,
};
use thermocline_datasets::Checkpoint;

/// The final norm and the output projection, `[vocab_size, hidden_size]`.
pub struct Head {
    norm: Vec<f32>,
    projection: Linear,
    eps: f32,
}

impl Head {
    /// Loads both as f32 (`4 * vocab_size * hidden_size` bytes); a tied head reads the embedding.
    ///
    /// # Errors
    /// If a tensor is missing, unreadable or of another shape than the configuration says.
    pub fn load(checkpoint: &dyn Checkpoint) -> Result<Self> {
        let config = checkpoint.config();
        let name = if config.tie_word_embeddings { "model.embed_tokens" } else { "lm_head" };
        Ok(Head {
            norm: load_checked(checkpoint, "model.norm.weight", config.hidden_size)?,
            projection: Linear::load(checkpoint, name, [config.vocab_size, config.hidden_size], false)?,
            eps: config.rms_norm_eps,
        })
    }

    /// Logits `[n, vocab_size]` of the last layer's outputs `x [n, hidden_size]`.
    ///
    /// A vocabulary can have 150,000 entries, 0.6 MB a position: pass a few hundred positions at a time.
    ///
    /// # Errors
    /// If `x` is not a whole number of rows.
    pub fn logits(&self, x: &[f32]) -> Result<Vec<f32>> {
        let hidden_size = self.norm.len();
        let n = x.len() / hidden_size;
        check_len("head input", x.len(), n * hidden_size)?;
        let normed = tensor(rms_norm(x, &self.norm, self.eps), &[n, hidden_size])?;
        let logits = self.projection.forward(&normed)?;
        Ok(logits.flatten_all()?.to_vec1()?)
    }

    /// Entries of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.projection.n_out()
    }
}
