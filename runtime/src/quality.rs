//! How good a choice of neurons was: one definition for audits of a run and for evaluations of a text.

use crate::predictor::top_k;
use serde::{Deserialize, Serialize};

/// One layer under one choice. The oracle set of a token is as large as the choice, has the largest |h| * ||d|| of that
/// same state, and leaves out neurons that are exactly zero.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerQuality {
    /// Decoder layer.
    pub layer: usize,
    /// Share of the oracle sets that was computed.
    pub recall: f64,
    /// Share of the computed neurons that were in the oracle set.
    pub precision: f64,
    /// Mean over tokens of the share of sum (|h| ||d||)^2 over all neurons that was kept.
    pub energy_recall: f64,
    /// Mean over tokens of the same, relative to what the oracle set of the same size keeps.
    pub energy_recall_of_oracle: f64,
    /// Share of the neurons that was computed.
    pub computed_share: f64,
}

/// Sums over tokens, by [`compare`].
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    tokens: u64,
    neurons: u64,
    computed: u64,
    wanted: u64,
    found: u64,
    energy: f64,
    energy_of_oracle: f64,
}

impl std::ops::Add for Tally {
    type Output = Tally;

    fn add(self, other: Tally) -> Tally {
        Tally {
            tokens: self.tokens + other.tokens,
            neurons: self.neurons + other.neurons,
            computed: self.computed + other.computed,
            wanted: self.wanted + other.wanted,
            found: self.found + other.found,
            energy: self.energy + other.energy,
            energy_of_oracle: self.energy_of_oracle + other.energy_of_oracle,
        }
    }
}

impl Tally {
    /// What a choice of all neurons would count.
    pub fn whole(tokens: usize, neurons: usize) -> Tally {
        let n = (tokens * neurons) as u64;
        let share = tokens as f64;
        Tally {
            tokens: tokens as u64,
            neurons: n,
            computed: n,
            wanted: n,
            found: n,
            energy: share,
            energy_of_oracle: share,
        }
    }

    /// Means over the tokens, of layer `layer`.
    pub fn quality(&self, layer: usize) -> LayerQuality {
        // Nothing wanted and nothing found is a perfect score.
        let ratio = |a: u64, b: u64| if b == 0 { 1.0 } else { a as f64 / b as f64 };
        let n = self.tokens.max(1) as f64;
        LayerQuality {
            layer,
            recall: ratio(self.found, self.wanted),
            precision: ratio(self.found, self.computed),
            energy_recall: self.energy / n,
            energy_recall_of_oracle: self.energy_of_oracle / n,
            computed_share: ratio(self.computed, self.neurons),
        }
    }
}

/// One token's choice `kept` (ascending) against `weight = |h| * ||d||`, `[intermediate_size]`.
pub fn compare(weight: &[f32], kept: &[u32]) -> Tally {
    let mut best = Vec::new();
    top_k(weight, kept.len(), &mut best);
    let at = |i: u32| weight[i as usize];
    best.retain(|&i| at(i) > 0.0);
    let square = |w: f32| f64::from(w) * f64::from(w);
    let energy = |set: &[u32]| set.iter().map(|&i| square(at(i))).sum::<f64>();
    let (total, of_kept, of_best) = (weight.iter().map(|&w| square(w)).sum::<f64>(), energy(kept), energy(&best));
    let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 1.0 };
    Tally {
        tokens: 1,
        neurons: weight.len() as u64,
        computed: kept.len() as u64,
        wanted: best.len() as u64,
        found: n_common(kept, &best),
        energy: share(of_kept, total),
        energy_of_oracle: share(of_kept, of_best),
    }
}

/// Members of both ascending lists.
fn n_common(a: &[u32], b: &[u32]) -> u64 {
    let (mut i, mut j, mut n) = (0, 0, 0);
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        n += u64::from(x == y);
        i += usize::from(x <= y);
        j += usize::from(y <= x);
    }
    n
}
