//! Split directories whose checksums fit whatever was changed in them: opened, read, planned and run.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::fs;
use std::path::Path;
use std::sync::OnceLock;
use thermocline_calibrate::Profile;
use thermocline_datasets::Checkpoint;
use thermocline_fuzz::forge::{self, Layer};
use thermocline_fuzz::{Input, Overlaid, Template, edit_json, split};
use thermocline_kernels::Encoding;
use thermocline_runtime::{Engine, Logits, Mode, Plan, PlanRequest};
use thermocline_split::{Compression, Manifest, Precision, Split, SplitCheckpoint};

const KINDS: [(Encoding, Compression); 5] = [
    (Encoding::Bf16, Compression::Zstd(1)),
    (Encoding::Q4, Compression::None),
    (Encoding::Bf16x, Compression::None),
    (Encoding::Q4Exact, Compression::None),
    (Encoding::Q8Exact, Compression::Archive(1)),
];

static TEMPLATES: OnceLock<Vec<Template>> = OnceLock::new();

fn make() -> Vec<Template> {
    let profile = Profile::open(thermocline_fuzz::profile()).unwrap();
    let one = |(encoding, compression): (Encoding, Compression)| {
        Template::new(&format!("split-{}", encoding.name()), |dir| {
            split(&Overlaid::new(&[]), &profile, encoding.into(), 8, compression, dir).unwrap();
        })
    };
    KINDS.into_iter().map(one).collect()
}

fuzz_target!(|data: &[u8]| {
    let templates = TEMPLATES.get_or_init(make);
    let mut input = Input(data);
    let template = &templates[input.below(templates.len())];
    template.restore();
    for _ in 0..6 {
        if input.is_empty() {
            break;
        }
        change(template, &mut input);
    }
    for precision in [Precision::Base, Precision::Exact] {
        use_it(&template.dir, precision);
    }
});

fn change(template: &Template, input: &mut Input<'_>) {
    let dir = &template.dir;
    let manifest = dir.join("manifest.json");
    let kind = input.byte() % 6;
    if kind == 0 {
        let mut value: serde_json::Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
        edit_json(&mut value, input);
        let text = value.to_string();
        fs::write(&manifest, &text).unwrap();
        // The text, as the forge will read it: there are values that are a manifest while their text is none.
        if serde_json::from_str::<Manifest>(&text).is_ok() {
            forge::manifest(dir, |_| ());
        }
        return;
    }
    if serde_json::from_slice::<Manifest>(&fs::read(&manifest).unwrap()).is_err() {
        return;
    }
    let paths = template.paths();
    let layers: Vec<&&Path> = paths.iter().filter(|p| p.extension().is_some_and(|e| e == "thm")).collect();
    let path: &Path = layers[input.below(layers.len())];
    let bytes = fs::read(path).unwrap();
    if bytes.len() < 120 {
        return;
    }
    let mut file = Layer { bytes };
    let end = file.tables()[2].min(file.bytes.len());
    match kind {
        // Header, order and index, byte by byte or as numbers.
        1 => drop(file.put(input.below(end - 8), &[input.byte()])),
        2 => drop(file.put(input.below(end / 4 - 2) * 4, &input.u32().to_le_bytes())),
        3 => drop(file.put(input.below(end / 4 - 2) * 4, &input.number().to_le_bytes())),
        // Stored bytes.
        4 => {
            let (n, at) = (file.bytes.len(), end.next_multiple_of(4096));
            for _ in 0..1 + input.byte() % 16 {
                if at < n {
                    let place = at + input.below(n - at);
                    file.bytes[place] = input.byte();
                }
            }
        }
        _ => file.bytes.truncate(120.max(input.below(file.bytes.len()))),
    }
    if file.bytes.len() >= end && end >= 80 {
        file.seal(end);
    }
    seal(dir, path, file);
}

/// Writes a layer file with the manifest's figures and the chunks' checksums to match.
fn seal(dir: &Path, path: &Path, mut file: Layer) {
    let [_, index, end] = file.tables();
    if end <= file.bytes.len() {
        for c in 0..(end - index) / 32 {
            if file.chunk(c).end <= file.bytes.len() && file.chunk(c).start <= file.chunk(c).end {
                file.seal_chunk(c);
            }
        }
        file.seal(end);
    }
    let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
    let (bytes, checksum) = (file.bytes.len() as u64, file.checksum());
    file.write(path);
    forge::manifest(dir, |m| {
        for layer in &mut m.layers {
            if layer.file == name {
                (layer.file_bytes, layer.checksum) = (bytes, checksum.clone());
            }
            for plane in layer.planes.iter_mut().filter(|p| p.file == name) {
                (plane.file_bytes, plane.checksum) = (bytes, checksum.clone());
            }
        }
    });
}

fn use_it(dir: &Path, precision: Precision) {
    let Ok(split) = Split::open_at(dir, precision) else { return };
    let _ = split.check(&|_, _| ());
    let checkpoint = SplitCheckpoint::new(split);
    for name in checkpoint.names() {
        let _ = checkpoint.load(&name);
    }
    for (mode, budget) in [(Mode::Exact, None), (Mode::Sparse { active: 0.3 }, None), (Mode::Exact, Some(300_000))] {
        let request = PlanRequest { mode, always: None, ram_budget_bytes: budget, context: 16, batch: 4, n_threads: 1 };
        let Ok(split) = Split::open_at(dir, precision) else { return };
        let Ok(plan) = Plan::new(&split, request) else { continue };
        let Ok(mut engine) = Engine::load(split, plan, &|_, _| ()) else { continue };
        let _ = engine.forward(&[5, 6, 7], Logits::Last).and_then(|_| engine.forward(&[9], Logits::Last));
    }
}
