//! What a token and a prompt need besides weights: device memory that is written anew, and memory through which host and
//! device talk.

use super::load::Loader;
use super::plan::{GpuRequest, aligned, device_matrices, heads, largest_coldest_bundle};
use super::sections::{COUNTS_BYTES, Sections, TOTALS_BYTES};
use crate::Result;
use crate::chooser::is_sketched;
use std::sync::Mutex;
use thermocline_datasets::ModelConfig;
use thermocline_kernels::AlignedBuf;
use thermocline_kernels::cuda::launch::{
    Foreseen, HostResult, HostWork, INPUT_FLAG, RESULT_FLAG, Step, WorkList, inner_values, sketch_rows,
};
use thermocline_kernels::cuda::{Device, Memory, View};
use thermocline_split::{LayerFile, Split};

/// Neurons of the next layer that are fetched while attention is computed.
#[derive(Debug)]
pub(super) struct Lookahead {
    /// Of layers with even and with odd numbers.
    pub foreseen: [Foreseen; 2],
    /// Their bundles: those of one layer, which are used up before the next one's come.
    pub places: View,
    /// What the next layer's predictor leaves.
    pub inner: View,
    pub scores: View,
}

/// What a token needs besides weights, and keeps only until the next.
#[derive(Debug)]
pub(super) struct Scratch {
    pub step: View,
    pub x: View,
    pub normed: View,
    pub qkv: View,
    pub attention_partial: View,
    pub attention_arrived: View,
    pub attention: View,
    pub inner: View,
    pub scores: View,
    /// Activations as the sketch has them; empty without one.
    pub sketched: View,
    /// Gate and up products, pairs, where single rows are read.
    pub products: View,
    /// Of the layer in progress, with the totals of all ([`super::sections::totals_rows`]).
    pub work: WorkList,
    /// Of the sections of a layer that has several.
    pub sections: Vec<WorkList>,
    /// Rows for each block, section by section, then the sketch's.
    pub partial: View,
    pub logits: View,
}

/// Buffers of prompt batches.
#[derive(Debug)]
pub(super) struct PrefillBuffers {
    pub tokens: View,
    pub x: View,
    /// bfloat16 pairs `[batch, widest]`.
    pub input: [View; 2],
    pub qkv: View,
    pub gate: View,
    pub up: View,
    pub h: [View; 2],
    /// Stored bundles or rows, one being copied while the other is computed with.
    pub stored: [View; 2],
    /// Gate, up and down of a piece, high and low.
    pub rows: [[View; 2]; 3],
}

/// Mapped host memory through which host and device talk.
#[derive(Debug)]
pub(super) struct Mapped {
    /// See [`Step`].
    pub step: Memory,
    pub logits: Memory,
    pub totals: Memory,
    /// In a page each: written by one side, watched by the other.
    pub request_flag: Memory,
    /// A flag and sums of each of the host's threads.
    pub result_flags: Memory,
    pub count: Memory,
    pub list: Memory,
    pub known: Memory,
    pub x: Memory,
    pub y: Memory,
    pub n_threads: usize,
}

fn qkv_width(config: &ModelConfig) -> usize {
    (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
}

fn rank(split: &Split) -> usize {
    split.predictors().entry("predictors.0.input").map_or(0, |t| t.rows)
}

/// Neurons of a layer of which there may be a sketch on the device.
fn most_sketched(split: &Split, request: &GpuRequest) -> usize {
    if is_sketched(split, request.base.mode) { split.manifest().config.intermediate_size } else { 0 }
}

/// Rows of sums that a layer's sketch leaves.
pub(super) fn n_sketch_rows(split: &Split, request: &GpuRequest) -> usize {
    match most_sketched(split, request) {
        0 => 0,
        n => sketch_rows(request.n_blocks, n, split.manifest().config.hidden_size),
    }
}

/// Bytes of each part of [`Scratch`], in order.
fn scratch_parts(sections: Sections<'_>, request: &GpuRequest, n_splits: usize) -> [usize; 17] {
    let split = sections.split;
    let config = &split.manifest().config;
    let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
    [
        Step::BYTES,
        4 * hidden,
        4 * hidden,
        4 * qkv_width(config),
        4 * heads(config, request.base.context).partial_values(n_splits),
        4 * heads(config, request.base.context).counters(),
        4 * config.n_heads * config.head_dim,
        4 * inner_values(hidden, rank(split)),
        4 * ffn.next_multiple_of(4),
        4 * most_sketched(split, request),
        8 * most_sketched(split, request),
        4 * ffn,
        8 * ffn,
        COUNTS_BYTES,
        TOTALS_BYTES * sections.totals_rows(),
        4 * hidden * (request.n_blocks * sections.most() + n_sketch_rows(split, request)),
        4 * config.vocab_size,
    ]
}

/// Bytes of each part of [`Lookahead`]: words, lists and lengths (twice each), places, the predictor's two.
fn lookahead_parts(split: &Split, n_places: usize) -> [usize; 6] {
    let config = &split.manifest().config;
    let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
    [
        8 * ffn.div_ceil(32),
        4 * n_places,
        4,
        n_places * largest_coldest_bundle(split),
        4 * inner_values(hidden, rank(split)),
        4 * ffn.next_multiple_of(4),
    ]
}

pub(super) fn lookahead_bytes(split: &Split, n_places: usize) -> u64 {
    let counts = [2, 2, 2, 1, 1, 1];
    lookahead_parts(split, n_places).iter().zip(counts).map(|(&b, n)| n * aligned(b as u64)).sum()
}

pub(super) fn scratch_bytes(sections: Sections<'_>, request: &GpuRequest, n_splits: usize) -> u64 {
    scratch_parts(sections, request, n_splits).iter().map(|&b| aligned(b as u64)).sum::<u64>()
        + sections.lists_bytes(request.base.mode)
}

/// Bytes of each part of [`PrefillBuffers`]: tokens, x, input (twice), q/k/v, gate, up, h (twice), stored (twice), rows
/// (six times).
fn prefill_parts(split: &Split, batch: usize, piece: usize) -> [usize; 8] {
    let config = &split.manifest().config;
    let hidden = config.hidden_size;
    let widest = hidden.max(config.n_heads * config.head_dim);
    let row = device_matrices(split).map(|m| m.row_bytes()).max().unwrap_or(0);
    let longest = |file: &LayerFile| file.bundles().longest(0..file.order().len());
    let stored = piece * split.layers().iter().map(longest).max().unwrap_or(0).max(row);
    [
        4 * batch,
        4 * batch * hidden,
        2 * batch * widest,
        4 * batch * qkv_width(config),
        4 * batch * piece,
        2 * batch * piece,
        stored,
        2 * piece * widest,
    ]
}

pub(super) fn prefill_bytes(split: &Split, batch: usize, piece: usize) -> u64 {
    let counts = [1, 1, 2, 1, 2, 2, 2, 6];
    prefill_parts(split, batch, piece).iter().zip(counts).map(|(&b, n)| n * aligned(b as u64)).sum()
}

/// One block of device memory, handed out piece by piece.
pub(super) struct Arena {
    memory: Memory,
    next: Mutex<usize>,
}

impl Arena {
    pub(super) fn new(memory: Memory) -> Self {
        Self { memory, next: Mutex::new(0) }
    }

    pub(super) fn take(&self, bytes: usize) -> View {
        let mut next = self.next.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let view = self.memory.slice(*next, bytes);
        *next += aligned(bytes as u64) as usize;
        view
    }

    pub(super) fn put(&self, device: &Device, bytes: &[u8]) -> Result<View> {
        let view = self.take(bytes.len());
        device.write(&view, bytes)?;
        Ok(view)
    }
}

impl Loader<'_> {
    pub(super) fn scratch(&self) -> Result<Scratch> {
        let plan = self.plan;
        let parts = scratch_parts(self.all_sections(), &plan.request, plan.n_splits);
        let mut views = parts.iter().map(|&bytes| self.arena.take(bytes));
        let mut part = || views.next().expect("a part for each view");
        // In the order of `scratch_parts`.
        let mut scratch = Scratch {
            step: part(),
            x: part(),
            normed: part(),
            qkv: part(),
            attention_partial: part(),
            attention_arrived: part(),
            attention: part(),
            inner: part(),
            scores: part(),
            sketched: part(),
            products: part(),
            work: WorkList { ids: part(), items: part(), counts: part(), totals: part() },
            sections: Vec::new(),
            partial: part(),
            logits: part(),
        };
        scratch.sections = self.shared_lists(&scratch.work);
        self.device.write(&scratch.work.totals, &vec![0; scratch.work.totals.len()])?;
        self.device.write(&scratch.attention_arrived, &vec![0; scratch.attention_arrived.len()])?;
        Ok(scratch)
    }

    pub(super) fn lookahead(&self) -> Lookahead {
        let n_places = self.plan.lookahead_neurons;
        let [words, list, length, places, inner, scores] = lookahead_parts(self.split, n_places);
        let take = |bytes| self.arena.take(bytes);
        let foreseen = || Foreseen { words: take(words), list: take(list), n_listed: take(length), n_places };
        Lookahead { foreseen: [foreseen(), foreseen()], places: take(places), inner: take(inner), scores: take(scores) }
    }

    pub(super) fn prefill(&self) -> PrefillBuffers {
        let request = &self.plan.request.base;
        let batch = request.batch.min(request.context);
        let [tokens, x, input, qkv, product, h, stored, rows] =
            prefill_parts(self.split, batch, self.plan.prefill_neurons);
        let take = |bytes| self.arena.take(bytes);
        PrefillBuffers {
            tokens: take(tokens),
            x: take(x),
            input: [take(input), take(input)],
            qkv: take(qkv),
            gate: take(product),
            up: take(product),
            h: [take(h), take(h)],
            stored: [take(stored), take(stored)],
            rows: std::array::from_fn(|_| [take(rows), take(rows)]),
        }
    }

    pub(super) fn mapped(&self) -> Result<Mapped> {
        let config = &self.split.manifest().config;
        let n_threads = self.plan.request.base.n_threads;
        let pin = |bytes: usize| -> Result<Memory> { Ok(self.device.pin(AlignedBuf::zeroed(bytes)?)?) };
        Ok(Mapped {
            step: pin(Step::BYTES)?,
            logits: pin(4 * config.vocab_size)?,
            totals: pin(TOTALS_BYTES * self.all_sections().totals_rows())?,
            request_flag: pin(4 * (INPUT_FLAG + 1))?,
            result_flags: pin(4 * RESULT_FLAG * n_threads)?,
            count: pin(4)?,
            list: pin(4 * config.intermediate_size)?,
            known: pin(8 * config.intermediate_size)?,
            x: pin(4 * config.hidden_size)?,
            y: pin(4 * config.hidden_size * n_threads)?,
            n_threads,
        })
    }
}

impl Mapped {
    /// What the kernels write for the host's threads.
    pub(super) fn work(&self) -> HostWork {
        HostWork {
            list: self.list.view(),
            known: self.known.view(),
            count: self.count.view(),
            flag: self.request_flag.view(),
        }
    }

    /// What the kernels read from them.
    pub(super) fn result(&self) -> HostResult {
        HostResult { n_threads: self.n_threads, y: self.y.view(), flags: self.result_flags.view() }
    }
}
