//! What goes where in a VRAM budget, and how fast that should be.

use super::audit::GpuAudit;
use super::replay::{LayerTrace, Policy, Replayed, WAYS};
use super::sections::Sections;
use super::sketches::{bytes_in_form, layer_sketch_bytes, least_streamed, sketches_bytes};
use crate::attention::Rope;
use crate::budget::format_bytes;
use crate::chooser::{always_neurons, check_always, has_sketches, is_sketched};
use crate::divide::{active_bundle, equal_prefixes, hot_prefixes, layers_by_rate};
use crate::kv::KvCache;
use crate::plan::{Mode, check_request, sections};
use crate::residual::{layout_with, reads_residuals};
use crate::{Error, PlanRequest, PlannedSection, Result};
use serde::Serialize;
use std::borrow::Cow;
use std::sync::atomic::{AtomicUsize, Ordering};
use thermocline_kernels::cuda::launch::{Heads, MAX_SPLITS};
use thermocline_kernels::{Encoding, LayerLayout};
use thermocline_split::{Format, LayerFile, SketchForm, Split, StoredMatrix, TensorEntry};

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

/// A plan that the device refuses shrinks by one part in so many.
const REFUSED_SHRINKS: u64 = 10;

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
    /// Layers of which the host's threads choose and compute all neurons, among those whose sketches are in pinned memory; `None`: as
    /// many as is fastest.
    pub host_layers: Option<usize>,
}

/// Device memory, by purpose.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct GpuBytes {
    /// Attention matrices and the head.
    pub matrices: u64,
    /// Norms, biases, what stands for neurons that are left out.
    pub vectors: u64,
    /// Predictors or sketches, in sparse mode; none where nothing is left to choose. Of sketches in pinned memory, the places that
    /// they are copied to.
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
    /// Sparse mode with sketches: the first neurons of each layer, all hot, which every token computes and of which there is no
    /// sketch on the device.
    pub always_neurons: usize,
    /// Sparse mode: the others are there, and in pinned memory, as what their sketches leave of them.
    pub residuals: bool,
    /// Bits of the sketches that choose, if sketches do.
    pub sketch_bits: Option<SketchForm>,
    /// Layers whose sketches lie in pinned memory, because VRAM has no room for all: of some of these the host's threads may compute all
    /// neurons, the others' cross the link for every token.
    pub streamed_sketches: usize,
    /// Bytes of these sketches.
    pub streamed_bytes_per_token: u64,
    /// The same if sketches had two bits of all rows, if they have not and there are any.
    pub streamed_in_two_bits: Option<u64>,
    /// Device bytes that attention's matrices in q4 would leave to neurons, if these do not all lie there and attention is in more bits.
    pub attention_in_q4_spares: Option<u64>,
    /// Bytes of predictors or sketches that a token reads from device memory.
    pub chooser_bytes_per_token: u64,
    /// Device bytes of sketches that could lie in pinned memory, too.
    pub spare_sketch_bytes: u64,
    /// Bytes of sketches that the host needs besides, not pinned: for its threads' part of these neurons.
    pub host_sketch_bytes: u64,
    /// RAM that audits take while they work; 0 in exact mode, which has none.
    pub audit_bytes: u64,
    /// Layers whose neurons are not all laid out alike: what each of their sections is.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sections: Vec<PlannedSection>,
    /// Layers whose cold neurons are in several sections: they have no cache, and fetch early from the last section alone.
    pub mixed_cold_layers: usize,
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
    /// Neurons of each layer for which there is room to fetch them while attention is computed: of its last section.
    pub lookahead_neurons: usize,
    /// Bytes that a token can fetch so.
    pub lookahead_bytes_per_token: u64,
    /// Pinned host memory.
    pub pinned_bytes: u64,
    /// Device memory in all.
    pub total_bytes: u64,
    /// All weights of the model as encoded here.
    pub dense_bytes: u64,
    /// Columns of a layer's input.
    pub hidden_size: usize,
    /// Ranges of positions that attention is divided into.
    pub n_splits: usize,
    /// Neurons of a prompt batch's piece.
    pub prefill_neurons: usize,
    /// Device bytes that every token reads: matrices, predictors or sketches, keys and values of a full context, hot neurons.
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

pub(super) fn aligned(bytes: u64) -> u64 {
    bytes.next_multiple_of(ALIGN)
}

/// Bytes that the first `hot[l]` bundles of each layer take on the device.
fn prefix_bytes(split: &Split, hot: &[usize]) -> u64 {
    prefixes_of(layouts(split), hot)
}

fn prefixes_of<'a>(layouts: impl Iterator<Item = &'a LayerLayout>, hot: &[usize]) -> u64 {
    layouts.zip(hot).map(|(layout, &h)| aligned(layout.bytes(0..h) as u64)).sum()
}

/// Bytes of the other bundles.
fn rest_of<'a>(layouts: impl Iterator<Item = &'a LayerLayout>, hot: &[usize]) -> u64 {
    layouts.zip(hot).map(|(layout, &h)| layout.bytes(h..layout.n_neurons()) as u64).sum()
}

fn layouts(split: &Split) -> impl Iterator<Item = &LayerLayout> {
    split.layers().iter().map(thermocline_split::LayerFile::bundles)
}

/// Whether the neurons behind the first `n_hot` are all of the last section.
fn is_cold_alike(layout: &LayerLayout, n_hot: usize) -> bool {
    layout.coldest().neurons().start <= n_hot
}

/// Bytes of a bundle of a layer's last section. Only these are cached and fetched early: slots and places are all of one
/// size, and few layers have cold neurons in another.
fn coldest_bundle(layout: &LayerLayout) -> u64 {
    layout.coldest().bundles().bundle_bytes() as u64
}

/// Bytes of the largest of these.
pub(super) fn largest_coldest_bundle(split: &Split) -> usize {
    layouts(split).map(coldest_bundle).max().unwrap_or(0) as usize
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
        if request.lookahead.is_some_and(|n| n > 0) && is_sketched(split, request.base.mode) {
            let reason = "goes by low-rank predictors; of a split with sketches nothing is fetched early".to_owned();
            return Err(Error::Setting { flag: "--lookahead", reason });
        }
        check_always(split, request.base.mode, request.base.always)?;
        if request.host_layers.is_some_and(|n| n > 0) && !is_sketched(split, request.base.mode) {
            let reason =
                "is for layers that are chosen by sketches; make the split with --sketch, and use --mode sparse";
            return Err(Error::Setting { flag: "--cpu-layers", reason: reason.to_owned() });
        }
        if request.cache_share.is_some_and(|share| share > 0.0) && is_sketched(split, request.base.mode) {
            let reason =
                "is for low-rank predictors; with sketches VRAM holds neurons that are always computed".to_owned();
            return Err(Error::Setting { flag: "--cache-share", reason });
        }
        let config = &split.manifest().config;
        let (n, n_layers) = (config.intermediate_size, config.n_layers);
        let context = request.base.context;
        let n_splits = n_splits(context, request.n_blocks, config.n_kv_heads);
        let prefill_neurons = super::load::prefill_piece(config);
        let residuals = reads_residuals(split, request.base.mode)?;
        let fixed = fixed_bytes(Sections { split, residuals }, &request, n_splits, prefill_neurons);
        let budget = request.vram_budget_bytes;
        let Some(left) = budget.checked_sub(fixed.total()) else {
            return Err(Error::VramTooSmall {
                budget_bytes: budget,
                needed_bytes: fixed.total(),
                what: describe(&fixed, split),
            });
        };
        let mut plan = Self {
            request,
            fixed,
            hot_neurons: vec![n; n_layers],
            hot_bytes: 0,
            always_neurons: 0,
            residuals,
            sketch_bits: is_sketched(split, request.base.mode).then(|| split.sketch_form()),
            streamed_sketches: 0,
            streamed_bytes_per_token: 0,
            streamed_in_two_bits: None,
            attention_in_q4_spares: None,
            chooser_bytes_per_token: fixed.predictors,
            spare_sketch_bytes: 0,
            host_sketch_bytes: 0,
            audit_bytes: 0,
            sections: Vec::new(),
            mixed_cold_layers: 0,
            cache_sets: vec![0; n_layers],
            cache_ways: WAYS,
            cache_bytes: 0,
            cache_lambda: 1.0,
            cache_policies: Vec::new(),
            lookahead_neurons: 0,
            lookahead_bytes_per_token: 0,
            pinned_bytes: 0,
            total_bytes: 0,
            dense_bytes: split.dense_bytes(),
            hidden_size: config.hidden_size,
            n_splits,
            prefill_neurons,
            device_bytes_per_token: 0,
            cache_bytes_per_token: 0,
            host_bytes_per_token: 0,
            cache_hit_rate: 0.0,
        };
        let mut replayed = None;
        if is_sketched(split, request.base.mode) {
            plan.divide_with_sketches(split, left)?;
        } else if prefix_bytes(split, &plan.hot_neurons) > left {
            match request.base.mode {
                Mode::Exact => plan.hot_neurons = equal_prefixes(split, |hot| prefix_bytes(split, hot) <= left),
                Mode::Sparse { active } => {
                    let left = plan.look_ahead(split, left, crate::predictor::n_active(active, n))?;
                    replayed = Some(plan.divide(split, left)?);
                }
            }
        }
        let in_use: Vec<_> = split.layers().iter().map(|file| plan.layout(file)).collect();
        let in_use = || in_use.iter().map(Cow::as_ref);
        plan.hot_bytes = prefixes_of(in_use(), &plan.hot_neurons);
        let spared = Some(attention_in_q4_spares(split)).filter(|bytes| *bytes > 0);
        plan.attention_in_q4_spares = spared.filter(|_| plan.hot_neurons.iter().any(|&hot| hot < n));
        plan.sections = sections(in_use());
        plan.mixed_cold_layers = in_use().zip(&plan.hot_neurons).filter(|(l, h)| !is_cold_alike(l, **h)).count();
        let caches = layouts(split).zip(&plan.hot_neurons).zip(&plan.cache_sets);
        plan.cache_bytes = caches.map(|((layout, &h), &s)| cache_bytes(n - h, s, coldest_bundle(layout))).sum();
        plan.total_bytes = plan.fixed.total() + plan.hot_bytes + plan.cache_bytes;
        let cold = rest_of(in_use(), &plan.hot_neurons);
        plan.pinned_bytes = cold + plan.streamed_bytes_per_token + pinned_embedding(split).map_or(0, |m| m.bytes());
        if let Some(asked) = request.host_layers
            && asked > plan.host_layers()
        {
            let reason = format!(
                "{asked} are more than the {} layers whose sketches VRAM has no room for and of which no neuron is in it",
                plan.host_layers()
            );
            return Err(Error::Setting { flag: "--cpu-layers", reason });
        }
        let n_sketched = n - plan.always_neurons;
        if plan.residuals && cold > 0 {
            // Of the others they are pinned.
            let n_layers = n_layers - plan.streamed_sketches;
            plan.host_sketch_bytes = (n_layers * n_sketched) as u64 * sketched_down_row_bytes(split);
        }
        if plan.streamed_sketches > 0 {
            let numbers = super::sketches::numbers_bytes(n_sketched, config.hidden_size);
            let judging = if plan.host_layers() > 0 { super::host_layer::Judging::bytes(n) } else { 0 };
            plan.host_sketch_bytes += plan.streamed_sketches as u64 * numbers + judging;
        }
        // Whether or not it is asked for, as on a CPU: audits must not change what fits.
        plan.audit_bytes = if request.base.mode == Mode::Exact { 0 } else { GpuAudit::bytes(split, &plan) };
        let on_host = plan.pinned_bytes + plan.host_sketch_bytes + plan.audit_bytes;
        if let Some(ram) = request.base.ram_budget_bytes
            && on_host > ram
        {
            let sketches = match plan.streamed_bytes_per_token {
                0 => String::new(),
                bytes => format!(" and sketches ({})", format_bytes(bytes)),
            };
            let what = format!("the neurons that are not in VRAM ({}){sketches}, pinned", format_bytes(cold));
            return Err(Error::DoesNotFit { budget_bytes: ram, needed_bytes: on_host, what });
        }
        plan.device_bytes_per_token =
            plan.fixed.matrices + plan.chooser_bytes_per_token + KvCache::bytes(config, context);
        match request.base.mode {
            Mode::Exact => {
                plan.host_bytes_per_token = cold;
                plan.device_bytes_per_token += rest_of(in_use(), &vec![0; n_layers]) - cold;
            }
            Mode::Sparse { active } => {
                if is_sketched(split, request.base.mode) {
                    plan.expect_bytes_with_sketches(split, f64::from(active));
                } else {
                    plan.expect_bytes(split, f64::from(active), replayed)?;
                }
            }
        }
        Ok(plan)
    }

    /// How the neurons of `file` lie on the device, hot ones first, and in pinned memory.
    pub(super) fn layout<'a>(&self, file: &'a LayerFile) -> Cow<'a, LayerLayout> {
        layout_with(file, self.residuals.then_some(self.always_neurons))
    }

    /// Layers of which the host's threads could choose and compute all neurons: those whose sketches lie in pinned memory, if no neuron
    /// is hot.
    pub fn host_layers(&self) -> usize {
        if self.hot_neurons.iter().all(|&hot| hot == 0) { self.streamed_sketches } else { 0 }
    }

    /// Whether a token chooses among the neurons of `split`.
    pub(super) fn has_choice(&self, split: &Split) -> bool {
        self.request.base.mode != Mode::Exact && self.always_neurons < split.manifest().config.intermediate_size
    }

    /// Fills in hot prefixes and sketches for `left` bytes: each neuron that every token computes takes the place of its
    /// sketch and of nobody's cache. Where not all sketches fit, no neuron is hot that need not be: what a byte of VRAM spares the link
    /// is most with sketches in it.
    fn divide_with_sketches(&mut self, split: &Split, left: u64) -> Result<()> {
        let n = split.manifest().config.intermediate_size;
        let asked = self.request.base.always.map(|share| always_neurons(share, n));
        // What was counted so far is what there must be at least.
        let room = left + self.fixed.predictors;
        let n_always = |hot: &[usize]| asked.unwrap_or_else(|| hot.iter().copied().min().unwrap_or(0));
        let residuals = self.residuals;
        let prefixes = |hot: &[usize]| {
            let residuals_from = residuals.then(|| n_always(hot));
            let layouts: Vec<_> = split.layers().iter().map(|file| layout_with(file, residuals_from)).collect();
            prefixes_of(layouts.iter().map(Cow::as_ref), hot)
        };
        let n_layers = split.layers().len();
        let sketch_bytes = |hot: &[usize]| n_layers as u64 * layer_sketch_bytes(split, n - n_always(hot));
        let bytes = |hot: &[usize]| prefixes(hot) + sketch_bytes(hot);
        let all = vec![n; n_layers];
        // A prefix is cut to whole chunks and its end aligned.
        let slack = n_layers as u64 * ALIGN;
        let fits = |hot: &[usize]| bytes(hot) + slack <= room;
        let most = if bytes(&all) <= room { all } else { equal_prefixes(split, fits) };
        // Whole chunks, but not fewer than are always computed.
        let least: Vec<usize> = match asked {
            Some(asked) => split.layers().iter().map(|f| asked.next_multiple_of(f.chunk_neurons()).min(n)).collect(),
            None => vec![0; n_layers],
        };
        self.hot_neurons = most.iter().zip(&least).map(|(&most, &least)| most.max(least)).collect();
        if bytes(&self.hot_neurons) > room {
            self.hot_neurons.clone_from(&least);
        }
        self.always_neurons = n_always(&self.hot_neurons);
        let of_layer = layer_sketch_bytes(split, n - self.always_neurons);
        let for_sketches = room.saturating_sub(prefixes(&self.hot_neurons));
        let streamed = least_streamed(of_layer, n_layers, for_sketches);
        self.streamed_sketches = streamed.unwrap_or(n_layers);
        if self.streamed_sketches > 0 && split.sketch_form() != SketchForm::AllInTwo {
            let fewer = bytes_in_form(split, SketchForm::AllInTwo, n - self.always_neurons);
            self.streamed_in_two_bits = least_streamed(fewer, n_layers, for_sketches).map(|n| n as u64 * fewer);
        }
        self.fixed.predictors = sketches_bytes(of_layer, n_layers, self.streamed_sketches);
        self.chooser_bytes_per_token = n_layers as u64 * of_layer;
        self.spare_sketch_bytes = self.fixed.predictors - sketches_bytes(of_layer, n_layers, n_layers);
        self.streamed_bytes_per_token = self.streamed_sketches as u64 * of_layer;
        if streamed.is_some() && prefixes(&self.hot_neurons) <= room {
            return Ok(());
        }
        let needed_bytes = self.fixed.total() + prefixes(&least);
        let always = format!(", neurons that are always computed {}", format_bytes(prefixes(&least)));
        let what = describe(&self.fixed, split) + &always;
        Err(Error::VramTooSmall { budget_bytes: self.request.vram_budget_bytes, needed_bytes, what })
    }

    /// Adds the bytes of the neurons that a token is expected to read if a sketch chooses a share of those that are not always
    /// computed, wherever they lie. Down rows of the sketch are read of the neurons that are not computed.
    fn expect_bytes_with_sketches(&mut self, split: &Split, active: f64) {
        let (n, n_layers) = (split.manifest().config.intermediate_size, self.hot_neurons.len());
        let layouts: Vec<_> = split.layers().iter().map(|file| self.layout(file)).collect();
        let rest = |hot: &[usize]| rest_of(layouts.iter().map(Cow::as_ref), hot);
        let behind = |n: usize| rest(&vec![n; n_layers]);
        let (all, sketched, cold) = (behind(0), behind(self.always_neurons), rest(&self.hot_neurons));
        self.device_bytes_per_token += all - sketched + (active * (sketched - cold) as f64) as u64;
        self.host_bytes_per_token = (active * cold as f64) as u64 + self.streamed_bytes_per_token;
        if self.residuals {
            // To the residual of a down row its sketch is added.
            return;
        }
        let n_chosen = active * (n_layers * (n - self.always_neurons)) as f64;
        self.device_bytes_per_token -= n_chosen as u64 * sketched_down_row_bytes(split);
    }

    /// Adds the bytes of the neurons that a token of sparse mode is expected to read.
    fn expect_bytes(&mut self, split: &Split, active: f64, replayed: Option<Replayed>) -> Result<()> {
        let (n, hot) = (split.manifest().config.intermediate_size, &self.hot_neurons);
        let all_hot = Replayed { active: n as f64, hot: n as f64, ..Replayed::default() };
        let r = replayed.unwrap_or(all_hot);
        // The trace has the profile's active share; another share is scaled.
        let scale = (hot.len() * n) as f64 * active / r.active.max(1.0);
        let hot_bundle = active_bundle(split, |l| 0..hot[l])?;
        let cold_bundle = active_bundle(split, |l| hot[l]..n)?;
        self.device_bytes_per_token += (scale * r.hot * hot_bundle) as u64;
        self.cache_bytes_per_token = (scale * r.cached * cold_bundle) as u64;
        self.host_bytes_per_token = (scale * (r.active - r.hot - r.cached) * cold_bundle) as u64;
        self.cache_hit_rate = if r.active > r.hot { r.cached / (r.active - r.hot) } else { 0.0 };
        Ok(())
    }

    /// Makes room for neurons that are fetched while attention is computed, `n_active` of each layer at most; returns what
    /// is left.
    fn look_ahead(&mut self, split: &Split, left: u64, n_active: usize) -> Result<u64> {
        let n_layers = self.hot_neurons.len();
        let meanwhile = || {
            let bytes = (self.fixed.matrices / n_layers as u64 / LINK_IS_SLOWER).min(left / LOOKAHEAD_IS_SMALLER);
            let bundle = largest_coldest_bundle(split) as u64;
            bytes.saturating_sub(super::buffers::lookahead_bytes(split, 0)) / bundle
        };
        let n = self.request.lookahead.unwrap_or_else(|| meanwhile() as usize).min(n_active);
        if n == 0 || n_layers == 1 {
            return Ok(left);
        }
        self.lookahead_neurons = n;
        self.lookahead_bytes_per_token = layouts(split).map(|layout| n as u64 * coldest_bundle(layout)).sum();
        self.fixed.lookahead = super::buffers::lookahead_bytes(split, n);
        left.checked_sub(self.fixed.lookahead).ok_or_else(|| Error::VramTooSmall {
            budget_bytes: self.request.vram_budget_bytes,
            needed_bytes: self.fixed.total(),
            what: describe(&self.fixed, split),
        })
    }

    /// Fills in hot prefixes and cache for `left` bytes: of several divisions the one whose replay reads least from
    /// pinned memory.
    fn divide(&mut self, split: &Split, left: u64) -> Result<Replayed> {
        let config = &split.manifest().config;
        let (n, n_layers) = (config.intermediate_size, config.n_layers);
        let hottest = layers_by_rate(split)?;
        let step = n_layers.div_ceil(REPLAYED_LAYERS);
        let sampled: Vec<usize> = (0..n_layers).step_by(step).collect();
        let traces = sampled.iter().map(|&l| LayerTrace::load(split, l)).collect::<Result<Vec<_>>>()?;
        let shares: Vec<f64> = self.request.cache_share.map_or(CACHE_SHARES.to_vec(), |share| vec![share]);
        let mut divisions = Vec::new();
        // What is not enough for a set is left to the prefix.
        for share in shares.into_iter().chain([0.0]) {
            if share == 0.0 && !divisions.is_empty() {
                continue;
            }
            let (hot, sets) = division(split, &hottest, left, share);
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
            replay_all(split, &traces, &sampled, &divisions[d], policy)
        });
        let misses = |job: &usize| replays[*job].missed_bytes;
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

    /// What to ask for if the device refuses this plan: a tenth less, but never more than half of the memory for neurons, and for sketches
    /// that need not be there, less. `None` if there is nothing to shrink.
    pub fn smaller(&self) -> Option<GpuRequest> {
        let shrinkable = self.hot_bytes + self.cache_bytes + self.spare_sketch_bytes;
        let less = (self.total_bytes / REFUSED_SHRINKS).min(shrinkable / 2);
        let vram_budget_bytes = self.total_bytes - less;
        (shrinkable > 0).then_some(GpuRequest { vram_budget_bytes, ..self.request })
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

/// Hot prefixes, and sets of the cache, where the cache takes `share` of `left` bytes.
fn division(split: &Split, hottest: &[u32], left: u64, share: f64) -> (Vec<usize>, Vec<usize>) {
    let config = &split.manifest().config;
    let (n, n_layers) = (config.intermediate_size, config.n_layers as u64);
    // Rounding to chunks and to the alignment of device memory.
    let slack = n_layers * 2 * ALIGN;
    let tables = 8 * n as u64 * n_layers;
    let cache_budget = if share > 0.0 { ((left as f64 * share) as u64).saturating_sub(tables + slack) } else { 0 };
    let hot_budget = (left as f64 * (1.0 - share)) as u64;
    let prefixes = |bytes: u64| hot_prefixes(split, hottest, bytes.saturating_sub(slack));
    let hot = prefixes(hot_budget);
    let cached: Vec<bool> = layouts(split).zip(&hot).map(|(layout, &h)| is_cold_alike(layout, h)).collect();
    // The part of layers that have no cache is for the prefix.
    let without = cached.iter().filter(|&&cached| !cached).count() as u64;
    let unused = cache_budget * without / n_layers;
    let hot = if unused > 0 { prefixes(hot_budget + unused) } else { hot };
    // As many sets for each of the others.
    let of_set = |(layout, &cached): (&LayerLayout, &bool)| {
        if cached { WAYS as u64 * (coldest_bundle(layout) + 8) } else { 0 }
    };
    let sets_bytes: u64 = layouts(split).zip(&cached).map(of_set).sum();
    let each = ((cache_budget - unused) / sets_bytes.max(1)) as usize;
    let n_sets = |(&h, &cached): (&usize, &bool)| if cached { each.min((n - h) / WAYS) } else { 0 };
    let sets = hot.iter().zip(&cached).map(n_sets).collect();
    (hot, sets)
}

/// The mean layer's replay with the hot neurons and sets of each.
fn replay_all(
    split: &Split,
    traces: &[LayerTrace],
    layers: &[usize],
    (hot, sets): &(Vec<usize>, Vec<usize>),
    policy: Policy,
) -> Replayed {
    let of_layer =
        |(trace, &l): (&LayerTrace, &usize)| trace.replay(split.layers()[l].bundles(), hot[l], sets[l], WAYS, policy);
    let sum = traces.iter().zip(layers).map(of_layer).fold(Replayed::default(), Replayed::plus);
    sum.over(traces.len())
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

/// How many fewer they were with attention's in q4.
fn attention_in_q4_spares(split: &Split) -> u64 {
    let of = |m: &StoredMatrix<'_>| {
        let each = m.row_bytes().saturating_sub(Encoding::Q4.row_stride(m.layout().hidden_size()));
        (m.entry().rows * each) as u64
    };
    device_matrices(split).filter(StoredMatrix::is_attention).map(|m| of(&m)).sum()
}

fn fixed_bytes(sections: Sections<'_>, request: &GpuRequest, n_splits: usize, prefill_neurons: usize) -> GpuBytes {
    let split = sections.split;
    let config = &split.manifest().config;
    let sum = |tensors: &mut dyn Iterator<Item = &TensorEntry>| tensors.map(|t| aligned(t.bytes)).sum::<u64>();
    let vectors = sum(&mut split.resident().tensors().iter().filter(|t| t.format == Format::F32));
    let predictors = match request.base.mode {
        Mode::Exact => 0,
        Mode::Sparse { .. } if !has_sketches(split) => sum(&mut split.predictors().tensors().iter()),
        // As few as there must be: the plan may keep more of them on the device, or compute more neurons always, each of which takes more
        // than its sketch.
        Mode::Sparse { .. } => {
            let n = config.intermediate_size;
            let of_layer = layer_sketch_bytes(split, n - always_neurons(request.base.always.unwrap_or(0.0), n));
            sketches_bytes(of_layer, config.n_layers, config.n_layers)
        }
    };
    let has_left_out = predictors > 0 && split.manifest().shares.is_some() && !has_sketches(split);
    let left_out = if has_left_out { config.n_layers as u64 * aligned(4 * config.hidden_size as u64) } else { 0 };
    let context = request.base.context;
    let kv_cache = KvCache::bytes(config, context)
        + 2 * config.n_layers as u64 * ALIGN
        + 2 * aligned(Rope::bytes(config, context));
    GpuBytes {
        matrices: device_matrix_bytes(split),
        // q, k and v biases become one vector.
        vectors: vectors + config.n_layers as u64 * ALIGN + left_out,
        predictors,
        kv_cache,
        scratch: super::buffers::scratch_bytes(sections, request, n_splits),
        prefill: super::buffers::prefill_bytes(split, request.base.batch.min(context), prefill_neurons),
        lookahead: 0,
        context: request.context_bytes,
    }
}

/// Bytes of a down row of a sketch.
fn sketched_down_row_bytes(split: &Split) -> u64 {
    split.sketch_form().row_bytes(split.manifest().config.hidden_size)[2] as u64
}

/// The shape of attention.
pub(super) fn heads(config: &thermocline_datasets::ModelConfig, capacity: usize) -> Heads {
    Heads { n_heads: config.n_heads, n_kv_heads: config.n_kv_heads, head_dim: config.head_dim, capacity }
}

fn describe(b: &GpuBytes, split: &Split) -> String {
    format!(
        "attention and head {}, {} {}, keys and values {}, scratch {}, prompt buffers {}, CUDA context {}",
        format_bytes(b.matrices),
        if has_sketches(split) { "sketches" } else { "predictors" },
        format_bytes(b.predictors),
        format_bytes(b.kv_cache),
        format_bytes(b.scratch + b.vectors),
        format_bytes(b.prefill),
        format_bytes(b.context)
    )
}
