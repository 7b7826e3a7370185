//! The first kernel of a token, and matrix products.

use super::exact::{Teams, is_planar, suffix};
use super::{DeviceMatrix, Step, THREADS, address, chunk_columns, floats, input_shared_bytes, optional, u32_of};
use crate::cuda::backend::{Arg, Launch};
use crate::cuda::device::Device;
use crate::cuda::error::Result;
use crate::cuda::memory::View;
use crate::{Encoding, GROUP, SEGMENT};

/// `x[c] = table[token, c]`; copies the step that the host wrote into mapped memory to the device.
///
/// # Errors
/// See the module.
pub fn embed(device: &Device, table: &DeviceMatrix, host_step: &View, step: &View, x: &View) -> Result<()> {
    table.check();
    floats(x, table.columns);
    assert!(host_step.len() >= Step::BYTES && step.len() >= Step::BYTES, "step");
    let mut launch = Launch {
        kernel: format!("embed_{}", suffix(table.encoding)),
        grid: [table.columns.div_ceil(THREADS as usize) as u32, 1],
        block: THREADS,
        shared_bytes: 0,
        args: vec![address(host_step), address(step), address(&table.data), u32_of(table.columns), address(x)],
    };
    if is_planar(table.encoding) {
        (launch.grid, launch.block) = ([table.columns.div_ceil(SEGMENT) as u32, 1], 32);
        launch.args.push(u32_of(table.stride));
    }
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
    let mut launch = Launch {
        kernel: format!("gemv_{}", suffix(w.encoding)),
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
    launch.args.extend(shape.more);
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
    /// What the kernels for streams and coarse planes take besides.
    more: Vec<Arg>,
}

impl GemvShape {
    fn new(device: &Device, w: &DeviceMatrix) -> Self {
        let step_columns = match w.encoding {
            Encoding::Bf16 => {
                let (units, warps) = (w.rows.div_ceil(4), (THREADS / 32) as usize);
                let steps = units * w.columns.div_ceil(32 * chunk_columns(w.encoding));
                let blocks = steps.div_ceil(warps).min(units).min(2 * device.n_multiprocessors()).max(1) as u32;
                let shared_bytes = input_shared_bytes(w.encoding, w.columns);
                return Self { blocks, threads: THREADS, shared_bytes, more: vec![] };
            }
            Encoding::Q8 => 64,
            Encoding::Q4 => 128,
            Encoding::R4 => panic!("no matrix is a residual"),
            Encoding::Bf16x | Encoding::Q4Plus | Encoding::Q4Exact | Encoding::Q8Exact => {
                let teams = Teams::for_rows(device, w.encoding, w.columns, w.stride);
                return Self {
                    blocks: w.rows.div_ceil(teams.n).min(2 * device.n_multiprocessors()).max(1) as u32,
                    threads: teams.threads(),
                    shared_bytes: teams.shared_bytes as u32,
                    more: [w.stride, teams.stages, teams.warps].map(u32_of).into(),
                };
            }
        };
        let (units, steps_of_row) = (w.rows.div_ceil(16), w.columns.div_ceil(step_columns));
        let digits = (steps_of_row * step_columns / GROUP * 164).next_multiple_of(16);
        let shared_bytes = |warps: usize| digits + 6144 * warps;
        let warps = if shared_bytes(16) <= device.shared_bytes() { 16 } else { 8 };
        let blocks = (units * steps_of_row).div_ceil(warps).min(units).min(device.n_multiprocessors()).max(1);
        let (threads, shared_bytes) = (32 * warps as u32, shared_bytes(warps) as u32);
        Self { blocks: blocks as u32, threads, shared_bytes, more: vec![] }
    }
}
