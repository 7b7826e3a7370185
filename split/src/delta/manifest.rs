//! `delta.json`: what is in a delta directory, which model it changes, and which model comes out.

use crate::PlainFile;
use crate::error::{Result, corrupt, io};
use crate::sealed::Sealed;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::Path;
use thermocline_datasets::ModelConfig;

/// The version that is written and the newest that is read.
pub const DELTA_VERSION: u32 = 1;
/// The manifest's name in a delta directory.
pub const MANIFEST_FILE: &str = "delta.json";
/// The name of the file with everything that differs.
pub const DATA_FILE: &str = "delta.bin";
const FORMAT: &str = "thermocline-delta";

/// A model that a delta speaks of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// What it calls itself, else its file or folder name; for people.
    pub model: String,
    /// Its digest; an adapter's own, if the final model is the base with that folded in.
    pub digest: String,
}

/// How a tensor's changes are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DeltaKind {
    /// Not at all: it is the base's, bit for bit.
    Unchanged,
    /// Blocks of rows, each unchanged, sparse or dense.
    Blocks,
    /// Two factors of an adapter, for the whole tensor.
    LowRank,
    /// A vector, whole, as f32.
    Vector,
}

impl DeltaKind {
    /// Its name in the manifest.
    pub fn name(self) -> &'static str {
        match self {
            DeltaKind::Unchanged => "unchanged",
            DeltaKind::Blocks => "blocks",
            DeltaKind::LowRank => "low_rank",
            DeltaKind::Vector => "vector",
        }
    }
}

/// What is particular to a tensor of [`DeltaKind::LowRank`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LowRankEntry {
    /// Rows of A, columns of B.
    pub rank: usize,
    /// What their product is multiplied with.
    pub scale: f32,
    /// Whether A and B are bf16, else f32.
    pub bf16: bool,
}

/// One tensor. `rows` and `columns` are those in which it is stored: for `mlp.down_proj` a row is a neuron, so they are
/// the transpose of the checkpoint's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeltaTensor {
    /// Canonical name.
    pub name: String,
    /// How its changes are stored.
    pub kind: DeltaKind,
    /// Stored rows; 1 for a vector.
    pub rows: usize,
    /// Stored columns.
    pub columns: usize,
    /// Elements whose bits differ from the base's; for `low_rank`, and for a vector that is stored, all.
    pub changed: u64,
    /// First byte in `delta.bin`.
    pub offset: u64,
    /// Bytes there, index included.
    pub bytes: u64,
    /// Rows of a block (the last may have fewer); 0 if there are no blocks.
    pub block_rows: usize,
    /// First byte of the index of blocks in `delta.bin`; 0 if there is none.
    pub index_offset: u64,
    /// XXH3-64, in hexadecimal, of the index (which has the blocks' checksums), or of all bytes if there is none.
    pub checksum: String,
    /// XXH3-128, in hexadecimal, of the final tensor as the checkpoint has it: row-major bf16, or f32 for a vector.
    pub final_digest: String,
    /// For `low_rank`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub low_rank: Option<LowRankEntry>,
}

/// The whole manifest. Its file is exactly the pretty-printed JSON of this value: any other byte is an error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeltaManifest {
    /// Always `thermocline-delta`.
    pub format: String,
    /// [`DELTA_VERSION`].
    pub version: u32,
    /// The model whose bits are changed.
    pub base: Model,
    /// The model that comes out.
    #[serde(rename = "final")]
    pub final_model: Model,
    /// The final model's shape and constants.
    pub config: ModelConfig,
    /// Size of `delta.bin`.
    pub data_bytes: u64,
    /// Every tensor of the model, in file order.
    pub tensors: Vec<DeltaTensor>,
    /// Tokenizer and chat template of the final model, where they differ from the base's.
    pub files: Vec<PlainFile>,
    /// XXH3-128 of the manifest with this field empty, in hexadecimal.
    pub checksum: String,
}

impl Sealed for DeltaManifest {
    const FILE: &'static str = MANIFEST_FILE;
    const FORMAT: &'static str = FORMAT;
    const VERSION: u32 = DELTA_VERSION;
    const KIND: &'static str = "delta";
    const MISSING: &'static str = "no such file, so this is no delta; `thermocline delta` makes one";

    fn checksum(&mut self) -> &mut String {
        &mut self.checksum
    }
}

impl DeltaManifest {
    /// A manifest of this version, still without its checksum.
    pub(super) fn new(base: Model, final_model: Model, config: ModelConfig) -> Self {
        let (format, version) = (FORMAT.to_owned(), DELTA_VERSION);
        let (tensors, files, checksum) = (Vec::new(), Vec::new(), String::new());
        Self { format, version, base, final_model, config, data_bytes: 0, tensors, files, checksum }
    }

    /// Fills in the checksum and writes `dir/delta.json`, on disk when it returns. Returns its size.
    pub(super) fn write(&mut self, dir: &Path) -> Result<u64> {
        self.checksum = self.expected_checksum();
        let (path, text) = (dir.join(MANIFEST_FILE), self.to_json());
        let write = || {
            let mut file = std::fs::File::create(&path)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()
        };
        write().map_err(io(&path))?;
        Ok(text.len() as u64)
    }

    /// Reads `dir/delta.json` and checks it as far as it can be checked alone.
    ///
    /// # Errors
    /// If it is missing, damaged in any bit, or of a version that is not supported.
    pub fn read(dir: &Path) -> Result<Self> {
        let manifest = Self::read_sealed(dir)?;
        let path = dir.join(MANIFEST_FILE);
        for name in manifest.files.iter().map(|f| &f.file) {
            if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\\']) {
                return Err(corrupt(&path, "file", format!("{name:?} is outside the delta directory")));
            }
        }
        manifest.config.check(&path)?;
        Ok(manifest)
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<&DeltaTensor> {
        self.tensors.iter().find(|t| t.name == name)
    }
}
