use super::expected::exp;
use crate::{
    Result,
    dense::{tensor, with_values},
    error::check_len,
};
use candle_core::Tensor;
use rayon::prelude::*;

/// A network that says how likely each neuron belongs to the set that a token needs:
/// `logits = second relu(first x + first_bias) + second_bias`. All matrices are row-major.
///
/// Paper: Deja Vu, arXiv 2310.17157, section 4, whose predictors of neurons are such networks.
#[derive(Debug, Clone, PartialEq)]
pub struct TwoLayer {
    /// Length of the inner vector.
    pub rank: usize,
    /// Length of `x`.
    pub hidden_size: usize,
    /// Neurons.
    pub intermediate_size: usize,
    /// `[rank, hidden_size]`.
    pub first: Vec<f32>,
    /// `[rank]`.
    pub first_bias: Vec<f32>,
    /// `[intermediate_size, rank]`.
    pub second: Vec<f32>,
    /// `[intermediate_size]`.
    pub second_bias: Vec<f32>,
}

impl TwoLayer {
    /// The odds that each neuron belongs to the set, `[n_tokens, intermediate_size]`, for the layer's normalised input
    /// `x [n_tokens, hidden_size]`: positive numbers, in the order of the logits.
    ///
    /// # Errors
    /// If `x` is not a whole number of rows.
    pub fn scores(&self, x: &[f32]) -> Result<Vec<f32>> {
        let mut scores = self.logits(x)?;
        scores.par_iter_mut().for_each(|logit| *logit = exp(*logit));
        Ok(scores)
    }

    /// The logits, `[n_tokens, intermediate_size]`.
    pub(super) fn logits(&self, x: &[f32]) -> Result<Vec<f32>> {
        let n = x.len() / self.hidden_size;
        check_len("predictor input", x.len(), n * self.hidden_size)?;
        let inner = self.inner(&tensor(x.to_vec(), &[n, self.hidden_size])?)?;
        self.of_inner(&tensor(inner, &[n, self.rank])?)
    }

    /// What is left of the inner vectors by the ReLU, `[n_tokens, rank]`, for `x [n_tokens, hidden_size]`.
    pub(super) fn inner(&self, x: &Tensor) -> Result<Vec<f32>> {
        let first = tensor(self.first.clone(), &[self.rank, self.hidden_size])?;
        let mut inner = with_values(&x.matmul(&first.t()?)?, <[f32]>::to_vec)?;
        for row in inner.chunks_exact_mut(self.rank) {
            row.iter_mut().zip(&self.first_bias).for_each(|(z, bias)| *z = (*z + bias).max(0.0));
        }
        Ok(inner)
    }

    /// The logits for inner vectors `[n_tokens, rank]`.
    pub(super) fn of_inner(&self, inner: &Tensor) -> Result<Vec<f32>> {
        let second = tensor(self.second.clone(), &[self.intermediate_size, self.rank])?;
        let mut logits = with_values(&inner.matmul(&second.t()?)?, <[f32]>::to_vec)?;
        logits.par_chunks_mut(self.intermediate_size).for_each(|row| {
            row.iter_mut().zip(&self.second_bias).for_each(|(logit, bias)| *logit += bias);
        });
        Ok(logits)
    }

    /// Its numbers: both matrices, each with its bias behind it.
    pub(super) fn parameters(&mut self) -> [&mut Vec<f32>; 4] {
        [&mut self.first, &mut self.first_bias, &mut self.second, &mut self.second_bias]
    }
}
