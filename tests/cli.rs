//! Flags, exit codes and messages.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod support;

use std::fs;
use std::process::Stdio;
use support::{copy, fails, json, llama, model, ok, profile, run, split, text, thermocline};

fn tiny_split() -> std::path::PathBuf {
    split(&llama(), "q4", &["--chunk-neurons", "16", "--order", "random"])
}

#[test]
fn every_verb_explains_its_flags() {
    let expected: &[(&str, &[&str])] = &[
        (
            "run",
            &[
                "-m, --model",
                "-p, --prompt",
                "-f, --file",
                "-n, --predict",
                "-c, --ctx-size",
                "-t, --threads",
                "-s, --seed",
                "--temp",
                "--top-k",
                "--top-p",
                "--min-p",
                "--repeat-penalty",
                "--ram-budget",
                "--vram-budget",
                "--active",
                "--mode",
                "--json",
                "--chat",
                "--check-tensors",
            ],
        ),
        (
            "calibrate",
            &["-m, --model", "--corpus", "--tokens", "--window", "-o, --output", "--resume", "--shard", "--json"],
        ),
        (
            "split",
            &[
                "-m, --model",
                "--profile",
                "-o, --output",
                "--encoding",
                "--order",
                "--chunk-neurons",
                "--zstd-level",
                "--json",
            ],
        ),
        ("verify", &["<SPLIT>", "-m, --model", "--json"]),
        ("plan", &["-m, --model", "--ram-budget", "--vram-budget", "--mode", "--active", "-c, --ctx-size", "--json"]),
        ("bench", &["-m, --model", "--ram-budget", "--n-prompt", "--n-gen", "-r, --repetitions", "--json"]),
        ("inspect", &["<PATH>", "--json"]),
        ("doctor", &["--dir", "--json"]),
        ("completions", &["<SHELL>", "bash", "zsh", "fish"]),
    ];
    let all = ok(&["--help"]).stdout;
    for (verb, flags) in expected {
        assert!(all.contains(&format!("\n  {verb} ")), "{verb} in {all}");
        let help = ok(&[verb, "--help"]).stdout;
        for flag in *flags {
            assert!(help.contains(flag), "{flag} in {help}");
        }
    }
    assert!(ok(&["--version"]).stdout.starts_with("thermocline 0."));
}

#[test]
fn completions_know_every_verb() {
    for shell in ["bash", "zsh", "fish"] {
        let script = ok(&["completions", shell]).stdout;
        for verb in ["run", "calibrate", "split", "verify", "plan", "bench", "inspect", "doctor", "ram-budget"] {
            assert!(script.contains(verb), "{verb} for {shell}");
        }
    }
    assert_eq!(run(&["completions", "cobol"]).code, Some(2));
}

#[test]
fn usage_errors_exit_with_2_and_name_the_flag() {
    let dir = tiny_split();
    let answer = ["run", "-m", text(&dir), "-p", "the lake", "-n", "2"];
    for (more, said) in [
        (&["--mode", "sparse", "--active", "0"][..], "--active"),
        (&["--mode", "sparse", "--active", "1.5"], "--active"),
        (&["--mode", "sparse", "--active", "NaN"], "--active"),
        (&["--mode", "sparse", "--active=-0.3"], "--active"),
        (&["--mode", "dense"], "--mode"),
        (&["--temp=-1"], "--temp"),
        (&["--temp", "NaN"], "--temp"),
        (&["--top-p", "0"], "--top-p"),
        (&["--min-p", "2"], "--min-p"),
        (&["--repeat-penalty", "0"], "--repeat-penalty"),
        (&["--ram-budget", "8 parsecs"], "--ram-budget"),
        (&["-c", "3"], "-c"),
        (&["-c", "0"], "-c"),
        (&["-c", "99999999999"], "-c"),
        (&["-t", "0"], "-t"),
        (&["-t", "100000"], "-t"),
        (&["-n", "many"], "--predict"),
        (&["--system", "hello"], "--chat"),
        (&["--no-such-flag"], "--no-such-flag"),
        (&["-f", "prompt.txt"], "--file"),
    ] {
        let got = run(&[&answer, more].concat());
        assert_eq!(got.code, Some(2), "{more:?}: {}", got.stderr);
        assert!(got.stderr.contains(said) && got.stdout.is_empty(), "{more:?}: {} {}", got.stdout, got.stderr);
        assert!(!got.stderr.contains("panicked"), "{more:?}: {}", got.stderr);
    }
    assert_eq!(run(&["run", "-m", text(&dir)]).code, Some(2));
    assert_eq!(run(&[]).code, Some(2));
    assert_eq!(run(&["runn"]).code, Some(2));
    let empty = run(&["run", "-m", text(&dir), "-p", ""]);
    assert_eq!(empty.code, Some(2), "{}", empty.stderr);
    for shard in ["3/3", "x/2", "1"] {
        assert_eq!(run(&["calibrate", "-m", "m", "--corpus", "c", "-o", "o", "--shard", shard]).code, Some(2));
    }
}

#[test]
fn a_gpu_that_this_build_cannot_use_is_refused_aloud() {
    let dir = tiny_split();
    for verb in [&["run", "-p", "the lake", "-n", "2"][..], &["plan"], &["bench"]] {
        let message = fails(2, &[verb, &["-m", text(&dir), "--vram-budget", "16GiB"]].concat());
        assert!(
            message.contains("--vram-budget") && message.contains("CPU") && message.contains("--ram-budget"),
            "{message}"
        );
    }
    ok(&["run", "-m", text(&dir), "-p", "the lake", "-n", "2", "--vram-budget", "0"]);
}

#[test]
fn a_prompt_longer_than_the_context_is_refused_with_both_numbers() {
    let dir = tiny_split();
    let message = fails(2, &["run", "-m", text(&dir), "-p", &"0123456789".repeat(30), "-c", "64"]);
    assert!(message.contains("300 tokens") && message.contains("64") && message.contains("-c"), "{message}");
}

#[test]
fn a_full_context_ends_the_answer() {
    let dir = tiny_split();
    let args =
        ["run", "-m", text(&dir), "-p", "0123456789", "-c", "24", "-n", "500", "--temp", "0", "--ignore-eos", "--json"];
    let answer = json(&args);
    assert_eq!(answer["finish_reason"], "length");
    // Ten tokens of prompt, fourteen more whose keys fit, and the one that the last of them yields.
    assert_eq!(answer["tokens"].as_array().unwrap().len(), 15);
}

#[test]
fn a_budget_that_is_too_small_exits_with_3_and_says_what_is_needed() {
    let dir = tiny_split();
    for verb in [&["run", "-p", "the lake"][..], &["plan"], &["bench"]] {
        let message = fails(3, &[verb, &["-m", text(&dir), "--ram-budget", "64KiB"]].concat());
        for said in ["--ram-budget 65536 bytes", "bytes are needed", "keys and values", "-c"] {
            assert!(message.contains(said), "{said}: {message}");
        }
    }
}

#[test]
fn what_is_not_a_split_is_refused_with_advice() {
    let folder = tempfile::TempDir::new().unwrap();
    fs::write(folder.path().join("model.gguf"), b"not a model").unwrap();
    let garbage = folder.path().join("model.gguf");
    let checkpoint = model(&llama());
    let profile = profile(&llama());
    // A checkpoint or a profile where a split belongs: the commonest slip of all.
    for path in [folder.path(), &garbage, &checkpoint, &profile, &folder.path().join("nothing")] {
        let message = fails(4, &["run", "-m", text(path), "-p", "the lake"]);
        assert!(message.contains(text(path)) && message.contains("thermocline split"), "{message}");
    }
    let message = fails(4, &["inspect", text(&garbage)]);
    assert!(message.contains("model.gguf"), "{message}");
    let missing = folder.path().join("missing.gguf");
    let message = fails(1, &["inspect", text(&missing)]);
    assert!(message.contains("missing.gguf"), "{message}");
    let message = fails(1, &["run", "-m", text(&tiny_split()), "-f", text(&folder.path().join("no-prompt"))]);
    assert!(message.contains("no-prompt"), "{message}");
}

#[test]
fn settings_come_from_the_environment_and_flags_win() {
    let dir = tiny_split();
    let plan = |mode_flag: &[&str]| -> serde_json::Value {
        let mut command = thermocline();
        command.env("THERMOCLINE_MODEL", &dir).env("THERMOCLINE_MODE", "sparse").env("THERMOCLINE_ACTIVE", "0.25");
        command
            .env("THERMOCLINE_RAM_BUDGET", "900KiB")
            .env("THERMOCLINE_CTX_SIZE", "48")
            .env("THERMOCLINE_THREADS", "1");
        let output = command.args(["plan", "--json"]).args(mode_flag).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let request = plan(&[])["plan"]["request"].clone();
    assert_eq!(request["mode"], serde_json::json!({"mode": "sparse", "active": 0.25}));
    assert_eq!((request["ram_budget_bytes"].as_u64(), request["context"].as_u64()), (Some(921_600), Some(48)));
    assert_eq!(request["n_threads"], 1);
    let request = plan(&["--mode", "exact", "-c", "50"])["plan"]["request"].clone();
    assert_eq!((&request["mode"]["mode"], request["context"].as_u64()), (&"exact".into(), Some(50)));
}

#[test]
fn a_reader_that_leaves_early_ends_the_program_quietly() {
    let dir = tiny_split();
    for args in [
        &["inspect", text(&dir), "--json"][..],
        &["run", "-m", text(&dir), "-p", "a", "-n", "100", "--ignore-eos"],
        &["completions", "bash"],
    ] {
        let mut child = thermocline().args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let ended = child.wait_with_output().unwrap();
        assert_eq!(ended.status.code(), Some(0), "{args:?}");
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(!said.contains("panicked") && !said.contains("error"), "{args:?}: {said}");
    }
}

#[test]
fn without_json_an_answer_ends_with_its_account() {
    let dir = tiny_split();
    let answer = ok(&["run", "-m", text(&dir), "-p", "the lake", "-n", "6", "--ignore-eos"]).stdout;
    let account = answer.lines().last().unwrap();
    for said in ["6 tokens at", "tok/s", "RAM", "cache", "disk", "limit", "peak memory"] {
        assert!(account.contains(said), "{said} in {account}");
    }
}

#[test]
fn a_seed_repeats_a_draw_and_a_prompt_can_come_from_a_file() {
    let (dir, folder) = (tiny_split(), tempfile::TempDir::new().unwrap());
    let file = folder.path().join("prompt.txt");
    fs::write(&file, "the lake").unwrap();
    let draw = |how: &str, what: &str, seed: &str| {
        json(&["run", "-m", text(&dir), how, what, "-n", "24", "-s", seed, "--temp", "1.5", "--ignore-eos", "--json"])["tokens"].clone()
    };
    assert_eq!(draw("-p", "the lake", "5"), draw("-f", text(&file), "5"));
    assert_ne!(draw("-p", "the lake", "5"), draw("-p", "the lake", "6"));
}

#[test]
fn chat_uses_the_template_and_says_so_where_there_is_none() {
    let dir = tiny_split();
    let args = ["run", "-m", text(&dir), "-p", "hello", "-n", "2", "--json"];
    let plain = json(&args)["prompt_tokens"].as_u64().unwrap();
    let chat = json(&[&args[..], &["--chat", "--system", "be brief"]].concat())["prompt_tokens"].as_u64().unwrap();
    assert!(chat > plain + 10, "{chat} after {plain}");
    let other = split(&support::qwen_relu(), "q8", &["--chunk-neurons", "1"]);
    let message = fails(2, &["run", "-m", text(&other), "-p", "hello", "--chat"]);
    assert!(message.contains("--chat"), "{message}");
}

#[test]
fn corrupt_splits_exit_with_4_and_outputs_are_never_overwritten() {
    let (_guard, dir) = copy(&tiny_split());
    let manifest = dir.join("manifest.json");
    let bad = fs::read_to_string(&manifest).unwrap().replace("\"order\": \"random\"", "\"order\": \"randon\"");
    fs::write(&manifest, bad).unwrap();
    assert!(fails(4, &["inspect", text(&dir)]).contains("manifest.json"));
    let (model, profile) = (model(&llama()), profile(&llama()));
    let message = fails(1, &["split", "-m", text(&model), "--profile", text(&profile), "-o", text(&dir)]);
    assert!(message.contains("exists") && message.contains("-o"), "{message}");
    let corpus = support::corpus();
    let message = fails(
        1,
        &[
            "calibrate",
            "-m",
            text(&model),
            "--corpus",
            text(&corpus),
            "--tokens",
            "1024",
            "--window",
            "128",
            "-o",
            text(&profile),
        ],
    );
    assert!(message.contains("exists"), "{message}");
    for (flags, said) in [
        (&["--chunk-neurons", "0"][..], "--chunk-neurons"),
        (&["--chunk-neurons", "193"], "--chunk-neurons"),
        (&["--predictor-rank", "33"], "--predictor-rank"),
        (&["--encoding", "q5"], "--encoding"),
        (&["--zstd-level", "40"], "--zstd-level"),
    ] {
        let out = dir.join("new");
        let got = run(&[&["split", "-m", text(&model), "--profile", text(&profile), "-o", text(&out)], flags].concat());
        assert_eq!(got.code, Some(2), "{flags:?}: {}", got.stderr);
        assert!(got.stderr.contains(said) && !out.exists(), "{flags:?}: {}", got.stderr);
    }
}

#[test]
fn doctor_measures() {
    let folder = tempfile::TempDir::new().unwrap();
    let report = json(&["doctor", "--dir", text(folder.path()), "-t", "1", "--json"]);
    for field in ["ram_total_bytes", "ram_bytes_per_second", "q4_kernel_bytes_per_second", "disk_bytes_per_second"] {
        assert!(report[field].as_f64().unwrap() > 0.0, "{field}");
    }
    assert!(fs::read_dir(folder.path()).unwrap().next().is_none(), "nothing temporary is left");
    assert!(fails(1, &["doctor", "--dir", text(&folder.path().join("none"))]).contains("none"));
}
