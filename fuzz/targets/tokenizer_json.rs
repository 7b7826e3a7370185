//! `tokenizer.json`: an error, or a tokenizer that encodes and decodes.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data) {
        thermocline_fuzz::exercise_tokenizer(text);
    }
});
