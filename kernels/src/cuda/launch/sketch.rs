//! A layer's sketch: scores of all neurons, and what stands for those that are not computed.

use super::{LayerInput, Nonlinearity, THREADS, address, floats, layer_input, u32_of};
use crate::cuda::backend::{Arg, Launch};
use crate::cuda::device::Device;
use crate::cuda::error::Result;
use crate::cuda::memory::View;
use crate::{SKETCH_UNIT, SketchBits};
use std::ops::Range;

/// Columns of a thread of [`add_sketched`], and of its blocks.
const THREAD_COLUMNS: usize = SKETCH_UNIT / 2;
const BLOCK_COLUMNS: usize = THREAD_COLUMNS * THREADS as usize;
/// Shared memory for a unit's inputs, as kernels/cuda/sketch.cu lays it out.
const UNIT_BYTES: usize = 4 * 50;

/// The sketch of a layer's last neurons on the device, parts laid out by [`crate::sketch_planes`].
#[derive(Debug, Clone)]
pub struct DeviceSketch {
    /// Rows of two bits `[n_neurons, hidden]`.
    pub gate: View,
    /// Rows of `up_bits` `[n_neurons, hidden]`.
    pub up: View,
    /// Rows of two bits `[n_neurons, hidden]`.
    pub down: View,
    /// `[4, n_neurons]`: root mean squares of what the gate's and the up row's products miss, lengths of the down columns and of
    /// what these miss.
    pub neurons: View,
    /// u32 `[hidden]`: the channel of the layer's input that each column of gate and up rows is multiplied with.
    pub columns: View,
    /// Bits of the up rows.
    pub up_bits: SketchBits,
    /// The first of them; those before it have no sketch, because they are always active.
    pub first: usize,
    /// How many have one: all behind the first.
    pub n_neurons: usize,
    /// Columns.
    pub hidden: usize,
}

impl DeviceSketch {
    /// Bytes of a neuron's down row.
    pub fn down_row_bytes(&self) -> u64 {
        SketchBits::Two.row_bytes(self.hidden) as u64
    }

    fn check(&self) {
        for (view, bits) in [(&self.gate, SketchBits::Two), (&self.up, self.up_bits), (&self.down, SketchBits::Two)] {
            let bytes = self.n_neurons * bits.row_bytes(self.hidden);
            assert!(view.len() >= bytes && view.address().is_multiple_of(16), "a sketch's rows");
        }
        floats(&self.neurons, 4 * self.n_neurons);
        assert!(self.columns.len() >= 4 * self.hidden && self.columns.address().is_multiple_of(16), "columns");
    }

    /// How kernels for sketches of these up rows end.
    pub(super) fn suffix(&self) -> &'static str {
        match self.up_bits {
            SketchBits::Two => "two",
            SketchBits::Three => "three",
        }
    }

    /// The fields of `struct UnderResidual` in kernels/cuda/prefill_residual.cu, for neurons at these places.
    pub(super) fn under_residual(&self, hidden: usize, places: Range<usize>) -> Arg {
        self.check();
        assert_eq!(hidden, self.hidden, "the sketch's width");
        assert!(places.end <= self.n_neurons, "neurons that have a sketch");
        let parts = [&self.gate, &self.up, &self.down, &self.columns].map(View::address);
        let numbers = self.n_neurons as u64 | (places.start as u64) << 32;
        Arg::Struct(parts.into_iter().chain([numbers]).collect())
    }
}

/// What a sketch says of its neurons, `[n_neurons]` each.
#[derive(Debug, Clone, Copy)]
pub struct Sketched<'a> {
    /// What leaving a neuron to its sketch is expected to cost, as a length in the layer's output. With `rows`, which of its rows
    /// are read: a sum of 1 for gate, 2 for up, 4 for down.
    pub scores: &'a View,
    /// Its activation as the sketch has it.
    pub activations: &'a View,
    /// How rows are chosen, if each is read or not alone.
    pub rows: Option<RowChoice<'a>>,
}

/// The rows of a neuron that are read.
#[derive(Debug, Clone, Copy)]
pub struct RowChoice<'a> {
    /// Those of which it is expected to cost more than this to leave them to the sketch, as a length in the layer's output.
    pub least: f32,
    /// All of a neuron, if any is.
    pub whole: bool,
    /// `[n_neurons]` pairs: gate and up as the sketch has them.
    pub products: &'a View,
}

/// Scores and activations of its neurons for `norm(x)`, which is given away as by [`super::predict_scores`]; `norm_weight`
/// `[hidden]`.
///
/// # Errors
/// See the module.
pub fn sketch_scores(
    device: &Device,
    sketch: &DeviceSketch,
    from: LayerInput<'_>,
    norm_weight: &View,
    activation: Nonlinearity,
    out: Sketched<'_>,
) -> Result<()> {
    let (n, hidden) = (sketch.n_neurons, sketch.hidden);
    sketch.check();
    floats(norm_weight, hidden);
    floats(out.scores, n);
    floats(out.activations, n);
    out.rows.iter().for_each(|rows| floats(rows.products, 2 * n));
    assert_eq!(from.hidden, hidden, "the input's width");
    let units = hidden / SKETCH_UNIT;
    // A lane for each unit of a row, up to a warp; each such team takes two neurons.
    let neurons_of_block = 2 * THREADS as usize / units.next_power_of_two().min(32);
    let launch = Launch {
        kernel: format!("sketch_scores_{}", sketch.suffix()),
        grid: [n.div_ceil(neurons_of_block).min(2 * device.n_multiprocessors()) as u32, 1],
        block: THREADS,
        shared_bytes: (units * UNIT_BYTES) as u32,
        args: vec![
            // The fields of `struct Sketch` in kernels/cuda/sketch.cu.
            Arg::Struct(vec![
                sketch.gate.address(),
                sketch.up.address(),
                sketch.neurons.address(),
                sketch.columns.address(),
            ]),
            layer_input(from, norm_weight),
            u32_of(n),
            Arg::U32(activation as u32),
            address(out.scores),
            address(out.activations),
            // The fields of `struct RowChoice` there.
            Arg::Struct(out.rows.map_or(vec![0; 2], |rows| {
                vec![rows.products.address(), u64::from(rows.least.to_bits()) | u64::from(rows.whole) << 32]
            })),
        ],
    };
    let of_sketch = [&sketch.gate, &sketch.up, &sketch.neurons, &sketch.columns];
    let uses = [norm_weight, from.x, from.normed, out.scores, out.activations];
    let optional = from.host_x.into_iter().chain(out.rows.map(|rows| rows.products));
    device.launch(launch, &of_sketch.into_iter().chain(uses).chain(optional).collect::<Vec<_>>())
}

/// Rows that [`add_sketched`] leaves with at most `n_blocks` blocks of which each has a few neurons.
pub fn sketch_rows(n_blocks: usize, n_neurons: usize, hidden: usize) -> usize {
    const LEAST_NEURONS: usize = 16;
    (n_blocks / hidden.div_ceil(BLOCK_COLUMNS)).clamp(1, n_neurons.div_ceil(LEAST_NEURONS))
}

/// `partial[b, :] = sum h_i d_i` over an equal part of the neurons, with down rows of the sketch. `activations` `[n_neurons]` are
/// those of [`sketch_scores`], of which [`super::choose`] has made zeros where the neuron's own down row is read, and with rows
/// [`super::ffn`] has put others where it is not, or wherever it computed one of which only the residual is stored; `partial`, `[n_rows, hidden]`, see [`sketch_rows`].
///
/// # Errors
/// See the module.
pub fn add_sketched(
    device: &Device,
    sketch: &DeviceSketch,
    activations: &View,
    n_rows: usize,
    partial: &View,
) -> Result<()> {
    let (n, hidden) = (sketch.n_neurons, sketch.hidden);
    sketch.check();
    floats(activations, n);
    floats(partial, n_rows * hidden);
    assert!(n_rows > 0, "a row for each part");
    let launch = Launch {
        kernel: "add_sketched".to_owned(),
        grid: [n_rows as u32, hidden.div_ceil(BLOCK_COLUMNS) as u32],
        block: THREADS,
        shared_bytes: (4 * n.div_ceil(n_rows)).max(4 * THREAD_COLUMNS * THREADS as usize) as u32,
        args: vec![address(&sketch.down), address(activations), u32_of(n), u32_of(hidden), address(partial)],
    };
    device.launch(launch, &[&sketch.down, activations, partial])
}
