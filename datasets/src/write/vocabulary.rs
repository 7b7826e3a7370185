use super::TinyModel;
use serde_json::{Map, Value, json};

/// Control tokens: text end and beginning, and the two marks of the ChatML template.
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// Pairs that are common in English, in the order in which their parts come to exist.
const MERGES: [(&str, &str); 24] = [
    ("Ġ", "t"),
    ("h", "e"),
    ("Ġ", "a"),
    ("i", "n"),
    ("r", "e"),
    ("o", "n"),
    ("Ġt", "he"),
    ("e", "r"),
    ("Ġ", "s"),
    ("a", "t"),
    ("Ġ", "w"),
    ("Ġ", "o"),
    ("e", "n"),
    ("Ġ", "c"),
    ("n", "d"),
    ("i", "t"),
    ("i", "s"),
    ("Ġ", "b"),
    ("e", "s"),
    ("o", "r"),
    ("in", "g"),
    ("Ġa", "nd"),
    ("Ġo", "f"),
    ("Ġ", "m"),
];

/// The printable character that byte-level BPE writes for a byte: itself where that is a visible Latin-1
/// character, else the next free one from U+0100 on.
fn byte_char(byte: u8) -> char {
    let visible = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if visible(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|b| !visible(*b)).count() as u32;
    char::from_u32(0x100 + rank).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// Merges of the tiny vocabulary, as many as `model.vocab_size` has room for: common English pairs, then pairs of
/// small letters.
pub fn tiny_merges(model: &TinyModel) -> Vec<(String, String)> {
    let letters = ('a'..='z').flat_map(|a| ('a'..='z').map(move |b| (a.to_string(), b.to_string())));
    let common = MERGES.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned()));
    let rest = letters.filter(|(a, b)| !MERGES.contains(&(a.as_str(), b.as_str())));
    common.chain(rest).take(model.vocab_size.saturating_sub(256 + SPECIAL.len())).collect()
}

/// Tokens by id: the special ones, 256 bytes, then merges; padded with `<|unused_N|>` to the vocabulary's size.
pub fn tiny_tokens(model: &TinyModel) -> Vec<String> {
    let mut tokens: Vec<String> = SPECIAL.iter().map(|s| (*s).to_owned()).collect();
    tokens.extend((0..=255u8).map(|b| byte_char(b).to_string()));
    tokens.extend(tiny_merges(model).into_iter().map(|(a, b)| a + &b));
    while tokens.len() < model.vocab_size {
        tokens.push(format!("<|unused_{}|>", tokens.len()));
    }
    tokens
}

/// A `tokenizer.json`: byte-level BPE split like GPT-2's.
pub fn tiny_tokenizer_json(model: &TinyModel) -> String {
    let vocab: Map<String, Value> = tiny_tokens(model).into_iter().enumerate().map(|(i, t)| (t, json!(i))).collect();
    let added: Vec<Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false})
        })
        .collect();
    let merges: Vec<[String; 2]> = tiny_merges(model).into_iter().map(|(a, b)| [a, b]).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": added, "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": merges},
    })
    .to_string()
}
