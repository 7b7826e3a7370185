//! Layers whose neurons are not all laid out alike: further planes of some of them, hot ones in another encoding.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod support;

use std::fs;
use support::budgets::{DECODED, gives, logits, planes};
use support::{
    answer, bits, budget_range_of, demo, engine_of, files, four_layers, json, model, ok, profile, request, split,
    splitting, text, with_file_limit,
};
use tempfile::TempDir;
use thermocline_calibrate::{Input, Profile};
use thermocline_datasets::{Checkpoint, open_checkpoint};
use thermocline_runtime::Mode;
use thermocline_split::delta::Delta;
use thermocline_split::{Precision, Split, SplitCheckpoint};

/// With half of the layer's neurons in each of two layouts, hot and cold ones lie on both sides of the border.
#[test]
fn planes_of_some_neurons_are_the_same_bits_from_every_budget() {
    let dir = demo::split("q4+exact", &[]);
    let sparse = Mode::Sparse { active: 0.2 };
    for (given, mode) in
        [("plus@0.1", Mode::Exact), ("exact@0.5", Mode::Exact), ("plus@0.5", sparse), ("exact@0.1", sparse)]
    {
        let expected = bits(&logits(&dir, planes(given), mode));
        gives(&dir, planes(given), mode, &expected);
        for ends in ["base", given.split('@').next().unwrap()] {
            assert!(bits(&logits(&dir, planes(ends), mode)) != expected, "{given} is not {ends}");
        }
    }
    for (share, whole) in [("plus@0", "base"), ("exact@0", "base"), ("plus@1", "plus"), ("exact@1", "exact")] {
        let expected = bits(&logits(&dir, planes(whole), Mode::Exact));
        assert!(bits(&logits(&dir, planes(share), Mode::Exact)) == expected, "{share} is {whole}");
    }
}

/// The weights that a share of the planes makes: those of all planes for the first neurons, in whole chunks, else the base's.
#[test]
fn planes_of_some_neurons_are_those_of_the_first_ones() {
    let dir = demo::split("q4+exact", &[]);
    let open = |given: &str| SplitCheckpoint::new(Split::open_at(&dir, planes(given)).unwrap());
    for precision in ["plus", "exact"] {
        let (base, whole, some) = (open("base"), open(precision), open(&format!("{precision}@0.3")));
        let layer = &some.split().layers()[1];
        let n = layer.order().len();
        let n_front = (0.3 * n as f64).ceil() as usize;
        let n_front = n_front.next_multiple_of(layer.chunk_neurons());
        assert_eq!(layer.bundles().sections()[0].neurons(), 0..n_front);
        let mut front = vec![false; n];
        layer.order()[..n_front].iter().for_each(|&id| front[id as usize] = true);
        for (tensor, in_columns) in [("gate", false), ("up", false), ("down", true)] {
            let name = format!("model.layers.1.mlp.{tensor}_proj.weight");
            let [base, whole, some] = [&base, &whole, &some].map(|c| c.load(&name).unwrap());
            let columns = base.len() / base_rows(in_columns, n, base.len());
            for (i, got) in some.iter().enumerate() {
                let neuron = if in_columns { i % columns } else { i / columns };
                let want = if front[neuron] { whole[i] } else { base[i] };
                assert!(got.to_bits() == want.to_bits(), "{name}, {precision}: weight {i} of neuron {neuron}");
            }
            assert!(base != some && whole != some);
        }
        // Attention is the base's.
        let name = "model.layers.1.self_attn.q_proj.weight";
        assert!(bits(&some.load(name).unwrap()) == bits(&base.load(name).unwrap()));
    }
}

/// Rows of a matrix whose rows or columns are `n` neurons.
fn base_rows(in_columns: bool, n: usize, weights: usize) -> usize {
    if in_columns { weights / n } else { n }
}

/// Hot neurons in an encoding of their own have the bits that they have anywhere else.
#[test]
fn hot_neurons_of_another_encoding_have_their_own_bits() {
    // Codes below further planes are the nearest ones.
    let q8 = &["--resident-encoding", "q8", "--rounding", "nearest"][..];
    let expected = bits(&logits(&demo::split("q4+exact", &[]), planes("exact@0.25"), Mode::Exact));
    for (encoding, precision) in [("q4,hot@0.25=q4+exact", "exact"), ("q4,hot@0.25=bf16", "base")] {
        gives(&demo::split(encoding, q8), planes(precision), Mode::Exact, &expected);
    }
    // Where bases are alike, nothing is left of the sections at the base.
    let (plain, hot) = (demo::split("q4", q8), demo::split("q4,hot@0.25=q4+exact", q8));
    assert!(Split::open(&hot).unwrap().layers().iter().all(|l| l.bundles().uniform().is_some()));
    gives(&hot, Precision::Base, Mode::Exact, &bits(&logits(&plain, Precision::Base, Mode::Exact)));
    // Every neuron exact, in whatever it is.
    let expected = bits(&logits(&demo::split("bf16", &[]), Precision::Base, Mode::Exact));
    let exact = demo::split("q8+exact,hot@0.5=bf16x,1-2:hot@0.1=bf16", &[]);
    gives(&exact, Precision::Exact, Mode::Exact, &expected);
    let said = ok(&["verify", text(&exact), "-m", text(&demo::model()), "--exact"]).stdout;
    assert!(said.contains(" 0 violations"), "{said}");
    let tuned = bits(&logits(&demo::tuned_split("bf16"), Precision::Base, Mode::Exact));
    for share in [0, 1, 2] {
        let open =
            || Split::open_at(&exact, Precision::Exact).unwrap().with_delta(Delta::open(&demo::delta()).unwrap());
        let (least, all) = budget_range_of(&open().unwrap(), Mode::Exact);
        let budget = Some(least + (all - least) * share / 2);
        let mut engine = engine_of(open().unwrap(), request(Mode::Exact, budget, 2)).unwrap();
        assert!(bits(&answer(&mut engine, DECODED).unwrap()) == tuned, "with {budget:?}");
    }
}

/// Three sections in files of their own, and a fourth where planes end within one of them.
#[test]
fn many_sections_run_together() {
    let dir = demo::split("q4,hot@0.6=q8+exact,hot@0.2=bf16x,3=q4+exact", &["--resident-encoding", "q8"]);
    let encodings = |given: &str, layer: usize| -> Vec<&str> {
        let split = Split::open_at(&dir, planes(given)).unwrap();
        split.layers()[layer].bundles().encodings().map(|e| e.name()).collect()
    };
    assert_eq!(encodings("base", 0), ["bf16x", "q8", "q4"]);
    assert_eq!(encodings("exact@0.4", 0), ["bf16x", "q8+exact", "q8", "q4"]);
    assert_eq!(encodings("exact@0.8", 0), ["bf16x", "q8+exact", "q4"]);
    assert_eq!(encodings("exact@0.4", 3), ["q4+exact", "q4"]);
    let sparse = Mode::Sparse { active: 0.3 };
    for (given, mode) in [("base", Mode::Exact), ("exact", sparse), ("exact@0.4", Mode::Exact)] {
        gives(&dir, planes(given), mode, &bits(&logits(&dir, planes(given), mode)));
    }
    let inspected = json(&["inspect", text(&dir), "--json"]);
    let sections = inspected["layers"][0]["sections"].as_array().unwrap();
    assert_eq!(
        sections.iter().map(|s| s["encoding"].as_str().unwrap()).collect::<Vec<_>>(),
        ["bf16x", "q8+exact", "q4"]
    );
    assert!(inspected["layers"][3].get("sections").is_none() && inspected["format_version"] == 2, "{inspected}");
    let planned = ok(&["plan", "-m", text(&dir), "--precision", "exact@0.4"]).stdout;
    assert!(planned.contains("neurons of a layer in q8+exact"), "{planned}");
    let said = ok(&["verify", text(&dir), "-m", text(&demo::model())]).stdout;
    assert!(said.contains(" 0 violations"), "{said}");
}

#[test]
fn interrupted_splits_with_sections_resume_to_the_same_bytes() {
    let (model, profile) = (model(&four_layers()), profile(&four_layers()));
    let (encoding, limit) = ("q4,hot@0.5=q8+exact,3=bf16", 60);
    let settings = ["--encoding", encoding, "--chunk-neurons", "8", "--json"];
    let whole = files(&split(&four_layers(), encoding, &["--chunk-neurons", "8"]));
    assert!(whole.iter().any(|(name, _)| name == "layers/002.hot.final.thm"));
    for (kept, damaged) in [(3, None), (2, Some("001.hot.thm")), (2, Some("000.hot.final.thm")), (2, Some("002.thm"))] {
        let dir = TempDir::new().unwrap();
        let out = dir.path().join("split");
        let failed = with_file_limit(limit, &splitting(&model, &profile, &settings, &out));
        assert_eq!(failed.code, Some(1), "{}", failed.stderr);
        if let Some(name) = damaged {
            let path = dir.path().join("split.partial/layers").join(name);
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        }
        let report = json(&splitting(&model, &profile, &settings, &out));
        assert_eq!(report["resumed_layers"], kept, "{damaged:?}: {report}");
        assert!(files(&out) == whole, "{damaged:?}");
    }
}

/// Energies of a layer's neurons in the split's order, and their numbers.
fn energies(dir: &std::path::Path, layer: usize) -> (Vec<f32>, Vec<u32>) {
    let split = Split::open(dir).unwrap();
    let energy = split.statistics().read_f32(&format!("layers.{layer}.energy")).unwrap();
    (energy, split.layers()[layer].order().to_vec())
}

/// As many as are asked for, in whole chunks; the others stay as they were.
#[test]
fn neurons_of_most_energy_come_first() {
    let made = &four_layers();
    let [none, some] = ["0", "0.1"].map(|share| split(made, "q4,hot@0.1=q8", &["--outliers", share]));
    let (order, n_layers) = (|dir| Split::open(dir).unwrap().manifest().packing.order.clone(), 4);
    assert_eq!(order(&some), format!("outliers@0.1,{}", order(&none)));
    let mut moved = 0;
    for layer in 0..n_layers {
        let ((energy, ids), (_, before)) = (energies(&some, layer), energies(&none, layer));
        let opened = Split::open(&some).unwrap();
        let n = opened.layers()[layer].bundles().sections()[0].neurons().len();
        let asked = (0.1 * ids.len() as f64).ceil() as usize;
        assert_eq!(n, asked.next_multiple_of(opened.layers()[layer].chunk_neurons()));
        assert!(energy[..n].is_sorted_by(|a, b| a >= b) && energy[n..].iter().all(|e| *e <= energy[n - 1]));
        let others: Vec<u32> = before.iter().copied().filter(|id| !ids[..n].contains(id)).collect();
        assert!(ids[n..] == others);
        moved += ids[..n].iter().filter(|id| !before[..n].contains(id)).count();
    }
    assert!(moved > 0, "most energy is not what is hottest");
}

/// Of gate, up and attention rows alone, and to the better of their products with the profile's inputs; codes that planes start from are the
/// nearest.
#[test]
fn rounding_with_feedback_loses_less_of_products() {
    let made = &four_layers();
    let (source, profile) = (model(made), Profile::open(&profile(made)).unwrap());
    let source = open_checkpoint(&source).unwrap();
    for (encoding, differs) in [("q4", true), ("q8", true), ("q4+exact", false)] {
        let [nearest, feedback] = ["nearest", "feedback"]
            .map(|how| split(made, encoding, &["--rounding", how, "--attention-encoding", encoding]))
            .map(|dir| SplitCheckpoint::new(Split::open_at(&dir, Precision::Base).unwrap()));
        for layer in 0..2 {
            let load =
                |of: &dyn Checkpoint, part: &str| of.load(&format!("model.layers.{layer}.{part}_proj.weight")).unwrap();
            assert!(load(&nearest, "mlp.down") == load(&feedback, "mlp.down"));
            for (part, input) in [
                ("mlp.gate", Input::Ffn),
                ("mlp.up", Input::Ffn),
                ("self_attn.q", Input::Qkv),
                ("self_attn.k", Input::Qkv),
                ("self_attn.v", Input::Mixture),
                ("self_attn.o", Input::AttentionOutput),
            ] {
                let moment = profile.second_moment(layer, input).unwrap().unwrap();
                let lost = |of: &dyn Checkpoint| {
                    let (rows, stored) = (load(source.as_ref(), part), load(of, part));
                    let lost: Vec<f64> = rows.iter().zip(stored).map(|(a, b)| f64::from(a - b)).collect();
                    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                    let of_row = |row: &[f64]| {
                        let products = moment.rows().into_iter().map(|m| dot(m.to_slice().unwrap(), row));
                        products.zip(row).map(|(product, a)| product * a).sum::<f64>()
                    };
                    lost.chunks_exact(moment.nrows()).map(of_row).sum::<f64>()
                };
                let share = lost(&feedback) / lost(&nearest);
                assert!(if differs { share < 0.9 } else { share == 1.0 }, "{encoding}, layer {layer}, {part}: {share}");
            }
        }
    }
}
