//! What the targets share: files in a folder of the process, models made once, and hostile values.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)]

mod edits;
mod models;

pub use edits::{Input, edit_json};
pub use models::{Overlaid, Template, delta, folder, profile, shape, split};

#[path = "../../tests/support/forge.rs"]
#[allow(dead_code, missing_docs)]
pub mod forge;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use thermocline_datasets::{ChatTemplate, Checkpoint, Tokenizer};

/// A folder of this process; `run.sh` puts it in memory and removes it.
pub fn temporary() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| tempfile::Builder::new().prefix("fuzz").tempdir().unwrap().keep())
}

/// The pieces of a text input.
pub fn parts(data: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(data);
    std::iter::from_fn(move || {
        let now = rest?;
        let at = now.windows(5).position(|w| w == b"\n===\n");
        rest = at.map(|at| &now[at + 5..]);
        Some(at.map_or(now, |at| &now[..at]))
    })
}

/// Reads whatever a checkpoint offers.
pub fn exercise(checkpoint: &dyn Checkpoint) {
    for name in checkpoint.names() {
        let rows = checkpoint.info(&name).unwrap().shape[0];
        let _ = checkpoint.load_rows(&name, 0..rows.min(3));
        let _ = checkpoint.load_rows(&name, rows - rows.min(1)..rows);
    }
    if let Ok(text) = checkpoint.tokenizer_json()
        && text.len() % 4 == 0
    {
        // The slowest part by far, and a target of its own.
        exercise_tokenizer(&text);
    }
    if let Some(template) = checkpoint.chat_template() {
        let _ = ChatTemplate::new(&template, "<s>", "</s>");
    }
}

/// The fuzzer's hook ends the process at every panic; those that become errors are none of its business.
pub fn contain_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !thermocline_datasets::is_contained() {
                hook(info);
            }
        }));
    });
}

/// Builds a tokenizer and takes a text there and back.
pub fn exercise_tokenizer(text: &str) {
    contain_panics();
    let Ok(tokenizer) = Tokenizer::from_json(text) else { return };
    for text in ["", "the water <|im_start|> moves\n\u{e9}\u{1f41f}  "] {
        if let Ok(ids) = tokenizer.encode(text, true) {
            let _ = tokenizer.decode(&ids);
            let mut stream = tokenizer.decode_stream();
            for id in ids {
                let _ = stream.push(id);
            }
        }
    }
    let _ = tokenizer.decode(&[0, 1, u32::MAX, tokenizer.vocab_size() as u32]);
    let _ = (tokenizer.document_separator(), tokenizer.id_to_token(7));
}
