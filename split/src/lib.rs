//! Split directories: a model's feed-forward neurons as bundles, hot first, in checksummed chunks.
//!
//! | concept | where |
//! | --- | --- |
//! | make one from a checkpoint and its profile | [`split()`], [`SplitOptions`] |
//! | open one | [`Split`], [`Manifest`] |
//! | one layer's bundles on disk | [`LayerFile`] |
//! | which planes of them are used | [`Planes`], [`Precision`] |
//! | everything else on disk | [`TensorFile`] |
//! | what each layer's share of the neurons costs | [`Shares`] |
//! | low-bit copies of the neurons | [`Sketch`]; of gate and up rows alone, to guess by, [`RowCopy`] |
//! | orders and chunk lengths, measured | [`mod@order`] |
//! | make one of a planted model, without either | [`split_planted()`], [`planted_bytes`] |
//! | a split seen as the dense model that it encodes | [`SplitCheckpoint`] |
//! | proof against the checkpoint | [`verify()`] |
//! | a fine-tuned model as what differs from its base | [`delta`] |
//! | weights that no sound model has | [`Flaw`] |
//!
//! FORMAT.md at the root of the repository describes every byte.

#![forbid(unsafe_code)]

mod build;
mod checkpoint;
mod chunk;
mod content;
mod curve;
pub mod delta;
mod error;
mod flaw;
mod graded_curves;
mod graded_thresholds;
mod growing;
mod layer_encodings;
mod layer_file;
mod manifest;
mod open;
pub mod order;
mod pack_layer;
mod pack_resident;
mod partial;
mod plane_file;
mod planes;
mod planted;
mod precision;
mod resident;
mod sealed;
mod sections;
mod shares;
mod sketch;
mod tensor_file;
mod verify;

pub use build::{Rounding, Scales, SplitOptions, SplitReport, split};
pub use checkpoint::SplitCheckpoint;
pub use chunk::{Codec, Compression};
pub use curve::{Curve, Promise};
pub use error::{Error, Result};
pub use flaw::{Flaw, FlawKind};
pub use graded_curves::{GradedCurve, GradedCurves};
pub use graded_thresholds::GradedThresholds;
pub use layer_encodings::LayerEncodings;
pub use layer_file::{FileRange, LayerFile};
pub use manifest::{FORMAT_VERSION, LayerEntry, Manifest, Packing, PlainFile, PlaneEntry, SectionEntry, Source};
pub use open::{Split, StoredPredictor};
pub use planted::{PlantedBytes, PlantedSplit, planted_bytes, split_planted};
pub use precision::{Planes, Precision};
pub use resident::StoredMatrix;
pub use shares::{LayerCost, Shares};
pub use sketch::{
    ALL_ROWS, CopyBits, DOWN_ROW, Feedback, GATE_ROW, RowCopy, Sketch, SketchForm, UP_ROW, residual_layout,
};
pub use tensor_file::{Format, TensorEntry, TensorFile, TensorFileEntry};
pub use verify::{TensorReport, VerifyReport, verify};
