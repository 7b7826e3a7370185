//! Keys and values of the tokens so far, in half precision.

use half::f16;
use thermocline_datasets::ModelConfig;

/// `[n_layers, 2, n_kv_heads, capacity, head_dim]`.
#[derive(Debug)]
pub(crate) struct KvCache {
    data: Vec<f16>,
    capacity: usize,
    n_kv_heads: usize,
    head_dim: usize,
    len: usize,
}

impl KvCache {
    /// Memory of a cache for `capacity` tokens.
    pub(crate) fn bytes(config: &ModelConfig, capacity: usize) -> u64 {
        2 * 2 * (config.n_layers * config.n_kv_heads * config.head_dim) as u64 * capacity as u64
    }

    pub(crate) fn new(config: &ModelConfig, capacity: usize) -> Self {
        let n = 2 * config.n_layers * config.n_kv_heads * config.head_dim * capacity;
        let (n_kv_heads, head_dim) = (config.n_kv_heads, config.head_dim);
        Self { data: vec![f16::ZERO; n], capacity, n_kv_heads, head_dim, len: 0 }
    }

    /// Tokens in it.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Tokens that fit.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Counts `n` tokens whose keys and values were written in every layer.
    pub(crate) fn advance(&mut self, n: usize) {
        self.len += n;
    }

    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    fn start(&self, layer: usize, value: bool, head: usize) -> usize {
        ((layer * 2 + usize::from(value)) * self.n_kv_heads + head) * self.capacity * self.head_dim
    }

    /// Writes the key or value `row` `[n_kv_heads * head_dim]` of the token at `position`.
    pub(crate) fn write(&mut self, layer: usize, value: bool, position: usize, row: &[f32]) {
        for (head, values) in row.chunks_exact(self.head_dim).enumerate() {
            let at = self.start(layer, value, head) + position * self.head_dim;
            thermocline_kernels::ops::to_f16(values, &mut self.data[at..at + self.head_dim]);
        }
    }

    /// Keys or values `[n, head_dim]` of one head, for the first `n` positions.
    pub(crate) fn head(&self, layer: usize, value: bool, head: usize, n: usize) -> &[f16] {
        let start = self.start(layer, value, head);
        &self.data[start..start + n * self.head_dim]
    }
}
