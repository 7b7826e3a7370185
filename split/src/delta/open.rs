//! An open delta directory: everything checked before anything is used.

use super::bits::Shape;
use super::block::Decoder;
use super::index::{self, BLOCK_WEIGHTS_MAX, BlockEntry, ENTRY_BYTES};
use super::manifest::{DATA_FILE, DELTA_VERSION, DeltaKind, DeltaManifest, DeltaTensor, MANIFEST_FILE};
use super::patch::PARALLEL_WEIGHTS_MIN;
use crate::error::{Result, corrupt, io, listed};
use crate::growing::LOCK;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use thermocline_datasets::{architectures, files};
use thermocline_kernels::patch::Patcher;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

/// First bytes of `delta.bin`.
pub(super) const MAGIC: &[u8; 8] = b"THMDELTA";
/// Longest tokenizer or template that is read.
const PLAIN_BYTES_MAX: u64 = 256 << 20;
/// Bytes of the header of `delta.bin`: magic, version, zeros.
pub(super) const HEADER_BYTES: usize = 64;

/// A delta directory, open. Memory: 40 bytes for each block of rows (about 21 MB for 70 billion weights).
#[derive(Debug)]
pub struct Delta {
    pub(super) dir: PathBuf,
    path: PathBuf,
    file: File,
    pub(super) manifest: DeltaManifest,
    /// Blocks of each tensor; empty for those without.
    index: Vec<Vec<BlockEntry>>,
    by_name: HashMap<String, usize>,
    bytes: u64,
    pub(super) patcher: Patcher,
    /// Weights from which several threads are worth waking.
    pub(super) parallel_from: usize,
}

/// The header of `delta.bin`.
pub(super) fn header() -> [u8; HEADER_BYTES] {
    let mut out = [0; HEADER_BYTES];
    let fields = MAGIC.iter().copied().chain(DELTA_VERSION.to_le_bytes());
    out.iter_mut().zip(fields).for_each(|(o, b)| *o = b);
    out
}

impl Delta {
    /// Opens a delta and checks the manifest, the size and header of its data, and every index; blocks are checked when
    /// they are read.
    ///
    /// # Errors
    /// If a file is missing or damaged, or the directory was never finished.
    pub fn open(dir: &Path) -> Result<Self> {
        if dir.join(LOCK).exists() {
            return Err(corrupt(dir, LOCK, "this delta was never finished; make it again"));
        }
        let manifest = DeltaManifest::read(dir)?;
        let path = dir.join(DATA_FILE);
        let file = files::open(&path).map_err(listed(&path))?;
        let data_bytes = file.metadata().map_err(io(&path))?.len();
        if data_bytes != manifest.data_bytes {
            let reason = format!("{data_bytes} bytes, {MANIFEST_FILE} says {}", manifest.data_bytes);
            return Err(corrupt(&path, "size", reason));
        }
        let mut start = [0; HEADER_BYTES];
        if data_bytes < HEADER_BYTES as u64 {
            return Err(corrupt(&path, "size", "shorter than its header"));
        }
        file.read_exact_at(&mut start, 0).map_err(io(&path))?;
        if start != header() {
            return Err(corrupt(&path, "header", "not the data of a delta of this version"));
        }
        check_tensors(&manifest, dir)?;
        let mut index = Vec::with_capacity(manifest.tensors.len());
        for tensor in &manifest.tensors {
            index.push(read_index(tensor, &file, &path)?);
        }
        let by_name = manifest.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        let sizes = manifest.files.iter().map(|f| f.file.as_str()).chain([MANIFEST_FILE]);
        let sizes = sizes.map(|name| std::fs::metadata(dir.join(name)).map_or(0, |m| m.len()));
        let bytes = sizes.fold(data_bytes, u64::saturating_add);
        let (dir, patcher) = (dir.to_owned(), Patcher::detect());
        let parallel_from = PARALLEL_WEIGHTS_MIN;
        Ok(Self { dir, path, file, manifest, index, by_name, bytes, patcher, parallel_from })
    }

    /// Where it lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What is in it.
    pub fn manifest(&self) -> &DeltaManifest {
        &self.manifest
    }

    /// Digest of the checkpoint whose bits it changes; of a split, that is `manifest().source.model_digest`.
    pub fn base_digest(&self) -> &str {
        &self.manifest.base.digest
    }

    /// Bytes on disk.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Number of blocks of rows in it.
    pub fn n_blocks(&self) -> u64 {
        self.index.iter().fold(0u64, |n, blocks| n.saturating_add(blocks.len() as u64))
    }

    /// Whether any bit of a tensor differs from the base's; false if there is no such tensor.
    pub fn touches(&self, tensor: &str) -> bool {
        self.find(tensor).is_some_and(|(_, t)| t.kind != DeltaKind::Unchanged)
    }

    /// A vector of the final model, as f32, if it differs from the base's.
    ///
    /// # Errors
    /// If there is no such vector, or it cannot be read or is damaged.
    pub fn vector(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let (_, tensor) = self.entry(name)?;
        if tensor.kind == DeltaKind::Unchanged {
            return Ok(None);
        }
        if tensor.kind != DeltaKind::Vector {
            return Err(corrupt(&self.dir, name, "is a matrix, not a vector"));
        }
        let bytes = self.read_whole(tensor)?;
        Ok(Some(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()))
    }

    /// A small file of the final model that differs from the base's, checked; `None` if it does not.
    ///
    /// # Errors
    /// If it cannot be read or is not what was written.
    pub fn plain_file(&self, name: &str) -> Result<Option<String>> {
        let Some(entry) = self.manifest.files.iter().find(|f| f.file == name) else { return Ok(None) };
        let path = self.dir.join(name);
        let bytes = files::read(&path, PLAIN_BYTES_MAX).map_err(listed(&path))?;
        if format!("{:032x}", xxh3_128(&bytes)) != entry.checksum {
            return Err(corrupt(&path, "checksum", "not the file that this delta was made with"));
        }
        String::from_utf8(bytes).map(Some).map_err(|e| corrupt(&path, "text", e.to_string()))
    }

    fn find(&self, name: &str) -> Option<(usize, &DeltaTensor)> {
        let i = *self.by_name.get(name)?;
        self.manifest.tensors.get(i).map(|t| (i, t))
    }

    pub(super) fn entry(&self, name: &str) -> Result<(usize, &DeltaTensor)> {
        self.find(name).ok_or_else(|| corrupt(&self.dir, name, "the delta has no such tensor"))
    }

    pub(super) fn tensor(&self, i: usize) -> Result<&DeltaTensor> {
        self.manifest.tensors.get(i).ok_or_else(|| corrupt(&self.dir, "tensors", format!("there is no tensor {i}")))
    }

    /// Blocks of tensor `i`.
    pub(super) fn blocks(&self, i: usize) -> &[BlockEntry] {
        self.index.get(i).map_or(&[], Vec::as_slice)
    }

    /// Reads a block's stored bytes into `decoder`. They lie inside the file: the index was checked against its size.
    pub(super) fn read_stored(&self, entry: &BlockEntry, decoder: &mut Decoder) -> Result<()> {
        let n = usize::try_from(entry.stored_bytes()).unwrap_or(usize::MAX);
        decoder.stored.resize(n, 0);
        self.file.read_exact_at(&mut decoder.stored, entry.offset).map_err(io(&self.path))
    }

    /// All bytes of a tensor without blocks, checked.
    pub(super) fn read_whole(&self, tensor: &DeltaTensor) -> Result<Vec<u8>> {
        let n = usize::try_from(tensor.bytes).map_err(|_| corrupt(&self.path, &tensor.name, "too large"))?;
        let mut bytes = vec![0; n];
        self.file.read_exact_at(&mut bytes, tensor.offset).map_err(io(&self.path))?;
        if format!("{:016x}", xxh3_64(&bytes)) != tensor.checksum {
            return Err(self.damaged(&tensor.name, "checksum mismatch; fetch or make the delta again"));
        }
        Ok(bytes)
    }

    pub(super) fn damaged(&self, tensor: &str, reason: impl Into<String>) -> crate::Error {
        corrupt(&self.path, tensor, reason)
    }
}

/// That the tensors are those of the configuration, and lie one behind the other to the end of the data.
fn check_tensors(manifest: &DeltaManifest, dir: &Path) -> Result<()> {
    let path = dir.join(MANIFEST_FILE);
    let specs: HashMap<String, Option<Shape>> = architectures::tensors(&manifest.config)
        .into_iter()
        .map(|spec| {
            let shape = Shape::new(&spec.name, &spec.shape);
            (spec.name, shape)
        })
        .collect();
    let (mut seen, mut at) = (BTreeSet::new(), HEADER_BYTES as u64);
    for t in &manifest.tensors {
        let Some(shape) = specs.get(&t.name).copied().flatten() else {
            return Err(corrupt(&path, &t.name, "the model has no such tensor"));
        };
        if !seen.insert(&t.name) {
            return Err(corrupt(&path, &t.name, "the tensor is there twice"));
        }
        let fits = (shape.rows, shape.columns) == (t.rows, t.columns)
            && if shape.is_vector {
                matches!(t.kind, DeltaKind::Unchanged | DeltaKind::Vector)
            } else {
                t.kind != DeltaKind::Vector
            };
        if !fits || !kind_fits(t) || t.offset != at {
            return Err(corrupt(&path, &t.name, "kind, shape, size and place do not fit each other"));
        }
        at = at.saturating_add(t.bytes);
    }
    if seen.len() != specs.len() || at != manifest.data_bytes {
        return Err(corrupt(&path, "tensors", "they are not all of the model's, or do not fill the data"));
    }
    Ok(())
}

fn kind_fits(t: &DeltaTensor) -> bool {
    let n = (t.rows as u64).checked_mul(t.columns as u64);
    let blocks_fit = match t.kind {
        DeltaKind::Blocks => {
            let index_bytes = t.rows.checked_div(t.block_rows).and_then(|_| {
                let blocks = t.rows.div_ceil(t.block_rows);
                blocks.checked_mul(ENTRY_BYTES)
            });
            let end = index_bytes.and_then(|n| t.index_offset.checked_add(n as u64));
            let weights = t.block_rows.checked_mul(t.columns);
            t.index_offset >= t.offset
                && end.is_some()
                && end == t.offset.checked_add(t.bytes)
                && t.block_rows <= t.rows
                && weights.is_some_and(|w| w <= BLOCK_WEIGHTS_MAX || t.block_rows == 1)
        }
        _ => t.block_rows == 0 && t.index_offset == 0,
    };
    let size_fits = match t.kind {
        DeltaKind::Unchanged => t.bytes == 0 && t.changed == 0,
        DeltaKind::Blocks => t.changed > 0,
        DeltaKind::Vector => n.and_then(|n| n.checked_mul(4)) == Some(t.bytes) && n == Some(t.changed),
        DeltaKind::LowRank => t.low_rank.is_some_and(|low_rank| {
            let sides = (t.rows as u64).checked_add(t.columns as u64);
            let values = sides.and_then(|sides| sides.checked_mul(low_rank.rank as u64));
            let bytes = values.and_then(|n| n.checked_mul(if low_rank.bf16 { 2 } else { 4 }));
            low_rank.rank > 0 && low_rank.scale.is_finite() && bytes == Some(t.bytes) && n == Some(t.changed)
        }),
    };
    blocks_fit && size_fits && (t.kind == DeltaKind::LowRank) == t.low_rank.is_some()
}

fn read_index(tensor: &DeltaTensor, file: &File, path: &Path) -> Result<Vec<BlockEntry>> {
    if tensor.kind != DeltaKind::Blocks {
        return Ok(Vec::new());
    }
    // Within the file, as `check_tensors` has seen.
    let n = tensor.offset.saturating_add(tensor.bytes).saturating_sub(tensor.index_offset);
    let mut bytes = vec![0; usize::try_from(n).map_err(|_| corrupt(path, &tensor.name, "the index is too large"))?];
    file.read_exact_at(&mut bytes, tensor.index_offset).map_err(io(path))?;
    if format!("{:016x}", xxh3_64(&bytes)) != tensor.checksum {
        return Err(corrupt(path, &tensor.name, "checksum mismatch in the index; fetch or make the delta again"));
    }
    index::parse(tensor, &bytes).map_err(|reason| corrupt(path, &tensor.name, reason))
}
