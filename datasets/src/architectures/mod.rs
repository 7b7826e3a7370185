//! What the families of decoders need from a checkpoint. One file states one family: its names in `config.json` and
//! in GGUF, its tensors with their expected shapes, and its quirks. A new family is one more file, one line in
//! [`FAMILIES`] and one variant of [`Architecture`].

mod llama;
mod qwen2;

use crate::{Architecture, ModelConfig};

/// What a tensor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// Token embeddings, `[vocab_size, hidden_size]`.
    Embedding,
    /// The output head, `[vocab_size, hidden_size]`.
    Head,
    /// An RMSNorm's weights, `[hidden_size]`.
    Norm,
    /// The query projection's bias.
    QueryBias,
    /// The key projection's bias.
    KeyBias,
    /// The value projection's bias.
    ValueBias,
    /// The query projection, `[n_heads * head_dim, hidden_size]`.
    Query,
    /// The key projection, `[n_kv_heads * head_dim, hidden_size]`.
    Key,
    /// The value projection, as the key's.
    Value,
    /// The attention's output projection, `[hidden_size, n_heads * head_dim]`.
    Output,
    /// The gate projection, `[intermediate_size, hidden_size]`.
    Gate,
    /// The up projection, as the gate's.
    Up,
    /// The down projection, `[hidden_size, intermediate_size]`.
    Down,
}

impl Role {
    /// Whether the rows are those of query or key heads, which some GGUF files hold in another order.
    pub fn is_rotated(self) -> bool {
        matches!(self, Role::Query | Role::Key | Role::QueryBias | Role::KeyBias)
    }
}

/// A tensor that a model of a given configuration must have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Canonical (Hugging Face) name.
    pub name: String,
    /// Name in a GGUF file.
    pub gguf_name: String,
    /// Canonical shape, `[rows, columns]` or `[n]`.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: Role,
}

/// One family of decoders.
#[derive(Debug)]
pub struct Family {
    /// Which one.
    pub architecture: Architecture,
    /// Values of `architectures` in `config.json` that mean this family.
    pub hf_classes: &'static [&'static str],
    /// Value of `general.architecture` in GGUF.
    pub gguf_name: &'static str,
    /// Whether q, k and v have biases unless the configuration says otherwise.
    pub qkv_bias: bool,
    /// Whether GGUF files hold query and key rows interleaved for the other form of the rotary embedding.
    pub gguf_interleaves_qk: bool,
    /// Tensors of one layer: name and GGUF name without their prefixes, shape, role.
    pub layer: fn(&ModelConfig) -> Vec<LayerTensor>,
}

/// A tensor of one layer, without the layer's prefix: canonical suffix, GGUF suffix, shape, role.
pub type LayerTensor = (&'static str, &'static str, Vec<usize>, Role);

/// Every family.
pub const FAMILIES: &[&Family] = &[&llama::FAMILY, &qwen2::FAMILY];

/// The family of an architecture.
pub fn family(architecture: Architecture) -> &'static Family {
    match architecture {
        Architecture::Llama => &llama::FAMILY,
        Architecture::Qwen2 => &qwen2::FAMILY,
    }
}

/// Every tensor that a model of this configuration must have, in the model's own order: embedding, layers, final
/// norm, head (unless tied).
pub fn tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    let mut specs = vec![TensorSpec {
        name: "model.embed_tokens.weight".into(),
        gguf_name: "token_embd.weight".into(),
        shape: vec![config.vocab_size, config.hidden_size],
        role: Role::Embedding,
    }];
    let layer = (family(config.architecture).layer)(config);
    for index in 0..config.n_layers {
        specs.extend(layer.iter().map(|(name, gguf_name, shape, role)| TensorSpec {
            name: format!("model.layers.{index}.{name}"),
            gguf_name: format!("blk.{index}.{gguf_name}"),
            shape: shape.clone(),
            role: *role,
        }));
    }
    specs.push(TensorSpec {
        name: "model.norm.weight".into(),
        gguf_name: "output_norm.weight".into(),
        shape: vec![config.hidden_size],
        role: Role::Norm,
    });
    if !config.tie_word_embeddings {
        specs.push(TensorSpec {
            name: "lm_head.weight".into(),
            gguf_name: "output.weight".into(),
            shape: vec![config.vocab_size, config.hidden_size],
            role: Role::Head,
        });
    }
    specs
}
