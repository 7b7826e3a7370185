//! Planted models: that the engines see exactly the activations that were planted, and that the walk goes on.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod support;

use serde_json::Value;
use std::path::{Path, PathBuf};
use support::{copy, engine, fails, files, forge, json, llama, ok, once, request, split, text};
use tempfile::TempDir;
use thermocline_calibrate::coactivation::BitMatrix;
use thermocline_calibrate::dense::{DenseLayer, Embedding};
use thermocline_calibrate::{RunOptions, Settings, calibrate};
use thermocline_datasets::planted::{PlantedModel, Shape, Statistics, n_hot};
use thermocline_datasets::{Activation, Checkpoint};
use thermocline_runtime::{Logits, Mode};
use thermocline_split::{SketchForm, Split, SplitCheckpoint, planted_bytes, split_planted};

const VOCAB: usize = 1024;

fn tiny() -> PathBuf {
    once("planted-tiny-a", |path| drop(ok(&["split", "--planted", "tiny", "-o", text(path)])))
}

fn sketched() -> PathBuf {
    once("planted-tiny-a-sketched", |path| drop(ok(&["split", "--planted", "tiny", "--sketch", "-o", text(path)])))
}

fn model(shape: Shape) -> PlantedModel {
    PlantedModel::new(shape, "a", Statistics::case("a").unwrap(), 0).unwrap()
}

/// What every layer of the dense engine computed over the whole vocabulary, token by token: `h` is not zero.
fn computed(dir: &Path) -> Vec<BitMatrix> {
    let (checkpoint, out) = (SplitCheckpoint::open(dir).unwrap(), TempDir::new().unwrap());
    let tokens: Vec<u32> = (0..VOCAB as u32).collect();
    let settings = Settings {
        window_len: 128,
        n_samples: VOCAB,
        sample_run_len: 128,
        second_moment: false,
        attention_moments: false,
        ..Settings::default()
    };
    let profile = out.path().join("profile");
    let profile = calibrate(&checkpoint, &tokens, &settings, &RunOptions::default(), &profile, &mut |_| ()).unwrap();
    assert_eq!(profile.sample_tokens().unwrap(), (0..VOCAB as u64).collect::<Vec<_>>());
    (0..checkpoint.split().layers().len()).map(|l| profile.layer(l).unwrap().active).collect()
}

/// Share of active neurons over some tokens, and the hottest ones' share of the activations.
fn share_and_cover(active: &BitMatrix, tokens: std::ops::Range<usize>) -> (f64, f64) {
    let hot = n_hot(active.n_columns());
    let (n, all) = (tokens.len(), tokens.clone().map(|t| active.ones(t).count()).sum::<usize>());
    let of_hot: usize = tokens.map(|t| active.ones(t).filter(|&i| i < hot).count()).sum();
    (all as f64 / (n * active.n_columns()) as f64, of_hot as f64 / all as f64)
}

#[test]
fn the_dense_engine_computes_exactly_what_was_planted() {
    let (dir, model) = (tiny(), model(Shape::named("tiny").unwrap()));
    let (split, planted) = (Split::open(&dir).unwrap(), *model.statistics());
    let report = split.planted().unwrap().unwrap();
    let (mut shares, mut covers, mut later) = (0.0, 0.0, 0.0);
    let layers = computed(&dir);
    for (l, active) in layers.iter().enumerate() {
        let layer = model.layer(l);
        for place in 0..active.n_columns() {
            let neuron = layer.neuron(place);
            for token in 0..VOCAB {
                let fires = neuron.fires(model.pattern(token), model.domain(token));
                assert_eq!(active.get(token, place), fires, "layer {l}, neuron {place}, token {token}");
            }
        }
        // The trace that `plan` replays is the same.
        let trace = split.statistics().read(&format!("layers.{l}.trace")).unwrap();
        let rows = model.trace_tokens().flat_map(|t| active.row(t)).copied();
        assert!(rows.eq(trace), "layer {l}");
        let (share, cover) = share_and_cover(active, 0..model.border());
        shares += share / layers.len() as f64;
        covers += cover / layers.len() as f64;
        later += share_and_cover(active, model.border()..VOCAB).1 / layers.len() as f64;
    }
    // Thresholds are quantiles over the whole vocabulary, so that a half of it is a sample: the mean share of 512
    // tokens has an error of the share's own deviation over the root of 512, a little more as neighbours are alike.
    let error = report.measured.active_share_sd / (model.border() as f64).sqrt() * 1.3;
    assert!((shares - planted.active_share).abs() < 4.0 * error, "{shares}, error {error}");
    // Hot and cold neurons' shares err by as much, relative to the share.
    assert!((covers - planted.hot_cover).abs() < 4.0 * error / planted.active_share, "{covers}");
    // Half of the hottest change places with others, which cover 9 % if there are as many of them.
    let cold = (1.0 - planted.hot_cover) * 0.18 / 0.82;
    let expected = (1.0 - planted.shift) * planted.hot_cover + planted.shift * cold;
    assert!((later - expected).abs() < 0.04, "{later}, expected {expected}");
}

/// Exact mode reads every gate, and up and down rows of the neurons whose gate is positive: its account of bytes tells how
/// many these were, token by token, on both sides of the border between the domains.
#[test]
fn the_token_engine_reads_exactly_the_planted_neurons() {
    let (dir, model) = (tiny(), model(Shape::named("tiny").unwrap()));
    let split = Split::open(&dir).unwrap();
    let bundle_bytes = split.layers()[0].layout().bundle_bytes() as u64;
    let (n, n_layers) = (model.shape().intermediate_size, model.shape().n_layers);
    let neurons: Vec<Vec<_>> =
        (0..n_layers).map(|l| model.layer(l)).map(|layer| (0..n).map(|p| layer.neuron(p)).collect()).collect();
    let matrices = split.resident().tensors().iter().filter(|t| t.format.encoding().is_some());
    let (embedding, others): (Vec<_>, Vec<_>) = matrices.partition(|t| t.name == "model.embed_tokens.weight");
    let dense = embedding[0].row_bytes() as u64 + others.iter().map(|t| t.bytes).sum::<u64>();
    let mut engine = engine(&dir, request(Mode::Exact, None, 2)).unwrap();
    for token in model.border() - 40..model.border() + 40 {
        let before = engine.account().bytes.host;
        engine.forward(&[token as u32], Logits::Last).unwrap();
        let read = engine.account().bytes.host - before;
        let (pattern, domain) = (model.pattern(token), model.domain(token));
        let active = neurons.iter().flatten().filter(|neuron| neuron.fires(pattern, domain)).count() as u64;
        assert_eq!(read, dense + ((n * n_layers) as u64 + 2 * active) * bundle_bytes / 3, "token {token}");
    }
}

#[test]
fn the_report_says_what_the_trace_gives() {
    let report = Split::open(&tiny()).unwrap().planted().unwrap().unwrap();
    let (planted, measured) = (report.planted, report.measured);
    // As above, over the 256 tokens of the trace; all layers together see the same codes.
    let error = measured.active_share_sd / (measured.trace_tokens as f64).sqrt() * 1.3;
    assert!((measured.active_share - planted.active_share).abs() < 4.0 * error, "{measured:?}");
    assert!((measured.hot_cover - planted.hot_cover).abs() < 4.0 * error / planted.active_share, "{measured:?}");
    assert!(measured.coactivation_inside.unwrap() > 1.2 && (measured.coactivation_outside - 1.0).abs() < 0.05);
    assert!(measured.reuse.is_sorted() && measured.predictor_recall > 0.85, "{measured:?}");
    let shown = json(&["inspect", text(&tiny()), "--json"]);
    assert_eq!(shown["planted"], serde_json::to_value(Split::open(&tiny()).unwrap().planted().unwrap()).unwrap());
    assert_eq!(shown["source"]["model"], "planted-tiny-a");
}

/// A knob each, against the same model without it.
#[test]
fn statistics_move_as_asked() {
    let dir = TempDir::new().unwrap();
    let made = |flags: &[&str]| {
        let out = dir.path().join(format!("split{}", flags.concat()));
        let given = ["split", "--planted", "tiny", "--case", "b", "--json", "-o", text(&out)];
        let report = json(&[&given, flags].concat());
        (report["measured"].clone(), report["model"].as_str().unwrap().to_owned())
    };
    let number = |value: &Value, field: &str| value[field].as_f64().unwrap();
    let (plain, name) = made(&[]);
    assert_eq!(name, "planted-tiny-b");
    let (walk, name) = made(&["--planted-reuse", "0.8"]);
    assert_eq!(name, "planted-tiny-custom");
    assert!(walk["reuse"][0].as_f64().unwrap() > plain["reuse"][0].as_f64().unwrap() + 0.1, "{walk} {plain}");
    let (tight, _) = made(&["--planted-cluster-correlation", "0.8"]);
    assert!(number(&tight, "coactivation_inside") > 2.0 * number(&plain, "coactivation_inside"), "{tight} {plain}");
    let (loose, _) = made(&["--planted-clusters", "1"]);
    assert_eq!(loose["coactivation_inside"], Value::Null);
    let (noisy, _) = made(&["--planted-predictor-noise", "1"]);
    assert!(number(&noisy, "predictor_recall") < number(&plain, "predictor_recall") - 0.2, "{noisy} {plain}");
    let (blind, _) = made(&["--planted-foresight-noise", "2"]);
    assert!(number(&blind, "foresight_recall") < number(&plain, "foresight_recall") - 0.2, "{blind} {plain}");
    assert_eq!(number(&blind, "predictor_recall"), number(&plain, "predictor_recall"));
    let (few, _) = made(&["--planted-active", "0.03", "--planted-hot-cover", "0.7"]);
    assert!((number(&few, "active_share") - 0.03).abs() < 0.004 && (number(&few, "hot_cover") - 0.7).abs() < 0.05);
}

#[test]
fn greedy_tokens_walk_through_the_vocabulary_and_around_its_end() {
    let sparse = &["--mode", "sparse", "--active", "0.1"][..];
    for (dir, mode) in [(tiny(), &["--mode", "exact"][..]), (tiny(), sparse), (sketched(), sparse)] {
        for start in [0, 470, 990] {
            let prompt = format!("t{start} t{}", start + 1);
            let given = ["run", "-m", text(&dir), "-p", &prompt, "-n", "80", "--temp", "0", "-t", "2", "--json"];
            let answer = json(&[&given[..], mode].concat());
            let want: Vec<Value> = (start + 2..start + 82).map(|t| Value::from(t % VOCAB)).collect();
            assert_eq!(answer["tokens"], Value::from(want), "{mode:?} from {start}");
            assert!(answer["warnings"][0].as_str().unwrap().contains("planted-tiny-a"));
        }
    }
}

/// With SiLU weights, trace and walk are the same, but nothing is zero: exact mode computes everything, and thresholds are of rows.
#[test]
fn with_silu_every_neuron_counts() {
    let dir = TempDir::new().unwrap();
    let (silu, corpus) = (dir.path().join("silu"), dir.path().join("corpus"));
    ok(&["split", "--planted", "tiny", "--planted-silu", "--sketch", "-o", text(&silu)]);
    let with_relu = files(&sketched());
    let differ: Vec<String> = files(&silu).into_iter().filter(|f| !with_relu.contains(f)).map(|f| f.0).collect();
    assert_eq!(differ, ["manifest.json", "planted.json"]);
    assert_eq!(Split::open(&silu).unwrap().manifest().config.activation, Activation::Silu);

    std::fs::write(&corpus, (0..600).map(|t| format!("t{t} ")).collect::<String>()).unwrap();
    let fitted = ok(&[
        "eval",
        "-m",
        text(&silu),
        "--fit-shares",
        "--no-curve",
        "--text",
        text(&corpus),
        "--ctx",
        "128",
        "--windows",
        "3",
    ]);
    assert!(fitted.stdout.contains("thresholds of rows from 3 windows"), "{}", fitted.stdout);
    let walk = |dir: &Path, mode: &[&str]| {
        let given = ["run", "-m", text(dir), "-p", "t700 t701", "-n", "40", "--temp", "0", "-t", "2", "--json"];
        let answer = json(&[&given[..], mode].concat());
        assert_eq!(answer["tokens"], Value::from((702..742).map(Value::from).collect::<Vec<_>>()), "{mode:?}");
        assert!(dir == sketched() || answer["warnings"][0].as_str().unwrap().contains("planted-tiny-a-silu"));
        (answer["computed_share"].as_f64().unwrap(), answer["bytes_per_token"]["host"].as_u64().unwrap())
    };
    let read = |dir: &Path| walk(dir, &["--mode", "exact"]).1;
    let rows = 4 * 1024 * 2 * (256 / 2 + 256 / 32 * 2);
    assert!(read(&silu) - read(&sketched()) > rows * 8 / 10, "up and down rows where ReLU's gates are not positive");
    for active in [0.05, 0.1, 0.3] {
        let (share, _) = walk(&silu, &["--mode", "sparse", "--active", &active.to_string()]);
        assert!((share - active).abs() < 0.3 * active, "{share} of the rows for {active}");
    }
}

/// The margins that larger models live by: after 80 layers the next token's logit is about what the head was made for.
#[test]
fn eighty_layers_leave_codes_and_names_alone() {
    let deep = Shape { name: "deep", n_layers: 80, ..Shape::named("tiny").unwrap() };
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("deep");
    split_planted(&model(deep), Some(SketchForm::default()), &out, &|_, _| ()).unwrap();
    for mode in [Mode::Exact, Mode::Sparse { active: 0.1 }] {
        let mut engine = engine(&out, request(mode, None, 2)).unwrap();
        for token in 480..544u32 {
            let mut logits = engine.forward(&[token], Logits::Last).unwrap();
            let top = logits[token as usize + 1];
            logits[token as usize + 1] = f32::NEG_INFINITY;
            let second = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert!((14.0..30.0).contains(&top) && second < top - 5.0, "{mode:?}, {token}: {top}, {second}");
        }
    }
}

#[test]
fn equal_settings_give_equal_bytes_on_any_number_of_threads() {
    let dir = TempDir::new().unwrap();
    let made = |name: &str, flags: &[&str]| {
        let out = dir.path().join(name);
        ok(&[&["split", "--planted", "tiny", "-o", text(&out)], flags].concat());
        files(&out)
    };
    let bytes = files(&tiny());
    assert!(made("one", &["-t", "1"]) == bytes && made("three", &["-t", "3"]) == bytes);
    assert!(made("other", &["--planted-seed", "1"]) != bytes);
}

/// If it is the same split that is asked for: sketches make it another one.
#[test]
fn an_interrupted_planted_split_is_continued() {
    let dir = TempDir::new().unwrap();
    let model = model(Shape::named("tiny").unwrap());
    let (none, sketch, fewer) = (None, Some(SketchForm::UpInThree), Some(SketchForm::AllInTwo));
    for (i, (first, then)) in
        [(none, none), (sketch, sketch), (none, sketch), (sketch, none), (fewer, sketch)].into_iter().enumerate()
    {
        let out = dir.path().join(format!("split-{i}"));
        let stop = |done: usize, _: usize| assert!(done < 3, "stopped");
        let stopping = std::panic::AssertUnwindSafe(|| split_planted(&model, first, &out, &stop));
        assert!(std::panic::catch_unwind(stopping).is_err() && !out.exists());
        let report = split_planted(&model, then, &out, &|_, _| ()).unwrap();
        assert_eq!(report.resumed_layers > 0, first == then, "{report:?}");
        assert!(files(&out) == files(&if then.is_some() { sketched() } else { tiny() }), "{first:?} {then:?}");
    }
}

/// Of each layer, over the whole vocabulary as the dense engine computes it.
#[test]
fn what_a_planted_sketch_says_of_its_errors_is_so() {
    let model = model(Shape::named("tiny").unwrap());
    let dense = SplitCheckpoint::open(&sketched()).unwrap();
    let (hidden, n) = (model.shape().hidden_size, model.shape().intermediate_size);
    let tokens: Vec<u32> = (0..VOCAB as u32).collect();
    let mut x = Embedding::load(&dense).unwrap().rows(&tokens).unwrap();
    for l in 0..model.shape().n_layers {
        let layer = DenseLayer::load(&dense, l).unwrap();
        x = layer.attention(&x, VOCAB / 128, 128).unwrap();
        let input = layer.ffn_input(&x).unwrap();
        let sketch = dense.split().sketch(l).unwrap().unwrap();
        let row = |part: &str| dense.load(&format!("model.layers.{l}.mlp.{part}_proj.weight")).unwrap();
        for (part, name, told) in [(0, "gate", &sketch.gate_sd), (1, "up", &sketch.up_sd)] {
            let (weights, stored) = (row(name), sketch.decoded(part));
            let ratios = (0..n).step_by(13).map(|i| {
                let range = i * hidden..(i + 1) * hidden;
                let lost: Vec<f32> = weights[range.clone()].iter().zip(&stored[range]).map(|(w, s)| w - s).collect();
                let product = |x: &[f32]| lost.iter().zip(x).map(|(l, x)| l * x).sum::<f32>();
                let square = input.chunks_exact(hidden).map(|x| product(x).powi(2)).sum::<f32>() / VOCAB as f32;
                square.sqrt() / told[i]
            });
            let ratios: Vec<f32> = ratios.collect();
            let mean = ratios.iter().sum::<f32>() / ratios.len() as f32;
            assert!((mean - 1.0).abs() < 0.05, "layer {l}, {name}: {mean} of what the sketch says");
            assert!(ratios.iter().all(|r| (0.8..1.2).contains(r)), "layer {l}, {name}: {ratios:?}");
        }
        let (down, stored) = (row("down"), sketch.decoded(2));
        for i in (0..n).step_by(13) {
            let column: Vec<f32> = (0..hidden).map(|c| down[c * n + i]).collect();
            let lost = column.iter().zip(&stored[i * hidden..]).map(|(w, s)| w - s);
            let length = |v: &mut dyn Iterator<Item = f32>| v.map(|v| v * v).sum::<f32>().sqrt();
            let (norm, lost) = (length(&mut column.iter().copied()), length(&mut lost.into_iter()));
            assert!((norm - sketch.down_norm[i]).abs() < 1e-3 * norm, "layer {l}, neuron {i}");
            assert!((lost - sketch.down_error[i]).abs() < 1e-3 * lost, "layer {l}, neuron {i}");
            // Around the root of an eighth: of random codes, with the nearest levels column by column.
            assert!((0.24..0.44).contains(&(lost / norm)), "{lost} of {norm}");
        }
        // What the sketch would choose for the trace's first tokens is hardly more among the hot neurons, that have 60 % of
        // what fires, than anywhere.
        let rows = [0, 1].map(|part| sketch.decoded(part));
        let (mut chosen, mut of_hot) = (0, 0);
        for x in input.chunks_exact(hidden).take(16) {
            let cost = |i: usize| {
                let row = |rows: &[f32]| rows[i * hidden..(i + 1) * hidden].iter().zip(x).map(|(w, x)| w * x).sum();
                sketch.judge(dense.config().activation, i, row(&rows[0]), row(&rows[1])).0
            };
            let mut costs: Vec<(f32, usize)> = (0..n).map(|i| (cost(i), i)).collect();
            costs.sort_by(|a, b| b.0.total_cmp(&a.0));
            chosen += n / 10;
            of_hot += costs[..n / 10].iter().filter(|(_, i)| *i < n_hot(n)).count();
        }
        let share = f64::from(of_hot as u32) / f64::from(chosen as u32);
        assert!((0.18..0.28).contains(&share), "layer {l}: {share}");
        let neurons = layer.neurons(&input).unwrap();
        layer.ffn_output(&mut x, neurons.h).unwrap();
    }
}

/// In sparse mode the sketch is used, and everything else is as without it.
#[test]
fn a_planted_sketch_is_added_to_an_equal_split() {
    let (plain, with) = (files(&tiny()), files(&sketched()));
    let differ: Vec<&str> = with.iter().filter(|f| !plain.contains(f)).map(|f| f.0.as_str()).collect();
    assert_eq!(differ, ["manifest.json", "sketches.safetensors"]);
    let split = Split::open(&sketched()).unwrap();
    assert_eq!(split.manifest().version, 6);
    let model = model(Shape::named("tiny").unwrap());
    let shape = model.shape();
    let form = SketchForm::default();
    let neuron: usize = form.row_bytes(shape.hidden_size).iter().sum::<usize>() + 16;
    let expected = planted_bytes(&model, Some(form)).unwrap();
    let columns = 4 * shape.hidden_size;
    assert_eq!(expected.sketches, (shape.n_layers * (shape.intermediate_size * neuron + columns)) as u64);
    assert_eq!(split.sketches().unwrap().data_bytes(), expected.sketches);
    assert_eq!(expected.needed - planted_bytes(&model, None).unwrap().needed, 2 * expected.sketches);
    assert!(json(&["inspect", text(&sketched()), "--json"])["sketch_bytes"].as_u64().unwrap() > expected.sketches);

    let logits = |dir: &Path, mode: Mode| {
        let mut engine = engine(dir, request(mode, None, 2)).unwrap();
        engine.forward(&[100], Logits::Last).unwrap()
    };
    let (exact, sparse) = (Mode::Exact, Mode::Sparse { active: 0.1 });
    assert!(logits(&sketched(), exact) == logits(&tiny(), exact));
    assert!(logits(&sketched(), sparse) != logits(&tiny(), sparse));

    // With fewer bits rows of the sketch differ, and nothing else.
    let dir = TempDir::new().unwrap();
    let fewer = dir.path().join("fewer");
    ok(&["split", "--planted", "tiny", "--sketch", "--sketch-bits", "2.1", "-o", text(&fewer)]);
    let differ: Vec<String> = files(&fewer).into_iter().filter(|f| !with.contains(f)).map(|f| f.0).collect();
    assert_eq!(differ, ["manifest.json", "sketches.safetensors"]);
    let (form, of_fewer) = (SketchForm::AllInTwo, Split::open(&fewer).unwrap());
    assert_eq!((of_fewer.manifest().version, of_fewer.sketch_form()), (9, form));
    assert_eq!(of_fewer.sketches().unwrap().data_bytes(), planted_bytes(&model, Some(form)).unwrap().sketches);
    let less = expected.sketches - of_fewer.sketches().unwrap().data_bytes();
    assert_eq!(less, (shape.n_layers * shape.intermediate_size * shape.hidden_size / 8) as u64);
    assert!(logits(&fewer, exact) == logits(&tiny(), exact));
}

#[test]
fn verify_needs_no_checkpoint_for_a_planted_split_and_only_for_one() {
    assert!(ok(&["verify", text(&tiny())]).stdout.contains("made without a checkpoint"));
    let (_guard, damaged) = copy(&tiny());
    let damage = |path: PathBuf| {
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
    };
    damage(damaged.join("layers/002.thm"));
    assert!(fails(4, &["verify", text(&damaged)]).contains("layer 2"));
    ok(&["verify", text(&sketched())]);
    let (_guard, damaged) = copy(&sketched());
    damage(damaged.join("sketches.safetensors"));
    assert!(fails(4, &["verify", text(&damaged)]).contains("sketches.3.columns"));
    assert!(fails(2, &["verify", text(&split(&llama(), "q4", &[]))]).contains("needs -m"));
}

#[test]
fn what_cannot_be_planted_is_refused_by_name() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("split");
    let refused = |flags: &[&str]| fails(2, &[&["split", "-o", text(&out)], flags].concat());
    assert!(refused(&["--planted", "71b"]).contains("70b, 34b, 13b, 7b, tiny"));
    assert!(refused(&["--planted", "tiny", "--case", "d"]).contains("a, b, c"));
    assert!(refused(&["--planted", "tiny", "--planted-active", "0.9"]).contains("--planted-active"));
    assert!(
        refused(&["--planted", "tiny", "--planted-active", "0.5", "--planted-hot-cover", "0.9"]).contains("at most")
    );
    assert!(refused(&["--planted", "tiny", "-m", "model"]).contains("--model"));
    assert!(refused(&["--planted", "tiny", "--sketch", "--scales", "absmax"]).contains("--scales"));
    assert!(refused(&["--planted-seed", "3", "-m", "model", "--profile", "p"]).contains("is for --planted"));
    assert!(!out.exists());

    let narrow = model(Shape { name: "narrow", hidden_size: 288, ..Shape::named("tiny").unwrap() });
    let error = split_planted(&narrow, Some(SketchForm::default()), &out, &|_, _| ()).unwrap_err().to_string();
    assert!(error.contains("288 is no multiple of 64") && !out.exists(), "{error}");
    split_planted(&narrow, None, &out, &|_, _| ()).unwrap();
    // Nor is a sketch of such rows read that a manifest speaks of.
    forge::manifest(&out, |m| {
        m.sketches.clone_from(&Split::open(&sketched()).unwrap().manifest().sketches);
        m.version = 6;
    });
    assert!(fails(4, &["plan", "-m", text(&out)]).contains("288, which is no multiple of 64"));
}
