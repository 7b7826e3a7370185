//! The GPU engine: hot neurons in device memory, cold ones read in place from pinned host memory, the token one graph.
//!
//! | concept | where |
//! | --- | --- |
//! | what goes where in a VRAM budget | `plan` |
//! | how fast that should be | `predict` |
//! | cache policies and sizes, replayed on the split's trace | `replay` |
//! | the split's bytes, on the device and pinned | `load` |
//! | a layer's sections, each with its list | `sections` |
//! | what else a token needs, and shares with the host | `buffers` |
//! | one token as one CUDA graph | `token` |
//! | prompts, by whole layers | `prefill` |
//! | sketches that VRAM has no room for | `sketches` |
//! | the threads that compute a share of the cold neurons, and of some layers everything | `host_share`, `host_layer` |
//! | how fast the tiers are | `speeds` |
//! | tokens in, logits out | `engine` |

mod audit;
mod bench;
mod buffers;
mod engine;
mod host_layer;
mod host_share;
mod load;
mod plan;
mod predict;
mod prefill;
mod replay;
mod sections;
mod sketches;
mod speeds;
mod token;

pub use bench::GpuBenchReport;
pub use engine::GpuEngine;
pub use plan::{GpuBytes, GpuPlan, GpuRequest};
pub use predict::{GpuPrediction, GpuSpeeds};
pub use speeds::measure_tiers;
