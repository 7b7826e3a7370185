//! A split directory, opened and checked.

use crate::delta::Delta;
use crate::error::{Result, corrupt, listed};
use crate::planted::REPORT_FILE;
use crate::resident::check_planes;
use crate::{
    Error, GradedCurves, LayerFile, Manifest, Planes, Precision, Shares, Sketch, SketchForm, TensorEntry, TensorFile,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use thermocline_calibrate::predictor::LowRank;
use thermocline_datasets::files;
use thermocline_datasets::planted::PlantedReport;
use thermocline_kernels::{RowRef, unpack};
use xxhash_rust::xxh3::xxh3_128;

/// Longest tokenizer, template or report that is read.
const PLAIN_BYTES_MAX: u64 = 256 << 20;

/// A layer's predictor as it is stored (FORMAT.md).
#[derive(Debug)]
pub struct StoredPredictor<'a> {
    /// `[rank, hidden_size]`.
    pub input: &'a TensorEntry,
    /// Like `input`, for the input of the layer before; where it is missing, `input` serves for that too.
    pub ahead: Option<&'a TensorEntry>,
    /// `[2 * intermediate_size, rank]`.
    pub factors: &'a TensorEntry,
    /// `[3, intermediate_size]`.
    pub neurons: Vec<f32>,
}

/// An open split: every file's structure is checked, every index is in memory, no weights are.
#[derive(Debug)]
pub struct Split {
    dir: PathBuf,
    manifest: Manifest,
    layers: Vec<LayerFile>,
    planes: Planes,
    delta: Option<Arc<Delta>>,
    resident: TensorFile,
    resident_planes: Option<TensorFile>,
    predictors: TensorFile,
    statistics: TensorFile,
    shares: Option<TensorFile>,
    sketches: Option<TensorFile>,
    residuals: Option<TensorFile>,
    graded: Option<TensorFile>,
}

impl Split {
    /// Opens a split directory, its base only where it has further planes.
    ///
    /// # Errors
    /// If a file is missing, damaged, or does not belong to the others.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_at(dir, Precision::Base)
    }

    /// Opens a split directory with the planes that `planes` takes; files that it leaves are not looked at.
    ///
    /// # Errors
    /// If a file is missing, damaged, or does not belong to the others.
    pub fn open_at(dir: &Path, planes: impl Into<Planes>) -> Result<Self> {
        let planes = planes.into();
        let manifest = Manifest::read(dir)?;
        let encodings = manifest.ffn_encodings(dir)?;
        let mut layers = Vec::with_capacity(manifest.layers.len());
        for (l, entry) in manifest.layers.iter().enumerate() {
            let c = &manifest.config;
            let sections = encodings.sections(l, c.intermediate_size, manifest.packing.chunk_neurons);
            let file = LayerFile::open_planes(dir, entry, &sections, planes)?;
            let fits = file.layer() == l
                && file.order().len() == c.intermediate_size
                && file.bundles().hidden_size() == c.hidden_size;
            if !fits {
                let reason = "does not fit the manifest: files of two splits are mixed";
                return Err(corrupt(file.path(), "header", reason));
            }
            layers.push(file);
        }
        check_planes(&manifest, dir)?;
        let resident = TensorFile::open(dir, &manifest.resident)?;
        let further = manifest.resident_planes.as_ref().filter(|_| planes.of_matrices() > Precision::Base);
        let resident_planes = further.map(|entry| TensorFile::open(dir, entry)).transpose()?;
        let predictors = TensorFile::open(dir, &manifest.predictors)?;
        let statistics = TensorFile::open(dir, &manifest.statistics)?;
        let shares = manifest.shares.as_ref().map(|entry| TensorFile::open(dir, entry)).transpose()?;
        let sketches = manifest.sketches.as_ref().map(|entry| TensorFile::open(dir, entry)).transpose()?;
        let residuals = manifest.residuals.as_ref().map(|entry| TensorFile::open(dir, entry)).transpose()?;
        let graded = manifest.graded.as_ref().map(|entry| TensorFile::open(dir, entry)).transpose()?;
        Ok(Self {
            dir: dir.to_owned(),
            manifest,
            layers,
            planes,
            delta: None,
            resident,
            resident_planes,
            predictors,
            statistics,
            shares,
            sketches,
            residuals,
            graded,
        })
    }

    /// Puts a delta on the weights: they then are the final model's, bit for bit, and come as bf16. Predictors, sketches
    /// and statistics stay the base's.
    ///
    /// # Errors
    /// If the delta was made from another model, the split has not got the base's bits, or the final model is of
    /// another shape.
    pub fn with_delta(mut self, delta: Delta) -> Result<Self> {
        let (got, expected) = (delta.base_digest().to_owned(), self.manifest.source.model_digest.clone());
        if got != expected {
            return Err(Error::WrongSource { path: delta.dir().to_owned(), got, expected });
        }
        if self.manifest.source.ffn_dtype != "BF16" {
            let (path, dtype) = (self.dir.display(), &self.manifest.source.ffn_dtype);
            let what = format!("{path}: made from a checkpoint in {dtype}, not BF16: a delta cannot be put on it");
            return Err(Error::Settings { what });
        }
        let (base, config) = (&self.manifest.config, &delta.manifest().config);
        let same = (base.hidden_size, base.intermediate_size, base.n_layers, base.vocab_size)
            == (config.hidden_size, config.intermediate_size, config.n_layers, config.vocab_size);
        if !same {
            return Err(corrupt(delta.dir(), "config", "the final model has another shape than this split"));
        }
        self.manifest.config = config.clone();
        let delta = Arc::new(delta);
        self.layers.iter_mut().try_for_each(|layer| layer.set_delta(Arc::clone(&delta)))?;
        self.delta = Some(delta);
        // Whatever cannot take it should be found now.
        self.matrices()?;
        Ok(self)
    }

    /// The delta on it.
    pub fn delta(&self) -> Option<&Delta> {
        self.delta.as_deref()
    }

    /// A norm or bias.
    ///
    /// # Errors
    /// If there is none of that name, or it cannot be read or is damaged.
    pub fn vector(&self, name: &str) -> Result<Vec<f32>> {
        let changed = self.delta().map(|delta| delta.vector(name)).transpose()?.flatten();
        changed.map_or_else(|| self.resident.read_f32(name), Ok)
    }

    /// Where it lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What is in it.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Which planes it was opened with.
    pub fn planes(&self) -> Planes {
        self.planes
    }

    /// The further planes of embedding, attention and head, if they are used.
    pub(crate) fn resident_planes(&self) -> Option<&TensorFile> {
        self.resident_planes.as_ref()
    }

    /// The layer files.
    pub fn layers(&self) -> &[LayerFile] {
        &self.layers
    }

    /// Embedding, attention, norms and head.
    pub fn resident(&self) -> &TensorFile {
        &self.resident
    }

    /// The predictors' factors.
    pub fn predictors(&self) -> &TensorFile {
        &self.predictors
    }

    /// Per-neuron statistics and the trace.
    pub fn statistics(&self) -> &TensorFile {
        &self.statistics
    }

    /// What each layer's share of the neurons costs, if it was measured.
    ///
    /// # Errors
    /// If the file is damaged or does not fit the model.
    pub fn shares(&self) -> Result<Option<Shares>> {
        self.shares.as_ref().map(|file| Shares::read(file, &self.manifest.config)).transpose()
    }

    /// By which thresholds a part of the neurons is computed and the others are left to their sketches, and what that costs, if it was
    /// measured.
    ///
    /// # Errors
    /// If the file is damaged.
    pub fn graded_curves(&self) -> Result<Option<GradedCurves>> {
        self.graded.as_ref().map(|file| GradedCurves::read(file, self.manifest.config.n_layers)).transpose()
    }

    /// The sketches' file, if the split has them.
    pub fn sketches(&self) -> Option<&TensorFile> {
        self.sketches.as_ref()
    }

    /// How many bits the sketches have, if the split has them.
    pub fn sketch_form(&self) -> SketchForm {
        self.manifest.packing.sketch_bits
    }

    /// The sketch of one layer, if the split has them.
    ///
    /// # Errors
    /// If it cannot be read, is damaged or does not fit the model.
    pub fn sketch(&self, layer: usize) -> Result<Option<Sketch>> {
        let read = |file| Sketch::read(file, self.sketch_form(), &self.manifest.config, layer);
        self.sketches.as_ref().map(read).transpose()
    }

    /// The file of what sketches leave of the neurons' rows, if the split has it.
    pub fn residuals(&self) -> Option<&TensorFile> {
        self.residuals.as_ref()
    }

    /// Reads what the sketch of `layer` leaves of the rows of its neurons from `first` on: bundles ([`crate::residual_layout`]) in the
    /// split's order, as many as `out` has room for.
    ///
    /// # Errors
    /// If the split has no residuals, or they cannot be read, are damaged or do not fit the model.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn read_residuals(&self, layer: usize, first: usize, out: &mut [u8]) -> Result<()> {
        let missing = || corrupt(&self.dir.join("manifest.json"), "residuals", "the split has none");
        let file = self.residuals.as_ref().ok_or_else(missing)?;
        crate::sketch::read_residuals(file, &self.manifest.config, layer, first, out)
    }

    /// The predictor of one layer as it is stored, its shapes checked.
    ///
    /// # Errors
    /// If a part is missing, cannot be read, or does not fit the model.
    pub fn stored_predictor(&self, layer: usize) -> Result<StoredPredictor<'_>> {
        let name = |part: &str| format!("predictors.{layer}.{part}");
        let file = &self.predictors;
        let (input, factors) = (file.entry(&name("input"))?, file.entry(&name("factors"))?);
        let ahead = file.tensors().iter().find(|t| t.name == name("ahead"));
        let (hidden, ffn) = (self.manifest.config.hidden_size, self.manifest.config.intermediate_size);
        let neurons = file.read_f32(&name("neurons"))?;
        let shape = (2 * ffn, input.rows);
        if input.columns != hidden || (factors.rows, factors.columns) != shape || neurons.len() != 3 * ffn {
            return Err(corrupt(file.path(), name("input, factors, neurons"), "shapes do not fit the model"));
        }
        if ahead.is_some_and(|a| (a.format, a.rows, a.columns) != (input.format, input.rows, input.columns)) {
            return Err(corrupt(file.path(), name("ahead"), "not stored as the input is"));
        }
        Ok(StoredPredictor { input, ahead, factors, neurons })
    }

    /// The predictor of one layer, decoded, and the lengths of the down columns `[intermediate_size]`; both in the
    /// checkpoint's order of neurons, as [`crate::SplitCheckpoint`] gives the weights.
    ///
    /// # Errors
    /// If the predictor cannot be read or does not fit the model.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn predictor(&self, layer: usize) -> Result<(LowRank, Vec<f32>)> {
        let StoredPredictor { input, factors, neurons, .. } = self.stored_predictor(layer)?;
        let (rank, hidden, ffn) =
            (input.rows, self.manifest.config.hidden_size, self.manifest.config.intermediate_size);
        let place = self.layers[layer].places();
        let column = |which: usize| -> Vec<f32> { place.iter().map(|&p| neurons[which * ffn + p as usize]).collect() };
        let factors = self.decoded(factors)?;
        let rows = |which: usize| -> Vec<f32> {
            place.iter().flat_map(|&p| &factors[(2 * p as usize + which) * rank..][..rank]).copied().collect()
        };
        let fitted = LowRank {
            rank,
            hidden_size: hidden,
            intermediate_size: ffn,
            b: self.decoded(input)?,
            a_gate: rows(0),
            a_up: rows(1),
            gate_residual: column(0),
            up_residual: column(1),
        };
        Ok((fitted, column(2)))
    }

    /// The predictor of one layer for the input of the layer before, which only planted splits have: as [`Split::predictor`] with
    /// another `b`.
    ///
    /// # Errors
    /// As [`Split::predictor`].
    pub fn predictor_ahead(&self, layer: usize) -> Result<Option<LowRank>> {
        let Some(ahead) = self.stored_predictor(layer)?.ahead else { return Ok(None) };
        Ok(Some(LowRank { b: self.decoded(ahead)?, ..self.predictor(layer)?.0 }))
    }

    /// A matrix of the predictors as f32, `[rows, columns]`.
    fn decoded(&self, entry: &TensorEntry) -> Result<Vec<f32>> {
        let file = &self.predictors;
        let encoding = entry.format.encoding().ok_or_else(|| corrupt(file.path(), &entry.name, "not encoded"))?;
        let bytes = file.read(&entry.name)?;
        let mut out = vec![0.0; entry.rows * entry.columns];
        for (row, out) in bytes.chunks_exact(entry.row_bytes()).zip(out.chunks_exact_mut(entry.columns)) {
            unpack(encoding, RowRef::from_matrix_row(encoding, entry.columns, row), out);
        }
        Ok(out)
    }

    /// Bytes of all weights (bundles and resident tensors): what a dense run with this split holds or reads.
    pub fn dense_bytes(&self) -> u64 {
        let bundles: usize = self.layers.iter().map(|l| l.trimmed_bytes(0..l.n_chunks())).sum();
        let vectors = self.resident.tensors().iter().filter(|t| t.format.encoding().is_none()).map(|t| t.bytes);
        let matrices = self.matrices().into_iter().flatten().map(|m| m.bytes());
        bundles as u64 + vectors.sum::<u64>() + matrices.sum::<u64>()
    }

    /// A small file kept from the checkpoint, checked; `None` if the split has none of that name.
    ///
    /// # Errors
    /// If it cannot be read or is not what was written.
    pub fn plain_file(&self, name: &str) -> Result<Option<String>> {
        if let Some(text) = self.delta().map(|delta| delta.plain_file(name)).transpose()?.flatten() {
            // The final model has no template where its copy is empty.
            return Ok(Some(text).filter(|text| !text.is_empty()));
        }
        let Some(entry) = self.manifest.files.iter().find(|f| f.file == name) else { return Ok(None) };
        let path = self.dir.join(name);
        let bytes = files::read(&path, PLAIN_BYTES_MAX).map_err(listed(&path))?;
        let text = String::from_utf8(bytes).map_err(|e| corrupt(&path, "text", e.to_string()))?;
        if format!("{:032x}", xxh3_128(text.as_bytes())) != entry.checksum {
            return Err(corrupt(&path, "checksum", "not the file that this split was made with"));
        }
        Ok(Some(text))
    }

    /// What a planted split says of itself; `None` if the weights come from a checkpoint.
    ///
    /// # Errors
    /// If the file cannot be read or is not what was written.
    pub fn planted(&self) -> Result<Option<PlantedReport>> {
        let Some(text) = self.plain_file(REPORT_FILE)? else { return Ok(None) };
        let report = serde_json::from_str(&text);
        report.map(Some).map_err(|e| corrupt(&self.dir.join(REPORT_FILE), "json", e.to_string()))
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// If it is missing or not what was written.
    pub fn tokenizer_json(&self) -> Result<String> {
        self.plain_file("tokenizer.json")?.ok_or_else(|| corrupt(&self.dir, "tokenizer.json", "the split has none"))
    }
}
