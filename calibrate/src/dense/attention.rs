//! Causal grouped-query attention over whole windows.
//!
//! Papers: arXiv 1706.03762, section 3.2; arXiv 2305.13245 for the shared key and value heads. Queries are taken in
//! blocks of [`QUERY_BLOCK`] positions, so that the causal half that is not needed is mostly not computed.

use crate::{
    Result,
    dense::{
        exponential::exp_nonpositive,
        linear::{Linear, tensor, with_values},
        rope::Rope,
    },
};
use candle_core::Tensor;
use rayon::prelude::*;
use thermocline_datasets::{Checkpoint, ModelConfig};

/// Query positions per block: large enough for matrix products, small enough to skip most of the upper triangle.
const QUERY_BLOCK: usize = 128;

/// What the attention projections of a layer read, for statistics.
#[derive(Debug)]
pub struct AttentionInputs<'a> {
    /// Input of the query, key and value projections, `[n_tokens, hidden_size]`.
    pub qkv: &'a [f32],
    /// Input of the output projection, `[n_tokens, n_heads * head_dim]`.
    pub output: &'a [f32],
}

pub(crate) struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    n_kv_heads: usize,
    group: usize,
    head_dim: usize,
    rope_theta: f32,
}

impl Attention {
    pub(crate) fn load(ckpt: &dyn Checkpoint, prefix: &str, config: &ModelConfig) -> Result<Self> {
        let (q, kv) = (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim);
        let load = |name: &str, n_out| {
            let shape = [n_out, config.hidden_size];
            Linear::load(ckpt, &format!("{prefix}self_attn.{name}_proj"), shape, config.qkv_bias)
        };
        Ok(Attention {
            query: load("q", q)?,
            key: load("k", kv)?,
            value: load("v", kv)?,
            output: Linear::load(ckpt, &format!("{prefix}self_attn.o_proj"), [config.hidden_size, q], false)?,
            n_kv_heads: config.n_kv_heads,
            group: config.n_heads / config.n_kv_heads,
            head_dim: config.head_dim,
            rope_theta: config.rope_theta,
        })
    }

    /// Input of the output projection, `[n_windows * window_len, n_heads * head_dim]`, from those of query, key and value.
    pub(crate) fn mix(&self, [q, k, v]: [&Tensor; 3], n_windows: usize, window_len: usize) -> Result<Tensor> {
        let (query, key, value) = (self.query.forward(q)?, self.key.forward(k)?, self.value.forward(v)?);
        let rope = Rope::new(window_len, self.head_dim, self.rope_theta);
        let width = self.output.n_in();
        let mut mixed = vec![0.0f32; n_windows * window_len * width];
        for (window, out) in mixed.chunks_exact_mut(window_len * width).enumerate() {
            let first = window * window_len;
            let scale = 1.0 / (self.head_dim as f32).sqrt();
            let q = self.heads(&query, &self.query, self.group, first, window_len, Some((&rope, scale)))?;
            let k = self.heads(&key, &self.key, 1, first, window_len, Some((&rope, 1.0)))?;
            let v = self.heads(&value, &self.value, 1, first, window_len, None)?;
            for start in (0..window_len).step_by(QUERY_BLOCK) {
                let end = (start + QUERY_BLOCK).min(window_len);
                self.block(&q, &k, &v, start, end, &mut out[start * width..end * width])?;
            }
        }
        tensor(mixed, &[n_windows * window_len, width])
    }

    /// Query, key, value and output.
    pub(crate) fn projections(&self) -> [&Linear; 4] {
        [&self.query, &self.key, &self.value, &self.output]
    }

    /// The output projection, `[n_tokens, hidden_size]`.
    pub(crate) fn project(&self, mixed: &Tensor) -> Result<Tensor> {
        self.output.forward(mixed)
    }

    /// One window's heads of a projection, biased and rotated: `[n_kv_heads, window_len * group, head_dim]`.
    /// Rows of one position are neighbours, so that a range of positions is a range of rows.
    fn heads(
        &self,
        projected: &Tensor,
        linear: &Linear,
        group: usize,
        first: usize,
        window_len: usize,
        rope: Option<(&Rope, f32)>,
    ) -> Result<Tensor> {
        let (head_dim, width) = (self.head_dim, self.n_kv_heads * group * self.head_dim);
        let mut out = vec![0.0f32; window_len * width];
        with_values(projected, |values| {
            out.par_chunks_mut(window_len * group * head_dim).enumerate().for_each(|(kv_head, out)| {
                for (row, out) in out.chunks_exact_mut(head_dim).enumerate() {
                    let (position, head) = (row / group, kv_head * group + row % group);
                    let start = (first + position) * width + head * head_dim;
                    let source = &values[start..start + head_dim];
                    let bias = linear.bias().map(|bias| &bias[head * head_dim..(head + 1) * head_dim]);
                    match (rope, bias) {
                        (Some((rope, scale)), bias) => rope.rotate(source, bias, position, scale, out),
                        (None, Some(bias)) => {
                            out.iter_mut().zip(source).zip(bias).for_each(|((out, v), b)| *out = v + b);
                        }
                        (None, None) => out.copy_from_slice(source),
                    }
                }
            });
        })?;
        tensor(out, &[self.n_kv_heads, window_len * group, head_dim])
    }

    /// Attention of positions `start..end` over `0..end`, into `out [end - start, n_heads * head_dim]`.
    fn block(&self, q: &Tensor, k: &Tensor, v: &Tensor, start: usize, end: usize, out: &mut [f32]) -> Result<()> {
        let (group, head_dim, rows) = (self.group, self.head_dim, (end - start) * self.group);
        let q = q.narrow(1, start * group, rows)?;
        let scores = q.matmul(&k.narrow(1, 0, end)?.t()?)?;
        let mut weights = vec![0.0f32; self.n_kv_heads * rows * end];
        with_values(&scores, |scores| {
            weights.par_chunks_mut(end).zip(scores.par_chunks(end)).enumerate().with_min_len(16).for_each(
                |(row, (out, scores))| {
                    let visible = start + row % rows / group + 1;
                    softmax(&scores[..visible], &mut out[..visible]);
                },
            );
        })?;
        let mixed = tensor(weights, &[self.n_kv_heads, rows, end])?.matmul(&v.narrow(1, 0, end)?)?;
        with_values(&mixed, |mixed| {
            for (row, source) in mixed.chunks_exact(head_dim).enumerate() {
                let (kv_head, row) = (row / rows, row % rows);
                let head = kv_head * group + row % group;
                let target = row / group * (self.n_kv_heads * group * head_dim) + head * head_dim;
                out[target..target + head_dim].copy_from_slice(source);
            }
        })
    }
}

/// Softmax of one row, shifted by its maximum.
fn softmax(scores: &[f32], out: &mut [f32]) {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for (out, &score) in out.iter_mut().zip(scores) {
        *out = exp_nonpositive(score - max);
    }
    // Eight partial sums: vectorised, and the same order whatever the instruction set.
    let mut lanes = [0.0f32; 8];
    let chunks = out.chunks_exact(8);
    let tail: f32 = chunks.remainder().iter().sum();
    chunks.for_each(|chunk| lanes.iter_mut().zip(chunk).for_each(|(lane, v)| *lane += v));
    let scale = 1.0 / (lanes.iter().sum::<f32>() + tail);
    out.iter_mut().for_each(|v| *v *= scale);
}
