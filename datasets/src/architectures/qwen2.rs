//! Qwen2 and Qwen2.5: Llama's layer with biases on q, k and v; GGUF files keep the query and key rows as they are.

use super::{Family, llama};
use crate::Architecture;

pub(super) const FAMILY: Family = Family {
    architecture: Architecture::Qwen2,
    hf_classes: &["Qwen2ForCausalLM"],
    gguf_name: "qwen2",
    qkv_bias: true,
    gguf_interleaves_qk: false,
    layer: llama::layer,
};
