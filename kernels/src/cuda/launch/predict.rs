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

/// One predictor of low rank on the device (FORMAT.md), and room for what comes of it.
#[derive(Debug, Clone, Copy)]
pub struct LowRankPredictor<'a> {
    /// `[rank, hidden]`.
    pub input: &'a DeviceMatrix,
    /// The weight of the norm in front of it, `[hidden]`.
    pub norm_weight: &'a View,
    /// `[2 * ffn, rank]`.
    pub factors: &'a DeviceMatrix,
    /// `[3, ffn]`.
    pub neurons: &'a View,
    /// [`inner_values`].
    pub inner: &'a View,
    /// `[ffn]`: the result.
    pub scores: &'a View,
}

/// The first halves of low-rank predictors: shares of `input norm(x)`, for [`predict_scores`]. `predictors`: this
/// layer's, and perhaps another of the same shape.
///
/// # Errors
/// See the module.
pub fn predict_inner(device: &Device, predictors: &[LowRankPredictor<'_>], x: &View) -> Result<()> {
    let first = checked(predictors);
    let (rank, hidden) = (first.input.rows, first.input.columns);
    floats(x, hidden);
    let row_blocks = rank.div_ceil(THREADS as usize / 32);
    // The fields of `struct Inner` in kernels/cuda/predict.cu.
    let words = |p: &LowRankPredictor<'_>| [p.input.data.address(), p.norm_weight.address(), p.inner.address()];
    let launch = Launch {
        kernel: format!("predict_inner_{}", first.input.encoding),
        grid: [hidden.div_ceil(INNER_SLICE) as u32, (predictors.len() * row_blocks) as u32],
        block: THREADS,
        shared_bytes: input_shared_bytes(first.input.encoding, INNER_SLICE),
        args: vec![both(predictors, words), u32_of(rank), u32_of(hidden), address(x)],
    };
    let uses = predictors.iter().flat_map(|p| [&p.input.data, p.norm_weight, p.inner]);
    device.launch(launch, &uses.chain([x]).collect::<Vec<_>>())
}

/// The first of one or two predictors of one shape.
fn checked<'p, 'a>(predictors: &'p [LowRankPredictor<'a>]) -> &'p LowRankPredictor<'a> {
    assert!(matches!(predictors.len(), 1 | 2), "a predictor, or two");
    let shape = |m: &DeviceMatrix| (m.encoding, m.rows, m.columns);
    let first = &predictors[0];
    let (rank, hidden, ffn) = (first.input.rows, first.input.columns, first.factors.rows / 2);
    for p in predictors {
        p.input.check();
        p.factors.check();
        let is_plain = |m: &DeviceMatrix| Encoding::PLAIN.contains(&m.encoding);
        assert!(is_plain(p.input) && is_plain(p.factors), "predictors are stored in plain encodings");
        assert_eq!((shape(p.input), shape(p.factors)), (shape(first.input), shape(first.factors)), "of one shape");
        assert_eq!(p.factors.columns, rank, "factors of the input's rank");
        floats(p.norm_weight, hidden);
        floats(p.inner, inner_values(hidden, rank));
        floats(p.neurons, 3 * ffn);
        floats(p.scores, ffn);
    }
    first
}

/// A structure of two: the second is zeros where there is none.
fn both<const N: usize>(predictors: &[LowRankPredictor<'_>], words: impl Fn(&LowRankPredictor<'_>) -> [u64; N]) -> Arg {
    Arg::Struct((0..2).flat_map(|i| predictors.get(i).map_or([0; N], &words)).collect())
}

/// The layer's input as [`predict_scores`] takes it and gives it away, `[hidden]` each; under the first predictor's norm.
#[derive(Debug, Clone, Copy)]
pub struct LayerInput<'a> {
    /// Numbers of the input.
    pub hidden: usize,
    /// Before its norm.
    pub x: &'a View,
    /// Added to the mean of squares.
    pub eps: f32,
    /// Gets the normalised input.
    pub normed: &'a View,
    /// Where the host reads it, if it may get a part of the layer ([`super::HostWork`]).
    pub host_x: Option<&'a View>,
}

/// The fields of `struct LayerInput` in kernels/cuda/predict.cu.
pub(super) fn layer_input(from: LayerInput<'_>, norm_weight: &View) -> Arg {
    for view in [from.x, from.normed].into_iter().chain(from.host_x) {
        floats(view, from.hidden);
    }
    Arg::Struct(vec![
        from.x.address(),
        norm_weight.address(),
        u64::from(from.eps.to_bits()) | (from.hidden as u64) << 32,
        from.normed.address(),
        from.host_x.map_or(0, View::address),
    ])
}

/// Scores of all neurons, after [`predict_inner`] with the same predictors.
///
/// # Errors
/// See the module.
pub fn predict_scores(
    device: &Device,
    predictors: &[LowRankPredictor<'_>],
    from: LayerInput<'_>,
    activation: Nonlinearity,
) -> Result<()> {
    let first = checked(predictors);
    let (ffn, rank) = (first.factors.rows / 2, first.factors.columns);
    assert!(rank.is_multiple_of(GROUP), "the rank is a multiple of {GROUP}");
    assert_eq!(from.hidden, first.input.columns, "the input's width");
    // A lane for each chunk of a row, up to a warp; each such team takes two neurons.
    let lanes = rank.div_ceil(chunk_columns(first.factors.encoding)).next_power_of_two().min(32);
    let neurons_of_block = 2 * THREADS as usize / lanes;
    // The fields of `struct Outer` in kernels/cuda/predict.cu.
    let words = |p: &LowRankPredictor<'_>| {
        [p.inner.address(), p.factors.data.address(), p.neurons.address(), p.scores.address()]
    };
    let launch = Launch {
        kernel: format!("predict_scores_{}", first.factors.encoding),
        grid: [ffn.div_ceil(neurons_of_block).min(8 * device.n_multiprocessors()) as u32, predictors.len() as u32],
        block: THREADS,
        shared_bytes: input_shared_bytes(first.factors.encoding, rank),
        args: vec![
            both(predictors, words),
            u32_of(rank),
            layer_input(from, first.norm_weight),
            u32_of(ffn),
            Arg::U32(activation as u32),
        ],
    };
    let uses = predictors.iter().flat_map(|p| [&p.factors.data, p.neurons, p.norm_weight, p.inner, p.scores]);
    device.launch(launch, &uses.chain([from.x, from.normed]).chain(from.host_x).collect::<Vec<_>>())
}
