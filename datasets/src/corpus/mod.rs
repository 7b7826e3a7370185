//! Texts to calibrate on and to evaluate with: plain text, JSON lines and Parquet columns, by path or glob.

mod json_lines;
#[cfg(feature = "analysis")]
mod parquet;
mod plain_text;
mod windows;

use crate::{Error, Result, digest};
use std::path::{Path, PathBuf};

/// The column (or JSON field) that is read unless another is named.
const DEFAULT_COLUMN: &str = "text";

/// A list of text files, in sorted order.
#[derive(Debug, Clone)]
pub struct Corpus {
    files: Vec<PathBuf>,
    column: String,
    whole: bool,
}

/// What a file gives out while it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Text that goes on from the piece before, within one document.
    Text(&'a str),
    /// The document is complete.
    EndOfDocument,
}

/// Whether the reader of a corpus wants more.
pub type Continue = std::ops::ControlFlow<()>;

/// What takes the pieces of a corpus.
pub type Take<'a> = dyn FnMut(Piece<'_>) -> Result<Continue> + 'a;

impl Corpus {
    /// Finds the files: each argument is a path, or else a glob. `column` is the field of JSON lines and the column
    /// of Parquet files that holds the text, `text` unless given. Files are read in the order of their paths,
    /// whatever order they were named in, and each once.
    ///
    /// # Errors
    /// If an argument matches no file.
    pub fn open(paths_or_globs: &[String], column: Option<&str>) -> Result<Self> {
        let mut files = Vec::new();
        for pattern in paths_or_globs {
            files.extend(find(pattern)?);
        }
        files.sort();
        files.dedup();
        if files.is_empty() {
            return Err(Error::Corpus { path: PathBuf::new(), reason: "no corpus is named".into() });
        }
        Ok(Self { files, column: column.unwrap_or(DEFAULT_COLUMN).to_owned(), whole: false })
    }

    /// Whether to hand out a text file in one piece, as evaluation protocols ask for, instead of pieces of about
    /// 256 KiB that end at line ends and keep memory bounded. Tokens can differ at the cuts.
    #[must_use]
    pub fn whole(mut self, whole: bool) -> Self {
        self.whole = whole;
        self
    }

    /// The files, sorted.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Reads every document in order. A text file is one document; a line of JSON and a row of a table are one each.
    ///
    /// # Errors
    /// If a file cannot be read, is not UTF-8 or has no such column, or `take` fails.
    pub fn read(&self, take: &mut Take<'_>) -> Result<()> {
        for path in &self.files {
            let read = match path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase).as_deref() {
                Some("jsonl" | "ndjson") => json_lines::read(path, &self.column, take),
                Some("parquet") => read_parquet(path, &self.column, take),
                _ => plain_text::read(path, self.whole, take),
            };
            if read?.is_break() {
                break;
            }
        }
        Ok(())
    }

    /// A digest of the files' contents in order, and of the column (hex, 32 digits).
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn digest(&self) -> Result<String> {
        let named = self.files.iter().enumerate().map(|(i, p)| (format!("{}/{i:08}", self.column), p.clone()));
        digest::digest_files(named.collect())
    }
}

fn find(pattern: &str) -> Result<Vec<PathBuf>> {
    let failed = |reason: String| Error::Corpus { path: PathBuf::from(pattern), reason };
    let path = Path::new(pattern);
    if path.is_dir() {
        return Err(failed(format!("is a folder; name its files, as in {pattern}/*.txt")));
    }
    if path.exists() {
        return Ok(vec![path.to_owned()]);
    }
    if !pattern.contains(['*', '?', '[']) {
        return Err(failed("there is no such file".into()));
    }
    let matches = glob::glob(pattern).map_err(|e| failed(format!("is no path and no glob: {e}")))?;
    let mut files = Vec::new();
    for found in matches {
        let found = found.map_err(|e| Error::Io { path: e.path().to_owned(), source: e.into() })?;
        if found.is_file() {
            files.push(found);
        }
    }
    if files.is_empty() { Err(failed("matches no file".into())) } else { Ok(files) }
}

#[cfg(feature = "analysis")]
fn read_parquet(path: &Path, column: &str, take: &mut Take<'_>) -> Result<Continue> {
    parquet::read(path, column, take)
}

#[cfg(not(feature = "analysis"))]
fn read_parquet(path: &Path, _column: &str, _take: &mut Take<'_>) -> Result<Continue> {
    let reason = "this program was built without Parquet (feature `analysis`); convert the file to JSON lines".into();
    Err(Error::Corpus { path: path.to_owned(), reason })
}
