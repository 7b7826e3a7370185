//! Neuron statistics of a dense model over a corpus, and what is fitted from them.
//!
//! | concept | where |
//! | --- | --- |
//! | the dense forward, layer by layer | [`dense`] |
//! | a run over a corpus: resumable, shardable | [`calibrate()`], [`Settings`], [`merge`] |
//! | what it leaves behind | [`Profile`], [`LayerStatistics`] |
//! | room on disk, before and while it runs | [`disk`] |
//! | guessing which neurons fire | [`predictor`] |
//! | ordering neurons on disk | [`coactivation`] |
//! | failures | [`Error`] |

#![forbid(unsafe_code)]

pub mod coactivation;
pub mod dense;
pub mod disk;
mod error;
mod hidden;
mod merge;
pub mod predictor;
mod profile;
mod record;
mod run;
mod settings;
mod statistics;
mod store;
#[cfg(feature = "analysis")]
mod tables;
mod work_dir;

pub use error::{Error, Result};
pub use merge::merge;
pub use profile::{ActiveSet, LayerStatistics, Profile, ProfileMeta};
pub use run::{Event, RunOptions, calibrate};
pub use settings::{OVERLAP_LAGS, Settings, Shard, TOP_SHARES, memory_bound_bytes};
pub use statistics::{HISTOGRAM_BINS, Input};
