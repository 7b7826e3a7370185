//! A random checkpoint in memory.
#![allow(dead_code, missing_docs, clippy::unwrap_used)]

use std::{collections::BTreeMap, ops::Range, path::Path};
use thermocline_datasets::{Activation, Architecture, Checkpoint, ModelConfig, Result, SourceDtype, TensorInfo};

pub struct RandomCheckpoint {
    pub config: ModelConfig,
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    pub digest: String,
}

/// Two layers, grouped heads, an intermediate size that fills neither a byte nor a block.
pub fn tiny_config(activation: Activation) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Qwen2,
        hidden_size: 24,
        intermediate_size: 150,
        n_layers: 3,
        n_heads: 6,
        n_kv_heads: 2,
        head_dim: 4,
        vocab_size: 50,
        max_context: 64,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        tie_word_embeddings: false,
        qkv_bias: true,
        activation,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
    }
}

impl RandomCheckpoint {
    pub fn new(config: ModelConfig, seed: u64) -> Self {
        let (hidden, ffn, c) = (config.hidden_size, config.intermediate_size, &config);
        let (q, kv) = (c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim);
        let mut shapes = vec![
            ("model.embed_tokens.weight".to_owned(), vec![c.vocab_size, hidden]),
            ("lm_head.weight".to_owned(), vec![c.vocab_size, hidden]),
            ("model.norm.weight".to_owned(), vec![hidden]),
        ];
        for layer in 0..c.n_layers {
            let mut add = |name: &str, shape: &[usize]| {
                shapes.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
            };
            add("input_layernorm.weight", &[hidden]);
            add("post_attention_layernorm.weight", &[hidden]);
            for (name, n) in [("q", q), ("k", kv), ("v", kv)] {
                add(&format!("self_attn.{name}_proj.weight"), &[n, hidden]);
                add(&format!("self_attn.{name}_proj.bias"), &[n]);
            }
            add("self_attn.o_proj.weight", &[hidden, q]);
            add("mlp.gate_proj.weight", &[ffn, hidden]);
            add("mlp.up_proj.weight", &[ffn, hidden]);
            add("mlp.down_proj.weight", &[hidden, ffn]);
        }
        let tensors = shapes
            .into_iter()
            .map(|(name, shape)| {
                let n = shape.iter().product::<usize>();
                let scale = 1.5 / (*shape.last().unwrap() as f32).sqrt();
                let value = |i: usize| {
                    let key = format!("{name}/{i}");
                    let hash = xxhash_rust::xxh3::xxh3_64_with_seed(key.as_bytes(), seed);
                    let uniform = (hash >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
                    if name.contains("norm") { 1.0 + 0.3 * uniform } else { uniform * scale * 1.7 }
                };
                let values = (0..n).map(value).collect();
                (name, (shape, values))
            })
            .collect();
        RandomCheckpoint { config, tensors, digest: format!("{seed:032x}") }
    }

    pub fn tensor(&self, name: &str) -> Vec<f64> {
        self.tensors[name].1.iter().map(|&v| f64::from(v)).collect()
    }
}

impl Checkpoint for RandomCheckpoint {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn path(&self) -> &Path {
        Path::new("random")
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let (shape, values) = self.tensors.get(name)?;
        Some(TensorInfo { shape: shape.clone(), dtype: SourceDtype::F32, n_bytes: 4 * values.len() as u64 })
    }

    fn load_rows(&self, name: &str, rows: Range<usize>) -> Result<Vec<f32>> {
        let (shape, values) = &self.tensors[name];
        let width: usize = shape[1..].iter().product();
        Ok(values[rows.start * width..rows.end * width].to_vec())
    }

    fn digest(&self) -> Result<String> {
        Ok(self.digest.clone())
    }

    fn tokenizer_json(&self) -> Result<String> {
        Ok(String::new())
    }

    fn chat_template(&self) -> Option<String> {
        None
    }
}

/// `n` token ids.
pub fn random_tokens(n: usize, vocab_size: usize, seed: u64) -> Vec<u32> {
    let hash = |i: usize| xxhash_rust::xxh3::xxh3_64_with_seed(&i.to_le_bytes(), seed);
    (0..n).map(|i| (hash(i) % vocab_size as u64) as u32).collect()
}
