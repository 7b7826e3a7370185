//! Guessing which neurons a token needs, before their weights are read.
//!
//! | concept | where |
//! | --- | --- |
//! | low-rank stand-ins for gate and up | [`LowRank`], [`fit_low_rank`] |
//! | how much of the output a guess keeps | [`energy_recall`] |

mod fit;
mod low_rank;
mod recall;

pub use fit::fit_low_rank;
pub use low_rank::{LowRank, expected_magnitude};
pub use recall::energy_recall;
