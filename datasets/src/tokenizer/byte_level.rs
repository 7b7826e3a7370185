//! Byte-level BPE (GPT-2 and its descendants), as GGUF's `gpt2` model describes it: tokens, merges, and the name of
//! the rule that splits a text into words first.

use super::from_gguf::{Vocabulary, unknown_splitter};
use crate::Result;
use crate::gguf::metadata::Metadata;
use serde_json::{Value as Json, json};

/// How texts are split before merging.
#[derive(Clone, Copy)]
pub(super) enum Splitter {
    /// GPT-2's own expression, which the byte-level step has built in.
    Gpt2,
    /// Each digit alone, then as GPT-2.
    DigitsThenGpt2,
    /// An expression whose matches are the words; digits in runs of one.
    Qwen2,
    /// The same with runs of up to three digits.
    Llama3,
}

/// Values of `tokenizer.ggml.pre` and what they mean.
pub(super) const SPLITTERS: [(&str, Splitter); 9] = [
    ("default", Splitter::Gpt2),
    ("gpt-2", Splitter::Gpt2),
    ("gpt2", Splitter::Gpt2),
    ("smollm", Splitter::DigitsThenGpt2),
    ("qwen2", Splitter::Qwen2),
    ("deepseek-r1-qwen", Splitter::Qwen2),
    ("llama-bpe", Splitter::Llama3),
    ("llama3", Splitter::Llama3),
    ("llama-v3", Splitter::Llama3),
];

/// The words of Qwen2 and Llama 3, which differ in how many digits stay together: contractions; letters with at most
/// one other sign before; digits; signs with at most one space before and line ends after; blank runs.
fn words(digits: &str) -> String {
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        digits,
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
    .join("|")
}

fn byte_level(use_regex: bool) -> Json {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

impl Splitter {
    fn pre_tokenizer(self) -> Json {
        let first = match self {
            Splitter::Gpt2 => return byte_level(true),
            Splitter::DigitsThenGpt2 => json!({"type": "Digits", "individual_digits": true}),
            Splitter::Qwen2 => split(&words(r"\p{N}")),
            Splitter::Llama3 => split(&words(r"\p{N}{1,3}")),
        };
        let use_regex = matches!(self, Splitter::DigitsThenGpt2);
        json!({"type": "Sequence", "pretokenizers": [first, byte_level(use_regex)]})
    }
}

fn split(expression: &str) -> Json {
    json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false})
}

pub(super) fn build(metadata: &Metadata<'_>, vocabulary: &Vocabulary<'_>) -> Result<Json> {
    let name = metadata.str("tokenizer.ggml.pre")?.unwrap_or("default");
    let splitter = SPLITTERS.iter().find(|s| s.0 == name).map(|s| s.1).ok_or_else(|| unknown_splitter(name))?;
    let key = "tokenizer.ggml.merges";
    let merges = metadata.strings(key)?.ok_or_else(|| metadata.corrupt(key, "the key is missing"))?;
    let mut pairs = Vec::with_capacity(merges.len());
    for (rank, merge) in merges.iter().enumerate() {
        let parts = merge.split_once(' ').filter(|(a, b)| {
            !b.contains(' ')
                && vocabulary.contains(a)
                && vocabulary.contains(b)
                && vocabulary.contains(&[*a, *b].concat())
        });
        let Some((a, b)) = parts else {
            return Err(metadata.corrupt(key, format!("merge {rank}, {merge:?}, is not of two tokens into one")));
        };
        pairs.push(json!([a, b]));
    }
    // Qwen2's own tokenizer composes characters first; Llama 3 takes a word that is a token as it is.
    let normalizer = matches!(splitter, Splitter::Qwen2).then(|| json!({"type": "NFC"}));
    Ok(json!({
        "truncation": null, "padding": null, "normalizer": normalizer, "pre_tokenizer": splitter.pre_tokenizer(),
        "post_processor": null, "decoder": byte_level(true),
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "ignore_merges": matches!(splitter, Splitter::Llama3), "vocab": vocabulary.ids, "merges": pairs},
    }))
}
