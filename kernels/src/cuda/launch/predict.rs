//! The predictor: scores of all neurons.

use super::{DeviceMatrix, Nonlinearity, THREADS, address, chunk_columns, floats, input_shared_bytes, u32_of};
use crate::cuda::backend::{Arg, Launch};
use crate::cuda::device::Device;
use crate::cuda::error::Result;
use crate::cuda::memory::View;
use crate::{Encoding, GROUP};

/// Columns of a slice of [`predict_inner`].
const INNER_SLICE: usize = 1024;

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
    assert!(Encoding::PLAIN.contains(&input.encoding), "predictors are stored in plain encodings");
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
    /// Where the host reads it, if it may get a part of the layer ([`super::HostWork`]).
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
    assert!(Encoding::PLAIN.contains(&factors.encoding), "predictors are stored in plain encodings");
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
