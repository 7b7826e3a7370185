//! Writers of tiny models with random weights: test support for every crate, and raw material for demos.
//!
//! The same [`TinyModel`] and seed always give the same weights, as a Hugging Face folder or as a GGUF file, so a
//! test can compare the two readers, or a split with what it was made from. Weights are exact in bf16.
//! Gate rows lean against a direction that every embedding shares, each by a different amount, so that some neurons
//! fire often and others seldom, as in trained models.

mod folder;
mod gguf;
mod vocabulary;
mod weights;

pub use folder::{tiny_config_json, write_tiny_safetensors};
pub use gguf::{GgufBuilder, RawGgufTensor, TinyGgufType, quantize_q8_0, tiny_gguf, write_tiny_gguf};
pub use vocabulary::{tiny_merges, tiny_tokenizer_json, tiny_tokens};
pub use weights::{TinyTensor, tiny_tensors};

use crate::{Activation, Architecture, ModelConfig};

/// The shape of a tiny model.
#[derive(Debug, Clone, PartialEq)]
pub struct TinyModel {
    /// Which family.
    pub architecture: Architecture,
    /// Width of the residual stream; `n_heads * head_dim` may differ from it.
    pub hidden_size: usize,
    /// Feed-forward neurons in a layer.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Width of a head, even.
    pub head_dim: usize,
    /// Rows of the embedding, at least 259 (256 bytes and three special tokens).
    pub vocab_size: usize,
    /// The feed-forward nonlinearity.
    pub activation: Activation,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
}

impl Default for TinyModel {
    fn default() -> Self {
        Self {
            architecture: Architecture::Llama,
            hidden_size: 64,
            intermediate_size: 192,
            n_layers: 2,
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 16,
            vocab_size: 300,
            activation: Activation::Silu,
            tie_word_embeddings: true,
        }
    }
}

impl TinyModel {
    /// The configuration that a reader must find in the files.
    pub fn config(&self) -> ModelConfig {
        ModelConfig {
            architecture: self.architecture,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            n_layers: self.n_layers,
            n_heads: self.n_heads,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            vocab_size: self.vocab_size,
            max_context: 512,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            tie_word_embeddings: self.tie_word_embeddings,
            qkv_bias: self.architecture == Architecture::Qwen2,
            activation: self.activation,
            bos_token_id: None,
            eos_token_ids: vec![0, 2],
        }
    }
}
