//! A disk that misbehaves (cases 23, 29 to 31 and 36): a library in front of the C library's reads and writes, preloaded into
//! the program (`tests/support/faults.c`).

use crate::harness::{Table, bytes_of};
use crate::support::{
    self, Ran, calibrating, demo, files, json, llama, medium, model, needed_bytes, once, profile, split, splitting,
    text, thermocline,
};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

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

/// Variables that give a program `fault` at files whose path contains `chosen`.
fn variables(fault: &str, at: u64, chosen: &str) -> [(&'static str, String); 4] {
    let library = text(&library()).to_owned();
    [
        ("LD_PRELOAD", library),
        ("FAULT", fault.to_owned()),
        ("FAULT_AT", at.to_string()),
        ("FAULT_PATH", chosen.to_owned()),
    ]
}

/// Runs the program with `fault` at files whose path contains `chosen`.
fn with(fault: &str, at: u64, chosen: &str, args: &[&str]) -> Ran {
    let ran: Ran = thermocline().envs(variables(fault, at, chosen)).args(args).output().unwrap().into();
    assert!(!ran.stderr.contains("panicked"), "{fault}: {}", ran.stderr);
    ran
}

/// A fault, its number, and the files that have it.
type Fault<'a> = (&'a str, u64, &'a str);

/// What the program says with `fault`, as part of `table`: exit code 1, and no more memory than `allowed_bytes`.
fn fails_with(table: &mut Table, fault: Fault<'_>, allowed_bytes: u64, case: u8, name: &str, args: &[&str]) -> String {
    let given = variables(fault.0, fault.1, fault.2);
    let given = given.each_ref().map(|(name, value)| (*name, value.as_str()));
    table.ends_with(&given, 1, allowed_bytes, case, name, args)
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
    let slow = answered(with("slow", 5000, "/layers/", &args));
    assert_eq!(slow["tokens"], expected["tokens"]);
    let speed = |answer: &Value| answer["decode_tok_s"].as_f64().unwrap();
    assert!(speed(&slow) < 0.5 * speed(&expected), "{} of {}", speed(&slow), speed(&expected));
}

/// Every layer is one chunk, so that a pass reads a file once, at one place.
fn whole_layers() -> PathBuf {
    split(&medium(), "q4", &["--chunk-neurons", "2048", "--order", "random"])
}

#[test]
fn a_disk_that_fails_is_named_and_given_up_on() {
    let mut table = Table::new("disk-reads");
    let dir = table.folder().join("SPLIT");
    std::os::unix::fs::symlink(whole_layers(), &dir).unwrap();
    let allowed = bytes_of(&whole_layers());
    let streamed = streaming(&dir, &[], 0);
    let streamed: Vec<&str> = streamed.iter().map(String::as_str).collect();
    // The model is loaded and runs when its third pass over this layer fails.
    let said = fails_with(&mut table, ("eio-later", 2, "layers/005.thm"), allowed, 30, "while-it-runs", &streamed);
    for part in ["layers/005.thm", "Input/output error", "attempts"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let whole = ["run", "-m", text(&dir), "-p", "a", "-n", "2", "-t", "1"];
    for chosen in ["manifest.json", "layers/003.thm", "resident.safetensors", "tokenizer.json"] {
        let said = fails_with(&mut table, ("eio", 0, chosen), allowed, 30, chosen, &whole);
        assert!(said.contains(chosen) && said.contains("Input/output error"), "{chosen}: {said}");
    }
    let checkpoint = model(&llama());
    let inspect = ["inspect", text(&checkpoint)];
    let said = fails_with(&mut table, ("eio", 0, "model.safetensors"), 0, 30, "checkpoint", &inspect);
    assert!(said.contains("model.safetensors"), "{said}");
    table.check();
}

/// The file is cut by whoever has it open when its third pass begins: the model runs.
#[test]
fn a_file_cut_under_a_running_program_is_named() {
    let mut table = Table::new("model-changed");
    let dir = table.folder().join("SPLIT");
    support::copy_dir(&whole_layers(), &dir);
    let allowed = bytes_of(&dir);
    let streamed = streaming(&dir, &[], 0);
    let streamed: Vec<&str> = streamed.iter().map(String::as_str).collect();
    let said = fails_with(&mut table, ("cut", 2, "layers/005.thm"), allowed, 29, "cut", &streamed);
    assert!(said.contains("layers/005.thm") && said.contains("changed while it was in use"), "{said}");
    table.check();
}

/// Writes that fail half way: the output's name is absent, and the next run without the fault gives the same bytes.
#[test]
fn a_disk_that_is_full_or_broken_loses_nothing() {
    let mut table = Table::new("disk-writes");
    let (made, profile, folder) = (model(&medium()), profile(&medium()), table.folder().to_owned());
    let (a, b) = (folder.join("split"), folder.join("profile"));
    let splitting = splitting(&made, &profile, &["--encoding", "bf16", "-t", "1"], &a);
    let calibrating = [&calibrating(&made, "1024", "128", &b)[..], &["--resume", "-t", "1"]].concat();
    let (chosen, allowed) = (text(&folder), bytes_of(&made) + bytes_of(&profile));
    for (args, out) in [(&splitting[..], &a), (&calibrating, &b)] {
        for (fault, at) in [("full", 100_000), ("full", 3_000_000), ("write-eio", 2_000_000), ("sync-eio", 0)] {
            let name = format!("{}-{fault}-at-{at}", args[0]);
            let said = fails_with(&mut table, (fault, at, chosen), allowed, 23, &name, args);
            assert!(said.contains(chosen) && !out.exists(), "{name}: {said}");
            let full = said.contains("disk full") && said.contains("bytes");
            assert!(full == (fault == "full"), "{name}: {said}");
        }
        support::ok(args);
    }
    assert!(files(&a) == files(&split(&medium(), "bf16", &[])));
    let statistics = |dir: &Path| std::fs::read(dir.join("statistics.safetensors")).unwrap();
    assert!(statistics(&b) == statistics(&profile));
    table.check();
}

/// What a failed run left of a delta is no delta, but the next run goes on from there.
#[test]
fn a_delta_on_a_full_disk_is_never_half_there() {
    let mut table = Table::new("disk-writes-delta");
    let folder = table.folder().to_owned();
    let out = folder.join("delta");
    let (base, tuned) = (demo::model(), demo::tuned());
    let args = ["delta", text(&base), text(&tuned), "-o", text(&out)];
    let allowed = bytes_of(&base) + bytes_of(&tuned);
    for (fault, at) in [("full", 1000), ("full", 500_000), ("write-eio", 300_000), ("sync-eio", 0)] {
        let name = format!("delta-{fault}-at-{at}");
        fails_with(&mut table, (fault, at, text(&folder)), allowed, 23, &name, &args);
        assert!(!out.exists(), "{name}");
        let left = support::run(&["inspect", text(&folder.join("delta.partial"))]);
        assert_ne!(left.code, Some(0), "{fault}: what is left is no delta");
    }
    // A line that says what is being made, then one for each tensor; a forged one shows that it is not made again.
    let journal = folder.join("delta.partial/journal");
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
    table.check();
}
