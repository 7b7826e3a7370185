use super::{Array, GgufHeader, Value};
use crate::architectures::{FAMILIES, Family};
use crate::{Activation, Error, ModelConfig, Result, limits};
use std::path::Path;

/// The key by which a GGUF file says that its feed-forward layers are not SwiGLU: `relu` or `drelu`. The format has
/// no key of its own for that, so this one is ours.
pub const ACTIVATION_KEY: &str = "thermocline.hidden_act";

/// Tokens that end a turn or a text in the families that are supported, whatever the metadata lists.
const END_TOKENS: [&str; 5] = ["<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "</s>"];

/// The value of [`ACTIVATION_KEY`] for an activation; `None` for SwiGLU, which needs none.
pub fn activation_name(activation: Activation) -> Option<&'static str> {
    match activation {
        Activation::Silu => None,
        Activation::Relu => Some("relu"),
        Activation::Drelu => Some("drelu"),
    }
}

/// Typed access to the metadata of one architecture, with errors that name file and key.
pub struct Metadata<'a> {
    pub header: &'a GgufHeader,
    pub path: &'a Path,
}

impl<'a> Metadata<'a> {
    pub fn corrupt(&self, key: &str, reason: impl Into<String>) -> Error {
        Error::Corrupt { path: self.path.to_owned(), field: key.to_owned(), reason: reason.into() }
    }

    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.header.metadata.get(key)
    }

    fn typed<T>(&self, key: &str, wanted: &str, convert: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || self.corrupt(key, format!("is a {}, expected {wanted}", value.type_name()));
        convert(value).ok_or_else(wrong).map(Some)
    }

    pub fn size(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a size", |v| v.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    fn required_size(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.corrupt(key, "the key is missing"))
    }

    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        self.typed(key, "a float", Value::as_f32)
    }

    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", Value::as_bool)
    }

    pub fn str(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", Value::as_str)
    }

    pub fn token_id(&self, key: &str) -> Result<Option<u32>> {
        self.typed(key, "a token id", |v| v.as_u64().and_then(|n| u32::try_from(n).ok()))
    }

    pub fn strings(&self, key: &str) -> Result<Option<&'a [String]>> {
        self.typed(key, "an array of strings", |v| match v {
            Value::Array(Array::String(items)) => Some(items.as_slice()),
            _ => None,
        })
    }

    /// The family that the file belongs to.
    pub fn family(&self) -> Result<&'static Family> {
        let key = "general.architecture";
        let name = self.str(key)?.ok_or_else(|| self.corrupt(key, "the key is missing"))?;
        FAMILIES.iter().find(|f| f.gguf_name == name).copied().ok_or_else(|| {
            self.unsupported(
                format!("the architecture {name:?}"),
                format!("supported: {}", FAMILIES.iter().map(|f| f.gguf_name).collect::<Vec<_>>().join(", ")),
            )
        })
    }

    pub fn unsupported(&self, what: String, help: String) -> Error {
        Error::Unsupported { path: self.path.to_owned(), what, help }
    }

    /// The model's configuration, checked on its own and against the vocabulary and the embedding's rows.
    pub fn config(&self, family: &Family) -> Result<ModelConfig> {
        let key = |name: &str| format!("{}.{name}", family.gguf_name);
        self.refuse_variants(family)?;
        let hidden_size = self.required_size(&key("embedding_length"))?;
        let n_heads = self.required_size(&key("attention.head_count"))?;
        if n_heads == 0 {
            return Err(self.corrupt(&key("attention.head_count"), "0, expected at least 1"));
        }
        let default_head = hidden_size.checked_div(n_heads).filter(|d| d.checked_mul(n_heads) == Some(hidden_size));
        let head_dim = match self.size(&key("attention.key_length"))?.or(default_head) {
            Some(head_dim) => head_dim,
            None => {
                let reason = format!("{n_heads} heads do not divide the width {hidden_size}");
                return Err(self.corrupt(&key("attention.head_count"), reason));
            }
        };
        if head_dim == 0 {
            return Err(self.corrupt(&key("attention.key_length"), "0, expected at least 2"));
        }
        for other in ["attention.value_length", "rope.dimension_count"] {
            if let Some(got) = self.size(&key(other))?
                && got != head_dim
            {
                return Err(self.corrupt(&key(other), format!("{got}, expected the head's width, {head_dim}")));
            }
        }
        let window = self.size(&key("attention.sliding_window"))?.filter(|w| *w > 0).unwrap_or(usize::MAX);
        let tensor = |name: &str| self.header.tensors.contains_key(name);
        let config = ModelConfig {
            architecture: family.architecture,
            hidden_size,
            intermediate_size: self.required_size(&key("feed_forward_length"))?,
            n_layers: self.required_size(&key("block_count"))?,
            n_heads,
            n_kv_heads: self.size(&key("attention.head_count_kv"))?.unwrap_or(n_heads),
            head_dim,
            vocab_size: self.vocab_size(family)?,
            max_context: self.required_size(&key("context_length"))?.min(window),
            rms_norm_eps: self
                .f32(&key("attention.layer_norm_rms_epsilon"))?
                .ok_or_else(|| self.corrupt(&key("attention.layer_norm_rms_epsilon"), "the key is missing"))?,
            rope_theta: self.f32(&key("rope.freq_base"))?.unwrap_or(10_000.0),
            tie_word_embeddings: !tensor("output.weight"),
            qkv_bias: family.qkv_bias || tensor("blk.0.attn_q.bias"),
            activation: self.activation()?,
            bos_token_id: if self.adds_bos()? { self.token_id("tokenizer.ggml.bos_token_id")? } else { None },
            eos_token_ids: self.eos_token_ids()?,
        };
        limits::check(&config, self.path, |field| match field {
            "hidden_size" => key("embedding_length"),
            "intermediate_size" => key("feed_forward_length"),
            "n_layers" => key("block_count"),
            "n_heads" => key("attention.head_count"),
            "n_kv_heads" => key("attention.head_count_kv"),
            "head_dim" => key("attention.key_length"),
            "max_context" => key("context_length"),
            "rms_norm_eps" => key("attention.layer_norm_rms_epsilon"),
            "rope_theta" => key("rope.freq_base"),
            "vocab_size" => "token_embd.weight".to_owned(),
            other => format!("tokenizer.ggml ({other})"),
        })?;
        self.check_block_count(&key("block_count"), config.n_layers)?;
        Ok(config)
    }

    /// Variants of a family that compute something else.
    fn refuse_variants(&self, family: &Family) -> Result<()> {
        let key = |name: &str| format!("{}.{name}", family.gguf_name);
        let scaling = self.str(&key("rope.scaling.type"))?.unwrap_or("none");
        if scaling != "none" || self.header.tensors.contains_key("rope_freqs.weight") {
            let scaling = if scaling == "none" { "rope_freqs.weight" } else { scaling };
            return Err(self.unsupported(
                format!("rope scaling ({scaling})"),
                "use a model without it, or one converted for its original context".into(),
            ));
        }
        if self.size(&key("expert_count"))?.unwrap_or(0) > 0 {
            return Err(self.unsupported("a mixture of experts".into(), "use a dense model".into()));
        }
        Ok(())
    }

    /// Rows of the embedding, which must be what the token list and the metadata say.
    fn vocab_size(&self, family: &Family) -> Result<usize> {
        let name = "token_embd.weight";
        let tensor = self.header.tensors.get(name).ok_or_else(|| Error::MissingTensor {
            path: self.path.to_owned(),
            name: "model.embed_tokens.weight".to_owned(),
        })?;
        let rows = match tensor.shape.as_slice() {
            [rows, _] => *rows,
            other => return Err(self.corrupt(name, format!("its shape is {other:?}, expected two dimensions"))),
        };
        let tokens = "tokenizer.ggml.tokens";
        if let Some(listed) = self.strings(tokens)?
            && listed.len() != rows
        {
            return Err(self.corrupt(tokens, format!("{} tokens, but {name} has {rows} rows", listed.len())));
        }
        let key = format!("{}.vocab_size", family.gguf_name);
        if let Some(said) = self.size(&key)?
            && said != rows
        {
            return Err(self.corrupt(&key, format!("{said}, but {name} has {rows} rows")));
        }
        Ok(rows)
    }

    fn activation(&self) -> Result<Activation> {
        match self.str(ACTIVATION_KEY)? {
            None | Some("silu") => Ok(Activation::Silu),
            Some("relu") => Ok(Activation::Relu),
            Some("drelu") => Ok(Activation::Drelu),
            Some(other) => Err(self.unsupported(format!("the activation {other:?}"), "use silu, relu or drelu".into())),
        }
    }

    /// Whether a text starts with the beginning token: as the file says, else as is usual for its tokenizer.
    pub fn adds_bos(&self) -> Result<bool> {
        let usual = match self.str("tokenizer.ggml.model")? {
            Some("llama") => true,
            _ => matches!(self.str("tokenizer.ggml.pre")?, Some("llama-bpe" | "llama3" | "llama-v3")),
        };
        Ok(self.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(usual))
    }

    fn eos_token_ids(&self) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
            ids.extend(self.token_id(key)?);
        }
        let tokens = self.strings("tokenizer.ggml.tokens")?.unwrap_or_default();
        // Only as a control or user-defined token: `</s>` can be an ordinary piece of text in a vocabulary.
        let is_special = |id: usize| match self.get("tokenizer.ggml.token_type") {
            Some(Value::Array(Array::I32(kinds))) => matches!(kinds.get(id), Some(3 | 4)),
            Some(Value::Array(Array::U32(kinds))) => matches!(kinds.get(id), Some(3 | 4)),
            _ => true,
        };
        let ends = tokens.iter().enumerate().filter(|(id, t)| END_TOKENS.contains(&t.as_str()) && is_special(*id));
        ids.extend(ends.filter_map(|(id, _)| u32::try_from(id).ok()));
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// Layers beyond the stated count would be left out in silence.
    fn check_block_count(&self, key: &str, n_layers: usize) -> Result<()> {
        for name in self.header.tensors.keys() {
            let index = name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
            if index.is_some_and(|i| i >= n_layers) {
                return Err(self.corrupt(key, format!("{n_layers}, but there is a tensor {name}")));
            }
        }
        Ok(())
    }
}
