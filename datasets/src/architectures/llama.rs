//! Llama, Mistral, SmolLM: pre-norm, grouped-query attention with rotary embeddings, gated feed-forward, no biases
//! (except where `attention_bias` asks for them on q, k and v).

use super::{Family, LayerTensor, Role};
use crate::{Architecture, ModelConfig};

pub(super) const FAMILY: Family = Family {
    architecture: Architecture::Llama,
    hf_classes: &["LlamaForCausalLM", "MistralForCausalLM"],
    gguf_name: "llama",
    qkv_bias: false,
    gguf_interleaves_qk: true,
    layer,
};

/// Sizes are validated before they come here (`ModelConfig` of an opened checkpoint), so the products are safe to
/// saturate: a saturated shape matches no tensor.
pub(super) fn layer(config: &ModelConfig) -> Vec<LayerTensor> {
    let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
    let query = config.n_heads.saturating_mul(config.head_dim);
    let key = config.n_kv_heads.saturating_mul(config.head_dim);
    let mut tensors = vec![
        ("input_layernorm.weight", "attn_norm.weight", vec![hidden], Role::Norm),
        ("self_attn.q_proj.weight", "attn_q.weight", vec![query, hidden], Role::Query),
        ("self_attn.k_proj.weight", "attn_k.weight", vec![key, hidden], Role::Key),
        ("self_attn.v_proj.weight", "attn_v.weight", vec![key, hidden], Role::Value),
        ("self_attn.o_proj.weight", "attn_output.weight", vec![hidden, query], Role::Output),
        ("post_attention_layernorm.weight", "ffn_norm.weight", vec![hidden], Role::Norm),
        ("mlp.gate_proj.weight", "ffn_gate.weight", vec![ffn, hidden], Role::Gate),
        ("mlp.up_proj.weight", "ffn_up.weight", vec![ffn, hidden], Role::Up),
        ("mlp.down_proj.weight", "ffn_down.weight", vec![hidden, ffn], Role::Down),
    ];
    if config.qkv_bias {
        tensors.extend([
            ("self_attn.q_proj.bias", "attn_q.bias", vec![query], Role::QueryBias),
            ("self_attn.k_proj.bias", "attn_k.bias", vec![key], Role::KeyBias),
            ("self_attn.v_proj.bias", "attn_v.bias", vec![key], Role::ValueBias),
        ]);
    }
    tensors
}
