//! A disk that misbehaves (cases 23, 29 to 31, 36): a library in front of the C library's reads and writes, preloaded into
//! the program (`tests/support/faults.c`).

use crate::support::{
    self, Ran, calibrating, demo, files, json, llama, medium, model, needed_bytes, once, profile, split, splitting,
    text, thermocline,
};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// The library; compiled once.
fn library() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/faults.c");
    let key = xxhash_rust::xxh3::xxh3_64(&std::fs::read(&source).unwrap());
    once(&format!("faults-{key:016x}.so"), |path| {
        let compiled =
            Command::new("cc").args(["-O2", "-shared", "-fPIC", "-o", text(path), text(&source), "-ldl"]).output();
        let compiled = compiled.unwrap();
        assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    })
}

/// Runs the program with `fault` at files whose path contains `chosen`.
fn with(fault: &str, at: u64, chosen: &str, args: &[&str]) -> Ran {
    let mut command = thermocline();
    command.env("LD_PRELOAD", library()).env("FAULT", fault).env("FAULT_AT", at.to_string()).env("FAULT_PATH", chosen);
    let ran: Ran = command.args(args).output().unwrap().into();
    assert!(!ran.stderr.contains("panicked"), "{fault}: {}", ran.stderr);
    ran
}

fn answered(ran: Ran) -> Value {
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    serde_json::from_str(&ran.stdout).unwrap()
}

/// Arguments of a run that streams most of a split: its least budget, or a little more.
fn streaming(dir: &Path, more: &[&str], beyond: u64) -> Vec<String> {
    let given = ["run", "-m", text(dir), "-p", "the lake", "-n", "2", "--ignore-eos", "--temp", "0", "-t", "2"];
    let given = [&given[..], more].concat();
    let budget = format!("{}B", needed_bytes(&given) + beyond);
    [&given[..], &["--json", "--ram-budget", &budget]].concat().into_iter().map(str::to_owned).collect()
}

/// Modes and splits that read in every way there is: stored chunks, compressed ones, planes joined, rows of matrices.
fn streamed_runs() -> Vec<Vec<String>> {
    let stored = split(&medium(), "bf16", &["--chunk-neurons", "16"]);
    let compressed = split(&medium(), "bf16", &["--chunk-neurons", "16", "--zstd-level", "1"]);
    let planes = demo::split("q4+exact", &[]);
    vec![
        streaming(&stored, &[], 0),
        streaming(&compressed, &[], 0),
        streaming(&stored, &["--mode", "sparse", "--active", "0.2"], 4 << 20),
        streaming(&planes, &["--precision", "exact"], 0),
    ]
}

#[test]
fn short_interrupted_and_late_reads_change_nothing() {
    for args in streamed_runs() {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let expected = json(&args);
        assert!(expected["bytes_per_token"]["disk"].as_u64().unwrap() > 0, "{args:?} streams");
        // EINTR and EAGAIN in turns, two of three calls.
        for (fault, at) in [("short", 0), ("interrupted", 0), ("jitter", 300), ("eio-at-first", 2)] {
            let got = answered(with(fault, at, "/layers/", &args));
            assert_eq!(got["tokens"], expected["tokens"], "{fault}: {args:?}");
            assert_eq!(got["bytes_per_token"]["disk"], expected["bytes_per_token"]["disk"], "{fault}");
        }
    }
}

#[test]
fn a_disk_ten_times_slower_gives_the_same_answer_and_shows() {
    let dir = split(&medium(), "bf16", &["--chunk-neurons", "16"]);
    let args = streaming(&dir, &[], 0);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let expected = json(&args);
    let slow = answered(with("slow", 1500, "/layers/", &args));
    assert_eq!(slow["tokens"], expected["tokens"]);
    let speed = |answer: &Value| answer["decode_tok_s"].as_f64().unwrap();
    assert!(speed(&slow) < 0.5 * speed(&expected), "{} of {}", speed(&slow), speed(&expected));
}

#[test]
fn a_disk_that_fails_is_named_and_given_up_on() {
    let dir = split(&medium(), "bf16", &["--chunk-neurons", "16"]);
    let streamed = streaming(&dir, &[], 0);
    let streamed: Vec<&str> = streamed.iter().map(String::as_str).collect();
    // Late enough that the model is loaded and runs.
    let ran = with("eio-later", 400, "/layers/", &streamed);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    for said in ["layers/", ".thm", "Input/output error", "attempts"] {
        assert!(ran.stderr.contains(said), "{said}: {}", ran.stderr);
    }
    let whole = ["run", "-m", text(&dir), "-p", "a", "-n", "2"];
    for chosen in ["manifest.json", "layers/003.thm", "resident.safetensors", "tokenizer.json"] {
        let ran = with("eio", 0, chosen, &whole);
        assert_eq!(ran.code, Some(1), "{chosen}: {}", ran.stderr);
        assert!(ran.stderr.contains(chosen) && ran.stderr.contains("Input/output error"), "{chosen}: {}", ran.stderr);
    }
    let made = model(&llama());
    let ran = with("eio", 0, "model.safetensors", &["inspect", text(&made)]);
    assert!(ran.code == Some(1) && ran.stderr.contains("model.safetensors"), "{}", ran.stderr);
}

/// Writes that fail half way: the output's name is absent, and the next run without the fault gives the same bytes.
#[test]
fn a_disk_that_is_full_or_broken_loses_nothing() {
    let (made, profile, folder) = (model(&medium()), profile(&medium()), TempDir::new().unwrap());
    let (a, b) = (folder.path().join("split"), folder.path().join("profile"));
    let splitting = splitting(&made, &profile, &["--encoding", "bf16"], &a);
    let calibrating = [&calibrating(&made, "1024", "128", &b)[..], &["--resume"]].concat();
    let chosen = text(folder.path());
    for (args, out) in [(&splitting[..], &a), (&calibrating, &b)] {
        for (fault, at) in [("full", 100_000), ("full", 3_000_000), ("write-eio", 2_000_000), ("sync-eio", 0)] {
            let ran = with(fault, at, chosen, args);
            assert_eq!(ran.code, Some(1), "{fault} at {at}: {} {}", ran.stdout, ran.stderr);
            assert!(ran.stderr.contains(chosen) && !out.exists(), "{fault}: {}", ran.stderr);
            let full = ran.stderr.contains("disk full") && ran.stderr.contains("bytes");
            assert!(full == (fault == "full"), "{fault}: {}", ran.stderr);
        }
        support::ok(args);
    }
    assert!(files(&a) == files(&split(&medium(), "bf16", &[])));
    let statistics = |dir: &Path| std::fs::read(dir.join("statistics.safetensors")).unwrap();
    assert!(statistics(&b) == statistics(&profile));
}

/// What a failed run left of a delta is no delta, but the next run goes on from there.
#[test]
fn a_delta_on_a_full_disk_is_never_half_there() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("delta");
    let (base, tuned) = (demo::model(), demo::tuned());
    let args = ["delta", text(&base), text(&tuned), "-o", text(&out)];
    for (fault, at) in [("full", 1000), ("full", 500_000), ("write-eio", 300_000), ("sync-eio", 0)] {
        let ran = with(fault, at, text(folder.path()), &args);
        assert!(ran.code == Some(1) && !out.exists(), "{fault}: {} {}", ran.stdout, ran.stderr);
        let left = support::run(&["inspect", text(&folder.path().join("delta.partial"))]);
        assert_ne!(left.code, Some(0), "{fault}: what is left is no delta");
    }
    // A line that says what is being made, then one for each tensor; a forged one shows that it is not made again.
    let journal = folder.path().join("delta.partial/journal");
    let text_of_journal = std::fs::read_to_string(&journal).unwrap();
    assert!(text_of_journal.lines().count() > 10, "{text_of_journal}");
    let digest = "\"final_digest\":\"";
    let at = text_of_journal.find(digest).unwrap() + digest.len();
    let forged = format!("{}{}{}", &text_of_journal[..at], "0".repeat(32), &text_of_journal[at + 32..]);
    std::fs::write(&journal, forged).unwrap();
    support::ok(&args);
    let manifest = std::fs::read_to_string(out.join("delta.json")).unwrap();
    assert!(manifest.contains(&"0".repeat(32)), "the first tensor was made again");
    std::fs::remove_dir_all(&out).unwrap();
    support::ok(&args);
    assert!(files(&out) == files(&demo::delta()));
}
