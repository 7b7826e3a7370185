//! What a report is made of: folders and JSON files, told apart by what is in them.

use super::gpu_record::planted_by_name;
use super::quantity::{amount, amount_or_none, share_or_none};
use super::{GpuBenchFile, Neurons};
use crate::eval::{Evaluation, TaskResult};
use crate::{Error, PlanesStudy, Result};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::path::{Path, PathBuf};
use thermocline_calibrate::Profile;
use thermocline_datasets::planted::Measured;
use thermocline_split::Split;

/// No JSON that this program writes is larger: a run's timeline of a million tokens would not need it.
const JSON_BYTES_MAX: u64 = 256 << 20;

/// A bench with one of these was on a GPU.
const GPU_FIELDS: [&str; 3] = ["device", "device_used_bytes", "link_bytes_per_second"];

/// Everything that was given.
#[derive(Debug, Default)]
pub struct Inputs {
    /// Statistics of neurons, of profiles and splits.
    pub neurons: Vec<Neurons>,
    /// Evaluations.
    pub evals: Vec<EvalFile>,
    /// Evaluations on tasks.
    pub tasks: Vec<TasksFile>,
    /// Runs.
    pub runs: Vec<RunFile>,
    /// Benches on the CPU.
    pub benches: Vec<BenchFile>,
    /// Benches on a GPU.
    pub gpu_benches: Vec<GpuBenchFile>,
    /// Planted models.
    pub planted: Vec<PlantedFile>,
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
    /// Digest of the checkpoint that it is, or was split from; older records have none.
    pub source_digest: String,
    /// How neurons are encoded, or `checkpoint`.
    pub encoding: String,
    /// The text's file name.
    pub text: String,
    /// Tokens in a window.
    pub ctx: usize,
    /// Windows.
    pub windows: usize,
    /// What it was compared with, if that was not the model itself.
    pub reference: Option<String>,
    /// Arguments of the program.
    pub command: Vec<String>,
    /// What planes take, if these are what was compared.
    pub study: Option<PlanesStudy>,
}

/// What `eval --task --json` printed.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct TasksFile {
    /// One a task.
    pub tasks: Vec<TaskRecord>,
    /// The model's file name.
    pub model: String,
    /// How neurons are encoded, or `checkpoint`.
    pub encoding: String,
    /// Where masks were applied: `all` or `decoded`.
    pub positions: String,
    /// Arguments of the program.
    pub command: Vec<String>,
}

/// One task's results.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct TaskRecord {
    /// `lambada` or `cloze`.
    pub task: String,
    /// The name of its file.
    pub file: String,
    /// How many were asked.
    pub examples: usize,
    /// One a mask.
    pub results: Vec<TaskResult>,
}

/// Bytes of weights, by where they lay; all four are always written.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
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
    /// The model's name; older records have none.
    pub model: Option<String>,
    /// Whether its activations are planted; older records say so in a warning.
    pub planted: Option<bool>,
    /// What the run was warned of.
    pub warnings: Vec<String>,
    /// `{"mode": "exact"}` or `{"mode": "sparse", "active": s}`.
    pub mode: Value,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Prompt tokens a second.
    #[serde(deserialize_with = "amount")]
    pub prompt_tok_s: f64,
    /// Generated tokens a second.
    #[serde(deserialize_with = "amount")]
    pub decode_tok_s: f64,
    /// Bytes per decoded token.
    pub bytes_per_token: Tiers,
    /// With a GPU: the part of `bytes_per_token.host` that went over the link.
    pub link_bytes_per_token: Option<u64>,
    /// Share of needed cold neurons that the cache held.
    #[serde(deserialize_with = "share_or_none")]
    pub cache_hit_rate: Option<f64>,
    /// Share of the neurons that were computed.
    #[serde(deserialize_with = "amount")]
    pub computed_share: f64,
    /// Share of the physical limit.
    #[serde(deserialize_with = "amount")]
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
    #[serde(deserialize_with = "amount")]
    pub median: f64,
    /// Standard deviation over mean.
    #[serde(deserialize_with = "amount_or_none")]
    pub spread: Option<f64>,
}

/// What a plan promised.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Planned {
    /// Tokens a second.
    #[serde(deserialize_with = "amount")]
    pub tok_s: f64,
    /// The same with RAM at full speed.
    #[serde(deserialize_with = "amount")]
    pub limit_tok_s: f64,
    /// What bounds it.
    pub bottleneck: String,
    /// How it was computed.
    pub formula: String,
}

/// What `bench --json` printed on the CPU.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct BenchFile {
    /// The JSON file's name.
    #[serde(skip)]
    pub name: String,
    /// The model's file name.
    pub model: String,
    /// Whether its activations are planted; older records leave that to the model's name.
    pub planted: Option<bool>,
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
    #[serde(deserialize_with = "amount")]
    pub limit_share: f64,
    /// Largest resident set.
    pub peak_rss_bytes: u64,
    /// The plan, as it was printed.
    pub plan: Value,
    /// Arguments of the program.
    pub command: Vec<String>,
}

/// What `split --planted --json` printed.
#[derive(Debug, Clone, Deserialize)]
pub struct PlantedFile {
    /// The model's name.
    pub model: String,
    /// Its size.
    pub bytes: u64,
    /// What its trace and its predictors give.
    pub measured: Measured,
}

impl RunFile {
    /// Whether the model's activations are planted.
    pub fn is_planted(&self) -> bool {
        self.planted.unwrap_or_else(|| self.warnings.iter().any(|w| w.contains("with planted activations")))
    }
}

impl BenchFile {
    /// Whether the model's activations are planted.
    pub fn is_planted(&self) -> bool {
        self.planted.unwrap_or_else(|| planted_by_name(&self.model))
    }
}

/// A file as one kind of record.
fn record<T: DeserializeOwned>(path: &Path, value: Value) -> Result<T> {
    serde_path_to_error::deserialize(value).map_err(|e| {
        let (mut field, mut reason) = (e.path().to_string(), e.inner().to_string());
        // A missing field is reported for what it should lie in.
        if let Some(missing) = reason.strip_prefix("missing field `").and_then(|r| r.strip_suffix('`')) {
            field = if field == "." { missing.to_owned() } else { format!("{field}.{missing}") };
            reason = "is missing".to_owned();
        }
        Error::Field { path: path.to_owned(), field, reason }
    })
}

impl Inputs {
    /// Reads every path: split and profile directories, and JSON files of `eval`, `run`, `bench` and `split --planted`.
    ///
    /// # Errors
    /// If one cannot be read, is none of these, or has a field that this program does not write so.
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
        let accepted = "a report is made from split and profile directories and from what eval, run, bench and split \
                        --planted print with --json";
        if metadata.is_dir() {
            return Err(refused(format!("this folder is neither a split nor a profile; {accepted}")));
        }
        if metadata.len() > JSON_BYTES_MAX {
            return Err(refused(format!("{} bytes are no result of this program; {accepted}", metadata.len())));
        }
        let text = std::fs::read(path).map_err(io)?;
        let value: Value = serde_json::from_slice(&text).map_err(|e| refused(format!("no JSON ({e}); {accepted}")))?;
        let name = path.file_stem().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let has = |field: &str| value.get(field).is_some();
        if has("perplexity") {
            let mut file: EvalFile = record(path, value.clone())?;
            if file.results.is_empty() {
                file.results.push(record(path, value)?);
            }
            self.evals.push(file);
        } else if has("tasks") {
            self.tasks.push(record(path, value)?);
        } else if has("timeline") {
            self.runs.push(RunFile { name, ..record(path, value)? });
        } else if GPU_FIELDS.into_iter().any(has) {
            let bench: GpuBenchFile = record(path, value)?;
            if let Some((field, reason)) = bench.contradiction() {
                return Err(Error::Field { path: path.to_owned(), field: field.to_owned(), reason: reason.to_owned() });
            }
            self.gpu_benches.push(GpuBenchFile { name, ..bench });
        } else if has("predicted") && has("decode_tok_s") {
            self.benches.push(BenchFile { name, ..record(path, value)? });
        } else if has("measured") && has("ffn_bytes") {
            self.planted.push(record(path, value)?);
        } else {
            return Err(refused(format!("this JSON is of none of the kinds that are drawn; {accepted}")));
        }
        Ok(())
    }
}
