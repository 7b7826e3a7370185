//! What a report is made of: folders and JSON files, told apart by what is in them.

use super::Neurons;
use crate::eval::Evaluation;
use crate::{Error, Result};
use serde::Deserialize;
use serde_json::Value;
use std::path::{Path, PathBuf};
use thermocline_calibrate::Profile;
use thermocline_split::Split;

/// No JSON that this program writes is larger: a run's timeline of a million tokens would not need it.
const JSON_BYTES_MAX: u64 = 256 << 20;

/// Everything that was given.
#[derive(Debug, Default)]
pub struct Inputs {
    /// Statistics of neurons, of profiles and splits.
    pub neurons: Vec<Neurons>,
    /// Evaluations.
    pub evals: Vec<EvalFile>,
    /// Runs.
    pub runs: Vec<RunFile>,
    /// Benches.
    pub benches: Vec<BenchFile>,
}

/// What `eval --json` printed.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct EvalFile {
    /// One result a mask.
    pub results: Vec<Evaluation>,
    /// The model's file name.
    pub model: String,
    /// Digest of the split or checkpoint.
    pub model_digest: String,
    /// How neurons are encoded, or `checkpoint`.
    pub encoding: String,
    /// The text's file name.
    pub text: String,
    /// Tokens in a window.
    pub ctx: usize,
    /// Windows.
    pub windows: usize,
    /// Arguments of the program.
    pub command: Vec<String>,
}

/// Bytes of weights, by where they lay.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default)]
pub struct Tiers {
    /// Device memory.
    pub device: u64,
    /// Cache slots.
    pub cache: u64,
    /// RAM.
    pub host: u64,
    /// Disk.
    pub disk: u64,
}

/// What `run --json` printed; what is missing there is zero here.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct RunFile {
    /// The JSON file's name.
    #[serde(skip)]
    pub name: String,
    /// `{"mode": "exact"}` or `{"mode": "sparse", "active": s}`.
    pub mode: Value,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Prompt tokens a second.
    pub prompt_tok_s: f64,
    /// Generated tokens a second.
    pub decode_tok_s: f64,
    /// Bytes per decoded token.
    pub bytes_per_token: Tiers,
    /// Share of needed cold neurons that the cache held.
    pub cache_hit_rate: Option<f64>,
    /// Share of the neurons that were computed.
    pub computed_share: f64,
    /// Share of the physical limit.
    pub limit_share: f64,
    /// Which limit.
    pub limit: String,
    /// Largest resident set, if the process did nothing else.
    pub peak_rss_bytes: Option<u64>,
    /// (token, bytes).
    pub timeline: Vec<(usize, Tiers)>,
    /// The plan, as it was printed.
    pub plan: Value,
    /// Arguments of the program, if they were kept.
    pub command: Vec<String>,
}

/// A measurement with its spread.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default)]
pub struct Speed {
    /// Median of the repetitions.
    pub median: f64,
    /// Standard deviation over mean.
    pub spread: f64,
}

/// What a plan promised.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Planned {
    /// Tokens a second.
    pub tok_s: f64,
    /// The same with RAM at full speed.
    pub limit_tok_s: f64,
    /// What bounds it.
    pub bottleneck: String,
    /// How it was computed.
    pub formula: String,
}

/// What `bench --json` printed.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct BenchFile {
    /// The JSON file's name.
    #[serde(skip)]
    pub name: String,
    /// The model's file name.
    pub model: String,
    /// The processor.
    pub cpu: String,
    /// Its instruction set, as used.
    pub isa: String,
    /// Prompt speed.
    pub prompt_tok_s: Speed,
    /// Decode speed.
    pub decode_tok_s: Speed,
    /// What the plan said.
    pub predicted: Planned,
    /// Bytes per decoded token.
    pub bytes_per_token: Tiers,
    /// Share of the physical limit.
    pub limit_share: f64,
    /// Largest resident set.
    pub peak_rss_bytes: u64,
    /// The plan, as it was printed.
    pub plan: Value,
    /// Arguments of the program.
    pub command: Vec<String>,
}

impl Inputs {
    /// Reads every path: split and profile directories, and JSON files of `eval`, `run` and `bench`.
    ///
    /// # Errors
    /// If one cannot be read or is none of these.
    pub fn read(paths: &[PathBuf]) -> Result<Self> {
        let mut inputs = Inputs::default();
        paths.iter().try_for_each(|path| inputs.add(path))?;
        Ok(inputs)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        if path.join("manifest.json").exists() {
            self.neurons.push(Neurons::of_split(&Split::open(path)?)?);
            return Ok(());
        }
        if path.join("profile.json").exists() {
            self.neurons.push(Neurons::of_profile(&Profile::open(path)?)?);
            return Ok(());
        }
        let io = |source| Error::Io { path: path.to_owned(), source };
        let metadata = std::fs::metadata(path).map_err(io)?;
        let refused = |reason: String| Error::Input { path: path.to_owned(), reason };
        let accepted = "a report is made from split and profile directories and from what eval, run and bench print \
                        with --json";
        if metadata.is_dir() {
            return Err(refused(format!("this folder is neither a split nor a profile; {accepted}")));
        }
        if metadata.len() > JSON_BYTES_MAX {
            return Err(refused(format!("{} bytes are no result of this program; {accepted}", metadata.len())));
        }
        let text = std::fs::read(path).map_err(io)?;
        let value: Value = serde_json::from_slice(&text).map_err(|e| refused(format!("no JSON ({e}); {accepted}")))?;
        let name = path.file_stem().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let damaged = |e: serde_json::Error| refused(format!("a field is not as this program writes it: {e}"));
        if value.get("perplexity").is_some() {
            let mut file: EvalFile = serde_json::from_value(value.clone()).map_err(damaged)?;
            if file.results.is_empty() {
                file.results.push(serde_json::from_value(value).map_err(damaged)?);
            }
            self.evals.push(file);
        } else if value.get("timeline").is_some() {
            let run: RunFile = serde_json::from_value(value).map_err(damaged)?;
            self.runs.push(RunFile { name, ..run });
        } else if value.get("predicted").is_some() && value.get("decode_tok_s").is_some() {
            let bench: BenchFile = serde_json::from_value(value).map_err(damaged)?;
            self.benches.push(BenchFile { name, ..bench });
        } else {
            return Err(refused(format!("this JSON is of none of the kinds that are drawn; {accepted}")));
        }
        Ok(())
    }
}
