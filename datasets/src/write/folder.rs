use super::{TinyModel, tiny_tensors, tiny_tokenizer_json};
use crate::{Activation, Architecture, Error, Result};
use half::bf16;
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};
use std::path::Path;

/// A ChatML template, as the tokenizer's special tokens suggest.
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + \
     message['content'] + '<|im_end|>\\n' }}{% endfor %}\
     {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// The `config.json` of a tiny model. `hidden_act` is `relu` or `drelu` for the sparse activations.
pub fn tiny_config_json(model: &TinyModel) -> Value {
    let config = model.config();
    let (class, model_type) = match model.architecture {
        Architecture::Llama => ("LlamaForCausalLM", "llama"),
        Architecture::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
    };
    let hidden_act = match model.activation {
        Activation::Silu => "silu",
        Activation::Relu => "relu",
        Activation::Drelu => "drelu",
    };
    json!({
        "architectures": [class], "model_type": model_type, "hidden_act": hidden_act, "torch_dtype": "bfloat16",
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim, "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_context, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": config.tie_word_embeddings, "bos_token_id": 0, "eos_token_id": [0, 2],
    })
}

/// Writes a Hugging Face folder (`config.json`, `model.safetensors` in bf16, `tokenizer.json`,
/// `tokenizer_config.json`), creating `dir`. Test support: small models only, everything is built in memory.
///
/// # Errors
/// If the folder or a file cannot be written.
pub fn write_tiny_safetensors(dir: &Path, model: &TinyModel, seed: u64) -> Result<()> {
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.join(name);
        std::fs::write(&path, bytes).map_err(|source| Error::Io { path, source })
    };
    std::fs::create_dir_all(dir).map_err(|source| Error::Io { path: dir.to_owned(), source })?;
    let tensors: Vec<_> = tiny_tensors(model, seed)
        .into_iter()
        .map(|t| {
            let bytes: Vec<u8> = t.values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
            (t.name, t.shape, bytes)
        })
        .collect();
    let failed = |e: safetensors::SafeTensorError| Error::Io {
        path: dir.join("model.safetensors"),
        source: std::io::Error::other(e.to_string()),
    };
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((name.as_str(), TensorView::new(Dtype::BF16, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(failed)?;
    write("model.safetensors", &serialize(views, None).map_err(failed)?)?;
    write("config.json", tiny_config_json(model).to_string().as_bytes())?;
    write("tokenizer.json", tiny_tokenizer_json(model).as_bytes())?;
    let tokenizer_config = json!({"chat_template": CHAT_TEMPLATE, "bos_token": "<|endoftext|>", "add_bos_token": false,
                                  "eos_token": "<|im_end|>"});
    write("tokenizer_config.json", tokenizer_config.to_string().as_bytes())
}
