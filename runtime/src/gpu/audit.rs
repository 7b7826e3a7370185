//! Audits of a GPU's tokens ([`crate::audit`]): the device leaves what each layer made of its input in pinned memory, and the
//! CPU computes all neurons of every layer, the hot ones copied back for it. An audited token is no graph: kernels and copies
//! are given to the device one by one.

use super::host_share::HostShare;
use super::load::Model;
use super::plan::GpuPlan;
use super::sections::COUNTS_BYTES;
use crate::Result;
use crate::audit::{AllNeurons, Audit};
use crate::chooser::{SketchedLayer, is_sketched};
use crate::ffn::FfnSums;
use crate::matrix::Compute;
use std::borrow::Cow;
use std::sync::atomic::Ordering;
use thermocline_datasets::ModelConfig;
use thermocline_kernels::cuda::{CudaError, Device, Memory, Queue, View};
use thermocline_kernels::{AlignedBuf, Kernels, LayerLayout, Pool};
use thermocline_split::Split;

/// What is kept of an audited token, layer by layer.
#[derive(Debug)]
pub(super) struct Kept {
    /// The residual stream before the neurons, `[n_layers, hidden]`.
    before: Memory,
    /// And behind them.
    after: Memory,
    /// The neurons' input, `[n_layers, hidden]`.
    normed: Memory,
    /// u32 `[n_layers, ffn]`: those that were computed, ascending.
    ids: Memory,
    /// u32 `[n_layers, 8]`, as [`thermocline_kernels::cuda::launch::WorkList::counts`].
    counts: Memory,
    hidden: usize,
    ffn: usize,
}

impl Kept {
    fn new(device: &Device, config: &ModelConfig) -> Result<Self> {
        let (n, hidden, ffn) = (config.n_layers, config.hidden_size, config.intermediate_size);
        let pin = |bytes: usize| -> Result<Memory> { Ok(device.pin(AlignedBuf::zeroed(bytes)?)?) };
        let [before, after, normed] = [pin(4 * n * hidden)?, pin(4 * n * hidden)?, pin(4 * n * hidden)?];
        let (ids, counts) = (pin(4 * n * ffn)?, pin(COUNTS_BYTES * n)?);
        Ok(Self { before, after, normed, ids, counts, hidden, ffn })
    }

    /// Pinned memory that this takes.
    fn bytes(config: &ModelConfig) -> u64 {
        let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
        (config.n_layers * (4 * (3 * hidden + ffn) + COUNTS_BYTES)) as u64
    }

    /// Copies layer `l`'s residual stream, before its neurons.
    pub(super) fn before(&self, device: &Device, model: &Model, l: usize) -> Result<(), CudaError> {
        self.copy(device, &self.before, l, 4 * self.hidden, &model.scratch.x)
    }

    /// Copies what its neurons made of it.
    pub(super) fn after(&self, device: &Device, model: &Model, l: usize) -> Result<(), CudaError> {
        let s = &model.scratch;
        self.copy(device, &self.after, l, 4 * self.hidden, &s.x)?;
        self.copy(device, &self.normed, l, 4 * self.hidden, &s.normed)?;
        self.copy(device, &self.ids, l, 4 * self.ffn, &s.work.ids)?;
        self.copy(device, &self.counts, l, COUNTS_BYTES, &s.work.counts)
    }

    fn copy(&self, device: &Device, to: &Memory, l: usize, bytes: usize, from: &View) -> Result<(), CudaError> {
        device.copy(Queue::Compute, &to.slice(l * bytes, bytes), &from.slice(0, bytes))
    }

    /// Input, residual stream before and behind, and the computed neurons of layer `l`.
    fn layer(&self, l: usize) -> ([Vec<f32>; 3], Vec<u32>) {
        let floats = |memory: &Memory| -> Vec<f32> {
            let words = &memory.words()[l * self.hidden..][..self.hidden];
            words.iter().map(|word| f32::from_bits(word.load(Ordering::Relaxed))).collect()
        };
        let n_active = self.counts.words()[l * COUNTS_BYTES / 4 + 5].load(Ordering::Relaxed) as usize;
        let ids = &self.ids.words()[l * self.ffn..][..n_active.min(self.ffn)];
        let active = ids.iter().map(|id| id.load(Ordering::Relaxed)).collect();
        ([&self.normed, &self.before, &self.after].map(floats), active)
    }
}

/// A GPU engine's audits.
pub(super) struct GpuAudit {
    pub audit: Audit,
    pub kept: Kept,
    compute: Compute,
    sums: FfnSums,
}

impl std::fmt::Debug for GpuAudit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GpuAudit").field("audit", &self.audit).finish_non_exhaustive()
    }
}

impl GpuAudit {
    pub(super) fn new(device: &Device, config: &ModelConfig, every: usize, n_threads: usize) -> Result<Self> {
        let sums = FfnSums::new(config.hidden_size, config.activation, config.intermediate_size);
        let compute = Compute { kernels: Kernels::detect(), pool: Pool::new(n_threads)? };
        Ok(Self { audit: Audit::new(config, every), kept: Kept::new(device, config)?, compute, sums })
    }

    /// RAM that audits take while they work, if `plan` is what they audit: what is kept, what they compute with, and one layer's hot
    /// neurons and sketch.
    pub(super) fn bytes(split: &Split, plan: &GpuPlan) -> u64 {
        let config = &split.manifest().config;
        let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
        let layers = split.layers().iter().zip(&plan.hot_neurons);
        let hot = layers.map(|(file, &hot)| plan.layout(file).bytes(0..hot)).max().unwrap_or(0);
        let is_sketched = is_sketched(split, plan.request.base.mode) && plan.always_neurons < ffn;
        let sketch = if is_sketched { split.sketch_form().bytes(ffn, hidden) } else { 0 };
        let sums = FfnSums::new(hidden, config.activation, ffn).bytes();
        Kept::bytes(config) + Audit::bytes(config, plan.request.base.n_threads) + sums + (hot + sketch) as u64
    }

    /// Audits the token that was kept, when the device is done with it.
    pub(super) fn run(
        &mut self,
        split: &Split,
        device: &Device,
        model: &Model,
        host: Option<&HostShare>,
    ) -> Result<()> {
        for l in 0..model.layers.len() {
            let ([x, before, after], listed) = self.kept.layer(l);
            let by_host = host.filter(|_| model.layers[l].is_hosts);
            let listed = by_host.map_or(listed, |host| host.last_chosen(l));
            let active = model.layers[l].all_neurons().map_or(listed, Iterator::collect);
            self.audit.keep(l, &x, &active, |output| {
                let added = after.iter().zip(&before).map(|(after, before)| after - before);
                output.iter_mut().zip(added).for_each(|(output, added)| *output = added);
            });
        }
        self.audit.run(&OnDevice { split, device, model }, &mut self.compute, &mut self.sums)
    }
}

/// Hot neurons in device memory, the others pinned.
struct OnDevice<'a> {
    split: &'a Split,
    device: &'a Device,
    model: &'a Model,
}

impl AllNeurons for OnDevice<'_> {
    fn layout(&self, l: usize) -> &LayerLayout {
        &self.model.layers[l].layout
    }

    fn for_all(&self, l: usize, see: &mut dyn FnMut(&LayerLayout, usize, &[u8])) -> Result<()> {
        let layer = &self.model.layers[l];
        for section in layer.sections.iter().filter(|section| !section.hot.is_empty()) {
            let bytes: Vec<u8> = self.device.read_all(&section.hot)?;
            see(&layer.layout, section.neurons.start, &bytes);
        }
        if layer.n_hot < layer.layout.n_neurons() {
            see(&layer.layout, layer.n_hot, &layer.cold.host_bytes()[..layer.cold_bytes() as usize]);
        }
        Ok(())
    }

    /// The device's copy is taken apart into planes: it is read again.
    fn sketch(&self, l: usize) -> Result<Option<Cow<'_, SketchedLayer>>> {
        let sketched = SketchedLayer::behind(self.split, l, self.model.layers[l].n_always, None)?;
        Ok(sketched.map(Cow::Owned))
    }
}
