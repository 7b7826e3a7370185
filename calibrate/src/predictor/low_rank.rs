use super::expected_magnitude;
use crate::{
    Result,
    dense::{tensor, with_values},
    error::check_len,
};
use rayon::prelude::*;
use thermocline_datasets::Activation;

/// Low-rank stand-ins for the gate and up projections that share one input projection:
/// `z = b x`, `g_i ~ a_gate_i . z`, `u_i ~ a_up_i . z`. All matrices are row-major.
///
/// A neuron's score is the root of the expected `(|h_i| * ||d_i||)^2` if what the stand-ins leave out is normal noise
/// of the widths `gate_residual` and `up_residual`: at small ranks that ranks much better than the stand-ins' own `h`,
/// which is small wherever either factor happens to be.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    /// Length of `z`, at least 1.
    pub rank: usize,
    /// Length of `x`.
    pub hidden_size: usize,
    /// Neurons.
    pub intermediate_size: usize,
    /// `[rank, hidden_size]`; rows by falling importance.
    pub b: Vec<f32>,
    /// `[intermediate_size, rank]`.
    pub a_gate: Vec<f32>,
    /// `[intermediate_size, rank]`.
    pub a_up: Vec<f32>,
    /// Root mean square of `g_i - a_gate_i . z`, `[intermediate_size]`.
    pub gate_residual: Vec<f32>,
    /// Root mean square of `u_i - a_up_i . z`, `[intermediate_size]`.
    pub up_residual: Vec<f32>,
}

impl LowRank {
    /// The best predictor of a smaller rank (at least 1): the first rows and columns of this one, because both come
    /// sorted from one decomposition.
    pub fn truncated(&self, rank: usize) -> LowRank {
        let rank = rank.clamp(1, self.rank);
        let kept = |a: &[f32]| a.chunks_exact(self.rank).flat_map(|row| &row[..rank]).copied().collect();
        // Channels of z are uncorrelated and of unit variance: what a row loses adds up in squares.
        let residual = |residual: &[f32], a: &[f32]| {
            let lost = a.chunks_exact(self.rank).map(|row| row[rank..].iter().map(|v| v * v).sum::<f32>());
            residual.iter().zip(lost).map(|(residual, lost)| (residual * residual + lost).sqrt()).collect()
        };
        LowRank {
            rank,
            b: self.b[..rank * self.hidden_size].to_vec(),
            a_gate: kept(&self.a_gate),
            a_up: kept(&self.a_up),
            gate_residual: residual(&self.gate_residual, &self.a_gate),
            up_residual: residual(&self.up_residual, &self.a_up),
            ..*self
        }
    }

    /// Scores of one token: the reference for kernels. `x [hidden_size]` is the normalised feed-forward input,
    /// `down_norm [intermediate_size]`.
    pub fn score(&self, x: &[f32], activation: Activation, down_norm: &[f32]) -> Vec<f32> {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let z: Vec<f32> = self.b.chunks_exact(self.hidden_size).map(|row| dot(row, x)).collect();
        let rows = self.a_gate.chunks_exact(self.rank).zip(self.a_up.chunks_exact(self.rank));
        rows.zip(down_norm)
            .enumerate()
            .map(|(neuron, ((gate, up), norm))| self.neuron(activation, neuron, dot(gate, &z), dot(up, &z)) * norm)
            .collect()
    }

    /// [`LowRank::score`] for `x [n_tokens, hidden_size]`, through matrix products: `[n_tokens, intermediate_size]`.
    ///
    /// # Errors
    /// If `x` is not a whole number of rows.
    pub fn scores(&self, x: &[f32], activation: Activation, down_norm: &[f32]) -> Result<Vec<f32>> {
        let (n, ffn) = (x.len() / self.hidden_size, self.intermediate_size);
        check_len("predictor input", x.len(), n * self.hidden_size)?;
        check_len("down_norm", down_norm.len(), ffn)?;
        let x = tensor(x.to_vec(), &[n, self.hidden_size])?;
        let z = x.matmul(&tensor(self.b.clone(), &[self.rank, self.hidden_size])?.t()?)?;
        let gate = z.matmul(&tensor(self.a_gate.clone(), &[ffn, self.rank])?.t()?)?;
        let up = z.matmul(&tensor(self.a_up.clone(), &[ffn, self.rank])?.t()?)?;
        let mut out = vec![0.0f32; n * ffn];
        with_values(&gate, |gate| {
            with_values(&up, |up| {
                let rows = gate.par_chunks(ffn).zip(up.par_chunks(ffn));
                out.par_chunks_mut(ffn).zip(rows).for_each(|(out, (gate, up))| {
                    for (neuron, out) in out.iter_mut().enumerate() {
                        *out = self.neuron(activation, neuron, gate[neuron], up[neuron]) * down_norm[neuron];
                    }
                });
            })
        })??;
        Ok(out)
    }

    fn neuron(&self, activation: Activation, neuron: usize, gate: f32, up: f32) -> f32 {
        expected_magnitude(activation, gate, up, self.gate_residual[neuron], self.up_residual[neuron])
    }

    /// Weights, of all three matrices and the two residuals.
    pub fn n_weights(&self) -> usize {
        self.multiply_adds() + 2 * self.intermediate_size
    }

    /// Multiply-adds that a token's scores take in the three matrices.
    pub fn multiply_adds(&self) -> usize {
        self.b.len() + self.a_gate.len() + self.a_up.len()
    }
}
