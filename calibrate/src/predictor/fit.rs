//! Reduced-rank regression of gate and up together, in the metric of the inputs that really occur.
//!
//! With the inputs' second moment `C = R R^T`, the expected squared error of replacing `W = [G; U]` by `A B` is
//! `||diag(w) (W - A B) R||_F^2`, and the best `A B` of a rank is read off the singular vectors of `diag(w) W R`
//! (Eckart and Young). Paper: SVD-LLM, arXiv 2403.07378, section 3.2, which whitens with a Cholesky factor; here R comes from
//! an eigenvalue decomposition, because C of a short corpus may be singular, and rows carry weights, because an error
//! in `g_i` matters as far as `|u_i| * ||d_i||` makes it matter.

use super::LowRank;
use crate::{Error, Result, error::check_len};
use faer::{Mat, MatRef, Side};
use ndarray::Array2;
use thermocline_datasets::Activation;

/// Added to C's eigenvalues, as a share of their mean: directions that never occurred are not to be divided by zero.
const RIDGE: f64 = 1e-6;

/// Fits a predictor of `rank` (at least 1, at most `hidden_size`) from the feed-forward input's second moment
/// `[hidden_size, hidden_size]`, `gate` and `up` `[intermediate_size, hidden_size]` and `down_norm`
/// `[intermediate_size]`. One fit serves all smaller ranks: [`LowRank::truncated`].
///
/// Cost: two eigenvalue decompositions of size `hidden_size` and `6 * intermediate_size * hidden_size^2` multiplications
/// in f64.
///
/// # Errors
/// [`Error::Shape`] if lengths disagree, [`Error::Fit`] if the second moment is not finite.
pub fn fit_low_rank(
    second_moment: &Array2<f64>,
    gate: &[f32],
    up: &[f32],
    down_norm: &[f32],
    activation: Activation,
    rank: usize,
) -> Result<LowRank> {
    let (hidden, ffn) = (second_moment.nrows(), down_norm.len());
    check_len("second moment", second_moment.len(), hidden * hidden)?;
    check_len("gate", gate.len(), ffn * hidden)?;
    check_len("up", up.len(), ffn * hidden)?;
    let rank = rank.clamp(1, hidden.max(1));

    let moment = Mat::from_fn(hidden, hidden, |i, j| second_moment[(i, j)]);
    let (values, vectors) = eigen(moment.as_ref())?;
    let ridge = RIDGE * values.iter().sum::<f64>().max(f64::MIN_POSITIVE) / hidden as f64;
    let roots: Vec<f64> = values.iter().map(|value| (value.max(0.0) + ridge).sqrt()).collect();
    let root = Mat::from_fn(hidden, hidden, |i, j| vectors[(i, j)] * roots[j]);

    let project = |weight: &[f32]| Mat::from_fn(ffn, hidden, |i, j| f64::from(weight[i * hidden + j])) * &root;
    let (gate, up) = (project(gate), project(up));
    let (gate_rms, up_rms) = (row_norms(gate.as_ref()), row_norms(up.as_ref()));
    let weights = |i: usize| {
        let norm = f64::from(down_norm[i]);
        let (value, slope) = rms_of_activation(activation, gate_rms[i], up_rms[i]);
        (norm * slope, norm * value)
    };
    let weights: Vec<(f64, f64)> = (0..ffn).map(weights).collect();
    let weighted_gate = Mat::from_fn(ffn, hidden, |i, j| gate[(i, j)] * weights[i].0);
    let weighted_up = Mat::from_fn(ffn, hidden, |i, j| up[(i, j)] * weights[i].1);
    let gram = weighted_gate.transpose() * &weighted_gate + weighted_up.transpose() * &weighted_up;
    let (_, directions) = eigen(gram.as_ref())?;

    // Eigenvalues rise; the last column is the most important direction.
    let top = Mat::from_fn(hidden, rank, |i, j| directions[(i, hidden - 1 - j)]);
    let inverse_root = Mat::from_fn(hidden, hidden, |i, j| vectors[(i, j)] / roots[j]);
    let b = &inverse_root * &top;
    let (a_gate, a_up) = (&gate * &top, &up * &top);
    let rows = |m: &Mat<f64>| (0..ffn).flat_map(|i| (0..rank).map(move |j| m[(i, j)] as f32)).collect();
    // What a row of a keeps of its projection's mean square is its own squared length.
    let residual = |rms: &[f64], a: &Mat<f64>| {
        let kept = row_norms(a.as_ref());
        rms.iter().zip(kept).map(|(rms, kept)| (rms * rms - kept * kept).max(0.0).sqrt() as f32).collect()
    };
    Ok(LowRank {
        rank,
        hidden_size: hidden,
        intermediate_size: ffn,
        b: (0..rank).flat_map(|j| (0..hidden).map(move |i| (i, j))).map(|(i, j)| b[(i, j)] as f32).collect(),
        gate_residual: residual(&gate_rms, &a_gate),
        up_residual: residual(&up_rms, &a_up),
        a_gate: rows(&a_gate),
        a_up: rows(&a_up),
    })
}

/// Rising eigenvalues, and eigenvectors in columns.
fn eigen(matrix: MatRef<'_, f64>) -> Result<(Vec<f64>, Mat<f64>)> {
    let n = matrix.nrows();
    if (0..n).any(|j| (0..n).any(|i| !matrix[(i, j)].is_finite())) {
        return Err(Error::Fit { reason: "the second moment or the weights are not finite".to_owned() });
    }
    let eigen = matrix
        .self_adjoint_eigen(Side::Lower)
        .map_err(|error| Error::Fit { reason: format!("eigenvalue decomposition: {error:?}") })?;
    let values = eigen.S();
    Ok(((0..n).map(|i| values[i]).collect(), eigen.U().to_owned()))
}

fn row_norms(matrix: MatRef<'_, f64>) -> Vec<f64> {
    let mut squares = vec![0.0; matrix.nrows()];
    for j in 0..matrix.ncols() {
        squares.iter_mut().enumerate().for_each(|(i, sum)| *sum += matrix[(i, j)] * matrix[(i, j)]);
    }
    squares.into_iter().map(f64::sqrt).collect()
}

/// Root mean squares of `dh/du` and `dh/dg` if `g` and `u` were independent normal variables of these widths: how far
/// an error in `u` and in `g` is carried into `h`.
fn rms_of_activation(activation: Activation, gate_rms: f64, up_rms: f64) -> (f64, f64) {
    // A Riemann sum over +-4 standard deviations is exact enough for weights.
    let (mut mass, mut value_sum, mut slope_sum) = (0.0, 0.0, 0.0);
    for step in -16..=16 {
        let z = f64::from(step) / 4.0;
        let density = (-0.5 * z * z).exp();
        mass += density;
        let (value, slope) = value_and_slope(activation, z * gate_rms);
        value_sum += density * value * value;
        slope_sum += density * slope * slope;
    }
    ((value_sum / mass).sqrt(), up_rms * (slope_sum / mass).sqrt())
}

/// The gate's nonlinearity and its derivative.
fn value_and_slope(activation: Activation, gate: f64) -> (f64, f64) {
    match activation {
        Activation::Silu => {
            let sigmoid = 1.0 / (1.0 + (-gate).exp());
            (gate * sigmoid, sigmoid * (1.0 + gate * (1.0 - sigmoid)))
        }
        Activation::Relu | Activation::Drelu => (gate.max(0.0), if gate > 0.0 { 1.0 } else { 0.0 }),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::predictor::energy_recall;

    fn noise(n: usize, seed: u64) -> Vec<f32> {
        let hash = |i: usize| xxhash_rust::xxh3::xxh3_64_with_seed(&(i as u64).to_le_bytes(), seed);
        // Sum of four uniforms: near enough to normal.
        (0..n).map(|i| (0..4).map(|k| (hash(i) >> (16 * k) & 0xffff) as f32 / 65_536.0 - 0.5).sum()).collect()
    }

    #[test]
    fn full_rank_is_exact_and_recall_grows_with_rank() {
        let (hidden, ffn, n) = (24, 96, 400);
        // Inputs with a steep spectrum, as real ones have.
        let mix = noise(hidden * hidden, 1);
        let x: Vec<f32> = noise(n * hidden, 2)
            .chunks_exact(hidden)
            .flat_map(|z| {
                let channel = |i: usize| (0..hidden).map(|k| mix[i * hidden + k] * z[k] / (1 + k) as f32).sum::<f32>();
                (0..hidden).map(channel).collect::<Vec<_>>()
            })
            .collect();
        let moment = Array2::from_shape_fn((hidden, hidden), |(i, j)| {
            x.chunks_exact(hidden).map(|row| f64::from(row[i]) * f64::from(row[j])).sum::<f64>() / n as f64
        });
        let (gate, up) = (noise(ffn * hidden, 3), noise(ffn * hidden, 4));
        let norms: Vec<f32> = noise(ffn, 5).iter().map(|v| 1.0 + v.abs()).collect();
        let activation = Activation::Silu;
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let exact: Vec<f32> = x
            .chunks_exact(hidden)
            .flat_map(|x| {
                let rows = gate.chunks_exact(hidden).zip(up.chunks_exact(hidden)).zip(&norms);
                rows.map(|((g, u), norm)| activation.apply(dot(g, x), dot(u, x)).abs() * norm).collect::<Vec<_>>()
            })
            .collect();
        let full = fit_low_rank(&moment, &gate, &up, &norms, activation, hidden).unwrap();
        let recall = |rank: usize| {
            let predicted = full.truncated(rank).scores(&x, activation, &norms).unwrap();
            energy_recall(&predicted, &exact, ffn, 0.2)
        };
        let oracle = energy_recall(&exact, &exact, ffn, 0.2);
        assert!((recall(hidden) - oracle).abs() < 1e-6);
        let recalls: Vec<f64> = [1, 2, 4, 8, 16].into_iter().map(recall).collect();
        assert!(recalls.is_sorted(), "{recalls:?}");
        assert!(recalls[4] > 0.98 * oracle, "{recalls:?}, oracle {oracle}");
        // The reference function and the batched one agree.
        let one = full.score(&x[..hidden], activation, &norms);
        let batch = full.scores(&x[..hidden], activation, &norms).unwrap();
        assert!(one.iter().zip(&batch).all(|(a, b)| (a - b).abs() <= 1e-4 * (a.abs() + 1e-3)));
        // A smaller fit is the truncation.
        assert_eq!(fit_low_rank(&moment, &gate, &up, &norms, activation, 4).unwrap().b, full.truncated(4).b);
    }

    #[test]
    fn refuses_what_is_not_finite() {
        let moment = Array2::from_elem((2, 2), f64::NAN);
        let result = fit_low_rank(&moment, &[1.0; 4], &[1.0; 4], &[1.0; 2], Activation::Relu, 2);
        assert!(matches!(result, Err(Error::Fit { .. })));
    }
}
