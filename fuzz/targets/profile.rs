//! Profiles: values of `profile.json` and bytes of the statistics changed, then opened, read, and split with.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::fs;
use std::sync::OnceLock;
use thermocline_calibrate::Profile;
use thermocline_fuzz::{Input, Overlaid, Template, edit_json, split, temporary};
use thermocline_kernels::Encoding;
use thermocline_split::Compression;
use xxhash_rust::xxh3::xxh3_128;

static TEMPLATE: OnceLock<Template> = OnceLock::new();

fuzz_target!(|data: &[u8]| {
    let template = TEMPLATE.get_or_init(|| {
        let made = thermocline_fuzz::profile();
        Template::new("changed-profile", |dir| {
            fs::create_dir(dir).unwrap();
            for name in ["profile.json", "statistics.safetensors"] {
                fs::copy(made.join(name), dir.join(name)).unwrap();
            }
        })
    });
    template.restore();
    let (meta, statistics) = (template.dir.join("profile.json"), template.dir.join("statistics.safetensors"));
    let mut value: serde_json::Value = serde_json::from_slice(&fs::read(&meta).unwrap()).unwrap();
    let mut bytes = fs::read(&statistics).unwrap();
    let mut input = Input(data);
    while !input.is_empty() {
        let n = bytes.len();
        match input.byte() % 4 {
            0 => edit_json(&mut value, &mut input),
            // Statistics that lie: most of the file is data.
            1 => bytes[input.below(n)] = input.byte(),
            2 => {
                let at = input.below(n);
                let run = n.min(at + input.below(256));
                bytes[at..run].fill(input.byte());
            }
            _ => {
                bytes.truncate(1 + input.below(n));
                break;
            }
        }
    }
    if value.get("statistics_digest").is_some_and(|d| d.is_string()) {
        value["statistics_digest"] = format!("{:032x}", xxh3_128(&bytes)).into();
    }
    fs::write(&meta, value.to_string()).unwrap();
    fs::write(&statistics, &bytes).unwrap();
    let Ok(profile) = Profile::open(&template.dir) else { return };
    let _ = (profile.verify(), profile.sample_tokens());
    for layer in 0..profile.config().n_layers {
        let _ = profile.layer(layer);
    }
    // A split takes a hundred times as long as the rest.
    if data.len() % 8 != 0 {
        return;
    }
    let out = temporary().join("from-profile");
    let encoding = Encoding::Q4.into();
    let _ = split(&Overlaid::new(&[]), &profile, encoding, 8, Compression::None, &out);
    let _ = fs::remove_dir_all(&out);
    let _ = fs::remove_dir_all(temporary().join("from-profile.partial"));
});
