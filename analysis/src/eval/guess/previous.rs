//! What the token before needed.

use super::{Cost, Guess, Seen};
use crate::Result;
use thermocline_split::Split;

/// The position before, and for the first of a window how often neurons fire.
pub(super) struct Previous {
    /// Share of the calibration's tokens at which each neuron was active, `[intermediate_size]`.
    rates: Vec<f32>,
}

impl Previous {
    pub(super) fn load(split: &Split, index: usize) -> Result<Self> {
        let in_split = split.statistics().read_f32(&format!("layers.{index}.activation_rate"))?;
        Ok(Self { rates: split.layers()[index].places().iter().map(|&place| in_split[place as usize]).collect() })
    }
}

impl Guess for Previous {
    fn scores(&self, seen: &Seen<'_>) -> Result<Vec<f32>> {
        Ok(before(seen.given, &self.rates))
    }

    /// Nothing: what the position before gave is still there.
    fn cost(&self) -> Cost {
        Cost::default()
    }
}

/// What each position's predecessor gave, of `given [n_tokens, intermediate_size]`, and `first` for that which has none.
pub(super) fn before(given: &[f32], first: &[f32]) -> Vec<f32> {
    [first, &given[..given.len() - first.len()]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_has_what_the_one_before_gave() {
        let given = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        assert_eq!(before(&given, &[0.5, 0.25]), [0.5, 0.25, 1.0, 2.0, 3.0, 4.0]);
        assert_eq!(before(&given[..2], &[0.5, 0.25]), [0.5, 0.25]);
    }
}
