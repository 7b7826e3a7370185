//! RMSNorm.
//!
//! Paper: arXiv 1910.07467, equation 4; the sum of squares is taken in f64, so that it does not depend on how the
//! loop is vectorised.

use rayon::prelude::*;

/// Normalises each row of `x [n, hidden_size]` and scales it by `weight [hidden_size]`.
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let hidden_size = weight.len();
    let mut out = vec![0.0f32; x.len()];
    out.par_chunks_mut(hidden_size).zip(x.par_chunks(hidden_size)).with_min_len(16).for_each(|(out, row)| {
        let sum: f64 = row.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        let scale = (1.0 / (sum / hidden_size as f64 + f64::from(eps)).sqrt()) as f32;
        for ((out, &v), &w) in out.iter_mut().zip(row).zip(weight) {
            *out = v * scale * w;
        }
    });
    out
}
