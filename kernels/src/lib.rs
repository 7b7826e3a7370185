//! Encodings of weight rows and the kernels that compute with them where they lie.
//!
//! | concept | where |
//! | --- | --- |
//! | how a row of weights is stored | [`Encoding`], [`pack()`] |
//! | rows that give back a checkpoint's bits | [`exact`] |
//! | one neuron, gate and up rows and down column together | [`BundleLayout`] |
//! | dot and axpy on encoded rows, chosen for the CPU at run time | [`Kernels`] |
//! | a layer's input, made ready for the rows of its neurons | [`PreparedInput`] |
//! | a proof that a gate is negative, from 8-bit copies | [`Certificate`] |
//! | the plain loops that every variant is tested against | [`mod@reference`] |
//! | rows of a resident matrix times a vector or a batch | [`gemv`], [`matmul`] |
//! | low-bit copies of neurons that are always in memory | [`sketch`] |
//! | rows of bf16 turned into those of a fine-tuned model | [`mod@patch`] |
//! | threads that wait for work without sleeping | [`Pool`] |
//! | the GPU: device, memory, graphs, kernels | `cuda` (feature) |
//! | memory aligned for O_DIRECT and for vectors | [`AlignedBuf`] |
//! | memory that goes back to the system when it is freed | [`return_freed_blocks`] |
//!
//! This is the only crate of the workspace with `unsafe` code.

mod aligned;
mod allocator;
mod bundle;
mod certificate;
#[cfg(feature = "cuda")]
pub mod cuda;
mod dispatch;
mod encoding;
pub mod exact;
mod gemv;
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
mod input;
mod layer_layout;
mod matmul;
pub mod ops;
mod pack;
pub mod patch;
mod pauses;
mod pool;
#[cfg(test)]
mod pool_stress;
pub mod reference;
pub mod sketch;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use aligned::{AlignedBuf, AllocError};
pub use allocator::{keep_freed_blocks, return_freed_blocks};
pub use bundle::BundleLayout;
pub use certificate::{CERTIFIED_ROWS, Certificate, QuantisedInput};
pub use dispatch::{Isa, Kernels, prefetch};
pub use encoding::{BLOCK, Encoding, GROUP, RowRef, SEGMENT};
pub use gemv::{MatrixRef, PREFETCH_BYTES, gemv, gemv_rows, gemvs};
pub use input::PreparedInput;
pub use layer_layout::{LayerLayout, LayoutSection};
pub use matmul::{matmul, matmul_nn};
pub use pack::{PackError, ScaleFit, pack, unpack};
pub use pool::{Pool, PoolError};
#[cfg(feature = "cuda")]
pub use sketch::sketch_planes;
pub use sketch::{
    SKETCH_UNIT, SketchBits, SketchInput, SketchMatrix, TRELLIS_STATES, sketch_row, sketch_scales, trellis_next,
    trellis_subset, unsketch,
};
