//! Orders of a layer's neurons, and what reading them in chunks costs.
//!
//! | concept | where |
//! | --- | --- |
//! | active sets of sampled tokens | [`BitMatrix`] |
//! | hot first; shuffled | [`order_by_rate`], [`order_random`] |
//! | neurons that fire together, together | [`order_clustered`] |
//! | neurons read per neuron needed | [`over_fetch`] |

mod bits;
mod cluster;
mod order;
mod over_fetch;

pub use bits::BitMatrix;
pub use cluster::order_clustered;
pub use order::{order_by_rate, order_random};
pub use over_fetch::over_fetch;
