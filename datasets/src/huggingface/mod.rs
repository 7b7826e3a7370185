//! Hugging Face folders: `config.json`, one `model.safetensors` or shards with an index, `tokenizer.json`;
//! and LoRA adapters to such models.

mod adapter;
mod checkpoint;
mod config_json;
mod header;
mod json;
mod shards;

pub use adapter::{LoraAdapter, LoraFactors};
pub use checkpoint::FolderCheckpoint;
pub use header::{MAX_HEADER_BYTES, SafetensorsEntry, parse_header};
pub(crate) use json::check_depth as check_json_depth;

/// How to make a folder that can be read from pickles, which run code when they are loaded.
pub(crate) const PICKLE_HELP: &str = "pickles can run code when they are opened; save the model again as safetensors: \
     `AutoModelForCausalLM.from_pretrained(folder).save_pretrained(out, safe_serialization=True)`";
