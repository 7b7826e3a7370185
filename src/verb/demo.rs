//! `demo`: everything once, on a small model, from checkpoint to report.

use crate::cli::{Demo, ModeName, Placement, Threads, VramBudget};
use crate::exit::Usage;
use anyhow::Context;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;
use thermocline_analysis::eval::{Fitted, Mask, Windows};
use thermocline_calibrate::{RunOptions, Settings};
use thermocline_datasets::{Checkpoint, Tokenizer, open_checkpoint};
use thermocline_kernels::Encoding;
use thermocline_runtime::budget::format_bytes;
use thermocline_runtime::{GenerateSettings, SamplerSettings, generate};
use thermocline_split::Precision;

/// A whole short novel for models that are given; datasets/demo/README.md says which and under what licence.
const NOVEL: &str = include_str!("../../datasets/demo/novel.txt");
/// Share of the text that calibrates; the rest evaluates.
const CALIBRATION_SHARE: f64 = 0.8;
const WINDOW: usize = 512;
const SHARES: [f64; 4] = [0.1, 0.3, 0.5, 0.7];
const PROMPT: &str = "It was late in the evening when";
const N_PREDICT: usize = 64;

pub fn demo(args: &Demo) -> anyhow::Result<()> {
    let begin = Instant::now();
    let dir = &args.output;
    claim(dir)?;
    let (model, own_text) = match &args.model {
        Some(model) => (model.clone(), (NOVEL, "the built-in novel")),
        None => (built_in::write(&dir.join("demo-model"))?, (built_in::TEXT, "text by the demo model itself")),
    };
    super::run::limit_threads(args.threads)?;
    let effort = match &args.model {
        Some(_) => Effort { calibration_tokens: 16 << 10, eval_windows: 2 },
        None => Effort { calibration_tokens: 64 << 10, eval_windows: 8 },
    };
    let (text, text_name) = match &args.corpus {
        Some(path) => (fs::read_to_string(path).with_context(|| path.clone())?, super::eval::name(Path::new(path))),
        None => (own_text.0.to_owned(), own_text.1.to_owned()),
    };
    let (calibration, evaluation) = divide(&text);
    let checkpoint = open_checkpoint(&model).with_context(|| "cannot open the model")?;
    let tokenizer = Tokenizer::from_json(&checkpoint.tokenizer_json()?)?;
    let name = super::eval::model_name(&model);
    let paths = Paths {
        profile: dir.join(format!("{name}-profile")),
        split: dir.join(format!("{name}-q4")),
        report: dir.join("report.html"),
    };

    prepare(checkpoint.as_ref(), &tokenizer, calibration, effort, &paths)?;
    let mut results = runs(args.threads, &tokenizer, dir, &paths.split)?;
    results.push(evaluate(&tokenizer, evaluation, &text_name, effort, dir, &paths.split)?);

    let step = Instant::now();
    // The profile says more about neurons than the split keeps, so the split is not drawn as well.
    results.insert(0, paths.profile.clone());
    super::report::write(&results, &paths.report)?;
    said("report", step, &format!("{} inputs", results.len()));
    println!("{:.0} s in all; open {}", begin.elapsed().as_secs_f64(), paths.report.display());
    Ok(())
}

/// The model of `datasets/demo/model`, and text sampled from it.
#[cfg(feature = "demo-model")]
mod built_in {
    use super::*;

    pub const TEXT: &str = include_str!("../../datasets/demo/corpus.txt");
    const FILES: [(&str, &[u8]); 5] = [
        ("config.json", include_bytes!("../../datasets/demo/model/config.json")),
        ("generation_config.json", include_bytes!("../../datasets/demo/model/generation_config.json")),
        ("tokenizer.json", include_bytes!("../../datasets/demo/model/tokenizer.json")),
        ("tokenizer_config.json", include_bytes!("../../datasets/demo/model/tokenizer_config.json")),
        ("model.safetensors", include_bytes!("../../datasets/demo/model/model.safetensors")),
    ];

    /// Writes it as the Hugging Face folder that it was.
    pub fn write(dir: &Path) -> anyhow::Result<PathBuf> {
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        for (name, bytes) in FILES {
            let path = dir.join(name);
            fs::write(&path, bytes).with_context(|| path.display().to_string())?;
        }
        Ok(dir.to_owned())
    }
}

#[cfg(not(feature = "demo-model"))]
mod built_in {
    use super::*;

    pub const TEXT: &str = NOVEL;

    pub fn write(_: &Path) -> anyhow::Result<PathBuf> {
        Err(Usage("this build has no demo model in it (feature demo-model); give a model with -m".to_owned()).into())
    }
}

/// How much is looked at: seconds for the model that is built in, about a minute for one ten times its size.
#[derive(Clone, Copy)]
struct Effort {
    calibration_tokens: usize,
    eval_windows: usize,
}

struct Paths {
    profile: PathBuf,
    split: PathBuf,
    report: PathBuf,
}

/// Makes the output folder; one with something in it is left alone.
fn claim(dir: &Path) -> anyhow::Result<()> {
    let taken = fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some()) || dir.is_file();
    if taken {
        let path = dir.display();
        let text = format!("{path} exists already; remove it (rm -r {path}) or choose another folder with -o");
        return Err(Usage(text).into());
    }
    fs::create_dir_all(dir).with_context(|| dir.display().to_string())
}

/// The text for calibration and the text for evaluation, cut at a line's end.
fn divide(text: &str) -> (&str, &str) {
    let wanted = (text.len() as f64 * CALIBRATION_SHARE) as usize;
    let cut = text.bytes().take(wanted).rposition(|b| b == b'\n').map_or(0, |at| at + 1);
    // A text of one line: any character's end will do.
    let cut = if cut == 0 { (0..=wanted).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0) } else { cut };
    text.split_at(cut)
}

fn prepare(
    checkpoint: &dyn Checkpoint,
    tokenizer: &Tokenizer,
    text: &str,
    effort: Effort,
    paths: &Paths,
) -> anyhow::Result<()> {
    let step = Instant::now();
    let mut tokens = tokenizer.encode(text, false)?;
    tokens.truncate(tokens.len().min(effort.calibration_tokens) / WINDOW * WINDOW);
    if tokens.is_empty() {
        return Err(Usage(format!("--corpus: four fifths of the text must have {WINDOW} tokens")).into());
    }
    let settings = Settings { window_len: WINDOW, ..Settings::default() };
    let profile =
        super::calibrate::profile(checkpoint, &tokens, &settings, &RunOptions::default(), &paths.profile, false)?;
    let meta = profile.meta();
    let speed = meta.flops / meta.seconds / 1e9;
    said("calibrate", step, &format!("{} tokens, {speed:.0} GFLOP/s", meta.n_tokens));

    let step = Instant::now();
    let options = super::split::defaults(checkpoint, Encoding::Q4.into());
    let report = super::split::make(checkpoint, &profile, &options, &paths.split, false)?;
    let size = format_bytes(report.bytes);
    said(
        "split",
        step,
        &format!("q4, {size}, {} order, {} neurons a chunk", report.order.name(), report.chunk_neurons),
    );
    Ok(())
}

/// Everything in RAM, half of that, and the predicted 30 % of the neurons in that half.
fn runs(threads: Threads, tokenizer: &Tokenizer, dir: &Path, split: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let placement = |mode, ram_budget| Placement {
        model: split.to_owned(),
        mode,
        active: 0.3,
        always: None,
        max_error: None,
        max_ppl_increase: None,
        precision: Precision::Base.into(),
        delta: None,
        ram_budget,
        // The demo shows budgets of RAM.
        vram_budget: VramBudget::None,
        cpu_share: None,
        cache_share: None,
        lookahead: None,
        cpu_layers: None,
        ctx_size: None,
        threads,
    };
    let whole = run(&placement(ModeName::Exact, None), tokenizer, dir, "run-exact")?;
    let half = whole.1 / 2;
    let exact = run(&placement(ModeName::Exact, Some(half)), tokenizer, dir, "run-exact-half-ram")?;
    let sparse = run(&placement(ModeName::Sparse, Some(half)), tokenizer, dir, "run-sparse-half-ram")?;
    Ok(vec![whole.0, exact.0, sparse.0])
}

/// One run: its JSON file, and the bytes that its plan takes.
fn run(placement: &Placement, tokenizer: &Tokenizer, dir: &Path, name: &str) -> anyhow::Result<(PathBuf, u64)> {
    let step = Instant::now();
    let prompt = tokenizer.encode(PROMPT, true)?;
    let split = super::load::placed_split(placement)?;
    let mut loaded = super::load::load(split, placement, prompt.len() + N_PREDICT, 128, false)?;
    let engine = loaded.decoder();
    let sampler = SamplerSettings { seed: 1, ..SamplerSettings::default() };
    let settings = GenerateSettings { n_predict: N_PREDICT, sampler, stop: Vec::new(), audit_every: 0 };
    let report = generate(engine, &prompt, &settings, &mut |_| true)?;
    let text = tokenizer.decode(&report.tokens)?;
    // The peak is the whole demo's, calibration included: it would say nothing about this run.
    let account = super::run::account(&report);
    said(name, step, account.split("; peak memory").next().unwrap_or(&account));
    println!("{:27}{}\u{2026}", "", first_words(&text));
    let mut value = serde_json::to_value(&report)?;
    if let Value::Object(fields) = &mut value {
        fields.insert("text".to_owned(), text.into());
        fields.insert("plan".to_owned(), engine.plan_json());
        fields.insert("peak_rss_bytes".to_owned(), Value::Null);
    }
    let total_bytes = engine.plan_json()["total_bytes"].as_u64().unwrap_or(0);
    Ok((save(dir, name, &value)?, total_bytes))
}

/// Enough of an answer to see that it is one.
fn first_words(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().take(14).collect();
    words.join(" ")
}

fn evaluate(
    tokenizer: &Tokenizer,
    text: &str,
    text_name: &str,
    effort: Effort,
    dir: &Path,
    split: &Path,
) -> anyhow::Result<PathBuf> {
    let step = Instant::now();
    let tokens = tokenizer.encode(text, false)?;
    let windows = Windows::new(&tokens, WINDOW, effort.eval_windows).map_err(super::eval::usage)?;
    let mut masks = vec![Mask::Dense];
    masks.extend(SHARES.map(Mask::Oracle));
    masks.extend(SHARES.map(Mask::Predicted));
    let model = super::eval::Model::open(split, Precision::Base.into(), None)?;
    let results = super::eval::batch(None, &model, &windows, &masks, &Fitted::default(), false)?;
    let output = super::eval::Output::new(&model, split, text_name, &windows, &results, step)?;
    said("eval", step, &format!("{} tokens under {} masks", windows.tokens().len(), masks.len()));
    super::eval::table(&results);
    save(dir, "eval", &serde_json::to_value(output)?)
}

fn save(dir: &Path, name: &str, value: &Value) -> anyhow::Result<PathBuf> {
    let path = dir.join(format!("{name}.json"));
    fs::write(&path, serde_json::to_string_pretty(value)?).with_context(|| path.display().to_string())?;
    Ok(path)
}

/// One line a step.
fn said(what: &str, since: Instant, text: &str) {
    println!("{what:<20}{:>5.1} s  {text}", since.elapsed().as_secs_f64());
}
