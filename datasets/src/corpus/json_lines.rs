use super::plain_text::not_utf8;
use super::{Continue, Piece, Take};
use crate::{Error, Result};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

/// Longest line that is read.
const MAX_LINE_BYTES: u64 = 256 << 20;

pub fn read(path: &Path, column: &str, take: &mut Take<'_>) -> Result<Continue> {
    let failed = |source| Error::Io { path: path.to_owned(), source };
    let corpus = |reason: String| Error::Corpus { path: path.to_owned(), reason };
    let mut input = BufReader::new(File::open(path).map_err(failed)?);
    let (mut line, mut offset) = (Vec::new(), 0u64);
    for number in 1u64.. {
        line.clear();
        let n = (&mut input).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).map_err(failed)? as u64;
        if n == 0 {
            break;
        }
        if n == MAX_LINE_BYTES {
            return Err(corpus(format!("line {number} is longer than {MAX_LINE_BYTES} bytes")));
        }
        let text = std::str::from_utf8(&line).map_err(|e| not_utf8(path, offset, e))?;
        offset = offset.saturating_add(n);
        if text.trim().is_empty() {
            continue;
        }
        // The parser itself bounds nesting at 128.
        let object: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(text).map_err(|e| corpus(format!("line {number} is no JSON object: {e}")))?;
        let document = object.get(column).ok_or_else(|| {
            let fields = object.keys().map(String::as_str).take(8).collect::<Vec<_>>().join(", ");
            corpus(format!("line {number} has no field {column:?} (it has: {fields})"))
        })?;
        let document = document.as_str().ok_or_else(|| corpus(format!("line {number}: {column:?} is no text")))?;
        if !document.is_empty() && (take(Piece::Text(document))?.is_break() || take(Piece::EndOfDocument)?.is_break()) {
            return Ok(Continue::Break(()));
        }
    }
    Ok(Continue::Continue(()))
}
