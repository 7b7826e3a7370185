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
use thermocline_kernels::unpack;
use thermocline_runtime::{Logits, Mode, PlanRequest};
use thermocline_split::{Manifest, SketchForm, Split, SplitCheckpoint, residual_layout};

const RESIDUALS: &[&str] = &["--chunk-neurons", "8", "--sketch", "--residuals"];
const SKETCHED: &[&str] = &["--chunk-neurons", "8", "--sketch"];
const FEWER_BITS: &[&str] = &["--chunk-neurons", "8", "--sketch", "--sketch-bits", "2.1"];

#[test]
fn what_a_sketch_says_of_its_errors_is_so() {
    says_so(&split(&medium(), "bf16", &["--sketch"]), SketchForm::UpInThree, 6);
    says_so(&split(&medium(), "bf16", &["--sketch", "--sketch-bits", "2.1"]), SketchForm::AllInTwo, 9);
}

/// What a fit knew of each row's products, against the rows that it stored: over inputs that a model has.
fn says_so(dir: &Path, form: SketchForm, version: u32) {
    let dense = SplitCheckpoint::open(dir).unwrap();
    let (stored, config) = (dense.split(), dense.config().clone());
    assert_eq!((stored.manifest().version, stored.sketch_form()), (version, form));
    let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
    let sketch = stored.sketch(0).unwrap().unwrap().in_order(&stored.layers()[0].places());
    // 2.5 or 2.1 bits a weight, but for the numbers of each neuron.
    let bytes: usize = form.row_bytes(hidden).iter().sum();
    assert_eq!(sketch.rows.iter().map(Vec::len).sum::<usize>(), ffn * bytes);
    let codes = if version == 6 { 7.0 / 3.0 } else { 2.0 };
    assert!(bytes as f64 * 8.0 / (3 * hidden) as f64 <= codes + 0.125 + 16.0 / hidden as f64);

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

#[test]
fn fewer_bits_are_further_from_the_neurons_and_change_nothing_else() {
    let [more, fewer] = [SKETCHED, FEWER_BITS].map(|how| split(&llama(), "q4", how));
    let differ: Vec<String> = files(&fewer).into_iter().filter(|f| !files(&more).contains(f)).map(|f| f.0).collect();
    assert_eq!(differ, ["manifest.json", "sketches.safetensors"]);
    let (of_more, of_fewer) = (Split::open(&more).unwrap(), Split::open(&fewer).unwrap());
    for l in 0..of_more.layers().len() {
        let [more, fewer] = [&of_more, &of_fewer].map(|split| split.sketch(l).unwrap().unwrap());
        assert!(more.rows[0] == fewer.rows[0] && more.rows[2] == fewer.rows[2], "layer {l}");
        // Two bits lose 0.082 of normal weights' energy, three 0.022.
        let ratio = fewer.up_sd.iter().sum::<f32>() / more.up_sd.iter().sum::<f32>();
        assert!((1.5..2.4).contains(&ratio), "layer {l}: {ratio}");
    }
    let logits = |dir: &Path, mode: Mode| {
        let mut engine = engine(dir, request(mode, None, 2)).unwrap();
        let tokens = prompt(16);
        tokens.iter().flat_map(|t| engine.forward(&[*t], Logits::Last).unwrap()).collect::<Vec<f32>>()
    };
    let dense = logits(&fewer, Mode::Exact);
    assert!(bits(&dense) == bits(&logits(&more, Mode::Exact)));
    let off = |dir: &Path| {
        let got = logits(dir, Mode::Sparse { active: 0.1 });
        got.iter().zip(&dense).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt()
    };
    assert!(off(&fewer) > off(&more), "{} and {}", off(&fewer), off(&more));
    ok(&["verify", text(&fewer), "-m", text(&model(&llama()))]);
    let said = ok(&["inspect", text(&fewer)]).stdout;
    assert!(said.contains("[2,2,2]"), "{said}");
    let alone = ["split", "-m", "model", "--profile", "profile", "-o", "out", "--sketch-bits", "2.1"];
    assert!(fails(2, &alone).contains("--sketch"));
}

/// Rows of sketch and residual: far nearer to the checkpoint's than q4 has them, gate and up rows as products with what the layer
/// reads.
#[test]
fn residuals_bring_rows_nearer_than_q4() {
    let dense = SplitCheckpoint::open(&split(&medium(), "bf16", &["--sketch", "--residuals"])).unwrap();
    let in_q4 = SplitCheckpoint::open(&split(&medium(), "q4", &[])).unwrap();
    let (stored, hidden) = (dense.split(), dense.config().hidden_size);
    assert_eq!(stored.manifest().version, 8);
    let ffn = dense.config().intermediate_size;
    let layout = residual_layout(hidden).unwrap();
    assert_eq!(layout.bundle_bytes(), (3 * (hidden / 2 + hidden / 16)).next_multiple_of(16));
    let mut bundles = vec![0; ffn * layout.bundle_bytes()];
    stored.read_residuals(0, 0, &mut bundles).unwrap();
    // A part of them is the same.
    let mut some = vec![0; 5 * layout.bundle_bytes()];
    stored.read_residuals(0, 1000, &mut some).unwrap();
    assert!(some == bundles[1000 * layout.bundle_bytes()..][..some.len()]);
    let (sketch, order) = (stored.sketch(0).unwrap().unwrap(), stored.layers()[0].order());
    let x = layer_inputs(&dense);
    for (part, name) in ["gate", "up", "down"].into_iter().enumerate() {
        let rows = |from: &SplitCheckpoint| {
            let rows = from.load(&format!("model.layers.0.mlp.{name}_proj.weight")).unwrap();
            move |id: usize| -> Vec<f32> {
                if part < 2 {
                    rows[id * hidden..][..hidden].to_vec()
                } else {
                    rows.iter().skip(id).step_by(ffn).copied().collect()
                }
            }
        };
        let (wanted, q4) = (rows(&dense), rows(&in_q4));
        let mut lost = [0.0f64; 2];
        for place in (0..ffn).step_by(61) {
            let id = order[place] as usize;
            let (mut got, mut residual) = (vec![0.0; hidden], vec![0.0; hidden]);
            sketch.decode_row(part, place, &mut got);
            let bundle = &bundles[place * layout.bundle_bytes()..][..layout.bundle_bytes()];
            unpack(layout.encoding(), layout.row(bundle, part), &mut residual);
            got.iter_mut().zip(residual).for_each(|(got, residual)| *got += residual);
            for (lost, row) in lost.iter_mut().zip([got, q4(id)]) {
                let off: Vec<f32> = wanted(id).iter().zip(row).map(|(w, v)| w - v).collect();
                *lost += match part {
                    2 => off.iter().map(|v| f64::from(v * v)).sum::<f64>(),
                    _ => x
                        .chunks_exact(hidden)
                        .map(|x| off.iter().zip(x).map(|(o, x)| f64::from(o * x)).sum::<f64>().powi(2))
                        .sum::<f64>(),
                };
            }
        }
        let ratio = (lost[0] / lost[1]).sqrt();
        assert!(ratio < 0.6, "{name}: {ratio} of what q4 loses");
    }
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

/// A copy of a split whose sketches have residuals, with thresholds of rows.
fn with_residuals(made: &support::Made) -> (tempfile::TempDir, std::path::PathBuf) {
    let (guard, dir) = copy(&split(made, "q4", RESIDUALS));
    let corpus = text(support::corpus());
    ok(&["eval", "-m", text(&dir), "--fit-shares", "--no-curve", "--text", corpus, "--ctx", "64", "--windows", "2"]);
    (guard, dir)
}

/// Rows as what sketches leave of them, by any number of threads, and prompts too.
#[test]
fn rows_are_read_as_residuals() {
    let (_guard, dir) = with_residuals(&llama());
    let mode = Mode::Sparse { active: 0.3 };
    let decoded = |mode: Mode, always: Option<f32>, n_threads: usize| {
        let mut engine = engine(&dir, PlanRequest { always, ..request(mode, None, n_threads) }).unwrap();
        let tokens = prompt(24);
        let mut logits = vec![engine.prefill(&tokens[..12]).unwrap()];
        let before = engine.account();
        logits.extend(tokens[12..].iter().map(|t| engine.forward(&[*t], Logits::Last).unwrap()));
        let account = engine.account();
        (logits.concat(), account.bytes.host - before.bytes.host, engine)
    };
    let (dense, ..) = decoded(Mode::Exact, None, 1);
    let first = dense.len() / 13;
    let of_checkpoint = engine(&split(&llama(), "bf16", &[]), request(Mode::Exact, None, 1))
        .unwrap()
        .prefill(&prompt(24)[..12])
        .unwrap();
    let off_by = |got: &[f32], want: &[f32]| got.iter().zip(want).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
    let off = |got: &[f32]| off_by(got, &dense);
    for always in [None, Some(0.3), Some(1.0)] {
        let (one, bytes, engine) = decoded(mode, always, 1);
        let plan = engine.plan();
        assert!(plan.residuals && plan.residuals_would_take.is_none());
        let n_sections = if always == Some(0.3) { 2 * plan.hot_neurons.len() } else { 0 };
        assert_eq!(plan.sections.len(), n_sections, "{always:?}");
        let (three, _, _) = decoded(mode, always, 3);
        assert!(bits(&one) == bits(&three), "{always:?}");
        // All neurons always computed are the split's own, as in exact mode.
        assert_eq!(off(&one) == 0.0, always == Some(1.0), "{always:?}: {}", off(&one));
        if always.is_none() {
            let prompt_off = off(&one[..first]);
            assert!(prompt_off > 0.0 && prompt_off < 0.5 * off(&one), "{prompt_off} of {}", off(&one));
            let [read, q4] = [&one, &dense].map(|logits| off_by(&logits[..first], &of_checkpoint));
            assert!(read < 0.9 * q4, "{read} off the checkpoint's, q4 {q4}");
            // Sketches alone are further away.
            let (few, fewer_bytes, _) = decoded(Mode::Sparse { active: 0.01 }, None, 1);
            assert!(off(&one) < off(&few) && bytes > fewer_bytes);
            let rows = 12 * (plan.hot_neurons.len() * plan.hot_neurons[0]) as u64 * 3 * (64 / 2 + 4);
            let share = (bytes - fewer_bytes) as f64 / rows as f64;
            assert!((0.15..0.45).contains(&share), "{share}");
        }
    }
    // Of everything it reads the split's own rows.
    let (whole, _, engine) = decoded(Mode::Sparse { active: 1.0 }, None, 2);
    assert!(
        !engine.plan().residuals && off(&whole) < 1e-3 * off_by(&vec![0.0; dense.len()], &dense),
        "{}",
        off(&whole)
    );
    let run = [
        "run",
        "-m",
        text(&dir),
        "-p",
        "the lake",
        "-n",
        "4",
        "--vram-budget",
        "0",
        "--mode",
        "sparse",
        "--audit-every",
        "1",
    ];
    let account = json(&[&run[..], &["--active", "0.3", "--json"]].concat());
    let audit = &account["audit"];
    assert!(audit["recall"].as_f64().unwrap() > 0.8 && audit["output_error"].as_f64().unwrap() < 0.1, "{account}");
    let plan = ok(&["plan", "-m", text(&dir), "--vram-budget", "0", "--mode", "sparse", "--active", "0.3"]).stdout;
    assert!(plan.contains("as what their sketches leave of them"), "{plan}");
}

/// Where there is no memory for all of them neurons are read whole, and the plan says so.
#[test]
fn residuals_that_do_not_fit_are_left_out_aloud() {
    let (_guard, dir) = with_residuals(&medium());
    let mode = Mode::Sparse { active: 0.3 };
    let (least, _) = budget_range(&dir, mode);
    let all = engine(&dir, request(mode, None, 2)).unwrap();
    let total = all.plan().total_bytes;
    // Before thresholds were fitted neurons were read whole, and took as much.
    let whole = engine(&split(&medium(), "q4", RESIDUALS), request(mode, None, 2)).unwrap();
    assert!(all.plan().residuals && !whole.plan().residuals && total == whole.plan().total_bytes);
    for (budget, fits) in [(total, true), (total - 1, false), (least, false)] {
        let mut engine = engine(&dir, request(mode, Some(budget), 2)).unwrap();
        assert_eq!((engine.plan().residuals, engine.plan().streams()), (fits, !fits), "{budget}");
        assert_eq!(engine.plan().residuals_would_take, (!fits).then_some(total));
        assert!(engine.forward(&[3], Logits::Last).unwrap().iter().all(|l| l.is_finite()));
    }
    let plan = ["plan", "-m", text(&dir), "--vram-budget", "0", "--mode", "sparse"];
    let total = json(&[&plan[..], &["--json"]].concat())["plan"]["total_bytes"].as_u64().unwrap();
    let budget = format!("{}KiB", total / 1024 - 8);
    let said = ok(&[&plan[..], &["--ram-budget", &budget]].concat()).stdout;
    assert!(said.contains("note: with what sketches leave") && said.contains("read whole"), "{said}");
}

#[test]
fn residuals_that_lie_are_refused() {
    let (_guard, made) = with_residuals(&llama());
    let refused = |change: &dyn Fn(&Path), words: [&str; 2]| {
        let (_guard, dir) = copy(&made);
        change(&dir);
        let error = engine(&dir, request(Mode::Sparse { active: 0.25 }, None, 2)).map(drop).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    for scale in [0x7e00u16, 0x7c00, 0xfc00] {
        let lie = move |bytes: &mut [u8]| bytes[3 * 64 / 2..][..2].copy_from_slice(&scale.to_le_bytes());
        refused(&|dir| forge::residual(dir, "residuals.1", lie), ["residuals.1", "not finite"]);
    }
    refused(
        &|dir| forge::manifest(dir, |m| m.residuals.as_mut().unwrap().tensors[0].name = "residuals.7".to_owned()),
        ["residuals.safetensors", "residuals.0"],
    );
    refused(&|dir| forge::manifest(dir, |m| m.version = 7), ["version", "8"]);
    refused(&|dir| forge::manifest(dir, |m| (m.sketches, m.graded) = (None, None)), ["residuals", "of sketches"]);
    refused(&|dir| fs::remove_file(dir.join("residuals.safetensors")).unwrap(), ["residuals.safetensors", "missing"]);
    refused(
        &|dir| {
            let path = dir.join("residuals.safetensors");
            let mut bytes = fs::read(&path).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(path, bytes).unwrap();
        },
        ["residuals", "checksum"],
    );
    let (_guard, dir) = copy(&made);
    let path = dir.join("residuals.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 16;
    fs::write(path, bytes).unwrap();
    let checked = fails(4, &["verify", text(&dir), "-m", text(&model(&llama()))]);
    assert!(checked.contains("residuals") && checked.contains("checksum"), "{checked}");
    let alone = ["split", "-m", "model", "--profile", "profile", "-o", "out", "--residuals"];
    assert!(fails(2, &alone).contains("--sketch"));
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
    let fewer = |m: &mut Manifest| (m.packing.sketch_bits, m.version) = (SketchForm::AllInTwo, 9);
    refused(&|dir| forge::manifest(dir, fewer), ["sketches.0.up", "does not fit"]);
    refused(
        &|dir| {
            forge::manifest(dir, fewer);
            forge::manifest(dir, |m| m.version = 6);
        },
        ["version", "9"],
    );
    refused(
        &|dir| {
            forge::manifest(dir, fewer);
            forge::manifest(dir, |m| m.sketches = None);
        },
        ["packing.sketch_bits", "of sketches"],
    );
    for other in ["[1, 2, 1]", "[2, 2]", "\"2\""] {
        let lie = |dir: &Path| {
            forge::manifest(dir, fewer);
            let path = dir.join("manifest.json");
            let text: String = fs::read_to_string(&path).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(text.contains("[ 2, 2, 2 ]"));
            fs::write(&path, text.replace("[ 2, 2, 2 ]", other)).unwrap();
        };
        refused(&lie, ["manifest.json", if other == "[1, 2, 1]" { "[1, 2, 1] bits" } else { "invalid" }]);
    }
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
            for (part, bits) in ["gate", "up", "down"].iter().zip(SketchForm::default().bits()) {
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
