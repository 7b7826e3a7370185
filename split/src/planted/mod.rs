//! A planted model ([`thermocline_datasets::planted`]), written as a split: no checkpoint, no profile.

mod layer;
mod measure;
mod resident;
mod rows;
mod sketch;

use crate::Error;
use crate::build::{Assembled, Kinds, assemble_parts, write_plain_file};
use crate::error::Result;
use crate::manifest::{FORMAT_VERSION, LayerEntry, Manifest, Packing, Source};
use crate::pack_layer::FACTORS;
use crate::partial::Partial;
use crate::sections::layer_entry;
use crate::sketch::{SketchForm, check_width};
use measure::Counts;
use rayon::prelude::*;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use thermocline_calibrate::disk;
use thermocline_datasets::planted::{Measured, PlantedModel, PlantedReport};
use thermocline_kernels::{BundleLayout, Encoding};

/// Neurons in a chunk: at 70B a bundle is what a disk reads at a time, and memory needs no larger piece.
const CHUNK_NEURONS: usize = 1;
/// The file with settings and measurements.
pub(crate) const REPORT_FILE: &str = "planted.json";
/// Room for manifest, tokenizer and headers.
const SMALL_FILES_BYTES: u64 = 64 << 20;

/// Streams of random numbers; those of the datasets crate are below 16.
const MATRIX: u64 = 16;
const EMBEDDING: u64 = 17;
const HEAD: u64 = 18;
const BUNDLE: u64 = 19;
const FACTOR: u64 = 20;

/// What a planted split takes on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PlantedBytes {
    /// Bundles, with the layer files' headers.
    pub ffn: u64,
    /// Embedding, attention, norms, head.
    pub resident: u64,
    /// Predictors.
    pub predictors: u64,
    /// Rates, energies and the trace.
    pub statistics: u64,
    /// Sketches; 0 without.
    pub sketches: u64,
    /// Bytes that must be free for it while it is written.
    pub needed: u64,
}

/// What a planted split turned out as.
#[derive(Debug, Clone, Serialize)]
pub struct PlantedSplit {
    /// The split directory.
    pub path: PathBuf,
    /// The model's name.
    pub model: String,
    /// Its size.
    pub bytes: u64,
    /// Size of the feed-forward bundles in it.
    pub ffn_bytes: u64,
    /// What its trace and predictors give.
    pub measured: Measured,
    /// Layers that an earlier, interrupted run had finished.
    pub resumed_layers: usize,
}

/// Everything that decides the bytes.
#[derive(Debug, Serialize)]
struct Identity {
    program: String,
    planted: String,
    sketch: Option<SketchForm>,
}

/// The size of a planted split, with sketches or without, before anything is written.
///
/// # Errors
/// If the model's rows cannot be stored in q4, or in a sketch that is asked for.
pub fn planted_bytes(model: &PlantedModel, sketch: Option<SketchForm>) -> Result<PlantedBytes> {
    let (shape, layout) = (model.shape(), layout(model)?);
    if sketch.is_some() {
        check_width(shape.hidden_size)?;
    }
    let (layers, n, rank) = (shape.n_layers as u64, shape.intermediate_size, layer::rank(model));
    let header = 4096 + n * 36;
    let ffn = layers * (n * layout.bundle_bytes() + header) as u64;
    let predictor = 2 * rank * Encoding::Q8.row_stride(shape.hidden_size) + 2 * n * FACTORS.row_stride(rank) + 12 * n;
    let statistics = 8 * n + model.trace_tokens().len() * n.div_ceil(8);
    let (predictors, statistics) = (layers * predictor as u64, layers * statistics as u64);
    let sketches = sketch.map_or(0, |form| layers * form.bytes(n, shape.hidden_size) as u64);
    let resident = resident::bytes(model);
    // Until the end, all but bundles and resident tensors also lies in the parts that an interrupted run is continued from.
    let needed = ffn + resident + 2 * (predictors + statistics + sketches) + SMALL_FILES_BYTES;
    Ok(PlantedBytes { ffn, resident, predictors, statistics, sketches, needed })
}

fn layout(model: &PlantedModel) -> Result<BundleLayout> {
    let hidden_size = model.shape().hidden_size;
    BundleLayout::new(Encoding::Q4, hidden_size)
        .ok_or_else(|| Error::Settings { what: format!("hidden size {hidden_size} is no multiple of 32") })
}

/// Writes the split of a planted model to `out`, which must not exist; with a [`crate::Sketch`] of each layer in the form `sketch`, if
/// there is to be any.
/// `progress(done, total)` counts layers.
///
/// As [`crate::split()`] does, it grows as `OUT.partial`, can be continued after an interruption, and is renamed when it
/// is complete. Layers are made in parallel. Memory: a few megabytes of bundles, and what is not bundles of one layer, a
/// thread (0.22 GB more with a sketch at 70B); one attention matrix or the embedding; the tokens' codes. Equal settings give
/// equal bytes.
///
/// # Errors
/// If the disk is full or cannot be written to, another process writes the same split, or the hidden size is no multiple of 64
/// where there is to be a sketch.
pub fn split_planted(
    model: &PlantedModel,
    sketch: Option<SketchForm>,
    out: &Path,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<PlantedSplit> {
    let needed = planted_bytes(model, sketch)?.needed;
    build(model, sketch, needed, out, progress).map_err(|error| match &error {
        Error::Io { source, .. } if disk::is_full(source) => {
            Error::DiskFull { path: out.to_owned(), needed, available: disk::Space::of(out).available_bytes }
        }
        _ => error,
    })
}

/// One finished layer.
struct Done {
    entry: LayerEntry,
    counts: Counts,
    resumed: bool,
}

fn build(
    model: &PlantedModel,
    sketch: Option<SketchForm>,
    needed: u64,
    out: &Path,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<PlantedSplit> {
    if out.exists() {
        return Err(Error::Exists { path: out.to_owned() });
    }
    let layout = layout(model)?;
    let identity = Identity { program: env!("CARGO_PKG_VERSION").to_owned(), planted: model.digest(), sketch };
    let partial = Partial::open(out, &serde_json::to_string(&identity).unwrap_or_default())?;
    partial.check_space(needed)?;

    let (n_layers, n_done) = (model.shape().n_layers, AtomicUsize::new(0));
    let count = || progress(n_done.fetch_add(1, Ordering::Relaxed) + 1, n_layers + 2);
    // Attention and head are a sixth of a large model: one thread writes them while the others make layers. Nothing
    // inside a layer runs in parallel, so that no thread holds two at a time.
    let (layers, resident) = rayon::join(
        || {
            let layers = (0..n_layers).into_par_iter().with_max_len(1);
            let done = layers.map(|l| make_layer(model, l, &layout, sketch, &partial).inspect(|_| count()));
            done.collect::<Result<Vec<Done>>>()
        },
        || resident::write(model, partial.dir()).inspect(|_| count()),
    );
    let (layers, resident) = (layers?, resident?);
    let mut counts = Counts::default();
    layers.iter().for_each(|layer| counts += layer.counts);
    let measured = counts.measured(model);
    let resumed_layers = layers.iter().filter(|l| l.resumed).count();

    let places: Vec<u64> = model.trace_tokens().map(|t| t as u64).collect();
    let config = model.config();
    let kinds = Kinds { ahead: true, sketches: sketch, residuals: false };
    let Assembled { predictors, statistics, sketches, residuals } =
        assemble_parts(&config, layer::rank(model), kinds, &places, &partial)?;
    let dir = partial.dir();
    let report = serde_json::to_string_pretty(&PlantedReport::new(model, measured.clone())).unwrap_or_default();
    let files = [("tokenizer.json", model.tokenizer_json()), (REPORT_FILE, report)];
    let files = files.into_iter().map(|(name, text)| write_plain_file(dir, name, &text)).collect::<Result<_>>()?;
    let layers: Vec<LayerEntry> = layers.into_iter().map(|layer| layer.entry).collect();
    let ffn_bytes = layers.iter().map(|l| l.file_bytes).sum();
    let further = [Some(&resident), Some(&predictors), Some(&statistics), sketches.as_ref()];
    let bytes = ffn_bytes + further.into_iter().flatten().map(|file| file.file_bytes).sum::<u64>();
    let manifest = Manifest {
        format: "thermocline-split".to_owned(),
        version: FORMAT_VERSION,
        source: Source {
            model: model.name(),
            model_digest: model.digest(),
            ffn_dtype: "planted".to_owned(),
            corpus_digest: model.digest(),
            n_tokens: model.n_sampled() as u64,
        },
        config,
        packing: Packing {
            ffn_encoding: Encoding::Q4.name().to_owned(),
            resident_encoding: Encoding::Q4.name().to_owned(),
            attention_encoding: None,
            chunk_neurons: CHUNK_NEURONS,
            order: "frequency".to_owned(),
            predictor_rank: layer::rank(model),
            active_share: model.statistics().active_share,
            sketch_bits: sketch.unwrap_or_default(),
        },
        layers,
        resident,
        resident_planes: None,
        predictors,
        statistics,
        shares: None,
        graded: None,
        sketches,
        residuals,
        files,
        checksum: String::new(),
    };
    manifest.write(dir)?;
    partial.publish(out)?;
    progress(n_layers + 2, n_layers + 2);
    Ok(PlantedSplit { path: out.to_owned(), model: model.name(), bytes, ffn_bytes, measured, resumed_layers })
}

fn make_layer(
    model: &PlantedModel,
    l: usize,
    layout: &BundleLayout,
    sketch: Option<SketchForm>,
    partial: &Partial,
) -> Result<Done> {
    let sections = [(model.shape().intermediate_size, Encoding::Q4)];
    let files = Partial::layer_files(l, &sections);
    let resumed = partial.has_layer(l, &files);
    let packed = if resumed {
        partial.read_part(l)?
    } else {
        let packed = layer::write(model, l, layout, sketch, partial)?;
        partial.finish_layer(l, &files, &packed)?;
        packed
    };
    Ok(Done { entry: layer_entry(partial.dir(), &sections, &files)?, counts: Counts::of(model, l, &packed), resumed })
}
