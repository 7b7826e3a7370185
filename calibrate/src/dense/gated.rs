//! The three feed-forward matrices of a layer alone, from wherever they come.

use super::linear::{tensor, with_values};
use crate::{Result, error::check_len};
use candle_core::Tensor;

/// Gate, up and down rows of neurons.
pub struct GatedNeurons {
    /// `[n_neurons, hidden_size]`.
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    n_neurons: usize,
    hidden_size: usize,
}

impl GatedNeurons {
    /// `gate`, `up` and `down`, row-major `[n_neurons, hidden_size]` each: a row is a neuron in all three.
    ///
    /// # Errors
    /// If the lengths disagree.
    pub fn new([gate, up, down]: [Vec<f32>; 3], hidden_size: usize) -> Result<Self> {
        let n_neurons = gate.len() / hidden_size.max(1);
        let matrix = |what: &'static str, rows: Vec<f32>| {
            check_len(what, rows.len(), n_neurons * hidden_size)?;
            tensor(rows, &[n_neurons, hidden_size])
        };
        let (gate, up, down) = (matrix("gate rows", gate)?, matrix("up rows", up)?, matrix("down rows", down)?);
        Ok(Self { gate, up, down, n_neurons, hidden_size })
    }

    /// Gate and up pre-activations for `input [n_tokens, hidden_size]`, `[n_tokens, n_neurons]` each.
    ///
    /// # Errors
    /// If `input` is not a whole number of rows.
    pub fn pre_activations(&self, input: &[f32]) -> Result<[Vec<f32>; 2]> {
        let n_tokens = input.len() / self.hidden_size;
        let input = tensor(input.to_vec(), &[n_tokens, self.hidden_size])?;
        let product = |matrix: &Tensor| with_values(&input.matmul(&matrix.t()?)?, <[f32]>::to_vec);
        Ok([product(&self.gate)?, product(&self.up)?])
    }

    /// Adds `h [n_tokens, n_neurons]` times the down rows to `x [n_tokens, hidden_size]`.
    ///
    /// # Errors
    /// If `h` and `x` have different numbers of rows.
    pub fn output(&self, x: &mut [f32], h: Vec<f32>) -> Result<()> {
        let n_tokens = x.len() / self.hidden_size;
        check_len("activations", h.len(), n_tokens * self.n_neurons)?;
        let delta = tensor(h, &[n_tokens, self.n_neurons])?.matmul(&self.down)?;
        with_values(&delta, |delta| x.iter_mut().zip(delta).for_each(|(x, d)| *x += d))
    }
}
