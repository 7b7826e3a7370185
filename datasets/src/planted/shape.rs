use crate::{Activation, Architecture, Error, ModelConfig, Result};
use std::ops::Range;

/// Columns that share a scale in the quantised encodings; every reserved range is whole groups.
const GROUP: usize = 32;

/// The sizes of a planted model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// What it is called on the command line.
    pub name: &'static str,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Feed-forward neurons in a layer.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Tokens.
    pub vocab_size: usize,
    /// Channels of the residual stream that say which neurons fire.
    pub pattern_channels: usize,
    /// Channels that say which token it is.
    pub identity_channels: usize,
}

impl Shape {
    /// All presets: Llama 2's sizes (34b: Code Llama's), and one for tests.
    pub const ALL: [Shape; 5] = [
        Shape::llama("70b", 8192, 28_672, 80, (64, 8)),
        Shape::llama("34b", 8192, 22_016, 48, (64, 8)),
        Shape::llama("13b", 5120, 13_824, 40, (40, 40)),
        Shape::llama("7b", 4096, 11_008, 32, (32, 32)),
        Shape {
            head_dim: 64,
            vocab_size: 1024,
            pattern_channels: 64,
            identity_channels: 64,
            ..Shape::llama("tiny", 256, 1024, 4, (4, 2))
        },
    ];

    const fn llama(
        name: &'static str,
        hidden_size: usize,
        intermediate_size: usize,
        n_layers: usize,
        (n_heads, n_kv_heads): (usize, usize),
    ) -> Shape {
        Shape {
            name,
            hidden_size,
            intermediate_size,
            n_layers,
            n_heads,
            n_kv_heads,
            head_dim: 128,
            vocab_size: 32_000,
            pattern_channels: 96,
            identity_channels: 256,
        }
    }

    /// The preset of that name.
    ///
    /// # Errors
    /// If there is none.
    pub fn named(name: &str) -> Result<Shape> {
        Self::ALL.into_iter().find(|shape| shape.name == name).ok_or_else(|| {
            let names = Self::ALL.map(|shape| shape.name).join(", ");
            Error::Planted { setting: "--planted", reason: format!("no shape {name:?}; there are {names}") }
        })
    }

    /// What [`super::PlantedModel::config`] tells a reader, with ReLU.
    pub(super) fn config(&self) -> ModelConfig {
        ModelConfig {
            architecture: Architecture::Llama,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            n_layers: self.n_layers,
            n_heads: self.n_heads,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            vocab_size: self.vocab_size,
            max_context: 4096,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            tie_word_embeddings: false,
            qkv_bias: false,
            activation: Activation::Relu,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        }
    }

    /// Where in the residual stream what lies.
    pub fn channels(&self) -> Channels {
        let pattern = 0..self.pattern_channels;
        let constants = [0, 1].map(|domain| {
            let start = pattern.end + domain * GROUP;
            start..start + GROUP
        });
        let identity = constants[1].end..constants[1].end + self.identity_channels;
        Channels { free: identity.end..self.hidden_size, pattern, constants, identity }
    }
}

/// The residual stream's channels by use. No layer writes to any but the free ones: attention's output rows and the
/// down columns are zero there, so that what the embedding put there arrives at every layer and at the head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Channels {
    /// The token's code, which the gate rows read.
    pub pattern: Range<usize>,
    /// One group for each domain; its first channel is constant in the tokens of that domain and zero in all others.
    pub constants: [Range<usize>; 2],
    /// The token's name, which the head reads.
    pub identity: Range<usize>,
    /// What attention and feed-forward layers write to.
    pub free: Range<usize>,
}
