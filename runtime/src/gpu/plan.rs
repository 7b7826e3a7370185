//! What goes where in a VRAM budget, and how fast that should be.

use super::replay::{LayerTrace, Policy, Replayed, WAYS};
use crate::attention::Rope;
use crate::budget::format_bytes;
use crate::kv::KvCache;
use crate::plan::{Mode, check_request, hot_prefixes, layers_by_rate, whole_chunks};
use crate::{Error, PlanRequest, Result};
use serde::Serialize;
use std::sync::atomic::{AtomicUsize, Ordering};
use thermocline_kernels::cuda::launch::{Heads, MAX_SPLITS};
use thermocline_split::{Format, Split, StoredMatrix, TensorEntry};

/// Every piece of device memory begins at a multiple of this.
pub(super) const ALIGN: u64 = 256;

/// Positions that a block of the attention kernel has in a full context, if that makes no more than one block for each
/// multiprocessor: fewer take as long, and what more blocks leave takes longer to add up.
const SPLIT_POSITIONS: usize = 40;

/// The same where there are two blocks for each.
const LONG_SPLIT_POSITIONS: usize = 128;

/// Layers whose trace is replayed: evenly spread; more would not change the choice.
const REPLAYED_LAYERS: usize = 8;

/// Looking neurons up and managing the slots costs every layer time, so that a cache must spare at least a tenth of the
/// reads from pinned memory.
const CACHE_MUST_WIN: f64 = 0.9;

/// Shares of the memory for neurons that are tried as cache.
const CACHE_SHARES: [f64; 7] = [0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75];

/// Of the bytes that the device reads of attention's matrices there is room for one part in so many to be fetched meanwhile. An
/// H200 fetches a 27th over its link; the slower the device's memory, the more.
const LINK_IS_SLOWER: u64 = 16;

/// Neurons that may be needed should not take much from those that surely are: of the memory left for neurons one part in
/// so many.
const LOOKAHEAD_IS_SMALLER: u64 = 32;

/// What is to be planned.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct GpuRequest {
    /// Mode, context, batch, threads and RAM.
    pub base: PlanRequest,
    /// Bytes that the process may take on the device.
    pub vram_budget_bytes: u64,
    /// Bytes that the driver has taken for the context already.
    pub context_bytes: u64,
    /// Blocks of the fused kernel: its sums are one row for each.
    pub n_blocks: usize,
    /// Share of the memory for neurons that is cache; `None` leaves it to the replay.
    pub cache_share: Option<f64>,
    /// Neurons of each layer that are fetched while attention is computed, at most; `None`: room for as many as the link
    /// may bring in that time, of which the engine uses what is fastest.
    pub lookahead: Option<usize>,
}

/// Device memory, by purpose.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct GpuBytes {
    /// Attention matrices and the head.
    pub matrices: u64,
    /// Norms and biases.
    pub vectors: u64,
    /// Predictors, in sparse mode.
    pub predictors: u64,
    /// Keys and values, and the tables of rotary embeddings.
    pub kv_cache: u64,
    /// Activations, sums, work lists.
    pub scratch: u64,
    /// Buffers of prompt batches.
    pub prefill: u64,
    /// Neurons that are fetched before it is known which are needed.
    pub lookahead: u64,
    /// The driver's context.
    pub context: u64,
}

impl GpuBytes {
    fn total(&self) -> u64 {
        self.matrices
            + self.vectors
            + self.predictors
            + self.kv_cache
            + self.scratch
            + self.prefill
            + self.lookahead
            + self.context
    }
}

/// The division of a model between the device and pinned host memory.
#[derive(Debug, Clone, Serialize)]
pub struct GpuPlan {
    /// What was asked for.
    pub request: GpuRequest,
    /// Device memory besides neurons.
    pub fixed: GpuBytes,
    /// Neurons in device memory of each layer: a prefix of the split order.
    pub hot_neurons: Vec<usize>,
    /// Bytes of them.
    pub hot_bytes: u64,
    /// Sets of the cache of each layer, [`GpuPlan::cache_ways`] slots each.
    pub cache_sets: Vec<usize>,
    /// Slots of a set.
    pub cache_ways: usize,
    /// Bytes of the cache and its tables.
    pub cache_bytes: u64,
    /// Octaves by which a cached neuron's standing falls per token, chosen by replay.
    pub cache_lambda: f32,
    /// What the replay of the split's trace saw for each policy with this division: name, share of the cold neurons that
    /// were in the cache.
    pub cache_policies: Vec<(String, f64)>,
    /// Neurons of each layer for which there is room to fetch them while attention is computed.
    pub lookahead_neurons: usize,
    /// Pinned host memory.
    pub pinned_bytes: u64,
    /// Device memory in all.
    pub total_bytes: u64,
    /// All weights of the model as encoded here.
    pub dense_bytes: u64,
    /// Bytes of a neuron.
    pub bundle_bytes: u64,
    /// Columns of a layer's input.
    pub hidden_size: usize,
    /// Ranges of positions that attention is divided into.
    pub n_splits: usize,
    /// Neurons of a prompt batch's piece.
    pub prefill_neurons: usize,
    /// Device bytes that every token reads: matrices, predictors, keys and values of a full context, hot neurons.
    pub device_bytes_per_token: u64,
    /// Bytes that a token is expected to read from the cache.
    pub cache_bytes_per_token: u64,
    /// Bytes that a token is expected to need from pinned memory.
    pub host_bytes_per_token: u64,
    /// Share of the cold neurons that the cache is expected to hold.
    pub cache_hit_rate: f64,
}

/// Blocks of the attention kernel for each head of keys; `n_blocks` are two for each multiprocessor.
fn n_splits(context: usize, n_blocks: usize, n_kv_heads: usize) -> usize {
    let (one, two) = (n_blocks / 2 / n_kv_heads, n_blocks / n_kv_heads);
    let n = (context / SPLIT_POSITIONS).min(one).max((context / LONG_SPLIT_POSITIONS).min(two));
    n.clamp(1, MAX_SPLITS)
}

/// Refuses layers with several layouts.
fn check_sections(split: &Split) -> Result<()> {
    let of_layer = |f: &thermocline_split::LayerFile| match f.bundles().encodings().collect::<Vec<_>>().as_slice() {
        [first, other, ..] => Err(Error::Sections { layer: f.layer(), first: first.name(), other: other.name() }),
        _ => Ok(()),
    };
    split.layers().iter().try_for_each(of_layer)
}

pub(super) fn aligned(bytes: u64) -> u64 {
    bytes.next_multiple_of(ALIGN)
}

impl GpuPlan {
    /// Divides `split`. Matrices, keys and values, and scratch memory come first; the rest is divided between a hot
    /// prefix of each layer (the neurons of highest activation rate over all layers) and the cache, by replaying the
    /// split's trace. In exact mode every neuron is read by every token: there is no cache, and every layer has an
    /// equal prefix.
    ///
    /// # Errors
    /// [`Error::VramTooSmall`] if the budget cannot hold what must be on the device, [`Error::DoesNotFit`] if
    /// `--ram-budget` cannot hold the rest.
    pub fn new(split: &Split, request: GpuRequest) -> Result<Self> {
        check_request(&request.base)?;
        check_sections(split)?;
        let config = &split.manifest().config;
        let layout = *split.layers()[0].layout();
        let (bundle, n, n_layers) = (layout.bundle_bytes() as u64, config.intermediate_size, config.n_layers);
        let context = request.base.context;
        let n_splits = n_splits(context, request.n_blocks, config.n_kv_heads);
        let prefill_neurons = super::load::prefill_piece(config);
        let fixed = fixed_bytes(split, &request, n_splits, prefill_neurons);
        let budget = request.vram_budget_bytes;
        let Some(left) = budget.checked_sub(fixed.total()) else {
            return Err(Error::VramTooSmall {
                budget_bytes: budget,
                needed_bytes: fixed.total(),
                what: describe(&fixed),
            });
        };
        let all = aligned(n as u64 * bundle) * n_layers as u64;
        let mut plan = Self {
            request,
            fixed,
            hot_neurons: vec![n; n_layers],
            hot_bytes: 0,
            cache_sets: vec![0; n_layers],
            cache_ways: WAYS,
            cache_bytes: 0,
            cache_lambda: 1.0,
            cache_policies: Vec::new(),
            lookahead_neurons: 0,
            pinned_bytes: 0,
            total_bytes: 0,
            dense_bytes: split.dense_bytes(),
            bundle_bytes: bundle,
            hidden_size: config.hidden_size,
            n_splits,
            prefill_neurons,
            device_bytes_per_token: 0,
            cache_bytes_per_token: 0,
            host_bytes_per_token: 0,
            cache_hit_rate: 0.0,
        };
        let active = match request.base.mode {
            Mode::Exact => 1.0,
            Mode::Sparse { active } => f64::from(active),
        };
        let mut replayed = None;
        if all > left {
            match request.base.mode {
                Mode::Exact => {
                    let each = (left / n_layers as u64 / bundle) as usize;
                    let prefix = |f: &thermocline_split::LayerFile| whole_chunks(each.min(n), f.chunk_neurons(), n);
                    plan.hot_neurons = split.layers().iter().map(prefix).collect();
                }
                Mode::Sparse { active } => {
                    let left = plan.look_ahead(split, left, crate::predictor::n_active(active, n))?;
                    replayed = Some(plan.divide(split, left)?);
                }
            }
        }
        plan.hot_bytes = plan.hot_neurons.iter().map(|&h| aligned(h as u64 * bundle)).sum();
        plan.cache_bytes =
            plan.hot_neurons.iter().zip(&plan.cache_sets).map(|(&h, &s)| cache_bytes(n - h, s, bundle)).sum();
        plan.total_bytes = plan.fixed.total() + plan.hot_bytes + plan.cache_bytes;
        let cold = plan.hot_neurons.iter().map(|&h| (n - h) as u64 * bundle).sum::<u64>();
        plan.pinned_bytes = cold + pinned_embedding(split).map_or(0, |m| m.bytes());
        if let Some(ram) = request.base.ram_budget_bytes
            && plan.pinned_bytes > ram
        {
            let what = format!("the neurons that are not in VRAM ({}), pinned", format_bytes(cold));
            return Err(Error::DoesNotFit { budget_bytes: ram, needed_bytes: plan.pinned_bytes, what });
        }
        let total = (n_layers * n) as f64 * active;
        let r = replayed.unwrap_or(Replayed {
            active: n as f64,
            hot: plan.hot_neurons.iter().sum::<usize>() as f64 / n_layers as f64,
            cached: 0.0,
        });
        // The trace has the profile's active share; another share is scaled.
        let bytes_of = |neurons: f64| (total * neurons / r.active.max(1.0) * bundle as f64) as u64;
        let fixed_reads = plan.fixed.matrices + plan.fixed.predictors + KvCache::bytes(config, context);
        plan.device_bytes_per_token = fixed_reads + bytes_of(r.hot);
        plan.cache_bytes_per_token = bytes_of(r.cached);
        plan.host_bytes_per_token = bytes_of(r.active - r.hot - r.cached);
        plan.cache_hit_rate = if r.active > r.hot { r.cached / (r.active - r.hot) } else { 0.0 };
        Ok(plan)
    }

    /// Makes room for neurons that are fetched while attention is computed, `n_active` of each layer at most; returns what
    /// is left.
    fn look_ahead(&mut self, split: &Split, left: u64, n_active: usize) -> Result<u64> {
        let bundle = split.layers()[0].layout().bundle_bytes() as u64;
        let n_layers = self.hot_neurons.len();
        let meanwhile = || {
            let bytes = (self.fixed.matrices / n_layers as u64 / LINK_IS_SLOWER).min(left / LOOKAHEAD_IS_SMALLER);
            bytes.saturating_sub(super::buffers::lookahead_bytes(split, 0)) / bundle
        };
        let n = self.request.lookahead.unwrap_or_else(|| meanwhile() as usize).min(n_active);
        if n == 0 || n_layers == 1 {
            return Ok(left);
        }
        self.lookahead_neurons = n;
        self.fixed.lookahead = super::buffers::lookahead_bytes(split, n);
        left.checked_sub(self.fixed.lookahead).ok_or_else(|| Error::VramTooSmall {
            budget_bytes: self.request.vram_budget_bytes,
            needed_bytes: self.fixed.total(),
            what: describe(&self.fixed),
        })
    }

    /// Fills in hot prefixes and cache for `left` bytes: of several divisions the one whose replay reads least from
    /// pinned memory.
    fn divide(&mut self, split: &Split, left: u64) -> Result<Replayed> {
        let config = &split.manifest().config;
        let (n, n_layers) = (config.intermediate_size, config.n_layers);
        let bundle = split.layers()[0].layout().bundle_bytes() as u64;
        let hottest = layers_by_rate(split)?;
        let step = n_layers.div_ceil(REPLAYED_LAYERS);
        let sampled: Vec<usize> = (0..n_layers).step_by(step).collect();
        let traces = sampled.iter().map(|&l| LayerTrace::load(split, l)).collect::<Result<Vec<_>>>()?;
        // Rounding to chunks and to the alignment of device memory.
        let slack = n_layers as u64 * 2 * ALIGN;
        let tables = cache_bytes(n, 0, bundle).max(8 * n as u64) * n_layers as u64;
        let shares: Vec<f64> = self.request.cache_share.map_or(CACHE_SHARES.to_vec(), |share| vec![share]);
        let mut divisions = Vec::new();
        // What is not enough for a set is left to the prefix.
        for share in shares.into_iter().chain([0.0]) {
            if share == 0.0 && !divisions.is_empty() {
                continue;
            }
            let cache_budget =
                if share > 0.0 { ((left as f64 * share) as u64).saturating_sub(tables + slack) } else { 0 };
            let hot_budget = (left as f64 * (1.0 - share)) as u64;
            let hot = hot_prefixes(split, &hottest, (hot_budget.saturating_sub(slack) / bundle) as usize);
            let each = (cache_budget / n_layers as u64 / (WAYS as u64 * (bundle + 8))) as usize;
            let sets: Vec<usize> = hot.iter().map(|h| each.min((n - h) / WAYS)).collect();
            if share == 0.0 || sets.iter().any(|&s| s > 0) {
                divisions.push((hot, sets));
            }
        }
        // The policies are alike without a cache.
        let jobs: Vec<(usize, Policy)> = (0..divisions.len())
            .flat_map(|d| {
                let cached = divisions[d].1.iter().any(|&s| s > 0);
                Policy::CANDIDATES.into_iter().take(if cached { usize::MAX } else { 1 }).map(move |p| (d, p))
            })
            .collect();
        let replays = in_parallel(self.request.base.n_threads, jobs.len(), |job| {
            let (d, policy) = jobs[job];
            replay_all(&traces, &sampled, n, &divisions[d].0, &divisions[d].1, policy)
        });
        let misses = |job: &usize| replays[*job].active - replays[*job].hot - replays[*job].cached;
        let on_device = (0..jobs.len()).filter(|&job| matches!(jobs[job].1, Policy::Lrfu { .. }));
        let Some(mut best) = on_device.min_by(|a, b| misses(a).total_cmp(&misses(b))) else {
            return Ok(Replayed { active: n as f64, ..Replayed::default() });
        };
        let without = (0..jobs.len()).find(|&job| divisions[jobs[job].0].1.iter().all(|&s| s == 0));
        if let Some(without) = without.filter(|w| misses(&best) > CACHE_MUST_WIN * misses(w)) {
            best = without;
        }
        let (division, policy) = jobs[best];
        (self.hot_neurons, self.cache_sets) = divisions.swap_remove(division);
        if let Policy::Lrfu { lambda } = policy {
            self.cache_lambda = lambda;
        }
        if self.cache_slots() > 0 {
            let compared = jobs.iter().zip(&replays).filter(|((d, _), _)| *d == division);
            let hits = compared.map(|((_, p), r)| (p.to_string(), r.cached / (r.active - r.hot).max(1.0)));
            self.cache_policies = hits.collect();
        }
        Ok(replays[best])
    }

    /// Slots of the cache.
    pub fn cache_slots(&self) -> usize {
        self.cache_sets.iter().sum::<usize>() * self.cache_ways
    }
}

/// `f` of 0 to `n`, by several threads.
fn in_parallel<T: Send>(n_threads: usize, n: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let work = || {
        let numbers = std::iter::from_fn(|| Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&i| i < n));
        numbers.map(|i| (i, f(i))).collect::<Vec<_>>()
    };
    let mut results: Vec<(usize, T)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..n_threads.min(n)).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|w| w.join().unwrap_or_else(|e| std::panic::resume_unwind(e))).collect()
    });
    results.sort_by_key(|(i, _)| *i);
    results.into_iter().map(|(_, t)| t).collect()
}

fn replay_all(
    traces: &[LayerTrace],
    layers: &[usize],
    n: usize,
    hot: &[usize],
    sets: &[usize],
    policy: Policy,
) -> Replayed {
    let mut sum = Replayed::default();
    for (trace, &l) in traces.iter().zip(layers) {
        let r = trace.replay(n, hot[l], sets[l], WAYS, policy);
        sum.active += r.active;
        sum.hot += r.hot;
        sum.cached += r.cached;
    }
    let count = traces.len().max(1) as f64;
    Replayed { active: sum.active / count, hot: sum.hot / count, cached: sum.cached / count }
}

/// Slots, and what the kernels keep about them and about `n_cold` neurons.
pub(super) fn cache_bytes(n_cold: usize, n_sets: usize, bundle: u64) -> u64 {
    if n_sets == 0 {
        return 0;
    }
    let slots = (n_sets * WAYS) as u64;
    aligned(slots * bundle) + 2 * aligned(4 * slots) + 2 * aligned(4 * n_cold as u64)
}

/// The embedding, if only single rows of it are read: then it stays in host memory.
pub(super) fn pinned_embedding(split: &Split) -> Option<StoredMatrix<'_>> {
    let tied = split.manifest().config.tie_word_embeddings;
    if tied { None } else { split.matrix("model.embed_tokens.weight").ok() }
}

/// Matrices that lie on the device.
pub(super) fn device_matrices(split: &Split) -> impl Iterator<Item = StoredMatrix<'_>> {
    let pinned = pinned_embedding(split).map(|m| m.entry().name.as_str());
    split.matrices().into_iter().flatten().filter(move |m| Some(m.entry().name.as_str()) != pinned)
}

/// Bytes of them. q, k and v lie below each other: their rows are as long as the longest of the three.
fn device_matrix_bytes(split: &Split) -> u64 {
    let matrices: Vec<StoredMatrix<'_>> = device_matrices(split).collect();
    let together = |m: &StoredMatrix<'_>| {
        let parts = ["q_proj", "k_proj", "v_proj"];
        parts.into_iter().find_map(|part| m.entry().name.split_once(part)).map(|(layer, _)| layer.to_owned())
    };
    let bytes = |m: &StoredMatrix<'_>| {
        let group = together(m);
        let alike = matrices.iter().filter(|other| group.is_some() && together(other) == group);
        let stride = alike.map(|other| other.row_bytes()).max().unwrap_or(m.row_bytes());
        aligned((m.entry().rows * stride) as u64)
    };
    matrices.iter().map(bytes).sum()
}

fn fixed_bytes(split: &Split, request: &GpuRequest, n_splits: usize, prefill_neurons: usize) -> GpuBytes {
    let config = &split.manifest().config;
    let sum = |tensors: &mut dyn Iterator<Item = &TensorEntry>| tensors.map(|t| aligned(t.bytes)).sum::<u64>();
    let vectors = sum(&mut split.resident().tensors().iter().filter(|t| t.format == Format::F32));
    let predictors = match request.base.mode {
        Mode::Exact => 0,
        Mode::Sparse { .. } => sum(&mut split.predictors().tensors().iter()),
    };
    let context = request.base.context;
    let kv_cache = KvCache::bytes(config, context)
        + 2 * config.n_layers as u64 * ALIGN
        + 2 * aligned(Rope::bytes(config, context));
    GpuBytes {
        matrices: device_matrix_bytes(split),
        // q, k and v biases become one vector.
        vectors: vectors + config.n_layers as u64 * ALIGN,
        predictors,
        kv_cache,
        scratch: super::buffers::scratch_bytes(split, request, n_splits),
        prefill: super::buffers::prefill_bytes(split, request.base.batch.min(context), prefill_neurons),
        lookahead: 0,
        context: request.context_bytes,
    }
}

/// The shape of attention.
pub(super) fn heads(config: &thermocline_datasets::ModelConfig, capacity: usize) -> Heads {
    Heads { n_heads: config.n_heads, n_kv_heads: config.n_kv_heads, head_dim: config.head_dim, capacity }
}

fn describe(b: &GpuBytes) -> String {
    format!(
        "attention and head {}, predictors {}, keys and values {}, scratch {}, prompt buffers {}, CUDA context {}",
        format_bytes(b.matrices),
        format_bytes(b.predictors),
        format_bytes(b.kv_cache),
        format_bytes(b.scratch + b.vectors),
        format_bytes(b.prefill),
        format_bytes(b.context)
    )
}
