//! GGUF files: a checked reader for the header, tensors by positioned reads, and a model's configuration, tensor
//! names and tokenizer from the metadata.
//!
//! Everything in the header is distrusted: counts and lengths are bounded by the bytes that are left before
//! anything is allocated, and every tensor's place is checked when the file is opened, not when it is read.

mod checkpoint;
mod header;
pub(crate) mod metadata;
mod reader;
mod types;
mod value;

pub use checkpoint::GgufCheckpoint;
pub use header::{GgufHeader, GgufTensor, MAX_ALIGNMENT, MAX_ARRAY_DEPTH, MAX_VERSION};
pub use metadata::{ACTIVATION_KEY, activation_name};
pub use types::GgmlType;
pub use value::{Array, Value};
