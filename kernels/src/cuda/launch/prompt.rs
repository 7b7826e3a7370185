//! Prompts: the same steps for many positions, through matrix products.

use super::exact::{is_planar, suffix};
use super::{
    DeviceMatrix, DeviceSketch, Heads, Nonlinearity, Norm, RopeTables, THREADS, address, floats, input_shared_bytes,
    u32_of,
};
use crate::cuda::backend::{Arg, Launch};
use crate::cuda::device::Device;
use crate::cuda::error::Result;
use crate::cuda::memory::View;
use crate::{BundleLayout, Encoding};

/// `x[t, :] = table[tokens[t], :]`; `tokens` are u32.
///
/// # Errors
/// See the module.
pub fn embed_rows(device: &Device, table: &DeviceMatrix, tokens: &View, n: usize, x: &View) -> Result<()> {
    table.check();
    floats(tokens, n);
    floats(x, n * table.columns);
    let mut args = vec![address(tokens), u32_of(n), address(&table.data), u32_of(table.columns), address(x)];
    if is_planar(table.encoding) {
        args.push(Arg::U64(table.stride as u64));
    }
    by_rows(device, format!("embed_rows_{}", suffix(table.encoding)), n, args, &[tokens, &table.data, x])
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

/// Decodes rows `first .. first + n` of a matrix into bfloat16 `[high, low]`, each `[n, columns]`. Of the encodings with a
/// stream `high` is the weights' bits and `low` is zero.
///
/// # Errors
/// See the module.
pub fn unpack_rows(device: &Device, w: &DeviceMatrix, first: usize, n: usize, out: [&View; 2]) -> Result<()> {
    assert!(first + n <= w.rows, "rows of the matrix");
    w.check();
    pairs(out, n * w.columns);
    let rows = w.data.slice(first * w.stride, n * w.stride);
    let stride = Arg::U64(w.stride as u64);
    let args = vec![address(&rows), u32_of(n), u32_of(w.columns), stride, address(out[0]), address(out[1])];
    by_rows(device, format!("unpack_rows_{}", suffix(w.encoding)), n, args, &[&rows, out[0], out[1]])
}

/// Decodes `n` bundles into bfloat16 `[high, low]` of gate, up and down rows, each `[n, hidden]`. Residual rows, and no others, take
/// the sketch that they are added to, and the place in it of the first bundle's neuron.
///
/// # Errors
/// See the module.
pub fn unpack_bundles(
    device: &Device,
    layout: BundleLayout,
    bundles: &View,
    n: usize,
    under: Option<(&DeviceSketch, usize)>,
    out: [[&View; 2]; 3],
) -> Result<()> {
    let hidden = layout.hidden_size();
    assert_eq!(under.is_some(), layout.encoding() == Encoding::R4, "a sketch for residual rows");
    assert!(bundles.len() >= n * layout.bundle_bytes(), "bundles");
    let mut args = vec![address(bundles), u32_of(n), u32_of(layout.bundle_bytes()), u32_of(hidden)];
    let mut uses = vec![bundles];
    for pair in out {
        pairs(pair, n * hidden);
        args.extend(pair.map(address));
        uses.extend(pair);
    }
    let mut shared_bytes = 0;
    let mut kernel = format!("unpack_bundles_{}", suffix(layout.encoding()));
    if let Some((sketch, first)) = under {
        args.push(sketch.under_residual(hidden, first..first + n));
        uses.extend([&sketch.gate, &sketch.up, &sketch.down, &sketch.columns]);
        shared_bytes = input_shared_bytes(layout.encoding(), hidden);
        kernel = format!("{kernel}_{}", sketch.suffix());
    }
    by_rows_with(device, kernel, n, shared_bytes, args, &uses)
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
    by_rows_with(device, kernel, n, 0, args, uses)
}

/// The same with shared memory.
fn by_rows_with(
    device: &Device,
    kernel: String,
    n: usize,
    shared_bytes: u32,
    args: Vec<Arg>,
    uses: &[&View],
) -> Result<()> {
    if n == 0 {
        return Ok(());
    }
    device.launch(Launch { kernel, grid: [n as u32, 1], block: THREADS, shared_bytes, args }, uses)
}
