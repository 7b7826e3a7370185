//! Flags, exit codes and messages.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod support;

use std::fs;
use std::path::Path;
use std::process::Stdio;
use support::{
    calibrating, copy, fails, json, llama, medium, model, ok, profile, qwen_relu, run, split, splitting, text,
    thermocline,
};

fn tiny_split() -> std::path::PathBuf {
    split(&llama(), "q4", &["--chunk-neurons", "16", "--order", "random"])
}

const VERBS: [&str; 14] = [
    "demo",
    "run",
    "calibrate",
    "calibrate merge",
    "split",
    "delta",
    "plan",
    "verify",
    "eval",
    "bench",
    "report",
    "inspect",
    "doctor",
    "completions",
];

/// Scripts rely on the flags, and people on what is said of them: a change shows up in `tests/snapshots`.
#[test]
fn every_verb_explains_its_flags() {
    insta::assert_snapshot!("help", ok(&["--help"]).stdout);
    for verb in VERBS {
        let words: Vec<&str> = verb.split(' ').chain(["--help"]).collect();
        insta::assert_snapshot!(format!("help-{}", verb.replace(' ', "-")), ok(&words).stdout);
    }
    assert!(ok(&["--version"]).stdout.starts_with("thermocline 0."));
}

/// What typed errors say, with their exit codes. Folders and long numbers (sizes of this build's buffers) are left out.
#[test]
fn errors_say_what_to_do() {
    let (dir, made) = (tiny_split(), model(&llama()));
    let (profile, other) = (profile(&llama()), model(&qwen_relu()));
    let (guard, damaged) = copy(&dir);
    let layer = damaged.join("layers/001.thm");
    let mut bytes = fs::read(&layer).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&layer, bytes).unwrap();
    let settings = guard.path().join("settings.toml");
    fs::write(&settings, "threads = 2\n[run]\ntemprature = 0.5\n").unwrap();
    let (m, new) = (text(&dir), guard.path().join("new"));
    let cases: &[&[&str]] = &[
        &["run", "-m", m],
        &["run", "-m", m, "-p", "a", "--active", "2", "--mode", "sparse"],
        &["run", "-m", m, "-p", "a", "--vram-budget", "8GiB"],
        &["run", "-m", m, "-p", "a", "--ram-budget", "1KiB"],
        &["run", "-m", m, "-p", "0123456789", "-c", "4"],
        &["run", "-m", m, "-p", "a", "-t", "0"],
        &["run", "-m", m, "-p", "a", "--config", text(&settings)],
        &["run", "-m", text(&made), "-p", "a"],
        &["run", "-m", text(&damaged), "-p", "a"],
        &["verify", m, "-m", text(&other)],
        &["eval", "-m", text(&made), "--text", text(support::corpus()), "--ctx", "64", "--mask", "dense,guess"],
        &["eval", "-m", text(&made), "--text", text(support::corpus()), "--ctx", "64", "--mask", "predicted"],
        &splitting(&other, &profile, &[], &new),
        &splitting(&made, &profile, &["--predictor-rank", "33"], &new),
        &calibrating(&made, "1024", "128", &profile),
    ];
    let mut all = String::new();
    for args in cases {
        let ran = run(args);
        // How much of what is needed changes with every buffer.
        let said = ran.stderr.split(" are needed for ").next().unwrap().trim_end();
        all += &format!("$ thermocline {}\nexit {}\n{said}\n\n", args.join(" "), ran.code.unwrap());
    }
    let folders = [(text(&dir), "SPLIT"), (text(&made), "MODEL"), (text(&other), "OTHER"), (text(&profile), "PROFILE")];
    for (folder, name) in folders.into_iter().chain([(text(guard.path()), "TEMP"), (text(support::corpus()), "TEXT")]) {
        all = all.replace(folder, name);
    }
    insta::assert_snapshot!("errors", without_sizes(&all));
}

/// Numbers of four digits and more, digests among them, as `#`.
fn without_sizes(text: &str) -> String {
    let long = |word: &str| {
        word.len() > 3 && word.chars().all(|c| c.is_ascii_hexdigit()) && word.contains(|c: char| c.is_ascii_digit())
    };
    let words = text.split_inclusive(|c: char| !c.is_ascii_alphanumeric());
    words.fold(String::new(), |mut out, part| {
        let word = part.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
        if long(word) {
            out.push('#')
        } else {
            out.push_str(word)
        }
        out + &part[word.len()..]
    })
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

/// Runs `plan` with a settings file of this text.
fn planned_with(text: &str, environment: &[(&str, &str)], flags: &[&str]) -> support::Ran {
    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("settings.toml");
    fs::write(&file, text).unwrap();
    let mut command = thermocline();
    command.args(["plan", "-m", support::text(&tiny_split()), "--config", support::text(&file)]);
    command.envs(environment.iter().copied()).args(flags).output().unwrap().into()
}

fn request_with(text: &str, environment: &[(&str, &str)], flags: &[&str]) -> serde_json::Value {
    let ran = planned_with(text, environment, &[flags, &["--json"]].concat());
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    serde_json::from_str::<serde_json::Value>(&ran.stdout).unwrap()["plan"]["request"].clone()
}

#[test]
fn a_flag_wins_over_the_environment_that_over_the_file_that_over_the_default() {
    let file =
        "threads = 1\nctx-size = 40\n[plan]\nctx-size = 48\nmode = \"sparse\"\nactive = 0.25\n[run]\nctx-size = 9\n";
    let request = request_with(file, &[], &[]);
    assert_eq!((&request["n_threads"], &request["context"]), (&1.into(), &48.into()), "a section wins over the top");
    assert_eq!(request["mode"], serde_json::json!({"mode": "sparse", "active": 0.25}));
    let environment = [("THERMOCLINE_CTX_SIZE", "56"), ("THERMOCLINE_MODE", "exact")];
    let request = request_with(file, &environment, &[]);
    assert_eq!((&request["n_threads"], &request["context"]), (&1.into(), &56.into()));
    assert_eq!(request["mode"]["mode"], "exact");
    assert_eq!(request_with(file, &environment, &["-c", "64"])["context"], 64);
    assert_eq!(request_with("", &[], &[])["context"], 512, "an empty file changes nothing");
    // A switch can be turned on, and off again.
    let switched = |flags: &[&str]| planned_with("[plan]\njson = true", &[], flags);
    assert!(switched(&["--json=false"]).stdout.starts_with("RAM budget"));
    assert!(switched(&[]).stdout.starts_with('{'));
}

#[test]
fn a_settings_file_is_found_where_it_belongs_and_doctor_names_it() {
    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("thermocline/config.toml");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    let dir = tiny_split();
    let planning = || {
        let mut command = thermocline();
        command.env("XDG_CONFIG_HOME", folder.path()).args(["plan", "-m", text(&dir), "--json"]);
        command
    };
    let context = |command: &mut std::process::Command| {
        let plan: serde_json::Value = serde_json::from_slice(&command.output().unwrap().stdout).unwrap();
        plan["plan"]["request"]["context"].as_u64().unwrap()
    };
    assert_eq!(context(&mut planning()), 512, "none is there yet");
    fs::write(&file, "ctx-size = 33").unwrap();
    assert_eq!(context(&mut planning()), 33);
    let other = folder.path().join("other.toml");
    fs::write(&other, "ctx-size = 44").unwrap();
    assert_eq!(context(planning().env("THERMOCLINE_CONFIG", &other)), 44);
    assert_eq!(context(planning().env_remove("XDG_CONFIG_HOME").env("HOME", "/nonexistent")), 512);
    let doctor = |json: bool| -> support::Ran {
        let mut command = thermocline();
        command.env("XDG_CONFIG_HOME", folder.path()).args(["doctor", "-t", "1", "--dir", text(folder.path())]);
        command.args(json.then_some("--json")).output().unwrap().into()
    };
    let said = doctor(false).stdout;
    assert!(said.contains(&format!("config  {} sets", text(&file))) && said.contains("run --ctx-size"), "{said}");
    assert_eq!(serde_json::from_str::<serde_json::Value>(&doctor(true).stdout).unwrap()["settings_file"], text(&file));
}

#[test]
fn what_a_settings_file_gets_wrong_is_told_with_line_and_key() {
    for (file, line, said) in [
        ("threads = 1\nthreds = 2\n", 2, "threds"),
        ("# a comment\n\n[plan]\nactive = 0.3\nrank = 3\n", 5, "rank"),
        ("[plann]\nactive = 0.3\n", 1, "plann"),
        ("temp = 0.5\n", 1, "temp"),
        ("[run]\nprompt = \"hello\"\n", 2, "prompt"),
        ("threads = \"two\"", 1, "threads: \"two\": invalid digit"),
        ("\nthreads = 1.5", 2, "threads: \"1.5\""),
        ("threads = [1, 2]", 1, "threads: expected one value"),
        ("[bench]\nmode = \"quick\"", 2, "expected one of exact, sparse"),
        ("[run]\njson = \"yes\"", 2, "json: expected true or false"),
        ("ram-budget = \"8 parsecs\"", 1, "ram-budget"),
        ("[eval]\nactive = [0.3, \"x\"]", 2, "active: \"x\""),
        ("threads = 1\nthreads = 2\n", 2, "duplicate"),
        ("threads = \n", 1, "settings file"),
        ("[run\n", 1, "settings file"),
    ] {
        let ran = planned_with(file, &[], &[]);
        assert_eq!(ran.code, Some(2), "{file}: {} {}", ran.stdout, ran.stderr);
        assert!(
            ran.stderr.contains(said) && ran.stderr.contains(&format!("settings.toml, line {line}: ")),
            "{file}: {}",
            ran.stderr
        );
    }
    let message = fails(2, &["plan", "-m", "x", "--config", "/nonexistent/settings.toml"]);
    assert!(message.contains("/nonexistent/settings.toml"), "{message}");
}

/// Against the checkpoint an encoding's own loss shows, too.
#[test]
fn a_model_is_compared_with_the_one_that_was_asked_for() {
    let (checkpoint, q4) = (model(&llama()), split(&llama(), "q4", &[]));
    let windows = ["--text", text(support::corpus()), "--ctx", "64", "--windows", "2"];
    let of = |dir: &Path, more: &[&str]| json(&[&["eval", "-m", text(dir), "--json"], more, &windows[..]].concat());
    let (alone, own) = (of(&checkpoint, &[]), of(&q4, &["--mask", "dense,teal"]));
    let both = of(&q4, &["--mask", "dense,teal", "--reference", text(&checkpoint)]);
    assert_eq!(both["perplexity_dense"], alone["perplexity"]);
    assert!(both["reference"].is_string() && own["reference"].is_null());
    for i in 0..2 {
        let [both, own] = [&both, &own].map(|all| &all["results"][i]);
        assert_eq!(both["perplexity"], own["perplexity"], "the model is the same");
        assert!(both["kl"].as_f64() > own["kl"].as_f64(), "{both} {own}");
        // Bytes are relative to those of the checkpoint, which has 16 bits for each of the 4.5 to 8.5 of the split.
        let [of_all, of_own] = [both, own].map(|result| result["bytes_share"].as_f64().unwrap());
        assert!((4.5 / 16.0..8.5 / 16.0).contains(&(of_all / of_own)), "{both}");
    }
    assert_eq!(own["results"][0]["kl"], 0.0);
    // What is compared with itself is as far away as it is without.
    let again = of(&q4, &["--mask", "dense,teal", "--reference", text(&q4)]);
    assert_eq!(again["results"], own["results"]);
    let table = ok(&[&["eval", "-m", text(&q4), "--reference", text(&checkpoint)][..], &windows].concat()).stdout;
    assert!(table.contains(", against "), "{table}");
    let other = model(&medium());
    let message = fails(2, &[&["eval", "-m", text(&q4), "--reference", text(&other)][..], &windows].concat());
    assert!(message.contains("--reference") && message.contains("tokens"), "{message}");
}

#[test]
fn several_masks_and_shares_give_a_row_each() {
    let dir = tiny_split();
    let given = ["eval", "-m", text(&dir), "--text", text(support::corpus()), "--ctx", "64", "--windows", "2"];
    let masks = ["--mask", "dense,oracle,predicted", "--active", "0.3,0.6", "-t", "2"];
    let results = json(&[&given[..], &masks, &["--json"]].concat())["results"].clone();
    let rows: Vec<_> = results.as_array().unwrap().iter().map(|r| (r["mask"].as_str(), r["active"].as_f64())).collect();
    let expected = [
        ("dense", None),
        ("oracle", Some(0.3)),
        ("oracle", Some(0.6)),
        ("predicted", Some(0.3)),
        ("predicted", Some(0.6)),
    ];
    assert_eq!(rows, expected.map(|(mask, active)| (Some(mask), active)));
    let dense = results[0]["perplexity"].as_f64().unwrap();
    assert!(results[1]["perplexity"].as_f64().unwrap() != dense && results[1]["kl"].as_f64().unwrap() > 0.0);
    let table = ok(&[&given[..], &masks].concat()).stdout;
    let lines = |mask: &str| table.lines().filter(|line| line.trim_start().starts_with(mask)).count();
    assert_eq!(["dense ", "oracle ", "predicted "].map(lines), [1, 2, 2], "{table}");
}

#[test]
fn fitted_shares_are_shown_and_used() {
    let (_guard, dir) = copy(&tiny_split());
    let (dir, corpus) = (text(&dir), text(support::corpus()));
    let run =
        || ok(&["run", "-m", dir, "-p", "a", "-n", "12", "--mode", "sparse", "--temp", "0", "--ignore-eos"]).stdout;
    let before = run();
    let table = ok(&["eval", "-m", dir, "--text", corpus, "--ctx", "64", "--windows", "2", "--fit-shares"]).stdout;
    assert!(table.contains("kept in") && table.contains("30 % of all"), "{table}");
    let shares = json(&["inspect", dir, "--json"])["shares"].clone();
    let layers: Vec<f64> = shares["layers_at_0.3"].as_array().unwrap().iter().filter_map(|s| s.as_f64()).collect();
    assert!((layers.iter().sum::<f64>() / layers.len() as f64 - 0.3).abs() < 1e-3, "{shares}");
    assert!(run() != before, "other neurons are computed");
    ok(&["verify", dir, "-m", text(&model(&llama()))]);
    let fitting = ["--text", corpus, "--ctx", "64", "--windows", "1", "--fit-shares"];
    let message = fails(2, &[&["eval", "-m", text(&model(&llama()))][..], &fitting].concat());
    assert!(message.contains("--fit-shares needs a split"), "{message}");
}

#[test]
fn inputs_are_priced_on_a_text() {
    let (dir, corpus) = (tiny_split(), text(support::corpus()));
    let given = ["eval", "-m", text(&dir), "--text", corpus, "--ctx", "64", "--windows", "1", "--mask", "inputs"];
    let priced = [&given[..], &["--active", "0.9,0.5", "--fit-text", corpus, "--json"]].concat();
    let results = json(&priced)["results"].clone();
    let read = |i: usize| results[i]["bytes_share"].as_f64().unwrap();
    assert!(read(0) > read(1) && read(1) > 0.2 && read(0) < 1.0, "{results}");
    assert!(fails(2, &given).contains("--fit-text"));
    let other = ["eval", "-m", text(&dir), "--text", corpus, "--mask", "teal", "--fit-text", corpus];
    assert!(fails(2, &other).contains("--mask inputs"));
    let short = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(short.path(), "too short").unwrap();
    let message = fails(2, &[&given[..], &["--fit-text", text(short.path())]].concat());
    assert!(message.contains("needs 1024"), "{message}");
}

/// What a guess costs is told with what it keeps; what it needs is asked for.
#[test]
fn guesses_are_compared_by_one_command() {
    let (dir, corpus) = (tiny_split(), text(support::corpus()));
    let given = |mask: &'static str| {
        vec!["eval", "-m", text(&dir), "--text", corpus, "--ctx", "64", "--windows", "1", "--mask", mask]
    };
    let fit = ["--fit-text", corpus];
    let all = "dense,signs,copies-1,copies-2,copies-3,previous,ahead-1,ahead-2,trained,low-rank+previous";
    let results = json(&[&given(all)[..], &fit, &["--active", "0.4", "--json"]].concat())["results"].clone();
    let names: Vec<&str> = results.as_array().unwrap().iter().map(|r| r["mask"].as_str().unwrap()).collect();
    assert_eq!(names.join(","), all);
    let asked = |i: usize| results[i]["predictor_bytes_share"].as_f64().unwrap();
    assert!(asked(2) < asked(3) && asked(3) < asked(4) && asked(5) == 0.0 && asked(8) > 0.0, "{results}");
    let table = ok(&given("signs,previous")).stdout;
    assert!(table.contains("asking signs at 0.30 takes") && table.contains("million multiply-adds a token"), "{table}");

    for mask in ["copies-1", "copies-2", "copies-3", "trained", "low-rank+previous"] {
        let message = fails(2, &given(mask));
        assert!(message.contains(mask) && message.contains("give --fit-text"), "{message}");
    }
    let message = fails(2, &[&given("signs")[..], &fit].concat());
    assert!(message.contains("--fit-text is for") && message.contains("there is none"), "{message}");
    let made = model(&llama());
    for mask in ["previous", "ahead-1", "ahead-2"] {
        let message = fails(2, &["eval", "-m", text(&made), "--text", corpus, "--mask", mask]);
        assert!(message.contains(mask) && message.contains("needs a split"), "{message}");
    }
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
    let bad = fs::read_to_string(&manifest).unwrap().replace(",random\"", ",randon\"");
    fs::write(&manifest, bad).unwrap();
    assert!(fails(4, &["inspect", text(&dir)]).contains("manifest.json"));
    let (model, profile) = (model(&llama()), profile(&llama()));
    let message = fails(1, &splitting(&model, &profile, &[], &dir));
    assert!(message.contains("exists") && message.contains("-o"), "{message}");
    let message = fails(1, &calibrating(&model, "1024", "128", &profile));
    assert!(message.contains("exists"), "{message}");
    for (flags, said) in [
        (&["--chunk-neurons", "0"][..], "--chunk-neurons"),
        (&["--chunk-neurons", "193"], "--chunk-neurons"),
        (&["--predictor-rank", "33"], "--predictor-rank"),
        (&["--outliers", "1.5"], "--outliers"),
        (&["--encoding", "q5"], "--encoding"),
        (&["--zstd-level", "40"], "--zstd-level"),
    ] {
        let out = dir.join("new");
        let got = run(&[&splitting(&model, &profile, &[], &out), flags].concat());
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
