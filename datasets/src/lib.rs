//! Where models and texts come from: checkpoints, tokenizers, chat templates and corpora.
//!
//! | concept | where |
//! | --- | --- |
//! | a model's shape, whatever file it came from | [`ModelConfig`] |
//! | tensors by canonical (Hugging Face) name, streamed | [`Checkpoint`], [`open_checkpoint`] |
//! | what each family of decoders needs | [`architectures`] |
//! | GGUF files | [`gguf`] |
//! | Hugging Face folders | [`huggingface`] |
//! | text to tokens and back | [`Tokenizer`], [`DecodeStream`] |
//! | tiny models for tests | [`mod@write`] |
//! | failures, with file and field | [`Error`] |

#![forbid(unsafe_code)]

pub mod architectures;
mod checkpoint;
mod config;
pub mod dequant;
mod digest;
mod error;
pub mod gguf;
pub mod huggingface;
mod limits;
mod store;
mod tokenizer;
pub mod write;

pub use checkpoint::{Checkpoint, SourceDtype, TensorInfo, open_checkpoint};
pub use config::{Activation, Architecture, ModelConfig};
pub use error::{Error, Result};
pub use tokenizer::{DecodeStream, Tokenizer};
