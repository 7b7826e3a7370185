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
//! | texts, by path or glob, as token windows | [`Corpus`] |
//! | messages to a prompt | [`ChatTemplate`] |
//! | tiny models for tests | [`mod@write`] |
//! | large models whose activations are planted, for measuring | [`planted`] |
//! | failures, with file and field | [`Error`] |

#![forbid(unsafe_code)]

pub mod architectures;
#[deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
pub mod chat;
mod checkpoint;
mod config;
mod contained;
#[deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
pub mod corpus;
pub mod dequant;
mod digest;
mod error;
#[deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
pub mod files;
#[deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
pub mod gguf;
#[deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
pub mod huggingface;
#[deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod limits;
pub mod planted;
mod random;
#[deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod store;
#[deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tokenizer;
pub mod write;

pub use chat::{ChatMessage, ChatTemplate};
pub use checkpoint::{Checkpoint, MAX_NAME_CHARS, SourceDtype, TensorInfo, open_checkpoint};
pub use config::{Activation, Architecture, ModelConfig};
pub use contained::is_contained;
pub use corpus::Corpus;
pub use error::{Error, Result};
pub use random::Random;
pub use tokenizer::{DecodeStream, Tokenizer};
