//! GGUF files (cases 1 to 9, 11 to 13): everything is refused when the file is opened.

use crate::harness::Table;
use thermocline_datasets::gguf::{Array, GgmlType, Value};
use thermocline_datasets::write::{GgufBuilder, TinyGgufType, TinyModel, tiny_gguf};

fn tiny() -> GgufBuilder {
    let model = TinyModel { n_layers: 1, hidden_size: 32, intermediate_size: 32, head_dim: 8, ..TinyModel::default() };
    tiny_gguf(&model, 1, TinyGgufType::F32)
}

/// The tiny file with a change.
fn with(change: impl FnOnce(&mut GgufBuilder)) -> Vec<u8> {
    let mut file = tiny();
    change(&mut file);
    file.to_bytes()
}

fn with_key(key: &str, value: impl Into<Value>) -> Vec<u8> {
    with(|f| {
        f.set(key, value);
    })
}

/// A header of `version`, with the counts, followed by `rest`.
fn header(version: u32, n_tensors: u64, n_keys: u64, rest: &[u8]) -> Vec<u8> {
    let counts = [n_tensors, n_keys].map(u64::to_le_bytes).concat();
    [b"GGUF".as_slice(), &version.to_le_bytes(), &counts, rest].concat()
}

/// A key `k` of a value type, followed by `rest`.
fn key(kind: u32, rest: &[u8]) -> Vec<u8> {
    [1u64.to_le_bytes().as_slice(), b"k", &kind.to_le_bytes(), rest].concat()
}

#[test]
fn heads_of_files() {
    let mut table = Table::new("gguf-heads");
    let whole = tiny().to_bytes();
    for (name, bytes) in [("empty", &b""[..]), ("magic-only", b"GGUF"), ("7-bytes", b"GGUF\x03\0\0")] {
        table.file(1, name, "gguf", bytes);
    }
    table.file(1, "4-bytes-of-nothing", "gguf", &[0; 4]);
    table.file(1, "cut-in-half", "gguf", &whole[..whole.len() / 2]);
    table.file(2, "another-magic", "gguf", &[b"GGML", &whole[4..]].concat());
    for version in [0, 1, 4, u32::MAX, 3u32.swap_bytes()] {
        table.file(2, &format!("version-{version}"), "gguf", &header(version, 0, 0, b""));
    }
    table.check();
}

#[test]
fn counts_lengths_and_nesting() {
    let mut table = Table::new("gguf-counts");
    for n in [u64::MAX, 1 << 40, 3] {
        table.file(3, &format!("{n}-tensors"), "gguf", &header(3, n, 0, &[0; 24]));
        table.file(3, &format!("{n}-keys"), "gguf", &header(3, 0, n, &[0; 24]));
    }
    for n in [u64::MAX, 1 << 40] {
        let bytes = n.to_le_bytes();
        table.file(4, &format!("key-of-{n}-bytes"), "gguf", &header(3, 0, 1, &[&bytes[..], &[0; 24]].concat()));
        table.file(4, &format!("string-of-{n}-bytes"), "gguf", &header(3, 0, 1, &key(8, &bytes)));
        for (kind, name) in [(0, "u8"), (8, "string"), (9, "array"), (12, "f64")] {
            let array = [u32::to_le_bytes(kind).as_slice(), &bytes, &[0; 8]].concat();
            table.file(4, &format!("{n}-{name}s"), "gguf", &header(3, 0, 1, &key(9, &array)));
        }
    }
    let level = [9u32.to_le_bytes().as_slice(), &1u64.to_le_bytes()].concat();
    table.file(5, "arrays-200000-deep", "gguf", &header(3, 0, 1, &key(9, &level.repeat(200_000))));
    table.check();
}

#[test]
fn alignments_and_shapes() {
    let mut table = Table::new("gguf-tensors");
    for bad in [0u32, 1, 13, 1 << 30] {
        table.file(6, &format!("alignment-{bad}"), "gguf", &with_key("general.alignment", bad));
    }
    for (name, value) in [("u64", Value::U64(32)), ("i32", Value::I32(32)), ("string", Value::from("32"))] {
        table.file(6, &format!("alignment-as-{name}"), "gguf", &with_key("general.alignment", value));
    }
    for (name, dims) in [
        ("every-dimension-the-largest", vec![u64::MAX; 4]),
        ("product-that-wraps-to-0", vec![1 << 32, 1 << 32]),
        ("product-that-wraps-to-64", vec![(1 << 60) + 1, 64]),
        ("nothing", vec![0, 5]),
    ] {
        table.file(
            7,
            name,
            "gguf",
            &with(|f| {
                f.tensor("x", &dims, GgmlType::F32, vec![0; 64]);
            }),
        );
    }
    let many = [1u64.to_le_bytes().as_slice(), b"t", &1_000_000_000u32.to_le_bytes(), &[0; 64]].concat();
    table.file(8, "a-billion-dimensions", "gguf", &header(3, 1, 0, &many));
    let last = tiny().tensors.len() - 1;
    for offset in [1 << 40, u64::MAX - 31] {
        table.file(9, &format!("tensor-at-{offset}"), "gguf", &with(|f| f.tensors[last].forged_offset = Some(offset)));
    }
    let whole = tiny().to_bytes();
    table.file(9, "last-tensor-cut", "gguf", &whole[..whole.len() - 64]);
    table.file(10, "overlap", "gguf", &with(|f| f.tensors[last].forged_offset = Some(0)));
    table.file(
        12,
        "half-a-block",
        "gguf",
        &with(|f| {
            f.tensor("x", &[33], GgmlType::Q4_0, vec![0; 64]);
        }),
    );
    table.file(12, "unknown-type", "gguf", &with(|f| f.tensors[0].kind = 999));
    table.file(12, "foreign-type", "gguf", &with(|f| f.tensors[0].kind = 23));
    table.check();
}

#[test]
fn names_that_occur_twice() {
    let mut table = Table::new("gguf-names");
    table.file(
        11,
        "key-twice",
        "gguf",
        &with(|f| {
            f.meta("general.name", "again");
        }),
    );
    table.file(11, "tensor-twice", "gguf", &with(|f| f.tensors[1].name = f.tensors[0].name.clone()));
    // A million sound entries take linear time and memory; what the model needs is not among them.
    let mut file = GgufBuilder { alignment: 8, ..tiny() };
    file.set("general.alignment", 8u32);
    file.tensors.retain(|t| t.name != "output_norm.weight");
    (0..1_000_000).for_each(|i| {
        file.tensor(&format!("t{i}"), &[2], GgmlType::F32, vec![0; 8]);
    });
    let begin = std::time::Instant::now();
    table.file(11, "a-million-tensors", "gguf", &file.to_bytes());
    assert!(begin.elapsed().as_secs() < 30, "{:?}", begin.elapsed());
    table.check();
}

#[test]
fn configurations() {
    let mut table = Table::new("gguf-configurations");
    for (key, value) in [
        ("llama.block_count", 0u32),
        ("llama.block_count", u32::MAX),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count_kv", 3),
        ("llama.attention.key_length", 0),
        ("llama.attention.value_length", 4),
        ("llama.embedding_length", u32::MAX),
        ("llama.feed_forward_length", 16),
        ("llama.vocab_size", 299),
        ("tokenizer.ggml.eos_token_id", 300),
    ] {
        table.file(13, &format!("{key}-{value}"), "gguf", &with_key(key, value));
    }
    let few = Value::Array(Array::String(vec!["a".into()]));
    table.file(13, "one-token", "gguf", &with_key("tokenizer.ggml.tokens", few));
    table.file(13, "no-such-key", "gguf", &with(|f| f.metadata.retain(|(k, _)| k != "llama.block_count")));
    table.file(13, "key-of-another-type", "gguf", &with_key("llama.block_count", "one"));
    let renamed = with(|f| f.tensors.iter_mut().for_each(|t| t.name = t.name.replace("blk.0.attn_v", "blk.7.attn_v")));
    table.file(13, "a-layer-too-many", "gguf", &renamed);
    table.file(13, "tensor-missing", "gguf", &with(|f| f.tensors.retain(|t| !t.name.contains("ffn_up"))));
    table.check();
}
