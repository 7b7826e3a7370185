//! `delta` and `verify --delta` end to end, on the demo's model.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod support;

use serde_json::{Value, json as value};
use std::fs;
use std::path::{Path, PathBuf};
use support::{calibrating, copy, copy_dir, fails, json, llama, model, ok, once, splitting, text};
use tempfile::TempDir;
use thermocline_datasets::Random;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/demo/model")
}

/// A split of the demo's model that holds every bit.
fn split() -> PathBuf {
    let model = demo();
    let profile = once("demo-model.profile", |path| drop(ok(&calibrating(&model, "1024", "128", path))));
    once("demo-model.bf16", |path| drop(ok(&splitting(&model, &profile, &["--encoding", "bf16"], path))))
}

/// Where the tensors' bytes start in a safetensors file.
fn data_start(bytes: &[u8]) -> usize {
    8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize
}

/// The demo's model with one weight in twenty moved by one to four places of its last bit.
fn tuned() -> PathBuf {
    once("demo-tuned", |path| {
        copy_dir(&demo(), path);
        let file = path.join("model.safetensors");
        let mut bytes = fs::read(&file).unwrap();
        let start = data_start(&bytes);
        let mut random = Random::new(20);
        for pair in bytes[start..].chunks_exact_mut(2) {
            if random.below(20) == 0 {
                let step = 1 + random.below(4) as u16;
                let moved = u16::from_le_bytes([pair[0], pair[1]]).wrapping_add(step);
                pair.copy_from_slice(&moved.to_le_bytes());
            }
        }
        fs::write(file, bytes).unwrap();
    })
}

fn delta() -> PathBuf {
    once("demo-tuned.delta", |path| drop(ok(&["delta", text(&demo()), text(&tuned()), "-o", text(path)])))
}

#[test]
fn a_tune_of_five_percent_comes_back_bit_for_bit_from_an_eighth_of_the_bytes() {
    let (base, tuned, dir) = (demo(), tuned(), TempDir::new().unwrap());
    let out = dir.path().join("delta");
    let report = json(&["delta", text(&base), text(&tuned), "-o", text(&out), "--json"]);
    let number = |key: &str| report[key].as_f64().unwrap();
    assert!(number("bytes") * 8.0 < number("checkpoint_bytes"), "{report}");
    let share = number("changed_weights") / number("n_weights");
    assert!((0.045..0.055).contains(&share), "{share}");
    let on_disk: u64 = fs::read_dir(&out).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
    assert_eq!(on_disk, report["bytes"].as_u64().unwrap());

    // Twice the same bytes, and one line that says so.
    let again = dir.path().join("again");
    let line = ok(&["delta", text(&base), text(&tuned), "-o", text(&again), "-t", "1"]).stdout;
    assert!(line.lines().count() == 1 && line.contains("of the checkpoint's") && line.contains("sparse"), "{line}");
    assert_eq!(support::files(&out), support::files(&again));

    // From the checkpoint and from the split, against the final model and against the digests.
    for from in [base.clone(), split()] {
        for against in [&["-m", text(&tuned)][..], &[]] {
            let args = [&["verify", text(&from), "--delta", text(&out), "--json"], against].concat();
            let proof = json(&args);
            assert_eq!(proof["violations"], value!([]), "{args:?}");
            assert!(proof["tensors"].as_array().unwrap().iter().all(|t| t["exact"] == true));
            assert_eq!(proof["n_weights"], report["n_weights"]);
        }
    }
    let inside = json(&["inspect", text(&out), "--json"]);
    assert_eq!((&inside["kind"], &inside["bytes"]), (&"delta".into(), &report["bytes"]));
    assert!(ok(&["verify", text(&base), "--delta", text(&out), "-m", text(&tuned)]).stdout.contains(" 0 violations"));
    assert!(fails(1, &["delta", text(&base), text(&tuned), "-o", text(&out)]).contains("exists"));
}

#[test]
fn other_models_and_damage_are_told() {
    let (base, tuned, delta) = (demo(), tuned(), delta());
    let other = model(&llama());
    let dir = TempDir::new().unwrap();
    let new = dir.path().join("new");
    // Another shape, another base, another final model.
    let message = fails(4, &["delta", text(&base), text(&other), "-o", text(&new)]);
    assert!(message.contains("in the base") && !new.exists(), "{message}");
    let message = fails(4, &["verify", text(&tuned), "--delta", text(&delta), "-m", text(&tuned)]);
    assert!(message.contains("digest"), "{message}");
    let message = fails(4, &["verify", text(&base), "--delta", text(&delta), "-m", text(&base)]);
    assert!(message.contains("must be exact and is not"), "{message}");
    // A quantised split does not hold the base's bits.
    let profile = once("demo-model.profile", |path| drop(ok(&calibrating(&base, "1024", "128", path))));
    let q4 = once("demo-model.q4", |path| drop(ok(&splitting(&base, &profile, &["--encoding", "q4"], path))));
    let message = fails(4, &["verify", text(&q4), "--delta", text(&delta), "-m", text(&tuned)]);
    assert!(message.contains("bf16"), "{message}");
    let (_guard, damaged) = copy(&delta);
    let path = damaged.join("delta.bin");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    let message = fails(4, &["verify", text(&base), "--delta", text(&damaged), "-m", text(&tuned)]);
    assert!(message.contains("delta.bin") && message.contains("checksum"), "{message}");
    fs::remove_file(damaged.join("delta.json")).unwrap();
    fails(4, &["inspect", text(&damaged)]);
}

/// An adapter of rank 2 to the first layer's query and down projections.
fn adapter(folder: &Path, settings: &Value) {
    let config: Value = serde_json::from_slice(&fs::read(demo().join("config.json")).unwrap()).unwrap();
    let size = |key: &str| config[key].as_u64().unwrap() as usize;
    let (hidden, ffn, heads) = (size("hidden_size"), size("intermediate_size"), size("num_attention_heads"));
    let queries = config["head_dim"].as_u64().map_or(hidden, |d| d as usize * heads);
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    let mut random = Random::new(4);
    for (module, n_in, n_out) in [("self_attn.q_proj", hidden, queries), ("mlp.down_proj", ffn, hidden)] {
        for (factor, shape) in [("A", [2, n_in]), ("B", [n_out, 2])] {
            let from = data.len();
            (0..shape[0] * shape[1]).for_each(|_| data.extend((random.normal() * 0.05).to_le_bytes()));
            let name = format!("base_model.model.model.layers.0.{module}.lora_{factor}.weight");
            header.insert(name, value!({"dtype": "F32", "shape": shape, "data_offsets": [from, data.len()]}));
        }
    }
    let header = Value::Object(header).to_string();
    fs::create_dir_all(folder).unwrap();
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    fs::write(folder.join("adapter_model.safetensors"), bytes).unwrap();
    fs::write(folder.join("adapter_config.json"), settings.to_string()).unwrap();
}

#[test]
fn an_adapter_is_stored_as_its_factors() {
    let (base, dir) = (demo(), TempDir::new().unwrap());
    let (folder, out) = (dir.path().join("adapter"), dir.path().join("delta"));
    let mut settings = value!({
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj", "down_proj"],
    });
    adapter(&folder, &settings);
    let report = json(&["delta", text(&base), text(&folder), "-o", text(&out), "--json"]);
    let kinds = report["kinds"].as_array().unwrap();
    assert_eq!((&kinds[1]["kind"], &kinds[1]["tensors"]), (&"low_rank".into(), &2.into()));
    for from in [&base, &split()] {
        for against in [&["-m", text(&folder)][..], &[]] {
            let args = [&["verify", text(from), "--delta", text(&out), "--json"], against].concat();
            assert_eq!(json(&args)["violations"], value!([]), "{args:?}");
        }
    }
    settings["use_dora"] = true.into();
    adapter(&folder, &settings);
    let message = fails(4, &["delta", text(&base), text(&folder), "-o", text(&dir.path().join("new"))]);
    assert!(message.contains("use_dora") && message.contains("merge_and_unload"), "{message}");
}

#[test]
fn a_full_disk_is_told_and_leaves_no_delta() {
    let (base, tuned, dir) = (demo(), tuned(), TempDir::new().unwrap());
    let out = dir.path().join("delta");
    // No file may grow beyond 100 KiB: writes fail half way, as on a full disk.
    let mut command = std::process::Command::new("bash");
    command.args(["-c", "trap '' XFSZ; ulimit -f 100; exec \"$@\"", "bash", support::BINARY, "delta"]);
    let ran: support::Ran = command.args([&base, &tuned]).arg("-o").arg(&out).output().unwrap().into();
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains("disk full") && !out.exists(), "{}", ran.stderr);
    fails(4, &["inspect", text(&dir.path().join("delta.partial"))]);
    ok(&["delta", text(&base), text(&tuned), "-o", text(&out)]);
    assert!(support::files(&out) == support::files(&delta()) && !dir.path().join("delta.partial").exists());
}
