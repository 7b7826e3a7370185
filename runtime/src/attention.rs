//! Grouped-query attention over the cache, for one token or a batch of consecutive ones.

use crate::kv::KvCache;
use thermocline_datasets::ModelConfig;
use thermocline_kernels::{Pool, matmul, matmul_nn, ops};

/// Positions whose keys are widened to f32 at a time: small enough for the first-level cache.
const TILE: usize = 64;

/// Cosines and sines for every position, `[context, head_dim / 2]` each.
#[derive(Debug)]
pub(crate) struct Rope {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl Rope {
    pub(crate) fn new(config: &ModelConfig, context: usize) -> Self {
        let half = config.head_dim / 2;
        let angle = |i: usize| {
            let (position, pair) = ((i / half) as f64, (i % half) as f64);
            position * f64::from(config.rope_theta).powf(-pair / half as f64)
        };
        let n = context * half;
        let cos = (0..n).map(|i| angle(i).cos() as f32).collect();
        Self { cos, sin: (0..n).map(|i| angle(i).sin() as f32).collect(), half }
    }

    /// Cosines and sines, for another engine.
    #[cfg(feature = "cuda")]
    pub(crate) fn into_tables(self) -> (Vec<f32>, Vec<f32>) {
        (self.cos, self.sin)
    }

    pub(crate) fn bytes(config: &ModelConfig, context: usize) -> u64 {
        (2 * 4 * context * (config.head_dim / 2)) as u64
    }

    /// Turns every head of `row` to `position`.
    pub(crate) fn turn(&self, row: &mut [f32], position: usize) {
        let at = position * self.half..(position + 1) * self.half;
        for head in row.chunks_exact_mut(2 * self.half) {
            ops::rope(head, &self.cos[at.clone()], &self.sin[at.clone()]);
        }
    }
}

/// Attends from the last position: `q` and `out` are `[n_heads * head_dim]`, `n` positions are in the cache.
pub(crate) fn attend_one(
    config: &ModelConfig,
    pool: &mut Pool,
    kv: &KvCache,
    layer: usize,
    n: usize,
    q: &[f32],
    out: &mut [f32],
) {
    let (dim, group) = (config.head_dim, config.n_heads / config.n_kv_heads);
    let scale = 1.0 / (dim as f32).sqrt();
    // The query heads of a group share their keys and values: each is widened once.
    pool.for_each_chunk(out, group * dim, |kv_head, out| {
        let q = &q[kv_head * group * dim..(kv_head + 1) * group * dim];
        let mut tile = vec![0.0; TILE * dim];
        let mut scores = vec![0.0; group * n];
        let keys = kv.head(layer, false, kv_head, n);
        for (t, keys) in keys.chunks(TILE * dim).enumerate() {
            let tile = &mut tile[..keys.len()];
            ops::from_f16(keys, tile);
            for (p, key) in tile.chunks_exact(dim).enumerate() {
                for (h, q) in q.chunks_exact(dim).enumerate() {
                    scores[h * n + t * TILE + p] = ops::dot(q, key) * scale;
                }
            }
        }
        scores.chunks_exact_mut(n).for_each(ops::softmax);
        out.fill(0.0);
        for (t, values) in kv.head(layer, true, kv_head, n).chunks(TILE * dim).enumerate() {
            let tile = &mut tile[..values.len()];
            ops::from_f16(values, tile);
            for (p, value) in tile.chunks_exact(dim).enumerate() {
                for (h, out) in out.chunks_exact_mut(dim).enumerate() {
                    ops::axpy(scores[h * n + t * TILE + p], value, out);
                }
            }
        }
    });
}

/// Attends causally from `n_new` positions, the first of which is `past`: `q` and `out` are
/// `[n_new, n_heads * head_dim]`; the cache holds `past + n_new` positions.
#[allow(clippy::too_many_arguments)]
pub(crate) fn attend_batch(
    config: &ModelConfig,
    pool: &mut Pool,
    kv: &KvCache,
    layer: usize,
    past: usize,
    n_new: usize,
    q: &[f32],
    out: &mut [f32],
) {
    let (dim, group, width) = (config.head_dim, config.n_heads / config.n_kv_heads, config.n_heads * config.head_dim);
    let (n, scale) = (past + n_new, 1.0 / (config.head_dim as f32).sqrt());
    // Head-major, so that every head is one piece; put in token order afterwards.
    let mut by_head = vec![0.0; out.len()];
    pool.for_each_chunk(&mut by_head, n_new * dim, |head, out| {
        let mut widened = vec![0.0; n * dim];
        ops::from_f16(kv.head(layer, false, head / group, n), &mut widened);
        let queries: Vec<f32> =
            q.chunks_exact(width).flat_map(|row| &row[head * dim..(head + 1) * dim]).map(|v| v * scale).collect();
        let mut scores = vec![0.0; n_new * n];
        matmul(n_new, n, dim, &queries, &widened, &mut scores, false);
        for (i, row) in scores.chunks_exact_mut(n).enumerate() {
            let (seen, future) = row.split_at_mut(past + i + 1);
            ops::softmax(seen);
            future.fill(0.0);
        }
        ops::from_f16(kv.head(layer, true, head / group, n), &mut widened);
        matmul_nn(n_new, dim, n, &scores, &widened, out, false);
    });
    for (head, values) in by_head.chunks_exact(n_new * dim).enumerate() {
        for (row, value) in out.chunks_exact_mut(width).zip(values.chunks_exact(dim)) {
            row[head * dim..(head + 1) * dim].copy_from_slice(value);
        }
    }
}

/// Memory that attention over a batch takes besides its inputs and outputs.
pub(crate) fn batch_scratch_bytes(config: &ModelConfig, n_new: usize, context: usize, n_threads: usize) -> u64 {
    let per_head = context * config.head_dim + n_new * config.head_dim + n_new * context;
    4 * (n_threads * per_head + n_new * config.n_heads * config.head_dim) as u64
}
