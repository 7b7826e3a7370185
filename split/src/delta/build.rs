//! Makes a delta directory from a base and a final model, a few blocks of rows at a time.

use super::adapted::AdapterCheckpoint;
use super::bits::{Shape, check_dtype};
use super::index::BLOCK_WEIGHTS_MAX;
use super::journal::{Finished, JOURNAL_FILE, Journal};
use super::low_rank;
use super::manifest::{DATA_FILE, DeltaKind, DeltaManifest, DeltaTensor, LowRankEntry, MANIFEST_FILE, Model};
use super::matrix::{self, BlockCounts, Cut, DataFile};
use super::open::header;
use crate::build::write_plain_file;
use crate::error::{Error, Result, io};
use crate::growing::Growing;
use serde::Serialize;
use std::fs::File;
use std::path::{Path, PathBuf};
use thermocline_calibrate::disk;
use thermocline_datasets::huggingface::LoraAdapter;
use thermocline_datasets::{Checkpoint, architectures};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

/// Files of the final model that are kept where they differ.
const KEPT: [&str; 2] = ["tokenizer.json", "chat_template.jinja"];

/// Where the final model comes from.
#[derive(Clone, Copy)]
pub enum Final<'a> {
    /// A checkpoint of the base's shape.
    Checkpoint(&'a dyn Checkpoint),
    /// The base itself with an adapter folded in.
    Adapter(&'a LoraAdapter),
}

/// How to make a delta.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct DeltaOptions {
    /// zstd level of the planes; 0 stores them as they are. Bitmaps and small numbers in no order hold little but their
    /// frequencies, so level 1 is as small as 9, and 19 a tenth smaller (`benches/delta.rs`).
    pub zstd_level: i32,
    /// Weights of a block, about: what must be decoded to get at one row. A quarter of the default makes a delta 6 %
    /// larger, eight times it 1 % smaller.
    pub block_weights: usize,
}

impl Default for DeltaOptions {
    fn default() -> Self {
        Self { zstd_level: 1, block_weights: 1 << 17 }
    }
}

/// Tensors of one kind.
#[derive(Debug, Clone, Serialize)]
pub struct KindCount {
    /// The kind.
    pub kind: DeltaKind,
    /// Its tensors.
    pub tensors: usize,
    /// Their bytes in the delta.
    pub bytes: u64,
}

/// What a delta turned out as.
#[derive(Debug, Clone, Serialize)]
pub struct DeltaReport {
    /// The delta directory.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Size of the final model's tensors.
    pub checkpoint_bytes: u64,
    /// Weights of the model.
    pub n_weights: u64,
    /// Those whose bits differ; of tensors that an adapter changes, all.
    pub changed_weights: u64,
    /// Tensors by kind.
    pub kinds: Vec<KindCount>,
    /// Blocks without changes, in tensors that have some.
    pub unchanged_blocks: u64,
    /// Blocks stored as bitmaps and differences.
    pub sparse_blocks: u64,
    /// Blocks stored as differences of all columns.
    pub dense_blocks: u64,
}

/// Writes what turns `base` into `final_model` to `out`, which must not exist. `progress(done, total)` counts tensors.
///
/// The directory grows as `OUT.partial` and is renamed when it is complete and on disk; after an interruption the same call
/// goes on with the tensor at which it was. Memory: a few blocks of rows for each thread, and the bits of both down matrices of one layer.
///
/// # Errors
/// If the models are not of one shape or not bf16, one cannot be read, the disk is full, or another process writes the
/// same delta.
pub fn write(
    base: &dyn Checkpoint,
    final_model: Final<'_>,
    options: &DeltaOptions,
    out: &Path,
    progress: &dyn Fn(usize, usize),
) -> Result<DeltaReport> {
    if out.exists() {
        return Err(Error::Exists { path: out.to_owned() });
    }
    let adapted;
    let (changed, adapter): (&dyn Checkpoint, _) = match final_model {
        Final::Checkpoint(checkpoint) => (checkpoint, None),
        Final::Adapter(adapter) => {
            adapted = AdapterCheckpoint::new(base, adapter);
            (&adapted, Some(adapter))
        }
    };
    let tensors = check_models(base, changed)?;
    let growing = Growing::open(out)?;
    // What an interrupted run wrote last.
    for name in KEPT.iter().chain(&[MANIFEST_FILE]) {
        match std::fs::remove_file(growing.dir().join(name)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io(growing.dir())(e)),
            _ => {}
        }
    }
    let data_path = growing.dir().join(DATA_FILE);
    let built = build([base, changed], adapter, &tensors, options, growing.dir(), progress);
    let (manifest, blocks, bytes) = built.map_err(|error| match &error {
        Error::Io { source, .. } if disk::is_full(source) => {
            let written = std::fs::metadata(&data_path).map_or(0, |m| m.len());
            Error::DeltaDiskFull { path: out.to_owned(), written }
        }
        _ => error,
    })?;
    let journal = growing.dir().join(JOURNAL_FILE);
    std::fs::remove_file(&journal).map_err(io(&journal))?;
    growing.publish(out, &[])?;
    Ok(report(out, changed, &manifest, blocks, bytes))
}

/// The tensors that both models have, with the shapes in which they are stored.
fn check_models(base: &dyn Checkpoint, changed: &dyn Checkpoint) -> Result<Vec<(String, Shape)>> {
    let (a, b) = (base.config(), changed.config());
    let differ = |what: &str, base: String, changed: String| {
        Err(Error::DifferentModels { what: what.to_owned(), base, changed })
    };
    if a.architecture != b.architecture {
        return differ("architecture", format!("{:?}", a.architecture), format!("{:?}", b.architecture));
    }
    if a.activation != b.activation {
        return differ("activation", format!("{:?}", a.activation), format!("{:?}", b.activation));
    }
    for (what, a, b) in [
        ("n_layers", a.n_layers, b.n_layers),
        ("n_heads", a.n_heads, b.n_heads),
        ("n_kv_heads", a.n_kv_heads, b.n_kv_heads),
        ("head_dim", a.head_dim, b.head_dim),
    ] {
        if a != b {
            return differ(what, a.to_string(), b.to_string());
        }
    }
    if a.tie_word_embeddings != b.tie_word_embeddings {
        let head = |tied: bool| (if tied { "tied to the embedding" } else { "there" }).to_owned();
        return differ("lm_head.weight", head(a.tie_word_embeddings), head(b.tie_word_embeddings));
    }
    if a.qkv_bias != b.qkv_bias {
        return differ("qkv_bias", a.qkv_bias.to_string(), b.qkv_bias.to_string());
    }
    let mut tensors = Vec::new();
    for spec in architectures::tensors(b) {
        let shapes = [base, changed].map(|m| m.info(&spec.name).map(|i| i.shape));
        let [Some(a), Some(b)] = shapes else {
            let there = shapes.map(|s| s.map_or("missing".to_owned(), |s| format!("{s:?}")));
            let [base, changed] = there;
            return differ(&spec.name, base, changed);
        };
        let shape = Shape::new(&spec.name, &b).filter(|_| a == b);
        let Some(shape) = shape else { return differ(&spec.name, format!("{a:?}"), format!("{b:?}")) };
        if !shape.is_vector {
            check_dtype(base, &spec.name)?;
            check_dtype(changed, &spec.name)?;
        }
        tensors.push((spec.name, shape));
    }
    Ok(tensors)
}

/// Everything but the lock and the final name: manifest, blocks by kind, bytes.
fn build(
    models: [&dyn Checkpoint; 2],
    adapter: Option<&LoraAdapter>,
    tensors: &[(String, Shape)],
    options: &DeltaOptions,
    dir: &Path,
    progress: &dyn Fn(usize, usize),
) -> Result<(DeltaManifest, BlockCounts, u64)> {
    let [base, changed] = models;
    progress(0, tensors.len());
    let describe = |m: &dyn Checkpoint| Ok::<_, Error>(Model { model: m.name(), digest: m.digest()? });
    let mut manifest = DeltaManifest::new(describe(base)?, describe(changed)?, changed.config().clone());
    let identity = serde_json::to_string(&(&manifest.base, &manifest.final_model, manifest.version, options))
        .map_err(std::io::Error::other)
        .map_err(io(dir))?;
    let data_path = dir.join(DATA_FILE);
    let names: Vec<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
    let written = std::fs::metadata(&data_path).map_or(0, |m| m.len());
    let (mut journal, finished) = Journal::open(dir, &identity, &names, written)?;
    let last = finished.last().map(|f| (f.data_bytes, f.blocks));
    let mut data = DataFile::open(&data_path, last.map_or(0, |(at, _)| at))?;
    if data.at == 0 {
        data.write(&header())?;
    }
    let cut = Cut { block_weights: options.block_weights.clamp(1, BLOCK_WEIGHTS_MAX), zstd_level: options.zstd_level };
    let mut counts = last.map_or(BlockCounts::default(), |(_, blocks)| blocks);
    manifest.tensors = finished.into_iter().map(|f| f.tensor).collect();
    for (i, (name, shape)) in tensors.iter().enumerate().skip(manifest.tensors.len()) {
        progress(i, tensors.len());
        let factors = adapter.map(|a| a.factors(name)).transpose()?.flatten();
        let tensor = match (factors, adapter) {
            (Some(factors), Some(adapter)) => {
                let bytes = low_rank::to_bytes(&factors);
                let entry = LowRankEntry { rank: adapter.rank(), scale: adapter.scale(), bf16: factors.is_bf16 };
                let (rows, columns) =
                    if shape.is_down { (shape.columns, shape.rows) } else { (shape.rows, shape.columns) };
                let final_digest = matrix::digest(changed, name, rows, columns)?;
                let stored = whole(name, *shape, DeltaKind::LowRank, &mut data, &bytes, final_digest)?;
                DeltaTensor { low_rank: Some(entry), ..stored }
            }
            _ if shape.is_vector => write_vector(models, name, *shape, &mut data)?,
            _ => matrix::write(&mut data, models, name, *shape, cut, &mut counts)?,
        };
        data.sync()?;
        journal.add(&Finished { tensor: tensor.clone(), blocks: counts, data_bytes: data.at })?;
        manifest.tensors.push(tensor);
    }
    manifest.data_bytes = data.finish()?;
    manifest.files = write_files(base, changed, dir)?;
    let files = manifest.files.iter().map(|f| std::fs::metadata(dir.join(&f.file)).map_or(0, |m| m.len()));
    let files: u64 = files.sum();
    let bytes = manifest.data_bytes + files + manifest.write(dir)?;
    progress(tensors.len(), tensors.len());
    Ok((manifest, counts, bytes))
}

fn write_vector(models: [&dyn Checkpoint; 2], name: &str, shape: Shape, data: &mut DataFile) -> Result<DeltaTensor> {
    let [base, changed] = models.map(|m| m.load(name));
    let to_bytes = |values: Vec<f32>| values.iter().flat_map(|v| v.to_bits().to_le_bytes()).collect::<Vec<u8>>();
    let (base, changed) = (to_bytes(base?), to_bytes(changed?));
    let final_digest = format!("{:032x}", xxh3_128(&changed));
    let kind = if base == changed { DeltaKind::Unchanged } else { DeltaKind::Vector };
    whole(name, shape, kind, data, if base == changed { &[] } else { &changed }, final_digest)
}

/// Writes a tensor without blocks.
fn whole(
    name: &str,
    shape: Shape,
    kind: DeltaKind,
    data: &mut DataFile,
    bytes: &[u8],
    final_digest: String,
) -> Result<DeltaTensor> {
    let offset = data.at;
    data.write(bytes)?;
    let is_stored = kind != DeltaKind::Unchanged;
    Ok(DeltaTensor {
        name: name.to_owned(),
        kind,
        rows: shape.rows,
        columns: shape.columns,
        changed: if is_stored { (shape.rows * shape.columns) as u64 } else { 0 },
        offset,
        bytes: bytes.len() as u64,
        block_rows: 0,
        index_offset: 0,
        checksum: if is_stored { format!("{:016x}", xxh3_64(bytes)) } else { String::new() },
        final_digest,
        low_rank: None,
    })
}

/// Tokenizer and template of the final model where they differ. A template that is gone is kept as an empty one.
fn write_files(base: &dyn Checkpoint, changed: &dyn Checkpoint, dir: &Path) -> Result<Vec<crate::PlainFile>> {
    let mut files = Vec::new();
    // A base without a tokenizer (which may be a bare folder of weights) is no obstacle.
    let tokenizers = [base, changed].map(|m| m.tokenizer_json().ok());
    let templates = [base, changed].map(|m| m.chat_template());
    for (name, [before, after]) in KEPT.into_iter().zip([tokenizers, templates]) {
        if before != after {
            files.push(write_plain_file(dir, name, &after.unwrap_or_default())?);
            let path = dir.join(name);
            File::open(&path).and_then(|f| f.sync_all()).map_err(io(&path))?;
        }
    }
    Ok(files)
}

fn report(
    out: &Path,
    changed: &dyn Checkpoint,
    manifest: &DeltaManifest,
    [unchanged_blocks, sparse_blocks, dense_blocks]: BlockCounts,
    bytes: u64,
) -> DeltaReport {
    let mut kinds: Vec<KindCount> = Vec::new();
    for t in &manifest.tensors {
        match kinds.iter_mut().find(|k| k.kind == t.kind) {
            Some(k) => (k.tensors, k.bytes) = (k.tensors + 1, k.bytes + t.bytes),
            None => kinds.push(KindCount { kind: t.kind, tensors: 1, bytes: t.bytes }),
        }
    }
    kinds.sort_by_key(|k| k.kind);
    let sizes = manifest.tensors.iter().filter_map(|t| changed.info(&t.name)).map(|i| i.n_bytes);
    DeltaReport {
        path: out.to_owned(),
        bytes,
        checkpoint_bytes: sizes.sum(),
        n_weights: manifest.tensors.iter().map(|t| (t.rows * t.columns) as u64).sum(),
        changed_weights: manifest.tensors.iter().map(|t| t.changed).sum(),
        kinds,
        unchanged_blocks,
        sparse_blocks,
        dense_blocks,
    }
}
