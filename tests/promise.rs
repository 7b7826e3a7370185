//! `--max-ppl-increase`: from a measured curve to the share of the neurons that a run computes.
#![cfg(feature = "analysis")]
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod support;

use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use support::{copy_dir, fails, json, llama, ok, once, split, text, thermocline};

/// Without costs of shares.
fn plain() -> PathBuf {
    split(&llama(), "q4", &["--chunk-neurons", "16", "--order", "random"])
}

fn fitting(dir: &str) -> [&str; 10] {
    ["eval", "-m", dir, "--text", text(support::corpus()), "--fit-shares", "--ctx", "64", "--windows", "2"]
}

/// With a curve.
fn fitted() -> PathBuf {
    once("llama.promise", |path| {
        copy_dir(&plain(), path);
        ok(&fitting(text(path)));
    })
}

fn points(curve: &Value) -> Vec<[f64; 3]> {
    let numbers = |key: &str| curve[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect::<Vec<_>>();
    let (active, low, high) = (numbers("active"), numbers("ppl_increase"), numbers("ppl_increase_high"));
    (0..active.len()).map(|i| [active[i], low[i], high[i]]).collect()
}

#[test]
fn fitting_measures_a_curve_and_shows_it() {
    let (_guard, dir) = support::copy(&plain());
    let fitted = json(&[&fitting(text(&dir))[..], &["--json"]].concat());
    let curve = json(&["inspect", text(&dir), "--json"])["shares"]["curve"].clone();
    assert_eq!(fitted["curve"], curve);
    let points = points(&curve);
    assert_eq!((points.len(), curve["tokens"].as_u64()), (9, Some(2 * (4 * 64 - 1))));
    assert!(points.windows(2).all(|w| w[0][0] < w[1][0]) && points.iter().all(|p| p[1] <= p[2]), "{points:?}");
    let digest = xxhash_rust::xxh3::xxh3_128(&fs::read(support::corpus()).unwrap());
    assert_eq!(curve["text_digest"], format!("{digest:032x}"));
    let table = ok(&fitting(text(&dir))).stdout;
    assert!(table.contains("2 windows of 256 behind these") && table.contains("--max-ppl-increase"), "{table}");
    assert_eq!(table.lines().filter(|l| l.trim_start().starts_with("50 %")).count(), 1, "{table}");
    let short = tempfile::NamedTempFile::new().unwrap();
    fs::write(short.path(), "the lake is deep. ".repeat(30)).unwrap();
    let args =
        ["eval", "-m", text(&dir), "--text", text(short.path()), "--fit-shares", "--ctx", "64", "--windows", "2"];
    let said = fails(2, &args);
    assert!(said.contains("--windows") && said.contains("640 are needed"), "{said}");
}

#[test]
fn a_promise_chooses_the_share() {
    let dir = fitted();
    let points = points(&json(&["inspect", text(&dir), "--json"])["shares"]["curve"]);
    let plan = |increase: &str| {
        json(&["plan", "-m", text(&dir), "--mode", "sparse", "--max-ppl-increase", increase, "--json", "-t", "1"])
    };
    // The largest upper end from the middle on is kept by the middle.
    let worst = points[4..].iter().map(|p| p[2]).fold(0.0, f64::max);
    let planned = plan(&format!("{}%", 100.0 * (worst + 1e-6)));
    let active = planned["promise"]["active"].as_f64().unwrap();
    assert!(active <= points[4][0] + 1e-6 && active >= points[0][0] - 1e-6, "{planned}");
    assert_eq!(planned["plan"]["request"]["mode"]["active"], planned["promise"]["active"], "{planned}");
    assert_eq!(planned["promise"]["tokens"], 2 * (4 * 64 - 1));
    let loose = plan("100000%");
    assert!((loose["promise"]["active"].as_f64().unwrap() - points[0][0]).abs() < 1e-6);
    assert_eq!(plan("0.05")["promise"], plan("5 %")["promise"]);
    let strict = plan("0%")["promise"]["active"].as_f64().unwrap();
    assert!(strict >= active);

    // All verbs say so, and compute it.
    let given = ["-m", text(&dir), "--mode", "sparse", "--max-ppl-increase", "100000%"];
    let said = format!("--active {} for at most +100000 %", points[0][0]);
    let run = [&["run", "-p", "the lake", "-n", "3", "--temp", "0", "--ignore-eos"][..], &given].concat();
    assert!(ok(&run).stderr.contains(&said));
    assert!(ok(&[&["plan", "-t", "1"][..], &given].concat()).stdout.starts_with(&said));
    let bench = [&["bench", "--n-prompt", "2", "--n-gen", "2", "-r", "1"][..], &given].concat();
    assert!(ok(&bench).stdout.starts_with(&said));
    let ran = json(&[&run[..], &["--json"]].concat());
    assert_eq!((&ran["mode"]["active"], &ran["promise"]), (&ran["promise"]["active"], &loose["promise"]));
    assert_eq!(json(&[&bench[..], &["--json"]].concat())["promise"], loose["promise"]);
    let share = ran["promise"]["active"].to_string();
    let plain =
        ["run", "-p", "the lake", "-n", "3", "--temp", "0", "--ignore-eos", "-m", text(&dir), "--mode", "sparse"];
    let by_hand = json(&[&plain[..], &["--active", &share, "--json"]].concat());
    assert_eq!((&by_hand["tokens"], &by_hand["computed_share"]), (&ran["tokens"], &ran["computed_share"]));
    assert!(by_hand.get("promise").is_none());
}

#[test]
fn what_cannot_be_promised_is_refused() {
    let (dir, fitted) = (plain(), fitted());
    let (dir, fitted) = (text(&dir), text(&fitted));
    let sparse = |dir| ["plan", "-m", dir, "-t", "1", "--mode", "sparse", "--max-ppl-increase"];
    for (args, said) in [
        ([&sparse(dir)[..], &["5%"]].concat(), "--fit-shares"),
        ([&sparse(fitted)[..], &["5%", "--active", "0.3"]].concat(), "--active"),
        ([&sparse(fitted)[..], &["5%", "--precision", "exact"]].concat(), "--precision"),
        ([&sparse(fitted)[..], &["5"]].concat(), "write 5%"),
        (vec!["plan", "-m", fitted, "--mode", "sparse", "--max-ppl-increase=-5%"], "not negative"),
        ([&sparse(fitted)[..], &["nan"]].concat(), "not negative"),
        ([&sparse(fitted)[..], &["inf%"]].concat(), "not negative"),
        ([&sparse(fitted)[..], &["little"]].concat(), "5% or 0.05"),
        (vec!["plan", "-m", fitted, "--max-ppl-increase", "5%"], "--mode sparse"),
        (vec!["run", "-m", fitted, "-p", "a", "--mode", "exact", "--max-ppl-increase", "5%"], "--mode sparse"),
    ] {
        let message = fails(2, &args);
        assert!(message.contains(said), "{args:?}: {message}");
    }
}

#[test]
fn the_stronger_source_decides_between_share_and_promise() {
    let dir = fitted();
    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("settings.toml");
    // Whether the plan has a promise, and its share.
    let planned = |settings: &str, environment: &[(&str, &str)], flags: &[&str]| {
        fs::write(&file, settings).unwrap();
        let mut command = thermocline();
        command.envs(environment.iter().copied()).args(["plan", "-m", text(&dir), "-t", "1", "--json"]);
        let ran: support::Ran = command.args(["--config", text(&file)]).args(flags).output().unwrap().into();
        let value: Value = serde_json::from_str(&ran.stdout).unwrap_or_else(|_| panic!("{}", ran.stderr));
        (value.get("promise").is_some(), value["plan"]["request"]["mode"]["active"].as_f64())
    };
    let sparse = ["--mode", "sparse"];
    let with = |more: &[&'static str]| [&sparse[..], more].concat();
    let promised = |got: (bool, Option<f64>)| got.0;
    let environment = [("THERMOCLINE_MAX_PPL_INCREASE", "900%")];
    assert!(promised(planned("max-ppl-increase = \"900%\"", &[], &sparse)));
    assert!(promised(planned("[plan]\nmax-ppl-increase = 0.5\nactive = 0.4", &[], &sparse)));
    assert_eq!(planned("max-ppl-increase = \"900%\"", &[], &with(&["--active", "0.5"])), (false, Some(0.5)));
    assert_eq!(planned("max-ppl-increase = \"900%\"", &[("THERMOCLINE_ACTIVE", "0.5")], &sparse), (false, Some(0.5)));
    assert_eq!(planned("", &environment, &with(&["--active", "0.5"])), (false, Some(0.5)));
    assert!(promised(planned("active = 0.5", &environment, &sparse)));
    assert!(promised(planned("active = 0.5", &[("THERMOCLINE_ACTIVE", "0.5")], &with(&["--max-ppl-increase", "9%"]))));
    // A file's is for sparse mode, as its share is.
    assert_eq!(planned("max-ppl-increase = \"900%\"", &[], &[]), (false, None));
}

/// Of a split with sketches: a curve for each of several shares that are always computed, from which the promise takes its own.
#[test]
fn sketches_have_curves_of_their_own() {
    let (_guard, dir) = support::copy(&split(&llama(), "q4", &["--chunk-neurons", "8", "--sketch"]));
    let sparse = ["-m", text(&dir), "--mode", "sparse", "--vram-budget", "0", "--max-ppl-increase"];
    let refused = fails(2, &[&["plan", "-t", "1"], &sparse[..], &["5%"]].concat());
    assert!(refused.contains("--fit-shares"), "{refused}");
    let fitting = fitting(text(&dir));
    let fitted = json(&[&fitting[..], &["--json"]].concat());
    let curves = json(&["inspect", text(&dir), "--json"])["graded"]["curves"].clone();
    assert_eq!(fitted["curves"], curves);
    let curves = curves.as_array().unwrap();
    assert_eq!(curves.iter().map(|c| c["always"].as_f64().unwrap()).collect::<Vec<_>>(), [0.0, 0.25, 0.5, 0.75]);
    for curve in curves {
        let points = points(curve);
        assert_eq!((points.len(), curve["tokens"].as_u64()), (7, Some(2 * (4 * 64 - 1))));
        assert!(points.windows(2).all(|w| w[0][0] < w[1][0]) && points.iter().all(|p| p[1] <= p[2]), "{points:?}");
    }
    // Where more is always computed, the model is nearer to the dense one (random weights gain by what is left out).
    let first = |curve: &Value| points(curve)[0][1].abs();
    assert!(first(&curves[3]) < first(&curves[0]), "{curves:?}");
    let table = ok(&fitting).stdout;
    assert!(table.contains("75 % always") && table.contains("--max-ppl-increase"), "{table}");

    let plan = |more: &[&str]| json(&[&["plan", "-t", "1", "--json"], &sparse[..], more].concat());
    for (always, which) in [("auto", 0), ("0.2", 0), ("0.6", 2), ("0.75", 3)] {
        let points = points(&curves[which]);
        let worst = points[3..].iter().map(|p| p[2]).fold(0.0, f64::max);
        let planned = plan(&[&format!("{}%", 100.0 * (worst + 1e-6)), "--always", always]);
        let (promise, request) = (&planned["promise"], &planned["plan"]["request"]);
        assert_eq!(promise["always"], curves[which]["always"], "{planned}");
        assert!(promise["active"].as_f64().unwrap() <= points[3][0] + 1e-6, "{planned}");
        assert_eq!(request["mode"]["active"], promise["active"], "{planned}");
        let share = if always == "auto" { 0.0 } else { always.parse().unwrap() };
        assert!((request["always"].as_f64().unwrap() - share).abs() < 1e-6, "{planned}");
    }
}
