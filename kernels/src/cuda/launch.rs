//! Every kernel, with its shapes: what it reads and writes is checked here before it is launched.
//!
//! The sources in `kernels/cuda/` say how each works. All numbers are f32 unless said otherwise; every function gives
//! the compute queue one kernel and does not wait.
//!
//! # Errors
//! Each function fails if the driver does.
//!
//! # Panics
//! Each function panics if a view is smaller than the shapes say: a mistake of the caller, never of the input.

use super::backend::{Arg, Launch};
use super::device::Device;
use super::error::Result;
use super::memory::View;
use crate::{BundleLayout, Encoding, GROUP};

/// Threads of most kernels' blocks.
const THREADS: u32 = 256;

/// Ranges that [`attend`] can divide the positions into.
pub const MAX_SPLITS: usize = 128;

/// Columns of a slice of [`predict_inner`].
const INNER_SLICE: usize = 1024;

/// What the token in progress is: `[token, position, serial]`, three u32, and the host's share of the misses, an f32.
#[derive(Debug, Clone, Copy)]
pub struct Step;

impl Step {
    /// Its size.
    pub const BYTES: usize = 16;
}

/// An encoded matrix on the device, rows at [`Encoding::row_stride`].
#[derive(Debug, Clone)]
pub struct DeviceMatrix {
    /// How rows are stored.
    pub encoding: Encoding,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub columns: usize,
    /// The rows.
    pub data: View,
}

impl DeviceMatrix {
    fn check(&self) {
        assert!(self.data.len() >= self.rows * self.encoding.row_stride(self.columns), "matrix data");
    }
}

/// Numbers by which the kernels know activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Nonlinearity {
    /// `silu(g) u`.
    Silu = 0,
    /// `relu(g) u`.
    Relu = 1,
    /// `relu(g) relu(u)`.
    Drelu = 2,
}

fn floats(view: &View, n: usize) {
    assert!(view.len() >= 4 * n, "{} bytes for {n} numbers", view.len());
}

fn address(view: &View) -> Arg {
    Arg::Address(view.address())
}

fn optional(view: Option<&View>) -> Arg {
    Arg::Address(view.map_or(0, View::address))
}

fn u32_of(n: usize) -> Arg {
    Arg::U32(u32::try_from(n).expect("a size below 2^32"))
}

/// `x[c] = table[token, c]`; copies the step that the host wrote into mapped memory to the device.
///
/// # Errors
/// See the module.
pub fn embed(device: &Device, table: &DeviceMatrix, host_step: &View, step: &View, x: &View) -> Result<()> {
    table.check();
    floats(x, table.columns);
    assert!(host_step.len() >= Step::BYTES && step.len() >= Step::BYTES, "step");
    let launch = Launch {
        kernel: format!("embed_{}", table.encoding),
        grid: [table.columns.div_ceil(THREADS as usize) as u32, 1],
        block: THREADS,
        shared_bytes: 0,
        args: vec![address(host_step), address(step), address(&table.data), u32_of(table.columns), address(x)],
    };
    device.launch(launch, &[host_step, step, &table.data, x])
}

/// The RMSNorm before a matrix product.
#[derive(Debug, Clone, Copy)]
pub struct Norm<'a> {
    /// `[columns]`.
    pub weight: &'a View,
    /// Added to the mean of squares.
    pub eps: f32,
    /// Where the normalised input goes too, `[columns]`.
    pub out: Option<&'a View>,
}

/// What is added to a matrix product.
#[derive(Debug, Clone, Copy, Default)]
pub struct Added<'a> {
    /// `[rows]`.
    pub bias: Option<&'a View>,
    /// `[rows]`; may be the output itself.
    pub residual: Option<&'a View>,
}

/// `out[r] = w[r, :] norm(x) + bias[r] + residual[r]`.
///
/// # Errors
/// See the module.
pub fn gemv(
    device: &Device,
    w: &DeviceMatrix,
    x: &View,
    norm: Option<Norm<'_>>,
    added: Added<'_>,
    out: &View,
) -> Result<()> {
    w.check();
    floats(x, w.columns);
    floats(out, w.rows);
    for view in [added.bias, added.residual].into_iter().flatten() {
        floats(view, w.rows);
    }
    let (weight, normed) = (norm.map(|n| n.weight), norm.and_then(|n| n.out));
    for view in [weight, normed].into_iter().flatten() {
        floats(view, w.columns);
    }
    let shape = GemvShape::new(device, w);
    let launch = Launch {
        kernel: format!("gemv_{}", w.encoding),
        grid: [shape.blocks, 1],
        block: shape.threads,
        shared_bytes: shape.shared_bytes,
        args: vec![
            address(&w.data),
            u32_of(w.rows),
            u32_of(w.columns),
            address(x),
            optional(weight),
            Arg::F32(norm.map_or(0.0, |n| n.eps)),
            optional(normed),
            optional(added.bias),
            optional(added.residual),
            address(out),
        ],
    };
    let mut uses = vec![&w.data, x, out];
    uses.extend([weight, normed, added.bias, added.residual].into_iter().flatten());
    device.launch(launch, &uses)
}

/// How a product is launched: as many blocks as run at once, because each begins with the whole input; fewer if there is
/// not a step for each warp.
struct GemvShape {
    blocks: u32,
    threads: u32,
    shared_bytes: u32,
}

impl GemvShape {
    fn new(device: &Device, w: &DeviceMatrix) -> Self {
        let step_columns = match w.encoding {
            Encoding::Bf16 => {
                let (units, warps) = (w.rows.div_ceil(4), (THREADS / 32) as usize);
                let steps = units * w.columns.div_ceil(32 * chunk_columns(w.encoding));
                let blocks = steps.div_ceil(warps).min(units).min(2 * device.n_multiprocessors()).max(1) as u32;
                return Self { blocks, threads: THREADS, shared_bytes: input_shared_bytes(w.encoding, w.columns) };
            }
            Encoding::Q8 => 64,
            Encoding::Q4 => 128,
        };
        let (units, steps_of_row) = (w.rows.div_ceil(16), w.columns.div_ceil(step_columns));
        let digits = (steps_of_row * step_columns / GROUP * 164).next_multiple_of(16);
        let shared_bytes = |warps: usize| digits + 6144 * warps;
        let warps = if shared_bytes(16) <= device.shared_bytes() { 16 } else { 8 };
        let blocks = (units * steps_of_row).div_ceil(warps).min(units).min(device.n_multiprocessors()).max(1);
        Self { blocks: blocks as u32, threads: 32 * warps as u32, shared_bytes: shared_bytes(warps) as u32 }
    }
}

/// A vector in shared memory, as `kernels/cuda/input.cuh` lays it out: 16 more bytes for each 16 bytes of codes.
fn input_shared_bytes(encoding: Encoding, columns: usize) -> u32 {
    let chunk = chunk_columns(encoding);
    (columns.next_multiple_of(GROUP) / chunk * (4 * chunk + 16)) as u32
}

/// Columns whose codes are 16 bytes.
fn chunk_columns(encoding: Encoding) -> usize {
    match encoding {
        Encoding::Bf16 => 8,
        Encoding::Q8 => 16,
        Encoding::Q4 => 32,
    }
}

/// The shape of attention.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Positions that the cache holds.
    pub capacity: usize,
}

impl Heads {
    fn qkv(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    /// Values of the keys, or the values, of one layer.
    pub fn cache_values(&self) -> usize {
        self.n_kv_heads * self.capacity * self.head_dim
    }

    /// Numbers of the partial results over `n_splits` ranges of positions.
    pub fn partial_values(&self, n_splits: usize) -> usize {
        self.n_heads * n_splits * (self.head_dim + 2)
    }

    /// Heads that a block of [`attend`] takes at a time, and the `head_dim` that its kernel is made for.
    fn attend_shape(&self) -> (usize, usize) {
        let made_for = self.head_dim.next_power_of_two().clamp(64, 256);
        let (least, most) = match self.head_dim {
            64 | 128 => (1, 16),
            256 => (1, 8),
            _ => (4, 8),
        };
        ((self.n_heads / self.n_kv_heads).next_power_of_two().clamp(least, most), made_for)
    }

    /// Counters of [`attend`]: one for each group of heads, or for each part of it that a block takes at a time.
    pub fn counters(&self) -> usize {
        self.n_kv_heads * (self.n_heads / self.n_kv_heads).div_ceil(self.attend_shape().0)
    }

    fn check(&self, qkv: &View, n: usize, keys: &View, values: &View) {
        floats(qkv, n * self.qkv());
        assert!(keys.len() >= 2 * self.cache_values() && values.len() >= 2 * self.cache_values(), "key/value cache");
    }
}

/// Cosines and sines `[capacity, head_dim / 2]`.
#[derive(Debug, Clone, Copy)]
pub struct RopeTables<'a> {
    /// Cosines.
    pub cos: &'a View,
    /// Sines.
    pub sin: &'a View,
}

/// Attention of the step's token over the cache, to which its key and value are appended (f16
/// `[n_kv_heads, capacity, head_dim]` each). `qkv` is `[q | k | v]`; `out` is `[n_heads, head_dim]`; `partial` holds
/// [`Heads::partial_values`]; `arrived`, u32 [`Heads::counters`], is zero before and after.
///
/// # Errors
/// See the module.
#[allow(clippy::too_many_arguments)]
pub fn attend(
    device: &Device,
    heads: Heads,
    n_splits: usize,
    qkv: &View,
    step: &View,
    [keys, values]: [&View; 2],
    rope: RopeTables<'_>,
    [partial, arrived]: [&View; 2],
    out: &View,
) -> Result<()> {
    heads.check(qkv, 1, keys, values);
    floats(arrived, heads.counters());
    floats(partial, heads.partial_values(n_splits));
    floats(out, heads.n_heads * heads.head_dim);
    floats(rope.cos, heads.capacity * heads.head_dim / 2);
    floats(rope.sin, heads.capacity * heads.head_dim / 2);
    assert!((1..=MAX_SPLITS).contains(&n_splits), "splits");
    let (at_once, made_for) = heads.attend_shape();
    assert!(heads.head_dim <= made_for && heads.head_dim.is_multiple_of(2), "head_dim");
    let less = if heads.head_dim < made_for { "_less" } else { "" };
    let launch = Launch {
        kernel: format!("attend_{at_once}x{made_for}{less}"),
        grid: [heads.counters() as u32, n_splits as u32],
        block: THREADS,
        shared_bytes: 0,
        args: vec![
            address(qkv),
            address(step),
            address(keys),
            address(values),
            address(rope.cos),
            address(rope.sin),
            u32_of(heads.n_heads),
            u32_of(heads.n_kv_heads),
            u32_of(heads.head_dim),
            u32_of(heads.capacity),
            address(partial),
            address(arrived),
            address(out),
        ],
    };
    device.launch(launch, &[qkv, step, keys, values, rope.cos, rope.sin, partial, arrived, out])
}

/// Numbers between [`predict_inner`] and [`predict_scores`]: for each slice of the columns, its shares of z and of the
/// sum of squares.
pub fn inner_values(hidden: usize, rank: usize) -> usize {
    hidden.div_ceil(INNER_SLICE) * (rank + THREADS as usize / 32)
}

/// The first half of a low-rank predictor: shares of `input norm(x)`, for [`predict_scores`]. `inner` holds
/// [`inner_values`].
///
/// # Errors
/// See the module.
pub fn predict_inner(device: &Device, input: &DeviceMatrix, x: &View, norm_weight: &View, inner: &View) -> Result<()> {
    let (rank, hidden) = (input.rows, input.columns);
    input.check();
    floats(x, hidden);
    floats(norm_weight, hidden);
    floats(inner, inner_values(hidden, rank));
    let launch = Launch {
        kernel: format!("predict_inner_{}", input.encoding),
        grid: [hidden.div_ceil(INNER_SLICE) as u32, rank.div_ceil(THREADS as usize / 32) as u32],
        block: THREADS,
        shared_bytes: input_shared_bytes(input.encoding, INNER_SLICE),
        args: vec![
            address(&input.data),
            u32_of(rank),
            u32_of(hidden),
            address(x),
            address(norm_weight),
            address(inner),
        ],
    };
    device.launch(launch, &[&input.data, x, norm_weight, inner])
}

/// The layer's input as [`predict_scores`] takes it and gives it away, `[hidden]` each.
#[derive(Debug, Clone, Copy)]
pub struct LayerInput<'a> {
    /// Numbers of the input.
    pub hidden: usize,
    /// Before its norm.
    pub x: &'a View,
    /// The norm's weight.
    pub norm_weight: &'a View,
    /// Added to the mean of squares.
    pub eps: f32,
    /// What [`predict_inner`] has left.
    pub inner: &'a View,
    /// Gets the normalised input.
    pub normed: &'a View,
    /// Where the host reads it, if it may get a part of the layer ([`HostWork`]).
    pub host_x: Option<&'a View>,
}

/// Scores of all neurons: `factors` are rows `[2 * ffn, rank]`, `neurons` is `[3, ffn]` (FORMAT.md).
///
/// # Errors
/// See the module.
pub fn predict_scores(
    device: &Device,
    factors: &DeviceMatrix,
    from: LayerInput<'_>,
    neurons: &View,
    activation: Nonlinearity,
    scores: &View,
) -> Result<()> {
    factors.check();
    let (ffn, rank) = (factors.rows / 2, factors.columns);
    assert!(rank.is_multiple_of(GROUP), "the rank is a multiple of {GROUP}");
    floats(neurons, 3 * ffn);
    floats(scores, ffn);
    for view in [from.x, from.norm_weight, from.normed].into_iter().chain(from.host_x) {
        floats(view, from.hidden);
    }
    floats(from.inner, inner_values(from.hidden, rank));
    // A lane for each chunk of a row, up to a warp; each such team takes two neurons.
    let lanes = rank.div_ceil(chunk_columns(factors.encoding)).next_power_of_two().min(32);
    let neurons_of_block = 2 * THREADS as usize / lanes;
    // The fields of `struct LayerInput` in kernels/cuda/predict.cu.
    let words = vec![
        from.x.address(),
        from.norm_weight.address(),
        u64::from(from.eps.to_bits()) | (from.hidden as u64) << 32,
        from.inner.address(),
        from.normed.address(),
        from.host_x.map_or(0, View::address),
    ];
    let launch = Launch {
        kernel: format!("predict_scores_{}", factors.encoding),
        grid: [ffn.div_ceil(neurons_of_block).min(8 * device.n_multiprocessors()) as u32, 1],
        block: THREADS,
        shared_bytes: input_shared_bytes(factors.encoding, rank),
        args: vec![
            address(&factors.data),
            u32_of(rank),
            Arg::Struct(words),
            address(neurons),
            u32_of(ffn),
            Arg::U32(activation as u32),
            address(scores),
        ],
    };
    let mut uses = vec![&factors.data, neurons, scores, from.x, from.norm_weight, from.inner, from.normed];
    uses.extend(from.host_x);
    device.launch(launch, &uses)
}

/// Which neurons a token computes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Selection {
    /// All.
    Every,
    /// The so many of highest score.
    Top(usize),
    /// Those whose score is above this.
    Above(f32),
}

/// The cache of one layer: a cold neuron (number: its place minus the hot ones) may be in a slot of set `number % sets`.
#[derive(Debug, Clone)]
pub struct CacheTables {
    /// Sets; 0 if there is no cache.
    pub n_sets: usize,
    /// Slots of a set.
    pub n_ways: usize,
    /// u32 `[n_cold]`: slot, or all ones.
    pub slot_of: View,
    /// u32 `[n_sets * n_ways]`: cold number, or all ones.
    pub owner: View,
    /// `[n_cold]`: recency and frequency in one number, see `kernels/cuda/choose.cu`.
    pub key: View,
    /// u32 `[n_sets * n_ways]`: serial of the last token that used the slot.
    pub used: View,
    /// Octaves that a key falls behind per token: large is least-recently-used, small is least-frequently-used.
    pub lambda: f32,
}

/// Where the host reads which neurons it is to compute: mapped memory. [`predict_scores`] gives it the input.
#[derive(Debug, Clone)]
pub struct HostWork {
    /// u32 `[ffn]`: cold numbers.
    pub list: View,
    /// u32: length of the list.
    pub count: View,
    /// u32: the layer's number, raised last ([`flag_value`]); at [`INPUT_FLAG`] the same, raised as soon as x is there.
    pub flag: View,
}

/// Words from [`HostWork::flag`] to the one for the input: another line of the cache.
pub const INPUT_FLAG: usize = 32;

/// The value that the flags of layer `layer` reach in the token of that serial number.
pub fn flag_value(serial: u32, layer: usize, n_layers: usize) -> u32 {
    serial.wrapping_mul(n_layers as u32).wrapping_add(layer as u32 + 1)
}

/// What [`choose`] decides.
#[derive(Debug, Clone)]
pub struct WorkList {
    /// u32 `[ffn]`: the active neurons, ascending.
    pub ids: View,
    /// u32 pairs `[ffn]`: where each bundle comes from and which slot it fills.
    pub items: View,
    /// u32 `[8]`: items, over the link, cached, hot, host, active.
    pub counts: View,
    /// u64 `[8]`: the same, added up over all layers and tokens.
    pub totals: View,
}

/// The item of a neuron in device memory for good.
pub fn hot_item(neuron: usize) -> [u32; 2] {
    [neuron as u32, u32::MAX]
}

/// The item of a cold neuron that is read from host memory and fills no slot.
pub fn host_item(cold: usize) -> [u32; 2] {
    [0x4000_0000 | cold as u32, u32::MAX]
}

/// Selects the active neurons of a layer, looks them up in the cache, and divides the work.
#[derive(Debug, Clone, Copy)]
pub struct Choose<'a> {
    /// `[ffn]`, and room up to a multiple of four.
    pub scores: &'a View,
    /// Neurons.
    pub ffn: usize,
    /// Neurons in device memory for good.
    pub n_hot: usize,
    /// Which are active.
    pub selection: Selection,
    /// The cache.
    pub cache: &'a CacheTables,
    /// The step.
    pub step: &'a View,
    /// This layer, of `n_layers`.
    pub layer: usize,
    /// As above.
    pub n_layers: usize,
    /// The host's part, if it has one.
    pub host: Option<&'a HostWork>,
    /// The result.
    pub out: &'a WorkList,
}

/// See [`Choose`].
///
/// # Errors
/// See the module.
pub fn choose(device: &Device, c: &Choose<'_>) -> Result<()> {
    let n_cold = c.ffn - c.n_hot;
    let (cache, out) = (c.cache, c.out);
    if c.selection != Selection::Every {
        // They are read four at a time.
        floats(c.scores, c.ffn.next_multiple_of(4));
        assert!(c.scores.address().is_multiple_of(16), "scores in the middle of sixteen bytes");
    }
    if cache.n_sets > 0 {
        assert!(cache.n_ways <= 32 && cache.n_sets <= 0xffff, "a lane for each way, 16 bits for a set");
        let slots = cache.n_sets * cache.n_ways;
        assert!(cache.slot_of.len() >= 4 * n_cold && cache.key.len() >= 4 * n_cold, "cache tables");
        assert!(cache.owner.len() >= 4 * slots && cache.used.len() >= 4 * slots, "cache tables");
    }
    assert!(out.ids.len() >= 4 * c.ffn && out.items.len() >= 8 * c.ffn, "work list");
    assert!(out.counts.len() >= 32 && out.totals.len() >= 64, "counts");
    if let Some(host) = c.host {
        assert!(
            host.list.len() >= 4 * n_cold && host.count.len() >= 4 && host.flag.len() > 4 * INPUT_FLAG,
            "host work"
        );
    }
    let (every, k, threshold) = match c.selection {
        Selection::Every => (1, 0, 0.0),
        Selection::Top(k) => (0, k.clamp(1, c.ffn), 0.0),
        Selection::Above(threshold) => (0, 0, threshold),
    };
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let host = |field: fn(&HostWork) -> &View| c.host.map_or(0, |h| field(h).address());
    // The fields of `struct Choose` in kernels/cuda/choose.cu, with its padding.
    let words = vec![
        c.scores.address(),
        pair(c.ffn as u32, k as u32),
        pair(c.n_hot as u32, every),
        pair(f32::to_bits(threshold), cache.n_sets as u32),
        pair(cache.n_ways as u32, 0),
        cache.slot_of.address(),
        cache.owner.address(),
        cache.key.address(),
        cache.used.address(),
        pair(cache.lambda.to_bits(), 0),
        c.step.address(),
        pair(c.layer as u32, c.n_layers as u32),
        host(|h| &h.list),
        host(|h| &h.count),
        host(|h| &h.flag),
        out.ids.address(),
        out.items.address(),
        out.counts.address(),
        out.totals.address(),
    ];
    let launch = Launch {
        kernel: "choose".to_owned(),
        grid: [1 + u32::from(c.host.is_some()), 1],
        block: 1024,
        shared_bytes: 0,
        args: vec![Arg::Struct(words)],
    };
    let mut uses = vec![c.scores, c.step, &cache.slot_of, &cache.owner, &cache.key, &cache.used];
    uses.extend([&out.ids, &out.items, &out.counts, &out.totals]);
    uses.extend(c.host.iter().flat_map(|h| [&h.list, &h.count, &h.flag]));
    device.launch(launch, &uses)
}

/// Where the bundles of a layer lie.
#[derive(Debug, Clone, Copy)]
pub struct Bundles<'a> {
    /// The first neurons of the layer, in device memory.
    pub hot: &'a View,
    /// The others, in pinned host memory.
    pub cold: &'a View,
    /// The cache's slots.
    pub cache: &'a View,
    /// What the kernels after this one read: brought into the second-level cache, as far as it takes half of that.
    pub ahead: Option<&'a View>,
}

/// Threads of a block of the fused kernel. A team of up to 16 warps has a chunk of columns for each thread; small teams
/// share a block.
fn ffn_threads(layout: BundleLayout) -> u32 {
    let warps = layout.hidden_size().div_ceil(32 * chunk_columns(layout.encoding())).min(16);
    let team = if warps == 3 { 4 } else { warps as u32 };
    if team <= 4 { THREADS } else { 32 * team }
}

/// Blocks of the fused kernel: two for each multiprocessor.
pub fn ffn_blocks(device: &Device) -> usize {
    2 * device.n_multiprocessors()
}

/// The fused hot/cold kernel: `partial[b, :] = sum h_i d_i` over the items of block b. `partial` is
/// `[n_blocks, hidden]`.
///
/// # Errors
/// See the module.
#[allow(clippy::too_many_arguments)]
pub fn ffn(
    device: &Device,
    layout: BundleLayout,
    activation: Nonlinearity,
    work: &WorkList,
    bundles: Bundles<'_>,
    x: &View,
    n_blocks: usize,
    partial: &View,
) -> Result<()> {
    let hidden = layout.hidden_size();
    assert!(hidden.is_multiple_of(GROUP), "the hidden size is a multiple of {GROUP}");
    floats(x, hidden);
    floats(partial, n_blocks * hidden);
    let launch = Launch {
        kernel: format!("ffn_{}", layout.encoding()),
        grid: [n_blocks as u32, 1],
        block: ffn_threads(layout),
        shared_bytes: input_shared_bytes(layout.encoding(), hidden),
        args: vec![
            address(&work.items),
            address(&work.counts),
            address(bundles.hot),
            address(bundles.cold),
            address(bundles.cache),
            u32_of(layout.bundle_bytes()),
            u32_of(hidden),
            Arg::U32(activation as u32),
            address(x),
            address(partial),
            optional(bundles.ahead),
            u32_of(bundles.ahead.map_or(0, |v| v.len().min(device.cache_bytes() / 2))),
        ],
    };
    let mut uses = vec![&work.items, &work.counts, bundles.hot, bundles.cold, bundles.cache, x, partial];
    uses.extend(bundles.ahead);
    device.launch(launch, &uses)
}

/// What the host gives back: mapped memory.
#[derive(Debug, Clone)]
pub struct HostResult {
    /// `[hidden]`.
    pub y: View,
    /// u32, raised last ([`flag_value`]); all ones if the host gives up.
    pub flag: View,
}

/// `x += sum over blocks of partial (+ the host's part)`, in a fixed order.
///
/// # Errors
/// See the module.
#[allow(clippy::too_many_arguments)]
pub fn finish(
    device: &Device,
    partial: &View,
    n_blocks: usize,
    hidden: usize,
    counts: &View,
    host: Option<&HostResult>,
    step: &View,
    (layer, n_layers): (usize, usize),
    x: &View,
) -> Result<()> {
    floats(partial, n_blocks * hidden);
    floats(x, hidden);
    if let Some(host) = host {
        floats(&host.y, hidden);
    }
    let launch = Launch {
        kernel: "finish".to_owned(),
        grid: [hidden.div_ceil(GROUP) as u32, 1],
        block: THREADS,
        shared_bytes: 0,
        args: vec![
            address(partial),
            u32_of(n_blocks),
            u32_of(hidden),
            address(counts),
            optional(host.map(|h| &h.y)),
            optional(host.map(|h| &h.flag)),
            address(step),
            u32_of(layer),
            u32_of(n_layers),
            address(x),
        ],
    };
    let mut uses = vec![partial, counts, step, x];
    uses.extend(host.iter().flat_map(|h| [&h.y, &h.flag]));
    device.launch(launch, &uses)
}

/// `x[t, :] = table[tokens[t], :]`; `tokens` are u32.
///
/// # Errors
/// See the module.
pub fn embed_rows(device: &Device, table: &DeviceMatrix, tokens: &View, n: usize, x: &View) -> Result<()> {
    table.check();
    floats(tokens, n);
    floats(x, n * table.columns);
    let args = vec![address(tokens), u32_of(n), address(&table.data), u32_of(table.columns), address(x)];
    by_rows(device, format!("embed_rows_{}", table.encoding), n, args, &[tokens, &table.data, x])
}

/// RMSNorm of `x [n, columns]`, split into bfloat16 `[high, low]`.
///
/// # Errors
/// See the module.
pub fn norm_rows(device: &Device, x: &View, norm: Norm<'_>, n: usize, columns: usize, out: [&View; 2]) -> Result<()> {
    floats(x, n * columns);
    floats(norm.weight, columns);
    pairs(out, n * columns);
    let args = vec![
        address(x),
        address(norm.weight),
        Arg::F32(norm.eps),
        u32_of(n),
        u32_of(columns),
        address(out[0]),
        address(out[1]),
    ];
    by_rows(device, "norm_rows".to_owned(), n, args, &[x, norm.weight, out[0], out[1]])
}

/// Decodes rows `first .. first + n` of a matrix into bfloat16 `[high, low]`, each `[n, columns]`.
///
/// # Errors
/// See the module.
pub fn unpack_rows(device: &Device, w: &DeviceMatrix, first: usize, n: usize, out: [&View; 2]) -> Result<()> {
    assert!(first + n <= w.rows, "rows of the matrix");
    w.check();
    pairs(out, n * w.columns);
    let stride = w.encoding.row_stride(w.columns);
    let rows = w.data.slice(first * stride, n * stride);
    let args =
        vec![address(&rows), u32_of(n), u32_of(w.columns), Arg::U64(stride as u64), address(out[0]), address(out[1])];
    by_rows(device, format!("unpack_rows_{}", w.encoding), n, args, &[&rows, out[0], out[1]])
}

/// Decodes `n` bundles into bfloat16 `[high, low]` of gate, up and down rows, each `[n, hidden]`.
///
/// # Errors
/// See the module.
pub fn unpack_bundles(
    device: &Device,
    layout: BundleLayout,
    bundles: &View,
    n: usize,
    out: [[&View; 2]; 3],
) -> Result<()> {
    let hidden = layout.hidden_size();
    assert!(bundles.len() >= n * layout.bundle_bytes(), "bundles");
    let mut args = vec![address(bundles), u32_of(n), u32_of(layout.bundle_bytes()), u32_of(hidden)];
    let mut uses = vec![bundles];
    for pair in out {
        pairs(pair, n * hidden);
        args.extend(pair.map(address));
        uses.extend(pair);
    }
    by_rows(device, format!("unpack_bundles_{}", layout.encoding()), n, args, &uses)
}

/// `h = act(gate, up)`, split into bfloat16 `[high, low]`; all `[n, columns]`.
///
/// # Errors
/// See the module.
pub fn gate_rows(
    device: &Device,
    [gate, up]: [&View; 2],
    (n, columns): (usize, usize),
    activation: Nonlinearity,
    out: [&View; 2],
) -> Result<()> {
    floats(gate, n * columns);
    floats(up, n * columns);
    pairs(out, n * columns);
    let args = vec![
        address(gate),
        address(up),
        Arg::U64((n * columns) as u64),
        Arg::U32(activation as u32),
        address(out[0]),
        address(out[1]),
    ];
    by_rows(device, "gate_rows".to_owned(), n, args, &[gate, up, out[0], out[1]])
}

/// `x[t, :] += bias` for `x [n, columns]`.
///
/// # Errors
/// See the module.
pub fn add_bias_rows(device: &Device, x: &View, bias: &View, n: usize, columns: usize) -> Result<()> {
    floats(x, n * columns);
    floats(bias, columns);
    let args = vec![address(x), address(bias), u32_of(n), u32_of(columns)];
    by_rows(device, "add_bias_rows".to_owned(), n, args, &[x, bias])
}

/// Causal attention of `n` new positions, the first of which is `past`: queries in `qkv` (rows `[q | k | v]`) are
/// turned in place, keys and values appended; `out` is bfloat16 `[high, low]`, each `[n, n_heads * head_dim]`.
///
/// # Errors
/// See the module.
#[allow(clippy::too_many_arguments)]
pub fn attend_rows(
    device: &Device,
    heads: Heads,
    (n, past): (usize, usize),
    qkv: &View,
    [keys, values]: [&View; 2],
    rope: RopeTables<'_>,
    out: [&View; 2],
) -> Result<()> {
    heads.check(qkv, n, keys, values);
    assert!(past + n <= heads.capacity, "the context");
    floats(rope.cos, heads.capacity * heads.head_dim / 2);
    floats(rope.sin, heads.capacity * heads.head_dim / 2);
    pairs(out, n * heads.n_heads * heads.head_dim);
    let shape = [heads.n_heads, heads.n_kv_heads, heads.head_dim, heads.capacity].map(u32_of);
    let mut args = vec![address(qkv), u32_of(n), u32_of(past), address(keys), address(values)];
    args.extend([address(rope.cos), address(rope.sin)]);
    args.extend(shape.clone());
    by_rows(device, "rope_append_rows".to_owned(), n, args, &[qkv, keys, values, rope.cos, rope.sin])?;
    let mut args = vec![address(qkv), u32_of(n), u32_of(past), address(keys), address(values)];
    args.extend(shape);
    args.extend(out.map(address));
    let launch = Launch {
        kernel: "attend_rows".to_owned(),
        grid: attend_rows_grid(heads, n),
        block: attend_rows_threads(),
        shared_bytes: attend_rows_shared_bytes(heads),
        args,
    };
    device.launch(launch, &[qkv, keys, values, out[0], out[1]])
}

fn attend_rows_grid(heads: Heads, n: usize) -> [u32; 2] {
    [heads.n_heads as u32, n.div_ceil(32) as u32]
}

fn attend_rows_threads() -> u32 {
    THREADS
}

/// Queries, a tile of keys or values with a column more, scores with a column more, and a number for each query
/// (`Tiles` in `kernels/cuda/attend_rows.cu`).
fn attend_rows_shared_bytes(heads: Heads) -> u32 {
    let parts = heads.head_dim.div_ceil(4);
    (32 * (16 * parts + 16 * (parts + 1) + 4 * 33 + 4)) as u32
}

fn pairs(out: [&View; 2], n: usize) {
    assert!(out.iter().all(|view| view.len() >= 2 * n), "{} and {} bytes for {n} values", out[0].len(), out[1].len());
}

/// A block for each row.
fn by_rows(device: &Device, kernel: String, n: usize, args: Vec<Arg>, uses: &[&View]) -> Result<()> {
    if n == 0 {
        return Ok(());
    }
    device.launch(Launch { kernel, grid: [n as u32, 1], block: THREADS, shared_bytes: 0, args }, uses)
}
