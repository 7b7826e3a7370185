//! `delta` and `verify --delta` end to end, on the demo's model.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod support;

use serde_json::json as value;
use std::fs;
use support::{copy, demo, fails, json, llama, model, ok, text};
use tempfile::TempDir;

#[test]
fn a_tune_of_five_percent_comes_back_bit_for_bit_from_an_eighth_of_the_bytes() {
    let (base, tuned, dir) = (demo::model(), demo::tuned(), TempDir::new().unwrap());
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
    for from in [base.clone(), demo::split("bf16", &[])] {
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
    let (base, tuned, delta) = (demo::model(), demo::tuned(), demo::delta());
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
    let q4 = demo::split("q4", &[]);
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

#[test]
fn an_adapter_is_stored_as_its_factors() {
    let (base, dir) = (demo::model(), TempDir::new().unwrap());
    let (folder, out) = (dir.path().join("adapter"), dir.path().join("delta"));
    let mut settings = demo::lora();
    demo::adapter(&folder, &settings);
    let report = json(&["delta", text(&base), text(&folder), "-o", text(&out), "--json"]);
    let kinds = report["kinds"].as_array().unwrap();
    assert_eq!((&kinds[1]["kind"], &kinds[1]["tensors"]), (&"low_rank".into(), &2.into()));
    for from in [&base, &demo::split("bf16", &[])] {
        for against in [&["-m", text(&folder)][..], &[]] {
            let args = [&["verify", text(from), "--delta", text(&out), "--json"], against].concat();
            assert_eq!(json(&args)["violations"], value!([]), "{args:?}");
        }
    }
    settings["use_dora"] = true.into();
    demo::adapter(&folder, &settings);
    let message = fails(4, &["delta", text(&base), text(&folder), "-o", text(&dir.path().join("new"))]);
    assert!(message.contains("use_dora") && message.contains("merge_and_unload"), "{message}");
}

#[test]
fn a_full_disk_is_told_and_leaves_no_delta() {
    let (base, tuned, dir) = (demo::model(), demo::tuned(), TempDir::new().unwrap());
    let out = dir.path().join("delta");
    // No file may grow beyond 100 KiB: writes fail half way, as on a full disk.
    let mut command = std::process::Command::new("bash");
    command.args(["-c", "trap '' XFSZ; ulimit -f 100; exec \"$@\"", "bash", support::BINARY, "delta"]);
    let ran: support::Ran = command.args([&base, &tuned]).arg("-o").arg(&out).output().unwrap().into();
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains("disk full") && !out.exists(), "{}", ran.stderr);
    fails(4, &["inspect", text(&dir.path().join("delta.partial"))]);
    ok(&["delta", text(&base), text(&tuned), "-o", text(&out)]);
    assert!(support::files(&out) == support::files(&demo::delta()) && !dir.path().join("delta.partial").exists());
}
