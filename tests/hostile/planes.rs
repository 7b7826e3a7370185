//! Damaged, mixed and forged planes: a typed error that names the file, never a panic; where every checksum was made to
//! fit, any answer, but no panic and no memory beyond the model's.

use crate::support::forge::{self, Layer};
use crate::support::{
    BINARY, Ran, answer, budget_range_of, copy, engine_at, fails, llama, model, request, split, text,
};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use thermocline_datasets::{Checkpoint, Random};
use thermocline_runtime::Mode;
use thermocline_split::{Error, Format, Manifest, Precision, Split, SplitCheckpoint, TensorEntry};

/// Encoding and further plane (0 is the base): every kind of file that plain encodings have not got.
const PLANES: [(&str, usize); 4] = [("q4+exact", 1), ("q4+exact", 2), ("q8+exact", 1), ("bf16x", 0)];
/// Of the tiny model.
const HIDDEN: usize = 64;
const FFN: usize = 192;
const CHUNK: usize = 8;

fn whole(encoding: &str) -> PathBuf {
    split(&llama(), encoding, &["--chunk-neurons", "8"])
}

/// Where plane `p` of a layer lies.
fn path(dir: &Path, layer: usize, p: usize) -> PathBuf {
    let manifest = Manifest::read(dir).unwrap();
    let entry = &manifest.layers[layer];
    dir.join(p.checked_sub(1).map_or(&entry.file, |p| &entry.planes[p].file))
}

/// That opening at full precision fails, and blames `path`.
fn refused(dir: &Path, path: &Path, what: &str) -> Error {
    match Split::open_at(dir, Precision::Exact) {
        Ok(_) => panic!("{what}: opened"),
        Err(e) => {
            assert!(e.to_string().contains(text(path)), "{what}: {e} does not name {}", path.display());
            assert!(matches!(e, Error::Corrupt { .. } | Error::UnsupportedVersion { .. }), "{what}: {e:?}");
            e
        }
    }
}

/// That the program refuses too, within memory for a model of this size and not for what a header may claim.
fn refused_by_the_program(dir: &Path, named: &str) {
    let checkpoint = model(&llama());
    for args in [
        &["run", "-p", "a", "-n", "2", "--precision", "exact", "-m", text(dir)][..],
        &["verify", text(dir), "-m", text(&checkpoint)],
    ] {
        let ran = in_little_memory(args);
        assert_eq!(ran.code, Some(4), "{args:?}: {} {}", ran.stdout, ran.stderr);
        assert!(ran.stderr.contains(named) && !ran.stderr.contains("panicked"), "{args:?}: {}", ran.stderr);
    }
}

/// Runs the binary in 1 GiB of address space.
fn in_little_memory(args: &[&str]) -> Ran {
    let script = "ulimit -v 1048576; exec \"$@\"";
    let mut command = Command::new("bash");
    command.args(["-c", script, "bash", BINARY]).args(args).env("THERMOCLINE_VRAM_BUDGET", "0");
    command.env("THERMOCLINE_THREADS", "2").output().unwrap().into()
}

/// All chunks of a layer through the split.
fn read(dir: &Path, layer: usize) -> Result<Vec<u8>, Error> {
    let split = Split::open_at(dir, Precision::Exact)?;
    let file = &split.layers()[layer];
    let mut bundles = vec![0; file.bundles().bytes(0..file.order().len())];
    file.read_chunks(0..file.n_chunks(), &mut bundles).map(|()| bundles)
}

/// Everything that looks at weights: none of it may panic, whatever it says. Returns whether an engine answered.
fn survives(dir: &Path, precision: Precision) -> bool {
    let Ok(split) = Split::open_at(dir, precision) else { return false };
    let (least, _) = budget_range_of(&split, Mode::Exact);
    let _ = split.check(&|_, _| ());
    let checkpoint = SplitCheckpoint::new(split);
    for name in checkpoint.names() {
        let _ = checkpoint.load(&name);
    }
    let mut answered = true;
    for (mode, budget) in
        [(Mode::Exact, None), (Mode::Exact, Some(least)), (Mode::Sparse { active: 0.3 }, Some(2 * least))]
    {
        let engine = engine_at(dir, precision, request(mode, budget, 2));
        answered &= engine.and_then(|mut engine| answer(&mut engine, 3)).is_ok();
    }
    answered
}

#[test]
fn planes_cut_anywhere_longer_or_missing_are_found() {
    for (encoding, p) in PLANES {
        let (_guard, dir) = copy(&whole(encoding));
        let path = path(&dir, 1, p);
        let good = Layer::read(&path);
        let [order, index, end] = good.tables();
        let chunks = [0, FFN / CHUNK - 1].map(|c| good.chunk(c));
        let starts = chunks.iter().flat_map(|c| [c.start, c.start + 1, (c.start + c.end) / 2, c.end - 1]);
        let ends = [0, 1, 8, 79, order, order + 6, index, index + 33, end - 1, end];
        for n in ends.into_iter().chain(starts) {
            fs::write(&path, &good.bytes[..n]).unwrap();
            refused(&dir, &path, &format!("{encoding}, cut at {n}"));
            assert_eq!(Split::open(&dir).is_ok(), p > 0, "the base is whole");
        }
        refused_by_the_program(&dir, path.file_name().unwrap().to_str().unwrap());
        fails(4, &["plan", "--precision", "exact", "-m", text(&dir)]);
        fs::write(&path, [&good.bytes[..], b"x"].concat()).unwrap();
        refused(&dir, &path, "a byte more");
        fs::remove_file(&path).unwrap();
        refused(&dir, &path, "missing");
        refused_by_the_program(&dir, path.file_name().unwrap().to_str().unwrap());
    }
}

#[test]
fn flipped_bits_of_planes_are_found() {
    for (encoding, p) in PLANES {
        let (_guard, dir) = copy(&whole(encoding));
        let path = path(&dir, 1, p);
        let good = Layer::read(&path);
        let [order, _, end] = good.tables();
        // Every byte of the header, some of order and index.
        for at in (0..order).chain((order..end).step_by(7)) {
            let mut bad = good.bytes.clone();
            bad[at] ^= 1 << (at % 8);
            fs::write(&path, &bad).unwrap();
            refused(&dir, &path, &format!("{encoding}, byte {at}"));
        }
        for c in [0, 7, FFN / CHUNK - 1] {
            let place = good.chunk(c);
            for at in [place.start, place.start + 1, (place.start + place.end) / 2, place.end - 1] {
                let mut bad = good.bytes.clone();
                bad[at] ^= 1 << (at % 8);
                fs::write(&path, &bad).unwrap();
                let error = read(&dir, 1).unwrap_err();
                let named = matches!(&error, Error::CorruptChunk { path: named, layer: 1, first, end }
                    if *named == path && (*first, *end) == (c * CHUNK, (c + 1) * CHUNK));
                assert!(named, "{encoding}, byte {at}: {error}");
            }
            assert!(!survives(&dir, Precision::Exact), "an answer from a damaged chunk");
        }
        refused_by_the_program(&dir, "layer 1, neurons 184..192");
    }
}

#[test]
fn planes_of_other_layers_and_splits_do_not_mix() {
    let encoding = "q4+exact";
    let (_guard, dir) = copy(&whole(encoding));
    let random = split(&llama(), encoding, &["--chunk-neurons", "8", "--order", "random"]);
    let longer = split(&llama(), encoding, &["--chunk-neurons", "16"]);
    for p in [1, 2] {
        let (here, other_layer) = (path(&dir, 0, p), path(&dir, 1, p));
        let good = Layer::read(&here);
        for (what, from) in [
            ("another layer's", other_layer),
            ("another order's", path(&random, 0, p)),
            ("other chunks'", path(&longer, 0, p)),
            ("the other plane", path(&dir, 0, 3 - p)),
            ("the base", path(&dir, 0, 0)),
        ] {
            let bad = Layer::read(&from);
            bad.write(&here);
            refused(&dir, &here, what);
            // With a manifest that was made to fit.
            forge::plane(&dir, 0, p, &bad);
            let error = refused(&dir, &dir, what).to_string();
            assert!(error.contains("does not fit the layer's base") || error.contains("planes over"), "{error}");
            refused_by_the_program(&dir, "000.");
            assert!(!survives(&dir, Precision::Exact) && Split::open(&dir).is_ok());
            forge::plane(&dir, 0, p, &good);
        }
    }
    assert!(survives(&dir, Precision::Exact), "all planes are in their places again");
    // A further plane where the base should be.
    for p in [1, 2] {
        let (_guard, dir) = copy(&whole(encoding));
        forge::plane(&dir, 0, 0, &Layer::read(&path(&dir, 0, p)));
        assert!(refused(&dir, &path(&dir, 0, 0), "a base").to_string().contains("where the base should be"));
        assert!(Split::open(&dir).is_err());
    }
}

/// Numbers in a header that say what a plane is; every other check is that of all layer files.
#[test]
fn forged_plane_headers_are_refused_before_anything_is_allocated() {
    for (encoding, p) in PLANES {
        let (_guard, dir) = copy(&whole(encoding));
        let good = Layer::read(&path(&dir, 0, p));
        let [_, index, end] = good.tables();
        let (bundle, is_coarse) = (good.u32_at(36), (encoding, p) == ("q4+exact", 1));
        let fields: &[(usize, &[u32])] = &[
            (12, &[1, u32::MAX]),                                                    // layer
            (20, &[0, 32, 96, 1 << 20]),                                             // hidden_size
            (24, &[0, 1, 2, 3, 5, 6, 7, 8, 15, 18, u32::MAX]),                       // encoding
            (36, &[0, 16, bundle - 16, bundle + 1, bundle + 16, 1 << 28, u32::MAX]), // bundle_bytes
            (index + 12, &[0, 4, u32::MAX]),                                         // codec
            (index + 16, &[0, 9, u32::MAX]),                                         // n_neurons
        ];
        for (at, value) in fields.iter().flat_map(|(at, values)| values.iter().map(move |v| (*at, *v))) {
            let mut bad = Layer { bytes: good.bytes.clone() };
            // Values that a file has need no forging.
            if good.u32_at(at) == value {
                continue;
            }
            bad.put(at, &value.to_le_bytes()).seal(end);
            forge::plane(&dir, 0, p, &bad);
            let said = format!("{encoding}, plane {p}: {value} at {at}");
            match read(&dir, 0) {
                Err(Error::Corrupt { path, .. }) => assert!(path.starts_with(&dir), "{said}"),
                // Room for streams is what a file says, and chunks then do not fill it or do not fit.
                Err(Error::CorruptChunk { layer: 0, .. }) => assert!(at == 36 || at == index + 12, "{said}"),
                // More room than is used, with heads that say how much.
                Ok(_) => assert!(at == 36 && value == bundle + 16 && !is_coarse, "{said}"),
                Err(e) => panic!("{said}: {e:?}"),
            }
            survives(&dir, Precision::Exact);
            if value >= 1 << 20 {
                refused_by_the_program(&dir, "000.");
            }
        }
    }
}

/// Bytes in front of the heads in a bundle, bytes of each head, and where in it its stream's length is.
fn heads(encoding: &str) -> (usize, usize, usize) {
    if encoding == "bf16x" { (3 * (HIDDEN + HIDDEN / 4), 11, 9) } else { (0, 4, 0) }
}

/// Bytes of a bundle up to the end of its streams.
fn used(encoding: &str, bundle: &[u8]) -> usize {
    let (at, head, length) = heads(encoding);
    let stream = |h: usize| {
        let at = at + h * head + length;
        usize::from(u16::from_le_bytes([bundle[at], bundle[at + 1]]))
    };
    at + 3 * head + (0..3).map(stream).sum::<usize>()
}

#[test]
fn trimmed_chunks_that_do_not_fit_their_heads_are_found() {
    for (encoding, p) in [("q4+exact", 2), ("q8+exact", 1), ("bf16x", 0)] {
        let (_guard, dir) = copy(&whole(encoding));
        let good = Layer::read(&path(&dir, 0, p));
        let [_, index, end] = good.tables();
        let (c, place) = (3, good.chunk(3));
        assert_eq!(good.u32_at(index + 32 * c + 12), 2, "chunks are trimmed");
        let (head_at, head, length) = heads(encoding);
        let second = place.start + used(encoding, &good.bytes[place.clone()]);
        for at in [place.start, second] {
            for which in 0..3 {
                let at = at + head_at + which * head + length;
                let right = u16::from_le_bytes([good.bytes[at], good.bytes[at + 1]]);
                for wrong in [0, right - 1, right + 1, u16::MAX] {
                    let mut bad = Layer { bytes: good.bytes.clone() };
                    bad.put(at, &wrong.to_le_bytes()).seal_chunk(c).seal(end);
                    forge::plane(&dir, 0, p, &bad);
                    let error = read(&dir, 0).unwrap_err();
                    assert!(
                        matches!(error, Error::CorruptChunk { layer: 0, first: 24, end: 32, .. }),
                        "{encoding}, {wrong} for {right} at {at}: {error}"
                    );
                }
            }
        }
        refused_by_the_program(&dir, "layer 0, neurons 24..32");
        assert!(!survives(&dir, Precision::Exact));
    }
}

#[test]
fn heads_that_lie_give_wrong_weights_at_worst() {
    for (encoding, p) in [("q4+exact", 2), ("q8+exact", 1), ("bf16x", 0)] {
        let (_guard, dir) = copy(&whole(encoding));
        let good = Layer::read(&path(&dir, 0, p));
        let (head_at, head, length) = heads(encoding);
        let expected = read(&dir, 0).unwrap();
        let mut random = Random::new(3);
        let lies = 8;
        for lie in 0..=lies {
            let mut bad = Layer { bytes: good.bytes.clone() };
            bad.store(
                |bundle| used(encoding, bundle),
                |_, bundle| {
                    let (before, rest) = bundle.split_at_mut(head_at);
                    let (heads, streams) = rest.split_at_mut(3 * head);
                    let mut set = |at: usize, value: u16| {
                        let of_row = |row: &mut [u8]| row[at..at + 2].copy_from_slice(&value.to_le_bytes());
                        heads.chunks_exact_mut(head).for_each(of_row);
                    };
                    match lie {
                        // The truth.
                        0 => {}
                        1 => set(length, 0),
                        2 => set(length, u16::MAX),
                        3 => set(length, 1),
                        // Exceptions, or with bf16x the length again.
                        4 => set(head - 2, u16::MAX),
                        5 => set(head - 2, u16::MAX - 1),
                        6 => heads.iter_mut().for_each(|b| *b = random.below(256) as u8),
                        7 => streams.iter_mut().for_each(|b| *b = random.below(256) as u8),
                        // All codes lead to further levels, and the streams end before them.
                        _ => {
                            before.fill(0xff);
                            streams.fill(0xff);
                        }
                    }
                },
            );
            forge::plane(&dir, 0, p, &bad);
            let got = read(&dir, 0).unwrap();
            assert_eq!(got == expected, lie == 0, "{encoding}, lie {lie}");
            let answered = survives(&dir, Precision::Exact);
            assert!(answered, "{encoding}, lie {lie}: nothing but the weights is wrong");
            if lie > 0 {
                // Only the checkpoint tells.
                let checkpoint = model(&llama());
                let message = fails(4, &["verify", text(&dir), "-m", text(&checkpoint), "--exact"]);
                assert!(message.contains("layers.0.mlp"), "{message}");
            }
            if lie == 2 {
                let args = ["run", "-m", text(&dir), "-p", "a", "-n", "2", "--precision", "exact"];
                let ran = in_little_memory(&args);
                assert_eq!(ran.code, Some(0), "{}", ran.stderr);
            }
        }
    }
}

/// Rows of matrices are decoded by other code than bundles: the same lies in `resident-planes.safetensors`.
#[test]
fn lying_heads_of_matrices_give_wrong_weights_at_worst() {
    for (encoding, plane) in [("q8+exact", ".final"), ("q4+exact", ".final"), ("bf16x", "")] {
        let whole = split(&llama(), "bf16", &["--chunk-neurons", "8", "--resident-encoding", encoding]);
        let (_guard, dir) = copy(&whole);
        let mut random = Random::new(5);
        for lie in [0u8, 1, 2, 3] {
            for matrix in ["model.embed_tokens", "model.layers.1.self_attn.o_proj"] {
                forge::tensor(&dir, &format!("{matrix}.weight{plane}"), |bytes| match lie {
                    0 => bytes.fill(0),
                    1 => bytes.fill(0xff),
                    2 => bytes.iter_mut().for_each(|b| *b = random.below(256) as u8),
                    _ => bytes.chunks_exact_mut(16).for_each(|b| b[..4].copy_from_slice(&[0xff, 0xff, 0xfe, 0xff])),
                });
            }
            assert!(survives(&dir, Precision::Exact), "{encoding}, lie {lie}");
        }
    }
}

/// What a change to a tensor of the manifest is, and the change.
type Forgery<'a> = (&'a str, &'a dyn Fn(&mut TensorEntry));

#[test]
fn forged_manifests_of_planes_are_refused() {
    let good = split(&llama(), "q4+exact", &["--chunk-neurons", "8", "--resident-encoding", "q4+exact"]);
    let mut kept = 0;
    let mut forged = |what: &str, change: &dyn Fn(&mut Manifest)| {
        let (_guard, dir) = copy(&good);
        forge::manifest(&dir, change);
        let error = engine_at(&dir, Precision::Exact, request(Mode::Exact, None, 2)).err();
        let error = error.unwrap_or_else(|| panic!("{what}: loaded"));
        assert!(matches!(error, thermocline_runtime::Error::Split(Error::Corrupt { .. })), "{what}: {error:?}");
        // One in eight through the program, which takes longer.
        kept += 1;
        if kept % 8 == 0 {
            refused_by_the_program(&dir, text(&dir));
        }
    };
    for encoding in
        ["", "q4", "q8+exact", "bf16", "bf16x", "q4+plus", "q9+exact", "q4+exact,0=bf16x", "q4+exact,1=q4", "q4+exact,"]
    {
        forged(encoding, &|m| m.packing.ffn_encoding = encoding.to_owned());
    }
    for encoding in ["", "q4", "q8+exact", "bf16", "q4+plus", "q9", "q4+exact,0=q4"] {
        forged(encoding, &|m| m.packing.resident_encoding = encoding.to_owned());
    }
    for encoding in ["", "q4", "q8", "q8+exact", "bf16", "q4+plus", "q9", "q4+exact,v=q8"] {
        forged(encoding, &|m| m.packing.attention_encoding = Some(encoding.to_owned()));
    }
    forged("no planes", &|m| m.layers[1].planes.clear());
    forged("a plane less", &|m| drop(m.layers[1].planes.pop()));
    forged("the first plane less", &|m| drop(m.layers[1].planes.remove(0)));
    forged("a plane more", &|m| {
        let plane = m.layers[1].planes[1].clone();
        m.layers[1].planes.push(plane);
    });
    forged("another order of planes", &|m| m.layers[1].planes.reverse());
    forged("one plane twice", &|m| m.layers[1].planes[0] = m.layers[1].planes[1].clone());
    forged("the base as a plane", &|m| m.layers[1].planes[0].file = m.layers[1].file.clone());
    forged("planes of another layer", &|m| m.layers[1].planes = m.layers[0].planes.clone());
    forged("a plane's size", &|m| m.layers[0].planes[1].file_bytes += 1);
    forged("a plane's checksum", &|m| m.layers[0].planes[1].checksum = "0".repeat(16));
    for name in ["../../etc/passwd", "/etc/passwd", "layers/../../x", "", "..\\x"] {
        forged(name, &|m| m.layers[0].planes[0].file = name.to_owned());
        forged(name, &|m| m.resident_planes.as_mut().unwrap().file = name.to_owned());
    }
    forged("matrices without planes", &|m| m.resident_planes = None);
    forged("matrices with an empty list", &|m| m.resident_planes.as_mut().unwrap().tensors.clear());
    forged("the base's tensors as planes", &|m| m.resident_planes = Some(m.resident.clone()));
    // The first matrix's coarse and final plane, and one in the middle.
    for i in [0, 1, 4, 7] {
        let entry = |change: &dyn Fn(&mut TensorEntry), m: &mut Manifest| {
            change(&mut m.resident_planes.as_mut().unwrap().tensors[i]);
        };
        let changes: &[Forgery<'_>] = &[
            ("a row less", &|t| t.rows -= 1),
            ("a row more", &|t| t.rows += 1),
            ("no rows", &|t| t.rows = 0),
            ("rows that overflow", &|t| t.rows = usize::MAX),
            ("other columns", &|t| t.columns += 32),
            ("odd columns", &|t| t.columns += 1),
            ("columns that overflow", &|t| t.columns = usize::MAX - 1),
            ("bytes more", &|t| t.bytes += 16),
            ("bytes less", &|t| t.bytes -= 16 * t.rows as u64),
            ("no bytes", &|t| t.bytes = 0),
            ("bytes that overflow", &|t| t.bytes = u64::MAX),
            ("another place", &|t| t.offset += 16),
            ("a place past the end", &|t| t.offset = u64::MAX - 3),
            ("another name", &|t| t.name.push('x')),
            ("the other plane", &|t| {
                t.format = match t.format {
                    Format::Coarse => Format::Final,
                    _ => Format::Coarse,
                }
            }),
            ("a base", &|t| t.format = Format::Bf16),
            ("bytes of nothing", &|t| t.format = Format::U8),
            ("another checksum", &|t| t.checksum = "0".repeat(16)),
        ];
        for (what, change) in changes {
            forged(&format!("{what}, tensor {i}"), &|m| entry(change, m));
        }
        forged("a tensor less", &|m| drop(m.resident_planes.as_mut().unwrap().tensors.remove(i)));
        forged("a tensor twice", &|m| {
            let tensors = &mut m.resident_planes.as_mut().unwrap().tensors;
            tensors[i] = tensors[i + 1].clone();
        });
    }
    // And the other way round: planes that the encoding does not have.
    let plain = split(&llama(), "q4", &["--chunk-neurons", "8", "--resident-encoding", "q4"]);
    let planes = Manifest::read(&good).unwrap();
    let (_guard, dir) = copy(&plain);
    forge::manifest(&dir, |m| m.layers[0].planes = planes.layers[0].planes.clone());
    refused(&dir, &dir, "planes of a plain encoding");
    let (_guard, dir) = copy(&plain);
    fs::copy(good.join("resident-planes.safetensors"), dir.join("resident-planes.safetensors")).unwrap();
    forge::manifest(&dir, |m| m.resident_planes = planes.resident_planes.clone());
    refused(&dir, &dir, "planes of plain matrices");
}
