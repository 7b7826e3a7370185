//! The fused feed-forward kernel and the sum after it.

use super::exact::{Teams, is_planar, suffix};
use super::{Nonlinearity, THREADS, WorkList, address, chunk_columns, floats, input_shared_bytes, optional, u32_of};
use crate::cuda::backend::{Arg, Launch};
use crate::cuda::device::Device;
use crate::cuda::error::Result;
use crate::cuda::memory::View;
use crate::{BundleLayout, Encoding, GROUP};

/// Where the bundles of a layer lie.
#[derive(Debug, Clone, Copy)]
pub struct Bundles<'a> {
    /// The first neurons of the layer, in device memory.
    pub hot: &'a View,
    /// The others, in pinned host memory.
    pub cold: &'a View,
    /// The cache's slots.
    pub cache: &'a View,
    /// What [`super::fetch_bundles`] has brought.
    pub fetched: Option<&'a View>,
    /// What the kernels after this one read: brought into the second-level cache, as far as it takes half of that.
    pub ahead: Option<&'a View>,
}

/// What a sketch has of neurons of which not all rows are read, or only what it leaves is stored. A neuron's place in both is its
/// bundle's number plus an offset; one of which all rows are read needs none, unless they are residual.
#[derive(Debug, Clone, Copy)]
pub struct SketchedRows<'a> {
    /// Pairs: the products of gate and up rows that are not read, with residual rows of all.
    pub products: &'a View,
    /// Gets the activations of neurons whose down row is not read, with residual rows of all items, for [`super::add_sketched`].
    pub sketched: &'a View,
    /// Of bundles in [`Bundles::hot`].
    pub hot_offset: i32,
    /// Of bundles in [`Bundles::cold`].
    pub cold_offset: i32,
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
/// `[n_blocks, hidden]`. Of a bundle that fills a slot, what its rows use is written there. With `rows` only the rows that items name
/// are read, and no slot is filled. Residual rows are always read with `rows`; `partial` is then without what
/// [`super::add_sketched`] adds for the same neurons.
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
    rows: Option<SketchedRows<'_>>,
) -> Result<()> {
    let hidden = layout.hidden_size();
    assert!(hidden.is_multiple_of(GROUP), "the hidden size is a multiple of {GROUP}");
    floats(x, hidden);
    floats(partial, n_blocks * hidden);
    if layout.encoding() == Encoding::R4 {
        let rows = rows.expect("residual rows with their sketch");
        assert!(rows.hot_offset >= 0 && rows.cold_offset >= 0, "a place for every neuron");
    }
    let mut launch = Launch {
        kernel: format!("ffn_{}", suffix(layout.encoding())),
        grid: [n_blocks as u32, 1],
        block: ffn_threads(layout),
        shared_bytes: input_shared_bytes(layout.encoding(), hidden),
        args: vec![
            address(&work.items),
            address(&work.counts),
            address(bundles.hot),
            address(bundles.cold),
            address(bundles.cache),
            optional(bundles.fetched),
            u32_of(layout.bundle_bytes()),
            u32_of(hidden),
            Arg::U32(activation as u32),
            address(x),
            address(partial),
            optional(bundles.ahead),
            u32_of(bundles.ahead.map_or(0, |v| v.len().min(device.cache_bytes() / 2))),
        ],
    };
    if let Some(rows) = rows {
        assert!(!is_planar(layout.encoding()), "rows are read alone in plain encodings");
        launch.kernel = format!("ffn_rows_{}", suffix(layout.encoding()));
        launch.args.extend([address(rows.products), address(rows.sketched)]);
        launch.args.extend([rows.hot_offset, rows.cold_offset].map(|offset| Arg::U32(offset.cast_unsigned())));
    }
    if is_planar(layout.encoding()) {
        let teams = Teams::for_bundles(device, layout);
        (launch.block, launch.shared_bytes) = (teams.threads(), teams.shared_bytes as u32);
        launch.args.push(u32_of(teams.stages));
        if teams.stages == 0 {
            launch.kernel.push_str("_wide");
        }
    }
    let mut uses = vec![&work.items, &work.counts, bundles.hot, bundles.cold, bundles.cache, x, partial];
    uses.extend(bundles.fetched);
    uses.extend(bundles.ahead);
    uses.extend(rows.iter().flat_map(|rows| [rows.products, rows.sketched]));
    device.launch(launch, &uses)
}

/// What the host gives back: mapped memory.
#[derive(Debug, Clone)]
pub struct HostResult {
    /// Threads that give their sums.
    pub n_threads: usize,
    /// `[n_threads, hidden]`.
    pub y: View,
    /// u32 for each thread, [`RESULT_FLAG`] apart, raised last ([`super::flag_value`]); all ones if it gives up.
    pub flags: View,
}

/// Words from a thread's flag to the next one's: a line each.
pub const RESULT_FLAG: usize = 32;

/// `x += left_out + sum over blocks of partial (+ sum over the host's threads)`, in a fixed order. `left_out`, `[hidden]`,
/// stands for neurons that are not computed.
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
    left_out: Option<&View>,
    host: Option<&HostResult>,
    step: &View,
    (layer, n_layers): (usize, usize),
    x: &View,
) -> Result<()> {
    floats(partial, n_blocks * hidden);
    floats(x, hidden);
    left_out.iter().for_each(|v| floats(v, hidden));
    if let Some(host) = host {
        floats(&host.y, host.n_threads * hidden);
        assert!(host.flags.len() >= 4 * RESULT_FLAG * host.n_threads, "flags");
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
            optional(left_out),
            // The fields of `struct HostPart` in kernels/cuda/ffn.cu.
            Arg::Struct(host.map_or(vec![0; 3], |h| vec![h.y.address(), h.flags.address(), h.n_threads as u64])),
            address(step),
            u32_of(layer),
            u32_of(n_layers),
            address(x),
        ],
    };
    let mut uses = vec![partial, counts, step, x];
    uses.extend(left_out);
    uses.extend(host.iter().flat_map(|h| [&h.y, &h.flags]));
    device.launch(launch, &uses)
}
