//! The runtime: plans what goes where for a memory budget, and turns tokens into tokens.
//!
//! | concept | where |
//! | --- | --- |
//! | what goes where, and the expected speed | [`Plan`], [`PlanRequest`], [`Hardware`] |
//! | tokens in, logits out | [`Engine`] on the CPU, `GpuEngine`; [`Decoder`] is what both can |
//! | logits in, token out | [`Sampler`] |
//! | a prompt answered, with its account | [`generate`], [`RunReport`] |
//! | how good a choice of neurons was | [`quality`]; while it runs, [`AuditReport`] |
//! | measured speed beside the planned one | [`bench()`] |
//!
//! A token's way: [`Engine::forward`] -> `engine::attend` -> `predictor` -> `layer_ffn` (hot prefix, cache, disk) ->
//! `ffn` (one neuron at a time, through the kernels crate).

#![forbid(unsafe_code)]

mod account;
mod attention;
mod audit;
mod bench;
pub mod budget;
mod cache;
mod chooser;
mod decoder;
mod divide;
mod engine;
mod error;
mod fetch;
mod ffn;
mod generate;
#[cfg(feature = "cuda")]
mod gpu;
pub mod hardware;
mod kv;
mod layer_active;
mod layer_ffn;
mod matrix;
#[path = "../../kernels/src/pauses.rs"]
mod pauses;
mod plan;
mod predictor;
mod prefill;
pub mod quality;
mod replay;
mod residual;
mod row_choice;
mod sampler;
mod stream;
#[cfg(test)]
mod stress;

pub use account::{Account, HostParts, TierBytes};
pub use audit::{AuditReport, LayerAudit, check_audit};
pub use bench::{BenchReport, BenchSettings, Timing, bench};
pub use chooser::always_neurons;
pub use decoder::{Decoder, Speeds};
pub use engine::{Engine, Logits};
pub use error::{Error, Result};
pub use generate::{FinishReason, GenerateSettings, RunReport, generate};
#[cfg(feature = "cuda")]
pub use gpu::{GpuBenchReport, GpuBytes, GpuEngine, GpuPlan, GpuPrediction, GpuRequest, GpuSpeeds, measure_tiers};
pub use hardware::{Hardware, StagingShape};
pub use layer_active::{LayerActive, LeastCost, layer_active};
pub use plan::{FixedBytes, Mode, Plan, PlanRequest, PlannedSection, Prediction};
pub use predictor::{energy, n_active, n_needed, top_k};
pub use sampler::{Sampler, SamplerSettings};
