use super::json;
use crate::architectures::FAMILIES;
use crate::{Activation, Error, ModelConfig, Result, limits};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use std::collections::HashSet;
use std::path::Path;

/// The keys of `config.json` that matter here; everything else is ignored.
#[derive(Debug, Deserialize)]
struct RawConfig {
    architectures: Option<Vec<String>>,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f32,
    rope_theta: Option<f32>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    partial_rotary_factor: Option<f32>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    hidden_act: Option<String>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    bos_token_id: Option<Value>,
    eos_token_id: Option<Value>,
}

/// Reads the configuration. `adds_bos` is what the tokenizer's settings say about starting a text.
pub fn read(path: &Path, adds_bos: bool) -> Result<ModelConfig> {
    let text = json::read(path, json::MAX_SETTINGS_BYTES)?;
    let json::Members(members) = json::parse::<json::Members<IgnoredAny>>(&text, path, "config")?;
    let mut seen = HashSet::new();
    if let Some((key, _)) = members.iter().find(|(key, _)| !seen.insert(key)) {
        return Err(json::corrupt(path, key, "the key occurs twice"));
    }
    convert(json::parse(&text, path, "config")?, path, adds_bos)
}

fn convert(raw: RawConfig, path: &Path, adds_bos: bool) -> Result<ModelConfig> {
    let unsupported = |what: String, help: String| Error::Unsupported { path: path.to_owned(), what, help };
    let class = raw.architectures.as_ref().and_then(|a| a.first()).map_or("", String::as_str);
    let family = FAMILIES.iter().find(|f| f.hf_classes.contains(&class)).ok_or_else(|| {
        let known: Vec<&str> = FAMILIES.iter().flat_map(|f| f.hf_classes).copied().collect();
        unsupported(format!("the architecture {class:?}"), format!("supported: {}", known.join(", ")))
    })?;
    let activation = match raw.hidden_act.as_deref() {
        None | Some("silu") => Activation::Silu,
        Some("relu") => Activation::Relu,
        Some("drelu") => Activation::Drelu,
        Some(other) => {
            return Err(unsupported(format!("hidden_act {other:?}"), "supported: silu, relu, drelu".into()));
        }
    };
    if raw.mlp_bias == Some(true) {
        return Err(unsupported("mlp_bias".into(), "use a model without biases in its feed-forward layers".into()));
    }
    if raw.partial_rotary_factor.is_some_and(|f| f != 1.0) {
        return Err(unsupported("partial_rotary_factor".into(), "use a model that rotates whole heads".into()));
    }
    // Llama's attention_bias also puts one on the output projection, which no supported kernel adds.
    if raw.attention_bias == Some(true) && !family.qkv_bias {
        return Err(unsupported("attention_bias".into(), "use a model without attention biases".into()));
    }
    if raw.num_attention_heads == 0 {
        return Err(json::corrupt(path, "num_attention_heads", "0, expected at least 1"));
    }
    let head_dim = match raw.head_dim {
        Some(head_dim) => head_dim,
        None if raw.hidden_size.is_multiple_of(raw.num_attention_heads) => {
            raw.hidden_size.checked_div(raw.num_attention_heads).unwrap_or(0)
        }
        None => {
            let reason = format!("{} heads do not divide the width {}", raw.num_attention_heads, raw.hidden_size);
            return Err(json::corrupt(path, "num_attention_heads", reason));
        }
    };
    let has_window = raw.use_sliding_window.unwrap_or(true);
    let window = raw.sliding_window.filter(|w| has_window && *w > 0).unwrap_or(usize::MAX);
    let config = ModelConfig {
        architecture: family.architecture,
        hidden_size: raw.hidden_size,
        intermediate_size: raw.intermediate_size,
        n_layers: raw.num_hidden_layers,
        n_heads: raw.num_attention_heads,
        n_kv_heads: raw.num_key_value_heads.unwrap_or(raw.num_attention_heads),
        head_dim,
        vocab_size: raw.vocab_size,
        // Within one window, windowed attention is plain attention.
        max_context: raw.max_position_embeddings.min(window),
        rms_norm_eps: raw.rms_norm_eps,
        rope_theta: rope_theta(&raw, path)?,
        tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(false),
        qkv_bias: family.qkv_bias,
        activation,
        bos_token_id: token_ids(raw.bos_token_id.as_ref(), path, "bos_token_id")?.first().copied().filter(|_| adds_bos),
        eos_token_ids: token_ids(raw.eos_token_id.as_ref(), path, "eos_token_id")?,
    };
    limits::check(&config, path, |field| {
        match field {
            "n_layers" => "num_hidden_layers",
            "n_heads" => "num_attention_heads",
            "n_kv_heads" => "num_key_value_heads",
            "max_context" => "max_position_embeddings",
            other => other,
        }
        .to_owned()
    })?;
    Ok(config)
}

/// The rotary base, from either place where it is written; any scaling of positions is refused.
fn rope_theta(raw: &RawConfig, path: &Path) -> Result<f32> {
    for scaling in [&raw.rope_scaling, &raw.rope_parameters].into_iter().flatten() {
        let kind = scaling.get("rope_type").or_else(|| scaling.get("type")).and_then(Value::as_str);
        if !scaling.is_null() && !matches!(kind, None | Some("default" | "none")) {
            return Err(Error::Unsupported {
                path: path.to_owned(),
                what: format!("rope scaling ({})", kind.unwrap_or_default()),
                help: "use a model without it, or its original context".into(),
            });
        }
    }
    let nested = raw.rope_parameters.as_ref().and_then(|p| p.get("rope_theta")).and_then(Value::as_f64);
    Ok(raw.rope_theta.or(nested.map(|v| v as f32)).unwrap_or(10_000.0))
}

/// One id or a list of them, sorted.
pub fn token_ids(value: Option<&Value>, path: &Path, field: &str) -> Result<Vec<u32>> {
    let one = |v: &Value| {
        let id = v.as_u64().and_then(|n| u32::try_from(n).ok());
        id.ok_or_else(|| json::corrupt(path, field, format!("{v}, expected a token id")))
    };
    let mut ids = match value {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(items)) => items.iter().map(one).collect::<Result<Vec<_>>>()?,
        Some(v) => vec![one(v)?],
    };
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}
