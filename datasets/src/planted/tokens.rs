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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_walk_is_closed_and_neighbours_are_as_alike_as_asked() {
        let shape = Shape::named("tiny").unwrap();
        for reuse in [0.0, 0.6, 0.9] {
            let codes = patterns(&shape, &Statistics { reuse, ..Statistics::case("a").unwrap() }, 5);
            let width = shape.pattern_channels;
            let code = |t: usize| &codes[t % shape.vocab_size * width..][..width];
            let dot = |a: &[i8], b: &[i8]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
            let alike =
                |t: usize| dot(code(t), code(t + 1)) / (dot(code(t), code(t)) * dot(code(t + 1), code(t + 1))).sqrt();
            let n = shape.vocab_size;
            let mean = (0..n).map(alike).sum::<f64>() / n as f64;
            // 1024 pairs of 64 channels: an error of 0.004.
            assert!((mean - reuse).abs() < 0.02, "{mean}, asked for {reuse}");
            // One pair alone: 0.125.
            assert!((alike(n - 1) - reuse).abs() < 0.4, "{} around the end", alike(n - 1));
            assert!(codes.iter().all(|c| c.abs() <= 7));
        }
    }

    #[test]
    fn names_are_nearly_orthogonal_and_words_are_tokens() {
        let shape = Shape::named("7b").unwrap();
        let names = identities(&shape, 1);
        let name = |t: usize| &names[t * shape.identity_channels..][..shape.identity_channels];
        let dot = |a: usize, b: usize| name(a).iter().zip(name(b)).map(|(a, b)| i32::from(a * b)).sum::<i32>();
        assert_eq!(dot(9, 9), 256);
        assert!((0..shape.vocab_size).filter(|&t| t != 9).all(|t| dot(9, t).abs() < 100));
        let tokenizer = crate::Tokenizer::from_json(&tokenizer_json(shape.vocab_size)).unwrap();
        assert_eq!(tokenizer.encode("t7 t31999\nt0", true).unwrap(), [7, 31_999, 0]);
        assert_eq!(tokenizer.decode(&[7, 8]).unwrap(), "t7 t8");
    }
}
