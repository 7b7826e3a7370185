//! Hugging Face folders (cases 1, 10 to 15, 17 to 19).

use crate::harness::Table;
use crate::support::{copy_dir, llama, model, text};
use serde_json::{Map, Value, json};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::symlink;
use std::path::Path;

/// Makes `folder` the sound tiny model.
fn sound(folder: &Path) {
    copy_dir(&model(&llama()), folder);
}

fn write(path: &Path, bytes: impl AsRef<[u8]>) {
    fs::write(path, bytes).unwrap();
}

/// A safetensors file of this header text and so many bytes of data.
fn weights(header: &str, n_data: usize) -> Vec<u8> {
    [(header.len() as u64).to_le_bytes().as_slice(), header.as_bytes(), &vec![0; n_data]].concat()
}

fn tensor(name: &str, dtype: &str, shape: &str, from: &str, to: &str) -> String {
    format!("\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{from},{to}]}}")
}

fn f32s(name: &str, from: &str, to: &str) -> String {
    tensor(name, "F32", "[2]", from, to)
}

/// The header of the sound model's weights.
fn header_of(folder: &Path) -> Map<String, Value> {
    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    serde_json::from_slice(&bytes[8..8 + n]).unwrap()
}

#[test]
fn headers() {
    let mut table = Table::new("folder-headers");
    let one = f32s("a", "0", "8");
    let of = |entry: String, n_data: usize| weights(&format!("{{{entry}}}"), n_data);
    let two = |entry: String, n_data: usize| of(format!("{one},{entry}"), n_data);
    let huge = "18446744073709551615";
    for (case, name, bytes) in [
        (1, "empty", Vec::new()),
        (1, "7-bytes", vec![1; 7]),
        (1, "length-only", 50u64.to_le_bytes().to_vec()),
        (4, "endless-header", u64::MAX.to_le_bytes().to_vec()),
        (7, "shape-that-overflows", of(tensor("a", "F32", "[4294967296,4294967296,2]", "0", "8"), 8)),
        (7, "bits-that-overflow", of(tensor("a", "F32", "[9223372036854775807]", "0", "8"), 8)),
        (9, "past-the-end", of(one.clone(), 7)),
        (10, "hole-at-the-start", of(f32s("a", "8", "16"), 16)),
        (10, "hole", two(f32s("b", "16", "24"), 24)),
        (10, "overlap", two(f32s("b", "4", "12"), 12)),
        (10, "trailing-byte", of(one.clone(), 9)),
        (11, "tensor-twice", two(one.clone(), 8)),
        (11, "field-twice", of(one.replace("\"shape\"", "\"dtype\":\"F16\",\"shape\""), 8)),
        (12, "unknown-dtype", of(one.replace("F32", "F33"), 8)),
        (12, "size-of-another-shape", of(tensor("a", "F32", "[3]", "0", "8"), 8)),
        (14, "json-100000-deep", weights(&"[".repeat(100_000), 0)),
        (14, "json-100000-deep-in-a-tensor", weights(&format!("{{\"a\":{}", "{\"b\":".repeat(100_000)), 0)),
        (14, "negative-offset", of(f32s("a", "-8", "0"), 8)),
        (14, "fractional-offset", of(f32s("a", "0", "8.0"), 8)),
        (14, "offset-beyond-64-bits", of(f32s("a", "0", "99999999999999999999"), 8)),
        (14, "names-that-drive-a-terminal", of(f32s("\\u001b[2J\\u0007\\u009b31m", "8", "0"), 8)),
        (14, "no-utf-8", [1u64.to_le_bytes().as_slice(), b"\xFF"].concat()),
        (15, "sum-that-overflows", of(f32s("a", "18446744073709551607", huge), 8)),
        (15, "sizes-that-overflow", two(tensor("b", "U8", &format!("[{huge}]"), "8", huge), 8)),
    ] {
        table.made(case, name, |folder| {
            sound(folder);
            write(&folder.join("model.safetensors"), bytes);
        });
    }
    table.made(12, "needed-tensor-in-another-dtype", |folder| {
        sound(folder);
        let bytes = fs::read(folder.join("model.safetensors")).unwrap();
        let mut bytes = bytes;
        let at = bytes.windows(4).position(|w| w == b"BF16").unwrap();
        bytes[at..at + 4].copy_from_slice(b"I16\"");
        bytes.copy_within(at + 5.., at + 4);
        let last = bytes.len() - 1;
        // The header keeps its length: a space takes the place of the letter less.
        let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        bytes.copy_within(8 + n - 1..last, 8 + n);
        bytes[8 + n - 1] = b' ';
        write(&folder.join("model.safetensors"), bytes);
    });
    table.check();
}

/// As large as a header may be, of what takes most memory once it is parsed.
#[test]
fn headers_of_100_megabytes() {
    let mut table = Table::new("folder-large-headers");
    let limit = 100_000_000usize;
    table.made(14, "a-byte-too-long", |folder| {
        sound(folder);
        let file = File::create(folder.join("model.safetensors")).unwrap();
        file.set_len(limit as u64 + 9).unwrap();
        (&file).write_all(&(limit as u64 + 1).to_le_bytes()).unwrap();
    });
    for (name, begin, piece, end) in [
        ("one-shape-of-50-million-numbers", "{\"a\":{\"shape\":[0", ",0", "]}}"),
        ("numbers-where-tensors-belong", "{\"a\":[0", ",0", "]}"),
        ("empty-lists", "{\"a\":[[]", ",[]", "]}"),
        ("metadata-of-numbers", "{\"__metadata__\":{\"a\":[0", ",0", "]}}"),
        ("unknown-fields", "{\"a\":{\"dtype\":\"F32\"", ",\"b\":1", "}}"),
        ("a-long-name", "{\"", "aa", "\":0}"),
    ] {
        table.made(14, name, |folder| {
            sound(folder);
            let mut file = BufWriter::new(File::create(folder.join("model.safetensors")).unwrap());
            let n = (limit - begin.len() - end.len()) / piece.len();
            let length = begin.len() + n * piece.len() + end.len();
            file.write_all(&(length as u64).to_le_bytes()).unwrap();
            file.write_all(begin.as_bytes()).unwrap();
            (0..n).for_each(|_| file.write_all(piece.as_bytes()).unwrap());
            file.write_all(end.as_bytes()).unwrap();
            file.flush().unwrap();
        });
    }
    table.check();
}

#[test]
fn configurations() {
    let mut table = Table::new("folder-configurations");
    for (case, key, value) in [
        (13, "num_attention_heads", json!(0)),
        (13, "num_key_value_heads", json!(3)),
        (13, "num_hidden_layers", json!(0)),
        (13, "num_hidden_layers", json!(u64::MAX)),
        (13, "hidden_size", json!(-1)),
        (13, "hidden_size", json!(1.5)),
        (13, "head_dim", json!(7)),
        (13, "head_dim", json!(32)),
        (13, "vocab_size", json!(0)),
        (13, "eos_token_id", json!(300)),
        (13, "rope_theta", json!(0.0)),
        (13, "rms_norm_eps", json!("small")),
        (18, "intermediate_size", json!(64)),
        (18, "num_hidden_layers", json!(3)),
        (18, "num_hidden_layers", json!(1)),
        (18, "tie_word_embeddings", json!(false)),
    ] {
        table.made(case, &format!("{key}-{value}").replace(['"', '.'], "_"), |folder| {
            sound(folder);
            let mut config: Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
            config[key] = value;
            write(&folder.join("config.json"), config.to_string());
        });
    }
    for (name, config) in [
        ("deep-config", "[".repeat(100_000)),
        ("key-twice", "{\"hidden_size\":16,\"hidden_size\":64}".to_owned()),
        ("no-object", "7".to_owned()),
        ("large-config", format!("{{\"a\":[0{}]}}", ",0".repeat(4 << 20))),
    ] {
        table.made(14, name, |folder| {
            sound(folder);
            write(&folder.join("config.json"), config);
        });
    }
    for name in ["config.json", "generation_config.json", "tokenizer_config.json"] {
        // What never ends must not be read to its end.
        table.made(17, &format!("{name}-is-a-device"), |folder| {
            sound(folder);
            let _ = fs::remove_file(folder.join(name));
            symlink("/dev/zero", folder.join(name)).unwrap();
        });
    }
    table.made(18, "no-config", |folder| {
        sound(folder);
        fs::remove_file(folder.join("config.json")).unwrap();
    });
    table.check();
}

/// The model with its weights as `one.safetensors`, and an index that a change was made to.
fn indexed(folder: &Path, change: impl FnOnce(&str, &mut Map<String, Value>)) {
    sound(folder);
    let header = header_of(folder);
    fs::rename(folder.join("model.safetensors"), folder.join("one.safetensors")).unwrap();
    let mut map = header.keys().map(|n| (n.clone(), json!("one.safetensors"))).collect();
    change(header.keys().next().unwrap(), &mut map);
    write(&folder.join("model.safetensors.index.json"), json!({"weight_map": map}).to_string());
}

#[test]
fn shards_that_lead_out() {
    let mut table = Table::new("folder-paths");
    let names = ["../../etc/passwd", "/etc/passwd", "..", "", "sub/one.safetensors", "one.safetensors\u{0}"];
    for (i, name) in names.into_iter().enumerate() {
        table.made(17, &format!("index-path-{i}"), |folder| {
            indexed(folder, |first, map| drop(map.insert(first.into(), json!(name))));
        });
    }
    for name in ["model.safetensors", "config.json", "tokenizer_config.json"] {
        table.made(17, &format!("{name}-leads-out"), |folder| {
            sound(folder);
            fs::remove_file(folder.join(name)).unwrap();
            // A sound file, but another model's.
            symlink(model(&llama()).join(name), folder.join(name)).unwrap();
        });
    }
    let sound_model = model(&llama());
    table.made(17, "index-leads-out", |folder| {
        indexed(folder, |_, _| ());
        let index = folder.join("model.safetensors.index.json");
        fs::remove_file(&index).unwrap();
        symlink("/etc/passwd", index).unwrap();
    });
    // The hub cache's own links are allowed.
    let cache = table.folder().join("cache");
    let (blobs, snapshot) = (cache.join("blobs"), cache.join("snapshots/abc"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        fs::copy(sound_model.join(name), blobs.join(name)).unwrap();
        symlink(Path::new("../../blobs").join(name), snapshot.join(name)).unwrap();
    }
    table.ends(0, 0, 17, "hub-cache", &["inspect", text(&snapshot)]);
    table.check();
}

#[test]
fn shards_that_disagree() {
    let mut table = Table::new("folder-shards");
    table.made(18, "missing-shard", |folder| {
        indexed(folder, |first, map| drop(map.insert(first.into(), json!("two.safetensors"))));
    });
    table.made(18, "tensor-that-is-nowhere", |folder| {
        indexed(folder, |_, map| drop(map.insert("nothing".into(), json!("one.safetensors"))));
    });
    table.made(18, "tensor-in-two-shards", |folder| {
        indexed(folder, |first, map| drop(map.insert(first.into(), json!("two.safetensors"))));
        fs::copy(folder.join("one.safetensors"), folder.join("two.safetensors")).unwrap();
    });
    table.made(18, "placed-twice", |folder| {
        indexed(folder, |_, _| ());
        let index = folder.join("model.safetensors.index.json");
        let text = fs::read_to_string(&index).unwrap();
        write(&index, text.replacen(":{", ":{\"model.norm.weight\":\"two.safetensors\",", 1));
    });
    table.made(18, "no-weight-map", |folder| {
        indexed(folder, |_, _| ());
        write(&folder.join("model.safetensors.index.json"), "{\"metadata\":{}}");
    });
    table.made(18, "no-weights", |folder| {
        sound(folder);
        fs::remove_file(folder.join("model.safetensors")).unwrap();
    });
    table.check();
}

#[test]
fn pickles() {
    let mut table = Table::new("folder-pickles");
    table.made(19, "folder-of-a-pickle", |folder| {
        sound(folder);
        fs::rename(folder.join("model.safetensors"), folder.join("pytorch_model.bin")).unwrap();
    });
    for extension in ["bin", "pt", "pth", "ckpt"] {
        table.file(19, "pickle", extension, b"\x80\x02}q\x00.");
    }
    table.file(19, "weights-alone", "safetensors", &weights("{}", 0));
    table.check();
}
