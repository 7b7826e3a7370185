//! The page holds together whatever it is made from.
#![allow(missing_docs, clippy::unwrap_used)]

mod records;

use records::{gpu_bench, printed};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use thermocline_analysis::Error;
use thermocline_analysis::report::{Inputs, Page};
use thermocline_calibrate::{RunOptions, Settings, calibrate};
use thermocline_datasets::open_checkpoint;
use thermocline_datasets::write::{TinyModel, write_tiny_safetensors};
use thermocline_kernels::Encoding;
use thermocline_split::{Compression, SplitOptions, split};

const HOSTILE: &str = "<script>alert(\"x\")</script>&'";
const SECTIONS: [&str; 10] =
    ["rates", "coactivation", "overlap", "accuracy", "recall", "planes", "runs", "bench", "gpu", "commands"];

fn profile_and_split(dir: &Path) -> [PathBuf; 2] {
    write_tiny_safetensors(&dir.join("model <i>"), &TinyModel::default(), 1).unwrap();
    let checkpoint = open_checkpoint(&dir.join("model <i>")).unwrap();
    let tokens: Vec<u32> = (0..1024u32).map(|i| i * i % 290 + 3).collect();
    let settings = Settings { window_len: 64, n_samples: 256, ..Settings::default() };
    let options = RunOptions { resume: false, shard: None };
    let (profile_dir, split_dir) = (dir.join("profile <b>"), dir.join("split"));
    let profile = calibrate(checkpoint.as_ref(), &tokens, &settings, &options, &profile_dir, &mut |_| ()).unwrap();
    let options = SplitOptions {
        encoding: Encoding::Q4.into(),
        resident_encoding: Encoding::Q8,
        order: None,
        chunk_neurons: None,
        compression: Compression::None,
        predictor_rank: 32,
        scales: thermocline_split::Scales::Moments,
        sketch: false,
    };
    split(checkpoint.as_ref(), &profile, &options, &split_dir, &|_, _| ()).unwrap();
    [profile_dir, split_dir]
}

fn evaluation(mask: &str, active: f64) -> Value {
    let layer = |layer: usize| {
        json!({"layer": layer, "recall": 0.8, "precision": 0.8, "energy_recall": 0.9,
               "energy_recall_of_oracle": 0.95, "computed_share": active})
    };
    json!({
        "mask": mask, "active": active, "engine": "batch", "perplexity": 30.0, "perplexity_ci95": [28.0, 32.0],
        "perplexity_dense": 29.0, "perplexity_ratio": 1.03, "perplexity_ratio_ci95": [1.0, 1.1], "kl": 0.1,
        "top1_agreement": 0.8, "recall": 0.8, "precision": 0.8, "energy_recall": 0.9, "energy_recall_of_oracle": 0.95,
        "computed_share": active, "tokens": 100, "layers": [layer(0), layer(1)],
    })
}

fn results(dir: &Path) -> Vec<PathBuf> {
    let mut eval = evaluation("oracle", 0.3);
    let all: Vec<Value> =
        [0.1, 0.3, 0.5].into_iter().flat_map(|s| ["oracle", "predicted"].map(|m| evaluation(m, s))).collect();
    for key in ["model", "model_digest", "text", "encoding"] {
        eval[key] = HOSTILE.into();
    }
    eval["results"] = all.into();
    eval["command"] = json!(["eval", HOSTILE]);
    let tiers = json!({"device": 0, "cache": 10, "host": 1000, "disk": 100});
    let run = json!({
        "mode": {"mode": HOSTILE}, "limit": HOSTILE, "decode_tok_s": 12.0, "bytes_per_token": tiers,
        "timeline": [[1, tiers], [2, tiers], [3, tiers]], "plan": {"request": {"ram_budget_bytes": 1 << 20}},
    });
    let bench = json!({
        "model": HOSTILE, "cpu": HOSTILE, "decode_tok_s": {"median": 10.0, "spread": 0.01},
        "predicted": {"tok_s": 11.0, "limit_tok_s": 12.0, "bottleneck": HOSTILE, "formula": HOSTILE},
    });
    let write = |name: &str, value: &Value| {
        let path = dir.join(name);
        fs::write(&path, value.to_string()).unwrap();
        path
    };
    let mut gpu = printed(&gpu_bench(), HOSTILE);
    for key in ["device", "limit"] {
        gpu[key] = HOSTILE.into();
    }
    let benches = [write("bench.json", &bench), write("<i>gpu.json", &gpu)];
    let evals = [write("eval.json", &eval), write("planes.json", &planes()), write("tasks.json", &tasks())];
    [evals.to_vec(), vec![write("<i>run.json", &run)], benches.to_vec()].concat()
}

/// What `eval --task` prints, with fields of a later version.
fn tasks() -> Value {
    let accuracy = json!({"share": 0.5, "ci95": [0.25, 0.75], "difference": -0.07, "difference_ci95": [-0.125, 0.0],
                          "lost": 17, "gained": 3, "later": [1]});
    let of_cloze = json!({"mask": HOSTILE, "active": 0.3, "bytes_share": 0.7, "accuracy": accuracy,
                          "accuracy_by_bytes": accuracy, "answer_loss": 9.0, "answer_loss_ci95": [8.0, 10.0]});
    let of_lambada = json!({"mask": "dense", "active": null, "accuracy": accuracy, "answer_loss": 2.0,
                            "answer_loss_ci95": [1.0, 3.0], "word_perplexity": 7.389, "later": 1});
    let task = |name: &str, result: Value| json!({"task": name, "file": HOSTILE, "examples": 9, "results": [result]});
    json!({"tasks": [task("lambada", of_lambada), task("cloze", of_cloze)], "model": HOSTILE, "encoding": "q4",
           "positions": "all", "later": {"x": 1}, "command": ["eval", HOSTILE]})
}

/// What `eval --planes` prints.
fn planes() -> Value {
    let plane = |name: &str, bits: f64| json!({"plane": name, "bits_per_weight": bits, "entropy_bits": bits, "zstd_bits": bits});
    let result = |planes: &str, ratio: f64| {
        let mut result = evaluation("dense", 1.0);
        (result["planes"], result["perplexity_ratio"]) = (planes.into(), ratio.into());
        result
    };
    let mut eval = result("base", 1.1);
    let choices =
        [("base", 1.1), ("plus@0.5", 1.05), ("plus", 1.01), ("exact@0.5", 1.04), ("exact", 1.0), (HOSTILE, 2.0)];
    eval["results"] = choices.map(|(planes, ratio)| result(planes, ratio)).to_vec().into();
    eval["model"] = HOSTILE.into();
    eval["study"] = json!({
        "encoding": "q4+exact", "planes": [plane("q4", 4.5), plane(HOSTILE, 1.0), plane("coarse", 4.0), plane("final", 3.0)],
        "share_of_bf16": 0.72, "bf16_entropy_bits": 10.5, "decode_gb_s": 2.0, "copy_gb_s": 60.0,
        "decode_seconds_per_token": null,
    });
    eval
}

/// Every tag is closed, in order; attributes are quoted; `&` starts an entity.
fn assert_balanced(html: &str) {
    let mut open: Vec<&str> = Vec::new();
    let body = html.strip_prefix("<!DOCTYPE html>").unwrap();
    for piece in body.split('<').skip(1) {
        let (tag, _) = piece.split_once('>').expect("a tag ends");
        assert_eq!(tag.matches('"').count() % 2, 0, "quotes in <{tag}>");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name));
        } else if !tag.ends_with('/') {
            open.push(tag.split_whitespace().next().unwrap());
        }
    }
    assert!(open.is_empty(), "never closed: {open:?}");
    for after in html.split('&').skip(1) {
        let entity = after.split(';').next().unwrap();
        assert!(["amp", "lt", "gt", "quot", "apos", "#39"].contains(&entity), "&{entity}");
    }
}

fn assert_offline(html: &str) {
    for part in ["http:", "https:", "//", "src=", "url(", "@import", "<script", "<link", "<img", "<iframe"] {
        assert!(!html.contains(part), "{part} in the page");
    }
    assert!(html.split("href=\"").skip(1).all(|r| r.starts_with('#')), "a reference leaves the page");
}

#[test]
fn page_is_whole_offline_and_escaped() {
    let dir = tempfile::tempdir().unwrap();
    let mut paths = profile_and_split(dir.path()).to_vec();
    paths.extend(results(dir.path()));
    let page = Page::new(Inputs::read(&paths).unwrap(), vec!["report".into(), HOSTILE.into()]).unwrap();
    assert!(page.sections().iter().all(|s| !s.is_empty()));
    let html = page.html().unwrap();
    for id in SECTIONS {
        assert!(html.contains(&format!("<section id=\"{id}\">")), "{id}");
    }
    assert_balanced(&html);
    assert_offline(&html);
    assert!(!html.contains("Not measured"));
    assert!(html.contains("&lt;script&gt;") && html.contains("profile &lt;b&gt;"));
    assert!(html.contains("<dt>model</dt><dd>model &lt;i&gt;</dd>") && !html.contains("<i>"));
    for cell in ["50.0 (25.0\u{2013}75.0)", "-7.0 (-12.5 to +0.0)", "17, 3", "<td>7.389</td>"] {
        assert!(html.contains(cell), "{cell}");
    }
    for colour in ["currentColor", "var(--grid)", "var(--series-0)"] {
        assert!(html.contains(colour));
    }
    let figures = page.sections().iter().map(|s| s.figures.len()).sum::<usize>();
    assert_eq!(html.matches("<svg").count(), figures);
    assert!(figures >= 12, "{figures}");

    let pictures = page.write_png(&dir.path().join("png")).unwrap();
    assert_eq!(pictures.len(), figures);
    assert!(pictures.iter().all(|p| fs::read(p).unwrap().starts_with(b"\x89PNG")));
    page.write(&dir.path().join("report.html")).unwrap();
    assert_eq!(fs::read_to_string(dir.path().join("report.html")).unwrap(), html);
}

#[test]
fn page_of_nothing_says_what_to_measure() {
    let html = Page::new(Inputs::default(), Vec::new()).unwrap().html().unwrap();
    assert_balanced(&html);
    assert_eq!(html.matches("Not measured").count(), SECTIONS.len() - 1);
}

#[test]
fn tasks_alone_are_a_table() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tasks.json");
    fs::write(&path, tasks().to_string()).unwrap();
    let page = Page::new(Inputs::read(&[path]).unwrap(), Vec::new()).unwrap();
    let accuracy = page.sections().iter().find(|s| s.id == "accuracy").unwrap();
    assert_eq!((accuracy.figures.len(), accuracy.tables.len(), accuracy.tables[0].data.height()), (0, 1, 2));
    assert_balanced(&page.html().unwrap());
}

#[test]
fn extreme_values_are_drawn_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("eval.json");
    let mut eval = evaluation("predicted", 0.0);
    eval["perplexity"] = 1e300.into();
    eval["layers"] = json!([]);
    fs::write(&path, eval.to_string()).unwrap();
    let page = Page::new(Inputs::read(&[path]).unwrap(), Vec::new()).unwrap();
    assert_balanced(&page.html().unwrap());
    page.write_png(&dir.path().join("png")).unwrap();
}

#[test]
fn what_is_no_input_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (name, content) in [("a.json", "[1, 2]"), ("b.json", "not json"), ("c.json", "{\"perplexity\": \"x\"}")] {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        assert!(matches!(Inputs::read(&[path]), Err(Error::Input { .. } | Error::Field { .. })), "{name}");
    }
    assert!(matches!(Inputs::read(&[dir.path().to_owned()]), Err(Error::Input { .. })));
    assert!(matches!(Inputs::read(&[dir.path().join("none")]), Err(Error::Io { .. })));
}
