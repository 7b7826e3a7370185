//! Measured speed, beside the planned one.

use crate::account::{HostParts, TierBytes};
use crate::decoder::Decoder;
use crate::engine::{Engine, Logits};
use crate::hardware::{Hardware, peak_rss_bytes};
use crate::plan::{Mode, Plan, Prediction};
use crate::{Error, Result};
use serde::Serialize;
use std::time::Instant;

/// What to measure.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct BenchSettings {
    /// Tokens of the prompt.
    pub n_prompt: usize,
    /// Tokens that are generated.
    pub n_gen: usize,
    /// Whether what is generated is what the model finds likeliest, or arbitrary tokens (GPU only).
    pub greedy: bool,
    /// Repetitions; one more comes first and is not counted.
    pub repetitions: usize,
}

/// Tokens a second over the repetitions.
#[derive(Debug, Clone, Serialize)]
pub struct Timing {
    /// One number a repetition.
    pub runs: Vec<f64>,
    /// Their median.
    pub median: f64,
    /// Standard deviation over mean.
    pub spread: f64,
}

impl Timing {
    pub(crate) fn new(runs: Vec<f64>) -> Self {
        let mut sorted = runs.clone();
        sorted.sort_by(f64::total_cmp);
        let n = runs.len().max(1) as f64;
        let mean = runs.iter().sum::<f64>() / n;
        let variance = runs.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / n;
        let middle = |i: usize| sorted.get(i).copied().unwrap_or(0.0);
        let median = (middle(sorted.len().saturating_sub(1) / 2) + middle(sorted.len() / 2)) / 2.0;
        Self { median, spread: variance.sqrt() / mean, runs }
    }
}

/// What was measured and what was planned.
#[derive(Debug, Clone, Serialize)]
pub struct BenchReport {
    /// Whether the model's activations are planted.
    pub planted: bool,
    /// What was measured.
    pub settings: BenchSettings,
    /// This machine.
    pub hardware: Hardware,
    /// What lay where.
    pub plan: Plan,
    /// Prompt tokens a second.
    pub prompt_tok_s: Timing,
    /// Generated tokens a second.
    pub decode_tok_s: Timing,
    /// Exact mode where activations can be zero: the same with every neuron computed, in turn with the above.
    pub dense_decode_tok_s: Option<Timing>,
    /// What `plan` expected of decoding.
    pub predicted: Prediction,
    /// Bytes per decoded token, by tier.
    pub bytes_per_token: TierBytes,
    /// Decode speed as a share of what these bytes at the measured RAM and disk speeds allow.
    pub limit_share: f64,
    /// Streamed runs only: decode speed over (disk speed / disk bytes per token).
    pub disk_limit_share: Option<f64>,
    /// Largest resident set of the process, the measurement of RAM speed included.
    pub peak_rss_bytes: u64,
}

/// The token at place `i` of every measurement.
pub(crate) fn bench_token(i: usize, vocab_size: usize) -> u32 {
    ((i as u64 * 7919 + 13) % vocab_size as u64) as u32
}

/// Measures prompt and decode speed. Tokens are arbitrary but fixed (a linear congruence over the vocabulary), so that
/// sparse mode sees changing inputs; nothing is sampled. `kernel_speed`, in bytes a second, is measured last: its
/// buffer is no part of the peak memory.
///
/// # Errors
/// If prompt and generation do not fit in the context, the disk fails, or `kernel_speed` does.
pub fn bench(
    engine: &mut Engine,
    settings: BenchSettings,
    kernel_speed: impl FnOnce() -> Result<f64>,
    progress: &dyn Fn(usize, usize),
) -> Result<BenchReport> {
    let needed = settings.n_prompt + settings.n_gen;
    let context = engine.plan().request.context;
    if needed > context {
        return Err(Error::PromptTooLong { prompt_tokens: needed, context });
    }
    let vocab = engine.split().manifest().config.vocab_size;
    let token = |i: usize| bench_token(i, vocab);
    let prompt: Vec<u32> = (0..settings.n_prompt.max(1)).map(token).collect();
    let (mut prompts, mut decodes, mut dense_decodes) = (Vec::new(), Vec::new(), Vec::new());
    let sparse_model = engine.split().manifest().config.activation.is_sparse();
    let beside_dense = engine.plan().request.mode == Mode::Exact && sparse_model;
    let decode = |engine: &mut Engine| -> Result<f64> {
        let begin = Instant::now();
        for i in 0..settings.n_gen {
            engine.forward(&[token(settings.n_prompt + i)], Logits::Last)?;
        }
        Ok(begin.elapsed().as_secs_f64())
    };
    let mut bytes = TierBytes::default();
    for repetition in 0..=settings.repetitions {
        progress(repetition, settings.repetitions + 1);
        if beside_dense {
            engine.clear();
            engine.prefill(&prompt)?;
            engine.skip_zeros(false);
            let seconds = decode(engine);
            engine.skip_zeros(true);
            let seconds = seconds?;
            if repetition > 0 {
                dense_decodes.push(settings.n_gen as f64 / seconds);
            }
        }
        engine.clear();
        let begin = Instant::now();
        engine.prefill(&prompt)?;
        let prompt_seconds = begin.elapsed().as_secs_f64();
        let before = engine.account();
        let decode_seconds = decode(engine)?;
        if repetition > 0 {
            prompts.push(prompt.len() as f64 / prompt_seconds);
            decodes.push(settings.n_gen as f64 / decode_seconds);
            bytes = engine.account().bytes.minus(before.bytes).per_token(settings.n_gen as u64);
        }
    }
    progress(settings.repetitions + 1, settings.repetitions + 1);
    let speeds = Decoder::speeds(engine)?;
    let peak_rss_bytes = peak_rss_bytes();
    let hardware = Hardware {
        n_threads: engine.plan().request.n_threads,
        ram_bytes_per_second: speeds.ram.unwrap_or(f64::INFINITY),
        kernel_bytes_per_second: kernel_speed()?,
        disk_bytes_per_second: speeds.disk.unwrap_or(f64::INFINITY),
        disk_reads_per_second: engine.measure_disk_reads()?.unwrap_or(f64::INFINITY),
    };
    let decode_tok_s = Timing::new(decodes);
    let disk_limit = speeds.disk.map(|d| d / bytes.disk.max(1) as f64);
    let (limit_seconds, _) = speeds.limit(bytes, HostParts::default());
    Ok(BenchReport {
        planted: engine.split().planted()?.is_some(),
        settings,
        hardware,
        plan: engine.plan().clone(),
        prompt_tok_s: Timing::new(prompts),
        dense_decode_tok_s: beside_dense.then(|| Timing::new(dense_decodes)),
        predicted: engine.plan().predict(&hardware),
        bytes_per_token: bytes,
        limit_share: decode_tok_s.median * limit_seconds,
        disk_limit_share: disk_limit.map(|limit| decode_tok_s.median / limit),
        decode_tok_s,
        peak_rss_bytes,
    })
}
