//! The committed ReLU model: against logits that PyTorch computed, and what leaving out zeros may and may not change.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod support;

use serde_json::Value;
use std::path::{Path, PathBuf};
use support::{calibrating, engine, ok, once, request, splitting};
use thermocline_datasets::Tokenizer;
use thermocline_runtime::{Engine, Logits, Mode};

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets").join(path)
}

fn split() -> PathBuf {
    let model = data("demo/model");
    let profile = once("demo-model.profile", |path| drop(ok(&calibrating(&model, "1024", "128", path))));
    once("demo-model.bf16", |path| drop(ok(&splitting(&model, &profile, &["--encoding", "bf16"], path))))
}

fn load() -> Engine {
    engine(&split(), request(Mode::Exact, None, 2)).unwrap()
}

fn reference() -> Value {
    serde_json::from_slice(&std::fs::read(data("train/checks/reference_logits.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

/// Keys and values are f16 here and f32 there: 11 bits of each, on logits of up to 11.
const TOLERANCE: f64 = 0.02;

#[test]
fn logits_and_greedy_tokens_are_those_of_pytorch() {
    let (want, mut engine) = (reference(), load());
    let prompt = ids(&want["prompt_ids"]);
    let tokenizer = Tokenizer::from_json(&std::fs::read_to_string(data("demo/model/tokenizer.json")).unwrap()).unwrap();
    assert_eq!(tokenizer.encode(want["prompt"].as_str().unwrap(), true).unwrap(), prompt);

    let got: Vec<Vec<f32>> = prompt.iter().map(|&t| engine.forward(&[t], Logits::Last).unwrap()).collect();
    let mut compared = 0;
    for (position, top) in want["top_logits"].as_object().unwrap() {
        for pair in top.as_array().unwrap() {
            let (token, logit) = (pair[0].as_u64().unwrap() as usize, pair[1].as_f64().unwrap());
            let ours = f64::from(got[position.parse::<usize>().unwrap()][token]);
            assert!((ours - logit).abs() < TOLERANCE, "position {position}, token {token}: {ours}, not {logit}");
            compared += 1;
        }
    }
    assert_eq!(compared, 8 * 16);

    let (mut logits, mut written) = (got.last().unwrap().clone(), Vec::new());
    for margin in want["greedy_margins"].as_array().unwrap() {
        assert!(margin.as_f64().unwrap() > 2.0 * TOLERANCE, "the reference's own choice is too close: {margin}");
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32;
        written.push(best);
        logits = engine.forward(&[best], Logits::Last).unwrap();
    }
    assert_eq!(written, ids(&want["greedy_ids"]));
}

/// With certificates of the gates, and under a budget that has no room for them.
#[test]
fn leaving_out_zeros_changes_no_bit_and_reads_less() {
    let prompt = ids(&reference()["prompt_ids"]);
    let pass = |engine: &mut Engine, skip: bool| {
        engine.clear();
        engine.skip_zeros(skip);
        let before = engine.account().bytes.host;
        let bits: Vec<u32> =
            prompt.iter().flat_map(|&t| engine.forward(&[t], Logits::Last).unwrap()).map(f32::to_bits).collect();
        (bits, engine.account().bytes.host - before)
    };
    let mut certified = load();
    assert!(certified.plan().certificate_bytes > 0);
    let tight = request(Mode::Exact, Some(certified.plan().total_bytes - 1), 2);
    let mut plain = engine(&split(), tight).unwrap();
    assert!(plain.plan().certificate_bytes == 0 && !plain.plan().streams());
    let ((skipped, few), (dense, all)) = (pass(&mut certified, true), pass(&mut certified, false));
    let (by_gates, more) = pass(&mut plain, true);
    assert!(skipped == dense && by_gates == dense);
    // Gates are a third of the neurons; ups and downs of the few that fire are little more.
    assert!(more > all / 3 && more < all * 6 / 10, "{more} of {all} bytes");
    // 8 bits for 16, and gates again where they may be positive, which takes back less than a third of what that saves.
    let neurons = certified.plan().hot_bytes * prompt.len() as u64;
    assert!(few < more - neurons / 3 / 3, "{few} of {more} bytes, {neurons} bytes of neurons");
}
