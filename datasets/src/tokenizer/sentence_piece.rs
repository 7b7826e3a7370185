//! SentencePiece BPE (Llama 2, Mistral), as GGUF's `llama` model describes it: pieces with scores, from which the
//! merges are derived; bytes stand in for characters that no piece covers.

use super::from_gguf::Vocabulary;
use crate::Result;
use crate::gguf::metadata::Metadata;
use crate::gguf::{Array, Value};
use serde_json::{Value as Json, json};

/// Longest piece that merges are derived for, in bytes (SentencePiece itself makes 16 characters at most), so that
/// a hostile vocabulary cannot cost quadratic time.
const MAX_PIECE_BYTES: usize = 256;

/// What stands for a space.
const SPACE: &str = "\u{2581}";

pub(super) fn build(metadata: &Metadata<'_>, vocabulary: &Vocabulary<'_>) -> Result<Json> {
    let key = "tokenizer.ggml.scores";
    let scores = match metadata.get(key) {
        Some(Value::Array(Array::F32(scores))) => scores,
        Some(other) => return Err(metadata.corrupt(key, format!("is a {}, expected float32s", other.type_name()))),
        None => return Err(metadata.corrupt(key, "the key is missing")),
    };
    if scores.len() != vocabulary.tokens.len() {
        let reason = format!("{} scores for {} tokens", scores.len(), vocabulary.tokens.len());
        return Err(metadata.corrupt(key, reason));
    }
    let prefix = metadata.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let unknown = vocabulary.tokens.iter().zip(&vocabulary.kinds).find(|(_, kind)| **kind == 2).map(|(token, _)| token);
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let normalizers: Vec<Json> =
        prefix.then(|| json!({"type": "Prepend", "prepend": SPACE})).into_iter().chain([spaces]).collect();
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(json!({
        "truncation": null, "padding": null, "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                  "vocab": vocabulary.ids, "merges": merges(vocabulary, scores)},
    }))
}

/// Every way to make a normal piece of two others, the best-scored piece first; ways to make the same piece in the
/// order of their left part's id, then the right one's.
fn merges(vocabulary: &Vocabulary<'_>, scores: &[f32]) -> Vec<Json> {
    let mergeable = |token: &str| vocabulary.ids.get(token).and_then(Json::as_u64);
    let mut found = Vec::new();
    for ((piece, kind), score) in vocabulary.tokens.iter().zip(&vocabulary.kinds).zip(scores) {
        if *kind != 1 || piece.len() > MAX_PIECE_BYTES {
            continue;
        }
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if let (Some(left_id), Some(right_id)) = (mergeable(left), mergeable(right)) {
                found.push((*score, left_id, right_id, left, right));
            }
        }
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| (a.1, a.2).cmp(&(b.1, b.2))));
    found.into_iter().map(|(_, _, _, left, right)| json!([left, right])).collect()
}
