//! Where models and texts come from: checkpoints, tokenizers, chat templates and corpora.
//!
//! | concept | where |
//! | --- | --- |
//! | a model's shape, whatever file it came from | [`ModelConfig`] |
//! | tensors by canonical (Hugging Face) name, streamed | [`Checkpoint`], [`open_checkpoint`] |
//! | failures, with file and field | [`Error`] |

mod checkpoint;
mod config;
mod error;

pub use checkpoint::{Checkpoint, SourceDtype, TensorInfo, open_checkpoint};
pub use config::{Activation, Architecture, ModelConfig};
pub use error::{Error, Result};
