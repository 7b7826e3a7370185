//! `calibrate`: a checkpoint and texts in, a profile out; `calibrate merge`: shards in, one profile out.

use crate::cli::{Calibrate, CalibrateVerb};
use crate::exit::Usage;
use crate::output::{self, Progress};
use anyhow::Context;
use serde::Serialize;
use std::path::Path;
use thermocline_calibrate::{Event, Profile, RunOptions, Settings, Shard, memory_bound_bytes};
use thermocline_datasets::corpus::Corpus;
use thermocline_datasets::{Checkpoint, Tokenizer, open_checkpoint};
use thermocline_runtime::budget::format_bytes;

/// What `calibrate --json` prints.
#[derive(Serialize)]
struct Report {
    profile: String,
    n_tokens: u64,
    seconds: f64,
    flops: f64,
    gflop_per_second: f64,
    memory_bound_bytes: u64,
    /// Peak memory above what the process held before (binary, tokenizer, token ids): what the bound is for.
    calibration_peak_bytes: u64,
}

pub fn calibrate(args: &Calibrate) -> anyhow::Result<()> {
    if let Some(CalibrateVerb::Merge { profiles, output }) = &args.merge {
        let profile = thermocline_calibrate::merge(profiles, output)?;
        println!("{}: {} shards, {} tokens", output.display(), profiles.len(), profile.meta().n_tokens);
        return Ok(());
    }
    let (Some(model), Some(output)) = (&args.model, &args.output) else {
        return Err(Usage("calibrate needs -m and -o".to_owned()).into());
    };
    super::run::limit_threads(args.threads)?;
    let checkpoint = open_checkpoint(model).with_context(|| "cannot open the model")?;
    let tokenizer = Tokenizer::from_json(&checkpoint.tokenizer_json()?).with_context(|| model.display().to_string())?;
    let corpus = Corpus::open(&args.corpus, args.column.as_deref())?;
    let tokens = corpus.token_windows(&tokenizer, args.window, args.tokens)?.concat();
    let held_before = thermocline_runtime::hardware::peak_rss_bytes();
    let shard = args.shard.map(|(index, count)| Shard { index, count });
    let (options, attention_moments) = (RunOptions { resume: args.resume, shard }, !args.no_attention_moments);
    let settings = Settings { window_len: args.window, attention_moments, ..Settings::default() };
    let profile = profile(checkpoint.as_ref(), &tokens, &settings, &options, output, args.json)?;
    let meta = profile.meta();
    let report = Report {
        profile: output.display().to_string(),
        n_tokens: meta.n_tokens,
        seconds: meta.seconds,
        flops: meta.flops,
        gflop_per_second: meta.flops / meta.seconds / 1e9,
        memory_bound_bytes: memory_bound_bytes(&meta.config, &settings),
        calibration_peak_bytes: thermocline_runtime::hardware::peak_rss_bytes().saturating_sub(held_before),
    };
    if args.json {
        return output::json(&report);
    }
    println!(
        "{}: {} tokens in {:.1} s ({:.0} GFLOP/s), memory {} besides the tokenizer (bound {})",
        report.profile,
        report.n_tokens,
        report.seconds,
        report.gflop_per_second,
        format_bytes(report.calibration_peak_bytes),
        format_bytes(report.memory_bound_bytes)
    );
    println!("next: thermocline split -m {} --profile {} -o SPLIT", model.display(), output.display());
    Ok(())
}

/// Calibrates with a progress bar.
pub fn profile(
    checkpoint: &dyn Checkpoint,
    tokens: &[u32],
    settings: &Settings,
    options: &RunOptions,
    output: &Path,
    quiet: bool,
) -> anyhow::Result<Profile> {
    let progress = Progress::new("calibrate", quiet);
    let mut on_event = |event: Event| match event {
        Event::Progress { layer, n_layers, tokens_done, tokens_total, .. } => {
            let done = layer as u64 * tokens_total + tokens_done;
            progress.set(done, n_layers as u64 * tokens_total, format!("layer {}/{n_layers}", layer + 1));
        }
        Event::Notice(line) => progress.note(&line),
        _ => {}
    };
    let profile = thermocline_calibrate::calibrate(checkpoint, tokens, settings, options, output, &mut on_event);
    progress.finish();
    Ok(profile?)
}
