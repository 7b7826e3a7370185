//! Checkpoint to tokens through the binary, and the JSON that scripts rely on.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod support;

use serde_json::Value;
use std::path::Path;
use support::{Form, Made, calibrating, fails, json, llama, model, ok, profile, qwen_relu, split, text, tiny};
use thermocline_datasets::write::TinyGgufType;
use thermocline_datasets::{Activation, Architecture};

/// Fails unless every dotted path is there and a number of at least `least`.
fn numbers(value: &Value, least: f64, fields: &[&str]) {
    for field in fields {
        let found = field.split('.').fold(value, |v, key| &v[key]);
        let number = found.as_f64().unwrap_or_else(|| panic!("{field} is {found} in {value}"));
        assert!(number >= least, "{field} is {number}");
    }
}

/// Everything that a split is for, with one model and one way of packing it.
fn through(made: &Made, encoding: &str, more: &[&str]) -> Value {
    let (checkpoint, dir) = (model(made), split(made, encoding, more));
    let proof = json(&["verify", text(&dir), "-m", text(&checkpoint), "--json"]);
    numbers(&proof, 1.0, &["n_weights", "n_chunks"]);
    assert_eq!(proof["violations"], serde_json::json!([]));
    assert_eq!(
        proof["tensors"].as_array().unwrap().len(),
        thermocline_datasets::architectures::tensors(&made.model.config()).len()
    );
    let inside = json(&["inspect", text(&dir), "--json"]);
    // A GGUF file names itself.
    let name = if matches!(made.form, Form::Folder) { made.name } else { "tiny" };
    assert_eq!(inside["source"]["model"], name);
    assert_eq!(json(&["inspect", text(&profile(made)), "--json"])["profile"]["model_name"], name);
    assert_eq!((&inside["kind"], &inside["packing"]["ffn_encoding"]), (&"split".into(), &encoding.into()));
    assert_eq!(inside["layers"].as_array().unwrap().len(), made.model.n_layers);
    numbers(
        &inside,
        1.0,
        &["dense_bytes", "resident_bytes", "predictor_bytes", "config.hidden_size", "packing.chunk_neurons"],
    );
    let plan = json(&["plan", "-m", text(&dir), "-t", "2", "--json"]);
    numbers(&plan, 1.0, &["plan.total_bytes", "plan.dense_bytes", "predicted.tok_s", "hardware.ram_bytes_per_second"]);
    numbers(&plan, 0.0, &["plan.disk_bytes_per_token", "plan.hot_bytes", "plan.cache_bytes"]);
    answers(&dir, &["--mode", "exact"]);
    answers(&dir, &["--mode", "sparse", "--active", "0.4"]);
    let bench = json(&["bench", "-m", text(&dir), "--n-prompt", "16", "--n-gen", "8", "-r", "2", "-t", "2", "--json"]);
    numbers(&bench, 0.001, &["decode_tok_s.median", "prompt_tok_s.median", "predicted.tok_s"]);
    // Next to nothing on a machine that is busy with other work: threads wait for each other.
    numbers(&bench, f64::MIN_POSITIVE, &["limit_share"]);
    numbers(&bench, 0.0, &["bytes_per_token.host", "bytes_per_token.disk", "peak_rss_bytes"]);
    assert_eq!(bench["decode_tok_s"]["runs"].as_array().unwrap().len(), 2);
    assert!(bench["isa"].is_string() && bench["cpu"].is_string() && bench["command"].is_array());
    proof
}

fn answers(dir: &Path, more: &[&str]) {
    let given =
        ["run", "-m", text(dir), "-p", "the lake", "-n", "12", "--temp", "0", "--ignore-eos", "-t", "2", "--json"];
    let run = json(&[&given, more].concat());
    numbers(&run, 1.0, &["prompt_tokens", "peak_rss_bytes", "bytes_per_token.host", "decode_tok_s", "prompt_tok_s"]);
    numbers(&run, 0.0, &["bytes_per_token.device", "bytes_per_token.cache", "bytes_per_token.disk", "limit_share"]);
    assert_eq!((run["tokens"].as_array().unwrap().len(), &run["finish_reason"]), (12, &"length".into()));
    assert!(run["tokens"].as_array().unwrap().iter().all(|t| t.as_u64().unwrap() < 300));
    assert!(run["text"].is_string() && run["mode"]["mode"] == more[1]);
    assert_eq!(run, {
        let mut same = run.clone();
        same["tokens"] = run["tokens"].clone();
        same
    });
}

/// Exactness of the tensors whose names contain `part`.
fn exact(proof: &Value, part: &str) -> Vec<bool> {
    let tensors = proof["tensors"].as_array().unwrap().iter();
    tensors.filter(|t| t["name"].as_str().unwrap().contains(part)).map(|t| t["exact"].as_bool().unwrap()).collect()
}

fn largest_relative_error(proof: &Value) -> f64 {
    proof["tensors"].as_array().unwrap().iter().map(|t| t["relative_error"].as_f64().unwrap()).fold(0.0, f64::max)
}

#[test]
fn a_bf16_folder_in_bf16_is_exact() {
    let proof = through(&llama(), "bf16", &[]);
    assert!(exact(&proof, "").iter().all(|e| *e));
}

#[test]
fn compression_and_order_change_no_weight() {
    for more in [
        &["--zstd-level", "3", "--order", "coactivation"],
        &["--zstd-level", "0", "--order", "random"],
        &["--zstd-level", "3", "--order", "frequency"],
    ] {
        let proof = through(&llama(), "bf16", more);
        assert!(exact(&proof, "").iter().all(|e| *e), "{more:?}");
    }
}

#[test]
fn compression_shrinks_what_it_can() {
    let plain = json(&["inspect", text(&split(&llama(), "bf16", &["--chunk-neurons", "64"])), "--json"]);
    let packed = split(&llama(), "bf16", &["--chunk-neurons", "64", "--zstd-level", "3"]);
    let packed = json(&["inspect", text(&packed), "--json"]);
    let bytes = |v: &Value| v["layers"][0]["file_bytes"].as_u64().unwrap();
    assert!(bytes(&packed) < bytes(&plain), "bf16 exponents compress");
    assert_eq!(packed["layers"][0]["compressed_chunks"], packed["layers"][0]["chunks"]);
    assert_eq!(plain["layers"][0]["compressed_chunks"], 0);
}

#[test]
fn quantised_splits_say_what_they_lose() {
    // Half a step of 255 or 15 for groups whose largest value is about 2.2 standard deviations.
    for (encoding, least, most) in [("q8", 1e-4, 0.01), ("q4", 1e-2, 0.13)] {
        let proof = through(&llama(), encoding, &[]);
        assert!(exact(&proof, "_proj").iter().all(|e| !e) && exact(&proof, "norm").iter().all(|e| *e));
        let error = largest_relative_error(&proof);
        assert!(error > least && error < most, "{encoding}: {error}");
    }
}

#[test]
fn qwen_with_relu_from_gguf() {
    let proof = through(&qwen_relu(), "q8", &["--order", "coactivation"]);
    assert!(exact(&proof, "bias").iter().all(|e| *e) && exact(&proof, "bias").len() == 6);
}

#[test]
fn llama_from_half_precision_gguf() {
    let made = tiny("llama-f16", Architecture::Llama, Activation::Silu, Form::Gguf(TinyGgufType::F16));
    let proof = through(&made, "bf16", &["--zstd-level", "3"]);
    // The values were bf16 before they were f16, and most of them are in f16's normal range.
    assert!(largest_relative_error(&proof) < 1e-3);
}

#[test]
fn qwen_with_silu_from_a_folder_and_drelu_from_8_bit_gguf() {
    let folder = tiny("qwen-silu", Architecture::Qwen2, Activation::Silu, Form::Folder);
    assert!(exact(&through(&folder, "bf16", &["--order", "random"]), "").iter().all(|e| *e));
    let made = tiny("llama-drelu", Architecture::Llama, Activation::Drelu, Form::Gguf(TinyGgufType::Q8_0));
    assert!(largest_relative_error(&through(&made, "q8", &[])) < 0.01);
}

#[test]
fn the_same_weights_in_both_forms_give_the_same_tokens() {
    let gguf = tiny("llama-gguf", Architecture::Llama, Activation::Silu, Form::Gguf(TinyGgufType::F32));
    let tokens = |made: &Made| {
        let dir = split(made, "bf16", &["--order", "frequency"]);
        let args = ["run", "-m", text(&dir), "-p", "the lake", "-n", "48", "--temp", "0", "--ignore-eos", "--json"];
        json(&args)["tokens"].clone()
    };
    assert_eq!(tokens(&gguf), tokens(&llama()));
}

#[test]
fn shards_merge_to_the_whole_profile() {
    let dir = tempfile::TempDir::new().unwrap();
    let model = model(&llama());
    let merged = dir.path().join("merged");
    let shards: Vec<_> = (0..3).map(|i| dir.path().join(format!("shard-{i}"))).collect();
    for (i, shard) in shards.iter().enumerate() {
        let part = format!("{i}/3");
        ok(&[&calibrating(&model, "1024", "128", shard)[..], &["--shard", &part]].concat());
    }
    ok(&["calibrate", "merge", text(&shards[1]), text(&shards[2]), text(&shards[0]), "-o", text(&merged)]);
    let statistics = |dir: &Path| std::fs::read(dir.join("statistics.safetensors")).unwrap();
    assert!(statistics(&merged) == statistics(&profile(&llama())));
    let inside = json(&["inspect", text(&merged), "--json"]);
    assert_eq!((&inside["kind"], &inside["profile"]["n_tokens"]), (&"profile".into(), &1024.into()));
    fails(1, &["calibrate", "merge", text(&shards[0]), text(&shards[1]), "-o", text(&dir.path().join("bad"))]);
}

#[test]
fn calibrate_reports_what_it_did() {
    let dir = tempfile::TempDir::new().unwrap();
    let (model, out) = (model(&llama()), dir.path().join("p"));
    let report = json(&[&calibrating(&model, "256", "64", &out)[..], &["--json"]].concat());
    numbers(&report, 1.0, &["n_tokens", "flops", "memory_bound_bytes", "calibration_peak_bytes"]);
    assert_eq!(report["n_tokens"], 256);
    assert_eq!(json(&["inspect", text(&model), "--json"])["kind"], "checkpoint");
}
