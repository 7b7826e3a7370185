//! A split's bytes, on the device and in pinned host memory, as a plan says.

use super::buffers::{Arena, Lookahead, Mapped, PrefillBuffers, Scratch, n_sketch_rows};
use super::plan::{GpuPlan, heads, pinned_embedding};
use super::sections::Section;
use super::sketches::{PinnedSketch, take_places};
use crate::chooser::chosen_active;
use crate::layer_active::{LayerActive, LeastCost};
use crate::plan::Mode;
use crate::{Error, Result};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use thermocline_datasets::{Activation, ModelConfig};
use thermocline_kernels::cuda::launch::{
    CacheTables, DeviceMatrix, DeviceSketch, LowRankPredictor, Nonlinearity, Selection, WorkList, ffn_blocks,
};
use thermocline_kernels::cuda::{CudaError, Device, Memory, View};
use thermocline_kernels::{AlignedBuf, Encoding, LayerLayout};
use thermocline_split::{Flaw, Split, StoredPredictor, TensorEntry};

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
    pub layout: LayerLayout,
    pub n_hot: usize,
    /// Pinned: the bundles of neurons that are not hot.
    pub cold: Memory,
    pub sections: Vec<Section>,
    /// Of the last section.
    pub cache: CacheTables,
    pub slots: View,
    /// Sparse mode.
    pub chooser: Option<DeviceChooser>,
    /// The first neurons, which every token computes without being chosen.
    pub n_always: usize,
    /// Those of the others that a token computes.
    pub selection: Selection,
    /// If it reads single rows of them.
    pub rows: Option<RowRule>,
    /// Sparse mode: stands for the others.
    pub left_out: Option<View>,
    /// Whether that is listed anew for each token, and by the kernel that divides it with the host.
    pub is_chosen: bool,
    /// What a token computes then, all sections together.
    pub work: WorkList,
    /// Its row of the totals.
    pub totals: usize,
    /// Whether the host's threads choose and compute all of its neurons.
    pub is_hosts: bool,
}

/// Which rows of a layer's neurons are read.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowRule {
    /// The cost from which a row is.
    pub least: f32,
    /// Whether none is read alone.
    pub whole: bool,
}

impl Layer {
    /// Bytes of the bundles that are not hot.
    pub(super) fn cold_bytes(&self) -> u64 {
        self.layout.bytes(self.n_hot..self.layout.n_neurons()) as u64
    }

    /// All neurons, if every token computes them and nobody lists them.
    pub(super) fn all_neurons(&self) -> Option<std::ops::Range<u32>> {
        (!self.is_chosen).then_some(0..self.layout.n_neurons() as u32)
    }

    /// The section of the last neurons, the only ones that are cached or fetched early.
    pub(super) fn last_section(&self) -> &Section {
        &self.sections[self.sections.len() - 1]
    }

    /// What it chooses by, if that is a predictor of low rank.
    pub(super) fn predictor(&self) -> Option<&DevicePredictor> {
        match &self.chooser {
            Some(DeviceChooser::Predictor(predictor)) => Some(predictor),
            _ => None,
        }
    }

    /// The same, if that is a sketch; of one in pinned memory, in the first place that it is copied to.
    pub(super) fn sketch(&self) -> Option<&DeviceSketch> {
        match &self.chooser {
            Some(DeviceChooser::Sketch(sketch)) => Some(sketch),
            Some(DeviceChooser::Pinned(places, _)) => places.first(),
            _ => None,
        }
    }
}

/// What a layer's neurons are chosen by.
#[derive(Debug)]
pub(super) enum DeviceChooser {
    Predictor(DevicePredictor),
    /// It stands for the others, too.
    Sketch(DeviceSketch),
    /// The same, as it is in each of the places that it may be copied to, and in pinned memory.
    Pinned(Vec<DeviceSketch>, Arc<PinnedSketch>),
}

#[derive(Debug)]
pub(super) struct DevicePredictor {
    pub input: DeviceMatrix,
    /// For the input of the layer before, if that is another.
    pub ahead: Option<DeviceMatrix>,
    pub factors: DeviceMatrix,
    pub neurons: View,
}

/// A model where a token can use it.
#[derive(Debug)]
pub(super) struct Model {
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
    /// Rows of sums that a sketch leaves.
    pub sketch_rows: usize,
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

impl Model {
    /// Reads, checks and places everything; `with_host`: the host's threads may have a part of the cold neurons.
    /// `progress(done, total)` counts layers.
    pub(super) fn load(
        split: &Split,
        plan: &GpuPlan,
        device: &Device,
        with_host: bool,
        progress: &dyn Fn(usize, usize),
    ) -> Result<Self> {
        let config = &split.manifest().config;
        let (hidden, n_layers) = (config.hidden_size, config.n_layers);
        if !hidden.is_multiple_of(32) {
            let reason = format!("the GPU engine needs a hidden size that is a multiple of 32, not {hidden}");
            return Err(misfit(split, "config.hidden_size", reason));
        }
        let bytes = plan.total_bytes - plan.fixed.context;
        let memory = device.allocate(bytes as usize).map_err(|e| match e {
            CudaError::OutOfMemory { .. } => Error::VramRefused { needed_bytes: bytes, source: e },
            other => other.into(),
        })?;
        let arena = Arena::new(memory);
        let active = match plan.request.base.mode {
            Mode::Exact => Vec::new(),
            Mode::Sparse { active } => chosen_active(split, active, plan.always_neurons)?,
        };
        let sketch_places = take_places(split, plan, &arena);
        let loader = Loader { split, plan, device, arena: &arena, active: &active, with_host, sketch_places };
        let scratch = loader.scratch()?;
        let n_threads = plan.request.base.n_threads.min(n_layers);
        let next = AtomicUsize::new(0);
        let mut loaded: Vec<Option<(Layer, Option<Flaw>)>> = (0..n_layers).map(|_| None).collect();
        std::thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel();
            for _ in 0..n_threads {
                let (sender, next, loader, scratch) = (sender.clone(), &next, &loader, &scratch);
                scope.spawn(move || {
                    loop {
                        let l = next.fetch_add(1, Ordering::Relaxed);
                        if l >= n_layers || sender.send((l, loader.layer(l, scratch))).is_err() {
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
        let (layers, flaws): (Vec<Layer>, Vec<Option<Flaw>>) = loaded.into_iter().flatten().unzip();
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
        let lookahead = (plan.lookahead_neurons > 0).then(|| loader.lookahead());
        let final_norm = loader.vector("model.norm.weight", hidden)?;
        let (cos, sin) = crate::attention::Rope::new(config, plan.request.base.context).into_tables();
        let rope = [arena.put(device, bytemuck::cast_slice(&cos))?, arena.put(device, bytemuck::cast_slice(&sin))?];
        Ok(Self {
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
            sketch_rows: n_sketch_rows(split, &plan.request),
            flaws,
        })
    }
}

/// Puts things where the plan says.
pub(super) struct Loader<'a> {
    pub split: &'a Split,
    pub plan: &'a GpuPlan,
    pub device: &'a Device,
    pub arena: &'a Arena,
    /// Sparse mode: what is computed of each layer.
    pub active: &'a [LayerActive],
    pub with_host: bool,
    /// For sketches that are copied.
    pub sketch_places: Vec<View>,
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

    fn layer(&self, l: usize, scratch: &Scratch) -> Result<(Layer, Option<Flaw>)> {
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
        let chooser = self.plan.has_choice(self.split).then(|| self.chooser(l)).transpose()?;
        let file = &self.split.layers()[l];
        let n_hot = self.plan.hot_neurons[l];
        let (hot, hot_flaw) = self.hot(l, n_hot)?;
        let (cold, cold_flaw) = self.cold(l, n_hot)?;
        let (work, sections) = self.sections(l, n_hot, [&hot, &cold.view()], scratch)?;
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
        let (active, n_always) = (self.active.get(l), self.plan.always_neurons);
        let measured = active.map(|a| a.left_out.as_slice()).filter(|mean| !mean.is_empty());
        let left_out = measured.map(|mean| self.arena.put(self.device, bytemuck::cast_slice(mean)));
        let layer = Layer {
            input_norm: self.vector(&name("input_layernorm.weight"), hidden)?,
            ffn_norm: self.vector(&name("post_attention_layernorm.weight"), hidden)?,
            qkv,
            qkv_bias,
            o,
            keys: self.arena.take(2 * values),
            values: self.arena.take(2 * values),
            layout: self.layout(l),
            n_hot,
            cold,
            sections,
            cache,
            slots: self.arena.take(slots * file.bundles().coldest().bundles().bundle_bytes()),
            n_always: if chooser.is_some() { n_always } else { 0 },
            selection: match active.filter(|_| chooser.is_some()) {
                Some(LayerActive { least_cost: Some(LeastCost::OfNeuron(least)), .. }) => Selection::Above(*least),
                // By which of their rows are read, as a number.
                Some(LayerActive { least_cost: Some(LeastCost::OfRow { .. }), .. }) => Selection::Above(0.5),
                Some(active) => Selection::Top(active.n_active - n_always),
                None => Selection::Every,
            },
            rows: chooser
                .as_ref()
                .and(active)
                .and_then(LayerActive::of_rows)
                .map(|(least, _)| RowRule { least, whole: !file.bundles().has_plain_rows() }),
            chooser,
            left_out: left_out.transpose()?,
            is_chosen: self.is_chosen(n_hot),
            work,
            totals: self.all_sections().first_totals_row(l),
            is_hosts: false,
        };
        Ok((layer, flaws.into_iter().next().or(hot_flaw).or(cold_flaw)))
    }

    fn chooser(&self, l: usize) -> Result<DeviceChooser> {
        Ok(match self.sketch(l)? {
            Some(sketch) => sketch,
            None => DeviceChooser::Predictor(self.predictor(l)?),
        })
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

    /// How the neurons of layer `l` lie on the device and in pinned memory.
    pub(super) fn layout(&self, l: usize) -> LayerLayout {
        self.plan.layout(&self.split.layers()[l]).into_owned()
    }

    /// The bundles of `neurons` of layer `l`, which begin and end with whole chunks or residuals, into `out`.
    fn read(&self, l: usize, neurons: Range<usize>, out: &mut [u8]) -> Result<Option<Flaw>> {
        let (file, layout) = (&self.split.layers()[l], self.layout(l));
        let border = if self.plan.residuals { self.plan.always_neurons } else { neurons.end };
        let border = border.clamp(neurons.start, neurons.end);
        let (stored, residuals) = out.split_at_mut(layout.bytes(neurons.start..border));
        let chunks = neurons.start.div_ceil(file.chunk_neurons())..border.div_ceil(file.chunk_neurons());
        let of_chunks = file.bundles().bytes(file.neurons(chunks.clone()));
        if of_chunks == stored.len() {
            file.read_chunks(chunks, stored)?;
        } else {
            // Neurons that are always computed end within the last one.
            let mut whole = vec![0; of_chunks];
            file.read_chunks(chunks, &mut whole)?;
            stored.copy_from_slice(&whole[..stored.len()]);
        }
        if border < neurons.end {
            self.split.read_residuals(l, border, residuals)?;
        }
        Ok(file.flaw_in(&layout, neurons.start, out))
    }

    fn hot(&self, l: usize, n_hot: usize) -> Result<(View, Option<Flaw>)> {
        let mut bytes = vec![0; self.layout(l).bytes(0..n_hot)];
        let flaw = self.read(l, 0..n_hot, &mut bytes)?;
        Ok((self.arena.put(self.device, &bytes)?, flaw))
    }

    fn cold(&self, l: usize, n_hot: usize) -> Result<(Memory, Option<Flaw>)> {
        let layout = self.layout(l);
        let len = layout.bytes(n_hot..layout.n_neurons());
        let mut host = AlignedBuf::zeroed(len)?;
        let flaw = self.read(l, n_hot..layout.n_neurons(), &mut host[..len])?;
        Ok((self.device.pin(host)?, flaw))
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
