//! What a calibration measures and on which part of the corpus: the choices that make two runs comparable.

use crate::{Error, Input, Result};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use thermocline_datasets::ModelConfig;

/// Shares of a layer's neurons for which membership of a token's largest |h| * ||d|| is counted.
pub const TOP_SHARES: [f64; 4] = [0.1, 0.2, 0.3, 0.5];

/// Distances, in tokens, of the temporal overlap.
pub const OVERLAP_LAGS: [usize; 3] = [1, 4, 16];

/// Everything besides model and corpus that decides the statistics. A run resumes, and shards merge, only if all of
/// it is equal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Tokens per window; attention sees one window.
    pub window_len: usize,
    /// Tokens of the whole corpus whose active set is kept, at most; 0 keeps none.
    pub n_samples: usize,
    /// Sampled tokens come in runs of so many neighbours, so that a planner can replay them in order.
    pub sample_run_len: usize,
    /// Which share counts as active where activations are never zero; one of [`TOP_SHARES`].
    pub active_share: f64,
    /// Whether to keep the second moment of the feed-forward input, `4 * hidden_size^2` bytes per layer, that the
    /// low-rank predictor is fitted from.
    pub second_moment: bool,
    /// Whether to keep those of the inputs of attention's projections, too, that its rows are rounded by: three times as much again.
    /// Not in profiles of version 1.
    #[serde(default)]
    pub attention_moments: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            window_len: 512,
            n_samples: 4096,
            sample_run_len: 64,
            active_share: 0.3,
            second_moment: true,
            attention_moments: true,
        }
    }
}

impl Settings {
    /// The inputs whose second moments are kept.
    pub(crate) fn moments(&self) -> impl Iterator<Item = Input> {
        let is_kept = |input: &Input| if *input == Input::Ffn { self.second_moment } else { self.attention_moments };
        Input::ALL.into_iter().filter(is_kept)
    }

    /// Index into [`TOP_SHARES`] of the active share.
    pub(crate) fn active_index(&self) -> Result<usize> {
        TOP_SHARES.iter().position(|&share| share == self.active_share).ok_or_else(|| Error::Setting {
            name: "active_share",
            reason: format!("{} is not one of {TOP_SHARES:?}", self.active_share),
        })
    }

    pub(crate) fn check(&self) -> Result<()> {
        let in_range = |name, value: usize, range: Range<usize>| {
            let reason = format!("{value} is not in {}..{}", range.start, range.end);
            if range.contains(&value) { Ok(()) } else { Err(Error::Setting { name, reason }) }
        };
        in_range("window_len", self.window_len, 1..1 << 20)?;
        in_range("n_samples", self.n_samples, 0..1 << 24)?;
        in_range("sample_run_len", self.sample_run_len, 1..1 << 20)?;
        self.active_index().map(|_| ())
    }
}

/// Part `index` of `count`: a contiguous range of the corpus' windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Which part, from 0.
    pub index: usize,
    /// Of how many.
    pub count: usize,
}

impl Shard {
    /// The part's windows of `n_windows`: sizes differ by at most one.
    ///
    /// # Errors
    /// If `index` is not below `count`, or the part would be empty.
    pub fn windows(self, n_windows: usize) -> Result<Range<usize>> {
        let bad = |reason| Err(Error::Setting { name: "shard", reason });
        if self.index >= self.count {
            return bad(format!("{}/{}: the index counts from 0", self.index, self.count));
        }
        if self.count > n_windows {
            return bad(format!("{} shards of {n_windows} windows", self.count));
        }
        let start = |index: usize| (index as u128 * n_windows as u128 / self.count as u128) as usize;
        Ok(start(self.index)..start(self.index + 1))
    }
}

impl std::fmt::Display for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

/// Neurons in the top `share` of a layer: rounded up, at least one.
pub(crate) fn top_count(share: f64, intermediate_size: usize) -> usize {
    ((share * intermediate_size as f64).ceil() as usize).clamp(1, intermediate_size.max(1))
}

/// Floating-point operations per token of the dense forward (attention scores counted as the causal half).
pub(crate) fn flops_per_token(config: &ModelConfig, settings: &Settings) -> f64 {
    let (hidden, ffn) = (config.hidden_size as f64, config.intermediate_size as f64);
    let (q, kv) = ((config.n_heads * config.head_dim) as f64, (config.n_kv_heads * config.head_dim) as f64);
    let weights = 2.0 * (hidden * (2.0 * q + 2.0 * kv) + 3.0 * hidden * ffn);
    let scores = 2.0 * q * settings.window_len as f64;
    let moments: f64 = settings.moments().map(|input| 2.0 * (input.width(config) as f64).powi(2)).sum();
    config.n_layers as f64 * (weights + scores + moments)
}

/// An upper bound of the memory that [`crate::calibrate`] allocates itself, in bytes: the larger of the embedding
/// (or 1 GiB) and one layer's weights, plus one window's buffers, plus one layer's accumulators. It does not grow
/// with the corpus, except for the tokens themselves. What the checkpoint's reader needs to decode a tensor comes on
/// top; a memory-mapped checkpoint's pages are the system's to reclaim.
pub fn memory_bound_bytes(config: &ModelConfig, settings: &Settings) -> u64 {
    let (hidden, ffn, window) =
        (config.hidden_size as u64, config.intermediate_size as u64, settings.window_len as u64);
    let (q, kv) = ((config.n_heads * config.head_dim) as u64, (config.n_kv_heads * config.head_dim) as u64);
    let embedding = (4 * hidden * config.vocab_size as u64).min(crate::dense::WHOLE_TABLE_BYTES_MAX as u64);
    let layer = 4 * (hidden * (2 * q + 2 * kv) + 3 * hidden * ffn + 2 * hidden + q + 2 * kv);
    // Residual in and out, normed, mixtures, projections before and after the head layout, mixed heads; gate, up, h.
    let buffers = 4 * window * (10 * hidden + 4 * q + 4 * kv + 3 * ffn);
    let scores = 2 * 4 * config.n_heads as u64 * window.min(128) * window;
    // Per neuron: five counts, two f64 and two i128 sums, the histogram; twice, because it is encoded for the disk.
    let neurons = 2 * ffn * (5 * 4 + 16 + 32 + 4 * crate::statistics::HISTOGRAM_BINS as u64);
    let samples = 2 * 2 * (settings.n_samples as u64) * ffn.div_ceil(8);
    // Sums of the upper triangles, twice; and of one window.
    let squares: Vec<u64> = settings.moments().map(|input| (input.width(config) as u64).pow(2)).collect();
    let moments = 8 * squares.iter().sum::<u64>() + 4 * squares.iter().max().unwrap_or(&0);
    // Packed operands inside the matrix products, and the allocator's slack.
    let slack = 64 << 20;
    embedding.max(layer) + buffers + scores + neurons + samples + moments + slack
}
