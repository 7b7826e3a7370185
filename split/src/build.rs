//! Makes a split directory from a checkpoint and its profile, one layer at a time.

use crate::error::{Result, corrupt, io};
use crate::manifest::{FORMAT_VERSION, LayerEntry, Manifest, Packing, PlainFile, Source};
use crate::order::{OrderKind, OverFetch, best_chunk, best_order, over_fetch_table};
use crate::pack_layer::{FACTORS, PackedLayer, pack_layer};
use crate::pack_resident::{WrittenResident, resident_matrices, shape, write_resident};
use crate::partial::Partial;
use crate::plane_file::{Place, write_plane};
use crate::planes::contents;
use crate::precision::first_chunks;
use crate::resident::is_attention;
use crate::sections::layer_entry;
use crate::tensor_file::{Format, TensorFileEntry, Writer};
use crate::{Error, LayerEncodings, SketchForm, chunk::Compression, sketch};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use thermocline_calibrate::coactivation::BitMatrix;
use thermocline_calibrate::{ActiveSet, Profile, disk};
use thermocline_datasets::{Checkpoint, ModelConfig};
use thermocline_kernels::{Encoding, ScaleFit};
use xxhash_rust::xxh3::xxh3_128;

/// Tokens of trace, at most, that a split carries for `plan` and `report`.
const TRACE_TOKENS_MAX: usize = 1024;
/// Layers on which orders and chunk lengths are compared.
const SURVEYED_LAYERS: usize = 6;

/// How to split.
#[derive(Debug, Clone)]
pub struct SplitOptions {
    /// Encoding of the feed-forward bundles of each layer.
    pub encoding: LayerEncodings,
    /// Encoding of embedding and head, and of attention.
    pub resident_encoding: Encoding,
    /// Encoding of attention, if it has one of its own.
    pub attention_encoding: Option<Encoding>,
    /// The neurons' order; measured if not given.
    pub order: Option<OrderKind>,
    /// Neurons in a chunk; from the cost model if not given.
    pub chunk_neurons: Option<usize>,
    /// When to compress chunks.
    pub compression: Compression,
    /// Rank of the low-rank predictor; a multiple of 32.
    pub predictor_rank: usize,
    /// Share of each layer's neurons that come first because of their energy, in whole chunks ([`outliers_first`]).
    ///
    /// [`outliers_first`]: crate::order::outliers_first
    pub outliers: f64,
    /// How the scales of quantised groups are chosen.
    pub scales: Scales,
    /// How codes of gate, up and attention rows in q4 and q8, and of residuals, are chosen.
    pub rounding: Rounding,
    /// The form of each layer's [`crate::Sketch`], if layers are to have one.
    pub sketch: Option<SketchForm>,
    /// Whether what the sketches leave of their rows is kept, too; only with sketches.
    pub residuals: bool,
}

impl SplitOptions {
    /// Encoding of a matrix of embedding, attention or head.
    pub(crate) fn encoding_of(&self, matrix: &str) -> Encoding {
        self.attention_encoding.filter(|_| is_attention(matrix)).unwrap_or(self.resident_encoding)
    }

    /// How many neurons of a layer come first because of their energy.
    pub(crate) fn outlier_neurons(&self, n_neurons: usize, chunk_neurons: usize) -> usize {
        first_chunks(self.outliers, n_neurons, chunk_neurons)
    }

    /// The order as manifests have it.
    fn order_name(&self, order: OrderKind) -> String {
        if self.outliers > 0.0 {
            format!("outliers@{},{}", self.outliers, order.name())
        } else {
            order.name().to_owned()
        }
    }
}

/// How codes are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// So that later columns make good what earlier ones lose in products with inputs like the profile's (GPTQ, arXiv 2210.17323).
    Feedback,
    /// The nearest one.
    Nearest,
}

/// What the scales of quantised groups are chosen by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scales {
    /// The squared error, weighted by size and with the input's mean square in the profile ([`ScaleFit::Weighted`]).
    Moments,
    /// The squared error.
    LeastSquares,
    /// The weight of largest magnitude.
    Absmax,
}

impl Scales {
    /// The fit of rows whose input channels have these mean squares.
    pub(crate) fn fit(self, mean_squares: Option<&[f32]>) -> ScaleFit<'_> {
        match (self, mean_squares) {
            (Scales::Absmax, _) => ScaleFit::Absmax,
            (Scales::Moments, channels) => ScaleFit::Weighted(channels),
            (Scales::LeastSquares, _) => ScaleFit::LeastSquares,
        }
    }
}

/// What a split turned out as.
#[derive(Debug, Clone, Serialize)]
pub struct SplitReport {
    /// The split directory.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Size of the feed-forward bundles in it.
    pub ffn_bytes: u64,
    /// The order chosen.
    pub order: OrderKind,
    /// The chunk length chosen.
    pub chunk_neurons: usize,
    /// Whether codes of attention's rows are the nearest ones for want of the inputs' second moments in the profile.
    pub attention_lacks_moments: bool,
    /// What reading whole chunks costs, by order.
    pub over_fetch: Vec<OverFetch>,
    /// Layers that an earlier, interrupted run had finished.
    pub resumed_layers: usize,
}

/// Everything that decides the bytes of a split: a partial one is only continued if all of it is equal.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Identity {
    program: String,
    model_digest: String,
    corpus_digest: String,
    statistics_digest: String,
    packing: Packing,
    compression: String,
    scales: String,
    rounding: String,
    sketch: bool,
    residuals: bool,
}

/// Splits `checkpoint` into `out`, which must not exist. `progress(done, total)` counts layers.
///
/// The directory grows as `OUT.partial` and is renamed when it is complete; an interrupted run is continued by the next
/// one with the same arguments. Memory: the f32 weights of one layer's feed-forward, its encoded bundles, and one
/// embedding block.
///
/// # Errors
/// If the profile belongs to another model, a weight cannot be encoded, the disk is full, or another process writes
/// the same split.
pub fn split(
    checkpoint: &dyn Checkpoint,
    profile: &Profile,
    options: &SplitOptions,
    out: &Path,
    progress: &dyn Fn(usize, usize),
) -> Result<SplitReport> {
    build(checkpoint, profile, options, out, progress).map_err(|error| match &error {
        Error::Io { source, .. } if disk::is_full(source) => {
            let needed = expected_bytes(checkpoint, options);
            Error::DiskFull { path: out.to_owned(), needed, available: disk::Space::of(out).available_bytes }
        }
        _ => error,
    })
}

fn build(
    checkpoint: &dyn Checkpoint,
    profile: &Profile,
    options: &SplitOptions,
    out: &Path,
    progress: &dyn Fn(usize, usize),
) -> Result<SplitReport> {
    if out.exists() {
        return Err(Error::Exists { path: out.to_owned() });
    }
    let config = checkpoint.config();
    let model_digest = checkpoint.digest()?;
    if profile.meta().model_digest != model_digest {
        let (path, got) = (profile.dir().to_owned(), profile.meta().model_digest.clone());
        return Err(Error::WrongSource { path, got, expected: model_digest });
    }
    profile.verify()?;
    check_shape(profile, config)?;
    let settings = |what: String| Error::Settings { what };
    // A base with its coarse plane alone is a way to read, not to store.
    let of_matrices = [Some(options.resident_encoding), options.attention_encoding];
    if options.encoding.all().chain(of_matrices.into_iter().flatten()).any(|e| e == Encoding::Q4Plus) {
        return Err(settings(format!("{} cannot be stored; use {}", Encoding::Q4Plus, Encoding::Q4Exact)));
    }
    let widest = options.encoding.all().find(|e| !e.accepts(config.hidden_size));
    if let Some(encoding) = widest {
        let what = format!("{encoding}: hidden size {} is no multiple of 32; use --encoding bf16x", config.hidden_size);
        return Err(settings(what));
    }
    if let Some(l) = options.encoding.last_named().filter(|l| *l >= config.n_layers) {
        return Err(settings(format!("--encoding names layer {l}; the model has {}", config.n_layers)));
    }
    if options.predictor_rank == 0 || !options.predictor_rank.is_multiple_of(32) {
        return Err(settings(format!("--predictor-rank {} is not a multiple of 32", options.predictor_rank)));
    }

    if !(0.0..=1.0).contains(&options.outliers) {
        return Err(settings(format!("--outliers {} is not from 0 to 1", options.outliers)));
    }

    if options.sketch.is_some() {
        sketch::check_width(config.hidden_size)?;
    } else if options.residuals {
        return Err(settings("--residuals is what sketches leave of their rows; add --sketch".to_owned()));
    }

    let surveyed = survey(profile)?;
    let chunk_neurons = match options.chunk_neurons {
        Some(n) if n == 0 || n > config.intermediate_size => {
            return Err(settings(format!("--chunk-neurons {n} is not in 1..={}", config.intermediate_size)));
        }
        Some(n) => n,
        None => best_chunk(&surveyed, bytes_each(options.encoding.common(), 3, config.hidden_size))
            .min(config.intermediate_size),
    };
    let over_fetch = over_fetch_table(&surveyed);
    let order = options.order.unwrap_or_else(|| best_order(&over_fetch, chunk_neurons));
    let packing = Packing {
        ffn_encoding: options.encoding.to_string(),
        resident_encoding: options.resident_encoding.name().to_owned(),
        attention_encoding: options
            .attention_encoding
            .filter(|e| *e != options.resident_encoding)
            .map(|e| e.name().to_owned()),
        chunk_neurons,
        order: options.order_name(order),
        predictor_rank: options.predictor_rank.min(config.hidden_size / 32 * 32).max(32),
        active_share: if config.activation.is_sparse() { 0.0 } else { profile.meta().settings.active_share },
        sketch_bits: options.sketch.unwrap_or_default(),
    };
    let identity = Identity {
        program: env!("CARGO_PKG_VERSION").to_owned(),
        model_digest: model_digest.clone(),
        corpus_digest: profile.meta().corpus_digest.clone(),
        statistics_digest: profile.meta().statistics_digest.clone(),
        packing: packing.clone(),
        compression: format!("{:?}", options.compression),
        scales: format!("{:?}", options.scales),
        rounding: format!("{:?}", options.rounding),
        sketch: options.sketch.is_some(),
        residuals: options.residuals,
    };
    let partial = Partial::open(out, &serde_json::to_string(&identity).unwrap_or_default())?;
    partial.check_space(expected_bytes(checkpoint, options))?;

    let dir = partial.dir();
    let mut layers = Vec::with_capacity(config.n_layers);
    let mut resumed_layers = 0;
    for l in 0..config.n_layers {
        progress(l, config.n_layers + 1);
        let sections = options.encoding.sections(l, config.intermediate_size, chunk_neurons);
        let files = Partial::layer_files(l, &sections);
        if partial.has_layer(l, &files) {
            resumed_layers += 1;
        } else {
            let packed = pack_layer(checkpoint, profile, l, &sections, order, options, &packing)?;
            let (mut first, layer_neurons) = (0, packed.order.len());
            for (s, ((n, encoding), planes)) in sections.iter().zip(&packed.sections).enumerate() {
                let place = Place { layer: l, neurons: first..first + n, layer_neurons };
                let ids = &packed.order[place.neurons.clone()];
                let contents = contents(*encoding, config.hidden_size, planes, *n);
                for (p, (plane, content)) in planes.iter().zip(&contents).enumerate() {
                    let path = partial.temporary_layer(l, s, p);
                    write_plane(&path, &place, content, ids, plane, chunk_neurons, options.compression)?;
                }
                first += n;
            }
            partial.finish_layer(l, &files, &packed)?;
        }
        layers.push(layer_entry(dir, &sections, &files)?);
    }
    progress(config.n_layers, config.n_layers + 1);
    let WrittenResident { resident, planes: resident_planes, lacks_moments } =
        write_resident(checkpoint, profile, options, dir)?;
    let places: Vec<u64> = profile.sample_tokens()?.into_iter().take(TRACE_TOKENS_MAX).collect();
    let rank = packing.predictor_rank;
    let kinds = Kinds { ahead: false, sketches: options.sketch, residuals: options.residuals };
    let Assembled { predictors, statistics, sketches, residuals } =
        assemble_parts(config, rank, kinds, &places, &partial)?;
    let files = write_plain_files(checkpoint, dir)?;
    let of_layer = |l: &LayerEntry| l.file_bytes + l.others().map(|p| p.file_bytes).sum::<u64>();
    let ffn_bytes: u64 = layers.iter().map(of_layer).sum();
    let source = Source {
        model: checkpoint.name(),
        model_digest,
        ffn_dtype: ffn_dtype(checkpoint),
        corpus_digest: profile.meta().corpus_digest.clone(),
        n_tokens: profile.meta().n_tokens,
    };
    let bytes = ffn_bytes
        + resident.file_bytes
        + resident_planes.as_ref().map_or(0, |f| f.file_bytes)
        + predictors.file_bytes
        + [&sketches, &residuals].into_iter().flatten().map(|f| f.file_bytes).sum::<u64>()
        + statistics.file_bytes;
    let manifest = Manifest {
        format: "thermocline-split".to_owned(),
        version: FORMAT_VERSION,
        source,
        config: config.clone(),
        packing,
        layers,
        resident,
        resident_planes,
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
    progress(config.n_layers + 1, config.n_layers + 1);
    let path = out.to_owned();
    Ok(SplitReport {
        path,
        bytes,
        ffn_bytes,
        order,
        chunk_neurons,
        attention_lacks_moments: lacks_moments,
        over_fetch,
        resumed_layers,
    })
}

/// That a profile, whatever it says of where it is from, has the sizes of the checkpoint's layers.
fn check_shape(profile: &Profile, config: &ModelConfig) -> Result<()> {
    let sizes = |c: &ModelConfig| [c.n_layers, c.hidden_size, c.intermediate_size, c.n_heads, c.n_kv_heads, c.head_dim];
    let (got, expected) = (sizes(profile.config()), sizes(config));
    if got == expected {
        return Ok(());
    }
    let reason = format!("layers, widths and heads {got:?}, the checkpoint has {expected:?}");
    Err(corrupt(&profile.dir().join("profile.json"), "config", reason))
}

/// The activation rates that order the neurons.
pub(crate) fn rates(statistics: &thermocline_calibrate::LayerStatistics, packing: &Packing) -> Vec<f64> {
    let share = thermocline_calibrate::TOP_SHARES.iter().position(|&s| s == packing.active_share);
    statistics.activation_rate(share.map_or(ActiveSet::Nonzero, ActiveSet::Top))
}

fn survey(profile: &Profile) -> Result<Vec<BitMatrix>> {
    let n = profile.config().n_layers;
    let step = n.div_ceil(SURVEYED_LAYERS).max(1);
    (0..n).step_by(step).map(|l| Ok(profile.layer(l)?.active)).collect()
}

fn ffn_dtype(checkpoint: &dyn Checkpoint) -> String {
    let info = checkpoint.info("model.layers.0.mlp.gate_proj.weight");
    info.map_or_else(|| "unknown".to_owned(), |i| crate::verify::dtype_name(&i.dtype))
}

/// The files that the layers' parts become.
pub(crate) struct Assembled {
    pub predictors: TensorFileEntry,
    pub statistics: TensorFileEntry,
    /// If the layers have sketches.
    pub sketches: Option<TensorFileEntry>,
    /// If what these leave was kept.
    pub residuals: Option<TensorFileEntry>,
}

/// What layers' parts have, that not all have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kinds {
    /// Predictors for the input of the layer before.
    pub ahead: bool,
    /// Sketches, and their form.
    pub sketches: Option<SketchForm>,
    pub residuals: bool,
}

/// Puts the layers' parts together: predictors of rank `rank`, statistics with the trace of the tokens at `places`, and what else
/// they have.
pub(crate) fn assemble_parts(
    config: &ModelConfig,
    rank: usize,
    kinds: Kinds,
    places: &[u64],
    partial: &Partial,
) -> Result<Assembled> {
    let (ffn, n_trace) = (config.intermediate_size, places.len());
    let mut predictors = Vec::new();
    let mut statistics = vec![("trace.token".to_owned(), Format::U8, n_trace, 8)];
    for l in 0..config.n_layers {
        predictors.push((format!("predictors.{l}.input"), Format::Q8, rank, config.hidden_size));
        if kinds.ahead && l > 0 {
            predictors.push((format!("predictors.{l}.ahead"), Format::Q8, rank, config.hidden_size));
        }
        predictors.push((format!("predictors.{l}.factors"), FACTORS.into(), 2 * ffn, rank));
        predictors.push((format!("predictors.{l}.neurons"), Format::F32, 3, ffn));
        statistics.push((format!("layers.{l}.activation_rate"), Format::F32, 1, ffn));
        statistics.push((format!("layers.{l}.energy"), Format::F32, 1, ffn));
        statistics.push((format!("layers.{l}.trace"), Format::U8, n_trace, ffn.div_ceil(8)));
    }
    let mut predictors = Writer::create(partial.dir(), "predictors.safetensors", predictors)?;
    let mut statistics = Writer::create(partial.dir(), "stats.safetensors", statistics)?;
    let create_sketches = |form| {
        let tensors = (0..config.n_layers).flat_map(|l| sketch::tensors(l, form, config));
        Ok::<_, Error>((form, Writer::create(partial.dir(), "sketches.safetensors", tensors.collect())?))
    };
    let create_residuals = || {
        let tensors = (0..config.n_layers).map(|l| sketch::residual_tensor(l, config));
        Writer::create(partial.dir(), "residuals.safetensors", tensors.collect())
    };
    let mut sketches = kinds.sketches.map(create_sketches).transpose()?;
    let mut residuals = kinds.residuals.then(create_residuals).transpose()?;
    let tokens: Vec<u8> = places.iter().flat_map(|t| t.to_le_bytes()).collect();
    statistics.write("trace.token", &tokens)?;
    for l in 0..config.n_layers {
        let part: PackedLayer = partial.read_part(l)?;
        predictors.write(&format!("predictors.{l}.input"), &part.predictor_input)?;
        if kinds.ahead && l > 0 {
            predictors.write(&format!("predictors.{l}.ahead"), &part.predictor_ahead)?;
        }
        predictors.write(&format!("predictors.{l}.factors"), &part.predictor_factors)?;
        predictors.write(&format!("predictors.{l}.neurons"), &part.predictor_neurons)?;
        statistics.write(&format!("layers.{l}.activation_rate"), &part.activation_rate)?;
        statistics.write(&format!("layers.{l}.energy"), &part.energy)?;
        let width = ffn.div_ceil(8);
        statistics.write(&format!("layers.{l}.trace"), part.trace.get(..n_trace * width).unwrap_or_default())?;
        if let Some((form, sketches)) = &mut sketches {
            for ((name, ..), bytes) in sketch::tensors(l, *form, config).iter().zip(&part.sketch) {
                sketches.write(name, bytes)?;
            }
        }
        if let Some(residuals) = &mut residuals {
            residuals.write(&sketch::residual_tensor(l, config).0, &part.residuals)?;
        }
    }
    Ok(Assembled {
        predictors: predictors.finish()?,
        statistics: statistics.finish()?,
        sketches: sketches.map(|(_, writer)| writer.finish()).transpose()?,
        residuals: residuals.map(Writer::finish).transpose()?,
    })
}

fn write_plain_files(checkpoint: &dyn Checkpoint, dir: &Path) -> Result<Vec<PlainFile>> {
    let template = checkpoint.chat_template().map(|t| ("chat_template.jinja", t));
    let files = [("tokenizer.json", checkpoint.tokenizer_json()?)].into_iter().chain(template);
    files.map(|(name, text)| write_plain_file(dir, name, &text)).collect()
}

/// Writes a small file that the manifest lists.
pub(crate) fn write_plain_file(dir: &Path, name: &str, text: &str) -> Result<PlainFile> {
    let path = dir.join(name);
    std::fs::write(&path, text).map_err(io(&path))?;
    Ok(PlainFile { file: name.to_owned(), checksum: format!("{:032x}", xxh3_128(text.as_bytes())) })
}

/// About what a row, or a bundle of three, takes.
fn bytes_each(encoding: Encoding, rows: usize, columns: usize) -> usize {
    // Exact rows are planned with what normal weights take, and somewhat more.
    let streams = match encoding {
        Encoding::Bf16x => columns / 10,
        Encoding::Q4Exact | Encoding::Q8Exact => columns * 3 / 8,
        _ => 0,
    };
    rows * (encoding.row_stride(columns) + streams)
}

fn expected_bytes(checkpoint: &dyn Checkpoint, options: &SplitOptions) -> u64 {
    let config = checkpoint.config();
    let neuron = |encoding: Encoding| bytes_each(encoding, 3, config.hidden_size);
    let sections = |l: usize| options.encoding.sections(l, config.intermediate_size, 1);
    let ffn: usize = (0..config.n_layers).flat_map(sections).map(|(n, encoding)| n * neuron(encoding)).sum();
    let resident: usize = resident_matrices(checkpoint)
        .iter()
        .filter_map(|name| Some((name, shape(checkpoint, name).ok()?)))
        .map(|(name, (rows, columns))| rows * bytes_each(options.encoding_of(name), 1, columns))
        .sum();
    let predictors = config.n_layers
        * (options.predictor_rank * config.hidden_size * 2
            + 2 * config.intermediate_size * (options.predictor_rank * 2));
    let of_layer = |form: SketchForm| form.bytes(config.intermediate_size, config.hidden_size);
    let sketches = config.n_layers * options.sketch.map_or(0, of_layer);
    let (_, _, rows, bundle_bytes) = sketch::residual_tensor(0, config);
    let residuals = if options.residuals { config.n_layers * rows * bundle_bytes } else { 0 };
    // They lie in their parts, too, until they are put together.
    (ffn + resident + predictors + 2 * (sketches + residuals)) as u64 + (16 << 20)
}
