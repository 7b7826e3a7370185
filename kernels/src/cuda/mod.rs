//! The GPU side: one device, its memory, its kernels and the graph that a token is.
//!
//! | concept | where |
//! | --- | --- |
//! | a GPU, or the emulator that runs the same kernels on the CPU | [`Device`] |
//! | what can be wrong with an emulated device | [`EmulatedFault`] |
//! | device memory and pinned host memory, counted and kept alive | [`Memory`], [`View`] |
//! | work recorded once and started with one call | [`Graph`] |
//! | every kernel with its shapes, checked before it is launched | [`mod@launch`] |
//! | products of prompt batches | [`gemm`] |
//! | the CUDA sources | `kernels/cuda/` |

mod backend;
mod device;
mod driver;
mod emulator;
mod error;
mod fault;
mod gemm;
pub mod launch;
mod memory;

pub use backend::Queue;
pub use device::{Device, Event, Graph, Mark};
pub use emulator::build_emulator;
pub use error::{CudaError, Result};
pub use fault::EmulatedFault;
pub use gemm::{Gemm, Split, gemm};
pub use memory::{Memory, View};
