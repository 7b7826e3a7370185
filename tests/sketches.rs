//! Sketches: low-bit copies of neurons, made by `split --sketch`, that choose and stand in.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;
use support::{
    BINARY, bits, budget_range, copy, engine, fails, files, forge, json, llama, medium, model, ok, profile, prompt,
    qwen_relu, request, split, splitting, text,
};
use thermocline_datasets::Checkpoint;
use thermocline_runtime::{Logits, Mode};
use thermocline_split::{SKETCH_BITS, Split, SplitCheckpoint};

const SKETCHED: &[&str] = &["--chunk-neurons", "8", "--sketch"];

/// What a fit knew of each row's products, against the rows that it stored: over inputs that a model has.
#[test]
fn what_a_sketch_says_of_its_errors_is_so() {
    let dir = split(&medium(), "bf16", &["--sketch"]);
    let dense = SplitCheckpoint::open(&dir).unwrap();
    let (stored, config) = (dense.split(), dense.config().clone());
    assert_eq!(stored.manifest().version, 6);
    let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
    let sketch = stored.sketch(0).unwrap().unwrap().in_order(&stored.layers()[0].places());
    // 2.5 bits a weight, but for the numbers of each neuron.
    let bytes: usize = SKETCH_BITS.iter().map(|b| b.row_bytes(hidden)).sum();
    assert_eq!(sketch.rows.iter().map(Vec::len).sum::<usize>(), ffn * bytes);
    assert!(bytes as f64 * 8.0 / (3 * hidden) as f64 <= 7.0 / 3.0 + 0.125 + 16.0 / hidden as f64);

    let row = |part: &str| dense.load(&format!("model.layers.0.mlp.{part}_proj.weight")).unwrap();
    let down = row("down");
    let sketched = sketch.decoded(2);
    for n in (0..ffn).step_by(97) {
        let column: Vec<f32> = (0..hidden).map(|i| down[i * ffn + n]).collect();
        let length = |v: &mut dyn Iterator<Item = f32>| v.map(|v| v * v).sum::<f32>().sqrt();
        let (norm, lost) = (
            length(&mut column.iter().copied()),
            length(&mut column.iter().zip(&sketched[n * hidden..]).map(|(w, s)| w - s)),
        );
        assert!((norm - sketch.down_norm[n]).abs() < 1e-3 * norm && (lost - sketch.down_error[n]).abs() < 1e-3 * norm);
        assert!(lost < 0.32 * norm, "{lost} of {norm}");
    }
    // Products with what the layer really reads.
    let x = layer_inputs(&dense);
    for (part, name, told) in [(0, "gate", &sketch.gate_sd), (1, "up", &sketch.up_sd)] {
        let (weights, sketched) = (row(name), sketch.decoded(part));
        let (mut ratio, mut n_rows) = (0.0, 0);
        for n in (0..ffn).step_by(61) {
            let of = |x: &[f32]| {
                (0..hidden).map(|j| (weights[n * hidden + j] - sketched[n * hidden + j]) * x[j]).sum::<f32>()
            };
            let square = x.chunks_exact(hidden).map(|x| of(x).powi(2)).sum::<f32>() / (x.len() / hidden) as f32;
            ratio += square.sqrt() / told[n];
            n_rows += 1;
        }
        let ratio = ratio / n_rows as f32;
        assert!((0.6..1.4).contains(&ratio), "{name}: {ratio} of what the sketch says");
    }
}

/// Inputs of the first layer's neurons for tokens of the corpus that it was calibrated on.
fn layer_inputs(model: &dyn Checkpoint) -> Vec<f32> {
    use thermocline_calibrate::dense::{DenseLayer, Embedding};
    let tokenizer = thermocline_datasets::Tokenizer::from_json(&model.tokenizer_json().unwrap()).unwrap();
    let tokens = tokenizer.encode(&fs::read_to_string(support::corpus()).unwrap(), false).unwrap();
    let x = Embedding::load(model).unwrap().rows(&tokens[..512]).unwrap();
    let layer = DenseLayer::load(model, 0).unwrap();
    layer.ffn_input(&layer.attention(&x, 4, 128).unwrap()).unwrap()
}

/// The same bytes from one run and from one that was interrupted; nothing of it in a split without.
#[test]
fn sketches_are_the_same_bytes_every_time_and_only_where_they_were_asked_for() {
    let dir = split(&llama(), "q4", SKETCHED);
    let plain = split(&llama(), "q4", &["--chunk-neurons", "8"]);
    assert!(!plain.join("sketches.safetensors").exists());
    assert_eq!(Split::open(&plain).unwrap().manifest().version, 1);
    let differ: Vec<String> = files(&dir).into_iter().filter(|f| !files(&plain).contains(f)).map(|f| f.0).collect();
    assert_eq!(differ, ["manifest.json", "sketches.safetensors"]);

    let out = tempfile::tempdir().unwrap();
    let (again, model, profile) = (out.path().join("again"), model(&llama()), profile(&llama()));
    let given = [&["--encoding", "q4", "-t", "1"], SKETCHED].concat();
    let mut child = Command::new(BINARY).args(splitting(&model, &profile, &given, &again)).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(30));
    let _ = child.kill();
    child.wait().unwrap();
    if !again.exists() {
        ok(&splitting(&model, &profile, &given, &again));
    }
    assert!(files(&again) == files(&dir), "an interrupted run ends in the same bytes, with any number of threads");
}

/// The less is computed, the further from the dense model; but far nearer than with a predictor and nothing in place of the rest.
#[test]
fn what_stands_for_the_rest_brings_the_output_nearer() {
    let with = split(&llama(), "q4", SKETCHED);
    let without = split(&llama(), "q4", &["--chunk-neurons", "8"]);
    let tokens = prompt(40);
    let logits = |dir: &Path, mode: Mode| -> Vec<f32> {
        let mut engine = engine(dir, request(mode, None, 2)).unwrap();
        tokens.iter().flat_map(|t| engine.forward(&[*t], Logits::Last).unwrap()).collect()
    };
    let exact = logits(&with, Mode::Exact);
    assert!(bits(&exact) == bits(&logits(&without, Mode::Exact)), "exact mode knows nothing of sketches");
    let apart = |dir: &Path, active: f32| {
        let got = logits(dir, Mode::Sparse { active });
        let square: f64 = exact.iter().zip(&got).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        square.sqrt()
    };
    let graded = [0.05, 0.3, 0.7].map(|active| apart(&with, active));
    assert!(graded[0] > graded[1] && graded[1] > graded[2] && graded[2] > 0.0, "{graded:?}");
    let predicted = apart(&without, 0.3);
    assert!(graded[1] < 0.5 * predicted, "{} with sketches, {predicted} without", graded[1]);
}

#[test]
fn zeros_of_relu_are_found() {
    let dir = split(&qwen_relu(), "q8", SKETCHED);
    let evaluated = json(&[
        "eval",
        "-m",
        text(&dir),
        "--text",
        text(support::corpus()),
        "--ctx",
        "64",
        "--windows",
        "2",
        "--mask",
        "graded",
        "--active",
        "0.5",
        "--json",
    ]);
    assert_eq!(evaluated["mask"], "graded");
    assert!(evaluated["energy_recall"].as_f64().unwrap() > 0.97, "{evaluated}");
    assert!(evaluated["bytes_share"].as_f64().unwrap() > 0.5, "{evaluated}");
}

/// By thresholds of a model whose neurons all fire; what was read is told by kind and by bytes.
#[test]
fn rows_are_chosen_one_by_one() {
    let (_guard, dir) = copy(&split(&llama(), "q4", SKETCHED));
    let corpus = text(support::corpus());
    let windows = ["--text", corpus, "--ctx", "64", "--windows", "2"];
    let fitted = ok(&[&["eval", "-m", text(&dir), "--fit-shares"][..], &windows].concat()).stdout;
    assert!(fitted.contains("thresholds of rows from 2 windows of 64"), "{fitted}");
    let of_both = |dir: &Path| json(&["inspect", text(dir), "--json"])["graded"].clone();
    assert_eq!(
        (of_both(&dir)["thresholds_of"].as_str(), of_both(&dir)["curves"][0]["always"].as_f64()),
        (Some("rows"), Some(0.0))
    );
    // The same thresholds alone, in one pass.
    let (_other_guard, other) = copy(&split(&llama(), "q4", SKETCHED));
    let alone = ok(&[&["eval", "-m", text(&other), "--fit-shares", "--no-curve"][..], &windows].concat()).stdout;
    assert!(alone.contains("thresholds of rows from 2 windows of 64, kept in"), "{alone}");
    let thresholds = |dir: &Path| Split::open(dir).unwrap().graded_curves().unwrap().unwrap().thresholds().clone();
    assert_eq!(thresholds(&other), thresholds(&dir));
    assert_eq!(of_both(&other)["curves"], serde_json::json!([]));
    let plain = split(&llama(), "q4", &["--chunk-neurons", "8"]);
    let message = fails(2, &[&["eval", "-m", text(&plain), "--fit-shares", "--no-curve"][..], &windows].concat());
    assert!(message.contains("--no-curve") && message.contains("sketches"), "{message}");
    let given = [&["eval", "-m", text(&dir), "--mask", "dense,graded", "--active", "1,0.3"][..], &windows].concat();
    let results = json(&[&given[..], &["--json"]].concat())["results"].clone();
    assert!(results[1]["kl"].as_f64().unwrap() < 1e-9, "everything is read: {results}");
    assert_eq!(results[1]["perplexity"], results[0]["perplexity"]);
    let read = &results[2]["rows_read"];
    assert!((read["bytes"].as_f64().unwrap() - 0.3).abs() < 0.05, "{read}");
    assert!(results[2]["kl"].as_f64().unwrap() > 1e-6 && results[2].get("recall").unwrap().is_null());
    let table = ok(&given).stdout;
    assert!(table.contains("graded 0.30: of the rows") && table.contains("by bytes"), "{table}");

    // A run goes by them, and so do tasks.
    let sparse = ["-m", text(&dir), "--vram-budget", "0", "--mode", "sparse", "--active", "0.3", "--temp", "0"];
    let account = json(&[&["run", "-p", "the lake", "-n", "8", "--json"][..], &sparse].concat());
    let computed = account["computed_share"].as_f64().unwrap();
    let said = ok(&[&["run", "-p", "the lake", "-n", "8"][..], &sparse].concat()).stdout;
    assert!(said.contains(&format!("{:.1} % of the neurons", 100.0 * computed)), "{said}");
    assert!((computed - 0.3).abs() < 0.15, "{account}");
    let message = fails(2, &[&["run", "-p", "the lake", "-n", "8", "--max-error", "0.1"][..], &sparse].concat());
    assert!(message.contains("--max-error") && message.contains("single rows"), "{message}");

    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), r#"{"context": "the lake", "choices": [" was calm", " rose"], "answer": 0}"#).unwrap();
    let task = format!("cloze={}", text(file.path()));
    let tasks = ["eval", "-m", text(&dir), "--task", &task, "--mask", "dense,graded", "--active", "0.1,1", "--json"];
    let results = json(&tasks)["results"].clone();
    assert!(results[1]["kl"].as_f64().is_none_or(|kl| kl > 0.0), "{results}");
}

/// Chunks come from disk with all of a neuron's rows: what is there is computed with.
#[test]
fn from_disk_neurons_with_a_row_to_read_are_read_whole() {
    let (_guard, dir) = copy(&split(&medium(), "q4", &["--sketch"]));
    ok(&["eval", "-m", text(&dir), "--fit-shares", "--no-curve", "--text", text(support::corpus()), "--ctx", "64"]);
    let mode = Mode::Sparse { active: 0.3 };
    let (least, _) = budget_range(&dir, mode);
    let decoded = |mode: Mode, budget: Option<u64>| {
        let mut engine = engine(&dir, request(mode, budget, 2)).unwrap();
        assert_eq!(engine.plan().streams(), budget.is_some());
        let logits: Vec<Vec<f32>> = prompt(6).iter().map(|t| engine.forward(&[*t], Logits::Last).unwrap()).collect();
        (logits, engine.account().neurons_computed)
    };
    let (dense, _) = decoded(Mode::Exact, None);
    let off = |got: &[Vec<f32>]| -> f32 {
        let pairs = got.iter().flatten().zip(dense.iter().flatten());
        pairs.map(|(a, b)| (a - b).powi(2)).sum()
    };
    let (in_memory, from_disk) = (decoded(mode, None), decoded(mode, Some(least)));
    assert!(from_disk.1 > in_memory.1 + in_memory.1 / 10, "{} and {}", from_disk.1, in_memory.1);
    assert!(off(&from_disk.0) < off(&in_memory.0), "{} and {}", off(&from_disk.0), off(&in_memory.0));
}

#[test]
fn sketches_that_lie_are_refused_or_cost_accuracy_alone() {
    let whole = split(&llama(), "q4", SKETCHED);
    let damaged = |change: &dyn Fn(&Path)| {
        let (_guard, dir) = copy(&whole);
        change(&dir);
        let mut engine = engine(&dir, request(Mode::Sparse { active: 0.25 }, None, 2)).map_err(|e| e.to_string())?;
        let logits: Vec<f32> = prompt(6).iter().flat_map(|t| engine.forward(&[*t], Logits::Last).unwrap()).collect();
        assert!(logits.iter().all(|l| l.is_finite()));
        Ok::<_, String>(engine.account().neurons_computed)
    };
    let refused = |change: &dyn Fn(&Path), words: [&str; 2]| {
        let error = damaged(change).unwrap_err();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    let computed = damaged(&|_| ()).unwrap();

    for value in [f32::NAN, f32::INFINITY, -1.0] {
        let lie = move |bytes: &mut [u8]| bytes[..4].copy_from_slice(&value.to_le_bytes());
        refused(
            &|dir| forge::sketch(dir, "sketches.1.neurons", lie),
            ["sketches.1.neurons", "finite and not negative"],
        );
    }
    refused(
        &|dir| forge::manifest(dir, |m| m.sketches.as_mut().unwrap().tensors[0].name = "sketches.0.other".to_owned()),
        ["sketches", "sketches.0"],
    );
    refused(&|dir| forge::manifest(dir, |m| m.version = 3), ["version 3", "split --sketch"]);
    refused(&|dir| fs::remove_file(dir.join("sketches.safetensors")).unwrap(), ["sketches.safetensors", "missing"]);
    refused(
        &|dir| {
            let path = dir.join("sketches.safetensors");
            let mut bytes = fs::read(&path).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(path, bytes).unwrap();
        },
        ["sketches", "checksum"],
    );
    // Scales of rows that are no numbers: such neurons count for nothing.
    for pattern in [0x7fc0u16, 0x7f80, 0xff80, 0] {
        let computed_now = damaged(&|dir| {
            for (part, bits) in ["gate", "up", "down"].iter().zip(SKETCH_BITS) {
                // Of a down row all would be spoilt that it stands for.
                if *part != "down" {
                    forge::sketch(dir, &format!("sketches.0.{part}"), |bytes| {
                        bytes.chunks_exact_mut(bits.row_bytes(64)).step_by(3).for_each(|row| {
                            let at = row.len() - 2;
                            row[at..].copy_from_slice(&pattern.to_le_bytes());
                        });
                    });
                }
            }
        });
        assert_eq!(computed_now.unwrap(), computed, "{pattern:04x}");
    }
}

#[test]
fn what_has_no_sketches_says_so() {
    let plain = split(&llama(), "q4", &["--chunk-neurons", "8"]);
    let with = split(&llama(), "q4", SKETCHED);
    let given = ["--text", text(support::corpus()), "--ctx", "64", "--windows", "1", "--active", "0.3"];
    let refused = |dir: &Path, more: &[&str], word: &str| {
        let message = fails(2, &[&["eval", "-m", text(dir)], &given[..], more].concat());
        assert!(message.contains(word), "{message}");
    };
    let run = ["run", "-p", "the lake", "-n", "2", "--vram-budget", "0", "--max-error", "0.1"];
    for (dir, more, word) in [
        (&plain, &["--mode", "sparse"][..], "--sketch"),
        (&with, &["--mode", "exact"], "--mode sparse"),
        (&with, &["--mode", "sparse", "--max-error", "1.5"], "below 1"),
        (&with, &["--mode", "sparse", "--max-error", "0.1", "--always", "0.5"], "--always"),
    ] {
        let more: Vec<&str> = if more.contains(&"--max-error") {
            [&run[..run.len() - 2], &["-m", text(dir)], more].concat()
        } else {
            [&run[..], &["-m", text(dir)], more].concat()
        };
        let message = fails(2, &more);
        assert!(message.contains("--max-error") && message.contains(word), "{message}");
    }
    let run = ["run", "-p", "the lake", "-n", "2", "--vram-budget", "0"];
    for (dir, more, code, word) in [
        (&plain, ["--mode", "sparse", "--always", "0.5"], 2, "--sketch"),
        (&with, ["--mode", "exact", "--always", "0.5"], 2, "--mode sparse"),
        (&with, ["--mode", "sparse", "--always", "1.5"], 2, "0 to 1"),
    ] {
        let message = fails(code, &[&run[..], &["-m", text(dir)], &more].concat());
        assert!(message.contains("--always") && message.contains(word), "{message}");
    }
    refused(&plain, &["--mask", "graded"], "split --sketch");
    refused(&model(&llama()), &["--mask", "graded"], "need a split");
    refused(&plain, &["--mask", "graded", "--engine", "decode", "--vram-budget", "0"], "--mask predicted");
    refused(&with, &["--mask", "predicted", "--engine", "decode", "--vram-budget", "0"], "--mask graded");
}
