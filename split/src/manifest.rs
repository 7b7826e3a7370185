//! `manifest.json`: what is in a split directory and what it was made from.

use crate::GradedCurves;
use crate::LayerEncodings;
use crate::curve::Curve;
use crate::error::{Result, corrupt, io};
use crate::sealed::Sealed;
use crate::sketch::SketchForm;
use crate::tensor_file::TensorFileEntry;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::path::Path;
use thermocline_datasets::ModelConfig;
use thermocline_kernels::SKETCH_UNIT;

/// The newest version that is read. A split is written as the first that can say what is in it: 1, 2 where layers have hot
/// neurons in an encoding of their own, 3 where it says what each layer's share costs, 4 where it also says what all of them
/// cost together, 6 where it has sketches, 7 where these have thresholds of single rows, 8 where it has what sketches leave of their
/// rows, 9 where sketches have two bits of all rows, 10 where attention has an encoding of its own. Sketches of 4 and 5 had another code and are not read.
pub const FORMAT_VERSION: u32 = 10;

/// What a split was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// What the checkpoint calls itself, else its file or folder name; for people.
    pub model: String,
    /// The checkpoint's digest.
    pub model_digest: String,
    /// Storage type of its feed-forward weights (`BF16`, `Q4_1`, ...), for people.
    pub ffn_dtype: String,
    /// Digest of the corpus that it was calibrated on.
    pub corpus_digest: String,
    /// Tokens that it was calibrated on.
    pub n_tokens: u64,
}

/// How the weights are encoded and packed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Packing {
    /// Encodings of the feed-forward bundles, as [`LayerEncodings`] reads them.
    pub ffn_encoding: String,
    /// Encoding of embedding and head, and of attention.
    pub resident_encoding: String,
    /// Encoding of attention, where it has one of its own; none had before version 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_encoding: Option<String>,
    /// Neurons in a chunk.
    pub chunk_neurons: usize,
    /// `frequency`, `coactivation` or `random`, behind `outliers@SHARE,` if a share of the neurons comes first because of their energy.
    pub order: String,
    /// Rank of the low-rank predictor.
    pub predictor_rank: usize,
    /// Share of a layer's neurons that counted as active in the statistics; 0 if they are the non-zero ones.
    pub active_share: f64,
    /// Bits of the rows of sketches; those that all had before version 9 are not said.
    #[serde(default, skip_serializing_if = "SketchForm::is_default")]
    pub sketch_bits: SketchForm,
}

/// One layer: its files, those of the last section on top.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerEntry {
    /// File name in the split directory.
    pub file: String,
    /// Its size.
    pub file_bytes: u64,
    /// The checksum in its header, in hexadecimal: it covers header, order, and index with the chunks' checksums.
    pub checksum: String,
    /// The further planes of the same neurons: coarse, final.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub planes: Vec<PlaneEntry>,
    /// The neurons in front of these, hottest first, where they have an encoding of their own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hot: Vec<SectionEntry>,
}

impl LayerEntry {
    /// All files but the one on top.
    pub fn others(&self) -> impl Iterator<Item = &PlaneEntry> {
        self.planes.iter().chain(self.hot.iter().flat_map(|s| &s.planes))
    }
}

/// Hot neurons of a layer in an encoding of their own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SectionEntry {
    /// How many: those that follow the ones of the entry before.
    pub neurons: usize,
    /// Their encoding.
    pub encoding: String,
    /// The base and its further planes.
    pub planes: Vec<PlaneEntry>,
}

/// One plane of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlaneEntry {
    /// File name in the split directory.
    pub file: String,
    /// Its size.
    pub file_bytes: u64,
    /// As [`LayerEntry::checksum`].
    pub checksum: String,
}

/// A small file that is kept as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlainFile {
    /// File name in the split directory.
    pub file: String,
    /// XXH3-128 of its contents, in hexadecimal.
    pub checksum: String,
}

/// The whole manifest. Its file is exactly the pretty-printed JSON of this value: any other byte is an error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always `thermocline-split`.
    pub format: String,
    /// 1 to 10 (see [`FORMAT_VERSION`]).
    pub version: u32,
    /// What the split was made from.
    pub source: Source,
    /// The model's shape.
    pub config: ModelConfig,
    /// How it is packed.
    pub packing: Packing,
    /// One file a layer.
    pub layers: Vec<LayerEntry>,
    /// Embedding, attention, norms, head.
    pub resident: TensorFileEntry,
    /// The further planes of these matrices: `NAME.coarse`, `NAME.final`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resident_planes: Option<TensorFileEntry>,
    /// The predictors.
    pub predictors: TensorFileEntry,
    /// Per-neuron statistics and the trace that `plan` replays.
    pub statistics: TensorFileEntry,
    /// What each layer's share of the neurons costs ([`crate::Shares`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shares: Option<TensorFileEntry>,
    /// Low-bit copies of the neurons ([`crate::Sketch`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sketches: Option<TensorFileEntry>,
    /// What these leave of the neurons' rows ([`crate::residual_layout`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub residuals: Option<TensorFileEntry>,
    /// What it costs to compute a part of the neurons and leave the others to their sketches ([`crate::GradedCurves`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub graded: Option<TensorFileEntry>,
    /// Tokenizer, chat template.
    pub files: Vec<PlainFile>,
    /// XXH3-128 of the manifest with this field empty, in hexadecimal.
    pub checksum: String,
}

impl Sealed for Manifest {
    const FILE: &'static str = "manifest.json";
    const FORMAT: &'static str = "thermocline-split";
    const VERSION: u32 = FORMAT_VERSION;
    const KIND: &'static str = "split";
    const MISSING: &'static str =
        "no such file, so this is no split; `thermocline calibrate` and `thermocline split` make one";

    fn checksum(&mut self) -> &mut String {
        &mut self.checksum
    }
}

impl Manifest {
    /// The layers' encodings.
    ///
    /// # Errors
    /// If they are none that this program knows.
    pub(crate) fn ffn_encodings(&self, dir: &Path) -> Result<LayerEncodings> {
        let parsed = self.packing.ffn_encoding.parse();
        parsed.map_err(|e: String| corrupt(&dir.join("manifest.json"), "packing.ffn_encoding", e))
    }

    /// The first version that has all that this manifest lists.
    fn least_version(&self) -> u32 {
        let has_curve = |file: &TensorFileEntry| file.tensors.iter().any(|t| Curve::has(&t.name));
        let of_rows = |file: &TensorFileEntry| file.tensors.iter().any(|t| GradedCurves::is_of_rows(&t.name));
        match &self.shares {
            _ if self.packing.attention_encoding.is_some() => 10,
            _ if !self.packing.sketch_bits.is_default() => 9,
            _ if self.residuals.is_some() => 8,
            _ if self.graded.as_ref().is_some_and(of_rows) => 7,
            _ if self.sketches.is_some() => 6,
            Some(file) if has_curve(file) => 4,
            Some(_) => 3,
            None if self.layers.iter().any(|l| !l.hot.is_empty()) => 2,
            None => 1,
        }
    }

    /// Fills in version and checksum and writes `dir/manifest.json`.
    pub(crate) fn write(self, dir: &Path) -> Result<Self> {
        self.write_as(&dir.join(Self::FILE))
    }

    /// The same for a split that is in use: readers see the old manifest or the new one.
    pub(crate) fn replace(self, dir: &Path) -> Result<Self> {
        let (path, temporary) = (dir.join(Self::FILE), dir.join("manifest.json.tmp"));
        let manifest = self.write_as(&temporary)?;
        File::open(&temporary).and_then(|file| file.sync_all()).map_err(io(&temporary))?;
        std::fs::rename(&temporary, &path).map_err(io(&path))?;
        Ok(manifest)
    }

    /// [`Manifest::replace`], after which the file `old` is in no use any more.
    pub(crate) fn replace_file(self, dir: &Path, old: Option<TensorFileEntry>) -> Result<()> {
        self.replace(dir)?;
        let Some(old) = old else { return Ok(()) };
        let path = dir.join(old.file);
        std::fs::remove_file(&path).map_err(io(&path))
    }

    fn write_as(mut self, path: &Path) -> Result<Self> {
        self.version = self.least_version();
        self.checksum = self.expected_checksum();
        std::fs::write(path, self.to_json()).map_err(io(path))?;
        Ok(self)
    }

    /// Reads and checks `dir/manifest.json`.
    ///
    /// # Errors
    /// If it is missing, damaged in any bit, or of a version that is not supported.
    pub fn read(dir: &Path) -> Result<Self> {
        let manifest = Self::read_sealed(dir)?;
        let path = dir.join(Self::FILE);
        let names = manifest.layers.iter().map(|l| &l.file).chain(manifest.files.iter().map(|f| &f.file)).chain([
            &manifest.resident.file,
            &manifest.predictors.file,
            &manifest.statistics.file,
        ]);
        let names = names
            .chain(
                [
                    &manifest.resident_planes,
                    &manifest.shares,
                    &manifest.sketches,
                    &manifest.residuals,
                    &manifest.graded,
                ]
                .into_iter()
                .flatten()
                .map(|f| &f.file),
            )
            .chain(manifest.layers.iter().flat_map(|l| l.others().map(|p| &p.file)));
        for name in names {
            let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
            if name.starts_with('/') || name.contains('\\') || !name.split('/').all(plain) {
                return Err(corrupt(&path, "file", format!("{name:?} is outside the split directory")));
            }
        }
        manifest.config.check(&path)?;
        if manifest.sketches.is_none() {
            for (field, is_there) in [
                ("graded", manifest.graded.is_some()),
                ("residuals", manifest.residuals.is_some()),
                ("packing.sketch_bits", !manifest.packing.sketch_bits.is_default()),
            ] {
                if is_there {
                    return Err(corrupt(&path, field, "of sketches, and there are none".to_owned()));
                }
            }
        }
        if manifest.sketches.is_some() && !manifest.config.hidden_size.is_multiple_of(SKETCH_UNIT) {
            let hidden = manifest.config.hidden_size;
            return Err(corrupt(
                &path,
                "sketches",
                format!("of rows of {hidden}, which is no multiple of {SKETCH_UNIT}"),
            ));
        }
        if manifest.version < 6 && manifest.sketches.is_some() {
            return Err(crate::Error::OldSketches { path, version: manifest.version });
        }
        if manifest.version != manifest.least_version() {
            let reason = format!("{}, but what it lists is version {}", manifest.version, manifest.least_version());
            return Err(corrupt(&path, "version", reason));
        }
        let chunk = manifest.packing.chunk_neurons;
        if chunk == 0 || chunk > manifest.config.intermediate_size {
            return Err(corrupt(&path, "packing.chunk_neurons", format!("{chunk} is not 1 to the layers' width")));
        }
        if manifest.layers.len() != manifest.config.n_layers {
            let got = manifest.layers.len();
            return Err(corrupt(&path, "layers", format!("{got} files for {} layers", manifest.config.n_layers)));
        }
        Ok(manifest)
    }
}
