use super::{Shape, Statistics};
use crate::Random;
use serde_json::{Map, Value, json};

/// Standard deviation of a pattern code, an integer in -7..=7.
pub(super) const CODE_SD: f32 = 2.6;
const CODE_MAX: f32 = 7.0;
/// Steps after which the walk has forgotten where it began, for every reuse that is allowed.
const MEMORY_TOKENS: usize = 4096;

/// Codes `[vocab, pattern]`: a walk through the vocabulary, closed, in which neighbours are correlated. All have about
/// the same length, so that the number of neurons that fire changes little from token to token.
pub(super) fn patterns(shape: &Shape, statistics: &Statistics, seed: u64) -> Vec<i8> {
    let (n, width) = (shape.vocab_size, shape.pattern_channels);
    let keep = statistics.reuse as f32;
    let renew = (1.0 - keep * keep).sqrt();
    let mut state = vec![0.0f32; width];
    let mut step = |token: usize| {
        let mut random = Random::at(seed, &[super::PATTERN, token as u64]);
        state.iter_mut().for_each(|s| *s = keep * *s + renew * random.normal());
        let length = state.iter().map(|s| s * s).sum::<f32>().sqrt();
        let scale = CODE_SD * (width as f32).sqrt() / length;
        state.iter().map(|s| (s * scale).round().clamp(-CODE_MAX, CODE_MAX) as i8).collect::<Vec<i8>>()
    };
    // The last tokens' innovations come before the first token: the last and the first are neighbours like any two.
    for token in n - MEMORY_TOKENS.min(n)..n {
        step(token);
    }
    (0..n).flat_map(step).collect()
}

/// Names `[vocab, identity]`, each channel 1 or -1: any two tokens' names are nearly orthogonal.
pub(super) fn identities(shape: &Shape, seed: u64) -> Vec<i8> {
    let width = shape.identity_channels;
    let name = |token: usize| {
        let mut random = Random::at(seed, &[super::IDENTITY, token as u64]);
        (0..width).map(move |_| if random.next_u64() >> 63 == 0 { 1 } else { -1 })
    };
    (0..shape.vocab_size).flat_map(name).collect()
}

/// A `tokenizer.json` of whole words `t0`, `t1`, ..., separated by white space.
pub(super) fn tokenizer_json(vocab_size: usize) -> String {
    let vocab: Map<String, Value> = (0..vocab_size).map(|t| (format!("t{t}"), json!(t))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"},
    })
    .to_string()
}
