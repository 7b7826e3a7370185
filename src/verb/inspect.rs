//! `inspect`: what is inside a split, a profile, a delta or a checkpoint.

use crate::cli::Inspect;
use crate::output;
use serde_json::{Value, json};
use std::path::Path;
use thermocline_calibrate::Profile;
use thermocline_datasets::open_checkpoint;
use thermocline_kernels::LayoutSection;
use thermocline_split::delta::{Delta, MANIFEST_FILE};
use thermocline_split::{Precision, Split};

pub fn inspect(args: &Inspect) -> anyhow::Result<()> {
    let path = &args.path;
    let value = if path.join("manifest.json").exists() {
        split(path)?
    } else if path.join("profile.json").exists() {
        let profile = Profile::open(path)?;
        json!({"kind": "profile", "path": path, "profile": profile.meta()})
    } else if path.join(MANIFEST_FILE).exists() {
        delta(path)?
    } else {
        checkpoint(path)?
    };
    if args.json {
        return output::json(&value);
    }
    print(&value, 0);
    Ok(())
}

fn split(path: &Path) -> anyhow::Result<Value> {
    let split = Split::open_at(path, Precision::Exact)?;
    let m = split.manifest();
    let layers: Vec<Value> = split
        .layers()
        .iter()
        .map(|l| {
            let largest = l.bundles().largest().bundles();
            let mut layer = json!({
                "layer": l.layer(), "file_bytes": l.file_bytes(), "chunks": l.n_chunks(),
                "encoding": largest.encoding().name(), "compressed_chunks": l.n_compressed(),
                "neurons": l.order().len(), "bundle_bytes": largest.bundle_bytes(),
                "hottest_neurons": l.order().iter().take(4).collect::<Vec<_>>(),
            });
            if l.bundles().uniform().is_none() {
                let section = |s: &LayoutSection| {
                    let (neurons, of) = (s.neurons().len(), s.bundles());
                    json!({"neurons": neurons, "encoding": of.encoding().name(), "bundle_bytes": of.bundle_bytes()})
                };
                layer["sections"] = l.bundles().sections().iter().map(section).collect();
            }
            layer
        })
        .collect();
    let mut value = json!({
        "kind": "split", "path": path, "format_version": m.version, "source": m.source, "config": m.config,
        "packing": m.packing, "dense_bytes": split.dense_bytes(), "resident_bytes": m.resident.file_bytes,
        "predictor_bytes": m.predictors.file_bytes, "statistics_bytes": m.statistics.file_bytes, "layers": layers,
    });
    if let Some(sketches) = &m.sketches {
        value["sketch_bytes"] = sketches.file_bytes.into();
    }
    if let Some(residuals) = &m.residuals {
        value["residual_bytes"] = residuals.file_bytes.into();
    }
    if let Some(shares) = split.shares()? {
        let rounded = |share: f32| (f64::from(share) * 1e3).round() / 1e3;
        let each = |shares: &[f32]| shares.iter().map(|&s| rounded(s)).collect::<Vec<_>>();
        let divided = each(&shares.allocate(0.3));
        value["shares"] = json!({"measured_at": each(shares.grid()), "layers_at_0.3": divided});
        if let Some(curve) = shares.curve() {
            // By way of text, in which an f32 has no more digits than it needs.
            value["shares"]["curve"] = serde_json::from_str(&serde_json::to_string(curve)?)?;
        }
    }
    if let Some(graded) = split.graded_curves()? {
        value["graded"] = serde_json::from_str(&serde_json::to_string(&graded)?)?;
        value["graded"]["thresholds_of"] = graded.thresholds().kind().into();
    }
    if let Some(report) = split.planted()? {
        value["planted"] = serde_json::to_value(report)?;
    }
    Ok(value)
}

fn delta(path: &Path) -> anyhow::Result<Value> {
    let delta = Delta::open(path)?;
    let m = delta.manifest();
    let tensors: Vec<Value> = m
        .tensors
        .iter()
        .map(|t| json!({"name": t.name, "kind": t.kind, "rows": t.rows, "columns": t.columns, "changed": t.changed, "bytes": t.bytes}))
        .collect();
    Ok(json!({
        "kind": "delta", "path": path, "format_version": m.version, "base": m.base, "final": m.final_model,
        "config": m.config, "bytes": delta.bytes(), "blocks": delta.n_blocks(), "files": m.files, "tensors": tensors,
    }))
}

fn checkpoint(path: &Path) -> anyhow::Result<Value> {
    let checkpoint = open_checkpoint(path)?;
    let names = checkpoint.names();
    let tensors: Vec<Value> = names
        .iter()
        .filter_map(|n| checkpoint.info(n).map(|i| (n, i)))
        .map(|(n, i)| json!({"name": n, "shape": i.shape, "dtype": format!("{:?}", i.dtype), "bytes": i.n_bytes}))
        .collect();
    Ok(json!({"kind": "checkpoint", "path": path, "config": checkpoint.config(), "tensors": tensors}))
}

/// Nested keys, indented; a list of objects as one line each.
fn print(value: &Value, indent: usize) {
    let Value::Object(map) = value else { return };
    for (key, value) in map {
        match value {
            Value::Object(_) => {
                println!("{:indent$}{key}", "");
                print(value, indent + 2);
            }
            Value::Array(items) if items.iter().any(Value::is_object) => {
                println!("{:indent$}{key}", "");
                for item in items {
                    let Value::Object(fields) = item else { continue };
                    let fields: Vec<String> = fields.iter().map(|(k, v)| format!("{k} {}", plain(v))).collect();
                    println!("{:indent$}  {}", "", fields.join("  "));
                }
            }
            other => println!("{:indent$}{key:<22} {}", "", plain(other)),
        }
    }
}

fn plain(value: &Value) -> String {
    // Names come from files, and may be made to drive a terminal.
    value.as_str().map_or_else(|| value.to_string(), crate::exit::printable)
}
