use crate::{Result, limits};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A family of decoders; each differs from the others by what this crate's `architectures` folder says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// Llama, Mistral, SmolLM and other decoders of that shape.
    Llama,
    /// Qwen2 and Qwen2.5: Llama with biases in the query, key and value projections.
    Qwen2,
}

/// The nonlinearity of a gated feed-forward layer, `h = act(g . x) * (u . x)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// `silu(g) * u` (SwiGLU).
    Silu,
    /// `relu(g) * u` (ReGLU).
    Relu,
    /// `relu(g) * relu(u)` (dReLU, arXiv 2406.05955).
    Drelu,
}

impl Activation {
    /// The neuron's activation `h` from its two pre-activations.
    #[inline]
    pub fn apply(self, gate: f32, up: f32) -> f32 {
        match self {
            Activation::Silu => gate / (1.0 + (-gate).exp()) * up,
            Activation::Relu => gate.max(0.0) * up,
            Activation::Drelu => gate.max(0.0) * up.max(0.0),
        }
    }

    /// Whether most activations are exactly zero, so that skipping them is exact.
    pub fn is_sparse(self) -> bool {
        !matches!(self, Activation::Silu)
    }
}

/// The shape and constants of a decoder, independent of the file that it came from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Which family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Feed-forward neurons in a layer.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Longest context that the model was trained for, in tokens.
    pub max_context: usize,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f32,
    /// Base of the rotary embedding (rotate-half form on whole heads).
    pub rope_theta: f32,
    /// Whether `lm_head.weight` is `model.embed_tokens.weight`.
    pub tie_word_embeddings: bool,
    /// Whether q, k and v projections have biases.
    pub qkv_bias: bool,
    /// The feed-forward nonlinearity.
    pub activation: Activation,
    /// Token that starts a text, if the tokenizer adds one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Refuses sizes that no model has, or that do not fit each other, wherever they were read from.
    ///
    /// # Errors
    /// [`crate::Error::Corrupt`] with the field, for the file `path`.
    pub fn check(&self, path: &Path) -> Result<()> {
        limits::check(self, path, |field| format!("config.{field}"))
    }
}
