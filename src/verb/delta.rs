//! `delta`: a base and what was made of it in, a delta directory out.

use crate::cli::Delta;
use crate::output::{self, Progress};
use thermocline_datasets::huggingface::LoraAdapter;
use thermocline_datasets::open_checkpoint;
use thermocline_runtime::budget::format_bytes;
use thermocline_split::delta::{DeltaOptions, DeltaReport, Final, write};

pub fn delta(args: &Delta) -> anyhow::Result<()> {
    super::run::limit_threads(args.threads)?;
    let base = open_checkpoint(&args.base)?;
    let options = DeltaOptions { zstd_level: args.zstd_level, ..DeltaOptions::default() };
    let (adapter, checkpoint);
    let final_model = if LoraAdapter::is_adapter(&args.final_model) {
        adapter = LoraAdapter::open(&args.final_model, base.as_ref())?;
        Final::Adapter(&adapter)
    } else {
        checkpoint = open_checkpoint(&args.final_model)?;
        Final::Checkpoint(checkpoint.as_ref())
    };
    let progress = Progress::new("delta", args.json);
    let on_tensor =
        |done: usize, total: usize| progress.set(done as u64, total as u64, format!("tensor {done}/{total}"));
    let report = write(base.as_ref(), final_model, &options, &args.output, &on_tensor);
    progress.finish();
    let report = report?;
    if args.json {
        return output::json(&report);
    }
    println!("{}", account(&report));
    Ok(())
}

/// One line: what it takes, what it changes, and how.
fn account(report: &DeltaReport) -> String {
    let percent = |part: u64, whole: u64| format!("{:.2} %", 100.0 * part as f64 / whole.max(1) as f64);
    let kinds: Vec<String> = report.kinds.iter().map(|k| format!("{} {}", k.tensors, k.kind.name())).collect();
    format!(
        "{}: {}, {} of the checkpoint's {}; {} of {} weights changed ({}); tensors: {}; blocks: {} unchanged, {} sparse, {} \
         dense",
        report.path.display(),
        format_bytes(report.bytes),
        percent(report.bytes, report.checkpoint_bytes),
        format_bytes(report.checkpoint_bytes),
        report.changed_weights,
        report.n_weights,
        percent(report.changed_weights, report.n_weights),
        kinds.join(", "),
        report.unchanged_blocks,
        report.sparse_blocks,
        report.dense_blocks
    )
}
