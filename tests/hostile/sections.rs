//! Damaged, mixed and forged sections: hot neurons in an encoding of their own. A typed error, never a panic.

use crate::support::forge::{self, Layer};
use crate::support::{copy, engine_at, fails, llama, ok, request, split, text};
use std::fs;
use std::path::{Path, PathBuf};
use thermocline_runtime::Mode;
use thermocline_split::{Error, Manifest, PlaneEntry, Precision, SectionEntry, Split};

const ENCODING: &str = "q4,hot@0.25=q8+exact";
/// Of the tiny model.
const FFN: usize = 192;
const HOT: usize = 48;
const CHUNK: usize = 8;

fn whole() -> PathBuf {
    split(&llama(), ENCODING, &["--chunk-neurons", "8"])
}

/// Where plane `p` of a layer's hot neurons lies.
fn path(dir: &Path, layer: usize, p: usize) -> PathBuf {
    dir.join(&Manifest::read(dir).unwrap().layers[layer].hot[0].planes[p].file)
}

/// That opening fails with an error about what is in the split.
fn refused(dir: &Path, what: &str) -> Error {
    match Split::open_at(dir, Precision::Exact) {
        Ok(_) => panic!("{what}: opened"),
        Err(e) => {
            assert!(matches!(e, Error::Corrupt { .. } | Error::UnsupportedVersion { .. }), "{what}: {e:?}");
            assert!(e.to_string().contains(text(dir)), "{what}: {e}");
            e
        }
    }
}

/// That the program refuses as well.
fn refused_by_the_program(dir: &Path) {
    fails(4, &["run", "-p", "a", "-n", "2", "--precision", "exact", "-m", text(dir)]);
    fails(4, &["inspect", text(dir)]);
}

#[test]
fn the_split_is_sound_before_anything_is_done_to_it() {
    let manifest = Manifest::read(&whole()).unwrap();
    let hot = &manifest.layers[1].hot[0];
    assert_eq!((manifest.version, hot.neurons, hot.encoding.as_str(), hot.planes.len()), (2, HOT, "q8+exact", 2));
    let file = Layer::read(&path(&whole(), 1, 0));
    assert_eq!([8, 16, 56, 60].map(|at| file.u32_at(at)), [2, HOT as u32, 0, FFN as u32]);
    let rest = Layer::read(&whole().join("layers/001.thm"));
    assert_eq!([8, 16, 56, 60].map(|at| rest.u32_at(at)), [2, (FFN - HOT) as u32, HOT as u32, FFN as u32]);
    // What has no sections is written as it always was.
    let plain = split(&llama(), "q4,hot@1=q8", &["--chunk-neurons", "8"]);
    assert_eq!(Manifest::read(&plain).unwrap().version, 1);
    assert_eq!(Layer::read(&plain.join("layers/001.thm")).u32_at(8), 1);
}

/// What is done to a manifest.
type Forgery<'a> = (&'a str, &'a dyn Fn(&mut Manifest));

#[test]
fn forged_manifests_of_sections_are_refused() {
    let section = |change: fn(&mut SectionEntry)| move |m: &mut Manifest| change(&mut m.layers[1].hot[0]);
    let plane = |change: fn(&mut PlaneEntry)| move |m: &mut Manifest| change(&mut m.layers[0].hot[0].planes[1]);
    let forgeries: &[Forgery<'_>] = &[
        ("no hot neurons", &section(|s| s.neurons = 0)),
        ("a chunk less", &section(|s| s.neurons -= CHUNK)),
        ("one more", &section(|s| s.neurons += 1)),
        ("all", &section(|s| s.neurons = FFN)),
        ("more than all", &section(|s| s.neurons = FFN + CHUNK)),
        ("more than memory", &section(|s| s.neurons = usize::MAX)),
        ("no encoding", &section(|s| s.encoding.clear())),
        ("an unknown encoding", &section(|s| s.encoding = "q5".to_owned())),
        ("an encoding that is only read", &section(|s| s.encoding = "q4+plus".to_owned())),
        ("another encoding", &section(|s| s.encoding = "q4".to_owned())),
        ("the base's encoding", &section(|s| s.encoding = "q8".to_owned())),
        ("no files", &section(|s| s.planes.clear())),
        ("a plane less", &section(|s| drop(s.planes.pop()))),
        ("a plane more", &section(|s| s.planes.push(s.planes[1].clone()))),
        ("another order of planes", &section(|s| s.planes.reverse())),
        ("one plane twice", &section(|s| s.planes[1] = s.planes[0].clone())),
        ("another size", &plane(|p| p.file_bytes += 1)),
        ("no size", &plane(|p| p.file_bytes = 0)),
        ("another checksum", &plane(|p| p.checksum = "0".repeat(16))),
        ("a file outside", &plane(|p| p.file = "../../etc/passwd".to_owned())),
        ("a file at the root", &plane(|p| p.file = "/etc/passwd".to_owned())),
        ("a file that is not there", &plane(|p| p.file.push('x'))),
        ("no sections", &|m| m.layers[1].hot.clear()),
        ("a section twice", &|m| m.layers[1].hot.extend_from_within(..)),
        ("another layer's section", &|m| m.layers[1].hot = m.layers[0].hot.clone()),
        ("planes of the rest", &|m| m.layers[1].planes = vec![m.layers[1].hot[0].planes[1].clone()]),
        ("the rest as hot neurons", &|m| {
            let rest = &m.layers[1];
            let (file, file_bytes, checksum) = (rest.file.clone(), rest.file_bytes, rest.checksum.clone());
            m.layers[1].hot[0].planes[0] = PlaneEntry { file, file_bytes, checksum };
        }),
        ("version 1", &|m| m.version = 1),
        ("version 0", &|m| m.version = 0),
        ("version 3", &|m| m.version = 3),
        ("version 4", &|m| m.version = 4),
        ("no chunks", &|m| m.packing.chunk_neurons = 0),
        ("endless chunks", &|m| m.packing.chunk_neurons = usize::MAX),
        ("other chunks", &|m| m.packing.chunk_neurons = 64),
    ];
    for (i, (what, change)) in forgeries.iter().enumerate() {
        let (_guard, dir) = copy(&whole());
        forge::manifest(&dir, change);
        refused(&dir, what);
        // One in six through the program, which takes longer.
        if i % 6 == 0 {
            refused_by_the_program(&dir);
        }
    }
    for encoding in [
        "q4",
        "q8",
        "q8+exact",
        "q4,hot@0.25=q8",
        "q4,hot@0.25=q4+exact",
        "q4,hot@0.5=q8+exact",
        "q4,hot@0=q8+exact",
        "q4,hot@2=q8+exact",
        "q4,hot@1=q8+exact",
        "q4,hot@-0.25=q8+exact",
        "q4,hot@nan=q8+exact",
        "q4,hot@0.25=q9",
        "q4,hot@0.25=q4+plus",
        "q8,hot@0.25=q8+exact",
        "q4,0:hot@0.25=q8+exact",
        "q4,hot@0.25=q8+exact,1=q4",
        "q4,hot@0.25=q8+exact,hot@0.1=bf16",
        "q4,hot@1e-320=q8+exact",
        "q4,hot@0.25=",
        "hot@0.25=q8+exact",
    ] {
        let (_guard, dir) = copy(&whole());
        forge::manifest(&dir, |m| m.packing.ffn_encoding = encoding.to_owned());
        refused(&dir, encoding);
    }
    // And a split without sections that says that it has some.
    let (_guard, dir) = copy(&split(&llama(), "q4", &["--chunk-neurons", "8"]));
    forge::manifest(&dir, |m| m.version = 2);
    assert!(refused(&dir, "version 2 of nothing").to_string().contains("version"));
    let listed = Manifest::read(&whole()).unwrap().layers[0].hot.clone();
    forge::manifest(&dir, |m| m.layers[0].hot = listed.clone());
    refused(&dir, "sections of a plain encoding");
}

#[test]
fn forged_headers_of_sections_are_refused() {
    for (name, is_hot) in [("layers/000.hot.thm", true), ("layers/000.thm", false)] {
        let (_guard, dir) = copy(&whole());
        let good = Layer::read(&dir.join(name));
        let [order, _, end] = good.tables();
        let put = |file: &Layer| if is_hot { forge::hot(&dir, 0, 0, 0, file) } else { forge::plane(&dir, 0, 0, file) };
        let fields: &[(usize, &[u32])] = &[
            (8, &[0, 1, 3, u32::MAX]),                            // version
            (12, &[1, u32::MAX]),                                 // layer
            (16, &[0, 1, 192, u32::MAX]),                         // neurons
            (28, &[0, 4, 16, 192, u32::MAX]),                     // chunk_neurons
            (56, &[1, 8, 47, 48, 49, 144, 192, u32::MAX]),        // first neuron
            (60, &[0, 47, 48, 144, 191, 193, 1 << 24, u32::MAX]), // neurons of the layer
            (64, &[1, u32::MAX]),                                 // zero
            (68, &[1, u32::MAX]),                                 // zero
            (order, &[192, u32::MAX]),                            // a neuron that there is not
            (order + 4, &[good.u32_at(order)]),                   // one twice
        ];
        for (at, value) in fields.iter().flat_map(|(at, values)| values.iter().map(move |v| (*at, *v))) {
            // Values that a file has need no forging.
            if good.u32_at(at) != value {
                let mut bad = Layer { bytes: good.bytes.clone() };
                bad.put(at, &value.to_le_bytes()).seal(end);
                put(&bad);
                refused(&dir, &format!("{name}: {value} at {at}"));
            }
        }
        put(&good);
        // A neuron of the other file: both are sound, but not together.
        let other = Layer::read(&dir.join(if is_hot { "layers/000.thm" } else { "layers/000.hot.thm" }));
        let mut bad = Layer { bytes: good.bytes.clone() };
        bad.put(order, &other.u32_at(order).to_le_bytes()).seal(end);
        put(&bad);
        let error = refused(&dir, "a neuron in both files").to_string();
        // The hot file's further plane tells first that its base has another order.
        assert!(error.contains("in two files of the layer") || (is_hot && error.contains("base")), "{error}");
        refused_by_the_program(&dir);
        put(&good);
        assert!(Split::open_at(&dir, Precision::Exact).is_ok(), "all is in its place again");
    }
}

#[test]
fn files_of_sections_cut_flipped_or_mixed_are_found() {
    for p in [0, 1] {
        let (_guard, dir) = copy(&whole());
        let path = path(&dir, 1, p);
        let good = Layer::read(&path);
        let [order, index, end] = good.tables();
        let last = good.chunk(HOT / CHUNK - 1);
        for n in [0, 79, order + 6, index + 33, end, last.start, last.end - 1] {
            fs::write(&path, &good.bytes[..n]).unwrap();
            refused(&dir, &format!("plane {p}, cut at {n}"));
        }
        for at in (0..order).chain((order..end).step_by(7)) {
            let mut bad = good.bytes.clone();
            bad[at] ^= 1 << (at % 8);
            fs::write(&path, &bad).unwrap();
            refused(&dir, &format!("plane {p}, byte {at}"));
        }
        let mut bad = good.bytes.clone();
        bad[last.start] ^= 1;
        fs::write(&path, &bad).unwrap();
        let error = engine_at(&dir, Precision::Exact, request(Mode::Exact, None, 2)).err().unwrap();
        let found = Error::CorruptChunk { path: path.clone(), layer: 1, first: HOT - CHUNK, end: HOT };
        assert_eq!(error.to_string(), found.to_string());
        fails(4, &["run", "-p", "a", "-n", "2", "--precision", "exact", "-m", text(&dir)]);
        for from in [self::path(&dir, 0, p), self::path(&dir, 1, 1 - p)] {
            fs::copy(&from, &path).unwrap();
            refused(&dir, "another file in its place");
            let bad = Layer::read(&from);
            forge::hot(&dir, 1, 0, p, &bad);
            refused(&dir, "the same with a manifest that was made to fit");
            forge::hot(&dir, 1, 0, p, &good);
        }
        fs::remove_file(&path).unwrap();
        // The further plane is not looked at where it is not used.
        assert_eq!(Split::open(&dir).is_ok(), p == 1);
        refused(&dir, "missing");
    }
}

#[test]
fn what_hot_neurons_take_is_planned() {
    let report = crate::support::json(&["plan", "-m", text(&whole()), "--json"]);
    let sections = report["plan"]["sections"].as_array().unwrap();
    assert_eq!(sections.len(), 2 * Manifest::read(&whole()).unwrap().layers.len());
    let bytes: u64 =
        sections.iter().map(|s| s["neurons"].as_u64().unwrap() * s["bundle_bytes"].as_u64().unwrap()).sum();
    assert_eq!(report["plan"]["hot_bytes"], bytes);
    ok(&["inspect", text(&whole())]);
}
