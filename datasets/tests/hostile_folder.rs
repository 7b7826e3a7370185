//! Damaged and hostile Hugging Face folders: each is refused with a typed error that names the file and the field.

use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::Path;
use thermocline_datasets::huggingface::parse_header;
use thermocline_datasets::write::{TinyModel, tiny_config_json, write_tiny_safetensors};
use thermocline_datasets::{Error, open_checkpoint};

fn tiny() -> (tempfile::TempDir, TinyModel) {
    let dir = tempfile::tempdir().expect("folder");
    let model = TinyModel { n_layers: 1, hidden_size: 32, intermediate_size: 32, head_dim: 8, ..TinyModel::default() };
    write_tiny_safetensors(dir.path(), &model, 1).expect("written");
    (dir, model)
}

fn assert_corrupt(case: &str, result: Result<impl Sized, Error>, parts: &[&str]) {
    let Err(error) = result else { panic!("{case}: accepted") };
    assert!(matches!(error, Error::Corrupt { .. }), "{case}: {error:?}");
    let text = error.to_string();
    assert!(parts.iter().all(|part| text.contains(part)), "{case}: {text}");
}

/// A safetensors file of this header text and so many bytes of data.
fn file(header: &str, n_data: usize) -> Vec<u8> {
    [(header.len() as u64).to_le_bytes().as_slice(), header.as_bytes(), &vec![0; n_data]].concat()
}

fn parse(bytes: &[u8]) -> Result<usize, Error> {
    parse_header(bytes, Path::new("hostile.safetensors"), bytes.len() as u64).map(|entries| entries.len())
}

#[test]
fn headers() {
    let f32s = |name: &str, shape: &str, from: &str, to: &str| {
        format!("\"{name}\":{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":[{from},{to}]}}")
    };
    let one = f32s("a", "[2]", "0", "8");
    assert_eq!(parse(&file(&format!("{{{one}}}"), 8)).expect("good"), 1);
    assert_eq!(parse(&file(&format!("{{\"__metadata__\":{{\"x\":\"y\"}},{one}}}"), 8)).expect("good"), 1);
    for (case, bytes, part) in [
        ("empty", Vec::new(), "header length"),
        ("4 bytes", vec![1; 4], "header length"),
        ("7 bytes", vec![1; 7], "header length"),
        ("length only", 50u64.to_le_bytes().to_vec(), "header length"),
        ("endless header", u64::MAX.to_le_bytes().to_vec(), "header length"),
        ("header over 100 MB", [100_000_001u64.to_le_bytes().as_slice(), &[32; 64]].concat(), "header length"),
        ("deep JSON", file(&"[".repeat(100_000), 0), "deeper"),
        ("deep JSON in a tensor", file(&format!("{{\"a\":{}", "{\"b\":".repeat(100_000)), 0), "deeper"),
        ("no JSON", file("nonsense", 0), "header"),
        ("not UTF-8", [1u64.to_le_bytes().as_slice(), b"\xFF"].concat(), "header"),
        ("negative offset", file(&format!("{{{}}}", f32s("a", "[2]", "-8", "0")), 8), "a: "),
        ("fractional offset", file(&format!("{{{}}}", f32s("a", "[2]", "0", "8.0")), 8), "a: "),
        ("offset beyond 64 bits", file(&format!("{{{}}}", f32s("a", "[2]", "0", "99999999999999999999")), 8), "a: "),
        ("backwards", file(&format!("{{{}}}", f32s("a", "[2]", "8", "0")), 8), "a: data_offsets"),
        ("hole at the start", file(&format!("{{{}}}", f32s("a", "[2]", "8", "16")), 16), "a: hole"),
        ("hole", file(&format!("{{{one},{}}}", f32s("b", "[2]", "16", "24")), 24), "b: hole"),
        ("overlap", file(&format!("{{{one},{}}}", f32s("b", "[2]", "4", "12")), 12), "b: overlap"),
        ("trailing bytes", file(&format!("{{{one}}}"), 9), "tensor data"),
        ("past the end", file(&format!("{{{one}}}"), 7), "a: its data ends"),
        ("size and shape", file(&format!("{{{}}}", f32s("a", "[3]", "0", "8")), 8), "a: 8 bytes"),
        ("shape overflows", file(&format!("{{{}}}", f32s("a", "[4294967296,4294967296,2]", "0", "8")), 8), "overflows"),
        ("bits overflow", file(&format!("{{{}}}", f32s("a", "[9223372036854775807]", "0", "8")), 8), "overflows"),
        (
            "sum overflows",
            file(&format!("{{{}}}", f32s("a", "[2]", "18446744073709551607", "18446744073709551615")), 8),
            "a: ",
        ),
        ("unknown dtype", file(&format!("{{{}}}", one.replace("F32", "F33")), 8), "unknown dtype"),
        ("duplicate", file(&format!("{{{one},{one}}}"), 8), "a: the tensor occurs twice"),
        ("duplicate metadata", file(&format!("{{\"__metadata__\":{{}},\"__metadata__\":{{}},{one}}}"), 8), "twice"),
        ("another field", file("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8],\"x\":1}}", 8), "a: "),
        ("missing field", file("{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8), "a: "),
        ("no object", file("{\"a\":5}", 8), "a: "),
    ] {
        assert_corrupt(case, parse(&bytes), &["hostile.safetensors", part]);
    }
}

#[test]
fn configurations() {
    let (dir, model) = tiny();
    let set = |key: &str, value: Value| {
        let mut config = tiny_config_json(&model);
        config[key] = value;
        std::fs::write(dir.path().join("config.json"), config.to_string()).expect("written");
        open_checkpoint(dir.path())
    };
    for (key, value, part) in [
        ("num_attention_heads", json!(0), "num_attention_heads"),
        ("num_key_value_heads", json!(3), "num_key_value_heads"),
        ("num_hidden_layers", json!(0), "num_hidden_layers"),
        ("num_hidden_layers", json!(1_000_000), "num_hidden_layers"),
        ("hidden_size", json!(-1), "config"),
        ("hidden_size", json!(1.5), "config"),
        ("hidden_size", json!(null), "config"),
        ("head_dim", json!(7), "head_dim"),
        ("vocab_size", json!(0), "vocab_size"),
        ("eos_token_id", json!(300), "300"),
        ("eos_token_id", json!("two"), "eos_token_id"),
        ("rope_theta", json!(0.0), "rope_theta"),
    ] {
        assert_corrupt(key, set(key, value), &["config.json", part]);
    }
    for (key, value) in [
        ("architectures", json!(["GPT2LMHeadModel"])),
        ("hidden_act", json!("gelu")),
        ("rope_scaling", json!({"rope_type": "llama3", "factor": 8.0})),
        ("mlp_bias", json!(true)),
        ("attention_bias", json!(true)),
    ] {
        assert!(matches!(set(key, value), Err(Error::Unsupported { .. })), "{key}");
    }
    // A configuration that disagrees with the tensors: both are named.
    let both = ["model.safetensors", "mlp.gate_proj.weight", "config.json", "[64, 32]", "[32, 32]"];
    assert_corrupt("ffn", set("intermediate_size", json!(64)), &both);
    let Err(Error::MissingTensor { name, .. }) = set("num_hidden_layers", json!(2)) else { panic!("accepted") };
    assert!(name.starts_with("model.layers.1."), "{name}");
    let Err(Error::MissingTensor { name, .. }) = set("tie_word_embeddings", json!(false)) else { panic!("accepted") };
    assert_eq!(name, "lm_head.weight");
    let doubled = tiny_config_json(&model).to_string().replacen('{', "{\"hidden_size\": 16,", 1);
    std::fs::write(dir.path().join("config.json"), doubled).expect("written");
    assert_corrupt("repeated key", open_checkpoint(dir.path()), &["config.json", "hidden_size"]);
    std::fs::write(dir.path().join("config.json"), "[".repeat(100_000)).expect("written");
    assert_corrupt("deep config", open_checkpoint(dir.path()), &["config.json", "deeper"]);
    std::fs::remove_file(dir.path().join("config.json")).expect("removed");
    assert_corrupt("no config", open_checkpoint(dir.path()), &["config.json", "missing"]);
}

#[test]
fn shards() {
    let (dir, _) = tiny();
    let at = |name: &str| dir.path().join(name);
    std::fs::rename(at("model.safetensors"), at("one.safetensors")).expect("renamed");
    let names = open_names(&at("one.safetensors"));
    let index = |change: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        let mut map = names.iter().map(|n| (n.clone(), json!("one.safetensors"))).collect();
        change(&mut map);
        std::fs::write(at("model.safetensors.index.json"), json!({"weight_map": map}).to_string()).expect("written");
        open_checkpoint(dir.path())
    };
    index(&|_| ()).expect("a good index");
    let first = names.first().expect("a tensor").as_str();
    for name in ["../../etc/passwd", "/etc/passwd", "..", "", "sub/one.safetensors"] {
        let bad = index(&|map| drop(map.insert(first.into(), json!(name))));
        assert_corrupt(name, bad, &["index.json", "leads out of the folder"]);
    }
    let missing = index(&|map| drop(map.insert(first.into(), json!("two.safetensors"))));
    assert_corrupt("missing shard", missing, &["index.json", "two.safetensors", "missing"]);
    let unknown = index(&|map| drop(map.insert("nothing".into(), json!("one.safetensors"))));
    assert_corrupt("a tensor that is nowhere", unknown, &["index.json", "nothing", "in no file"]);
    std::fs::copy(at("one.safetensors"), at("two.safetensors")).expect("copied");
    let twice = index(&|map| drop(map.insert(first.into(), json!("two.safetensors"))));
    assert_corrupt("a tensor in two shards", twice, &["two.safetensors", "one.safetensors"]);
    let repeated = format!("{{\"weight_map\":{{\"{first}\":\"one.safetensors\",\"{first}\":\"two.safetensors\"}}}}");
    std::fs::write(at("model.safetensors.index.json"), repeated).expect("written");
    assert_corrupt("placed twice", open_checkpoint(dir.path()), &["index.json", first, "twice"]);
}

fn open_names(path: &Path) -> Vec<String> {
    let bytes = std::fs::read(path).expect("read");
    let entries = parse_header(bytes.as_slice(), path, bytes.len() as u64).expect("parsed");
    entries.into_iter().map(|e| e.name).collect()
}

#[test]
fn links_may_lead_into_the_hub_cache_only() {
    let (source, _) = tiny();
    let cache = tempfile::tempdir().expect("folder");
    let (blobs, snapshot) = (cache.path().join("blobs"), cache.path().join("snapshots").join("abc"));
    std::fs::create_dir_all(&blobs).expect("created");
    std::fs::create_dir_all(&snapshot).expect("created");
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::copy(source.path().join(name), blobs.join(name)).expect("copied");
        std::os::unix::fs::symlink(Path::new("../../blobs").join(name), snapshot.join(name)).expect("linked");
    }
    open_checkpoint(&snapshot).expect("the hub cache's own links");
    std::fs::remove_file(snapshot.join("model.safetensors")).expect("removed");
    let outside = source.path().join("model.safetensors");
    std::os::unix::fs::symlink(&outside, snapshot.join("model.safetensors")).expect("linked");
    assert_corrupt("link", open_checkpoint(&snapshot), &["model.safetensors", "link leads out"]);
}

#[test]
fn pickles_are_refused_with_a_way_out() {
    let (dir, _) = tiny();
    std::fs::remove_file(dir.path().join("model.safetensors")).expect("removed");
    assert_corrupt("no weights", open_checkpoint(dir.path()), &["model.safetensors"]);
    let pickle = dir.path().join("pytorch_model.bin");
    std::fs::write(&pickle, b"\x80\x02").expect("written");
    for path in [dir.path(), pickle.as_path()] {
        let Err(error) = open_checkpoint(path) else { panic!("accepted") };
        let text = error.to_string();
        assert!(matches!(error, Error::Unsupported { .. }), "{text}");
        assert!(text.contains("pytorch_model.bin") && text.contains("safe_serialization"), "{text}");
    }
}

#[test]
fn a_file_that_is_cut_after_opening_is_noticed() {
    let (dir, _) = tiny();
    let checkpoint = open_checkpoint(dir.path()).expect("opened");
    let file = std::fs::OpenOptions::new().write(true).open(dir.path().join("model.safetensors")).expect("opened");
    file.set_len(100).expect("cut");
    assert_corrupt("cut", checkpoint.load("model.norm.weight"), &["model.safetensors", "changed after it was opened"]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_headers_never_panic(text in "[\\[\\]{}\":,a0-9.eE-]{0,200}", n_data in 0usize..64) {
        let _ = parse(&file(&text, n_data));
    }

    #[test]
    fn flipped_bits_never_panic(flips in proptest::collection::vec((0usize..150, 0u8..8), 1..4)) {
        let header = "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\
                      \"b\":{\"dtype\":\"BF16\",\"shape\":[2,2],\"data_offsets\":[8,16]}}";
        let mut bytes = file(header, 16);
        let n = bytes.len();
        for (at, bit) in flips {
            bytes[at % n] ^= 1 << bit;
        }
        let _ = parse(&bytes);
    }
}
