//! One prompt, answered.

use crate::account::TierBytes;
use crate::audit::AuditReport;
use crate::decoder::{Decoder, Speeds};
use crate::hardware::peak_rss_bytes;
use crate::plan::Mode;
use crate::sampler::{Sampler, SamplerSettings};
use crate::{Error, Result};
use serde::Serialize;
use std::time::{Duration, Instant};

/// How long and how to choose.
#[derive(Debug, Clone)]
pub struct GenerateSettings {
    /// Tokens to generate, at most.
    pub n_predict: usize,
    /// How tokens are chosen.
    pub sampler: SamplerSettings,
    /// Tokens that end the answer; they are part of it.
    pub stop: Vec<u32>,
    /// Audits sparse mode at the first decoded token and every so many after it; 0: never.
    pub audit_every: usize,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// A stop token.
    Stop,
    /// `n_predict` tokens, or the context was full.
    Length,
    /// The caller asked for it.
    Interrupted,
}

/// What a generation was and cost. Times are wall time.
#[derive(Debug, Clone, Serialize)]
pub struct RunReport {
    /// The tokens generated.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// How neurons were chosen in decoding; the prompt is always computed densely.
    pub mode: Mode,
    /// Prompt tokens a second.
    pub prompt_tok_s: f64,
    /// Generated tokens a second, the first (which the prompt's pass yields) left out.
    pub decode_tok_s: f64,
    /// Seconds to the first token.
    pub ttft_s: f64,
    /// Bytes of weights read per decoded token, by tier.
    pub bytes_per_token: TierBytes,
    /// Share of the needed cold neurons that the cache held; `null` if none were needed.
    pub cache_hit_rate: Option<f64>,
    /// Share of the neurons that were computed; of their bytes, where single rows were read.
    pub computed_share: f64,
    /// Share of the chunks read one layer early that were then needed; `null` if none were.
    pub foreseen_used: Option<f64>,
    /// Share of the decode time spent waiting for the disk.
    pub disk_wait_share: f64,
    /// Bytes per decoded token that a GPU read from pinned memory; part of `bytes_per_token.host`.
    pub link_bytes_per_token: u64,
    /// Speeds used for the limit.
    pub bytes_per_second: Speeds,
    /// Decode speed as a share of what these bytes at these speeds allow ([`Speeds::limit`]).
    pub limit_share: f64,
    /// What the limit is.
    pub limit: &'static str,
    /// Largest resident set of the process so far.
    pub peak_rss_bytes: u64,
    /// How good the choice of neurons was, if that was asked for. What audits took and read is in no other figure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit: Option<AuditReport>,
    /// Bytes read per decoded token over time: (token number, bytes by tier), for plots.
    pub timeline: Vec<(usize, TierBytes)>,
}

/// Answers `prompt` (token ids; the engine's context is cleared first). `on_token` gets each token as it comes and
/// returns whether to go on.
///
/// # Errors
/// If the prompt does not fit in the context, a setting is out of range, the engine has nothing to audit, or the disk fails.
pub fn generate(
    engine: &mut dyn Decoder,
    prompt: &[u32],
    settings: &GenerateSettings,
    on_token: &mut dyn FnMut(u32) -> bool,
) -> Result<RunReport> {
    if prompt.is_empty() {
        return Err(Error::Setting { flag: "-p", reason: "the prompt has no tokens".to_owned() });
    }
    let context = engine.context();
    if prompt.len() > context {
        return Err(Error::PromptTooLong { prompt_tokens: prompt.len(), context });
    }
    let mut sampler = Sampler::new(settings.sampler)?;
    prompt.iter().for_each(|&t| sampler.accept(t));
    engine.start_audit(settings.audit_every)?;
    engine.clear();
    let begin = Instant::now();
    let logits = engine.prefill(prompt)?;
    let ttft = begin.elapsed();
    let before = engine.account();
    let mut last = before;
    let mut timeline = Vec::new();
    let (mut tokens, mut logits) = (Vec::new(), logits);
    let decode = Instant::now();
    let mut decode_time = Duration::ZERO;
    let finish_reason = loop {
        if tokens.len() >= settings.n_predict {
            break FinishReason::Length;
        }
        let token = sampler.sample(&logits);
        tokens.push(token);
        if !on_token(token) {
            break FinishReason::Interrupted;
        }
        if settings.stop.contains(&token) {
            break FinishReason::Stop;
        }
        if tokens.len() >= settings.n_predict || engine.len() >= context {
            break FinishReason::Length;
        }
        logits = engine.decode(token)?;
        decode_time = decode.elapsed().saturating_sub(engine.audit_time());
        let now = engine.account();
        timeline.push((tokens.len(), now.bytes.minus(last.bytes)));
        last = now;
    };
    let n_decoded = timeline.len() as u64;
    let bytes = last.bytes.minus(before.bytes);
    let of_host = last.host_parts_since(&before);
    let speeds = engine.speeds()?;
    let (limit_seconds, limit) = speeds.limit(bytes, of_host);
    let seconds = decode_time.as_secs_f64();
    let (hits, misses) = (last.cache_hits - before.cache_hits, last.cache_misses - before.cache_misses);
    let ratio = |a: u64, b: u64| (b > 0).then(|| a as f64 / b as f64);
    Ok(RunReport {
        tokens,
        prompt_tokens: prompt.len(),
        finish_reason,
        mode: engine.mode(),
        prompt_tok_s: prompt.len() as f64 / ttft.as_secs_f64(),
        decode_tok_s: if seconds > 0.0 { n_decoded as f64 / seconds } else { 0.0 },
        ttft_s: ttft.as_secs_f64(),
        bytes_per_token: bytes.per_token(n_decoded),
        cache_hit_rate: ratio(hits, hits + misses),
        computed_share: ratio(
            last.neurons_computed - before.neurons_computed,
            last.neurons_total - before.neurons_total,
        )
        .unwrap_or(0.0),
        foreseen_used: ratio(last.foreseen_used - before.foreseen_used, last.foreseen - before.foreseen),
        disk_wait_share: if seconds > 0.0 { (last.disk_wait - before.disk_wait).as_secs_f64() / seconds } else { 0.0 },
        link_bytes_per_token: of_host.per_token(n_decoded).link,
        bytes_per_second: speeds,
        limit_share: if seconds > 0.0 { limit_seconds / seconds } else { 0.0 },
        limit,
        peak_rss_bytes: peak_rss_bytes(),
        audit: engine.audit(),
        timeline,
    })
}
