//! A split's bytes, on the device and in pinned host memory, as a plan says.

use super::plan::{ALIGN, GpuPlan, GpuRequest, aligned, device_matrices, heads, pinned_embedding};
use crate::plan::Mode;
use crate::{Error, Result};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use thermocline_datasets::{Activation, ModelConfig};
use thermocline_kernels::cuda::launch::{
    CacheTables, DeviceMatrix, Foreseen, HostResult, HostWork, INPUT_FLAG, LowRankPredictor, Nonlinearity, RESULT_FLAG,
    Step, WorkList, ffn_blocks, host_item, hot_item, inner_values,
};
use thermocline_kernels::cuda::{CudaError, Device, Memory, View};
use thermocline_kernels::{AlignedBuf, BundleLayout, Encoding};
use thermocline_split::{Flaw, LayerFile, Split, StoredPredictor, TensorEntry};

/// Neurons, or rows of a matrix, of a prompt batch's piece: large enough for the tensor cores, small in memory.
const PREFILL_PIECE: usize = 4096;

/// One layer.
#[derive(Debug)]
pub(super) struct Layer {
    pub input_norm: View,
    pub ffn_norm: View,
    /// `[q | k | v]` rows.
    pub qkv: DeviceMatrix,
    pub qkv_bias: Option<View>,
    pub o: DeviceMatrix,
    pub keys: View,
    pub values: View,
    pub n_hot: usize,
    pub hot: View,
    /// Pinned: the other neurons' bundles.
    pub cold: Memory,
    pub cache: CacheTables,
    pub slots: View,
    pub predictor: Option<DevicePredictor>,
    /// Exact mode: all neurons, listed once.
    pub every: Option<WorkList>,
}

#[derive(Debug)]
pub(super) struct DevicePredictor {
    pub input: DeviceMatrix,
    /// For the input of the layer before, if that is another.
    pub ahead: Option<DeviceMatrix>,
    pub factors: DeviceMatrix,
    pub neurons: View,
}

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
    pub work: WorkList,
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
    pub x: Memory,
    pub y: Memory,
    pub n_threads: usize,
}

/// A model where a token can use it.
#[derive(Debug)]
pub(super) struct Model {
    pub layout: BundleLayout,
    pub activation: Nonlinearity,
    pub layers: Vec<Layer>,
    pub embedding: DeviceMatrix,
    pub head: DeviceMatrix,
    pub final_norm: View,
    pub rope: [View; 2],
    pub scratch: Scratch,
    pub lookahead: Option<Lookahead>,
    pub prefill: PrefillBuffers,
    pub mapped: Mapped,
    pub n_blocks: usize,
    pub flaws: Vec<Flaw>,
}

pub(super) fn prefill_piece(config: &ModelConfig) -> usize {
    PREFILL_PIECE.min(config.intermediate_size)
}

fn kernel_activation(activation: Activation) -> Nonlinearity {
    match activation {
        Activation::Silu => Nonlinearity::Silu,
        Activation::Relu => Nonlinearity::Relu,
        Activation::Drelu => Nonlinearity::Drelu,
    }
}

fn qkv_width(config: &ModelConfig) -> usize {
    (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
}

fn rank(split: &Split) -> usize {
    split.predictors().entry("predictors.0.input").map_or(0, |t| t.rows)
}

/// Bytes of each part of [`Scratch`], in order; the last is the lists of exact mode.
fn scratch_parts(split: &Split, request: &GpuRequest, n_splits: usize) -> [usize; 16] {
    let config = &split.manifest().config;
    let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
    let every = if request.base.mode == Mode::Exact { config.n_layers * aligned(8 * ffn as u64) as usize } else { 0 };
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
        4 * ffn,
        8 * ffn,
        32,
        64,
        4 * request.n_blocks * hidden,
        4 * config.vocab_size,
        every,
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
        n_places * split.layers()[0].layout().bundle_bytes(),
        4 * inner_values(hidden, rank(split)),
        4 * ffn.next_multiple_of(4),
    ]
}

pub(super) fn lookahead_bytes(split: &Split, n_places: usize) -> u64 {
    let counts = [2, 2, 2, 1, 1, 1];
    lookahead_parts(split, n_places).iter().zip(counts).map(|(&b, n)| n * aligned(b as u64)).sum()
}

pub(super) fn scratch_bytes(split: &Split, request: &GpuRequest, n_splits: usize) -> u64 {
    scratch_parts(split, request, n_splits).iter().map(|&b| aligned(b as u64)).sum::<u64>()
        + if request.base.mode == Mode::Exact { split.layers().len() as u64 * ALIGN } else { 0 }
}

/// Bytes of each part of [`PrefillBuffers`]: tokens, x, input (twice), q/k/v, gate, up, h (twice), stored (twice), rows
/// (six times).
fn prefill_parts(split: &Split, batch: usize, piece: usize) -> [usize; 8] {
    let config = &split.manifest().config;
    let hidden = config.hidden_size;
    let widest = hidden.max(config.n_heads * config.head_dim);
    let row = device_matrices(split).map(|m| m.row_bytes()).max().unwrap_or(0);
    let stored = piece * split.layers()[0].layout().bundle_bytes().max(row);
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
struct Arena {
    memory: Memory,
    next: Mutex<usize>,
}

impl Arena {
    fn take(&self, bytes: usize) -> View {
        let mut next = self.next.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let view = self.memory.slice(*next, bytes);
        *next += aligned(bytes as u64) as usize;
        view
    }

    fn put(&self, device: &Device, bytes: &[u8]) -> Result<View> {
        let view = self.take(bytes.len());
        device.write(&view, bytes)?;
        Ok(view)
    }
}

impl Model {
    /// Reads, checks and places everything. `progress(done, total)` counts layers.
    pub(super) fn load(
        split: &Split,
        plan: &GpuPlan,
        device: &Device,
        progress: &dyn Fn(usize, usize),
    ) -> Result<Self> {
        let config = &split.manifest().config;
        let (hidden, n_layers) = (config.hidden_size, config.n_layers);
        let layout = *split.layers()[0].layout();
        if !hidden.is_multiple_of(32) || layout.hidden_size() != hidden {
            let reason = format!("the GPU engine needs a hidden size that is a multiple of 32, not {hidden}");
            return Err(misfit(split, "config.hidden_size", reason));
        }
        check_encodings(split)?;
        let bytes = plan.total_bytes - plan.fixed.context;
        let memory = device.allocate(bytes as usize).map_err(|e| match e {
            CudaError::OutOfMemory { .. } => Error::VramRefused { needed_bytes: bytes, source: e },
            other => other.into(),
        })?;
        let arena = Arena { memory, next: Mutex::new(0) };
        let loader = Loader { split, plan, device, arena: &arena };
        let n_threads = plan.request.base.n_threads.min(n_layers);
        let next = AtomicUsize::new(0);
        let mut loaded: Vec<Option<(Layer, Option<Flaw>)>> = (0..n_layers).map(|_| None).collect();
        std::thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel();
            for _ in 0..n_threads {
                let (sender, next, loader) = (sender.clone(), &next, &loader);
                scope.spawn(move || {
                    loop {
                        let l = next.fetch_add(1, Ordering::Relaxed);
                        if l >= n_layers || sender.send((l, loader.layer(l))).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(sender);
            for (done, (l, layer)) in receiver.iter().enumerate() {
                progress(done, n_layers);
                loaded[l] = Some(layer?);
            }
            Ok::<(), Error>(())
        })?;
        let (mut layers, flaws): (Vec<Layer>, Vec<Option<Flaw>>) = loaded.into_iter().flatten().unzip();
        let mut flaws: Vec<Flaw> = flaws.into_iter().flatten().collect();
        progress(n_layers, n_layers);

        let vocab = (config.vocab_size, hidden);
        let (head, embedding) = match pinned_embedding(split) {
            None => {
                let table = loader.matrix(&["model.embed_tokens.weight"], &[vocab], &mut flaws)?;
                (table.clone(), table)
            }
            Some(matrix) => {
                let (entry, encoding, bytes) = (matrix.entry(), matrix.layout().encoding(), matrix.bytes() as usize);
                check_shape(split, entry, vocab)?;
                let mut host = AlignedBuf::zeroed(bytes)?;
                matrix.read_start(&mut host[..bytes])?;
                flaws.extend(entry.matrix_flaw(matrix.layout(), &host[..bytes]));
                let data = device.pin(host)?.view();
                let table =
                    DeviceMatrix { encoding, rows: vocab.0, columns: vocab.1, stride: matrix.row_bytes(), data };
                (loader.matrix(&["lm_head.weight"], &[vocab], &mut flaws)?, table)
            }
        };
        let scratch = loader.scratch()?;
        let lookahead = (plan.lookahead_neurons > 0).then(|| loader.lookahead());
        if plan.request.base.mode == Mode::Exact {
            for layer in &mut layers {
                layer.every = Some(loader.list_all(layer.n_hot, &scratch.work)?);
            }
        }
        let final_norm = loader.vector("model.norm.weight", hidden)?;
        let (cos, sin) = crate::attention::Rope::new(config, plan.request.base.context).into_tables();
        let rope = [arena.put(device, bytemuck::cast_slice(&cos))?, arena.put(device, bytemuck::cast_slice(&sin))?];
        Ok(Self {
            layout,
            activation: kernel_activation(config.activation),
            layers,
            embedding,
            head,
            final_norm,
            rope,
            scratch,
            lookahead,
            prefill: loader.prefill(),
            mapped: loader.mapped()?,
            n_blocks: ffn_blocks(device),
            flaws,
        })
    }
}

struct Loader<'a> {
    split: &'a Split,
    plan: &'a GpuPlan,
    device: &'a Device,
    arena: &'a Arena,
}

impl Loader<'_> {
    fn encoding(&self, entry: &TensorEntry) -> Result<Encoding> {
        entry.format.encoding().ok_or_else(|| misfit(self.split, &entry.name, "not an encoded matrix".to_owned()))
    }

    /// Matrices of one encoding and as many columns, one below the other.
    fn matrix(&self, names: &[&str], shapes: &[(usize, usize)], flaws: &mut Vec<Flaw>) -> Result<DeviceMatrix> {
        let matrices = names.iter().map(|name| self.split.matrix(name)).collect::<Result<Vec<_>, _>>()?;
        let encoding = matrices[0].layout().encoding();
        let stride = matrices.iter().map(|m| m.row_bytes()).max().unwrap_or(0);
        let mut bytes = Vec::with_capacity(matrices.iter().map(|m| m.entry().rows * stride).sum());
        for (matrix, &shape) in matrices.iter().zip(shapes) {
            let entry = matrix.entry();
            check_shape(self.split, entry, shape)?;
            if matrix.layout().encoding() != encoding {
                let reason = format!("its encoding differs from that of {}", matrices[0].entry().name);
                return Err(misfit(self.split, &entry.name, reason));
            }
            let mut part = vec![0; matrix.bytes() as usize];
            matrix.read_start(&mut part)?;
            flaws.extend(entry.matrix_flaw(matrix.layout(), &part));
            // Rows are as long as the longest stream of their matrix needs; below each other they must be alike.
            if matrix.row_bytes() == stride {
                bytes.append(&mut part);
                continue;
            }
            for row in part.chunks_exact(matrix.row_bytes()) {
                bytes.extend_from_slice(row);
                bytes.resize(bytes.len() + stride - row.len(), 0);
            }
        }
        let rows = shapes.iter().map(|s| s.0).sum();
        Ok(DeviceMatrix { encoding, rows, columns: shapes[0].1, stride, data: self.arena.put(self.device, &bytes)? })
    }

    fn vector(&self, name: &str, n: usize) -> Result<View> {
        let values = self.split.vector(name)?;
        if values.len() != n {
            return Err(misfit(self.split, name, format!("{} values, expected {n}", values.len())));
        }
        self.arena.put(self.device, bytemuck::cast_slice(&values))
    }

    fn layer(&self, l: usize) -> Result<(Layer, Option<Flaw>)> {
        let config = &self.split.manifest().config;
        let (hidden, ffn, head) = (config.hidden_size, config.intermediate_size, config.head_dim);
        let (q, kv) = (config.n_heads * head, config.n_kv_heads * head);
        let name = |rest: &str| format!("model.layers.{l}.{rest}");
        let mut flaws = Vec::new();
        let [wq, wk, wv, wo] = ["q", "k", "v", "o"].map(|p| name(&format!("self_attn.{p}_proj.weight")));
        let shapes = [(q, hidden), (kv, hidden), (kv, hidden)];
        let qkv = self.matrix(&[&wq, &wk, &wv], &shapes, &mut flaws)?;
        let o = self.matrix(&[&wo], &[(hidden, q)], &mut flaws)?;
        let qkv_bias = if config.qkv_bias {
            let mut all = Vec::with_capacity(q + 2 * kv);
            for (p, n) in [("q", q), ("k", kv), ("v", kv)] {
                let name = name(&format!("self_attn.{p}_proj.bias"));
                let values = self.split.vector(&name)?;
                if values.len() != n {
                    return Err(misfit(self.split, &name, format!("{} values, expected {n}", values.len())));
                }
                all.extend(values);
            }
            Some(self.arena.put(self.device, bytemuck::cast_slice(&all))?)
        } else {
            None
        };
        let predictor = match self.plan.request.base.mode {
            Mode::Exact => None,
            Mode::Sparse { .. } => Some(self.predictor(l)?),
        };
        let file = &self.split.layers()[l];
        let n_hot = self.plan.hot_neurons[l];
        let (hot, hot_flaw) = self.hot(file, n_hot)?;
        let (cold, cold_flaw) = self.cold(file, n_hot)?;
        let values = heads(config, self.plan.request.base.context).cache_values();
        let n_sets = self.plan.cache_sets[l];
        let (n_cold, slots) = (ffn - n_hot, n_sets * self.plan.cache_ways);
        // Without a cache the kernels read none of the tables.
        let table = |n: usize| if n_sets > 0 { self.arena.take(4 * n) } else { self.arena.take(0) };
        let cache = CacheTables {
            n_sets,
            n_ways: self.plan.cache_ways,
            slot_of: table(n_cold),
            owner: table(slots),
            key: table(n_cold),
            used: table(slots),
            lambda: self.plan.cache_lambda,
        };
        let layer = Layer {
            input_norm: self.vector(&name("input_layernorm.weight"), hidden)?,
            ffn_norm: self.vector(&name("post_attention_layernorm.weight"), hidden)?,
            qkv,
            qkv_bias,
            o,
            keys: self.arena.take(2 * values),
            values: self.arena.take(2 * values),
            n_hot,
            hot,
            cold,
            cache,
            slots: self.arena.take(slots * file.layout().bundle_bytes()),
            predictor,
            every: None,
        };
        Ok((layer, flaws.into_iter().next().or(hot_flaw).or(cold_flaw)))
    }

    fn predictor(&self, l: usize) -> Result<DevicePredictor> {
        let StoredPredictor { input, ahead, factors, neurons } = self.split.stored_predictor(l)?;
        let file = self.split.predictors();
        let matrix = |entry: &TensorEntry| -> Result<DeviceMatrix> {
            let encoding = self.encoding(entry)?;
            let data = self.arena.put(self.device, &file.read(&entry.name)?)?;
            Ok(DeviceMatrix { encoding, rows: entry.rows, columns: entry.columns, stride: entry.row_bytes(), data })
        };
        let neurons = self.arena.put(self.device, bytemuck::cast_slice(&neurons))?;
        let ahead = ahead.map(matrix).transpose()?;
        Ok(DevicePredictor { input: matrix(input)?, ahead, factors: matrix(factors)?, neurons })
    }

    fn hot(&self, file: &LayerFile, n_hot: usize) -> Result<(View, Option<Flaw>)> {
        let mut bytes = vec![0; n_hot * file.layout().bundle_bytes()];
        file.read_chunks(0..n_hot.div_ceil(file.chunk_neurons()), &mut bytes)?;
        Ok((self.arena.put(self.device, &bytes)?, file.flaw(0, &bytes)))
    }

    fn cold(&self, file: &LayerFile, n_hot: usize) -> Result<(Memory, Option<Flaw>)> {
        let len = (file.order().len() - n_hot) * file.layout().bundle_bytes();
        let mut host = AlignedBuf::zeroed(len)?;
        file.read_chunks(n_hot.div_ceil(file.chunk_neurons())..file.n_chunks(), &mut host[..len])?;
        let flaw = file.flaw(n_hot, &host[..len]);
        Ok((self.device.pin(host)?, flaw))
    }

    fn scratch(&self) -> Result<Scratch> {
        let plan = self.plan;
        let parts = scratch_parts(self.split, &plan.request, plan.n_splits);
        let mut views = parts.iter().map(|&bytes| self.arena.take(bytes));
        let mut part = || views.next().expect("a part for each view");
        // In the order of `scratch_parts`.
        let scratch = Scratch {
            step: part(),
            x: part(),
            normed: part(),
            qkv: part(),
            attention_partial: part(),
            attention_arrived: part(),
            attention: part(),
            inner: part(),
            scores: part(),
            work: WorkList { ids: part(), items: part(), counts: part(), totals: part() },
            partial: part(),
            logits: part(),
        };
        self.device.write(&scratch.work.totals, &[0; 64])?;
        self.device.write(&scratch.attention_arrived, &vec![0; scratch.attention_arrived.len()])?;
        Ok(scratch)
    }

    fn lookahead(&self) -> Lookahead {
        let n_places = self.plan.lookahead_neurons;
        let [words, list, length, places, inner, scores] = lookahead_parts(self.split, n_places);
        let take = |bytes| self.arena.take(bytes);
        let foreseen = || Foreseen { words: take(words), list: take(list), n_listed: take(length), n_places };
        Lookahead { foreseen: [foreseen(), foreseen()], places: take(places), inner: take(inner), scores: take(scores) }
    }

    /// A list of all neurons of a layer, those in pinned memory first: the kernel's blocks take turns, and so each has
    /// its part of the slow ones.
    fn list_all(&self, n_hot: usize, shared: &WorkList) -> Result<WorkList> {
        let n = self.split.manifest().config.intermediate_size;
        let cold = (0..n - n_hot).map(host_item);
        let items: Vec<[u32; 2]> = cold.chain((0..n_hot).map(hot_item)).collect();
        let counts = [n, n - n_hot, 0, n_hot, 0, n, 0, 0].map(|v| v as u32);
        Ok(WorkList {
            ids: shared.ids.clone(),
            items: self.arena.put(self.device, bytemuck::cast_slice(&items))?,
            counts: self.arena.put(self.device, bytemuck::cast_slice(&counts))?,
            totals: shared.totals.clone(),
        })
    }

    fn prefill(&self) -> PrefillBuffers {
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

    fn mapped(&self) -> Result<Mapped> {
        let config = &self.split.manifest().config;
        let n_threads = self.plan.request.base.n_threads;
        let pin = |bytes: usize| -> Result<Memory> { Ok(self.device.pin(AlignedBuf::zeroed(bytes)?)?) };
        Ok(Mapped {
            step: pin(Step::BYTES)?,
            logits: pin(4 * config.vocab_size)?,
            totals: pin(64)?,
            request_flag: pin(4 * (INPUT_FLAG + 1))?,
            result_flags: pin(4 * RESULT_FLAG * n_threads)?,
            count: pin(4)?,
            list: pin(4 * config.intermediate_size)?,
            x: pin(4 * config.hidden_size)?,
            y: pin(4 * config.hidden_size * n_threads)?,
            n_threads,
        })
    }
}

impl DevicePredictor {
    /// Fed with its layer's own input.
    pub(super) fn of_layer<'a>(&'a self, layer: &'a Layer, scratch: &'a Scratch) -> LowRankPredictor<'a> {
        self.predictor(&self.input, layer, &scratch.inner, &scratch.scores)
    }

    /// Fed with the input of the layer before.
    pub(super) fn ahead<'a>(&'a self, layer: &'a Layer, lookahead: &'a Lookahead) -> LowRankPredictor<'a> {
        self.predictor(self.ahead.as_ref().unwrap_or(&self.input), layer, &lookahead.inner, &lookahead.scores)
    }

    fn predictor<'a>(
        &'a self,
        input: &'a DeviceMatrix,
        layer: &'a Layer,
        inner: &'a View,
        scores: &'a View,
    ) -> LowRankPredictor<'a> {
        let (norm_weight, factors, neurons) = (&layer.ffn_norm, &self.factors, &self.neurons);
        LowRankPredictor { input, norm_weight, factors, neurons, inner, scores }
    }
}

impl Mapped {
    /// What the kernels write for the host's threads.
    pub(super) fn work(&self) -> HostWork {
        HostWork { list: self.list.view(), count: self.count.view(), flag: self.request_flag.view() }
    }

    /// What the kernels read from them.
    pub(super) fn result(&self) -> HostResult {
        HostResult { n_threads: self.n_threads, y: self.y.view(), flags: self.result_flags.view() }
    }
}

/// Refuses layers that are not alike: kernels take one layout for all.
fn check_encodings(split: &Split) -> Result<()> {
    let first = split.layers()[0].layout();
    match split.layers().iter().map(LayerFile::layout).find(|l| *l != first) {
        Some(other) => Err(Error::MixedLayers { first: first.encoding().name(), other: other.encoding().name() }),
        None => Ok(()),
    }
}

fn check_shape(split: &Split, entry: &TensorEntry, shape: (usize, usize)) -> Result<()> {
    if (entry.rows, entry.columns) == shape {
        return Ok(());
    }
    Err(misfit(split, &entry.name, format!("[{}, {}], expected {shape:?}", entry.rows, entry.columns)))
}

fn misfit(split: &Split, field: &str, reason: String) -> Error {
    let path = split.resident().path().to_owned();
    thermocline_split::Error::Corrupt { path, field: field.to_owned(), reason }.into()
}
