//! Times a calibration: `cargo run --release --example speed -- MODEL TEXT N_TOKENS OUT`.

#[path = "support/text.rs"]
mod text;

use std::{path::Path, time::Instant};
use thermocline_calibrate::{Event, RunOptions, Settings, calibrate, memory_bound_bytes};
use thermocline_datasets::open_checkpoint;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, n_tokens, out] = arguments.as_slice() else {
        return Err("usage: speed MODEL TEXT N_TOKENS OUT".into());
    };
    let checkpoint = open_checkpoint(Path::new(model))?;
    let mut tokens = text::tokens(checkpoint.as_ref(), Path::new(text))?;
    tokens.truncate(n_tokens.parse()?);
    let settings = Settings::default();
    // The tokenizer's working memory is not the run's: forget the peak so far.
    std::fs::write("/proc/self/clear_refs", "5").ok();
    let before = status("VmRSS");
    let start = Instant::now();
    let mut report = |event: Event| {
        if let Event::Progress { layer, tokens_done: 0, .. } = event {
            eprintln!("layer {layer} at {:.1} s", start.elapsed().as_secs_f64());
        }
    };
    let profile =
        calibrate(checkpoint.as_ref(), &tokens, &settings, &RunOptions::default(), Path::new(out), &mut report)?;
    let meta = profile.meta();
    println!(
        "{} tokens in {:.1} s: {:.0} tokens/s, {:.1} GFLOP/s; memory bound {} MiB",
        meta.n_tokens,
        meta.seconds,
        meta.n_tokens as f64 / meta.seconds,
        meta.flops / meta.seconds / 1e9,
        memory_bound_bytes(&meta.config, &settings) >> 20,
    );
    println!("resident before {before}, peak {}", status("VmHWM"));
    Ok(())
}

/// A field of Linux' account of this process.
fn status(field: &str) -> String {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    line.map_or_else(String::new, |value| value.trim_start_matches(':').trim().to_owned())
}
