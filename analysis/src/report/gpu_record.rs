//! What `bench --json` prints where there is a GPU. Unlike in older kinds of files, what every such record has must be
//! there: a zero in its place would be drawn as if it were measured.

use super::Tiers;
use super::quantity::{amount, amount_or_none, amounts, share, share_or_none};
use serde::Deserialize;

/// The file. Speeds are in tokens or bytes a second, sizes in bytes.
#[derive(Debug, Clone, Deserialize)]
pub struct GpuBenchFile {
    /// The JSON file's name.
    #[serde(skip)]
    pub name: String,
    /// The model's name.
    pub model: String,
    /// Whether its activations are planted; older records leave that to the model's name.
    pub planted: Option<bool>,
    /// What was measured.
    pub settings: GpuSettings,
    /// The device.
    pub device: String,
    /// Threads that compute cold neurons.
    pub n_threads: usize,
    /// Speeds of the tiers, each alone.
    pub hardware: GpuAlone,
    /// What lay where.
    pub plan: GpuPlanned,
    /// The threads' share of the cold neurons that are not cached.
    #[serde(deserialize_with = "share")]
    pub host_share: f64,
    /// Prompt speed.
    pub prompt_tok_s: GpuTiming,
    /// Decode speed.
    pub decode_tok_s: GpuTiming,
    /// What the plan promised.
    pub predicted: GpuPromise,
    /// Bytes per decoded token.
    pub bytes_per_token: Tiers,
    /// The part of `bytes_per_token.host` that went over the link.
    pub link_bytes_per_token: u64,
    /// Over the link while decoding.
    #[serde(default, deserialize_with = "amount_or_none")]
    pub link_bytes_per_second: Option<f64>,
    /// By the threads while decoding.
    #[serde(default, deserialize_with = "amount_or_none")]
    pub host_bytes_per_second: Option<f64>,
    /// Share of the needed cold neurons that the cache held.
    #[serde(default, deserialize_with = "share_or_none")]
    pub cache_hit_rate: Option<f64>,
    /// Share of the physical limit.
    #[serde(deserialize_with = "amount")]
    pub limit_share: f64,
    /// What limits.
    pub limit: String,
    /// Device memory that the driver counts as taken.
    pub device_used_bytes: Option<u64>,
    /// Whether the CPU's share was given; in records that do not say it, see the command.
    pub host_share_given: Option<bool>,
    /// Arguments of the program.
    #[serde(default)]
    pub command: Vec<String>,
}

/// How much was measured.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct GpuSettings {
    /// Tokens of the prompt.
    pub n_prompt: usize,
    /// Generated tokens.
    pub n_gen: usize,
    /// Whether these were the model's own choice.
    #[serde(default)]
    pub greedy: bool,
}

/// Speeds of the tiers, each alone, in bytes a second.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct GpuAlone {
    /// Device memory.
    #[serde(default, deserialize_with = "amount_or_none")]
    pub device: Option<f64>,
    /// The link; `None` if nothing is read over it.
    #[serde(default, deserialize_with = "amount_or_none")]
    pub link: Option<f64>,
    /// The threads; 0 without them.
    #[serde(default, deserialize_with = "amount_or_none")]
    pub host: Option<f64>,
}

/// The plan, as far as it is shown.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct GpuPlanned {
    /// What was asked for.
    pub request: GpuAsked,
    /// Bytes of the cache, which may be nothing.
    pub cache_bytes: Option<u64>,
    /// Bits of the sketches that choose; older records do not say it.
    #[serde(default)]
    pub sketch_bits: Option<[u8; 3]>,
}

/// What a plan was asked for.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct GpuAsked {
    /// What the CPU's plans have too.
    pub base: Asked,
    /// Device memory that may be taken.
    pub vram_budget_bytes: u64,
    /// Share of the memory for neurons that is cache, if it was given.
    #[serde(default, deserialize_with = "share_or_none")]
    pub cache_share: Option<f64>,
    /// Neurons that were fetched before it was known whether they are needed, if that was given.
    #[serde(default)]
    pub lookahead: Option<u64>,
    /// Layers that were left to the host's threads, if that was given.
    #[serde(default)]
    pub host_layers: Option<u64>,
}

/// What any plan is asked for.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct Asked {
    /// How neurons are chosen.
    pub mode: AskedMode,
    /// Limit of host memory, if there was one.
    pub ram_budget_bytes: Option<u64>,
    /// Tokens of context.
    pub context: usize,
}

/// How neurons are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(tag = "mode", rename_all = "lowercase")]
pub enum AskedMode {
    /// Every neuron.
    Exact,
    /// The predicted share of each layer.
    Sparse {
        /// That share.
        #[serde(deserialize_with = "share")]
        active: f64,
    },
}

/// Tokens a second over the repetitions.
#[derive(Debug, Clone, Deserialize)]
pub struct GpuTiming {
    /// One number a repetition.
    #[serde(default, deserialize_with = "amounts")]
    pub runs: Vec<f64>,
    /// Median of the repetitions.
    #[serde(deserialize_with = "amount")]
    pub median: f64,
}

/// What a plan promised.
#[derive(Debug, Clone, Deserialize)]
pub struct GpuPromise {
    /// Tokens a second.
    #[serde(deserialize_with = "amount")]
    pub tok_s: f64,
    /// The share that link and threads would have to take to be ready together.
    #[serde(deserialize_with = "share")]
    pub host_share: f64,
}

/// How the threads' share of the cold neurons came about.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum CpuShare {
    /// The device reads them all.
    Off,
    /// Found when the model was loaded.
    Auto,
    /// Given.
    Given(f64),
}

impl GpuBenchFile {
    /// Field and reason of what contradicts itself, if anything does.
    pub(super) fn contradiction(&self) -> Option<(&'static str, &'static str)> {
        let too_much = self.link_bytes_per_token > self.bytes_per_token.host;
        too_much.then_some(("link_bytes_per_token", "is more than bytes_per_token.host, of which it is a part"))
    }

    /// Whether the model's activations are planted.
    pub fn is_planted(&self) -> bool {
        self.planted.unwrap_or_else(|| planted_by_name(&self.model))
    }

    /// Share of each layer's neurons that are computed; `None` in exact mode.
    pub fn active(&self) -> Option<f64> {
        match self.plan.request.base.mode {
            AskedMode::Exact => None,
            AskedMode::Sparse { active } => Some(active),
        }
    }

    /// What the bytes of a token allow at the measured speeds of the tiers, in tokens a second; `None` if that is not
    /// known.
    pub fn limit_tok_s(&self) -> Option<f64> {
        Some(self.decode_tok_s.median / self.limit_share).filter(|limit| limit.is_finite() && *limit > 0.0)
    }

    /// Bytes per token that the CPU's threads read.
    pub fn cpu_bytes_per_token(&self) -> u64 {
        self.bytes_per_token.host.saturating_sub(self.link_bytes_per_token)
    }

    /// Slowest and fastest repetition of decoding.
    pub fn range(&self) -> Option<(f64, f64)> {
        let runs = self.decode_tok_s.runs.iter();
        Some((runs.clone().copied().reduce(f64::min)?, runs.copied().reduce(f64::max)?))
    }

    /// How the threads' share came about.
    pub fn cpu_share(&self) -> CpuShare {
        let in_command = || {
            let mut arguments = self.command.iter().skip_while(|a| !a.starts_with("--cpu-share"));
            let flag = arguments.next().map(String::as_str);
            let value = flag.and_then(|f| f.split_once('=')).map(|(_, v)| v).or(arguments.next().map(String::as_str));
            flag.is_some() && value != Some("auto")
        };
        match self.host_share {
            0.0 => CpuShare::Off,
            share if self.host_share_given.unwrap_or_else(in_command) => CpuShare::Given(share),
            _ => CpuShare::Auto,
        }
    }
}

/// Planted models have been named so from the start.
pub(super) fn planted_by_name(model: &str) -> bool {
    model.starts_with("planted-")
}
