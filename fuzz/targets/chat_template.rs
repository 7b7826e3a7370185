//! Chat templates: an error, or a prompt of bounded length in bounded time and memory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use thermocline_datasets::{ChatMessage, ChatTemplate};

/// What a template may write beyond the messages, twice over.
const LONGEST: usize = 2 << 20;

fuzz_target!(|data: &[u8]| {
    thermocline_fuzz::contain_panics();
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (template, message) = text.split_once("\n===\n").unwrap_or((text, " Hi, <you>! "));
    if let Ok(template) = ChatTemplate::new(template, "<s>", "</s>") {
        let messages = [ChatMessage::new("system", "Be brief."), ChatMessage::new("user", message)];
        if let Ok(prompt) = template.render(&messages, true) {
            assert!(prompt.len() <= LONGEST + 16 * text.len(), "{} bytes", prompt.len());
        }
    }
});
