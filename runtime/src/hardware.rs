//! What this machine can do, measured.

use crate::Result;
use crate::fetch::{DirectFile, Fetcher, Run, RunContent, RunPart};
use crate::ffn::{FfnSums, Span};
use crate::plan::largest_chunk_bytes;
use serde::Serialize;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use thermocline_datasets::{Activation, Random};
use thermocline_kernels::{AlignedBuf, BundleLayout, Kernels, LayerLayout, Pool, ops};
#[cfg(feature = "cuda")]
use {thermocline_kernels::SketchMatrix, thermocline_split::SketchForm};

/// Bytes of a memory measurement: several times any desktop's last-level cache.
const MEMORY_PROBE_BYTES: usize = 256 << 20;
/// Bytes of a disk measurement, at most.
const DISK_PROBE_BYTES: u64 = 256 << 20;

/// Scattered reads of a disk measurement, at most.
const READS_PROBED: usize = 4096;

/// Speeds that bound a token's time.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Hardware {
    /// Threads that compute.
    pub n_threads: usize,
    /// Reading RAM with all of them.
    pub ram_bytes_per_second: f64,
    /// The same while decoding bundles of the split's encoding and multiplying.
    pub kernel_bytes_per_second: f64,
    /// Reading the split's own files past the page cache, with the runtime's readers.
    pub disk_bytes_per_second: f64,
    /// The same readers, asked for single chunks that lie apart: what sparse mode does.
    pub disk_reads_per_second: f64,
}

impl Hardware {
    /// Measures everything for one split: RAM and kernel for about a quarter second each, then the disk.
    ///
    /// # Errors
    /// If a layer file cannot be read, or the system refuses threads or memory.
    pub fn measure(split: &thermocline_split::Split, n_threads: usize) -> Result<Self> {
        let mut pool = Pool::new(n_threads)?;
        let memory = probe_memory(&probe_bundles(split)?, MEMORY_PROBE_BYTES)?;
        let layout = *split.layers()[0].bundles().largest().bundles();
        let files = split.layers().iter().flat_map(thermocline_split::LayerFile::paths);
        let (shape, largest) = (StagingShape::default(), largest_chunk_bytes(split));
        let fetcher = Fetcher::new(shape.n_readers, shape.n_buffers, shape.run_bytes.max(largest), 1, 0)?;
        Ok(Self {
            n_threads,
            ram_bytes_per_second: ram_speed(&mut pool, &memory),
            kernel_bytes_per_second: kernel_speed(&mut pool, &memory, &layout),
            disk_bytes_per_second: read_speed(files, &shape, &fetcher)?,
            disk_reads_per_second: read_rate(split, &fetcher)?,
        })
    }
}

/// Size and number of the buffers between disk and computation, and who fills them.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct StagingShape {
    /// Bytes on disk of one run of chunks, at most.
    pub run_bytes: usize,
    /// Runs that can be on their way at once.
    pub n_buffers: usize,
    /// Threads that read.
    pub n_readers: usize,
}

impl Default for StagingShape {
    fn default() -> Self {
        Self { run_bytes: 512 << 10, n_buffers: 8, n_readers: 4 }
    }
}

/// Bundles to measure [`kernel_speed`] on where zeros would not do, because they have no codes of variable length to decode:
/// a chunk of the first layer's largest section; none where any bytes take as long.
///
/// # Errors
/// If they cannot be read.
pub fn probe_bundles(split: &thermocline_split::Split) -> Result<Vec<u8>> {
    let file = &split.layers()[0];
    let largest = file.bundles().largest();
    if !largest.bundles().encoding().has_stream() {
        return Ok(Vec::new());
    }
    let chunk = largest.neurons().start / file.chunk_neurons();
    let mut bundles = vec![0; file.bundles().bytes(file.neurons(chunk..chunk + 1))];
    file.read_chunks(chunk..chunk + 1, &mut bundles)?;
    Ok(bundles)
}

/// `n_bytes` of [`probe_bundles`], again and again, or of zeros.
///
/// # Errors
/// If the system refuses the memory.
pub fn probe_memory(bundles: &[u8], n_bytes: usize) -> Result<AlignedBuf> {
    let mut memory = AlignedBuf::zeroed(n_bytes)?;
    if !bundles.is_empty() {
        memory.chunks_mut(bundles.len()).for_each(|part| part.copy_from_slice(&bundles[..part.len()]));
    }
    Ok(memory)
}

/// The best of several passes over `memory`.
fn best_pass(memory: &[u8], mut pass: impl FnMut()) -> f64 {
    let (mut best, begin) = (f64::INFINITY, Instant::now());
    let mut passes = 0;
    while passes < 3 || begin.elapsed() < Duration::from_millis(200) {
        let start = Instant::now();
        pass();
        best = best.min(start.elapsed().as_secs_f64());
        passes += 1;
    }
    memory.len() as f64 / best
}

/// Bytes a second of a plain read by all threads.
pub fn ram_speed(pool: &mut Pool, memory: &[u8]) -> f64 {
    let piece = 1 << 18;
    let mut sums = vec![0.0f32; memory.len().div_ceil(piece)];
    best_pass(memory, || {
        pool.for_each_chunk(&mut sums, 1, |i, sum| {
            let bytes = &memory[i * piece..((i + 1) * piece).min(memory.len())];
            sum[0] = ops::sum_bytes(bytes);
        })
    })
}

/// Bytes a second of the feed-forward kernel on bundles that lie in RAM.
pub fn kernel_speed(pool: &mut Pool, memory: &[u8], layout: &BundleLayout) -> f64 {
    let kernels = Kernels::detect();
    let n = memory.len() / layout.bundle_bytes();
    let used = &memory[..n * layout.bundle_bytes()];
    let Some(all) = LayerLayout::new([(n, *layout)]) else { return 0.0 };
    let mut sums = FfnSums::new(layout.hidden_size(), Activation::Relu, n);
    sums.skip_zeros = false;
    sums.start(&kernels, &all, &vec![0.5f32; layout.hidden_size()]);
    best_pass(used, || {
        sums.add(&kernels, pool, &all, Span::Contiguous { first: 0, bytes: used });
    })
}

/// Bytes a second at which sketches of this form, of `n` neurons of so many columns, are read from RAM and computed with: gate and up
/// rows multiplied, down rows added. Columns are whole units ([`thermocline_kernels::SKETCH_UNIT`]).
///
/// # Errors
/// If the system has not the memory.
#[cfg(feature = "cuda")]
pub fn sketch_speed(pool: &mut Pool, form: SketchForm, n: usize, columns: usize) -> Result<f64> {
    const TASK: usize = crate::chooser::TASK_NEURONS;
    let kernels = Kernels::detect();
    let (bits, row_bytes) = (form.bits(), form.row_bytes(columns));
    let n_bytes = n * row_bytes.iter().sum::<usize>();
    let memory = AlignedBuf::zeroed(n_bytes)?;
    let (gate, rest) = memory[..n_bytes].split_at(n * row_bytes[0]);
    let (up, down) = rest.split_at(n * row_bytes[1]);
    let parts = [gate, up, down];
    let [gate, up, down] = std::array::from_fn(|i| SketchMatrix::new(bits[i], columns, parts[i]));
    let x = kernels.sketch_input(&vec![0.5f32; columns]);
    let mut sums = vec![0.0f32; n.div_ceil(TASK) * columns];
    Ok(best_pass(&memory[..n_bytes], || {
        pool.for_each_chunk(&mut sums, columns, |task, sums| {
            let neurons = task * TASK..n.min((task + 1) * TASK);
            let mut products = vec![0.0; neurons.len()];
            kernels.sketch_dots(gate, neurons.start, &x, &mut products);
            kernels.sketch_dots(up, neurons.start, &x, &mut products);
            let rows: Vec<u32> = neurons.map(|n| n as u32).collect();
            kernels.sketch_axpys(down, &rows, &vec![0.5; rows.len()], sums);
        });
    }))
}

/// Bytes a second of reading files in runs, with readers and buffers of their own. The best of three.
///
/// # Errors
/// If a file cannot be read, or the system refuses threads or memory.
pub fn disk_speed<'a>(files: impl Iterator<Item = &'a Path>, shape: &StagingShape) -> Result<f64> {
    read_speed(files, shape, &Fetcher::new(shape.n_readers, shape.n_buffers, shape.run_bytes, 1, 0)?)
}

/// The same with the readers and buffers of a loaded model, all of which must be free.
pub(crate) fn read_speed<'a>(
    files: impl Iterator<Item = &'a Path>,
    shape: &StagingShape,
    fetcher: &Fetcher,
) -> Result<f64> {
    let mut runs = Vec::new();
    let mut total = 0u64;
    for path in files {
        let file = Arc::new(DirectFile::open(path)?);
        let mut offset = 0;
        while offset < file.bytes() && total < DISK_PROBE_BYTES {
            let len = shape.run_bytes.min((file.bytes() - offset) as usize);
            let part = RunPart { file: Arc::clone(&file), offset, len };
            runs.push(Run { parts: vec![part], content: RunContent::Plain });
            offset += len as u64;
            total += len as u64;
        }
    }
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let start = Instant::now();
        let mut stream = crate::stream::Stream::new(runs.clone(), 0);
        for _ in 0..runs.len() {
            let staged = stream.take(fetcher)?;
            fetcher.release(staged);
        }
        best = best.min(start.elapsed().as_secs_f64());
        stream.rewind(fetcher);
    }
    Ok(total as f64 / best)
}

/// Reads a second of single chunks of `split` in scattered order (of chunks in several files the first part). The readers
/// and buffers of `fetcher` must be free, and hold a chunk.
///
/// # Errors
/// If a file cannot be read.
pub(crate) fn read_rate(split: &thermocline_split::Split, fetcher: &Fetcher) -> Result<f64> {
    let open = |path: &Path| Ok(Arc::new(DirectFile::open(path)?));
    let of_layer = |f: &thermocline_split::LayerFile| f.paths().map(open).collect::<Result<Vec<_>>>();
    let files: Vec<Vec<Arc<DirectFile>>> = split.layers().iter().map(of_layer).collect::<Result<_>>()?;
    let mut random = Random::new(1);
    let mut runs = Vec::with_capacity(READS_PROBED);
    for _ in 0..READS_PROBED {
        let layer = random.below(files.len());
        let chunk = random.below(split.layers()[layer].n_chunks());
        let ranges = split.layers()[layer].stored_ranges(chunk..chunk + 1);
        if let Some(range) = ranges.first() {
            let part = RunPart { file: Arc::clone(&files[layer][range.file]), offset: range.offset, len: range.bytes };
            runs.push(Run { parts: vec![part], content: RunContent::Plain });
        }
    }
    let start = Instant::now();
    let (n_runs, mut stream) = (runs.len(), crate::stream::Stream::once(runs));
    let mut reads = 0;
    // A disk with a head takes a second for a hundred of them.
    while reads < n_runs && start.elapsed() < Duration::from_secs(1) {
        let staged = stream.take(fetcher)?;
        fetcher.release(staged);
        reads += 1;
    }
    let seconds = start.elapsed().as_secs_f64();
    stream.rewind(fetcher);
    Ok(reads as f64 / seconds)
}

/// The largest resident set that this process ever had, in bytes.
pub fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
}
