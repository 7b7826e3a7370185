//! What the program says of splits and deltas that are damaged, forged or of another model (cases 16, 20, 21, 24 and 25),
//! what memory it takes to find out, and that the library says the same.

use crate::harness::Table;
use crate::support::forge::{self, Layer};
use crate::support::{
    copy_dir, demo, engine_at, engine_of, files, llama, model, needed_bytes, profile, qwen_relu, request, split, text,
};
use std::fs;
use std::path::{Path, PathBuf};
use thermocline_datasets::open_checkpoint;
use thermocline_runtime::Mode;
use thermocline_split::delta::Delta;
use thermocline_split::{Precision, Split, verify};

/// A split in a known order: a measured one may differ from CPU to CPU.
fn whole(encoding: &str) -> PathBuf {
    split(&llama(), encoding, &["--chunk-neurons", "8", "--order", "random"])
}

/// Makes `dir` a copy of `from`, whatever was done to it.
fn restore(from: &Path, dir: &Path) {
    let _ = fs::remove_dir_all(dir);
    copy_dir(from, dir);
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

/// What the library says when the whole model is loaded.
fn library(dir: &Path, precision: Precision) -> String {
    engine_at(dir, precision, request(Mode::Exact, None, 1)).err().unwrap().to_string()
}

/// Case, name, and what is done to a split.
type Damage<'a> = (u8, &'a str, &'a dyn Fn(&Path));

#[test]
fn splits_that_cannot_be_opened() {
    let mut table = Table::new("split-open");
    let dir = table.folder().join("SPLIT");
    let (order, index, end) = {
        let tables = Layer::read(&whole("q4").join("layers/001.thm")).tables();
        (tables[0], tables[1], tables[2])
    };
    let layer = |dir: &Path| dir.join("layers/001.thm");
    let with_order = |dir: &Path, at: usize, id: u32| {
        let mut file = Layer::read(&layer(dir));
        file.put(at, &id.to_le_bytes()).seal(end);
        forge::plane(dir, 1, 0, &file);
    };
    let damages: &[Damage<'_>] = &[
        (20, "manifest-syntax", &|dir| flip(&dir.join("manifest.json"), 0)),
        (20, "manifest-value", &|dir| {
            let path = dir.join("manifest.json");
            let (was, now) = ("\"chunk_neurons\": 8", "\"chunk_neurons\": 9");
            let manifest = fs::read_to_string(&path).unwrap();
            assert!(manifest.contains(was));
            fs::write(path, manifest.replace(was, now)).unwrap();
        }),
        (20, "header", &|dir| flip(&layer(dir), 20)),
        (20, "order", &|dir| flip(&layer(dir), order + 40)),
        (20, "index", &|dir| flip(&layer(dir), index + 40)),
        (24, "neuron-twice", &|dir| {
            let first = Layer::read(&layer(dir)).u32_at(order);
            with_order(dir, order + 4, first);
        }),
        (24, "no-such-neuron", &|dir| with_order(dir, order + 8, 192)),
        (25, "file-of-another-split", &|dir| {
            let other = split(&llama(), "q4", &["--chunk-neurons", "16", "--order", "random"]);
            fs::copy(layer(&other), layer(dir)).map(drop).unwrap();
        }),
    ];
    for (case, name, damage) in damages {
        restore(&whole("q4"), &dir);
        damage(&dir);
        let error = library(&dir, Precision::Base);
        for args in [
            &["inspect", text(&dir)][..],
            &["plan", "-m", text(&dir), "-t", "1"],
            &["run", "-m", text(&dir), "-p", "a", "-t", "1"],
        ] {
            let said = table.refused(*case, name, &dir, args);
            assert!(said.contains(&error), "{name}: {said}, but the library: {error}");
        }
    }
    table.check();
}

#[test]
fn splits_with_damaged_weights() {
    let mut table = Table::new("split-weights");
    let (dir, checkpoint) = (table.folder().join("SPLIT"), model(&llama()));
    let run = ["run", "-m", text(&dir), "-p", "a", "-n", "2", "-t", "1"];
    let verifying = ["verify", text(&dir), "-m", text(&checkpoint)];
    let sparse = [&run[..], &["--mode", "sparse", "--active", "0.5"]].concat();
    let exact = [&run[..], &["--precision", "exact"]].concat();
    restore(&whole("bf16"), &dir);
    let budget = format!("{}B", needed_bytes(&run));
    let streamed = [&run[..], &["--ram-budget", &budget]].concat();
    let in_chunk = |dir: &Path, file: &str, c: usize| {
        let path = dir.join(file);
        let place = Layer::read(&path).chunk(c);
        flip(&path, (place.start + place.end) / 2);
    };
    let in_tensor = |dir: &Path, name: &str| {
        let split = Split::open(dir).unwrap();
        let stored = [split.resident(), split.predictors()];
        let found = stored.iter().find_map(|f| Some((f.path(), f.tensors().iter().find(|t| t.name == name)?)));
        let (path, tensor) = found.unwrap();
        flip(path, (tensor.offset + tensor.bytes / 2) as usize);
    };
    let matrix = |dir: &Path| in_tensor(dir, "model.layers.1.self_attn.k_proj.weight");
    let predictor = |dir: &Path| in_tensor(dir, "predictors.0.neurons");
    let not_finite = |dir: &Path| forge::chunk(dir, 1, 3, 128 + 14, &0x7fc0u16.to_le_bytes());
    let hot = |dir: &Path| in_chunk(dir, "layers/000.hot.thm", 0);
    type Case<'a> = (u8, &'a str, &'a str, &'a dyn Fn(&Path), &'a [&'a [&'a str]]);
    let cases: &[Case<'_>] = &[
        (16, "not-finite", "bf16", &not_finite, &[&[&run[..], &["--check-tensors"]].concat()]),
        (20, "matrix", "bf16", &matrix, &[&run, &streamed, &verifying]),
        (20, "predictor", "bf16", &predictor, &[&sparse, &verifying]),
        (20, "hot-neurons", "q4,hot@0.25=q8", &hot, &[&run, &verifying]),
        (21, "chunk", "bf16", &|dir| in_chunk(dir, "layers/001.thm", 12), &[&run, &streamed, &verifying]),
        (21, "chunk-of-a-plane", "q4+exact", &|dir| in_chunk(dir, "layers/001.coarse.thm", 12), &[&exact, &verifying]),
    ];
    for (case, name, encoding, damage, runs) in cases {
        restore(&whole(encoding), &dir);
        damage(&dir);
        for args in *runs {
            let said = table.refused(*case, name, &dir, args);
            let mode = if args.contains(&"sparse") { Mode::Sparse { active: 0.5 } } else { Mode::Exact };
            let precision = if args.contains(&"exact") { Precision::Exact } else { Precision::Base };
            let error = if args.contains(&"--check-tensors") {
                Split::open(&dir).unwrap().check_weights(&|_, _| ()).unwrap_err().to_string()
            } else if args[0] == "verify" {
                let opened = open_checkpoint(&checkpoint).unwrap();
                let split = Split::open_at(&dir, Precision::Exact).unwrap();
                verify(split, opened.as_ref(), &|_, _| ()).unwrap_err().to_string()
            } else {
                engine_at(&dir, precision, request(mode, None, 1)).err().unwrap().to_string()
            };
            assert!(said.contains(&error), "{name}: {said}, but the library: {error}");
        }
    }
    table.check();
}

#[test]
fn deltas_that_are_damaged_or_of_another_base() {
    let mut table = Table::new("delta-damage");
    let (dir, base) = (table.folder().join("DELTA"), table.folder().join("BASE"));
    let link = |to: &Path| {
        let _ = fs::remove_file(&base);
        std::os::unix::fs::symlink(to, &base).unwrap();
    };
    let open = |on: &Path| {
        let split = Split::open_at(on, Precision::Exact).unwrap();
        Delta::open(&dir).and_then(|delta| split.with_delta(delta))
    };
    let run = ["run", "-m", text(&base), "--delta", text(&dir), "-p", "a", "-n", "2", "-t", "1"];
    let of_demo = demo::split("bf16", &[]);
    let largest = files(&demo::delta()).into_iter().max_by_key(|(_, bytes)| bytes.len()).unwrap().0;
    for (case, name, on, file, at) in [
        (20, "manifest", &of_demo, Some("delta.json"), 0),
        (20, "changed-weights", &of_demo, Some(largest.as_str()), 9000),
        (25, "another-base", &whole("bf16"), None, 0),
    ] {
        restore(&demo::delta(), &dir);
        link(on);
        if let Some(file) = file {
            flip(&dir.join(file), at);
        }
        let said = table.refused(case, name, on, &run);
        let error = match open(&base) {
            Err(e) => e.to_string(),
            Ok(split) => engine_of(split, request(Mode::Exact, None, 1)).err().unwrap().to_string(),
        };
        assert!(said.contains(&error), "{name}: {said}, but the library: {error}");
    }
    table.check();
}

#[test]
fn splits_and_profiles_of_another_model() {
    let mut table = Table::new("another-model");
    let (checkpoint, out) = (table.folder().join("model"), table.folder().join("out"));
    let (dir, profile) = (whole("bf16"), profile(&llama()));
    let other = model(&qwen_relu());
    let library = |checkpoint: &Path| {
        let opened = open_checkpoint(checkpoint).unwrap();
        let split = Split::open(&dir).unwrap();
        verify(split, opened.as_ref(), &|_, _| ()).unwrap_err().to_string()
    };
    let said = table.refused(25, "verify", &other, &["verify", text(&dir), "-m", text(&other)]);
    assert!(said.contains(&library(&other)), "{said}, but the library: {}", library(&other));
    let split = ["split", "-m", text(&other), "--profile", text(&profile), "-o", text(&out)];
    table.refused(25, "profile", &other, &split);
    type Change<'a> = (&'a str, &'a dyn Fn(&Path));
    let changes: &[Change<'_>] = &[
        ("tokenizer", &|folder| {
            let path = folder.join("tokenizer.json");
            let content = fs::read_to_string(&path).unwrap();
            fs::write(path, content + " ").unwrap();
        }),
        ("one-bit", &|folder| {
            let path = folder.join("model.safetensors");
            let n = fs::metadata(&path).unwrap().len() as usize;
            flip(&path, n - 1);
        }),
    ];
    for (name, change) in changes {
        restore(&model(&llama()), &checkpoint);
        change(&checkpoint);
        let said = table.refused(25, name, &checkpoint, &["verify", text(&dir), "-m", text(&checkpoint)]);
        let error = library(&checkpoint);
        assert!(said.contains(&error), "{name}: {said}, but the library: {error}");
        let split = ["split", "-m", text(&checkpoint), "--profile", text(&profile), "-o", text(&out)];
        table.refused(25, name, &checkpoint, &split);
        assert!(!out.exists());
    }
    table.check();
}
