//! Tokenizers: `tokenizer.json` as it comes with a model, or built from GGUF metadata.

mod byte_level;
mod from_gguf;
mod sentence_piece;
mod stream;

pub(crate) use from_gguf::from_gguf;
pub use stream::DecodeStream;

use crate::contained::contained;
use crate::huggingface::check_json_depth;
use crate::{Error, Result};
use std::path::Path;

/// Tokens that stand between documents, most usual first.
const SEPARATORS: [&str; 5] = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<|eot_id|>", "<|im_end|>"];

/// Text to token ids and back.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Loads the text of a `tokenizer.json`. Truncation and padding that it may ask for are switched off: a text is
    /// never cut in silence.
    ///
    /// # Errors
    /// If the text is no tokenizer, or one of a kind that is not supported.
    pub fn from_json(text: &str) -> Result<Self> {
        check_json_depth(text.as_bytes(), Path::new("tokenizer.json"), "json")?;
        guarded(|| {
            let mut inner: tokenizers::Tokenizer = text.parse()?;
            inner.with_truncation(None)?.with_padding(None);
            Ok(Self { inner })
        })
    }

    /// Token ids of a text. `add_special` adds what the model expects around a text (its beginning token, if any);
    /// special tokens that are written out in the text are recognised either way.
    ///
    /// # Errors
    /// If the tokenizer refuses the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        guarded(|| Ok(self.inner.encode_fast(text, add_special)?.get_ids().to_vec()))
    }

    /// The text of token ids, without special tokens. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        guarded(|| self.inner.decode(ids, true))
    }

    /// A decoder for tokens that come one at a time.
    pub fn decode_stream(&self) -> DecodeStream<'_> {
        DecodeStream::new(self)
    }

    /// Number of tokens, special ones included. A model's vocabulary may be padded beyond it.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The id of a token by its exact text.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The text of a token, special ones too.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The token that stands between documents in training texts, if the vocabulary has a usual one.
    pub fn document_separator(&self) -> Option<u32> {
        SEPARATORS.iter().find_map(|token| self.token_to_id(token))
    }
}

/// The crate panics on some settings that it does not expect, when it reads them or only when it uses them.
fn guarded<T>(run: impl FnOnce() -> Result<T, tokenizers::Error>) -> Result<T> {
    let failed = |reason: String| Error::Tokenizer { reason };
    match contained(run) {
        Ok(result) => result.map_err(|e| failed(e.to_string())),
        Err(panic) => Err(failed(format!("its settings cannot be used: {panic}"))),
    }
}
