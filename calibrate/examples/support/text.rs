//! Tokens of a text file.

use std::path::Path;
use thermocline_datasets::Checkpoint;
use tokenizers::Tokenizer;

/// Encodes a whole file with the checkpoint's tokenizer, without special tokens.
pub fn tokens(checkpoint: &dyn Checkpoint, path: &Path) -> Result<Vec<u32>, Box<dyn std::error::Error>> {
    let json = checkpoint.tokenizer_json()?;
    let tokenizer = Tokenizer::from_bytes(json.as_bytes()).map_err(|error| error.to_string())?;
    let encoding = tokenizer.encode_fast(std::fs::read_to_string(path)?, false).map_err(|error| error.to_string())?;
    Ok(encoding.get_ids().to_vec())
}
