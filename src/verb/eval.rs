//! `eval`: a model and a text in, perplexity, KL divergence and recall out.

use crate::cli::{EngineName, Eval, MaskName, ModeName, Placement};
use crate::exit::Usage;
use crate::output::{self, Progress};
use anyhow::Context;
use serde::Serialize;
use std::path::Path;
use std::time::Instant;
use thermocline_analysis::Error;
use thermocline_analysis::eval::{
    Evaluation, Fitted, Guesser, Mask, Windows, evaluate_against, evaluate_decode, evaluate_planes, fit_guesses,
    fit_input_costs, fit_shares, fit_windows, measure_curve, measure_graded_curves,
};
use thermocline_analysis::{PlanesStudy, study_planes};
use thermocline_datasets::{Checkpoint, Tokenizer, open_checkpoint};
use thermocline_split::{CopyBits, Curve, GradedCurves, Planes, Precision, Split, SplitCheckpoint};

/// Where masks were applied, for people who compare figures.
pub const POSITIONS: &str = "every position, as if each had been decoded; a run computes its prompt densely";
/// How intervals were made.
const INTERVAL: &str = "bootstrap over blocks of 64 neighbouring tokens, 2000 draws";
/// How those of tasks were made.
pub const INTERVALS_OF_TASKS: &str = "bootstrap over examples, 2000 draws, the same for a mask and the dense model";

/// What `eval --json` prints: the first result's fields on top.
#[derive(Serialize)]
pub struct Output<'a> {
    #[serde(flatten)]
    first: Option<&'a Evaluation>,
    /// All results, if there are several.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    results: &'a [Evaluation],
    model: String,
    model_digest: String,
    /// Digest of the checkpoint that it is, or was split from.
    source_digest: String,
    encoding: String,
    text: String,
    ctx: usize,
    windows: usize,
    masked_positions: &'static str,
    interval: &'static str,
    seconds: f64,
    version: &'static str,
    command: Vec<String>,
    /// What it was compared with, if that is not the model itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    reference: Option<String>,
    /// What the planes take.
    #[serde(skip_serializing_if = "Option::is_none")]
    study: Option<&'a PlanesStudy>,
}

impl<'a> Output<'a> {
    pub fn new(
        model: &Model,
        path: &Path,
        text: &str,
        windows: &Windows<'_>,
        results: &'a [Evaluation],
        begin: Instant,
    ) -> anyhow::Result<Self> {
        Ok(Output {
            first: results.first(),
            results: if results.len() > 1 { results } else { &[] },
            model: model_name(path),
            model_digest: model.dense().digest()?,
            source_digest: model.source_digest()?,
            encoding: encoding(model),
            text: text.to_owned(),
            ctx: windows.ctx(),
            windows: windows.len(),
            masked_positions: POSITIONS,
            interval: INTERVAL,
            seconds: begin.elapsed().as_secs_f64(),
            version: env!("CARGO_PKG_VERSION"),
            command: std::env::args().skip(1).collect(),
            reference: None,
            study: None,
        })
    }
}

/// A split or a checkpoint, seen as a dense model.
pub enum Model {
    Checkpoint(Box<dyn Checkpoint>),
    Split(Box<SplitCheckpoint>),
}

impl Model {
    pub fn open(path: &Path, planes: Planes, delta: Option<&Path>) -> anyhow::Result<Self> {
        if path.join("manifest.json").exists() {
            let split = super::load::open_split(path, planes, delta)?;
            return Ok(Model::Split(Box::new(SplitCheckpoint::new(split))));
        }
        if delta.is_some() {
            return Err(Usage("--delta needs a split; -m names a checkpoint".to_owned()).into());
        }
        Ok(Model::Checkpoint(open_checkpoint(path)?))
    }

    pub fn dense(&self) -> &dyn Checkpoint {
        match self {
            Model::Checkpoint(checkpoint) => checkpoint.as_ref(),
            Model::Split(split) => split.as_ref(),
        }
    }

    /// The weights, and where those of a split lie.
    fn weights(&self) -> (&dyn Checkpoint, Option<&Split>) {
        (self.dense(), self.split())
    }

    /// Digest of the checkpoint that it is, or was split from.
    fn source_digest(&self) -> anyhow::Result<String> {
        match self.split() {
            Some(split) => Ok(split.manifest().source.model_digest.clone()),
            None => Ok(self.dense().digest()?),
        }
    }

    pub fn split(&self) -> Option<&Split> {
        match self {
            Model::Checkpoint(_) => None,
            Model::Split(split) => Some(split.split()),
        }
    }
}

pub fn eval(args: &Eval) -> anyhow::Result<()> {
    let begin = Instant::now();
    super::run::limit_threads(args.threads)?;
    let masks = masks(&args.mask, &args.active, &args.always);
    let is_fitted = |m: &Mask| matches!(m, Mask::Inputs(_)) || is_fitted_guess(m);
    if args.fit_text.is_some() && !masks.iter().any(is_fitted) {
        let text = "--fit-text is for --mask inputs, copies-1 to -3, trained and low-rank+previous, and there is none";
        return Err(Usage(text.to_owned()).into());
    }
    let model = Model::open(&args.model, args.precision, args.delta.as_deref())?;
    if !args.task.is_empty() {
        return super::eval_tasks::eval_tasks(args, &model, &masks, begin);
    }
    super::eval_tasks::refuse_without_task(args)?;
    let path = text_path(args);
    let text = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    let named = || args.model.display().to_string();
    let tokenizer = Tokenizer::from_json(&model.dense().tokenizer_json()?).with_context(named)?;
    let tokens = tokenizer.encode(&text, false).with_context(named)?;
    if args.fit_shares {
        let has_sketches = model.split().is_some_and(|split| split.sketches().is_some());
        let (ctx, n) = (args.ctx.unwrap_or(256), args.windows.unwrap_or(4));
        if args.no_curve {
            if !has_sketches {
                let text =
                    "--no-curve is for --fit-shares of a split with sketches; this one is fitted by what shares cost";
                return Err(Usage(text.to_owned()).into());
            }
            return fit_graded_alone(args, &model, &Windows::new(&tokens, ctx, n).map_err(usage)?, begin);
        }
        let windows = fit_windows(&tokens, ctx, n).map_err(usage)?;
        let fit = if has_sketches { fit_graded } else { fit };
        return fit(args, &model, windows, Curve::digest(&text), begin);
    }
    let windows = Windows::new(&tokens, args.ctx.unwrap_or(1024), args.windows.unwrap_or(8)).map_err(usage)?;
    if !args.planes.is_empty() {
        return planes(args, &model, &windows, begin);
    }
    let results = match args.engine {
        EngineName::Batch => {
            let fitted =
                args.fit_text.as_deref().map(|text| fitted(args, &model, &tokenizer, text, &masks)).transpose()?;
            let open = |path| Model::open(path, Precision::Exact.into(), None);
            let reference = args.reference.as_deref().map(open).transpose()?;
            batch(reference.as_ref(), &model, &windows, &masks, &fitted.unwrap_or_default(), args.json)?
        }
        EngineName::Decode => decode(args, &windows, &masks)?,
    };
    let reference = args.reference.as_deref().map(model_name);
    if args.json {
        let output = Output::new(&model, &args.model, &name(text_path(args)), &windows, &results, begin)?;
        return output::json(&Output { reference, ..output });
    }
    let (model_name, text) = (model_name(&args.model), name(text_path(args)));
    let against = reference.map_or(String::new(), |name| format!(", against {name}"));
    println!("{model_name} ({}), {text}: {} windows of {}{against}", encoding(&model), windows.len(), windows.ctx());
    table(&results);
    println!(
        "masks at {POSITIONS}; bytes: of the layers' weights, predictor included; +- is the 95 % interval: {INTERVAL}"
    );
    Ok(())
}

/// What `eval --fit-shares --json` prints.
#[derive(Serialize)]
struct FittedShares<'a> {
    model: String,
    text: String,
    ctx: usize,
    windows: usize,
    /// Shares of a layer's neurons.
    grid: &'a [f32],
    /// KL divergence from the dense model where one layer computes that share, in nats a token, `[n_layers, n_shares]`.
    loss: Vec<&'a [f32]>,
    /// How 0.3 and 0.5 of all neurons are divided.
    divided: Vec<Divided>,
    /// What they cost together, on the text behind these windows.
    curve: &'a Curve,
    seconds: f64,
    version: &'static str,
    command: Vec<String>,
}

#[derive(Serialize)]
struct Divided {
    active: f32,
    layers: Vec<f32>,
}

/// `--fit-shares`: measures and keeps what each layer's share costs, and then what a division by that costs. `windows` are
/// for the one and the other, of a text with that XXH3-128.
fn fit(
    args: &Eval,
    model: &Model,
    (windows, behind): (Windows<'_>, Windows<'_>),
    text_digest: u128,
    begin: Instant,
) -> anyhow::Result<()> {
    let Model::Split(checkpoint) = model else {
        return Err(Usage("--fit-shares needs a split; -m names a checkpoint".to_owned()).into());
    };
    let split = checkpoint.split();
    let progress = Progress::new("eval", args.json);
    let on_step = |done: usize, total: usize| progress.set(done as u64, total as u64, format!("step {done}/{total}"));
    let shares = fit_shares(checkpoint.as_ref(), split, &windows, &on_step);
    progress.finish();
    let shares = shares.map_err(usage)?;
    // Measured as it will be run: with what the split has, which is kept even if this is as far as it gets.
    Split::put_shares(split.dir(), &shares)?;
    let fitted = SplitCheckpoint::open(split.dir())?;
    let progress = Progress::new("curve", args.json);
    let on_step = |done: usize, total: usize| progress.set(done as u64, total as u64, format!("step {done}/{total}"));
    let curve = measure_curve(&fitted, fitted.split(), &behind, text_digest, &on_step);
    progress.finish();
    let curve = curve.map_err(usage)?;
    let shares = shares.with_curve(curve.clone());
    Split::put_shares(split.dir(), &shares)?;
    let divided = [0.3, 0.5].map(|active| Divided { active, layers: shares.allocate(active) });
    if args.json {
        return output::json(&FittedShares {
            model: model_name(&args.model),
            text: name(text_path(args)),
            ctx: windows.ctx(),
            windows: windows.len(),
            grid: shares.grid(),
            loss: shares.layers().iter().map(|l| l.loss.as_slice()).collect(),
            divided: divided.into(),
            curve: &curve,
            seconds: begin.elapsed().as_secs_f64(),
            version: env!("CARGO_PKG_VERSION"),
            command: std::env::args().skip(1).collect(),
        });
    }
    let (model, text) = (model_name(&args.model), name(text_path(args)));
    println!("{model}, {text}: {} windows of {}; what a share of one layer costs, KL", windows.len(), windows.ctx());
    print!("{:>6}", "layer");
    shares.grid().iter().for_each(|share| print!("{:>9}", format!("{:.0} %", 100.0 * share)));
    divided.iter().for_each(|d| print!("{:>13}", format!("{:.0} % of all", 100.0 * d.active)));
    println!();
    for (l, layer) in shares.layers().iter().enumerate() {
        print!("{l:>6}");
        layer.loss.iter().for_each(|loss| print!("{loss:>9.4}"));
        divided.iter().for_each(|d| print!("{:>13}", format!("{:.1} %", 100.0 * d.layers[l])));
        println!();
    }
    println!("{} windows of {} behind these; perplexity over the dense model's", behind.len(), behind.ctx());
    println!("{:>10}{:>13}{:>13}", "of all", "", "95 %, up to");
    for (share, increase, high) in curve.points() {
        let [share, increase, high] = [share, increase, high].map(|v| 100.0 * v);
        println!("{:>10}{:>13}{:>13}", format!("{share:.0} %"), format!("{increase:+.2} %"), format!("{high:+.2} %"));
    }
    println!(
        "kept in {}: sparse mode divides --active by it, and --max-ppl-increase finds --active",
        args.model.display()
    );
    Ok(())
}

/// What `eval --fit-shares --json` prints of a split with sketches.
#[derive(Serialize)]
struct FittedGraded<'a> {
    model: String,
    text: String,
    ctx: usize,
    windows: usize,
    /// `rows` or `neurons`.
    thresholds_of: &'static str,
    #[serde(flatten)]
    curves: &'a GradedCurves,
    seconds: f64,
    version: &'static str,
    command: Vec<String>,
}

/// `--fit-shares` of a split with sketches: fits thresholds to `windows` and measures on those `behind` what they cost, of a text with
/// that XXH3-128; both are kept.
fn fit_graded(
    args: &Eval,
    model: &Model,
    (windows, behind): (Windows<'_>, Windows<'_>),
    text_digest: u128,
    begin: Instant,
) -> anyhow::Result<()> {
    let curves = keep_graded(args, model, |checkpoint, on_step| {
        let both = (&windows, &behind);
        measure_graded_curves(checkpoint, checkpoint.split(), both, text_digest, on_step).map_err(usage)
    })?;
    if args.json {
        return print_fitted(args, &windows, &curves, begin);
    }
    let (model, text) = (model_name(&args.model), name(text_path(args)));
    println!(
        "{model}, {text}: thresholds of {} from {}; perplexity over the dense model's on {} behind",
        curves.thresholds().kind(),
        count(&windows),
        count(&behind)
    );
    println!("these, where this share of each layer's neurons is always computed, and that of the others is chosen");
    print!("{:>10}", "");
    curves.curves().iter().for_each(|c| print!("{:>22}", format!("{:.0} % always", 100.0 * c.always)));
    println!();
    let rows: Vec<Vec<(f32, f32, f32)>> = curves.curves().iter().map(|c| c.curve.points().collect()).collect();
    for i in 0..rows[0].len() {
        print!("{:>10}", format!("{:.0} %", 100.0 * rows[0][i].0));
        for (_, increase, high) in rows.iter().map(|row| row[i]) {
            print!("{:>22}", format!("{:+.2} (to {:+.2}) %", 100.0 * increase, 100.0 * high));
        }
        println!();
    }
    println!(
        "to: the upper end of the 95 % interval; kept in {}: sparse mode chooses by these thresholds, and --max-ppl-increase \
         finds --active",
        args.model.display()
    );
    Ok(())
}

/// The same with `--no-curve`: thresholds alone.
fn fit_graded_alone(args: &Eval, model: &Model, windows: &Windows<'_>, begin: Instant) -> anyhow::Result<()> {
    let curves = keep_graded(args, model, |checkpoint, on_step| {
        thermocline_analysis::eval::fit_graded(checkpoint, checkpoint.split(), windows, on_step).map_err(usage)
    })?;
    if args.json {
        return print_fitted(args, windows, &curves, begin);
    }
    println!(
        "{}, {}: thresholds of {} from {}, kept in {}: sparse mode chooses by them; what they cost was not measured",
        model_name(&args.model),
        name(text_path(args)),
        curves.thresholds().kind(),
        count(windows),
        args.model.display()
    );
    Ok(())
}

/// Fits with a progress bar, and puts the result into the split.
fn keep_graded(
    args: &Eval,
    model: &Model,
    fit: impl FnOnce(&SplitCheckpoint, &dyn Fn(usize, usize)) -> anyhow::Result<GradedCurves>,
) -> anyhow::Result<GradedCurves> {
    let Model::Split(checkpoint) = model else { unreachable!("a checkpoint has no sketches") };
    let progress = Progress::new("eval", args.json);
    let on_step = |done: usize, total: usize| progress.set(done as u64, total as u64, format!("step {done}/{total}"));
    let curves = fit(checkpoint, &on_step);
    progress.finish();
    let curves = curves?;
    Split::put_graded_curves(checkpoint.split().dir(), &curves)?;
    Ok(curves)
}

fn print_fitted(args: &Eval, windows: &Windows<'_>, curves: &GradedCurves, begin: Instant) -> anyhow::Result<()> {
    output::json(&FittedGraded {
        model: model_name(&args.model),
        text: name(text_path(args)),
        ctx: windows.ctx(),
        windows: windows.len(),
        thresholds_of: curves.thresholds().kind(),
        curves,
        seconds: begin.elapsed().as_secs_f64(),
        version: env!("CARGO_PKG_VERSION"),
        command: std::env::args().skip(1).collect(),
    })
}

fn count(windows: &Windows<'_>) -> String {
    let n = windows.len();
    format!("{n} {} of {}", if n == 1 { "window" } else { "windows" }, windows.ctx())
}

/// `--planes`: what each of them takes, and what it buys.
fn planes(args: &Eval, model: &Model, windows: &Windows<'_>, begin: Instant) -> anyhow::Result<()> {
    if model.split().is_none() {
        return Err(Usage("--planes needs a split; -m names a checkpoint".to_owned()).into());
    }
    let study = study_planes(&Split::open_at(&args.model, Precision::Exact)?)?;
    let progress = Progress::new("eval", args.json);
    let on_step = |done: usize, total: usize| progress.set(done as u64, total as u64, format!("step {done}/{total}"));
    let results = evaluate_planes(&args.model, windows, &args.planes, &on_step);
    progress.finish();
    let results = results.map_err(usage)?;
    if args.json {
        let mut output = Output::new(model, &args.model, &name(text_path(args)), windows, &results, begin)?;
        output.study = Some(&study);
        return output::json(&output);
    }
    println!("{} ({}): bits for each feed-forward weight", model_name(&args.model), study.encoding);
    println!("{:>10} {:>8} {:>8} {:>8}", "plane", "stored", "entropy", "zstd");
    for p in &study.planes {
        println!("{:>10} {:>8.3} {:>8.3} {:>8.3}", p.plane, p.bits_per_weight, p.entropy_bits, p.zstd_bits);
    }
    println!(
        "together {:.2} % of bf16, whose exponents leave {:.2} %",
        100.0 * study.share_of_bf16,
        100.0 * study.bf16_entropy_bits / 16.0
    );
    if let (Some(speed), Some(seconds)) = (study.decode_gb_s, study.decode_seconds_per_token) {
        println!(
            "decoded at {speed:.1} GB/s of bf16 by one thread (a copy: {:.0}), {:.1} ms for all neurons of a token",
            study.copy_gb_s,
            1e3 * seconds
        );
    }
    println!("{}: {} windows of {}, against all planes", name(text_path(args)), windows.len(), windows.ctx());
    println!(
        "{:>12} {:>11} {:>16} {:>8} {:>16} {:>9} {:>7}",
        "planes", "perplexity", "+-", "ratio", "+-", "KL", "top-1"
    );
    for r in &results {
        let range = |r: [f64; 2]| format!("{:.3}..{:.3}", r[0], r[1]);
        println!(
            "{:>12} {:>11.3} {:>16} {:>8.4} {:>16} {:>9.6} {:>7.4}",
            r.planes.as_deref().unwrap_or("-"),
            r.perplexity,
            range(r.perplexity_ci95),
            r.perplexity_ratio.unwrap_or(1.0),
            r.perplexity_ratio_ci95.map_or("-".to_owned(), range),
            r.kl.unwrap_or(0.0),
            r.top1_agreement.unwrap_or(1.0)
        );
    }
    println!("+- is the 95 % interval: {INTERVAL}");
    Ok(())
}

/// Windows, and tokens in each, on which `--fit-text` measures.
const FIT_WINDOWS: usize = 4;
const FIT_CTX: usize = 256;
/// Windows for guesses, if the text has so many: networks are trained on them.
const GUESS_WINDOWS: usize = 64;

/// Whether it is a guess that knows something from `--fit-text`.
fn is_fitted_guess(mask: &Mask) -> bool {
    matches!(mask, Mask::Guessed(guesser, _) if guesser.is_fitted())
}

/// What inputs cost and guesses know, on `text`, as far as masks ask for it.
fn fitted(args: &Eval, model: &Model, tokenizer: &Tokenizer, text: &Path, masks: &[Mask]) -> anyhow::Result<Fitted> {
    let read = std::fs::read_to_string(text).with_context(|| format!("--fit-text {}", text.display()))?;
    let tokens = tokenizer.encode(&read, false).with_context(|| format!("--fit-text {}", text.display()))?;
    if tokens.len() < FIT_WINDOWS * FIT_CTX {
        let text = text.display();
        return Err(
            Usage(format!("--fit-text {text}: {} tokens, needs {}", tokens.len(), FIT_WINDOWS * FIT_CTX)).into()
        );
    }
    let windows = Windows::new(&tokens, FIT_CTX, FIT_WINDOWS).map_err(usage)?;
    let progress = Progress::new("fit", args.json);
    let on_step = |done: usize, total: usize| progress.set(done as u64, total as u64, format!("step {done}/{total}"));
    let (mut inputs, mut guesses) = (None, None);
    if args.mask.contains(&MaskName::Inputs) {
        inputs = Some(fit_input_costs(model.dense(), &windows, &on_step));
    }
    if masks.iter().any(is_fitted_guess) {
        let windows = Windows::new(&tokens, FIT_CTX, (tokens.len() / FIT_CTX).min(GUESS_WINDOWS)).map_err(usage)?;
        guesses = Some(fit_guesses(model.dense(), model.split(), &windows, masks, &on_step));
    }
    progress.finish();
    Ok(Fitted {
        inputs: inputs.transpose().map_err(usage)?,
        guesses: guesses.transpose().map_err(usage)?,
        ..Fitted::default()
    })
}

/// Evaluates with a progress bar.
pub fn batch(
    reference: Option<&Model>,
    model: &Model,
    windows: &Windows<'_>,
    masks: &[Mask],
    fitted: &Fitted,
    quiet: bool,
) -> anyhow::Result<Vec<Evaluation>> {
    let progress = Progress::new("eval", quiet);
    let on_step = |done: usize, total: usize| progress.set(done as u64, total as u64, format!("step {done}/{total}"));
    let results = evaluate_against(reference.map(Model::weights), model.weights(), windows, masks, fitted, &on_step);
    progress.finish();
    results.map_err(usage)
}

fn decode(args: &Eval, windows: &Windows<'_>, masks: &[Mask]) -> anyhow::Result<Vec<Evaluation>> {
    let progress = Progress::new("eval", args.json);
    let mut results = Vec::new();
    for (i, mask) in masks.iter().enumerate() {
        let (mode, active) = match mask {
            Mask::Dense | Mask::Exact => (ModeName::Exact, 1.0),
            Mask::Predicted(active) | Mask::Graded { active, alike: false, .. } => (ModeName::Sparse, *active as f32),
            _ => {
                let text = "--engine decode runs dense, exact, predicted and graded; other masks need --engine batch";
                return Err(Usage(text.to_owned()).into());
            }
        };
        let mut placement = Placement {
            model: args.model.clone(),
            mode,
            active,
            always: None,
            max_error: None,
            max_ppl_increase: None,
            precision: args.precision,
            delta: args.delta.clone(),
            ram_budget: None,
            vram_budget: args.vram_budget,
            cpu_share: None,
            cache_share: None,
            lookahead: None,
            cpu_layers: None,
            ctx_size: None,
            threads: args.threads,
        };
        let split = super::load::placed_split(&placement).with_context(|| "--engine decode needs a split")?;
        if let Mask::Graded { always, .. } = mask {
            placement.always = split.sketches().map(|_| *always);
        }
        let mut loaded = super::load::load(split, &placement, windows.ctx(), 1, true)?;
        let (is_graded, asked) = (loaded.decoder().is_graded(), matches!(mask, Mask::Graded { .. }));
        if mode == ModeName::Sparse && is_graded != asked {
            let text = if is_graded {
                "--engine decode: sparse mode chooses by this split's sketches; --mask graded evaluates that"
            } else {
                "--engine decode: sparse mode has no sketches to choose by here; --mask predicted evaluates what it does"
            };
            return Err(Usage(text.to_owned()).into());
        }
        let on_token = |done: usize, total: usize| {
            let (done, total) = (i * total + done, masks.len() * total);
            progress.set(done as u64, total as u64, format!("token {done}/{total}"));
        };
        results.push(evaluate_decode(loaded.decoder(), windows, &on_token).map_err(usage)?);
    }
    progress.finish();
    Ok(results)
}

/// For each name one mask a share, or one alone.
fn masks(names: &[MaskName], active: &[f64], always: &[f64]) -> Vec<Mask> {
    let each = |of: fn(f64) -> Mask| active.iter().map(|&share| of(share)).collect();
    let of_name = |name: &MaskName| match name {
        MaskName::Dense => vec![Mask::Dense],
        MaskName::Exact => vec![Mask::Exact],
        MaskName::Oracle => each(Mask::Oracle),
        MaskName::OracleH => each(Mask::OracleH),
        MaskName::Predicted => each(Mask::Predicted),
        MaskName::PredictedAlike => each(Mask::PredictedAlike),
        MaskName::Graded | MaskName::GradedAlike => {
            let alike = *name == MaskName::GradedAlike;
            let behind = |&always: &f64| active.iter().map(move |&active| Mask::Graded { active, always, alike });
            always.iter().flat_map(behind).collect()
        }
        MaskName::GradedError => each(Mask::GradedError),
        MaskName::Cats => each(Mask::Cats),
        MaskName::Teal => each(Mask::Teal),
        MaskName::Wina => each(Mask::Wina),
        MaskName::Inputs => each(Mask::Inputs),
        MaskName::Signs => each(|share| Mask::Guessed(Guesser::Signs, share)),
        MaskName::Copies1 => each(|share| Mask::Guessed(Guesser::Copies(CopyBits::One), share)),
        MaskName::Copies2 => each(|share| Mask::Guessed(Guesser::Copies(CopyBits::Two), share)),
        MaskName::Copies3 => each(|share| Mask::Guessed(Guesser::Copies(CopyBits::Three), share)),
        MaskName::Previous => each(|share| Mask::Guessed(Guesser::Previous, share)),
        MaskName::Ahead1 => each(|share| Mask::Guessed(Guesser::AheadByOne, share)),
        MaskName::Ahead2 => each(|share| Mask::Guessed(Guesser::AheadByTwo, share)),
        MaskName::Trained => each(|share| Mask::Guessed(Guesser::Trained, share)),
        MaskName::LowRankPrevious => each(|share| Mask::Guessed(Guesser::LowRankAndPrevious, share)),
    };
    names.iter().flat_map(of_name).collect()
}

/// A flag out of range is the user's to mend, and has its own exit code.
pub fn usage(error: Error) -> anyhow::Error {
    match error {
        Error::Setting { .. } => Usage(error.to_string()).into(),
        other => other.into(),
    }
}

/// The text; only `--task` goes without one.
fn text_path(args: &Eval) -> &Path {
    args.text.as_deref().unwrap_or(Path::new(""))
}

/// The last part of a path: records are compared across machines.
pub fn name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}

/// The folder's name, where the file is called as it is in every folder.
pub fn model_name(path: &Path) -> String {
    let folder = path.parent().filter(|_| name(path) == "model.gguf").map(name).filter(|n| !n.is_empty());
    folder.unwrap_or_else(|| name(path))
}

/// How neurons are encoded, or that they are a checkpoint's.
pub fn encoding(model: &Model) -> String {
    let Some(split) = model.split() else { return "checkpoint".to_owned() };
    let packing = &split.manifest().packing;
    let attention = packing.attention_encoding.as_ref().map_or(String::new(), |own| format!("; attention {own}"));
    format!("{}{attention}", packing.ffn_encoding)
}

/// A line a result.
pub fn table(results: &[Evaluation]) {
    // A column that few tables need.
    let with_always = results.iter().any(|r| r.always.is_some());
    let always = |text: String| if with_always { format!(" {text:>7}") } else { String::new() };
    println!(
        "{:>17} {:>7}{} {:>7} {:>11} {:>16} {:>7} {:>16} {:>8} {:>7} {:>7} {:>7} {:>9} {:>7}",
        "mask",
        "active",
        always("always".to_owned()),
        "bytes",
        "perplexity",
        "+-",
        "ratio",
        "+-",
        "KL",
        "top-1",
        "recall",
        "energy",
        "of oracle",
        "tokens"
    );
    for r in results {
        let range = |r: [f64; 2]| format!("{:.2}..{:.2}", r[0], r[1]);
        let or_dash = |v: Option<f64>, digits: usize| v.map_or("-".to_owned(), |v| format!("{v:.digits$}"));
        println!(
            "{:>17} {:>7}{} {:>7} {:>11.3} {:>16} {:>7} {:>16} {:>8} {:>7} {:>7} {:>7} {:>9} {:>7}",
            r.mask,
            or_dash(r.active, 2),
            always(or_dash(r.always, 2)),
            or_dash(r.bytes_share, 3),
            r.perplexity,
            range(r.perplexity_ci95),
            or_dash(r.perplexity_ratio, 3),
            r.perplexity_ratio_ci95.map_or("-".to_owned(), |r| format!("{:.3}..{:.3}", r[0], r[1])),
            or_dash(r.kl, 4),
            or_dash(r.top1_agreement, 3),
            or_dash(r.recall, 3),
            or_dash(r.energy_recall, 3),
            or_dash(r.energy_recall_of_oracle, 3),
            r.tokens
        );
    }
    for r in results {
        let Some((bytes, multiply_adds)) = r.predictor_bytes_share.zip(r.predictor_multiply_adds) else { continue };
        println!(
            "asking {} at {:.2} takes {:.1} % of the layers' bytes and {:.2} million multiply-adds a token",
            r.mask,
            r.active.unwrap_or(1.0),
            100.0 * bytes,
            1e-6 * multiply_adds
        );
    }
    for (r, rows) in results.iter().filter_map(|r| Some((r, r.rows_read?))) {
        let [gate, up, down, bytes] = [rows.gate, rows.up, rows.down, rows.bytes].map(|share| 100.0 * share);
        println!(
            "{} {:.2}{}: of the rows {bytes:.1} % were read by bytes (gate {gate:.1}, up {up:.1}, down {down:.1} %)",
            r.mask,
            r.active.unwrap_or(1.0),
            r.always.map_or_else(String::new, |always| format!(" behind {always:.2}"))
        );
    }
}
