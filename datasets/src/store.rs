//! Tensors in files, whatever the format: where each lies, how it is stored, and reading ranges of rows.

use crate::architectures::{self, TensorSpec};
use crate::dequant::dequantize;
use crate::gguf::GgmlType;
use crate::{Checkpoint, Error, ModelConfig, Result, TensorInfo, files};
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// An open file and the length that it had when it was opened.
#[derive(Debug)]
pub struct SourceFile {
    pub path: PathBuf,
    pub file: File,
    pub len: u64,
}

impl SourceFile {
    pub fn open(path: &Path) -> Result<Self> {
        let file = files::open(path).map_err(Error::refused(path))?;
        let len = file.metadata().map_err(|source| Error::Io { path: path.to_owned(), source })?.len();
        Ok(Self { path: path.to_owned(), file, len })
    }

    /// Fills `out` from byte `offset` on; `field` says what is being read.
    pub fn read_at(&self, field: &str, offset: u64, out: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(out, offset).map_err(|source| match source.kind() {
            // Lengths were checked when the file was opened, so it has been cut since.
            std::io::ErrorKind::UnexpectedEof => Error::Corrupt {
                path: self.path.clone(),
                field: field.to_owned(),
                reason: format!("the file changed after it was opened: {} bytes at {offset} are gone", out.len()),
            },
            _ => Error::Io { path: self.path.clone(), source },
        })
    }
}

/// Where a tensor lies and how it is stored.
#[derive(Debug, Clone)]
pub struct StoredTensor {
    /// Index into the store's files.
    pub file: usize,
    /// Canonical shape.
    pub shape: Vec<usize>,
    pub kind: GgmlType,
    /// Byte offset of its data in that file; the reader has checked that all of it lies inside.
    pub offset: u64,
    pub n_bytes: u64,
    /// Rows of a head are interleaved (`0, half, 1, half + 1, ...`), and a head has this many.
    pub interleaved: Option<usize>,
}

/// The tensors of a checkpoint, by canonical name.
#[derive(Debug)]
pub struct TensorStore {
    /// The file or folder, for messages.
    pub path: PathBuf,
    pub files: Vec<SourceFile>,
    pub tensors: BTreeMap<String, StoredTensor>,
}

impl TensorStore {
    /// Checks that every tensor that `config` needs is there with the right shape, and forgets the others.
    /// `config_source` names what the shapes were derived from.
    pub fn keep_needed(&mut self, config: &ModelConfig, config_source: &str) -> Result<()> {
        let mut needed = BTreeMap::new();
        for TensorSpec { name, shape, .. } in architectures::tensors(config) {
            let Some(tensor) = self.tensors.remove(&name) else {
                return Err(Error::MissingTensor { path: self.path.clone(), name });
            };
            if tensor.shape != shape {
                let path = self.files.get(tensor.file).map_or(&self.path, |f| &f.path).clone();
                let reason = format!(
                    "its shape is {:?}, but {config_source} asks for {shape:?} ({})",
                    tensor.shape,
                    sizes(config)
                );
                return Err(Error::Corrupt { path, field: name, reason });
            }
            needed.insert(name, tensor);
        }
        self.tensors = needed;
        Ok(())
    }

    pub fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    pub fn info(&self, name: &str) -> Option<TensorInfo> {
        let tensor = self.tensors.get(name)?;
        Some(TensorInfo { shape: tensor.shape.clone(), dtype: tensor.kind.source_dtype(), n_bytes: tensor.n_bytes })
    }

    /// Rows of a matrix, or elements of a vector, as f32.
    pub fn load_rows(&self, name: &str, rows: Range<usize>) -> Result<Vec<f32>> {
        let missing = || Error::MissingTensor { path: self.path.clone(), name: name.to_owned() };
        let tensor = self.tensors.get(name).ok_or_else(missing)?;
        let file = self.files.get(tensor.file).ok_or_else(missing)?;
        let n_rows = tensor.shape.first().copied().unwrap_or(0);
        if rows.start > rows.end || rows.end > n_rows {
            return Err(Error::Corrupt {
                path: file.path.clone(),
                field: name.to_owned(),
                reason: format!("rows {}..{} asked for, it has {n_rows}", rows.start, rows.end),
            });
        }
        let Some(head_dim) = tensor.interleaved.filter(|h| *h > 1) else {
            return read_rows(file, name, tensor, rows);
        };
        // Whole heads are read and their rows put back in order, then the range is cut out.
        let (first, last) = (rows.start.checked_div(head_dim).unwrap_or(0), rows.end.div_ceil(head_dim));
        let read = first.saturating_mul(head_dim)..last.saturating_mul(head_dim).min(n_rows);
        let stored = read_rows(file, name, tensor, read.clone())?;
        let columns = columns(tensor);
        let mut out = Vec::with_capacity(rows.len().saturating_mul(columns));
        for row in rows {
            let local = row.saturating_sub(read.start);
            let within = local.checked_rem(head_dim).unwrap_or(0);
            let head = local.saturating_sub(within);
            // Row `i` of the first half of a head is stored at `2 i`, of the second half at `2 i + 1`.
            let half = head_dim.div_euclid(2);
            let place = match within.checked_sub(half) {
                None => within.saturating_mul(2),
                Some(i) => i.saturating_mul(2).saturating_add(1),
            };
            let from = head.saturating_add(place);
            let start = from.saturating_mul(columns);
            out.extend(stored.get(start..start.saturating_add(columns)).unwrap_or_default());
        }
        Ok(out)
    }
}

/// What a format keeps beside the tensors.
pub trait Beside: Send + Sync {
    fn name(&self, store: &TensorStore) -> String;
    fn digest(&self, store: &TensorStore) -> Result<String>;
    fn tokenizer_json(&self, store: &TensorStore) -> Result<String>;
    fn chat_template(&self) -> Option<String>;
}

/// A model in files: its tensors, and what its format keeps beside them.
#[derive(Debug)]
pub struct StoredCheckpoint<B> {
    pub(crate) config: ModelConfig,
    pub(crate) store: TensorStore,
    pub(crate) beside: B,
}

impl<B: Beside> Checkpoint for StoredCheckpoint<B> {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn path(&self) -> &Path {
        &self.store.path
    }

    fn name(&self) -> String {
        crate::checkpoint::printable(&self.beside.name(&self.store))
    }

    fn names(&self) -> Vec<String> {
        self.store.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.store.info(name)
    }

    fn load_rows(&self, name: &str, rows: Range<usize>) -> Result<Vec<f32>> {
        self.store.load_rows(name, rows)
    }

    fn digest(&self) -> Result<String> {
        self.beside.digest(&self.store)
    }

    fn tokenizer_json(&self) -> Result<String> {
        self.beside.tokenizer_json(&self.store)
    }

    fn chat_template(&self) -> Option<String> {
        self.beside.chat_template()
    }
}

fn columns(tensor: &StoredTensor) -> usize {
    tensor.shape.iter().skip(1).product()
}

/// Rows in the file's own order. Rows of quantised vectors (seen as one element each) may share a block with rows
/// that were not asked for; those are decoded and dropped.
fn read_rows(file: &SourceFile, name: &str, tensor: &StoredTensor, rows: Range<usize>) -> Result<Vec<f32>> {
    let bad =
        |reason: &str| Error::Corrupt { path: file.path.clone(), field: name.to_owned(), reason: reason.to_owned() };
    let overflow = || bad("the range of rows overflows");
    let (block_len, block_bytes) = (tensor.kind.block_len(), tensor.kind.block_bytes());
    let columns = columns(tensor);
    let start = rows.start.checked_mul(columns).ok_or_else(overflow)?;
    let end = rows.end.checked_mul(columns).ok_or_else(overflow)?;
    let blocks = start.checked_div(block_len).unwrap_or(0)..end.div_ceil(block_len);
    let n_bytes = blocks.len().checked_mul(block_bytes).ok_or_else(overflow)?;
    let within = (blocks.start as u64).checked_mul(block_bytes as u64).ok_or_else(overflow)?;
    if within.saturating_add(n_bytes as u64) > tensor.n_bytes {
        return Err(bad("the range of rows ends past the tensor"));
    }
    let mut bytes = vec![0; n_bytes];
    file.read_at(name, tensor.offset.checked_add(within).ok_or_else(overflow)?, &mut bytes)?;
    let mut values = vec![0.0; blocks.len().checked_mul(block_len).ok_or_else(overflow)?];
    if !dequantize(tensor.kind, &bytes, &mut values) {
        return Err(bad("the data is no whole number of blocks"));
    }
    let skipped = start.saturating_sub(blocks.start.saturating_mul(block_len));
    if skipped > 0 {
        values.drain(..skipped);
    }
    values.truncate(end.saturating_sub(start));
    Ok(values)
}

/// The sizes that decide shapes, for the message about a shape that does not fit.
fn sizes(config: &ModelConfig) -> String {
    format!(
        "hidden size {}, intermediate size {}, {} heads and {} key-value heads of {}, vocabulary {}",
        config.hidden_size,
        config.intermediate_size,
        config.n_heads,
        config.n_kv_heads,
        config.head_dim,
        config.vocab_size
    )
}
