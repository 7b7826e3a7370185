//! Delta directories whose checksums fit whatever was changed in them: opened and put on their base.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::fs;
use std::sync::OnceLock;
use thermocline_datasets::Checkpoint;
use thermocline_fuzz::{Input, Overlaid, Template, edit_json};
use thermocline_split::delta::{DATA_FILE, Delta, DeltaCheckpoint, DeltaManifest, MANIFEST_FILE, verify_delta};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

static TEMPLATE: OnceLock<Template> = OnceLock::new();

fuzz_target!(|data: &[u8]| {
    let template = TEMPLATE.get_or_init(|| Template::new("delta", thermocline_fuzz::delta));
    template.restore();
    let (manifest, data_file) = (template.dir.join(MANIFEST_FILE), template.dir.join(DATA_FILE));
    let mut value: serde_json::Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    let mut bytes = fs::read(&data_file).unwrap();
    let mut input = Input(data);
    for _ in 0..6 {
        let n = bytes.len();
        match (input.is_empty(), input.byte() % 5) {
            (true, _) => break,
            (_, 0) => edit_json(&mut value, &mut input),
            (_, 1) => bytes[input.below(n)] = input.byte(),
            (_, 2) => bytes[input.below(n)] ^= 1 << (input.byte() % 8),
            (_, 3) if n > 72 => {
                let at = input.below(n / 8 - 1) * 8;
                bytes[at..at + 8].copy_from_slice(&input.number().to_le_bytes());
            }
            _ => bytes.truncate(input.below(n).max(1)),
        }
    }
    fs::write(&data_file, &bytes).unwrap();
    match serde_json::from_value::<DeltaManifest>(value.clone()) {
        Ok(sealed) => fs::write(&manifest, seal(sealed, &bytes)).unwrap(),
        Err(_) => fs::write(&manifest, value.to_string()).unwrap(),
    }
    let Ok(delta) = Delta::open(&template.dir) else { return };
    let Ok(rebuilt) = DeltaCheckpoint::new(Box::new(Overlaid::new(&[])), delta) else { return };
    for name in rebuilt.names() {
        let _ = rebuilt.load(&name);
    }
    let _ = verify_delta(&rebuilt, None, &|_, _| ());
});

/// The manifest's text, with checksums of what the data now holds.
fn seal(mut manifest: DeltaManifest, data: &[u8]) -> String {
    for t in &mut manifest.tensors {
        let first = if t.block_rows > 0 { t.index_offset } else { t.offset };
        let end = t.offset.saturating_add(t.bytes);
        if let Some(bytes) = data.get(first as usize..end as usize)
            && t.bytes > 0
        {
            t.checksum = format!("{:016x}", xxh3_64(bytes));
        }
    }
    let pretty = |m: &DeltaManifest| serde_json::to_string_pretty(m).unwrap() + "\n";
    manifest.checksum = String::new();
    manifest.checksum = format!("{:032x}", xxh3_128(pretty(&manifest).as_bytes()));
    pretty(&manifest)
}
