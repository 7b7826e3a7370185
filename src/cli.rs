//! Every flag of every verb, with its help; what they mean is in `verb/`.

use crate::exit::Usage;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, FromArgMatches, Parser, Subcommand, ValueEnum};
#[cfg(feature = "analysis")]
use std::num::NonZeroUsize;
use std::path::PathBuf;
#[cfg(feature = "analysis")]
use thermocline_analysis::eval::{TaskFile, TaskKind};
use thermocline_kernels::Encoding;
use thermocline_runtime::budget::parse_budget;
use thermocline_split::{LayerEncodings, Planes};

/// Below the list of verbs.
const ORDER_OF_SETTINGS: &str = "A flag wins over the environment (THERMOCLINE_*), that over the settings file, that over \
     the default. In the file a key is a flag's name: `threads = 2` for all verbs, `temp = 0.5` under [run] for one. \
     `thermocline doctor` says which file is in effect.";

/// Runs language models that do not fit in memory: hot neurons stay, cold ones are read when they are needed.
///
/// The usual order: calibrate a model over a corpus, split it with that profile, run the split.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, max_term_width = 100, after_help = ORDER_OF_SETTINGS)]
pub struct Cli {
    /// Settings file (TOML), instead of thermocline/config.toml in $XDG_CONFIG_HOME or ~/.config
    #[arg(long, global = true, value_name = "PATH", env = "THERMOCLINE_CONFIG", display_order = 900)]
    pub config: Option<PathBuf>,
    #[command(subcommand)]
    pub verb: Verb,
}

impl Cli {
    /// What was parsed. Of `--active` and `--max-ppl-increase` the one from the stronger source counts: a flag, the environment, a
    /// settings file; in a file `--max-ppl-increase`, which is then, as `--active` is, not for exact mode.
    ///
    /// # Errors
    /// [`Usage`] if both are from one source, which is no file.
    pub fn from_matches(matches: &mut ArgMatches) -> Result<Self, Usage> {
        let source = |id: &str| {
            let (_, verb) = matches.subcommand()?;
            verb.try_contains_id(id).ok().and_then(|_| verb.value_source(id))
        };
        let (active, increase) = (source("active"), source("max_ppl_increase"));
        let mut cli = Self::from_arg_matches_mut(matches).unwrap_or_else(|error| error.exit());
        if let (Some(increase), Some(placement)) = (increase, cli.verb.placement()) {
            let of_file = increase == ValueSource::DefaultValue;
            if active == Some(increase) && !of_file {
                let text = "--max-ppl-increase finds --active: give one of them, not both";
                return Err(Usage(text.to_owned()));
            }
            if active > Some(increase) || (of_file && placement.mode == ModeName::Exact) {
                placement.max_ppl_increase = None;
            }
        }
        Ok(cli)
    }
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Calibrate, split, run, evaluate and report on a small model, in under three minutes
    #[cfg(feature = "analysis")]
    Demo(Demo),
    /// Answer a prompt with a split model
    Run(Run),
    /// Profile how often each neuron fires over a corpus
    #[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
    Calibrate(Calibrate),
    /// Pack a model hot-first, with the help of a profile
    Split(Split),
    /// Store a fine-tuned model as what differs from its base, bit for bit
    Delta(Delta),
    /// Show what fits where for a budget, and how fast that should be
    Plan(PlanArgs),
    /// Prove a split, or a base with a delta, against the checkpoint that it was made from
    Verify(Verify),
    /// Measure perplexity, KL divergence and recall on a text, or accuracy on zero-shot tasks
    #[cfg(feature = "analysis")]
    Eval(Eval),
    /// Measure prompt and generation speed, beside the planned ones
    Bench(Bench),
    /// Draw one offline HTML page from a split or profile, evaluations and runs
    #[cfg(feature = "analysis")]
    Report(Report),
    /// Show what is inside a split, a profile, a delta or a checkpoint
    Inspect(Inspect),
    /// Show what this machine can do, and what is missing
    Doctor(Doctor),
    /// Print a completion script for a shell
    Completions(Completions),
}

impl Verb {
    /// What decides the plan, of verbs that have one.
    fn placement(&mut self) -> Option<&mut Placement> {
        match self {
            Verb::Run(Run { placement, .. })
            | Verb::Plan(PlanArgs { placement, .. })
            | Verb::Bench(Bench { placement, .. }) => Some(placement),
            _ => None,
        }
    }
}

#[derive(Debug, Args)]
pub struct Demo {
    /// Model to use [default: a small ReLU model that is built in]
    #[arg(short, long, env = "THERMOCLINE_MODEL")]
    pub model: Option<PathBuf>,
    /// Text to calibrate and evaluate on [default: a text that is built in]
    #[arg(long)]
    pub corpus: Option<String>,
    /// Folder for everything that is made
    #[arg(short, long, default_value = "thermocline-demo")]
    pub output: PathBuf,
    #[command(flatten)]
    pub threads: Threads,
}

#[derive(Debug, Clone, Copy, Args)]
pub struct Threads {
    /// Threads that compute [default: all cores]
    #[arg(short = 't', long, value_name = "N", env = "THERMOCLINE_THREADS")]
    pub threads: Option<usize>,
}

impl Threads {
    pub fn count(self) -> usize {
        self.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into))
    }

    /// The count, if it is one that makes sense.
    pub fn checked(self) -> Result<usize, Usage> {
        match self.count() {
            n @ 1..=1024 => Ok(n),
            n => Err(Usage(format!("-t: {n} threads; give 1 to 1024"))),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ModeName {
    /// Every neuron that is not provably zero: the dense model's output
    Exact,
    /// The predicted top share of the neurons
    Sparse,
}

/// What decides the plan.
#[derive(Debug, Clone, Args)]
pub struct Placement {
    /// Split directory
    #[arg(short, long, value_name = "SPLIT", env = "THERMOCLINE_MODEL")]
    pub model: PathBuf,
    /// How neurons are chosen
    #[arg(long, value_enum, default_value = "exact", env = "THERMOCLINE_MODE")]
    pub mode: ModeName,
    /// Share of each layer's neurons, or of their bytes, that sparse mode reads, above 0 and at most 1; of those that are not always
    /// computed
    #[arg(long, value_name = "SHARE", default_value_t = 0.3, env = "THERMOCLINE_ACTIVE")]
    pub active: f32,
    /// In sparse mode, of a split with sketches: share of each layer's neurons, the hottest, that every token computes, so that
    /// no sketch of them is in memory: 0 to 1, or auto, which on a GPU is what fits into VRAM, on a CPU 0
    #[arg(long, default_value = "auto", value_parser = parse_share, value_name = "SHARE", env = "THERMOCLINE_ALWAYS")]
    pub always: std::option::Option<f64>,
    /// In sparse mode, of a split with sketches: compute fewer than --active of a layer's neurons where that is expected to change
    /// its output by less than this, relative to its neurons' energy. For models whose neurons are mostly zero
    #[arg(long, value_name = "ERROR")]
    pub max_error: Option<f32>,
    /// Instead of --active, in sparse mode: the least share at which the perplexity of the text that --fit-shares was given rose
    /// by no more than this over the dense model's, 5% or 0.05, by the upper end of its 95 % interval
    #[arg(long, value_name = "INCREASE", value_parser = parse_increase, env = "THERMOCLINE_MAX_PPL_INCREASE")]
    pub max_ppl_increase: Option<f64>,
    /// Planes of the weights that are read, where the split has several: base, plus (with the coarse plane), or exact (the
    /// checkpoint's bits); plus@SHARE or exact@SHARE: of this share of each layer's neurons, the first ones in the split's
    /// order, and the base of all other weights
    #[arg(long, default_value = "base", value_name = "PLANES", env = "THERMOCLINE_PRECISION")]
    pub precision: Planes,
    /// Delta directory: run the model that it makes of the split's; the split must have the base's bits
    #[arg(long, value_name = "DIR", env = "THERMOCLINE_DELTA")]
    pub delta: Option<PathBuf>,
    /// RAM for weights, caches and buffers: 8 (GiB), 64MiB, or auto, which holds everything; the rest stays on disk
    #[arg(long, default_value = "auto", value_parser = parse_budget, env = "THERMOCLINE_RAM_BUDGET")]
    pub ram_budget: std::option::Option<u64>,
    /// VRAM for everything that the process takes there: 16 (GiB), 8GiB, auto, which is most of what is free, or 0, which
    /// runs on the CPU
    #[arg(long, default_value = "auto", value_parser = parse_vram, env = "THERMOCLINE_VRAM_BUDGET")]
    pub vram_budget: VramBudget,
    /// With a GPU: share of the neurons that are neither in VRAM nor cached which the CPU's threads compute, 0 to 1, or
    /// auto, which follows the measured speeds
    #[arg(long, default_value = "auto", value_parser = parse_share, value_name = "SHARE", env = "THERMOCLINE_CPU_SHARE")]
    pub cpu_share: std::option::Option<f64>,
    /// With a GPU: share of the VRAM left for neurons that caches those of late, 0 to 1, or auto, which replays the
    /// split's trace
    #[arg(long, default_value = "auto", value_parser = parse_share, value_name = "SHARE", env = "THERMOCLINE_CACHE_SHARE")]
    pub cache_share: std::option::Option<f64>,
    /// With a GPU: neurons of each layer that are fetched over the link while attention is computed, before it is known
    /// which are needed: a number, 0 for none, or auto, which tries several
    #[arg(long, default_value = "auto", value_parser = parse_lookahead, value_name = "NEURONS", env = "THERMOCLINE_LOOKAHEAD")]
    pub lookahead: std::option::Option<usize>,
    /// With a GPU: layers of which the CPU's threads choose and compute all neurons, of those whose sketches VRAM has no room for: a
    /// number, or auto, which tries several; the sketches of the others are copied over the link for every token
    #[arg(long, default_value = "auto", value_parser = parse_layers, value_name = "LAYERS", env = "THERMOCLINE_CPU_LAYERS")]
    pub cpu_layers: std::option::Option<usize>,
    /// Context length in tokens, prompt included [default: what prompt and answer need; plan: 512]
    #[arg(short = 'c', long, value_name = "TOKENS", env = "THERMOCLINE_CTX_SIZE")]
    pub ctx_size: Option<usize>,
    #[command(flatten)]
    pub threads: Threads,
}

/// Where to compute, and with how much memory of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VramBudget {
    /// Most of what is free, if there is a GPU; else the CPU.
    Auto,
    /// The CPU.
    None,
    /// So many bytes.
    Bytes(u64),
}

fn parse_vram(text: &str) -> Result<VramBudget, String> {
    if text.trim() == "0" {
        return Ok(VramBudget::None);
    }
    Ok(parse_budget(text)?.map_or(VramBudget::Auto, VramBudget::Bytes))
}

/// A share, or `auto`.
fn parse_share(text: &str) -> Result<std::option::Option<f64>, String> {
    if text.eq_ignore_ascii_case("auto") {
        return Ok(None);
    }
    match text.parse::<f64>() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(Some(share)),
        _ => Err(format!("{text:?}: expected a share from 0 to 1, or auto")),
    }
}

/// A relative increase: a percentage, or a number below 1.
fn parse_increase(text: &str) -> Result<f64, String> {
    let (number, is_percent) = match text.strip_suffix('%') {
        Some(number) => (number.trim_end(), true),
        None => (text, false),
    };
    match number.parse::<f64>() {
        Ok(n) if is_percent && n >= 0.0 && n.is_finite() => Ok(n / 100.0),
        Ok(n) if (0.0..1.0).contains(&n) => Ok(n),
        // 5 may be meant as either.
        Ok(n) if !is_percent && n >= 1.0 => {
            Err(format!("{text:?}: write {text}% for a percentage, or a number below 1"))
        }
        _ => Err(format!("{text:?}: expected an increase such as 5% or 0.05, not negative")),
    }
}

/// A number of neurons, or `auto`.
fn parse_lookahead(text: &str) -> Result<std::option::Option<usize>, String> {
    parse_number_of("neurons", text)
}

/// A number of layers, or `auto`.
fn parse_layers(text: &str) -> Result<std::option::Option<usize>, String> {
    parse_number_of("layers", text)
}

fn parse_number_of(what: &str, text: &str) -> Result<std::option::Option<usize>, String> {
    if text.eq_ignore_ascii_case("auto") {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| format!("{text:?}: expected a number of {what}, or auto"))
}

#[derive(Debug, Args)]
pub struct Run {
    #[command(flatten)]
    pub placement: Placement,
    /// Prompt; this or --file must be given
    #[arg(short, long, required_unless_present = "file", value_name = "TEXT")]
    pub prompt: Option<String>,
    /// File with the prompt
    #[arg(short, long, conflicts_with = "prompt")]
    pub file: Option<PathBuf>,
    /// Tokens to generate
    #[arg(short = 'n', long, default_value_t = 128, env = "THERMOCLINE_PREDICT")]
    pub predict: usize,
    /// Put the prompt through the model's chat template, as a user's message
    #[arg(long)]
    pub chat: bool,
    /// System message, with --chat
    #[arg(long, requires = "chat")]
    pub system: Option<String>,
    /// Go on after the model ends its answer
    #[arg(long)]
    pub ignore_eos: bool,
    /// Seed of the sampler
    #[arg(short, long, default_value_t = 0, env = "THERMOCLINE_SEED")]
    pub seed: u64,
    /// Temperature; 0 is greedy
    #[arg(long, default_value_t = 0.8, env = "THERMOCLINE_TEMP")]
    pub temp: f32,
    /// Keep the k likeliest tokens; 0 keeps all
    #[arg(long, default_value_t = 40, env = "THERMOCLINE_TOP_K")]
    pub top_k: usize,
    /// Keep the likeliest tokens that make up this probability
    #[arg(long, default_value_t = 0.95, env = "THERMOCLINE_TOP_P")]
    pub top_p: f32,
    /// Drop tokens that are less likely than this times the likeliest; 0 drops none
    #[arg(long, default_value_t = 0.05, env = "THERMOCLINE_MIN_P")]
    pub min_p: f32,
    /// Penalty on tokens that came up lately; 1 is off
    #[arg(long, default_value_t = 1.0, env = "THERMOCLINE_REPEAT_PENALTY")]
    pub repeat_penalty: f32,
    /// In sparse mode: tell how good the choice of neurons is. Of the first decoded token, and of every N-th after it, all
    /// neurons are computed as well, and compared; what comes out stays the same. 0: never
    #[arg(long, default_value_t = 0, value_name = "N", env = "THERMOCLINE_AUDIT_EVERY")]
    pub audit_every: usize,
    /// Read all weights first, and refuse a model with a wrong checksum, a weight that is not finite, or a tensor of zeros
    #[arg(long)]
    pub check_tensors: bool,
    /// Print one JSON value and nothing else
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Calibrate {
    #[command(subcommand)]
    pub merge: Option<CalibrateVerb>,
    /// Checkpoint: a .gguf file or a Hugging Face folder
    #[arg(short, long, required = true, env = "THERMOCLINE_MODEL")]
    pub model: Option<PathBuf>,
    /// Texts: plain text, .jsonl, .parquet; paths or globs
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    pub corpus: Vec<String>,
    /// Field of JSON lines or column of Parquet files that holds the text [default: text]
    #[arg(long)]
    pub column: Option<String>,
    /// Tokens to calibrate on
    #[arg(long, default_value_t = 65_536)]
    pub tokens: usize,
    /// Tokens in a window (attention sees one window)
    #[arg(long, default_value_t = 512)]
    pub window: usize,
    /// Profile directory to write
    #[arg(short, long, required = true)]
    pub output: Option<PathBuf>,
    /// Leave out what attention's rows are rounded by (split --rounding): 12 bytes times the hidden size squared for each layer, three
    /// quarters of a large model's profile
    #[arg(long)]
    pub no_attention_moments: bool,
    /// Continue an interrupted run
    #[arg(long)]
    pub resume: bool,
    /// Do only part i (from 0) of n, to be merged later
    #[arg(long, value_name = "i/n", value_parser = parse_shard)]
    pub shard: Option<(usize, usize)>,
    #[command(flatten)]
    pub threads: Threads,
    /// Print one JSON value and nothing else
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum CalibrateVerb {
    /// Put shards together; the result is the same as one run's, byte for byte
    Merge {
        /// Profiles of all shards
        #[arg(required = true)]
        profiles: Vec<PathBuf>,
        /// Profile directory to write
        #[arg(short, long)]
        output: PathBuf,
    },
}

fn parse_shard(text: &str) -> Result<(usize, usize), String> {
    let parts = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    parts.filter(|(i, n)| i < n).ok_or_else(|| format!("{text:?}: expected i/n with i from 0 to n-1"))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OrderName {
    /// What reads least, measured on the profile
    Auto,
    /// By activation rate
    Frequency,
    /// By co-activation cluster
    Coactivation,
    /// Shuffled, to compare with
    Random,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SketchBitsName {
    /// Two bits of gate and down rows, three of up rows, and scales
    #[value(name = "2.5")]
    UpInThree,
    /// Two bits of all rows, and scales
    #[value(name = "2.1")]
    AllInTwo,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ScalesName {
    /// Least squared error, weighted by size and with the profile's input moments
    Moments,
    /// Least squared error
    LeastSquares,
    /// The largest weight of a group, to compare with
    Absmax,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RoundingName {
    /// What a column loses is made good by later ones, as far as the profile's inputs allow (GPTQ); of gate, up and attention rows in q4
    /// and q8 without further planes
    Feedback,
    /// Each weight for itself, to compare with
    Nearest,
}

#[derive(Debug, Args)]
pub struct Split {
    /// Checkpoint: a .gguf file or a Hugging Face folder
    #[arg(short, long, required_unless_present = "planted", env = "THERMOCLINE_MODEL")]
    pub model: Option<PathBuf>,
    /// Profile of that checkpoint
    #[arg(long, required_unless_present = "planted")]
    pub profile: Option<PathBuf>,
    /// Split directory to write
    #[arg(short, long)]
    pub output: PathBuf,
    /// Encoding of the neurons: q4, q8, bf16; bf16x (bf16 with coded exponents, exact in two thirds of the bytes);
    /// q4+exact, q8+exact (with planes that lead to the exact bf16, used as --precision asks). Layers can have their own,
    /// q4,0-3=bf16x, and so can hot neurons, a share of each layer's: q4,hot@0.2=q8, or of some layers, 0-3:hot@0.2=q8. Of
    /// several that name a neuron the last one counts
    #[arg(long, default_value = "q4")]
    pub encoding: LayerEncodings,
    /// Encoding of embedding, attention and head [default: q8, or as exact as --encoding]
    #[arg(long)]
    pub resident_encoding: Option<Encoding>,
    /// Encoding of attention, if it is to be another: q4 takes about half of q8's bytes, of VRAM above all
    #[arg(long, value_name = "ENCODING")]
    pub attention_encoding: Option<Encoding>,
    /// Order of the neurons
    #[arg(long, value_enum, default_value = "auto")]
    pub order: OrderName,
    /// Share of each layer's neurons that come before all others because they give most to its output: --encoding
    /// q4,hot@0.02=q8 then keeps these in q8 [default: 0.02, or 0 for models whose neurons are mostly zero]
    #[arg(long, value_name = "SHARE")]
    pub outliers: Option<f64>,
    /// Neurons in a chunk [default: what reads fastest, from a cost model]
    #[arg(long)]
    pub chunk_neurons: Option<usize>,
    /// zstd level of the chunks that it shrinks; 0 stores all as they are
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(i32).range(0..=22))]
    pub zstd_level: i32,
    /// For keeping or sending: compress every chunk as far as it goes. Slower to read; any reader takes it
    #[arg(long, conflicts_with = "zstd_level")]
    pub archive: bool,
    /// Rank of the predictor, a multiple of 32 [default: a ninth of the hidden size]
    #[arg(long)]
    pub predictor_rank: Option<usize>,
    /// What the scales of quantised groups are fitted to
    #[arg(long, value_enum, default_value = "moments")]
    pub scales: ScalesName,
    /// How codes of quantised rows are found
    #[arg(long, value_enum, default_value = "feedback")]
    pub rounding: RoundingName,
    /// Also keep a copy of all neurons in 2.5 bits a weight. In sparse mode it is always in memory, tells which neurons a token
    /// needs, and stands for the others
    #[arg(long)]
    pub sketch: bool,
    /// With --sketch: bits of a weight of the copy. Fewer take less memory, are read faster, and diverge 1.5 to 1.8 times as much
    #[arg(long, requires = "sketch", value_enum, default_value = "2.5", value_name = "BITS")]
    pub sketch_bits: SketchBitsName,
    /// With --sketch: also keep what the copy leaves of each row, in 4.5 bits a weight. Sparse mode then reads single rows (see eval
    /// --fit-shares) that come nearer to the checkpoint's than q4's, for as many bytes, and host memory holds no others
    #[arg(long, requires = "sketch")]
    pub residuals: bool,
    #[command(flatten)]
    pub threads: Threads,
    /// Print one JSON value and nothing else
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub planted: Planted,
}

/// A model to measure engines with, instead of one from a checkpoint.
#[derive(Debug, Args)]
#[command(next_help_heading = "Planted models: random weights, chosen activations")]
pub struct Planted {
    /// Write a split of random weights with planted activations: 70b, 34b, 13b, 7b or tiny; in q4, with --sketch too
    #[arg(
        long = "planted",
        id = "planted",
        value_name = "SHAPE",
        conflicts_with_all = [
            "model", "profile", "encoding", "resident_encoding", "attention_encoding", "order", "chunk_neurons", "zstd_level", "archive",
            "predictor_rank", "scales",
        ]
    )]
    pub shape: Option<String>,
    /// Statistics: a (10 % active, the hottest 18 % cover 60 %), b (10 %, 45 %) or c (4.4 %, 44 %) [default: a]
    #[arg(long, value_name = "CASE")]
    pub case: Option<String>,
    /// SwiGLU in place of ReGLU: neurons that do not fire are small, and not zero
    #[arg(long)]
    pub planted_silu: bool,
    /// Share of a layer's neurons that fire at a token, instead of the case's
    #[arg(long, value_name = "SHARE")]
    pub planted_active: Option<f64>,
    /// Share of the activations that belong to the hottest 18 % of the neurons, instead of the case's
    #[arg(long, value_name = "SHARE")]
    pub planted_hot_cover: Option<f64>,
    /// Neurons in a cluster whose gate rows are correlated; 1: none are [default: 32]
    #[arg(long, value_name = "NEURONS")]
    pub planted_clusters: Option<usize>,
    /// Correlation of the gate rows of a cluster [default: 0.3]
    #[arg(long, value_name = "R")]
    pub planted_cluster_correlation: Option<f64>,
    /// Correlation of neighbouring tokens' codes; 0 leaves the reuse that frequency alone gives [default: 0.2]
    #[arg(long, value_name = "R")]
    pub planted_reuse: Option<f64>,
    /// Share of the hottest neurons that are other ones in the vocabulary's second half [default: 0.5]
    #[arg(long, value_name = "SHARE")]
    pub planted_shift: Option<f64>,
    /// Noise of the predicted gates, in standard deviations of a gate row's sum [default: 0.1]
    #[arg(long, value_name = "SD")]
    pub planted_predictor_noise: Option<f64>,
    /// The same of gates that are predicted one layer early [default: 0.6]
    #[arg(long, value_name = "SD")]
    pub planted_foresight_noise: Option<f64>,
    /// Seed of everything random [default: 0]
    #[arg(long, value_name = "SEED")]
    pub planted_seed: Option<u64>,
}

impl Planted {
    /// A flag that does nothing without `--planted`. (Not clap's `requires`: it excuses what another flag rules out.)
    pub fn first_detail(&self) -> Option<&'static str> {
        let given = [
            ("--case", self.case.is_some()),
            ("--planted-silu", self.planted_silu),
            ("--planted-active", self.planted_active.is_some()),
            ("--planted-hot-cover", self.planted_hot_cover.is_some()),
            ("--planted-clusters", self.planted_clusters.is_some()),
            ("--planted-cluster-correlation", self.planted_cluster_correlation.is_some()),
            ("--planted-reuse", self.planted_reuse.is_some()),
            ("--planted-shift", self.planted_shift.is_some()),
            ("--planted-predictor-noise", self.planted_predictor_noise.is_some()),
            ("--planted-foresight-noise", self.planted_foresight_noise.is_some()),
            ("--planted-seed", self.planted_seed.is_some()),
        ];
        given.into_iter().find(|(_, given)| *given).map(|(flag, _)| flag)
    }
}

#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub placement: Placement,
    /// Print one JSON value and nothing else
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Delta {
    /// Model that was fine-tuned, with bf16 matrices: a .gguf file or a Hugging Face folder
    pub base: PathBuf,
    /// What was made of it: a model of the same shape, or a folder with a LoRA adapter (PEFT), which is folded in
    #[arg(value_name = "FINAL")]
    pub final_model: PathBuf,
    /// Delta directory to write
    #[arg(short, long)]
    pub output: PathBuf,
    /// zstd level; 0 stores changes as they are, 19 saves a tenth and takes long
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(i32).range(0..=22))]
    pub zstd_level: i32,
    #[command(flatten)]
    pub threads: Threads,
    /// Print one JSON value and nothing else
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Verify {
    /// Split directory; with --delta the delta's base: an exact split or a checkpoint
    pub split: PathBuf,
    /// Checkpoint that it was made from; a planted split has none, and only its own checksums are checked. With --delta
    /// the final model; without it, the digests in the delta are compared
    #[arg(short, long, env = "THERMOCLINE_MODEL")]
    pub model: Option<PathBuf>,
    /// Fail unless every tensor is equal to the checkpoint's bit for bit
    #[arg(long)]
    pub exact: bool,
    /// Delta directory: prove that base and delta are the final model, bit for bit
    #[arg(long, value_name = "DIR")]
    pub delta: Option<PathBuf>,
    /// Print one JSON value and nothing else
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[cfg(feature = "analysis")]
pub enum MaskName {
    /// All neurons
    Dense,
    /// All neurons that are not zero
    Exact,
    /// The true top share by |h| * ||d|| (needs h, so it is no way to run)
    Oracle,
    /// The true top share by |h| alone, to compare with figures from elsewhere
    OracleH,
    /// The predicted top share, as sparse mode computes it
    Predicted,
    /// The predicted top share of every layer alike, and nothing for the other neurons
    PredictedAlike,
    /// The neurons, or single rows of them, whose error would be largest if the split's sketch stood for them, as it does for the others:
    /// as many of each layer and token as the split's thresholds say (--fit-shares), or the same share of neurons where it has none
    Graded,
    /// The same share of every layer and token, whatever thresholds the split has
    GradedAlike,
    /// As many of each layer and token as keep what is expected to be lost below a share (--active) of the neurons' energy's root
    GradedError,
    /// Peer: all gates, the share of neurons whose gate is largest
    Cats,
    /// Peer: the share of every matrix's inputs that are largest
    Teal,
    /// Peer: the same, times the lengths of the matrix's columns
    Wina,
    /// The inputs of all matrices that lower the divergence most for their bytes, the others replaced by their means; needs
    /// --fit-text
    Inputs,
    /// A guess, which as those below chooses the share in every layer alike, and nothing for the other neurons: signs of gate and up
    /// rows times each row's mean magnitude
    Signs,
    /// A guess: gate and up rows in one bit a weight, rounded in the metric of the inputs; needs --fit-text
    #[value(name = "copies-1")]
    Copies1,
    /// The same in two bits; needs --fit-text
    #[value(name = "copies-2")]
    Copies2,
    /// The same in three bits; needs --fit-text
    #[value(name = "copies-3")]
    Copies3,
    /// A guess: the true top share of the position before (needs its h, so it is a bound)
    Previous,
    /// A guess: the split's predictor, fed with what the layer before read
    #[value(name = "ahead-1")]
    Ahead1,
    /// The same two layers before
    #[value(name = "ahead-2")]
    Ahead2,
    /// A guess: a network of two layers, of the rank of the split's predictor, trained to name the top share; needs --fit-text
    Trained,
    /// A guess: the predictor's score and a part of what the neuron gave at the position before (a bound); needs --fit-text
    #[value(name = "low-rank+previous")]
    LowRankPrevious,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[cfg(feature = "analysis")]
pub enum EngineName {
    /// The dense forward, all positions of a window at once, masks applied to each
    Batch,
    /// The token engine with the split's own kernels, one token at a time (dense, exact, predicted and graded only)
    Decode,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[cfg(feature = "analysis")]
pub enum PositionsName {
    /// Every position, as if each had been decoded
    All,
    /// Those behind the context, which is computed densely as a run's prompt is. The first token of an answer is what the
    /// context's last token predicts, so it is the dense model's: an answer of one token shows nothing of a mask
    Decoded,
}

#[cfg(feature = "analysis")]
fn parse_task(text: &str) -> Result<TaskFile, String> {
    let kind = |name: &str| TaskKind::ALL.into_iter().find(|kind| kind.name() == name);
    let named = text.split_once('=').and_then(|(name, path)| Some((kind(name)?, path)));
    match named.filter(|(_, path)| !path.is_empty()) {
        Some((kind, path)) => Ok(TaskFile { kind, path: path.into() }),
        None => Err("expected lambada=FILE or cloze=FILE".to_owned()),
    }
}

#[cfg(feature = "analysis")]
#[derive(Debug, Args)]
pub struct Eval {
    /// Split directory, or a checkpoint (which has no predictor: not for --mask predicted)
    #[arg(short, long, env = "THERMOCLINE_MODEL")]
    pub model: PathBuf,
    /// Text, tokenised whole and without special tokens
    #[arg(long, required_unless_present = "task")]
    pub text: Option<PathBuf>,
    /// Zero-shot examples instead of a text, a JSON object a line: lambada=FILE ("text", whose last word is to be predicted) or
    /// cloze=FILE ("context", "choices", and "answer", the number of the right one from 0). Several take a flag each
    #[arg(
        long,
        value_name = "KIND=FILE",
        value_parser = parse_task,
        conflicts_with_all = ["text", "ctx", "windows", "fit_shares", "planes", "engine"]
    )]
    pub task: Vec<TaskFile>,
    /// Examples of each task, from the start of its file [default: all]
    #[arg(long, value_name = "N")]
    pub limit: Option<NonZeroUsize>,
    /// Where masks apply to a task's examples; to a text always everywhere
    #[arg(long, value_enum, default_value = "all")]
    pub positions: PositionsName,
    /// Tokens in a window [default: 1024; 256 with --fit-shares]
    #[arg(long)]
    pub ctx: Option<usize>,
    /// Windows, from the start of the text, not overlapping [default: 8; 4 with --fit-shares]
    #[arg(long)]
    pub windows: Option<usize>,
    /// Measure what each layer's share of the neurons costs on this text, and keep it in the split: sparse mode then divides
    /// --active between the layers by it. Takes the time of about 2.5 dense passes over these windows for each layer. Then, on
    /// windows behind them, as many and four times as long, in ten dense passes: what perplexity rises by at shares from 10 to
    /// 90 %, from which --max-ppl-increase finds --active. Of a split with sketches: thresholds by which these choose neurons (ReLU) or
    /// single rows of them (SiLU), from one dense pass, and behind them what perplexity rises by at seven shares, for each of four shares
    /// that are always computed, in 29 dense passes
    #[arg(long, conflicts_with_all = ["mask", "active", "always", "precision", "engine", "planes", "delta"])]
    pub fit_shares: bool,
    /// With --fit-shares of a split with sketches: only the thresholds. What they cost is not measured, so that --max-ppl-increase has
    /// nothing to go by
    #[arg(long, requires = "fit_shares")]
    pub no_curve: bool,
    /// Which neurons are computed, at every position; several, separated by commas, give a row each
    #[arg(long, value_enum, default_value = "dense", value_delimiter = ',')]
    pub mask: Vec<MaskName>,
    /// Shares of the neurons (of inputs, and of graded by thresholds of rows: of bytes) that all masks but dense and exact keep: a row for each
    #[arg(long, default_value = "0.3", value_delimiter = ',', value_name = "SHARE")]
    pub active: Vec<f64>,
    /// Shares of each layer's neurons, the first in the split's order, that --mask graded keeps at every token; --active is that of
    /// the others then: a row for each
    #[arg(long, default_value = "0", value_delimiter = ',', value_name = "SHARE")]
    pub always: Vec<f64>,
    /// Text on which --mask inputs measures what inputs cost (its first 1024 tokens; takes the time of about 2 dense passes over
    /// them for each layer). Guesses are fitted to up to 16384 tokens, in one dense pass; training takes some minutes for each share of
    /// --active
    #[arg(long, value_name = "FILE")]
    pub fit_text: Option<PathBuf>,
    /// Planes of the weights, where the split has several: base, plus, exact, plus@SHARE or exact@SHARE, as for run
    #[arg(long, default_value = "base", value_name = "PLANES")]
    pub precision: Planes,
    /// Delta directory: the model that it makes of the split's, which must have the base's bits
    #[arg(long, value_name = "DIR", conflicts_with = "planes")]
    pub delta: Option<PathBuf>,
    /// What the model is compared with, a checkpoint or a split of the same vocabulary: a split's own checkpoint, for what its encoding
    /// loses, too; a split with all its planes. Bytes are relative to its layers, then [default: the model itself, computed densely]
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["task", "fit_shares", "planes", "engine"])]
    pub reference: Option<PathBuf>,
    /// What each plane of the weights buys, against all of them: as --precision; several, separated by commas, give a row
    /// each
    #[arg(long, value_delimiter = ',', value_name = "PLANES", conflicts_with_all = ["mask", "active", "precision", "engine"])]
    pub planes: Vec<Planes>,
    /// What computes
    #[arg(long, value_enum, default_value = "batch")]
    pub engine: EngineName,
    /// VRAM for --engine decode: a size, auto, or 0, which computes on the CPU
    #[arg(long, default_value = "0", value_parser = parse_vram)]
    pub vram_budget: VramBudget,
    #[command(flatten)]
    pub threads: Threads,
    /// Print one JSON value and nothing else
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Bench {
    #[command(flatten)]
    pub placement: Placement,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 128)]
    pub n_prompt: usize,
    /// Tokens to generate
    #[arg(long, default_value_t = 64)]
    pub n_gen: usize,
    /// Generate what the model finds likeliest instead of arbitrary tokens (GPU)
    #[arg(long)]
    pub greedy: bool,
    /// Repetitions, after one that is not counted
    #[arg(short, long, default_value_t = 5)]
    pub repetitions: usize,
    /// Print one JSON value and nothing else
    #[arg(long)]
    pub json: bool,
}

#[cfg(feature = "analysis")]
#[derive(Debug, Args)]
pub struct Report {
    /// Split and profile directories, and JSON files of run, eval, bench and split --planted
    #[arg(required = true)]
    pub inputs: Vec<PathBuf>,
    /// Page to write
    #[arg(short, long, default_value = "report.html")]
    pub output: PathBuf,
    /// Also write every plot as a PNG into this folder
    #[arg(long)]
    pub png: Option<PathBuf>,
    /// Also write every plot as an SVG into this folder
    #[arg(long)]
    pub svg: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Inspect {
    /// Split, profile or delta directory, .gguf file or Hugging Face folder
    pub path: PathBuf,
    /// Print one JSON value and nothing else
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Doctor {
    /// Folder whose disk is measured
    #[arg(long, default_value = ".")]
    pub dir: PathBuf,
    #[command(flatten)]
    pub threads: Threads,
    /// Print one JSON value and nothing else
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Completions {
    /// Shell
    pub shell: clap_complete::Shell,
}
