//! Hugging Face folders: header of the weights, bytes of data behind it, index of shards, configuration, and the files
//! beside them, in this order, between lines of `===`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::fs;
use thermocline_datasets::open_checkpoint;

/// What the parts behind the data are.
const NAMES: [&str; 5] = [
    "model.safetensors.index.json",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
];

fuzz_target!(|data: &[u8]| {
    let folder = thermocline_fuzz::temporary().join("folder");
    fs::create_dir_all(&folder).unwrap();
    let mut parts = thermocline_fuzz::parts(data);
    let header = parts.next().unwrap_or_default();
    let n_data = parts.next().and_then(|n| std::str::from_utf8(n).ok()?.parse::<u16>().ok()).unwrap_or(0);
    let weights = [&(header.len() as u64).to_le_bytes()[..], header, &vec![0x3c; n_data.into()]].concat();
    fs::write(folder.join("model.safetensors"), weights).unwrap();
    for name in NAMES {
        match parts.next() {
            Some(text) if !text.is_empty() => fs::write(folder.join(name), text).unwrap(),
            _ => drop(fs::remove_file(folder.join(name))),
        }
    }
    if let Ok(checkpoint) = open_checkpoint(&folder) {
        thermocline_fuzz::exercise(checkpoint.as_ref());
    }
});
