//! Causal grouped-query attention over whole sequences.
//!
//! Papers: arXiv 1706.03762, section 3.2; arXiv 2305.13245 for the shared key and value heads. Queries are taken in
//! blocks of [`QUERY_BLOCK`] positions, so that the causal half that is not needed is mostly not computed.

use crate::{
    Result,
    dense::{
        exponential::exp_nonpositive,
        linear::{Linear, tensor, with_values},
        rope::Rope,
        sequence::Sequence,
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
    /// What the value rows are multiplied with in effect, `[n_tokens, hidden_size]`: the inputs of all tokens that a token sees,
    /// weighted as one of its heads weights them; heads in turn from token to token.
    pub mixtures: &'a [f32],
    /// Input of the output projection, `[n_tokens, n_heads * head_dim]`.
    pub output: &'a [f32],
}

/// Collects [`AttentionInputs::mixtures`].
pub(crate) struct Mixtures<'a> {
    /// `[n_tokens, hidden_size]`.
    inputs: &'a Tensor,
    /// `[n_tokens, hidden_size]`.
    pub(crate) rows: Vec<f32>,
}

impl<'a> Mixtures<'a> {
    pub(crate) fn new(inputs: &'a Tensor) -> Result<Self> {
        Ok(Self { inputs, rows: vec![0.0; inputs.elem_count()] })
    }

    /// Rows from `start` on, counted from `first`, the sequence's first row; each with its head's weights for the sequence's first
    /// `n_keys` rows.
    fn add(&mut self, first: usize, start: usize, n_keys: usize, weights: Vec<f32>) -> Result<()> {
        let (n, width) = (weights.len() / n_keys, self.inputs.dim(1)?);
        let mixed = tensor(weights, &[n, n_keys])?.matmul(&self.inputs.narrow(0, first, n_keys)?)?;
        let out = &mut self.rows[(first + start) * width..(first + start + n) * width];
        with_values(&mixed, |mixed| out.copy_from_slice(mixed))
    }
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

    /// Input of the output projection, `[n_rows, n_heads * head_dim]`, from those of query, key and value. The rows are those
    /// of `sequences`, one after the other; none sees another's. `mixtures` are of the rows of texts, not of branches.
    pub(crate) fn mix(
        &self,
        [q, k, v]: [&Tensor; 3],
        sequences: &[Sequence],
        mut mixtures: Option<&mut Mixtures<'_>>,
    ) -> Result<Tensor> {
        let (query, key, value) = (self.query.forward(q)?, self.key.forward(k)?, self.value.forward(v)?);
        let longest = sequences.iter().map(Sequence::n_positions).max().unwrap_or(0);
        let rope = Rope::new(longest, self.head_dim, self.rope_theta);
        let (width, n_rows) = (self.output.n_in(), sequences.iter().map(Sequence::n_rows).sum::<usize>());
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        let mut mixed = vec![0.0f32; n_rows * width];
        let mut first = 0;
        for sequence in sequences {
            let (end, positions) = (first + sequence.n_rows(), sequence.positions());
            let q = self.heads(&query, &self.query, self.group, first, &positions, Some((&rope, scale)))?;
            let k = self.heads(&key, &self.key, 1, first, &positions, Some((&rope, 1.0)))?;
            let v = self.heads(&value, &self.value, 1, first, &positions, None)?;
            let mixtures = mixtures.as_deref_mut().map(|mixtures| (mixtures, first));
            self.mix_sequence([&q, &k, &v], sequence, &mut mixed[first * width..end * width], mixtures)?;
            first = end;
        }
        tensor(mixed, &[n_rows, width])
    }

    /// One sequence's rows, from the heads of all of them; its mixtures are from a row on.
    fn mix_sequence(
        &self,
        [q, k, v]: [&Tensor; 3],
        sequence: &Sequence,
        out: &mut [f32],
        mut mixtures: Option<(&mut Mixtures<'_>, usize)>,
    ) -> Result<()> {
        let (width, text_len) = (self.output.n_in(), sequence.text_len);
        let queries = |start: usize, n: usize| q.narrow(1, start * self.group, n * self.group);
        for start in (0..text_len).step_by(QUERY_BLOCK) {
            let end = (start + QUERY_BLOCK).min(text_len);
            let (k, v) = (k.narrow(1, 0, end)?, v.narrow(1, 0, end)?);
            let weights = self.weights(&queries(start, end - start)?, &k)?;
            if let Some((mixtures, first)) = &mut mixtures {
                mixtures.add(*first, start, end, self.in_turn(&weights, start, end))?;
            }
            self.weigh(weights, &v, &mut out[start * width..end * width])?;
        }
        let mut start = text_len;
        for &len in sequence.branches.iter().filter(|len| **len > 0) {
            let seen = |t: &Tensor| Tensor::cat(&[t.narrow(1, 0, text_len)?, t.narrow(1, start, len)?], 1);
            let out = &mut out[start * width..(start + len) * width];
            self.weigh(self.weights(&queries(start, len)?, &seen(k)?)?, &seen(v)?, out)?;
            start += len;
        }
        Ok(())
    }

    /// Query, key, value and output.
    pub(crate) fn projections(&self) -> [&Linear; 4] {
        [&self.query, &self.key, &self.value, &self.output]
    }

    /// The output projection, `[n_tokens, hidden_size]`.
    pub(crate) fn project(&self, mixed: &Tensor) -> Result<Tensor> {
        self.output.forward(mixed)
    }

    /// One sequence's heads of a projection, biased and rotated: `[n_kv_heads, n_rows * group, head_dim]`, for the rows from
    /// `first` on that are at `positions [n_rows]`. Rows of one position are neighbours, so that a range of positions is a
    /// range of rows.
    fn heads(
        &self,
        projected: &Tensor,
        linear: &Linear,
        group: usize,
        first: usize,
        positions: &[usize],
        rope: Option<(&Rope, f32)>,
    ) -> Result<Tensor> {
        let (head_dim, width) = (self.head_dim, self.n_kv_heads * group * self.head_dim);
        let n_rows = positions.len();
        let mut out = vec![0.0f32; n_rows * width];
        with_values(projected, |values| {
            out.par_chunks_mut(n_rows * group * head_dim).enumerate().for_each(|(kv_head, out)| {
                for (row, out) in out.chunks_exact_mut(head_dim).enumerate() {
                    let (row, head) = (row / group, kv_head * group + row % group);
                    let start = (first + row) * width + head * head_dim;
                    let source = &values[start..start + head_dim];
                    let bias = linear.bias().map(|bias| &bias[head * head_dim..(head + 1) * head_dim]);
                    match (rope, bias) {
                        (Some((rope, scale)), bias) => rope.rotate(source, bias, positions[row], scale, out),
                        (None, Some(bias)) => {
                            out.iter_mut().zip(source).zip(bias).for_each(|((out, v), b)| *out = v + b);
                        }
                        (None, None) => out.copy_from_slice(source),
                    }
                }
            });
        })?;
        tensor(out, &[self.n_kv_heads, n_rows * group, head_dim])
    }

    /// How the last positions of `k [n_kv_heads, n_keys, head_dim]`, with queries `q [n_kv_heads, n * group, head_dim]`, weight all
    /// up to themselves: `[n_kv_heads, n * group, n_keys]`.
    fn weights(&self, q: &Tensor, k: &Tensor) -> Result<Vec<f32>> {
        let (rows, n_keys) = (q.dim(1)?, k.dim(1)?);
        let start = n_keys - rows / self.group;
        let scores = q.matmul(&k.t()?)?;
        let mut weights = vec![0.0f32; self.n_kv_heads * rows * n_keys];
        with_values(&scores, |scores| {
            weights.par_chunks_mut(n_keys).zip(scores.par_chunks(n_keys)).enumerate().with_min_len(16).for_each(
                |(row, (out, scores))| {
                    let visible = start + row % rows / self.group + 1;
                    softmax(&scores[..visible], &mut out[..visible]);
                },
            );
        })?;
        Ok(weights)
    }

    /// Of the weights of positions `start..n_keys`, each one's for one head: `[n_keys - start, n_keys]`, heads in turn.
    fn in_turn(&self, weights: &[f32], start: usize, n_keys: usize) -> Vec<f32> {
        let rows = (n_keys - start) * self.group;
        let row_of = |position: usize| {
            let head = position % (self.n_kv_heads * self.group);
            (head / self.group) * rows + (position - start) * self.group + head % self.group
        };
        (start..n_keys).flat_map(|position| &weights[row_of(position) * n_keys..][..n_keys]).copied().collect()
    }

    /// Sums of `v [n_kv_heads, n_keys, head_dim]` with [`Attention::weights`], into `out [n, n_heads * head_dim]`.
    fn weigh(&self, weights: Vec<f32>, v: &Tensor, out: &mut [f32]) -> Result<()> {
        let (group, head_dim, n_keys) = (self.group, self.head_dim, v.dim(1)?);
        let rows = weights.len() / (self.n_kv_heads * n_keys);
        let mixed = tensor(weights, &[self.n_kv_heads, rows, n_keys])?.matmul(v)?;
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
