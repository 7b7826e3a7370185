//! Splits with planes: the same bits as bf16 at full precision, those of the base without it, from any budget.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use support::budgets::{DECODED, budgets, gives, logits};
use support::{
    answer, bits, budget_range_of, calibrating, copy, demo, engine_at, engine_of, fails, files, four_layers, json,
    llama, model, ok, profile, request, split, splitting, text, with_file_limit,
};
use tempfile::TempDir;
use thermocline_datasets::huggingface::LoraAdapter;
use thermocline_datasets::{Checkpoint, open_checkpoint};
use thermocline_runtime::{Error, Mode, Plan};
use thermocline_split::delta::AdapterCheckpoint;
use thermocline_split::{Precision, Split, SplitCheckpoint};

/// What holds every bit of a BF16 checkpoint, of every kind.
const EXACT: [&str; 4] = ["bf16", "bf16x", "q4+exact", "q8+exact"];

#[test]
fn exact_planes_are_the_bits_of_bf16_from_every_budget() {
    let expected = bits(&logits(&demo::split("bf16", &[]), Precision::Base, Mode::Exact));
    for encoding in EXACT {
        gives(&demo::split(encoding, &[]), Precision::Exact, Mode::Exact, &expected);
    }
}

/// In memory bundles take what they hold: each was as long as the longest of its layer.
#[test]
fn bundles_in_memory_have_no_room_behind_their_streams() {
    for encoding in ["bf16x", "q4+exact", "q8+exact"] {
        let split = Split::open_at(&demo::split(encoding, &[]), Precision::Exact).unwrap();
        let (mut stored, mut padded, mut n) = (0, 0, 0);
        for layer in split.layers() {
            stored += layer.stored_bytes(0..layer.n_chunks());
            padded += layer.bundles().bytes(0..layer.order().len()) as u64;
            n += layer.order().len() as u64 + 1;
        }
        let plan = Plan::new(&split, request(Mode::Exact, None, 1)).unwrap();
        // At most 16 bytes to the next multiple of 16, and four for where a bundle begins.
        assert!(plan.hot_bytes >= stored && plan.hot_bytes <= stored + 20 * n, "{} of {stored}", plan.hot_bytes);
        assert!(plan.hot_bytes < padded, "{encoding}: {} of {padded}", plan.hot_bytes);
    }
}

#[test]
fn sparse_mode_computes_the_same_neurons_of_the_same_bits() {
    let mode = Mode::Sparse { active: 0.2 };
    let expected = bits(&logits(&demo::split("bf16", &[]), Precision::Base, mode));
    for encoding in EXACT {
        gives(&demo::split(encoding, &[]), Precision::Exact, mode, &expected);
    }
    let dense = bits(&logits(&demo::split("bf16", &[]), Precision::Base, Mode::Exact));
    assert!(expected != dense, "a fifth of the neurons is another model");
}

#[test]
fn the_base_of_exact_planes_is_the_plain_encoding() {
    // Neurons, and embedding, attention and head: q4+exact keeps the latter in q8+exact, whose base is q8.
    for (planes, plain) in [("q4+exact", "q4"), ("q8+exact", "q8")] {
        let plain = demo::split(plain, &["--rounding", "nearest"]);
        let expected = bits(&logits(&plain, Precision::Base, Mode::Exact));
        gives(&demo::split(planes, &[]), Precision::Base, Mode::Exact, &expected);
    }
}

#[test]
fn every_plane_leads_closer_to_the_checkpoint() {
    let dir = demo::split("q4+exact", &[]);
    let [base, plus, exact] = Precision::ALL.map(|precision| logits(&dir, precision, Mode::Exact));
    let error = |got: &[f32]| got.iter().zip(&exact).map(|(g, e)| f64::from(g - e).powi(2)).sum::<f64>().sqrt();
    // Four more bits are a sixteenth of the step in the neurons; attention stays q8 at plus.
    assert!(error(&plus) > 0.0 && error(&plus) * 4.0 < error(&base), "{} {}", error(&plus), error(&base));
    gives(&dir, Precision::Plus, Mode::Exact, &bits(&plus));
}

#[test]
fn layers_of_different_encodings_run_together() {
    // Residents with both planes; layers with one file, with three, and with streams in the base.
    let mixed = ("q4,1=bf16x,3-4=q4+exact", &["--resident-encoding", "q4+exact"][..]);
    let all_exact = ("q8+exact,1=bf16x,3=q4+exact,5=bf16", &["--resident-encoding", "bf16x"][..]);
    let dir = demo::split(mixed.0, mixed.1);
    for precision in [Precision::Base, Precision::Exact] {
        gives(&dir, precision, Mode::Exact, &bits(&logits(&dir, precision, Mode::Exact)));
    }
    let report = json(&["verify", text(&dir), "-m", text(&demo::model()), "--json"]);
    for tensor in report["tensors"].as_array().unwrap() {
        let name = tensor["name"].as_str().unwrap();
        let quantised = [0, 2, 5].iter().any(|l| name.contains(&format!("layers.{l}.mlp")));
        assert_eq!(tensor["exact"], !quantised, "{name}");
    }
    let expected = bits(&logits(&demo::split("bf16", &[]), Precision::Base, Mode::Exact));
    gives(&demo::split(all_exact.0, all_exact.1), Precision::Exact, Mode::Exact, &expected);
}

/// Attention's matrices are those of a split that has all in their encoding, the others those of one that has all in the others'.
#[test]
fn attention_has_an_encoding_of_its_own() {
    let resident = |encoding: &str, attention: Option<&str>| {
        let own = attention.map_or(Vec::new(), |encoding| vec!["--attention-encoding", encoding]);
        split(&four_layers(), "q4", &[&["--resident-encoding", encoding], &own[..]].concat())
    };
    for (attention, others, precision) in
        [("q4", "q8", "base"), ("q4", "q8+exact", "exact"), ("q4+exact", "q8", "plus"), ("bf16", "q4+exact", "base")]
    {
        let [mixed, of_attention, of_others] =
            [(others, Some(attention)), (attention, None), (others, None)].map(|(all, own)| resident(all, own));
        let open =
            |dir: &Path| SplitCheckpoint::new(Split::open_at(dir, precision.parse::<Precision>().unwrap()).unwrap());
        let made = open(&mixed);
        let mut counts = [0, 0];
        for matrix in made.split().matrices().unwrap() {
            let name = &matrix.entry().name;
            let is_attention = name.contains("self_attn");
            let from = open(if is_attention { &of_attention } else { &of_others });
            assert!(bits(&made.load(name).unwrap()) == bits(&from.load(name).unwrap()), "{mixed:?}: {name}");
            counts[usize::from(is_attention)] += 1;
        }
        assert_eq!(counts, [1, 4 * 4], "the embedding is the head");
        let packing = |dir: &Path| json(&["inspect", text(dir), "--json"]);
        let (inspected, plain) = (packing(&mixed), packing(&of_others));
        assert_eq!((&inspected["format_version"], &plain["format_version"]), (&10.into(), &1.into()));
        assert_eq!(inspected["packing"]["attention_encoding"], attention);
        assert!(plain["packing"].get("attention_encoding").is_none());
    }
    let dir = demo::split("q4", &["--resident-encoding", "q8+exact", "--attention-encoding", "q4"]);
    gives(&dir, Precision::Exact, Mode::Exact, &bits(&logits(&dir, Precision::Exact, Mode::Exact)));
    // The encoding that all have is none of its own.
    let alike = json(&["inspect", text(&resident("q8", Some("q8"))), "--json"]);
    assert!(alike["packing"].get("attention_encoding").is_none() && alike["format_version"] == 1, "{alike}");
}

/// Without the moments of its inputs in the profile attention's codes are the nearest ones, and the program says so.
#[test]
fn attention_is_rounded_by_the_moments_of_its_inputs() {
    let dir = TempDir::new().unwrap();
    let [without, out] = ["profile", "split"].map(|name| dir.path().join(name));
    let (model, n_tokens) = (model(&four_layers()), four_layers().tokens.to_string());
    ok(&[&calibrating(&model, &n_tokens, "128", &without)[..], &["--no-attention-moments"]].concat());
    let said = ok(&splitting(&model, &without, &["--attention-encoding", "q4"], &out)).stdout;
    assert!(said.contains("attention's codes are the nearest ones"), "{said}");
    let load = |dir: &Path| {
        let split = SplitCheckpoint::new(Split::open(dir).unwrap());
        bits(&split.load("model.layers.2.self_attn.q_proj.weight").unwrap())
    };
    let made = |rounding| split(&four_layers(), "q4", &["--attention-encoding", "q4", "--rounding", rounding]);
    assert!(load(&out) == load(&made("nearest")) && load(&out) != load(&made("feedback")));
    let said = ok(&splitting(&model, &profile(&four_layers()), &["--attention-encoding", "q4"], &dir.path().join("b")));
    assert!(!said.stdout.contains("nearest"), "{}", said.stdout);
}

/// Greedy tokens through the binary.
fn tokens(dir: &Path, more: &[&str]) -> serde_json::Value {
    let given = ["run", "-m", text(dir), "-p", "the lake rests", "-n", "16", "--temp", "0", "--ignore-eos", "--json"];
    json(&[&given, more].concat())["tokens"].clone()
}

#[test]
fn verify_exact_passes_what_is_and_names_what_is_not() {
    let checkpoint = demo::model();
    for encoding in EXACT {
        let dir = demo::split(encoding, &[]);
        let said = ok(&["verify", text(&dir), "-m", text(&checkpoint), "--exact"]).stdout;
        assert!(said.contains(" 0 violations"), "{encoding}: {said}");
    }
    let dir = demo::split("q4", &[]);
    let message = fails(4, &["verify", text(&dir), "-m", text(&checkpoint), "--exact"]);
    assert!(message.contains(".weight, is "), "{message}");
}

#[test]
fn a_flipped_byte_in_any_plane_is_named_by_file_and_layer() {
    let checkpoint = model(&llama());
    for (encoding, names) in [
        ("q4+exact", &["001.thm", "001.coarse.thm", "001.final.thm"][..]),
        ("q8+exact", &["001.final.thm"]),
        ("bf16x", &["001.thm"]),
    ] {
        let (_guard, dir) = copy(&split(&llama(), encoding, &["--chunk-neurons", "8"]));
        for name in names {
            let path = dir.join("layers").join(name);
            let good = fs::read(&path).unwrap();
            let mut bad = good.clone();
            let at = bad.len() - 40;
            bad[at] ^= 16;
            fs::write(&path, bad).unwrap();
            let message = fails(4, &["verify", text(&dir), "-m", text(&checkpoint)]);
            assert!(message.contains(name) && message.contains("layer 1, neurons 184..192"), "{name}: {message}");
            // At the base's precision the other planes are not looked at.
            let ran = support::run(&["run", "-m", text(&dir), "-p", "a", "-n", "2"]);
            assert_eq!(ran.code, Some(if *name == "001.thm" { 4 } else { 0 }), "{name}: {}", ran.stderr);
            fails(4, &["run", "-m", text(&dir), "-p", "a", "-n", "2", "--precision", "exact"]);
            fs::write(&path, good).unwrap();
        }
        let resident = dir.join("resident-planes.safetensors");
        if resident.exists() {
            let mut bytes = fs::read(&resident).unwrap();
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            fs::write(&resident, bytes).unwrap();
            for args in [
                &["verify", text(&dir), "-m", text(&checkpoint)][..],
                &["run", "-m", text(&dir), "-p", "a", "-n", "2", "--precision", "exact"],
            ] {
                let message = fails(4, args);
                assert!(message.contains("resident-planes") && message.contains("o_proj.weight.final"), "{message}");
            }
        }
    }
}

fn bytes_of(dir: &Path) -> usize {
    files(dir).iter().map(|(_, bytes)| bytes.len()).sum()
}

#[test]
fn archives_and_compressed_splits_answer_alike() {
    let checkpoint = model(&four_layers());
    for encoding in ["bf16", "q4", "q4+exact", "bf16x", "q4,hot@0.4=bf16"] {
        let of = |more: &[&str]| split(&four_layers(), encoding, &[&["--chunk-neurons", "32"], more].concat());
        let plain = of(&[]);
        let expected = bits(&logits(&plain, Precision::Exact, Mode::Exact));
        let said = tokens(&plain, &["--precision", "exact"]);
        for packed in [of(&["--archive"]), of(&["--zstd-level", "3"])] {
            assert!(bytes_of(&packed) <= bytes_of(&plain), "{}", packed.display());
            ok(&["verify", text(&packed), "-m", text(&checkpoint)]);
            assert_eq!(tokens(&packed, &["--precision", "exact"]), said);
            let split = Split::open_at(&packed, Precision::Exact).unwrap();
            for budget in budgets(&split, Mode::Exact) {
                let mut engine = engine_at(&packed, Precision::Exact, request(Mode::Exact, budget, 2)).unwrap();
                let got = bits(&answer(&mut engine, DECODED).unwrap());
                assert!(got == expected, "{} with {budget:?}", packed.display());
            }
        }
        let archive = Split::open_at(&of(&["--archive"]), Precision::Exact).unwrap();
        let n_compressed: usize = archive.layers().iter().map(|l| l.n_compressed()).sum();
        assert_eq!(n_compressed > 0, encoding != "bf16x", "{encoding}: streams hold no more than their entropy");
    }
}

#[test]
fn interrupted_splits_with_planes_resume_to_the_same_bytes() {
    let (model, profile) = (model(&four_layers()), profile(&four_layers()));
    // The last layer's file is the only one that does not fit: three layers of three files are finished before.
    let (encoding, limit) = ("q4+exact,3=bf16", 60);
    let whole = files(&split(&four_layers(), encoding, &["--chunk-neurons", "8"]));
    let begun = |dir: &TempDir| -> PathBuf {
        let out = dir.path().join("split");
        let args = splitting(&model, &profile, &["--encoding", encoding, "--chunk-neurons", "8"], &out);
        let failed = with_file_limit(limit, &args);
        assert_eq!(failed.code, Some(1), "{}", failed.stderr);
        assert!(!out.exists() && dir.path().join("split.partial/layers/002.thm").exists(), "{}", failed.stderr);
        assert!(!dir.path().join("split.partial/layers/003.thm").exists());
        out
    };
    let first = TempDir::new().unwrap();
    begun(&first);
    let cut = |name: &'static str, share: usize| {
        move |layers: &Path| {
            let bytes = fs::read(layers.join(name)).unwrap();
            fs::write(layers.join(name), &bytes[..bytes.len() * share / 4]).unwrap();
        }
    };
    let removed = |name: &'static str| move |layers: &Path| fs::remove_file(layers.join(name)).unwrap();
    let flipped = |layers: &Path| {
        let mut bytes = fs::read(layers.join("000.final.thm")).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(layers.join("000.final.thm"), bytes).unwrap();
    };
    let mixed = |layers: &Path| {
        fs::copy(layers.join("001.final.thm"), layers.join("000.final.thm")).unwrap();
    };
    type Damage<'a> = Box<dyn Fn(&Path) + 'a>;
    let damages: [(u64, Damage<'_>); 9] = [
        (3, Box::new(|_| ())),
        (2, Box::new(cut("001.coarse.thm", 3))),
        (2, Box::new(cut("001.final.thm", 3))),
        (2, Box::new(cut("002.final.thm", 0))),
        (2, Box::new(removed("001.coarse.thm"))),
        (2, Box::new(removed("001.final.thm"))),
        (2, Box::new(removed("001.thm"))),
        (2, Box::new(flipped)),
        (2, Box::new(mixed)),
    ];
    for (i, (kept, damage)) in damages.into_iter().enumerate() {
        let dir = TempDir::new().unwrap();
        support::copy_dir(&first.path().join("split.partial"), &dir.path().join("split.partial"));
        damage(&dir.path().join("split.partial/layers"));
        let out = dir.path().join("split");
        let more = ["--encoding", encoding, "--chunk-neurons", "8", "--json"];
        let report = json(&splitting(&model, &profile, &more, &out));
        assert_eq!(report["resumed_layers"], kept, "damage {i}: {report}");
        assert!(files(&out) == whole, "damage {i}");
    }
}

/// The split with the demo's delta on it.
fn patched(dir: &Path, delta: &Path) -> Result<Split, thermocline_split::Error> {
    let delta = thermocline_split::delta::Delta::open(delta)?;
    Split::open_at(dir, Precision::Exact)?.with_delta(delta)
}

/// That a delta's run gives these bits from several budgets; without any, those of the first.
fn runs(base: &Path, delta: &Path, mut expected: Option<Vec<u32>>) -> Vec<u32> {
    // Streamed rows are patched once a pass, which takes its time: half the budgets.
    for budget in budgets(&patched(base, delta).unwrap(), Mode::Exact).into_iter().step_by(2) {
        let split = patched(base, delta).unwrap();
        let got = bits(&answer(&mut engine_of(split, request(Mode::Exact, budget, 2)).unwrap(), DECODED).unwrap());
        let expected = expected.get_or_insert_with(|| got.clone());
        assert!(got == *expected, "{} with {budget:?}", base.display());
    }
    expected.unwrap()
}

#[test]
fn a_delta_in_a_run_is_the_tuned_model() {
    // Both are shuffled alike, so that sums have the same order.
    let tuned = demo::tuned_split("bf16");
    let order = |dir: &Path| Split::open(dir).unwrap().layers()[2].order().to_vec();
    assert!(order(&tuned) == order(&demo::split("bf16", &[])));
    let expected = bits(&logits(&tuned, Precision::Base, Mode::Exact));
    let said = tokens(&tuned, &[]);
    let delta = demo::delta();
    for encoding in ["bf16", "bf16x", "q4+exact"] {
        let base = demo::split(encoding, &[]);
        assert!(bits(&logits(&base, Precision::Exact, Mode::Exact)) != expected, "the tune changes something");
        runs(&base, &delta, Some(expected.clone()));
        assert_eq!(tokens(&base, &["--delta", text(&delta), "--precision", "exact"]), said, "{encoding}");
    }
}

#[test]
fn an_adapter_in_a_run_is_the_folded_model() {
    let dir = TempDir::new().unwrap();
    let (folder, delta) = (dir.path().join("adapter"), dir.path().join("delta"));
    demo::adapter(&folder, &demo::lora());
    ok(&["delta", text(&demo::model()), text(&folder), "-o", text(&delta)]);
    let base = demo::split("bf16", &[]);
    let before = bits(&logits(&base, Precision::Base, Mode::Exact));
    let after = runs(&base, &delta, None);
    assert!(before != after, "the adapter changes something");
    runs(&demo::split("q4+exact", &[]), &delta, Some(after));
    // The weights that were computed with are those of base and adapter.
    let checkpoint = open_checkpoint(&demo::model()).unwrap();
    let adapter = LoraAdapter::open(&folder, checkpoint.as_ref()).unwrap();
    let folded = AdapterCheckpoint::new(checkpoint.as_ref(), &adapter);
    let run = SplitCheckpoint::new(patched(&demo::split("q4+exact", &[]), &delta).unwrap());
    for name in checkpoint.names() {
        assert!(bits(&run.load(&name).unwrap()) == bits(&folded.load(&name).unwrap()), "{name}");
    }
}

#[test]
fn deltas_that_do_not_fit_are_told_with_the_right_code() {
    let (delta, bf16) = (demo::delta(), demo::split("bf16", &[]));
    let run = |dir: &Path, delta: &Path, more: &[&str], code: i32| {
        let given = ["run", "-m", text(dir), "-p", "a", "-n", "2", "--delta", text(delta)];
        fails(code, &[&given, more].concat())
    };
    // Another base: by its digest.
    for other in [demo::tuned_split("bf16"), split(&llama(), "bf16", &["--chunk-neurons", "8"])] {
        let message = run(&other, &delta, &[], 4);
        assert!(message.contains("digest"), "{message}");
    }
    // A base without the bits: what to do is a matter of flags.
    for verb in [&["run", "-p", "a", "-n", "2"][..], &["plan"], &["bench", "--n-gen", "2"]] {
        let q4 = demo::split("q4", &[]);
        let message = fails(2, &[verb, &["-m", text(&q4), "--delta", text(&delta)]].concat());
        assert!(message.contains("q4") && message.contains("--precision exact"), "{message}");
    }
    // A base with the bits of some neurons only.
    let planes = demo::split("q4+exact", &[]);
    for precision in ["exact@0.5", "plus@0.5", "exact@0"] {
        let message = run(&planes, &delta, &["--precision", precision], 2);
        assert!(message.contains("q4") && message.contains("use --precision exact"), "{message}");
    }
    // Matrices without the bits, under neurons that have them.
    let message = run(&demo::split("bf16", &["--resident-encoding", "q8"]), &delta, &[], 2);
    assert!(message.contains("resident") && message.contains("q8"), "{message}");
    // Neither deltas at all.
    let nothing = TempDir::new().unwrap();
    run(&bf16, nothing.path(), &[], 4);
    run(&bf16, &bf16, &[], 4);
}

#[test]
fn damaged_deltas_in_runs_are_told() {
    let (base, delta) = (demo::split("q4+exact", &[]), demo::delta());
    let (_guard, damaged) = copy(&delta);
    for name in ["delta.bin", "delta.json"] {
        let path = damaged.join(name);
        let good = fs::read(&path).unwrap();
        for share in [0, 1, 2, 3] {
            let mut bad = good.clone();
            let at = (good.len() * share / 4 + 70).min(good.len() - 1);
            bad[at] ^= 4;
            for bad in [&bad[..], &good[..at]] {
                fs::write(&path, bad).unwrap();
                let given = ["run", "-m", text(&base), "-p", "a", "-n", "1", "--delta", text(&damaged)];
                let message = fails(4, &given);
                assert!(message.contains(text(&damaged)), "{name}, {at}: {message}");
            }
        }
        fs::write(&path, &good).unwrap();
    }
    // Damage behind the indices, found while an engine streams: an error, not an answer.
    let path = damaged.join("delta.bin");
    let budget = budget_range_of(&patched(&base, &damaged).unwrap(), Mode::Exact).0;
    let split = patched(&base, &damaged).unwrap();
    let mut engine = engine_of(split, request(Mode::Exact, Some(budget), 2)).unwrap();
    let good = fs::read(&path).unwrap();
    let mut bad = good.clone();
    bad[64..].iter_mut().for_each(|b| *b = !*b);
    fs::write(&path, bad).unwrap();
    let error = (0..8).find_map(|_| answer(&mut engine, DECODED).err()).unwrap();
    assert!(matches!(error, Error::Split(thermocline_split::Error::Corrupt { .. })), "{error}");
    fs::write(&path, good).unwrap();
    let expected = bits(&logits(&demo::tuned_split("bf16"), Precision::Base, Mode::Exact));
    assert!(bits(&answer(&mut engine, DECODED).unwrap()) == expected, "mended");
}

/// It was a panic: the coarse plane without the final one is a way to read.
#[test]
fn what_is_only_read_cannot_be_stored() {
    let (made, out) = (llama(), TempDir::new().unwrap());
    let (model, profile, out) = (model(&made), profile(&made), out.path().join("split"));
    let said = fails(2, &splitting(&model, &profile, &["--resident-encoding", "q4+plus"], &out));
    assert!(said.contains("q4+plus cannot be stored; use q4+exact") && !out.exists(), "{said}");
}
