use crate::{
    Result,
    dense::{tensor, with_values},
    error::check_len,
};
use thermocline_datasets::Activation;

/// Low-rank stand-ins for the gate and up projections that share one input projection:
/// `z = b x`, `g_i ~ a_gate_i . z`, `u_i ~ a_up_i . z`. All matrices are row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    /// Length of `z`.
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
}

impl LowRank {
    /// The best predictor of a smaller rank: the first rows and columns of this one, because both come sorted from
    /// one decomposition.
    pub fn truncated(&self, rank: usize) -> LowRank {
        let rank = rank.min(self.rank);
        let columns = |a: &[f32]| a.chunks_exact(self.rank.max(1)).flat_map(|row| &row[..rank]).copied().collect();
        LowRank {
            rank,
            b: self.b[..rank * self.hidden_size].to_vec(),
            a_gate: columns(&self.a_gate),
            a_up: columns(&self.a_up),
            ..*self
        }
    }

    /// Predicted `|h_i| * ||d_i||` of one token: the reference for kernels. `x [hidden_size]` is the normalised
    /// feed-forward input, `down_norm [intermediate_size]`.
    pub fn score(&self, x: &[f32], activation: Activation, down_norm: &[f32]) -> Vec<f32> {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let z: Vec<f32> = self.b.chunks_exact(self.hidden_size).map(|row| dot(row, x)).collect();
        let rows = self.a_gate.chunks_exact(self.rank).zip(self.a_up.chunks_exact(self.rank));
        rows.zip(down_norm)
            .map(|((gate, up), norm)| activation.apply(dot(gate, &z), dot(up, &z)).abs() * norm)
            .collect()
    }

    /// [`LowRank::score`] for `x [n_tokens, hidden_size]`, through matrix products: `[n_tokens, intermediate_size]`.
    ///
    /// # Errors
    /// If `x` is not a whole number of rows.
    pub fn scores(&self, x: &[f32], activation: Activation, down_norm: &[f32]) -> Result<Vec<f32>> {
        let (n, ffn) = (x.len() / self.hidden_size, self.intermediate_size);
        check_len("predictor input", x.len(), n * self.hidden_size)?;
        let x = tensor(x.to_vec(), &[n, self.hidden_size])?;
        let z = x.matmul(&tensor(self.b.clone(), &[self.rank, self.hidden_size])?.t()?)?;
        let gate = z.matmul(&tensor(self.a_gate.clone(), &[ffn, self.rank])?.t()?)?;
        let up = z.matmul(&tensor(self.a_up.clone(), &[ffn, self.rank])?.t()?)?;
        with_values(&gate, |gate| {
            with_values(&up, |up| {
                let norms = down_norm.iter().cycle();
                gate.iter().zip(up).zip(norms).map(|((&g, &u), norm)| activation.apply(g, u).abs() * norm).collect()
            })
        })?
    }

    /// Weights, of all three matrices.
    pub fn n_weights(&self) -> usize {
        self.b.len() + self.a_gate.len() + self.a_up.len()
    }
}
