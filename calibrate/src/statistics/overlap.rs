//! How much of a token's active set was active shortly before.

use crate::settings::OVERLAP_LAGS;

/// Active sets whose reuse is counted: not zero (only where activations can be zero), top 10 %, top 30 %.
pub(crate) const N_SETS: usize = 3;

/// Per set and lag: neurons that were active at one of the last `lag` tokens, and neurons active at all, both over
/// tokens with at least `lag` predecessors in their window.
pub(crate) type Overlap = [[[u64; 2]; OVERLAP_LAGS.len()]; N_SETS];

/// Counts one window; `rows` are bit sets of `words` u64 per token.
pub(crate) fn count_overlap(rows: &[u64], words: usize, counts: &mut [[u64; 2]; OVERLAP_LAGS.len()]) {
    let row = |t: usize| &rows[t * words..(t + 1) * words];
    let ones = |bits: &[u64]| bits.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
    let mut union = vec![0u64; words];
    for t in 0..rows.len() / words.max(1) {
        let now = row(t);
        let n_active = ones(now);
        union.fill(0);
        let mut distance = 0;
        for (&lag, [hits, total]) in OVERLAP_LAGS.iter().zip(counts.iter_mut()).take_while(|(lag, _)| **lag <= t) {
            while distance < lag {
                distance += 1;
                union.iter_mut().zip(row(t - distance)).for_each(|(union, past)| *union |= past);
            }
            *hits += union.iter().zip(now).map(|(a, b)| u64::from((a & b).count_ones())).sum::<u64>();
            *total += n_active;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_definition() {
        let active = |t: usize, i: usize| (t * 7 + i * i * 3 + t * i) % 5 < 2;
        let (n, words) = (40, 2);
        let mut rows = vec![0u64; n * words];
        for (t, i) in (0..n).flat_map(|t| (0..100).map(move |i| (t, i))).filter(|&(t, i)| active(t, i)) {
            rows[t * words + i / 64] |= 1 << (i % 64);
        }
        let mut counts = [[0; 2]; 3];
        count_overlap(&rows, words, &mut counts);
        for (lag, got) in OVERLAP_LAGS.into_iter().zip(counts) {
            let pairs = (lag..n).flat_map(|t| (0..100).map(move |i| (t, i))).filter(|&(t, i)| active(t, i));
            let hits = pairs.clone().filter(|&(t, i)| (1..=lag).any(|d| active(t - d, i))).count() as u64;
            assert_eq!(got, [hits, pairs.count() as u64]);
        }
    }
}
