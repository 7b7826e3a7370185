use super::{Continue, Piece, Take};
use crate::{Error, Result};
use polars::prelude::{ParquetReader, SerReader};
use std::fs::File;
use std::path::Path;

/// Reads one text column; the column is in memory while it is read, the others are not.
pub fn read(path: &Path, column: &str, take: &mut Take<'_>) -> Result<Continue> {
    let corpus = |reason: String| Error::Corpus { path: path.to_owned(), reason };
    let open = || File::open(path).map_err(|source| Error::Io { path: path.to_owned(), source });
    let schema = ParquetReader::new(open()?).schema().map_err(|e| corpus(format!("is no Parquet file: {e}")))?;
    if !schema.contains(column) {
        let names = schema.iter_names().map(|n| n.as_str()).take(16).collect::<Vec<_>>().join(", ");
        return Err(corpus(format!("has no column {column:?} (it has: {names})")));
    }
    let reader = ParquetReader::new(open()?).with_columns(Some(vec![column.to_owned()]));
    let table = reader.finish().map_err(|e| corpus(format!("cannot be read: {e}")))?;
    let texts = table.column(column).map_err(|e| corpus(e.to_string()))?;
    let texts = texts.str().map_err(|_| corpus(format!("column {column:?} is no text")))?;
    for document in texts.iter().flatten().filter(|t| !t.is_empty()) {
        if take(Piece::Text(document))?.is_break() || take(Piece::EndOfDocument)?.is_break() {
            return Ok(Continue::Break(()));
        }
    }
    Ok(Continue::Continue(()))
}
