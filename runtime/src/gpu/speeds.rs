//! How fast the tiers of this machine are, each alone.

use super::host_share::HostShare;
use super::load::{Layer, Model};
use super::plan::GpuPlan;
use super::predict::GpuSpeeds;
use crate::Result;
use crate::hardware::{kernel_speed, sketch_speed};
use crate::plan::Mode;
use thermocline_kernels::cuda::launch::{Bundles, Nonlinearity, SketchedRows, WorkList, ffn, ffn_blocks, host_item};
use thermocline_kernels::cuda::{Device, Queue, View};
use thermocline_kernels::{AlignedBuf, BundleLayout, Encoding, Pool};
use thermocline_split::{SketchForm, Split};

/// Cold neurons on which link and threads are measured.
const PROBE_NEURONS: usize = 4096;

/// Bytes of RAM on which threads are measured before a model is loaded, and neurons on whose sketches: more than a server's caches hold,
/// from which they read twice as fast.
const HOST_BYTES: usize = 512 << 20;
const PROBE_SKETCHES: usize = 48 << 10;

/// The same on the emulator, which is slow and whose speeds mean nothing.
const EMULATED_NEURONS: usize = 4;

/// Bytes of device memory that are copied within it.
const COPIED_BYTES: usize = 256 << 20;

/// The speeds of a machine before a model is loaded, for rows of this layout: of the link by the fused kernel, of `n_threads` threads
/// by their kernels; if sketches of the form `streamed` cross the link, also of copies, and of the threads on such sketches.
///
/// # Errors
/// If device or host have not the memory (0.4 and 0.6 GB), or the device fails.
pub fn measure_tiers(
    device: &Device,
    layout: BundleLayout,
    n_threads: usize,
    streamed: Option<SketchForm>,
) -> Result<GpuSpeeds> {
    let (n, bytes, host_bytes) = if device.is_emulated() {
        let bytes = EMULATED_NEURONS * layout.bundle_bytes();
        (EMULATED_NEURONS, bytes, bytes)
    } else {
        (PROBE_NEURONS, COPIED_BYTES, HOST_BYTES)
    };
    let (n_blocks, hidden) = (ffn_blocks(device), layout.hidden_size());
    let allocate = |bytes: usize| -> Result<View> { Ok(device.allocate(bytes)?.view()) };
    let host = kernel_speed(&mut Pool::new(n_threads)?, &AlignedBuf::zeroed(host_bytes)?[..host_bytes], &layout);
    let cold = device.pin(AlignedBuf::zeroed(n * layout.bundle_bytes())?)?;
    let work =
        WorkList { ids: allocate(4 * n)?, items: allocate(8 * n)?, counts: allocate(32)?, totals: allocate(64)? };
    let (none, x, partial) = (allocate(16)?, allocate(4 * hidden)?, allocate(4 * n_blocks * hidden)?);
    let probe =
        Probe { device, layout, activation: Nonlinearity::Silu, work: &work, x: &x, n_blocks, partial: &partial };
    let bundles = Bundles { hot: &none, cold: &cold.view(), cache: &none, fetched: None, ahead: None };
    let link = probe.link(bundles, n, n, None)?;
    let (to, from) = (allocate(bytes / 2)?, allocate(bytes / 2)?);
    let memory = copy_speed(device, &to, &from)?;
    let (mut copies, mut sketch) = (0.0, 0.0);
    if let Some(form) = streamed {
        let len = cold.len().min(to.len());
        let copy = || Ok(device.copy(Queue::Compute, &to.slice(0, len), &cold.slice(0, len))?);
        copies = best_of(device, len as f64, copy)?;
        sketch = sketches(device, n_threads, form, hidden)?;
    }
    Ok(GpuSpeeds { device: memory, link, copies, host, sketches: sketch })
}

/// The speeds of all tiers where a model is loaded, each alone; the device must be idle. `serial` as for [`HostShare::measure`].
pub(super) fn of_loaded(
    split: &Split,
    plan: &GpuPlan,
    device: &Device,
    model: &Model,
    host: Option<&HostShare>,
    serial: &mut u32,
) -> Result<GpuSpeeds> {
    let mut speeds = of_model(device, model)?;
    let Some(host) = host else { return Ok(speeds) };
    speeds.host = host.measure(PROBE_NEURONS, plan.request.base.mode != Mode::Exact, serial);
    if model.n_for_host() > 0 {
        let (n_threads, hidden) = (plan.request.base.n_threads, split.manifest().config.hidden_size);
        speeds.sketches = sketches(device, n_threads, split.sketch_form(), hidden)?;
    }
    Ok(speeds)
}

/// Bytes a second at which `n_threads` threads judge neurons by sketches of this form, of rows of so many columns, and add down rows of
/// them.
fn sketches(device: &Device, n_threads: usize, form: SketchForm, hidden: usize) -> Result<f64> {
    let n = if device.is_emulated() { EMULATED_NEURONS } else { PROBE_SKETCHES };
    sketch_speed(&mut Pool::new(n_threads)?, form, n, hidden)
}

/// The speeds of device memory and link where a model is loaded, in buffers that are free then; infinite over the link if
/// no neuron is cold.
/// The host's are left at 0.
fn of_model(device: &Device, model: &Model) -> Result<GpuSpeeds> {
    // Pieces of prompt batches.
    let [to, from] = &model.prefill.rows[0];
    let memory = copy_speed(device, to, from)?;
    let sections = model.layers.iter().flat_map(|l| l.sections.iter().map(move |section| (l, section)));
    let largest = sections.max_by_key(|(_, section)| section.cold.len());
    let Some((layer, section)) = largest.filter(|(_, section)| !section.cold.is_empty()) else {
        return Ok(GpuSpeeds { device: memory, link: f64::INFINITY, copies: 0.0, host: 0.0, sketches: 0.0 });
    };
    let (s, layout) = (&model.scratch, section.layout);
    let n_cold = section.cold.len() / layout.bundle_bytes();
    let (activation, n_blocks) = (model.activation, model.n_blocks);
    let probe = Probe { device, layout, activation, work: &s.work, x: &s.normed, n_blocks, partial: &s.partial };
    let bundles = Bundles { hot: &section.hot, cold: &section.cold, cache: &layer.slots, fetched: None, ahead: None };
    // Residuals are read with what a sketch has of the neurons.
    let rows = (layout.encoding() == Encoding::R4).then(|| layer.sketched_rows(section, s));
    let link = probe.link(bundles, n_cold, PROBE_NEURONS.min(n_cold), rows)?;
    let mut copies = 0.0;
    if let Some(sketch) = model.layers.iter().find_map(Layer::pinned_sketch) {
        copies = best_of(device, sketch.bytes() as f64, || Ok(sketch.copy(device, Queue::Compute, 0)?))?;
    }
    Ok(GpuSpeeds { device: memory, link, copies, host: 0.0, sketches: 0.0 })
}

/// What the fused kernel needs besides bundles.
struct Probe<'a> {
    device: &'a Device,
    layout: BundleLayout,
    activation: Nonlinearity,
    work: &'a WorkList,
    x: &'a View,
    n_blocks: usize,
    partial: &'a View,
}

impl Probe<'_> {
    /// Bytes a second of `n` of the `n_cold` cold neurons, read in place.
    fn link(&self, bundles: Bundles<'_>, n_cold: usize, n: usize, rows: Option<SketchedRows<'_>>) -> Result<f64> {
        let items: Vec<[u32; 2]> = (0..n).map(|i| host_item(i * n_cold / n)).collect();
        let counts = [n as u32, n as u32, 0, 0, 0, n as u32, 0, 0];
        self.device.write(&self.work.items, bytemuck::cast_slice(&items))?;
        self.device.write(&self.work.counts, bytemuck::cast_slice(&counts))?;
        self.device.fill(self.x, 0)?;
        best_of(self.device, (n * self.layout.bundle_bytes()) as f64, || {
            let (layout, activation, n_blocks) = (self.layout, self.activation, self.n_blocks);
            Ok(ffn(self.device, layout, activation, self.work, bundles, self.x, n_blocks, self.partial, rows)?)
        })
    }
}

/// Bytes a second, read and written, of copies within device memory.
fn copy_speed(device: &Device, to: &View, from: &View) -> Result<f64> {
    const COPIES: usize = 8;
    best_of(device, 2.0 * (to.len() * COPIES) as f64, || {
        (0..COPIES).try_for_each(|_| Ok(device.copy(Queue::Compute, to, from)?))
    })
}

/// The best of a few, which all have ended when this returns.
fn best_of(device: &Device, bytes: f64, work: impl Fn() -> Result<()>) -> Result<f64> {
    let mut best = 0.0f64;
    for _ in 0..4 {
        let begin = device.record()?;
        work()?;
        best = best.max(bytes / (device.record()?.since(&begin)? * 1e-3));
    }
    device.synchronize()?;
    Ok(best)
}
