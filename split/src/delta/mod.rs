//! Delta directories: a fine-tuned model as what differs from the model that it was tuned from, bit for bit.
//!
//! | concept | where |
//! | --- | --- |
//! | make one from two checkpoints, or from a base and a LoRA adapter | [`write()`], [`Final`], [`DeltaOptions`] |
//! | open one, and patch rows or neurons of the base | [`Delta`] |
//! | what is in it | [`DeltaManifest`], [`DeltaTensor`], [`DeltaKind`] |
//! | base and delta seen as the final model | [`DeltaCheckpoint`] |
//! | base and adapter seen as the final model | [`AdapterCheckpoint`], [`fold_row`] |
//! | proof against the final model, or against the digests in the delta | [`verify_delta`] |
//!
//! FORMAT.md at the root of the repository describes every byte.

mod adapted;
mod bits;
#[deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod block;
mod build;
mod checkpoint;
mod encode;
mod fold;
#[deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod index;
mod journal;
#[deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod low_rank;
mod manifest;
mod matrix;
#[deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod open;
mod patch;
mod verify;

pub use adapted::AdapterCheckpoint;
pub use build::{DeltaOptions, DeltaReport, Final, KindCount, write};
pub use checkpoint::DeltaCheckpoint;
pub use fold::fold_row;
pub use manifest::{
    DATA_FILE, DELTA_VERSION, DeltaKind, DeltaManifest, DeltaTensor, LowRankEntry, MANIFEST_FILE, Model,
};
pub use open::Delta;
pub use verify::verify_delta;
