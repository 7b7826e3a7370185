//! Damaged and hostile GGUF files: each is refused with a typed error that names the file and the field, when it is
//! opened.

use proptest::prelude::*;
use std::path::Path;
use thermocline_datasets::gguf::{Array, GgmlType, GgufHeader, Value};
use thermocline_datasets::write::{GgufBuilder, TinyGgufType, TinyModel, tiny_gguf};
use thermocline_datasets::{Error, Tokenizer, open_checkpoint};

fn tiny() -> GgufBuilder {
    let model = TinyModel { n_layers: 1, hidden_size: 32, intermediate_size: 32, head_dim: 8, ..TinyModel::default() };
    tiny_gguf(&model, 1, TinyGgufType::F32)
}

fn open(bytes: &[u8]) -> Result<(), Error> {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("hostile.gguf");
    std::fs::write(&path, bytes).expect("written");
    open_checkpoint(&path).map(|_| ())
}

/// The file is refused as corrupt, and the message holds the file's name and `field`.
fn assert_corrupt(case: &str, bytes: &[u8], field: &str) {
    let error = open(bytes).expect_err(case);
    assert!(matches!(error, Error::Corrupt { .. }), "{case}: {error:?}");
    let text = error.to_string();
    assert!(text.contains("hostile.gguf") && text.contains(field), "{case}: {text}");
}

/// A header of `version`, with the counts, followed by `rest`.
fn header(version: u32, n_tensors: u64, n_keys: u64, rest: &[u8]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(version.to_le_bytes());
    out.extend(n_tensors.to_le_bytes());
    out.extend(n_keys.to_le_bytes());
    out.extend(rest);
    out
}

/// A key `k` of a value type, followed by `rest`.
fn key(kind: u32, rest: &[u8]) -> Vec<u8> {
    [1u64.to_le_bytes().as_slice(), b"k", &kind.to_le_bytes(), rest].concat()
}

/// The tiny file with a change.
fn with(change: impl FnOnce(&mut GgufBuilder)) -> Vec<u8> {
    let mut file = tiny();
    change(&mut file);
    file.to_bytes()
}

#[test]
fn the_undamaged_file_is_accepted() {
    open(&tiny().to_bytes()).expect("opened");
}

#[test]
fn heads_of_files() {
    assert_corrupt("empty", b"", "magic");
    assert_corrupt("4 bytes", b"GGUF", "version");
    assert_corrupt("7 bytes", b"GGUF\x03\0\0", "version");
    assert_corrupt("wrong magic", &[b"GGML", tiny().to_bytes().split_off(4).as_slice()].concat(), "magic");
    assert_corrupt("version 0", &header(0, 0, 0, b""), "version");
    for got in [1, 4, 1 << 20] {
        let error = open(&header(got, 0, 0, b"")).expect_err("refused");
        assert!(matches!(error, Error::UnsupportedVersion { got: g, max: 3, .. } if g == u64::from(got)), "{error:?}");
    }
    assert!(matches!(open(&header(3u32.swap_bytes(), 0, 0, b"")), Err(Error::Unsupported { .. })));
}

#[test]
fn counts_and_lengths_beyond_the_file() {
    for n in [u64::MAX, 1 << 40, 3] {
        assert_corrupt("tensors", &header(3, n, 0, &[0; 24]), "tensor_count");
        assert_corrupt("keys", &header(3, 0, n, &[0; 24]), "metadata_kv_count");
    }
    for n in [u64::MAX, 1 << 40] {
        let n = n.to_le_bytes();
        assert_corrupt("key's length", &header(3, 0, 1, &[n.as_slice(), &[0; 24]].concat()), "metadata key 0");
        assert_corrupt("string's length", &header(3, 0, 1, &key(8, &n)), "k");
        for kind in 0..13u32 {
            let array = [kind.to_le_bytes().as_slice(), &n, &[0; 16]].concat();
            assert_corrupt("array's length", &header(3, 0, 1, &key(9, &array)), "k");
        }
    }
    assert_corrupt("unknown value type", &header(3, 0, 1, &key(13, &[0; 16])), "unknown value type 13");
    assert_corrupt("truth value", &header(3, 0, 1, &key(7, &[2; 16])), "truth value 2");
    assert_corrupt("not UTF-8", &header(3, 0, 1, &key(8, &[&1u64.to_le_bytes()[..], b"\xFF"].concat())), "UTF-8");
}

#[test]
fn arrays_that_nest_beyond_any_stack() {
    let level = [9u32.to_le_bytes().as_slice(), &1u64.to_le_bytes()].concat();
    assert_corrupt("nested arrays", &header(3, 0, 1, &key(9, &level.repeat(200_000))), "nest deeper");
}

#[test]
fn alignments() {
    for bad in [0u32, 1, 4, 13, 24, 1 << 30] {
        assert_corrupt(
            "alignment",
            &with(|f| {
                f.set("general.alignment", bad);
            }),
            "general.alignment",
        );
    }
    for bad in [Value::U64(32), Value::I32(32), Value::from("32")] {
        assert_corrupt(
            "its type",
            &with(|f| {
                f.set("general.alignment", bad);
            }),
            "general.alignment",
        );
    }
    open(&with(|f| {
        f.alignment = 4096;
        f.set("general.alignment", 4096u32);
    }))
    .expect("a large alignment is fine");
}

#[test]
fn shapes_and_places_of_tensors() {
    for dims in [vec![u64::MAX; 4], vec![1 << 32, 1 << 32, 1 << 32], vec![u64::MAX], vec![0, 5], vec![1 << 62, 2]] {
        let case = format!("{dims:?}");
        assert_corrupt(
            &case,
            &with(|f| {
                f.tensor("x", &dims, GgmlType::F32, vec![0; 64]);
            }),
            "x",
        );
    }
    assert_corrupt(
        "too many dimensions",
        &with(|f| {
            f.tensor("x", &[1; 5], GgmlType::F32, vec![0; 4]);
        }),
        "x: 5 dim",
    );
    assert_corrupt(
        "no dimensions",
        &with(|f| {
            f.tensor("x", &[], GgmlType::F32, vec![0; 4]);
        }),
        "x: 0 dim",
    );
    let many = [1u64.to_le_bytes().as_slice(), b"t", &1_000_000_000u32.to_le_bytes(), &[0; 64]].concat();
    assert_corrupt("10^9 dimensions", &header(3, 1, 0, &many), "t: 1000000000 dim");
    assert_corrupt(
        "half a block",
        &with(|f| {
            f.tensor("x", &[33], GgmlType::Q4_0, vec![0; 64]);
        }),
        "x: rows of 33",
    );
    assert_corrupt("unknown type", &with(|f| f.tensors[0].kind = 999), "unknown tensor type 999");
    let error = open(&with(|f| f.tensors[0].kind = 23)).expect_err("foreign type");
    assert!(matches!(&error, Error::Unsupported { what, .. } if what.contains("IQ4_XS")), "{error:?}");
    let last = tiny().tensors.len() - 1;
    assert_corrupt("past the end", &with(|f| f.tensors[last].forged_offset = Some(1 << 40)), "past the file");
    assert_corrupt("end of the world", &with(|f| f.tensors[last].forged_offset = Some(u64::MAX - 31)), "past the file");
    assert_corrupt("overlap", &with(|f| f.tensors[last].forged_offset = Some(0)), "overlaps");
    assert_corrupt("unaligned", &with(|f| f.tensors[last].forged_offset = Some(8)), "alignment");
    let mut short = tiny().to_bytes();
    short.truncate(short.len() - 64);
    assert_corrupt("cut short", &short, "past the file");
}

#[test]
fn repeated_names() {
    assert_corrupt(
        "key",
        &with(|f| {
            f.meta("general.name", "again");
        }),
        "general.name: the key occurs twice",
    );
    assert_corrupt(
        "tensor",
        &with(|f| f.tensors[1].name = f.tensors[0].name.clone()),
        "token_embd.weight: the tensor occurs",
    );
}

#[test]
fn configurations_that_make_no_sense() {
    for (name, value, field) in [
        ("llama.block_count", 0u32, "block_count"),
        ("llama.block_count", u32::MAX, "block_count"),
        ("llama.attention.head_count", 0, "head_count"),
        ("llama.attention.head_count_kv", 0, "head_count_kv"),
        ("llama.attention.head_count_kv", 3, "head_count_kv"),
        ("llama.attention.key_length", 0, "key_length"),
        ("llama.attention.value_length", 4, "value_length"),
        ("llama.rope.dimension_count", 4, "dimension_count"),
        ("llama.embedding_length", 48, "model.embed_tokens.weight"),
        ("llama.feed_forward_length", 16, "mlp.gate_proj.weight"),
        ("llama.vocab_size", 299, "vocab_size"),
        ("tokenizer.ggml.eos_token_id", 300, "300"),
    ] {
        let changed = with(|f| {
            f.set(name, value);
        });
        let error = open(&changed).expect_err(name);
        let text = error.to_string();
        assert!(
            matches!(error, Error::Corrupt { .. }) && text.contains(field) && text.contains("hostile.gguf"),
            "{text}"
        );
    }
    for missing in ["general.architecture", "llama.block_count", "llama.attention.layer_norm_rms_epsilon"] {
        assert_corrupt(missing, &with(|f| f.metadata.retain(|(k, _)| k != missing)), missing);
    }
    assert_corrupt(
        "another type",
        &with(|f| {
            f.set("llama.block_count", "one");
        }),
        "is a string",
    );
    assert_corrupt(
        "not a number",
        &with(|f| {
            f.set("llama.rope.freq_base", f32::NAN);
        }),
        "freq_base",
    );
    let few = Value::Array(Array::String(vec!["a".into()]));
    assert_corrupt(
        "few tokens",
        &with(|f| {
            f.set("tokenizer.ggml.tokens", few);
        }),
        "tokenizer.ggml.tokens: 1 tokens",
    );
    let renamed = with(|f| f.tensors.iter_mut().for_each(|t| t.name = t.name.replace("blk.0.attn_v", "blk.7.attn_v")));
    assert_corrupt("a layer too many", &renamed, "blk.7");
    let error = open(&with(|f| f.tensors.retain(|t| !t.name.contains("ffn_up")))).expect_err("missing tensor");
    assert!(
        matches!(&error, Error::MissingTensor { name, .. } if name == "model.layers.0.mlp.up_proj.weight"),
        "{error}"
    );
    for (name, value) in
        [("general.architecture", "mamba"), ("llama.rope.scaling.type", "yarn"), ("thermocline.hidden_act", "gelu")]
    {
        assert!(
            matches!(
                open(&with(|f| {
                    f.set(name, value);
                })),
                Err(Error::Unsupported { .. })
            ),
            "{name}"
        );
    }
    assert!(matches!(
        open(&with(|f| {
            f.set("llama.expert_count", 8u32);
        })),
        Err(Error::Unsupported { .. })
    ));
}

#[test]
fn tokenizers_that_make_no_sense() {
    let tokenizer = |change: &dyn Fn(&mut GgufBuilder)| {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("hostile.gguf");
        std::fs::write(&path, with(change)).expect("written");
        let json = open_checkpoint(&path).expect("opened").tokenizer_json()?;
        Tokenizer::from_json(&json).map(|t| t.encode("the thing", false).expect("ids").len())
    };
    assert_eq!(tokenizer(&|_| ()).expect("tokenizer"), 5);
    for (name, value, part) in [
        ("tokenizer.ggml.pre", Value::from("never-heard-of"), "never-heard-of"),
        ("tokenizer.ggml.model", Value::from("rwkv"), "rwkv"),
        ("tokenizer.ggml.token_type", Value::Array(Array::I32(vec![1; 3])), "3 kinds for 300 tokens"),
        ("tokenizer.ggml.token_type", Value::U32(1), "token_type"),
        ("tokenizer.ggml.merges", Value::Array(Array::String(vec!["no such".into()])), "merge 0"),
        ("tokenizer.ggml.merges", Value::Array(Array::String(vec![String::new()])), "merge 0"),
    ] {
        let error = tokenizer(&|f| {
            f.set(name, value.clone());
        })
        .expect_err(name)
        .to_string();
        assert!(error.contains(part), "{error}");
    }
    let error = tokenizer(&|f| {
        f.set("tokenizer.ggml.model", "llama");
    })
    .expect_err("no scores")
    .to_string();
    assert!(error.contains("tokenizer.ggml.scores"), "{error}");
}

#[test]
fn a_million_tensors_take_linear_time() {
    let mut file = GgufBuilder { alignment: 8, ..GgufBuilder::default() };
    file.meta("general.alignment", 8u32);
    for i in 0..1_000_000 {
        file.tensor(&format!("t{i}"), &[2], GgmlType::F32, vec![0; 8]);
    }
    let bytes = file.to_bytes();
    let start = std::time::Instant::now();
    let header = GgufHeader::read(bytes.as_slice(), Path::new("many.gguf"), bytes.len() as u64).expect("read");
    assert_eq!(header.tensors.len(), 1_000_000);
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let bytes = [b"GGUF\x03\0\0\0".as_slice(), &bytes].concat();
        let _ = GgufHeader::read(bytes.as_slice(), Path::new("random.gguf"), bytes.len() as u64);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn flipped_bits_never_panic(flips in proptest::collection::vec((0usize..1usize << 20, 0u8..8), 1..6)) {
        let mut bytes = tiny().to_bytes();
        // The header is what is parsed: flips fall there, in the first part of the file.
        let n = bytes.len().min(14_000);
        for (at, bit) in flips {
            bytes[at % n] ^= 1 << bit;
        }
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("flipped.gguf");
        std::fs::write(&path, &bytes).expect("written");
        if let Ok(checkpoint) = open_checkpoint(&path) {
            for name in checkpoint.names() {
                let _ = checkpoint.load(&name);
            }
            if let Ok(json) = checkpoint.tokenizer_json() {
                let _ = Tokenizer::from_json(&json).map(|t| t.encode("the thing and", true));
            }
        }
    }
}
