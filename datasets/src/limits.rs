//! Bounds on a model's sizes: far above any real model, low enough that products of any four fit in 64 bits and that
//! nothing is allocated for sizes that no file can back.

use crate::{Error, ModelConfig, Result};
use std::path::Path;

/// Largest number of layers.
pub const MAX_LAYERS: usize = 4096;
const MAX_WIDTH: usize = 1 << 20;
const MAX_HEADS: usize = 1 << 14;
const MAX_VOCAB: usize = 1 << 24;

/// Checks a configuration on its own, before any tensor is looked at. `field_of` gives the key in the source file
/// for one of the names used here.
pub fn check(config: &ModelConfig, path: &Path, field_of: impl Fn(&'static str) -> String) -> Result<()> {
    let bad = |field, reason: String| Error::Corrupt { path: path.to_owned(), field: field_of(field), reason };
    for (field, value, max) in [
        ("hidden_size", config.hidden_size, MAX_WIDTH),
        ("intermediate_size", config.intermediate_size, MAX_WIDTH),
        ("n_layers", config.n_layers, MAX_LAYERS),
        ("n_heads", config.n_heads, MAX_HEADS),
        ("n_kv_heads", config.n_kv_heads, MAX_HEADS),
        ("head_dim", config.head_dim, MAX_WIDTH),
        ("vocab_size", config.vocab_size, MAX_VOCAB),
        ("max_context", config.max_context, usize::MAX),
    ] {
        if value == 0 || value > max {
            return Err(bad(field, format!("{value}, expected 1 to {max}")));
        }
    }
    if !config.n_heads.is_multiple_of(config.n_kv_heads) {
        let reason = format!("{} key-value heads do not divide {} heads", config.n_kv_heads, config.n_heads);
        return Err(bad("n_kv_heads", reason));
    }
    if !config.head_dim.is_multiple_of(2) {
        return Err(bad("head_dim", format!("{}, the rotary embedding needs an even number", config.head_dim)));
    }
    if !(config.rms_norm_eps.is_finite() && config.rms_norm_eps >= 0.0) {
        return Err(bad("rms_norm_eps", format!("{}, expected a small number", config.rms_norm_eps)));
    }
    if !(config.rope_theta.is_finite() && config.rope_theta > 0.0) {
        return Err(bad("rope_theta", format!("{}, expected a positive number", config.rope_theta)));
    }
    let out_of_vocabulary = config.bos_token_id.iter().chain(&config.eos_token_ids);
    for id in out_of_vocabulary {
        if *id as usize >= config.vocab_size {
            return Err(bad("token ids", format!("{id} is not below the vocabulary's {}", config.vocab_size)));
        }
    }
    Ok(())
}
