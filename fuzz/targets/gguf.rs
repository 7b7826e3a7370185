//! GGUF files: whatever the header says is an error or a model that can be read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;
use thermocline_datasets::gguf::GgufHeader;
use thermocline_datasets::open_checkpoint;

fuzz_target!(|data: &[u8]| {
    if GgufHeader::read(data, Path::new("input.gguf"), data.len() as u64).is_err() {
        return;
    }
    let path = thermocline_fuzz::temporary().join("input.gguf");
    std::fs::write(&path, data).unwrap();
    if let Ok(checkpoint) = open_checkpoint(&path) {
        thermocline_fuzz::exercise(checkpoint.as_ref());
    }
});
