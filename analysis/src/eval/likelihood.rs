//! From logits to cross-entropy, KL divergence and agreement.

use rayon::prelude::*;

/// Bytes of one stream's logits that are held at once.
const LOGIT_BYTES: usize = 32 << 20;

/// Positions whose logits are held at once.
pub(crate) fn positions_at_once(vocab_size: usize) -> usize {
    (LOGIT_BYTES / 4 / vocab_size.max(1)).clamp(1, 256)
}

/// Scores of the tokens of a text under one mask.
#[derive(Debug, Clone, Default)]
pub(crate) struct TokenScores {
    /// Cross-entropy of each token that has a predecessor in its window, in nats.
    pub losses: Vec<f32>,
    /// Sum of KL(dense || masked) over the same positions, in nats.
    pub kl_sum: f64,
    /// Positions where both think the same token likeliest.
    pub agreed: u64,
}

/// One position's logits, as far as comparing with others needs.
struct Normaliser {
    likeliest: usize,
    max: f32,
    /// Sum of `exp(logit - max)`.
    sum: f64,
}

impl Normaliser {
    fn new(logits: &[f32]) -> Self {
        let (mut likeliest, mut max) = (0, f32::NEG_INFINITY);
        for (i, &v) in logits.iter().enumerate() {
            if v > max {
                (likeliest, max) = (i, v);
            }
        }
        let sum = logits.iter().map(|&v| f64::from((v - max).exp())).sum();
        Normaliser { likeliest, max, sum }
    }

    fn log(&self) -> f64 {
        self.sum.ln() + f64::from(self.max)
    }
}

/// Cross-entropy of `target`, in nats.
pub(crate) fn cross_entropy(logits: &[f32], target: u32) -> f32 {
    let of_target = logits.get(target as usize).copied().unwrap_or(f32::NEG_INFINITY);
    (Normaliser::new(logits).log() - f64::from(of_target)) as f32
}

/// The logarithm of `target`'s probability, in nats, and whether nothing is likelier.
pub(crate) fn log_likelihood(logits: &[f32], target: u32) -> (f64, bool) {
    let normaliser = Normaliser::new(logits);
    let of_target = logits.get(target as usize).copied().unwrap_or(f32::NEG_INFINITY);
    (f64::from(of_target) - normaliser.log(), normaliser.likeliest == target as usize)
}

/// Adds a batch of positions. `dense` and `masked` are logits `[n, vocab_size]`; `targets [n]` are the tokens that
/// follow, `None` at the end of a window.
pub(crate) fn add(scores: &mut TokenScores, dense: &[f32], masked: &[f32], vocab_size: usize, targets: &[Option<u32>]) {
    let rows = dense.par_chunks(vocab_size).zip(masked.par_chunks(vocab_size)).zip(targets);
    let batch: Vec<Option<(f32, f64, bool)>> = rows
        .map(|((dense, masked), target)| {
            let target = (*target)?;
            let (p, q) = (Normaliser::new(dense), Normaliser::new(masked));
            // KL = sum p (a - b) - ln Z_a + ln Z_b for logits a and b.
            let gap: f64 =
                dense.iter().zip(masked).map(|(&a, &b)| f64::from((a - p.max).exp()) * f64::from(a - b)).sum();
            let kl = gap / p.sum - p.log() + q.log();
            let of_target = masked.get(target as usize).copied().unwrap_or(f32::NEG_INFINITY);
            Some(((q.log() - f64::from(of_target)) as f32, kl.max(0.0), p.likeliest == q.likeliest))
        })
        .collect();
    for (loss, kl, agrees) in batch.into_iter().flatten() {
        scores.losses.push(loss);
        scores.kl_sum += kl;
        scores.agreed += u64::from(agrees);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_definitions() {
        let (dense, masked) = ([0.5f32, 1.5, -2.0, 100.0], [1.0f32, 1.0, -1.0, 98.0]);
        let softmax = |v: &[f32]| {
            let total: f64 = v.iter().map(|v| f64::from(*v).exp()).sum();
            v.iter().map(|v| f64::from(*v).exp() / total).collect::<Vec<_>>()
        };
        let (p, q) = (softmax(&dense[..3]), softmax(&masked[..3]));
        let kl: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
        let mut scores = TokenScores::default();
        add(&mut scores, &dense[..3], &masked[..3], 3, &[Some(2)]);
        assert!((scores.kl_sum - kl).abs() < 1e-6);
        assert!((f64::from(scores.losses[0]) + q[2].ln()).abs() < 1e-6);
        assert!((f64::from(cross_entropy(&masked[..3], 2)) + q[2].ln()).abs() < 1e-6);
        let (of_target, likeliest) = log_likelihood(&masked[..3], 2);
        assert!((of_target - q[2].ln()).abs() < 1e-6 && !likeliest);
        assert!(log_likelihood(&dense, 3).1 && log_likelihood(&dense, 3).0.abs() < 1e-6);
        // A tie goes to the first: 1 in dense, 0 in masked.
        assert_eq!(scores.agreed, 0);
        add(&mut scores, &dense, &dense, 4, &[None]);
        assert_eq!(scores.losses.len(), 1);
        add(&mut scores, &dense, &dense, 4, &[Some(3)]);
        assert_eq!(scores.agreed, 1);
        assert!((scores.kl_sum - kl).abs() < 1e-6);
    }
}
