//! What goes where for a budget, and how fast that should be.

use crate::attention::{Rope, batch_scratch_bytes};
use crate::audit::Audit;
use crate::budget::format_bytes;
use crate::cache::NeuronCache;
use crate::chooser::{Chooser, Judgement, always_neurons, check_always, is_sketched};
use crate::divide::{activation_rates, active_bundle, divide, equal_prefixes, prefix_bytes, slot_bytes};
use crate::fetch::Fetcher;
use crate::ffn::FfnSums;
use crate::hardware::{Hardware, StagingShape};
use crate::kv::KvCache;
use crate::prefill::{FfnBatch, PIECE};
use crate::replay::{Replayed, Trace};
use crate::residual::{layout_with, reads_residuals};
use crate::{Error, Result};
use serde::Serialize;
use std::borrow::Cow;
use thermocline_datasets::Activation;
use thermocline_kernels::{Certificate, Encoding, LayerLayout, LayoutSection, QuantisedInput};
use thermocline_split::{Format, LayerFile, Split, StoredMatrix, residual_layout};

/// How neurons are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "mode", rename_all = "lowercase")]
pub enum Mode {
    /// Every neuron that is not provably zero: the dense model's own output.
    Exact,
    /// The predicted top share.
    Sparse {
        /// Share of each layer's neurons that are computed, above 0 and at most 1; of those that are not always computed.
        active: f32,
    },
}

/// What is to be planned.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct PlanRequest {
    /// How neurons are chosen.
    pub mode: Mode,
    /// Sparse mode of splits with sketches: the share of each layer's neurons, the first in the split's order, that every token computes
    /// and that have no sketch in memory. `None`: on a GPU as many as fit into VRAM, on a CPU none.
    pub always: Option<f32>,
    /// Bytes that weights, caches and buffers may take; `None`: whatever the model needs.
    pub ram_budget_bytes: Option<u64>,
    /// Tokens of context.
    pub context: usize,
    /// Prompt tokens that are computed at once.
    pub batch: usize,
    /// Threads that compute.
    pub n_threads: usize,
}

/// Memory that is taken whatever the division of the weights.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct FixedBytes {
    /// Norms and biases.
    pub vectors: u64,
    /// Predictors or sketches, in sparse mode.
    pub predictors: u64,
    /// Keys and values.
    pub kv_cache: u64,
    /// Activations, logits, sums, decoded pieces; in sparse mode what an audit takes.
    pub scratch: u64,
    /// Buffers between disk and computation, if anything is streamed.
    pub staging: u64,
}

impl FixedBytes {
    fn total(&self) -> u64 {
        self.vectors + self.predictors + self.kv_cache + self.scratch + self.staging
    }
}

/// The division of a model between memory and disk.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// What was asked for.
    pub request: PlanRequest,
    /// Memory besides weights.
    pub fixed: FixedBytes,
    /// Rows in memory of each embedding, attention and head matrix, in file order.
    #[serde(skip)]
    pub pinned_rows: Vec<usize>,
    /// Bytes of them.
    pub pinned_bytes: u64,
    /// Neurons in memory of each layer: a prefix of the split order.
    pub hot_neurons: Vec<usize>,
    /// Bytes of them.
    pub hot_bytes: u64,
    /// The first neurons of each layer, which every token of sparse mode computes and of which no sketch is in memory.
    pub always_neurons: usize,
    /// Sparse mode: the others are in memory as what their sketches leave of them, none is on disk.
    pub residuals: bool,
    /// What all would take if they were, where the budget is too small for that: then neurons are read whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub residuals_would_take: Option<u64>,
    /// Layers whose neurons are not all laid out alike: what each of their sections is.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sections: Vec<PlannedSection>,
    /// Exact mode, if everything is in memory and there is room: 8-bit copies of the gates, which prove most of those that
    /// are not positive.
    pub certificate_bytes: u64,
    /// Slots for cold neurons of late.
    pub cache_slots: usize,
    /// Bytes of them.
    pub cache_bytes: u64,
    /// All of the above.
    pub total_bytes: u64,
    /// All weights of the model as encoded here.
    pub dense_bytes: u64,
    /// Buffers between disk and computation.
    pub staging: StagingShape,
    /// Bytes that a decoded token is expected to read.
    pub ram_bytes_per_token: u64,
    /// As above.
    pub disk_bytes_per_token: u64,
    /// Reads from disk that these bytes are expected to take.
    pub disk_reads_per_token: u64,
    /// Sparse mode with streaming: what exact mode would read from disk under the same budget.
    pub exact_disk_bytes_per_token: Option<u64>,
    /// Share of the cold neurons that the cache is expected to hold.
    pub cache_hit_rate: f64,
}

/// Neighbouring neurons of a layer in one encoding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlannedSection {
    /// The layer.
    pub layer: usize,
    /// How many neurons; the layer's sections follow each other, hottest first.
    pub neurons: usize,
    /// Their encoding, with the planes that are used.
    pub encoding: &'static str,
    /// Bytes of a bundle.
    pub bundle_bytes: usize,
}

/// A speed and where it comes from.
#[derive(Debug, Clone, Serialize)]
pub struct Prediction {
    /// Decode speed.
    pub tok_s: f64,
    /// The physical limit: the same with RAM at its full speed.
    pub limit_tok_s: f64,
    /// `ram`, `kernel` or `disk`.
    pub bottleneck: &'static str,
    /// The formula, with its numbers.
    pub formula: String,
}

impl Plan {
    /// Divides `split` for `request`.
    ///
    /// In exact mode every byte is read once a token, so any division is as good as another: matrices first, then an
    /// equal prefix of every layer. In sparse mode matrices (read by every token) come first, then neurons by their
    /// activation rate over all layers, and the rest of the budget is divided between this hot prefix and the cache
    /// by replaying the split's trace.
    ///
    /// # Errors
    /// [`Error::DoesNotFit`] if the budget cannot hold what must be in memory.
    pub fn new(split: &Split, request: PlanRequest) -> Result<Self> {
        check_request(&request)?;
        check_always(split, request.mode, request.always)?;
        let config = &split.manifest().config;
        let n = config.intermediate_size;
        let matrices = split.matrices()?;
        let matrix_bytes: u64 = matrices.iter().map(StoredMatrix::bytes).sum();
        let all_hot = prefix_bytes(split, &vec![n; config.n_layers]);
        let n_always = n_always(split, &request);
        let mut fixed = fixed_bytes(split, &request);
        let budget = request.ram_budget_bytes.unwrap_or(u64::MAX);
        let mut staging = StagingShape::default();
        let mut pinned_rows: Vec<usize> = matrices.iter().map(|t| t.entry().rows).collect();
        let mut hot = vec![n; config.n_layers];
        let mut cache_slots = 0;
        let mut replayed = None;
        let besides = fixed.total().saturating_add(matrix_bytes);
        let has_residuals = reads_residuals(split, request.mode)?;
        let layouts = |residuals| split.layers().iter().map(move |file| layout_with(file, residuals));
        let with_residuals = has_residuals.then(|| layouts(Some(n_always)).map(|l| l.offset(n) as u64).sum::<u64>());
        let residuals = with_residuals.filter(|bytes| besides.saturating_add(*bytes) <= budget);
        if residuals.is_none() && besides.saturating_add(all_hot) > budget {
            staging = staging_shape(split, &matrices, budget, budget.saturating_sub(fixed.total()));
            fixed.staging = staging_bytes(split, &staging);
            let mut left = budget.checked_sub(fixed.total()).ok_or_else(|| does_not_fit(budget, &fixed))?;
            // The head last: its rows can be divided, and an untied embedding is read one row a token.
            let tied = config.tie_word_embeddings;
            for ((rows, t), i) in pinned_rows.iter_mut().zip(&matrices).zip(0..) {
                let later = i == 0 || t.entry().name == "lm_head.weight";
                *rows = if later { 0 } else { take_rows(t, &mut left) };
            }
            let head = if tied { 0 } else { matrices.len() - 1 };
            pinned_rows[head] = take_rows(&matrices[head], &mut left);
            match request.mode {
                Mode::Exact => hot = equal_prefixes(split, |hot| prefix_bytes(split, hot) <= left),
                Mode::Sparse { .. } => {
                    let trace = Trace::load(split)?;
                    let best = divide(split, &trace, left)?;
                    (hot, cache_slots) = (best.0, best.1);
                    replayed = Some(best.2);
                }
            }
        }
        let pinned_bytes = matrices.iter().zip(&pinned_rows).map(|(t, &r)| (r * t.row_bytes()) as u64).sum();
        let hot_bytes = residuals.unwrap_or_else(|| prefix_bytes(split, &hot));
        let cache_bytes = NeuronCache::bytes(cache_slots, slot_bytes(split, &hot), config.n_layers, n);
        let taken: u64 = fixed.total() + pinned_bytes + hot_bytes + cache_bytes;
        let certificate_bytes = match certificate_bytes(split, &request) {
            bytes if fixed.staging == 0 && taken.saturating_add(bytes) <= budget => bytes,
            _ => 0,
        };
        let in_use: Vec<_> = layouts(residuals.map(|_| n_always)).collect();
        let mut plan = Self {
            request,
            total_bytes: taken + certificate_bytes,
            fixed,
            pinned_rows,
            pinned_bytes,
            hot_neurons: hot,
            hot_bytes,
            always_neurons: n_always,
            residuals: residuals.is_some(),
            residuals_would_take: with_residuals.filter(|_| residuals.is_none()).map(|bytes| besides + bytes),
            sections: sections(in_use.iter().map(Cow::as_ref)),
            certificate_bytes,
            cache_slots,
            cache_bytes,
            dense_bytes: split.dense_bytes(),
            staging,
            ram_bytes_per_token: 0,
            disk_bytes_per_token: 0,
            disk_reads_per_token: 0,
            exact_disk_bytes_per_token: None,
            cache_hit_rate: 0.0,
        };
        plan.expect_bytes(split, &matrices, replayed)?;
        if plan.streams() && request.mode != Mode::Exact {
            let exact = Self::new(split, PlanRequest { mode: Mode::Exact, always: None, ..request })?;
            plan.exact_disk_bytes_per_token = Some(exact.disk_bytes_per_token);
        }
        Ok(plan)
    }

    /// Whether anything is read from disk after loading.
    pub fn streams(&self) -> bool {
        self.fixed.staging > 0
    }

    fn expect_bytes(&mut self, split: &Split, matrices: &[StoredMatrix<'_>], replayed: Option<Replayed>) -> Result<()> {
        let config = &split.manifest().config;
        // The room behind streams, in the cache's slots, is not read.
        let used = used_share(split);
        // An untied embedding costs one row a token.
        let read = |t: &StoredMatrix| config.tie_word_embeddings || t.entry().name != "model.embed_tokens.weight";
        let mut disk: f64 = 0.0;
        let mut ram = self.fixed.predictors as f64;
        for (t, &rows) in matrices.iter().zip(&self.pinned_rows).filter(|(t, _)| read(t)) {
            ram += (rows * t.row_bytes()) as f64;
            disk += ((t.entry().rows - rows) * t.row_bytes()) as f64;
        }
        let total = (config.n_layers * config.intermediate_size) as f64;
        let always = self.always_neurons as f64 / config.intermediate_size as f64;
        let mut run_bytes = self.staging.run_bytes as f64;
        match (self.request.mode, replayed) {
            (Mode::Exact, _) => {
                ram += self.hot_bytes as f64 * rows_read(split, self.certificate_bytes > 0)?;
                ram += self.certificate_bytes as f64;
                for (file, &hot) in split.layers().iter().zip(&self.hot_neurons) {
                    disk += file.stored_bytes(hot.div_ceil(file.chunk_neurons())..file.n_chunks()) as f64;
                }
            }
            (Mode::Sparse { active }, None) => {
                let bundle = used * active_bundle(split, |_| 0..config.intermediate_size)?;
                let residual = residual_layout(config.hidden_size).filter(|_| self.residuals);
                let chosen = residual.map_or(bundle, |layout| layout.bundle_bytes() as f64);
                ram += total * (always * bundle + (1.0 - always) * f64::from(active) * chosen);
            }
            (Mode::Sparse { active }, Some(r)) => {
                // The trace holds the profile's active share; another share is scaled.
                let share = always + (1.0 - always) * f64::from(active);
                let scale = if r.active > 0.0 { share * total / r.active } else { 0.0 };
                ram += scale * used * r.ram_bytes;
                let cold = prefix_bytes(split, &vec![config.intermediate_size; config.n_layers]) - self.hot_bytes;
                let of_neurons = (scale * r.disk_bytes).min(cold as f64);
                disk += of_neurons;
                run_bytes = run_bytes.min(chunk_bytes(split) / (1.0 - of_neurons / cold.max(1) as f64).max(1e-9));
                self.cache_hit_rate = if r.active > r.hot { r.cached / (r.active - r.hot) } else { 0.0 };
            }
        }
        (self.ram_bytes_per_token, self.disk_bytes_per_token) = (ram as u64, disk as u64);
        self.disk_reads_per_token = (disk / run_bytes).ceil() as u64;
        Ok(())
    }

    /// Expected decode speed on a machine. RAM and disk are read at the same time; the slower one sets the pace. A disk takes
    /// the time of its bytes or of its reads, whichever is longer; its physical limit is that of the bytes.
    pub fn predict(&self, hardware: &Hardware) -> Prediction {
        let (ram, disk) = (self.ram_bytes_per_token as f64, self.disk_bytes_per_token as f64);
        // Streamed bytes pass through memory and kernel as well.
        let kernel_seconds = (ram + disk) / hardware.kernel_bytes_per_second.min(hardware.ram_bytes_per_second);
        let limit = (ram / hardware.ram_bytes_per_second).max(disk / hardware.disk_bytes_per_second);
        let read_seconds = self.disk_reads_per_token as f64 / hardware.disk_reads_per_second;
        let disk_seconds = (disk / hardware.disk_bytes_per_second).max(read_seconds);
        let bottleneck = if disk_seconds > kernel_seconds {
            "disk"
        } else if hardware.kernel_bytes_per_second < hardware.ram_bytes_per_second {
            "kernel"
        } else {
            "ram"
        };
        let gb = 1e9;
        let formula = format!(
            "tok/s = 1 / max(({:.1} MB ram + {:.1} MB disk) / {:.1} GB/s kernel, {:.1} MB disk / {:.2} GB/s, \
             {} reads / {:.0} a second)",
            ram / 1e6,
            disk / 1e6,
            hardware.kernel_bytes_per_second.min(hardware.ram_bytes_per_second) / gb,
            disk / 1e6,
            hardware.disk_bytes_per_second / gb,
            self.disk_reads_per_token,
            hardware.disk_reads_per_second,
        );
        Prediction { tok_s: 1.0 / kernel_seconds.max(disk_seconds), limit_tok_s: 1.0 / limit, bottleneck, formula }
    }
}

pub(crate) fn check_request(request: &PlanRequest) -> Result<()> {
    let bad = |flag, reason: String| Err(Error::Setting { flag, reason });
    if let Mode::Sparse { active } = request.mode
        && !(active > 0.0 && active <= 1.0)
    {
        return bad("--active", format!("{active} is not above 0 and at most 1"));
    }
    if request.context == 0 || request.context > 1 << 24 {
        return bad("-c", format!("a context of {} tokens", request.context));
    }
    if request.n_threads == 0 || request.n_threads > 1024 {
        return bad("-t", format!("{} threads; give 1 to 1024", request.n_threads));
    }
    Ok(())
}

fn fixed_bytes(split: &Split, request: &PlanRequest) -> FixedBytes {
    let config = &split.manifest().config;
    let (hidden, ffn, batch) = (config.hidden_size, config.intermediate_size, request.batch.min(request.context));
    let vectors = split.resident().tensors().iter().filter(|t| t.format == Format::F32).map(|t| t.bytes).sum();
    let predictors = match request.mode {
        Mode::Exact => 0,
        Mode::Sparse { .. } => Chooser::total_bytes(split, n_always(split, request)),
    };
    let width = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim + config.n_heads * config.head_dim;
    let widest = hidden.max(config.n_heads * config.head_dim);
    // Of a layer and of the next: what is said of neurons; then, with sketches, those that are active and what of these is left to it.
    let n_sketched = sketched_neurons(split, request);
    let judged = 2 * Judgement::bytes(ffn, n_sketched) + 20 * n_sketched;
    let activations = 4 * batch * (4 * hidden + width) + 4 * config.vocab_size + judged;
    // A matrix piece and its products, or a feed-forward piece and its gate and up products.
    // Rows with streams are decoded, up to four at a time by each thread.
    let streams = split.layers().iter().any(|f| f.bundles().encodings().any(|e| e.has_stream()));
    let decoded = if streams { (request.n_threads * 4 * 2 * widest) as u64 } else { 0 };
    // Whether or not it is asked for: audits must not change what is where, or they would change the account.
    let audit = if request.mode == Mode::Exact { 0 } else { Audit::bytes(config, request.n_threads) };
    let pieces = 4 * PIECE * widest + 4 * request.n_threads * 2 * 32 * PIECE;
    let scratch = activations as u64
        + pieces as u64
        + FfnBatch::bytes(hidden, ffn)
        + decoded
        + FfnSums::new(hidden, config.activation, ffn).bytes()
        + audit
        + Rope::bytes(config, request.context)
        + batch_scratch_bytes(config, batch, request.context, request.n_threads);
    FixedBytes { vectors, predictors, kv_cache: KvCache::bytes(config, request.context), scratch, staging: 0 }
}

/// The first neurons of each layer, which a CPU always computes.
fn n_always(split: &Split, request: &PlanRequest) -> usize {
    always_neurons(request.always.unwrap_or(0.0), split.manifest().config.intermediate_size)
}

/// Neurons of a layer whose activations a sketch gives on a CPU: none in exact mode, and where there are no sketches.
pub(crate) fn sketched_neurons(split: &Split, request: &PlanRequest) -> usize {
    let n = split.manifest().config.intermediate_size;
    if is_sketched(split, request.mode) { n - n_always(split, request) } else { 0 }
}

/// Rows of `t` that `left` bytes hold.
fn take_rows(t: &StoredMatrix<'_>, left: &mut u64) -> usize {
    let rows = ((*left / t.row_bytes() as u64) as usize).min(t.entry().rows);
    *left -= (rows * t.row_bytes()) as u64;
    rows
}

fn does_not_fit(budget_bytes: u64, fixed: &FixedBytes) -> Error {
    let what = format!(
        "norms {}, predictors {}, keys and values {}, scratch {}, disk buffers {}",
        format_bytes(fixed.vectors),
        format_bytes(fixed.predictors),
        format_bytes(fixed.kv_cache),
        format_bytes(fixed.scratch),
        format_bytes(fixed.staging)
    );
    Error::DoesNotFit { budget_bytes, needed_bytes: fixed.total(), what }
}

/// Buffers of half a megabyte, or less if they would take more than an eighth of the budget or than the `left` bytes
/// (or else a budget that can hold the least would be refused); never less than the largest chunk or row.
fn staging_shape(split: &Split, matrices: &[StoredMatrix<'_>], budget: u64, left: u64) -> StagingShape {
    let mut shape = StagingShape::default();
    let row = matrices.iter().map(|t| t.row_bytes()).max().unwrap_or(0);
    let least = largest_chunk_bytes(split).max(row).max(16 << 10);
    while shape.run_bytes / 2 >= least && staging_bytes(split, &shape) > left.min(budget / 8) {
        shape.run_bytes /= 2;
    }
    shape.run_bytes = shape.run_bytes.max(least);
    shape
}

fn staging_bytes(split: &Split, shape: &StagingShape) -> u64 {
    let decoded = decoded_bytes(split, shape.run_bytes);
    Fetcher::buffer_bytes(shape.n_buffers, shape.run_bytes, n_parts(split), decoded)
}

/// Room for the decoded bundles of one run; none if all of them are stored as they are used. Runs are cut by this size
/// too.
pub(crate) fn decoded_bytes(split: &Split, run_bytes: usize) -> usize {
    let stored = split.layers().iter().all(|f| f.are_stored(0..f.n_chunks()));
    let chunk = |f: &LayerFile| f.chunk_neurons() * f.bundles().longest(0..f.order().len());
    let largest = split.layers().iter().map(chunk).max().unwrap_or(0);
    if stored && n_parts(split) == 1 { 0 } else { (2 * run_bytes).max(largest) }
}

/// Stored bytes of the largest chunk.
pub(crate) fn largest_chunk_bytes(split: &Split) -> usize {
    let of = |f: &LayerFile| (0..f.n_chunks()).map(|c| f.stored_bytes(c..c + 1) as usize).max().unwrap_or(0);
    split.layers().iter().map(of).max().unwrap_or(0)
}

/// Mean stored bytes of a chunk.
fn chunk_bytes(split: &Split) -> f64 {
    let of = |f: &LayerFile| (f.stored_bytes(0..f.n_chunks()) as f64, f.n_chunks());
    let (bytes, chunks) = split.layers().iter().map(of).fold((0.0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
    bytes / chunks.max(1) as f64
}

/// Share of the bundles' bytes that holds something: where they have streams, files have no room behind these.
fn used_share(split: &Split) -> f64 {
    let (mut used, mut bytes) = (0, 0);
    for file in split.layers() {
        let n = file.order().len();
        for (neurons, section) in file.bundles().within(0..n) {
            let all = file.bundles().bytes(neurons.clone()) as u64;
            let chunks = neurons.start / file.chunk_neurons()..neurons.end.div_ceil(file.chunk_neurons());
            used += if section.bundles().encoding().has_stream() { file.stored_bytes(chunks).min(all) } else { all };
            bytes += all;
        }
    }
    used as f64 / bytes as f64
}

/// Files that a run is read from, at most.
pub(crate) fn n_parts(split: &Split) -> usize {
    let layers = split.layers().iter().map(|f| f.paths().count());
    let matrices = split.matrices().into_iter().flatten().map(|m| m.planes().len());
    layers.chain(matrices).max().unwrap_or(1)
}

/// The sections of layers that have several, if they are laid out so.
pub(crate) fn sections<'a>(layouts: impl Iterator<Item = &'a LayerLayout>) -> Vec<PlannedSection> {
    let several = layouts.enumerate().filter(|(_, layout)| layout.uniform().is_none());
    let of_layer = |(layer, layout): (usize, &LayerLayout)| {
        let planned = move |s: &LayoutSection| PlannedSection {
            layer,
            neurons: s.neurons().len(),
            encoding: s.bundles().encoding().name(),
            bundle_bytes: s.bundles().bundle_bytes(),
        };
        layout.sections().iter().map(planned).collect::<Vec<_>>()
    };
    several.flat_map(of_layer).collect()
}

/// The widest rows that are certified: what 8 bits leave out of a row, times the input, is about a hundredth of the two
/// norms' product, and the dot product of rows that have nothing to do with each other is that product over the square root
/// of the width: here the third part is lost in the bound, and twice as wide rows lose nearly half.
const CERTIFIED_COLUMNS: usize = 1024;

/// What certificates of all gates take; none where they do not pay. Only in bf16 is an 8-bit copy less to read than the
/// gate itself.
fn certificate_bytes(split: &Split, request: &PlanRequest) -> u64 {
    let config = &split.manifest().config;
    let all_bf16 = split.layers().iter().all(|f| f.bundles().encodings().all(|e| e == Encoding::Bf16));
    let pays = all_bf16 && config.hidden_size <= CERTIFIED_COLUMNS;
    if request.mode != Mode::Exact || !config.activation.is_sparse() || !pays {
        return 0;
    }
    let layer = Certificate::bytes(config.intermediate_size, config.hidden_size);
    config.n_layers as u64 * layer + QuantisedInput::bytes(config.hidden_size)
}

/// The share of its rows that exact mode is expected to read: gates always, or if `certified` where they are positive, up
/// rows where the gate is positive, down rows of neurons that fire. Gates and ups of dReLU are taken as independent and
/// alike; an up row read first there spares the gate.
fn rows_read(split: &Split, certified: bool) -> Result<f64> {
    let config = &split.manifest().config;
    if !config.activation.is_sparse() {
        return Ok(1.0);
    }
    let mut share = 0.0;
    for l in 0..config.n_layers {
        let rates = activation_rates(split, l)?;
        let fires = rates.iter().map(|&r| f64::from(r)).sum::<f64>() / rates.len().max(1) as f64;
        let positive = if config.activation == Activation::Drelu { fires.sqrt() } else { fires };
        share += if certified { positive + 2.0 * fires } else { 1.0 + positive + fires } / 3.0;
    }
    Ok(share / config.n_layers as f64)
}
