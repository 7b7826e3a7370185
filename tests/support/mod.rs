//! Models, profiles and splits that the tests share.
//!
//! Everything is made with the binary under test, once per binary: the folder's name is the binary's checksum, so that
//! neither a rebuilt program nor a test process of its own (nextest) ever sees another one's files. Tests copy what
//! they damage.
#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

pub mod budgets;
pub mod demo;
pub mod forge;

use serde_json::Value;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use tempfile::TempDir;
use thermocline_datasets::write::{TinyGgufType, TinyModel, write_tiny_gguf, write_tiny_safetensors};
use thermocline_datasets::{Activation, Architecture};
use thermocline_runtime::{Engine, Error, Logits, Mode, Plan, PlanRequest};
use thermocline_split::{Planes, Precision, Split};

pub const BINARY: &str = env!("CARGO_BIN_EXE_thermocline");
const SEED: u64 = 7;

/// The binary, without settings from the caller's environment.
pub fn thermocline() -> Command {
    let mut command = Command::new(BINARY);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("THERMOCLINE_")) {
        command.env_remove(name);
    }
    // And without the caller's settings file.
    command.env("XDG_CONFIG_HOME", "/nonexistent").env("COLUMNS", "100");
    // And on the CPU, whatever the machine has.
    command.env("THERMOCLINE_VRAM_BUDGET", "0");
    command
}

/// What an ended run printed.
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

/// Runs the binary; `args` may hold paths.
pub fn run(args: &[&str]) -> Ran {
    let mut command = thermocline();
    if args.contains(&"--help") {
        // Help shows what the environment says.
        command.env_remove("THERMOCLINE_VRAM_BUDGET");
    }
    command.args(args).output().unwrap().into()
}

/// Runs the binary where no file may grow beyond `blocks` of 1024 bytes.
pub fn with_file_limit(blocks: u32, args: &[&str]) -> Ran {
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\"");
    Command::new("bash").args(["-c", &script, "bash", BINARY]).args(args).output().unwrap().into()
}

/// Runs the binary, which must succeed.
pub fn ok(args: &[&str]) -> Ran {
    let ran = run(args);
    assert_eq!(ran.code, Some(0), "{args:?}: {}", ran.stderr);
    ran
}

/// Runs the binary, which must succeed and print one JSON value.
pub fn json(args: &[&str]) -> Value {
    let ran = ok(args);
    serde_json::from_str(&ran.stdout).unwrap_or_else(|e| panic!("{args:?}: {e}: {}", ran.stdout))
}

/// Runs the binary, which must fail with `code`, without a panic and with a message on standard error alone.
pub fn fails(code: i32, args: &[&str]) -> String {
    let ran = run(args);
    assert_eq!(ran.code, Some(code), "{args:?}: {} {}", ran.stdout, ran.stderr);
    assert!(!ran.stderr.contains("panicked"), "{args:?}: {}", ran.stderr);
    assert!(ran.stderr.contains("error: "), "{args:?}: {}", ran.stderr);
    ran.stderr
}

/// The figure in the message of a run (or plan) whose budget is far too small.
pub fn needed_bytes(args: &[&str]) -> u64 {
    let message = fails(3, &[args, &["--ram-budget", "1B"]].concat());
    let before = message.split(" bytes are needed").next().unwrap();
    before.rsplit(' ').next().unwrap().parse().unwrap()
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// How a model lies on disk.
#[derive(Clone, Copy)]
pub enum Form {
    Folder,
    Gguf(TinyGgufType),
}

/// A model to make, and its calibration.
#[derive(Clone)]
pub struct Made {
    pub name: &'static str,
    pub model: TinyModel,
    pub form: Form,
    pub tokens: usize,
}

pub fn tiny(name: &'static str, architecture: Architecture, activation: Activation, form: Form) -> Made {
    let tie_word_embeddings = architecture == Architecture::Llama;
    let model = TinyModel { architecture, activation, tie_word_embeddings, ..TinyModel::default() };
    Made { name, model, form, tokens: 1024 }
}

/// bf16 folder with SiLU and a tied head.
pub fn llama() -> Made {
    tiny("llama", Architecture::Llama, Activation::Silu, Form::Folder)
}

/// f32 GGUF with ReLU, biases and a head of its own.
pub fn qwen_relu() -> Made {
    tiny("qwen-relu", Architecture::Qwen2, Activation::Relu, Form::Gguf(TinyGgufType::F32))
}

/// About 40 MB in bf16: large enough that budgets below it matter.
pub fn medium() -> Made {
    let model = TinyModel {
        hidden_size: 256,
        intermediate_size: 2048,
        n_layers: 12,
        n_heads: 8,
        n_kv_heads: 4,
        head_dim: 32,
        vocab_size: 512,
        ..TinyModel::default()
    };
    Made { name: "medium", model, form: Form::Folder, tokens: 1024 }
}

/// A model of four small layers: their files are quickly made, cut and compared.
pub fn four_layers() -> Made {
    let Made { model, form, tokens, .. } = tiny("four", Architecture::Llama, Activation::Silu, Form::Folder);
    Made { name: "four", model: TinyModel { n_layers: 4, ..model }, form, tokens }
}

/// Where this workspace lies.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where what the tests share lies.
pub fn root() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        let key = xxhash_rust::xxh3::xxh3_64(&fs::read(BINARY).unwrap());
        let all = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fixtures");
        let root = all.join(format!("{key:016x}"));
        fs::create_dir_all(&root).unwrap();
        // Older binaries' files are of no more use.
        for entry in fs::read_dir(&all).unwrap().flatten().filter(|e| e.path() != root) {
            let _ = fs::remove_dir_all(entry.path());
        }
        root
    })
}

/// `make(path)` unless another test has made it; `path` appears complete or not at all.
pub fn once(name: &str, make: impl FnOnce(&Path)) -> PathBuf {
    let path = root().join(name);
    if path.exists() {
        return path;
    }
    let lock = File::create(root().join(format!("{name}.lock"))).unwrap();
    lock.lock().unwrap();
    if !path.exists() {
        let dir = TempDir::new_in(root()).unwrap();
        let temporary = dir.path().join("made");
        make(&temporary);
        fs::rename(&temporary, &path).unwrap();
    }
    path
}

/// Sentences, the same every time.
pub fn corpus() -> &'static Path {
    static CORPUS: OnceLock<PathBuf> = OnceLock::new();
    CORPUS.get_or_init(write_corpus)
}

fn write_corpus() -> PathBuf {
    once("corpus.txt", |path| {
        let subjects = ["the water", "a diver", "the lake", "one fish", "the cold", "an engine", "their boat"];
        let verbs = ["moves", "rests", "sinks below", "rises above", "mixes with", "listens to", "counts"];
        let objects = ["the warm layer", "the stones", "a wave", "the north wind", "two lines", "nothing", "the sun"];
        let mut state = 1u64;
        let mut pick = |words: &[&'static str; 7]| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            words[(state >> 33) as usize % 7]
        };
        let sentences = (0..1500).map(|_| format!("{} {} {}. ", pick(&subjects), pick(&verbs), pick(&objects)));
        fs::write(path, sentences.collect::<String>()).unwrap();
    })
}

pub fn model(made: &Made) -> PathBuf {
    match made.form {
        Form::Folder => once(made.name, |path| write_tiny_safetensors(path, &made.model, SEED).unwrap()),
        Form::Gguf(kind) => once(&format!("{}.gguf", made.name), |path| {
            write_tiny_gguf(path, &made.model, SEED, kind).unwrap();
        }),
    }
}

/// Arguments that calibrate on the first `tokens` tokens of the corpus.
pub fn calibrating<'a>(model: &'a Path, tokens: &'a str, window: &'a str, out: &'a Path) -> Vec<&'a str> {
    let given = ["calibrate", "-m", text(model), "--corpus", text(corpus())];
    [&given[..], &["--tokens", tokens, "--window", window, "-o", text(out)]].concat()
}

/// Arguments that split.
pub fn splitting<'a>(model: &'a Path, profile: &'a Path, more: &[&'a str], out: &'a Path) -> Vec<&'a str> {
    [&["split", "-m", text(model), "--profile", text(profile)], more, &["-o", text(out)]].concat()
}

pub fn profile(made: &Made) -> PathBuf {
    let model = model(made);
    once(&format!("{}.profile", made.name), |path| {
        ok(&calibrating(&model, &made.tokens.to_string(), "128", path));
    })
}

/// A split, by encoding and further arguments.
pub fn split(made: &Made, encoding: &str, more: &[&str]) -> PathBuf {
    let (model, profile) = (model(made), profile(made));
    once(&format!("{}.{encoding}{}", made.name, more.concat()), |path| {
        ok(&splitting(&model, &profile, &[&["--encoding", encoding], more].concat(), path));
    })
}

pub fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_dir(&entry.path(), &target)
        } else {
            fs::copy(entry.path(), target).map(drop).unwrap()
        }
    }
}

/// A copy of a split that a test may damage.
pub fn copy(from: &Path) -> (TempDir, PathBuf) {
    let dir = TempDir::new().unwrap();
    let to = dir.path().join("split");
    copy_dir(from, &to);
    (dir, to)
}

/// Every file below `dir` with its bytes, by relative name.
pub fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut out = Vec::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for path in fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(dir).unwrap().display().to_string();
                out.push((name, fs::read(&path).unwrap()));
            }
        }
    }
    out.sort();
    out
}

pub fn request(mode: Mode, budget: Option<u64>, n_threads: usize) -> PlanRequest {
    PlanRequest { mode, always: None, ram_budget_bytes: budget, context: 160, batch: 32, n_threads }
}

pub fn engine(dir: &Path, request: PlanRequest) -> Result<Engine, Error> {
    engine_at(dir, Precision::Base, request)
}

pub fn engine_at(dir: &Path, planes: impl Into<Planes>, request: PlanRequest) -> Result<Engine, Error> {
    engine_of(Split::open_at(dir, planes)?, request)
}

pub fn engine_of(split: Split, request: PlanRequest) -> Result<Engine, Error> {
    let plan = Plan::new(&split, request)?;
    Engine::load(split, plan, &|_, _| ())
}

/// The least budget that holds what must be in memory with up to three threads, and the one from which nothing is
/// streamed.
pub fn budget_range(dir: &Path, mode: Mode) -> (u64, u64) {
    budget_range_of(&Split::open(dir).unwrap(), mode)
}

pub fn budget_range_of(split: &Split, mode: Mode) -> (u64, u64) {
    let least = match Plan::new(split, request(mode, Some(1), 3)) {
        Err(Error::DoesNotFit { needed_bytes, .. }) => needed_bytes,
        other => panic!("a budget of one byte: {other:?}"),
    };
    (least, Plan::new(split, request(mode, None, 3)).unwrap().total_bytes)
}

/// Token ids that no tokenizer was asked for: bytes and merges of the tiny vocabulary.
pub fn prompt(n: usize) -> Vec<u32> {
    (0..n).map(|i| 3 + (i * 37 + i * i * 11) as u32 % 280).collect()
}

pub fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|l| l.to_bits()).collect()
}

/// Logits of a prefill in two batches of unequal length and of `n_decoded` single tokens behind it.
pub fn answer(engine: &mut Engine, n_decoded: usize) -> Result<Vec<f32>, Error> {
    engine.clear();
    let tokens = prompt(29 + n_decoded);
    let mut logits = engine.forward(&tokens[..16], Logits::All)?;
    logits.extend(engine.forward(&tokens[16..29], Logits::Last)?);
    for token in &tokens[29..] {
        logits.extend(engine.forward(&[*token], Logits::Last)?);
    }
    Ok(logits)
}
