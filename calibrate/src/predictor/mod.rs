//! Guessing which neurons a token needs, before their weights are read.
//!
//! | concept | where |
//! | --- | --- |
//! | low-rank stand-ins for gate and up | [`LowRank`], [`fit_low_rank`] |
//! | what a rough guess of gate and up says of a neuron | [`expected_magnitude`], [`expected_error`] |
//! | what each of its rows would tell | [`expected_rows`] |
//! | a network of two layers that names the set, trained by gradients | [`TwoLayer`], [`train_two_layer`] |
//! | how much of the output a guess keeps | [`energy_recall`] |

mod expected;
mod fit;
mod low_rank;
mod recall;
mod train;
mod two_layer;

pub use expected::{ExpectedRows, expected_error, expected_magnitude, expected_rows};
pub use fit::fit_low_rank;
pub use low_rank::LowRank;
pub use recall::energy_recall;
pub use train::{Training, train_two_layer};
pub use two_layer::TwoLayer;
