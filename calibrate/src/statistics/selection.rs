//! Which neurons of a token score highest.

use crate::settings::{TOP_SHARES, top_count};

/// `|h| * ||d||`: how much of the output a neuron is.
#[inline(always)]
pub(crate) fn score(h: f32, down_norm: f32) -> f32 {
    h.abs() * down_norm
}

/// The smallest score that still belongs to each of [`TOP_SHARES`], for one token.
///
/// A neuron belongs if its score is at least the threshold: ties at the threshold all belong. Thresholds are above
/// zero, so that a neuron that is exactly zero never does. `scratch` is overwritten.
pub(crate) fn thresholds(h: &[f32], down_norms: &[f32], scratch: &mut Vec<u32>) -> [f32; TOP_SHARES.len()] {
    // Bits of non-negative floats are ordered as the floats are, and compare faster.
    scratch.clear();
    scratch.extend(h.iter().zip(down_norms).map(|(&h, &norm)| score(h, norm).to_bits()));
    let n = scratch.len();
    let mut rest = scratch.as_mut_slice();
    let mut out = [0.0; TOP_SHARES.len()];
    // From the largest share down: each selection needs to look at the one before only.
    for (out, share) in out.iter_mut().zip(TOP_SHARES).rev() {
        let first = rest.len() - top_count(share, n);
        let (_, &mut threshold, _) = rest.select_nth_unstable(first);
        *out = f32::from_bits(threshold.max(1));
        rest = &mut rest[first..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn equals_a_full_sort(h in proptest::collection::vec(-9.0f32..9.0, 1..200)) {
            let norms: Vec<f32> = (0..h.len()).map(|i| 0.5 + (i % 7) as f32).collect();
            let mut sorted: Vec<f32> = h.iter().zip(&norms).map(|(&h, &n)| score(h, n)).collect();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let got = thresholds(&h, &norms, &mut Vec::new());
            for (threshold, share) in got.into_iter().zip(TOP_SHARES) {
                prop_assert_eq!(threshold, sorted[top_count(share, h.len()) - 1].max(f32::from_bits(1)));
            }
        }
    }
}
