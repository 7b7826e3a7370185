//! `verify`: every tensor of a split, or of a base with a delta, against its checkpoint.

use crate::cli::Verify;
use crate::exit::Usage;
use crate::output::{self, Progress};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;
use thermocline_datasets::huggingface::LoraAdapter;
use thermocline_datasets::{Checkpoint, open_checkpoint};
use thermocline_split::delta::{AdapterCheckpoint, Delta, DeltaCheckpoint, MANIFEST_FILE, verify_delta};
use thermocline_split::{Precision, Split, SplitCheckpoint, TensorReport, VerifyReport};

pub fn verify(args: &Verify) -> anyhow::Result<()> {
    if let Some(delta) = &args.delta {
        return with_delta(args, delta);
    }
    let Some(model) = &args.model else { return alone(args) };
    let checkpoint = open_checkpoint(model)?;
    let split = Split::open_at(&args.split, Precision::Exact)?;
    let progress = Progress::new("verify", args.json);
    let on_tensor = |done: usize, total: usize| progress.set(done as u64, total as u64, format!("{done}/{total}"));
    let report = thermocline_split::verify(split, checkpoint.as_ref(), &on_tensor);
    progress.finish();
    conclude(&report?, &args.split, args.json, args.exact)
}

/// Base and delta against the final model, or against the delta's own digests.
fn with_delta(args: &Verify, dir: &Path) -> anyhow::Result<()> {
    let delta = Delta::open(dir)?;
    let rebuilt = if args.split.join("manifest.json").exists() {
        DeltaCheckpoint::over_split(SplitCheckpoint::open(&args.split)?, delta)?
    } else {
        DeltaCheckpoint::new(open_checkpoint(&args.split)?, delta)?
    };
    let (adapter, checkpoint, adapted);
    let expected: Option<&dyn Checkpoint> = match &args.model {
        Some(path) if LoraAdapter::is_adapter(path) => {
            adapter = LoraAdapter::open(path, rebuilt.base())?;
            adapted = AdapterCheckpoint::new(rebuilt.base(), &adapter);
            Some(&adapted)
        }
        Some(path) => {
            checkpoint = open_checkpoint(path)?;
            Some(checkpoint.as_ref())
        }
        None => None,
    };
    let progress = Progress::new("verify", args.json);
    let on_tensor = |done: usize, total: usize| progress.set(done as u64, total as u64, format!("{done}/{total}"));
    let report = verify_delta(&rebuilt, expected, &on_tensor);
    progress.finish();
    conclude(&report?, &dir.join(MANIFEST_FILE), args.json, true)
}

/// Prints a report; an error, and so an exit code, if anything is not as it should be, or not equal where that is asked.
fn conclude(report: &VerifyReport, path: &Path, json: bool, exact: bool) -> anyhow::Result<()> {
    if json {
        output::json(report)?;
    } else {
        print(report);
    }
    let fail = |n: usize, field: &str, how: String| {
        let reason = format!("{n} tensors are not as they should be; the first, {field}, {how}");
        Err(thermocline_split::Error::Corrupt { path: path.to_owned(), field: field.to_owned(), reason }.into())
    };
    if let Some(first) = report.violations.first() {
        let spoilt = report.tensors.iter().find(|t| t.name == *first).and_then(|t| t.spoilt);
        let how = match spoilt {
            Some(index) => format!("is not finite at index {index}, where the checkpoint is"),
            None => "must be exact and is not".to_owned(),
        };
        return fail(report.violations.len(), first, how);
    }
    let mut inexact = report.tensors.iter().filter(|t| !t.exact);
    match inexact.next() {
        Some(first) if exact => {
            let how = format!(
                "is stored as {} of {}, not bit for bit: split a BF16 checkpoint with --encoding bf16x or q4+exact",
                first.stored, first.source
            );
            fail(1 + inexact.count(), &first.name, how)
        }
        _ => Ok(()),
    }
}

/// Without a checkpoint: a planted split, of which only the checksums can be wrong.
fn alone(args: &Verify) -> anyhow::Result<()> {
    let split = Split::open(&args.split)?;
    let Some(planted) = split.planted()? else {
        let text = "verify needs -m, the checkpoint that the split was made from; only a planted split has none";
        return Err(Usage(text.to_owned()).into());
    };
    let progress = Progress::new("verify", args.json);
    let on_part = |done: usize, total: usize| progress.set(done as u64, total as u64, format!("{done}/{total}"));
    let checked = split.check(&on_part);
    progress.finish();
    checked?;
    let n_chunks: usize = split.layers().iter().map(thermocline_split::LayerFile::n_chunks).sum();
    if args.json {
        return output::json(&json!({"planted": planted.model, "n_chunks": n_chunks, "violations": []}));
    }
    println!(
        "{}: made without a checkpoint; the checksums of {n_chunks} chunks and of everything else are right",
        planted.model
    );
    Ok(())
}

fn print(report: &VerifyReport) {
    // Tensors of one kind together: layers.N is dropped from the name.
    let mut kinds: BTreeMap<String, Vec<&TensorReport>> = BTreeMap::new();
    for t in &report.tensors {
        let kind: Vec<&str> = t.name.split('.').filter(|p| p.parse::<usize>().is_err()).collect();
        kinds.entry(kind.join(".")).or_default().push(t);
    }
    println!("{:<44} {:>4}  {:>6} -> {:<6} {:>10}  {:>10}", "tensors", "n", "source", "stored", "relative", "largest");
    for (kind, tensors) in &kinds {
        let (first, n) = (tensors[0], tensors.len());
        let error = tensors.iter().map(|t| t.relative_error).fold(0.0, f64::max);
        let largest = tensors.iter().map(|t| t.largest_error).fold(0.0, f32::max);
        let exact = tensors.iter().all(|t| t.exact);
        let error = if exact { "exact".to_owned() } else { format!("{error:.2e}") };
        println!("{kind:<44} {n:>4}  {:>6} -> {:<6} {error:>10}  {largest:>10.2e}", first.source, first.stored);
    }
    for t in &report.tensors {
        if let Some(index) = t.first_not_finite {
            println!("warning: {} has a value that is not finite at index {index} of the checkpoint", t.name);
        }
        // A bias may be: only matrices are told.
        if t.all_zero && !t.name.ends_with(".bias") {
            println!("warning: {} is all zero in the checkpoint", t.name);
        }
    }
    println!(
        "{} weights and {} chunks checked, {} of {} tensors exact, {} violations",
        report.n_weights,
        report.n_chunks,
        report.tensors.iter().filter(|t| t.exact).count(),
        report.tensors.len(),
        report.violations.len()
    );
}
