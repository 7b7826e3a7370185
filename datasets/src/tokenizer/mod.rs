//! Tokenizers.

use crate::gguf::metadata::Metadata;
use crate::{Error, Result};

pub(crate) fn from_gguf(_metadata: &Metadata<'_>) -> Result<String> {
    Err(Error::Tokenizer { reason: "not built yet".into() })
}
