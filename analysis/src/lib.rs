//! How good a split is, and how to show it.
//!
//! | concept | where |
//! | --- | --- |
//! | perplexity, KL divergence and recall under a mask | [`eval`] |
//! | answers to zero-shot tasks under a mask | [`eval::tasks`] |
//! | what planes of weights take | [`study_planes`] |
//! | charts as plain data, drawn as SVG or PNG | [`plots`] |
//! | one offline HTML page | [`report`] |
//! | failures | [`Error`] |

#![forbid(unsafe_code)]

mod error;
pub mod eval;
mod planes;
pub mod plots;
pub mod report;

pub use error::{Error, Result};
pub use planes::{PlaneStudy, PlanesStudy, study_planes};
