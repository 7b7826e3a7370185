//! The two readers against the writers: same configuration, names, shapes and values from either format.

use thermocline_datasets::write::{
    TinyGgufType, TinyModel, tiny_gguf, tiny_tensors, write_tiny_gguf, write_tiny_safetensors,
};
use thermocline_datasets::{Activation, Architecture, Checkpoint, MAX_NAME_CHARS, open_checkpoint};

fn models() -> Vec<TinyModel> {
    let llama = TinyModel::default();
    vec![
        llama.clone(),
        TinyModel { architecture: Architecture::Qwen2, ..llama.clone() },
        TinyModel { activation: Activation::Relu, tie_word_embeddings: false, n_layers: 3, ..llama.clone() },
        TinyModel { activation: Activation::Drelu, head_dim: 32, n_kv_heads: 1, ..llama },
    ]
}

fn assert_holds(checkpoint: &dyn Checkpoint, model: &TinyModel, tolerance: f32) {
    assert_eq!(checkpoint.config(), &model.config());
    let tensors = tiny_tensors(model, 7);
    let mut names: Vec<String> = tensors.iter().map(|t| t.name.clone()).collect();
    names.sort();
    assert_eq!(checkpoint.names(), names);
    for tensor in tensors {
        assert_eq!(checkpoint.info(&tensor.name).expect("info").shape, tensor.shape);
        let values = checkpoint.load(&tensor.name).expect("load");
        assert_eq!(values.len(), tensor.values.len());
        for (a, b) in values.iter().zip(&tensor.values) {
            assert!((a - b).abs() <= tolerance, "{}: {a} and {b}", tensor.name);
        }
        // Any range of rows is the same part of the whole, across the boundaries of heads and blocks too.
        let (rows, columns) = (tensor.shape[0], tensor.shape[1..].iter().product::<usize>());
        for range in [0..0, 0..1, 3..rows.min(21), rows - 1..rows, rows / 2..rows, 5..6] {
            let part = checkpoint.load_rows(&tensor.name, range.clone()).expect("range");
            assert_eq!(part, values[range.start * columns..range.end * columns], "{} {range:?}", tensor.name);
        }
        assert!(checkpoint.load_rows(&tensor.name, 0..rows + 1).is_err());
    }
}

#[test]
fn a_folder_gives_back_what_was_written() {
    for model in models() {
        let dir = tempfile::tempdir().expect("folder");
        write_tiny_safetensors(dir.path(), &model, 7).expect("written");
        let checkpoint = open_checkpoint(dir.path()).expect("opened");
        assert_holds(checkpoint.as_ref(), &model, 0.0);
        assert!(checkpoint.chat_template().is_some());
    }
}

#[test]
fn a_gguf_file_gives_back_what_was_written() {
    for model in models() {
        let dir = tempfile::tempdir().expect("folder");
        // Q8_0 rounds to 1/254 of a block's largest value, and the largest weight is near 1; f16 to 2^-11 of each.
        for (kind, tolerance) in [(TinyGgufType::F32, 0.0), (TinyGgufType::F16, 1e-7), (TinyGgufType::Q8_0, 0.01)] {
            let path = dir.path().join("model.gguf");
            write_tiny_gguf(&path, &model, 7, kind).expect("written");
            assert_holds(open_checkpoint(&path).expect("opened").as_ref(), &model, tolerance);
        }
    }
}

#[test]
fn digests_follow_contents_and_not_places() {
    let (a, b) = (tempfile::tempdir().expect("folder"), tempfile::tempdir().expect("folder"));
    let digest = |path: &std::path::Path| open_checkpoint(path).expect("opened").digest().expect("digest");
    write_tiny_safetensors(a.path(), &TinyModel::default(), 1).expect("written");
    write_tiny_safetensors(b.path(), &TinyModel::default(), 1).expect("written");
    assert_eq!(digest(a.path()), digest(b.path()));
    assert_eq!(digest(a.path()).len(), 32);
    write_tiny_safetensors(b.path(), &TinyModel::default(), 2).expect("written");
    assert_ne!(digest(a.path()), digest(b.path()));
}

#[test]
fn ends_of_turns_come_from_every_place_that_names_them() {
    let dir = tempfile::tempdir().expect("folder");
    write_tiny_safetensors(dir.path(), &TinyModel::default(), 1).expect("written");
    let settings = dir.path().join("generation_config.json");
    std::fs::write(&settings, "{\"eos_token_id\": [2, 7]}").expect("written");
    assert_eq!(open_checkpoint(dir.path()).expect("opened").config().eos_token_ids, [0, 2, 7]);
    std::fs::write(&settings, "{\"eos_token_id\": 300}").expect("written");
    let error = open_checkpoint(dir.path()).err().expect("refused").to_string();
    assert!(error.contains("generation_config.json") && error.contains("300"), "{error}");
}

#[test]
fn a_word_that_looks_like_an_end_is_none() {
    use thermocline_datasets::gguf::{Array, Value};
    let mut file = thermocline_datasets::write::tiny_gguf(&TinyModel::default(), 1, TinyGgufType::F32);
    let mut tokens = thermocline_datasets::write::tiny_tokens(&TinyModel::default());
    tokens[299] = "</s>".to_owned();
    file.set("tokenizer.ggml.tokens", Value::Array(Array::String(tokens)));
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, file.to_bytes()).expect("written");
    assert_eq!(open_checkpoint(&path).expect("opened").config().eos_token_ids, [0, 2]);
}

#[test]
fn a_model_is_called_what_its_file_says_or_what_its_folder_is_called() {
    let dir = tempfile::tempdir().expect("folder");
    let (folder, path) = (dir.path().join("Some-Model-7B"), dir.path().join("some.gguf"));
    write_tiny_safetensors(&folder, &TinyModel::default(), 7).expect("written");
    assert_eq!(open_checkpoint(&folder).expect("opened").name(), "Some-Model-7B");
    let mut file = tiny_gguf(&TinyModel::default(), 7, TinyGgufType::F32);
    let long = "x".repeat(1 << 20);
    for (given, expected) in [
        ("Tiny 7B", "Tiny 7B"),
        ("Tiny\u{1b}[2J\n<b>", "Tiny [2J <b>"),
        (" \n", "some.gguf"),
        (long.as_str(), &long[..MAX_NAME_CHARS]),
    ] {
        std::fs::write(&path, file.set("general.name", given).to_bytes()).expect("written");
        assert_eq!(open_checkpoint(&path).expect("opened").name(), expected);
    }
}
