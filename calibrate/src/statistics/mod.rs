//! What is recorded of a layer, in integers, so that the order of summation cannot matter.
//!
//! | concept | where |
//! | --- | --- |
//! | sums as integers | `fixed` |
//! | the largest scores of a token | `selection` |
//! | a histogram of \|h\| | `histogram` |
//! | reuse of neurons over time | `overlap` |
//! | which tokens are sampled | `samples` |
//! | one layer's sums: add, encode, decode | `sums` |
//! | inputs of the projections | `inputs` |
//! | filling them from a window | `accumulator` |

mod accumulator;
mod fixed;
mod histogram;
mod inputs;
mod overlap;
mod samples;
mod selection;
mod sums;

pub(crate) use accumulator::Accumulator;
pub(crate) use fixed::{from_fixed, from_fixed_moment};
pub use histogram::HISTOGRAM_BINS;
pub(crate) use histogram::bin_middle;
pub use inputs::Input;
pub(crate) use samples::SamplePlan;
pub(crate) use sums::{Dtype, LayerSums, Section, sections};
