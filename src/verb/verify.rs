//! `verify`: every tensor of a split against its checkpoint.

use crate::cli::Verify;
use crate::exit::Usage;
use crate::output::{self, Progress};
use serde_json::json;
use std::collections::BTreeMap;
use thermocline_datasets::open_checkpoint;
use thermocline_split::{Precision, Split, TensorReport, VerifyReport};

pub fn verify(args: &Verify) -> anyhow::Result<()> {
    let Some(model) = &args.model else { return alone(args) };
    let checkpoint = open_checkpoint(model)?;
    let split = Split::open_at(&args.split, Precision::Exact)?;
    let progress = Progress::new("verify", args.json);
    let on_tensor = |done: usize, total: usize| progress.set(done as u64, total as u64, format!("{done}/{total}"));
    let report = thermocline_split::verify(split, checkpoint.as_ref(), &on_tensor);
    progress.finish();
    let report = report?;
    if args.json {
        output::json(&report)?;
    } else {
        print(&report);
    }
    if !report.violations.is_empty() {
        let (n, first) = (report.violations.len(), &report.violations[0]);
        let field = first.clone();
        let spoilt = report.tensors.iter().find(|t| t.name == *first).and_then(|t| t.spoilt);
        let how = match spoilt {
            Some(index) => format!("is not finite at index {index}, where the checkpoint is"),
            None => "must be exact and is not".to_owned(),
        };
        let reason = format!("{n} tensors are not as they should be; the first, {first}, {how}");
        return Err(thermocline_split::Error::Corrupt { path: args.split.clone(), field, reason }.into());
    }
    let inexact = || report.tensors.iter().filter(|t| !t.exact);
    if let Some(first) = inexact().next().filter(|_| args.exact) {
        let (n, field) = (inexact().count(), first.name.clone());
        let reason = format!(
            "{n} of {} tensors are not the checkpoint's bit for bit; the first is stored as {} of {}; \
             split a BF16 checkpoint with --encoding bf16x or q4+exact",
            report.tensors.len(),
            first.stored,
            first.source
        );
        return Err(thermocline_split::Error::Corrupt { path: args.split.clone(), field, reason }.into());
    }
    Ok(())
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
