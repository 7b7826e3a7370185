//! Damaged, mixed and forged split directories: a typed error with exit code 4 that names the file, never a panic,
//! never an answer.

use crate::support::forge::{self, Layer};
use crate::support::{
    copy, fails, json, llama, medium, model, needed_bytes, ok, profile, qwen_relu, request, split, text,
};
use std::fs;
use std::path::{Path, PathBuf};
use thermocline_runtime::Mode;
use thermocline_split::{Error, FORMAT_VERSION, LayerFile, Split};

fn whole() -> PathBuf {
    split(&llama(), "bf16", &["--chunk-neurons", "8"])
}

/// That opening fails, and blames `path`.
fn refused(dir: &Path, path: &Path, what: &str) -> Error {
    match Split::open(dir) {
        Ok(_) => panic!("{what}: opened"),
        Err(e) => {
            assert!(e.to_string().contains(text(path)), "{what}: {e} does not name {}", path.display());
            assert!(matches!(e, Error::Corrupt { .. } | Error::UnsupportedVersion { .. }), "{what}: {e:?}");
            e
        }
    }
}

fn refused_by_the_program(dir: &Path, named: &str) {
    for verb in
        [&["run", "-p", "a", "-n", "2", "-m", text(dir)][..], &["inspect", text(dir)], &["plan", "-m", text(dir)]]
    {
        let message = fails(4, verb);
        assert!(message.contains(named), "{verb:?}: {message}");
    }
}

#[test]
fn every_damaged_byte_of_the_manifest_is_found() {
    let (_guard, dir) = copy(&whole());
    let path = dir.join("manifest.json");
    let good = fs::read(&path).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        fs::write(&path, &bad).unwrap();
        refused(&dir, &path, &format!("byte {at} of {}", good.len()));
    }
    refused_by_the_program(&dir, "manifest.json");
    for end in [0, 1, good.len() / 2, good.len() - 1] {
        fs::write(&path, &good[..end]).unwrap();
        refused(&dir, &path, &format!("cut at {end}"));
    }
    fs::write(&path, [&good[..], b"\n"].concat()).unwrap();
    refused(&dir, &path, "a byte more");
    fs::write(&path, "[".repeat(100_000)).unwrap();
    refused(&dir, &path, "deep nesting");
}

#[test]
fn every_damaged_byte_of_header_order_and_index_is_found() {
    let (_guard, dir) = copy(&whole());
    let path = dir.join("layers/001.thm");
    let good = Layer::read(&path);
    for at in 0..good.tables()[2] {
        let mut bad = good.bytes.clone();
        bad[at] ^= 1 << (at % 8);
        fs::write(&path, &bad).unwrap();
        refused(&dir, &path, &format!("byte {at}"));
    }
    refused_by_the_program(&dir, "001.thm");
}

#[test]
fn every_file_cut_longer_or_missing_is_found() {
    let (_guard, dir) = copy(&whole());
    for (name, good) in crate::support::files(&dir) {
        let path = dir.join(&name);
        for bad in [Some(&good[..good.len() - 1]), Some(&good[..good.len() / 2]), Some(&[]), None] {
            match bad {
                Some(bytes) => fs::write(&path, bytes).unwrap(),
                None => fs::remove_file(&path).unwrap(),
            }
            // The tokenizer is read by those who need it, the rest by everyone.
            let message = fails(4, &["run", "-m", text(&dir), "-p", "a", "-n", "2", "--chat"]);
            assert!(message.contains(name.as_str()) || name == "manifest.json", "{name}: {message}");
            let checkpoint = model(&llama());
            let message = fails(4, &["verify", text(&dir), "-m", text(&checkpoint)]);
            assert!(message.contains(name.as_str()) || name == "manifest.json", "{name}: {message}");
        }
        fs::write(&path, [&good[..], b"x"].concat()).unwrap();
        fails(4, &["run", "-m", text(&dir), "-p", "a", "-n", "2", "--chat"]);
        fs::write(&path, &good).unwrap();
    }
    ok(&["run", "-m", text(&dir), "-p", "a", "-n", "2", "--chat"]);
}

#[test]
fn every_damaged_chunk_is_named_by_layer_and_neurons() {
    // The tiny model compressed is smaller than the buffers of a stream.
    let compressed = split(&medium(), "bf16", &["--chunk-neurons", "16", "--zstd-level", "1"]);
    for (dir, made, neurons) in [(whole(), llama(), 8), (compressed, medium(), 16)] {
        let (_guard, dir) = copy(&dir);
        let (source, n) = (model(&made), made.model.intermediate_size / neurons);
        let resident = ["run", "-m", text(&dir), "-p", "the lake", "-n", "3", "--ignore-eos"];
        let budget = format!("{}B", needed_bytes(&resident));
        let streamed =
            ["run", "-m", text(&dir), "-p", "the lake", "-n", "3", "--ignore-eos", "--ram-budget", &budget, "--json"];
        assert!(json(&streamed)["bytes_per_token"]["disk"].as_u64().unwrap() > 0, "the budget streams");
        for (layer, chunk) in [(0, 0), (0, n - 1), (1, n / 2)] {
            let path = dir.join(format!("layers/{layer:03}.thm"));
            let good = Layer::read(&path);
            let mut bad = Layer { bytes: good.bytes.clone() };
            let place = bad.chunk(chunk);
            let at = (place.start + place.end) / 2;
            bad.bytes[at] ^= 4;
            bad.write(&path);
            let named = format!("layer {layer}, neurons {}..{}", chunk * neurons, (chunk + 1) * neurons);
            for args in [&resident[..], &streamed, &["verify", text(&dir), "-m", text(&source)]] {
                let message = fails(4, args);
                assert!(
                    message.contains(&named) && message.contains(&format!("{layer:03}.thm")),
                    "{args:?}: {message}"
                );
            }
            good.write(&path);
        }
    }
}

#[test]
fn damaged_tensors_are_named() {
    let (_guard, dir) = copy(&whole());
    let checkpoint = model(&llama());
    let split = Split::open(&dir).unwrap();
    let part = format!("{}B", 40_000 + needed_bytes(&["run", "-m", text(&dir), "-p", "a", "-n", "2"]));
    for (file, flags) in [
        (split.resident(), &["--mode", "exact"][..]),
        // Matrices that are streamed or only partly in memory are checked too, when they are first read.
        (split.resident(), &["--mode", "exact", "--ram-budget", &part]),
        (split.resident(), &["--mode", "exact", "--check-tensors"]),
        (split.predictors(), &["--mode", "sparse", "--active", "0.5"]),
    ] {
        for tensor in file.tensors() {
            let good = fs::read(file.path()).unwrap();
            let mut bad = good.clone();
            bad[(tensor.offset + tensor.bytes / 2) as usize] ^= 1;
            fs::write(file.path(), bad).unwrap();
            for args in [
                &[&["run", "-m", text(&dir), "-p", "a", "-n", "2"], flags].concat()[..],
                &["verify", text(&dir), "-m", text(&checkpoint)],
            ] {
                let message = fails(4, args);
                assert!(message.contains(tensor.name.as_str()), "{args:?}: {message}");
            }
            fs::write(file.path(), good).unwrap();
        }
    }
}

#[test]
fn forged_orders_are_no_permutations() {
    let (_guard, dir) = copy(&whole());
    let path = dir.join("layers/000.thm");
    let good = Layer::read(&path);
    let [order, index, end] = good.tables();
    for (at, id, said) in
        [(order, good.u32_at(order + 4), "twice"), (order + 8, 192, "order[2]"), (index - 4, u32::MAX, "order[191]")]
    {
        let mut bad = Layer { bytes: good.bytes.clone() };
        bad.put(at, &id.to_le_bytes()).seal(end).write(&path);
        assert!(refused(&dir, &path, said).to_string().contains(said));
        refused_by_the_program(&dir, "000.thm");
    }
}

/// Lengths that wrap around where they are multiplied.
#[test]
fn tensors_wider_than_any_model_are_refused() {
    let (_guard, dir) = copy(&split(&llama(), "q4", &[]));
    let good = fs::read(dir.join("manifest.json")).unwrap();
    for columns in [usize::MAX, usize::MAX - 31, usize::MAX / 4 + 1, 1 << 33] {
        for file in 0..3 {
            let mut name = String::new();
            forge::manifest(&dir, |m| {
                let file = [&mut m.resident, &mut m.predictors, &mut m.statistics].into_iter().nth(file).unwrap();
                name.clone_from(&file.file);
                file.tensors[0].columns = columns;
            });
            refused(&dir, &dir.join(&name), &format!("{columns} columns"));
            fs::write(dir.join("manifest.json"), &good).unwrap();
        }
    }
    Split::open(&dir).unwrap();
}

#[test]
fn forged_headers_and_indices_are_refused_before_anything_is_allocated() {
    let (_guard, dir) = copy(&whole());
    let path = dir.join("layers/000.thm");
    let good = Layer::read(&path);
    let [_, index, end] = good.tables();
    let header: &[(usize, &[u32])] = &[
        (8, &[0, 2, 3, u32::MAX]),          // version
        (56, &[1, 192, u32::MAX]),          // zero
        (68, &[1, u32::MAX]),               // zero
        (12, &[1, u32::MAX]),               // layer
        (16, &[0, 191, 1 << 24, u32::MAX]), // n_neurons
        (20, &[0, 32, 1 << 20, u32::MAX]),  // hidden_size
        (24, &[0, 2, 9, u32::MAX]),         // encoding
        (28, &[0, 7, 193, u32::MAX]),       // chunk_neurons
        (32, &[0, 23, u32::MAX]),           // n_chunks
        (36, &[0, 1, u32::MAX]),            // bundle_bytes
        (40, &[0, 80, u32::MAX]),           // data_offset
        (48, &[0, u32::MAX]),               // file_bytes
    ];
    let entries: &[(usize, &[u32])] = &[
        (0, &[0, 1, u32::MAX]),
        (4, &[u32::MAX]),
        (8, &[0, 1, u32::MAX]),
        (12, &[1, 2, u32::MAX]),
        (16, &[0, 9, u32::MAX]),
    ];
    let entries = entries.iter().flat_map(|(at, v)| [(index + at, *v), (index + 32 * 11 + at, *v)]);
    for (at, values) in header.iter().copied().chain(entries) {
        for value in values {
            let mut bad = Layer { bytes: good.bytes.clone() };
            bad.put(at, &value.to_le_bytes()).seal(end).write(&path);
            // What the file alone cannot tell: a stored chunk that says it is compressed (found when it is read), and
            // another layer's number. The manifest tells those too.
            if let Ok(opened) = LayerFile::open(&path) {
                let codec = at >= index && (at - index) % 32 == 12 && *value == 1;
                assert!(codec || at == 12, "{value} at {at}");
                let mut bundles = vec![0; 192 * 384];
                let read = opened.read_chunks(0..24, &mut bundles);
                assert!(!codec || matches!(read, Err(Error::CorruptChunk { layer: 0, .. })), "{read:?}");
            }
            refused(&dir, &path, &format!("{value} at {at}"));
        }
    }
    good.write(&path);
    Split::open(&dir).unwrap();
}

#[test]
fn forged_chunks_that_are_no_frames_are_found_when_they_are_read() {
    let (_guard, dir) = copy(&split(&qwen_relu(), "bf16", &["--chunk-neurons", "24", "--zstd-level", "3"]));
    let path = dir.join("layers/000.thm");
    let good = Layer::read(&path);
    let place = good.chunk(2);
    for (at, value) in
        [(place.start, 0), (place.start + 4, 0xff), (place.end - 1, 0x55), ((place.start + place.end) / 2, 0xaa)]
    {
        let mut bad = Layer { bytes: good.bytes.clone() };
        bad.bytes[at] ^= value | 1;
        let end = bad.tables()[2];
        bad.seal_chunk(2).seal(end).write(&path);
        let mut bundles = vec![0; 192 * 384];
        // A frame may also decode to other weights of the right length: then no check but the checksum could tell.
        if let Err(e) = LayerFile::open(&path).unwrap().read_chunks(0..8, &mut bundles) {
            assert!(matches!(e, Error::CorruptChunk { layer: 0, first: 48, end: 72, .. }), "{e}");
        } else {
            assert!(at != place.start, "the frame's magic number is gone");
        }
    }
}

#[test]
fn forged_manifests_are_refused() {
    let good = whole();
    let least = needed_bytes(&["run", "-m", text(&good), "-p", "a", "-n", "2", "--mode", "sparse", "-t", "1"]);
    let budget = format!("{}B", least + 1000);
    let forged = |what: &str, change: &dyn Fn(&mut thermocline_split::Manifest)| {
        let (_guard, dir) = copy(&good);
        forge::manifest(&dir, change);
        let mode = Mode::Sparse { active: 0.5 };
        let result = crate::support::engine(&dir, request(mode, Some(800_000), 2));
        assert!(result.is_err(), "{what}: loaded");
        let message = fails(
            4,
            &["run", "-m", text(&dir), "-p", "a", "-n", "2", "--mode", "sparse", "--ram-budget", &budget, "-t", "1"],
        );
        assert!(message.contains(text(&dir)), "{what}: {message}");
    };
    for name in
        ["../../etc/passwd", "/etc/passwd", "layers/../../x", "", ".", "layers//000.thm", "..\\x", "./layers/000.thm"]
    {
        forged(name, &|m| m.layers[0].file = name.to_owned());
        forged(name, &|m| m.resident.file = name.to_owned());
        forged(name, &|m| m.files[0].file = name.to_owned());
    }
    forged("layers swapped", &|m| m.layers.swap(0, 1));
    forged("a layer less", &|m| drop(m.layers.pop()));
    forged("no layers", &|m| {
        m.layers.clear();
        m.config.n_layers = 0;
    });
    forged("another encoding", &|m| m.packing.ffn_encoding = "q8".to_owned());
    forged("n_heads 0", &|m| m.config.n_heads = 0);
    forged("n_kv_heads 0", &|m| m.config.n_kv_heads = 0);
    forged("n_kv_heads 3", &|m| m.config.n_kv_heads = 3);
    forged("head_dim 0", &|m| m.config.head_dim = 0);
    forged("head_dim odd", &|m| m.config.head_dim = 15);
    forged("head_dim huge", &|m| m.config.head_dim = usize::MAX / 2);
    forged("vocab_size 0", &|m| m.config.vocab_size = 0);
    forged("vocab_size huge", &|m| m.config.vocab_size = usize::MAX);
    forged("hidden_size 96", &|m| m.config.hidden_size = 96);
    forged("intermediate_size 64", &|m| m.config.intermediate_size = 64);
    forged("rms_norm_eps NaN or rope_theta 0", &|m| m.config.rope_theta = 0.0);
    forged("a head of its own", &|m| m.config.tie_word_embeddings = false);
    forged("biases", &|m| m.config.qkv_bias = true);
    forged("a tensor renamed", &|m| m.resident.tensors[1].name = "x".to_owned());
    forged("a tensor less", &|m| drop(m.resident.tensors.pop()));
    forged("rows that overflow", &|m| m.resident.tensors[0].rows = usize::MAX);
    forged("columns that overflow", &|m| m.resident.tensors[0].columns = usize::MAX - 1);
    forged("an offset past the end", &|m| m.resident.tensors[0].offset = u64::MAX - 3);
    forged("bytes", &|m| m.predictors.tensors[0].bytes += 1);
    forged("a shape turned over", &|m| {
        let t = &mut m.predictors.tensors[2];
        (t.rows, t.columns) = (t.columns, t.rows);
        m.predictors.tensors[0].checksum = "0".repeat(16);
    });
    forged("a rate of another length", &|m| {
        let tensors = &mut m.statistics.tensors;
        let at = tensors.iter().position(|t| t.name == "layers.0.activation_rate").unwrap();
        tensors[at].name = "layers.0.energy".to_owned();
    });
    forged("a trace of another length", &|m| m.config.n_layers = 3);
}

#[test]
fn a_newer_version_is_told_apart_from_damage() {
    let (_guard, dir) = copy(&whole());
    forge::manifest(&dir, |m| m.version = FORMAT_VERSION + 1);
    let path = dir.join("manifest.json");
    let newest = u64::from(FORMAT_VERSION);
    let is_newer =
        |e: Error| matches!(e, Error::UnsupportedVersion { got, max, .. } if (got, max) == (newest + 1, newest));
    assert!(is_newer(refused(&dir, &path, "a newer version")));
    // With fields that this version does not know.
    let text_of = fs::read_to_string(&path).unwrap().replace("\"packing\": {", "\"planes\": 3, \"packing\": {");
    fs::write(&path, text_of).unwrap();
    assert!(is_newer(refused(&dir, &path, "a newer version")));
    assert!(fails(4, &["inspect", text(&dir)]).contains("update thermocline"));
}

#[test]
fn files_of_two_splits_do_not_mix() {
    let (_guard, dir) = copy(&whole());
    let other = split(&llama(), "q4", &["--chunk-neurons", "16", "--order", "random"]);
    for name in ["layers/000.thm", "layers/001.thm"] {
        let good = fs::read(dir.join(name)).unwrap();
        fs::copy(other.join(name), dir.join(name)).unwrap();
        refused(&dir, &dir.join(name), name);
        fs::write(dir.join(name), good).unwrap();
    }
    let random = split(&llama(), "bf16", &["--chunk-neurons", "8", "--order", "random"]);
    fs::copy(random.join("layers/000.thm"), dir.join("layers/000.thm")).unwrap();
    let message = fails(4, &["run", "-m", text(&dir), "-p", "a", "-n", "2"]);
    assert!(message.contains("000.thm"), "the same shape in another order: {message}");
}

#[test]
fn what_was_made_from_another_model_is_refused_by_digest() {
    let (dir, other) = (whole(), model(&qwen_relu()));
    let message = fails(4, &["verify", text(&dir), "-m", text(&other)]);
    assert!(message.contains("digest"), "{message}");
    let folder = tempfile::TempDir::new().unwrap();
    let out = folder.path().join("split");
    let profile = profile(&llama());
    let message = fails(4, &["split", "-m", text(&other), "--profile", text(&profile), "-o", text(&out)]);
    assert!(message.contains("digest") && !out.exists(), "{message}");
    // One byte of the model's tokenizer is another model.
    let changed = folder.path().join("model");
    crate::support::copy_dir(&model(&llama()), &changed);
    let tokenizer = fs::read_to_string(changed.join("tokenizer.json")).unwrap();
    fs::write(changed.join("tokenizer.json"), tokenizer + " ").unwrap();
    assert!(fails(4, &["verify", text(&dir), "-m", text(&changed)]).contains("digest"));
    // And one bit of its weights.
    crate::support::copy_dir(&model(&llama()), &changed);
    let weights = changed.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    assert!(fails(4, &["verify", text(&dir), "-m", text(&changed)]).contains("digest"));
}

/// That `run` warns of `flaw` and answers all the same, and that `--check-tensors` refuses.
fn flawed(dir: &Path, flaw: &str) {
    let answer = ["run", "-m", text(dir), "-p", "the lake", "-n", "2", "--ignore-eos", "--temp", "0"];
    let warned = ok(&answer).stderr;
    assert!(warned.contains(&format!("warning: {flaw}")), "{flaw}: {warned}");
    assert_eq!(json(&[&answer[..], &["--json"]].concat())["warnings"], serde_json::json!([flaw]));
    let message = fails(4, &[&answer[..], &["--check-tensors"]].concat());
    assert!(message.contains(flaw) && message.contains(text(dir)), "{flaw}: {message}");
}

#[test]
fn weights_that_are_not_finite_are_named_by_tensor_and_neuron() {
    let checkpoint = model(&llama());
    // Bytes of a bundle of 64 columns; the sixth of the fourth chunk of eight neurons.
    for (encoding, bundle, column_7_of_up, values) in
        [("bf16", 384, 128 + 14, [0x7fc0u16, 0xff80]), ("q8", 208, 196, [0x7e00, 0x7c00])]
    {
        for value in values {
            let (_guard, dir) = copy(&split(&llama(), encoding, &["--chunk-neurons", "8"]));
            let id = Split::open(&dir).unwrap().layers()[1].order()[3 * 8 + 5];
            forge::chunk(&dir, 1, 3, 5 * bundle + column_7_of_up, &value.to_le_bytes());
            let column = if encoding == "bf16" { 7 } else { 0 };
            let name = "model.layers.1.mlp.up_proj.weight";
            flawed(&dir, &format!("{name}: layer 1, neuron {id}: the weight at [{id}, {column}] is not finite"));
            let message = fails(4, &["verify", text(&dir), "-m", text(&checkpoint)]);
            let index = id as usize * 64 + column;
            assert!(message.contains(name) && message.contains(&format!("at index {index},")), "{message}");
            if encoding == "q8" {
                // So small that it fits wherever the disk's buffers would.
                continue;
            }
            // What a small budget leaves on disk is only looked at when it is asked for.
            let budget = format!("{}B", needed_bytes(&["run", "-m", text(&dir), "-p", "a", "-n", "2"]));
            let small = ["run", "-m", text(&dir), "-p", "a", "-n", "2", "--ram-budget", &budget];
            assert!(!ok(&small).stderr.contains("not finite"));
            assert!(fails(4, &[&small[..], &["--check-tensors"]].concat()).contains(name));
        }
    }
}

#[test]
fn matrices_of_zeros_are_named() {
    let (_guard, dir) = copy(&split(&llama(), "q4", &["--chunk-neurons", "16", "--order", "random"]));
    let name = "model.layers.0.self_attn.k_proj.weight";
    // Rows of 64 codes, two scales, and what fills them up to 80 bytes.
    forge::tensor(&dir, name, |bytes| bytes.chunks_exact_mut(80).for_each(|row| row[64..68].fill(0)));
    flawed(&dir, &format!("{name}: every weight is zero"));
}

#[test]
fn verify_names_what_is_not_finite_in_the_checkpoint_itself() {
    let (guard, dir) = copy(&whole());
    let source = guard.path().join("model");
    crate::support::copy_dir(&model(&llama()), &source);
    let (name, row, column) = ("model.layers.0.self_attn.o_proj.weight", 3, 9);
    let infinite = 0x7f80u16.to_le_bytes();
    let path = source.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let tensors: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let start = 8 + header + tensors[name]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[start + 2 * (row * 64 + column)..][..2].copy_from_slice(&infinite);
    fs::write(&path, bytes).unwrap();
    forge::tensor(&dir, name, |bytes| bytes[2 * (row * 64 + column)..][..2].copy_from_slice(&infinite));
    let digest = thermocline_datasets::open_checkpoint(&source).unwrap().digest().unwrap();
    forge::manifest(&dir, |m| m.source.model_digest = digest);
    let said = ok(&["verify", text(&dir), "-m", text(&source)]).stdout;
    assert!(
        said.contains(&format!("warning: {name} has a value that is not finite at index {}", row * 64 + column)),
        "{said}"
    );
    flawed(&dir, &format!("{name}: the weight at [{row}, {column}] is not finite"));
}
