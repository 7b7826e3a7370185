//! Measured speed of the GPU engine, beside the planned one.

use super::engine::GpuEngine;
use super::plan::GpuPlan;
use super::predict::{GpuPrediction, GpuSpeeds};
use crate::account::TierBytes;
use crate::bench::{BenchSettings, Timing, bench_token};
use crate::decoder::Decoder;
use crate::hardware::peak_rss_bytes;
use crate::sampler::greedy;
use crate::{Error, Result};
use serde::Serialize;
use std::time::Instant;

/// What was measured and what was planned.
#[derive(Debug, Clone, Serialize)]
pub struct GpuBenchReport {
    /// Whether the model's activations are planted.
    pub planted: bool,
    /// What was measured.
    pub settings: BenchSettings,
    /// The device.
    pub device: String,
    /// Threads that compute cold neurons.
    pub n_threads: usize,
    /// Speeds of the tiers, each alone.
    pub hardware: GpuSpeeds,
    /// What lay where.
    pub plan: GpuPlan,
    /// The host threads' share of the cold neurons that were not cached.
    pub host_share: f32,
    /// Whether it was given, or else found when the model was loaded.
    pub host_share_given: bool,
    /// Layers of which the host's threads chose and computed all neurons.
    pub host_layers: usize,
    /// Neurons of each layer that were fetched before it was known which are needed.
    pub lookahead: usize,
    /// Share of them that were needed.
    pub foreseen_used: Option<f64>,
    /// Prompt tokens a second.
    pub prompt_tok_s: Timing,
    /// Generated tokens a second.
    pub decode_tok_s: Timing,
    /// What `plan` expected of decoding.
    pub predicted: GpuPrediction,
    /// Bytes per decoded token, by tier.
    pub bytes_per_token: TierBytes,
    /// The part of `bytes_per_token.host` that went over the link.
    pub link_bytes_per_token: u64,
    /// The part of them that was fetched before it was known whether it is needed.
    pub early_link_bytes_per_token: u64,
    /// The part of `bytes_per_token.host` that the host's threads read of sketches.
    pub host_sketch_bytes_per_token: u64,
    /// Bytes a second over the link while decoding, attention and all included.
    pub link_bytes_per_second: f64,
    /// The same by the host's threads.
    pub host_bytes_per_second: f64,
    /// Share of the needed cold neurons that the cache held.
    pub cache_hit_rate: Option<f64>,
    /// Decode speed as a share of what these bytes at these speeds allow.
    pub limit_share: f64,
    /// What that limit is.
    pub limit: &'static str,
    /// Device memory that the driver says is taken, by all processes.
    pub device_used_bytes: u64,
    /// Largest resident set of the process.
    pub peak_rss_bytes: u64,
}

impl GpuEngine {
    /// Measures prompt and decode speed, with the tokens of [`crate::bench()`].
    ///
    /// # Errors
    /// If prompt and generation do not fit in the context, or the device fails.
    pub fn bench(&mut self, settings: BenchSettings, progress: &dyn Fn(usize, usize)) -> Result<GpuBenchReport> {
        let (needed, context) = (settings.n_prompt + settings.n_gen, self.context());
        if needed > context {
            return Err(Error::PromptTooLong { prompt_tokens: needed, context });
        }
        let vocab_size = self.split().manifest().config.vocab_size;
        let prompt: Vec<u32> = (0..settings.n_prompt).map(|i| bench_token(i, vocab_size)).collect();
        let (mut prompts, mut decodes) = (Vec::new(), Vec::new());
        let (mut before, mut seconds) = (self.account(), 0.0);
        for repetition in 0..=settings.repetitions {
            progress(repetition, settings.repetitions + 1);
            self.clear();
            let begin = Instant::now();
            let mut logits = self.prefill(&prompt)?;
            let prompt_seconds = begin.elapsed().as_secs_f64();
            before = self.account();
            let begin = Instant::now();
            for i in 0..settings.n_gen {
                let token = if settings.greedy && !logits.is_empty() {
                    greedy(&logits)
                } else {
                    bench_token(settings.n_prompt + i, vocab_size)
                };
                logits = self.decode(token)?;
            }
            seconds = begin.elapsed().as_secs_f64();
            if repetition > 0 {
                prompts.push(prompt.len() as f64 / prompt_seconds);
                decodes.push(settings.n_gen as f64 / seconds);
            }
        }
        progress(settings.repetitions + 1, settings.repetitions + 1);
        let (after, n) = (self.account(), settings.n_gen as u64);
        let of_host = after.host_parts_since(&before);
        let of_host_per_token = of_host.per_token(n);
        let bytes = after.bytes.minus(before.bytes);
        let (hits, misses) = (after.cache_hits - before.cache_hits, after.cache_misses - before.cache_misses);
        let (used, foreseen) = (after.foreseen_used - before.foreseen_used, after.foreseen - before.foreseen);
        let speeds = Decoder::speeds(self)?;
        let (limit_seconds, limit) = speeds.limit(bytes.per_token(n), of_host_per_token);
        let decode_tok_s = Timing::new(decodes);
        let (free, total) = self.device().memory()?;
        Ok(GpuBenchReport {
            planted: self.split().planted()?.is_some(),
            settings,
            device: self.device().name(),
            n_threads: self.plan().request.base.n_threads,
            hardware: self.measured(),
            plan: self.plan().clone(),
            host_share: self.host_share(),
            host_share_given: self.host_share_given(),
            host_layers: self.host_layers(),
            lookahead: self.lookahead(),
            foreseen_used: (foreseen > 0).then(|| used as f64 / foreseen as f64),
            prompt_tok_s: Timing::new(prompts),
            predicted: self.predicted(),
            bytes_per_token: bytes.per_token(n),
            link_bytes_per_token: of_host_per_token.link,
            early_link_bytes_per_token: of_host_per_token.early_link,
            host_sketch_bytes_per_token: of_host_per_token.sketches,
            link_bytes_per_second: of_host.link as f64 / seconds,
            host_bytes_per_second: (bytes.host - of_host.link.min(bytes.host)) as f64 / seconds,
            cache_hit_rate: (hits + misses > 0).then(|| hits as f64 / (hits + misses) as f64),
            limit_share: decode_tok_s.median * limit_seconds,
            limit,
            decode_tok_s,
            device_used_bytes: (total - free) as u64,
            peak_rss_bytes: peak_rss_bytes(),
        })
    }
}
