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

mod attention;
mod choose;
mod divide;
mod exact;
mod fetch;
mod ffn;
mod predict;
mod product;
mod prompt;
mod sketch;

pub use attention::{Heads, MAX_SPLITS, RopeTables, attend};
pub use choose::{
    Ahead, CacheTables, Choose, Foreseen, HOST_ROWS, HostWork, INPUT_FLAG, Selection, WorkList, ask_host, choose,
    flag_value, host_item, hot_item,
};
pub use divide::divide_work;
pub use fetch::fetch_bundles;
pub use ffn::{Bundles, HostResult, RESULT_FLAG, SketchedRows, ffn, ffn_blocks, finish};
pub use predict::{LayerInput, LowRankPredictor, inner_values, predict_inner, predict_scores};
pub use product::{Added, Norm, embed, gemv};
pub use prompt::{add_bias_rows, attend_rows, embed_rows, gate_rows, norm_rows, unpack_bundles, unpack_rows};
pub use sketch::{DeviceSketch, RowChoice, Sketched, add_sketched, sketch_rows, sketch_scores};

use predict::layer_input;

use super::backend::Arg;
use super::memory::View;
use crate::{Encoding, GROUP};

/// Threads of most kernels' blocks.
const THREADS: u32 = 256;

/// What the token in progress is: `[token, position, serial]`, three u32; the host's share of the misses, an f32; how many
/// bundles to fetch beforehand for each layer, a u32.
#[derive(Debug, Clone, Copy)]
pub struct Step;

impl Step {
    /// Its size.
    pub const BYTES: usize = 20;
}

/// An encoded matrix on the device.
#[derive(Debug, Clone)]
pub struct DeviceMatrix {
    /// How rows are stored.
    pub encoding: Encoding,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub columns: usize,
    /// Bytes from one row to the next: [`Encoding::row_stride`], or for encodings with a stream a multiple of 16 with
    /// room for the longest.
    pub stride: usize,
    /// The rows.
    pub data: View,
}

impl DeviceMatrix {
    fn check(&self) {
        let least = self.encoding.row_stride(self.columns);
        let fits = if self.encoding.has_stream() {
            self.stride >= least && self.stride.is_multiple_of(16)
        } else {
            self.stride == least
        };
        assert!(fits, "{} bytes from row to row of {} columns in {}", self.stride, self.columns, self.encoding);
        assert!(self.encoding.accepts(self.columns), "{} cannot store {} columns", self.encoding, self.columns);
        assert!(self.data.len() >= self.rows * self.stride, "matrix data");
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

/// A vector in shared memory, as `kernels/cuda/input.cuh` lays it out: 16 more bytes for each 16 bytes of codes.
fn input_shared_bytes(encoding: Encoding, columns: usize) -> u32 {
    let chunk = chunk_columns(encoding);
    (columns.next_multiple_of(GROUP) / chunk * (4 * chunk + 16)) as u32
}

/// Columns of whose codes a thread of the kernels for plain encodings loads 16 bytes.
fn chunk_columns(encoding: Encoding) -> usize {
    match encoding.base() {
        Encoding::Q8 => 16,
        Encoding::Q4 | Encoding::R4 => 32,
        _ => 8,
    }
}
