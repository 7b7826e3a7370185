//! Models in memory, for tests and benches of deltas.
#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use thermocline_datasets::{
    Activation, Architecture, Checkpoint, Error, ModelConfig, Result, SourceDtype, TensorInfo, architectures,
};
use xxhash_rust::xxh3::Xxh3;

/// bf16 bits by tensor; vectors too.
#[derive(Clone)]
pub struct Memory {
    pub config: ModelConfig,
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<u16>)>,
    pub f32_tensor: Option<String>,
    pub template: Option<String>,
}

pub fn config(hidden: usize, ffn: usize, n_layers: usize) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        hidden_size: hidden,
        intermediate_size: ffn,
        n_layers,
        n_heads: 2,
        n_kv_heads: 1,
        head_dim: 4,
        vocab_size: 11,
        max_context: 64,
        rms_norm_eps: 1e-5,
        rope_theta: 10000.0,
        tie_word_embeddings: true,
        qkv_bias: false,
        activation: Activation::Silu,
        bos_token_id: None,
        eos_token_ids: vec![1],
    }
}

impl Memory {
    /// Tensors filled by `bits(tensor number, element)`.
    pub fn new(config: ModelConfig, mut bits: impl FnMut(usize, usize) -> u16) -> Self {
        let specs = architectures::tensors(&config).into_iter().enumerate();
        let tensors = specs.map(|(i, spec)| {
            let n = spec.shape.iter().product();
            (spec.name, (spec.shape, (0..n).map(|j| bits(i, j)).collect()))
        });
        Self { tensors: tensors.collect(), config, f32_tensor: None, template: None }
    }

    pub fn bits(&self, name: &str) -> &[u16] {
        &self.tensors[name].1
    }

    /// Changes elements of every tensor: `change(bits)` for those that `picks` says.
    pub fn changed(&self, mut change: impl FnMut(u16) -> u16) -> Self {
        let mut out = self.clone();
        out.tensors.values_mut().flat_map(|(_, bits)| bits.iter_mut()).for_each(|b| *b = change(*b));
        out
    }
}

impl Checkpoint for Memory {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn path(&self) -> &Path {
        Path::new("memory")
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let (shape, bits) = self.tensors.get(name)?;
        let dtype = if self.f32_tensor.as_deref() == Some(name) { SourceDtype::F32 } else { SourceDtype::Bf16 };
        Some(TensorInfo { shape: shape.clone(), dtype, n_bytes: 2 * bits.len() as u64 })
    }

    fn load_rows(&self, name: &str, rows: Range<usize>) -> Result<Vec<f32>> {
        let (shape, bits) = &self.tensors[name];
        let columns: usize = shape[1..].iter().product();
        let bits = &bits[rows.start * columns..rows.end * columns];
        Ok(bits.iter().map(|b| f32::from_bits(u32::from(*b) << 16)).collect())
    }

    fn digest(&self) -> Result<String> {
        let mut hash = Xxh3::new();
        self.tensors.values().for_each(|(_, bits)| bits.iter().for_each(|b| hash.update(&b.to_le_bytes())));
        Ok(format!("{:032x}", hash.digest128()))
    }

    fn tokenizer_json(&self) -> Result<String> {
        Err(Error::Tokenizer { reason: "none".into() })
    }

    fn chat_template(&self) -> Option<String> {
        self.template.clone()
    }
}
