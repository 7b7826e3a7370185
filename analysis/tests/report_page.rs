//! The page holds together whatever it is made from.
#![allow(missing_docs, clippy::unwrap_used)]

mod records;

use records::{gpu_bench, printed};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use thermocline_analysis::Error;
use thermocline_analysis::plots::{Body, Series};
use thermocline_analysis::report::{Figure, Inputs, Page};
use thermocline_calibrate::{RunOptions, Settings, calibrate};
use thermocline_datasets::open_checkpoint;
use thermocline_datasets::write::{TinyModel, write_tiny_safetensors};
use thermocline_kernels::Encoding;
use thermocline_split::{Compression, LayerCost, Rounding, Shares, Split, SplitOptions, split};

const HOSTILE: &str = "<script>alert(\"x\")</script>&'";
const SECTIONS: [&str; 11] =
    ["rates", "coactivation", "overlap", "shares", "accuracy", "recall", "planes", "runs", "bench", "gpu", "commands"];

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
        attention_encoding: None,
        order: None,
        chunk_neurons: None,
        compression: Compression::None,
        predictor_rank: 32,
        outliers: 0.0,
        scales: thermocline_split::Scales::Moments,
        rounding: Rounding::Feedback,
        sketch: None,
        residuals: false,
    };
    split(checkpoint.as_ref(), &profile, &options, &split_dir, &|_, _| ()).unwrap();
    let config = checkpoint.config();
    // The first layer costs more than the others.
    let cost = |l: usize| LayerCost {
        loss: vec![if l == 0 { 8.0 } else { 1.0 }, 0.1],
        left_out: vec![0.0; 2 * config.hidden_size],
    };
    let shares = Shares::new(vec![0.05, 0.5], (0..config.n_layers).map(cost).collect(), config.hidden_size).unwrap();
    Split::put_shares(&split_dir, &shares).unwrap();
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

/// A figure's line of that name.
fn line<'a>(figure: &'a Figure, label: &str) -> &'a Series {
    let Body::Lines(series) = &figure.chart.body else { panic!("{}", figure.chart.title) };
    series.iter().find(|s| s.label.as_deref() == Some(label)).unwrap_or_else(|| panic!("{label} in {series:?}"))
}

#[test]
fn the_division_between_layers_is_drawn_beside_the_same_share_everywhere() {
    let dir = tempfile::tempdir().unwrap();
    let [profile, split] = profile_and_split(dir.path());
    let division = |path: &Path| {
        let page = Page::new(Inputs::read(&[path.to_owned()]).unwrap(), Vec::new()).unwrap();
        page.sections().iter().find(|s| s.id == "shares").unwrap().figures.clone()
    };
    assert!(division(&profile).is_empty());
    let figures = division(&split);
    assert_eq!(figures.len(), 1);
    for share in [10.0, 30.0, 50.0] {
        let points = &line(&figures[0], &format!("{share:.0} % of all")).points;
        let mean = points.iter().map(|p| p.1).sum::<f64>() / points.len() as f64;
        assert!((mean - share).abs() < 1e-3 && points[0].1 >= points[1].1, "{points:?}");
    }
    let Body::Lines(series) = &figures[0].chart.body else { panic!("lines") };
    let levels: Vec<f64> = series.iter().filter(|s| s.dashed).map(|s| s.points[0].1).collect();
    assert!(
        levels.iter().zip([10.0, 30.0, 50.0]).all(|(a, b)| (a - b).abs() < 1e-9) && levels.len() == 3,
        "{levels:?}"
    );
    assert!(figures[0].reading.contains("layer 0 computes most"), "{}", figures[0].reading);
}

/// Splits of one checkpoint, an older record among them, and one of another checkpoint.
#[test]
fn energy_is_drawn_over_the_bytes_of_predictors() {
    let dir = tempfile::tempdir().unwrap();
    let record = |name: &str, source: &str, bytes: Option<f64>, energy: f64| {
        let mut results = ["predicted", "oracle"].map(|mask| evaluation(mask, 0.3));
        results[0]["energy_recall"] = energy.into();
        (results[0]["bytes_share"], results[1]["bytes_share"]) = (0.66.into(), 0.58.into());
        if let Some(bytes) = bytes {
            results[0]["predictor_bytes_share"] = bytes.into();
        }
        let mut eval = results[0].clone();
        eval["results"] = results.to_vec().into();
        (eval["model"], eval["source_digest"], eval["model_digest"]) = (name.into(), source.into(), "a".into());
        let path = dir.path().join(format!("{name}.json"));
        fs::write(&path, eval.to_string()).unwrap();
        path
    };
    let recall = |paths: &[PathBuf]| {
        let page = Page::new(Inputs::read(paths).unwrap(), Vec::new()).unwrap();
        page.sections().iter().find(|s| s.id == "recall").unwrap().figures.last().unwrap().clone()
    };
    let close = |points: &[(f64, f64)], wanted: &[(f64, f64)]| {
        assert_eq!(points.len(), wanted.len(), "{points:?}");
        let near = |(p, w): (&(f64, f64), &(f64, f64))| (p.0 - w.0).abs() < 1e-6 && (p.1 - w.1).abs() < 1e-6;
        assert!(points.iter().zip(wanted).all(near), "{points:?}");
    };
    // Without the field: what the oracle does not read.
    let one = [
        record("rank-256", "a", Some(0.16), 0.8),
        record("rank-64", "a", Some(0.04), 0.6),
        record("rank-128", "", None, 0.7),
    ];
    let figure = recall(&one);
    close(&line(&figure, "predicted 30 %").points, &[(4.0, 60.0), (8.0, 70.0), (16.0, 80.0)]);
    close(&line(&figure, "oracle 30 %").points, &[(0.0, 90.0), (17.6, 90.0)]);
    assert!(figure.reading.contains("of 16 % of the layers' bytes finds 80 %"), "{}", figure.reading);
    assert!(figure.reading.contains("an oracle of as many neurons keeps 90 %"), "{}", figure.reading);

    let other = [one.to_vec(), vec![record("other", "b", Some(0.1), 0.5)]].concat();
    let figure = recall(&other);
    close(&line(&figure, "predicted 30 %, other").points, &[(10.0, 50.0)]);
    close(&line(&figure, "predicted 30 %, rank-256").points, &[(4.0, 60.0), (8.0, 70.0), (16.0, 80.0)]);
    // Where no predictor was asked there is nothing to draw.
    let mut oracle = evaluation("oracle", 0.3);
    oracle["bytes_share"] = 0.58.into();
    fs::write(dir.path().join("oracle.json"), oracle.to_string()).unwrap();
    assert!(!recall(&[dir.path().join("oracle.json")]).chart.title.contains("bytes"));
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
