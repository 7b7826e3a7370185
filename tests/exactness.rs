//! The same tokens and the same logits, bit for bit, wherever the weights lie.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod support;

use proptest::prelude::*;
use std::path::{Path, PathBuf};
use support::{bits, budget_range, engine, json, llama, medium, needed_bytes, prompt, qwen_relu, request, split, text};
use thermocline_calibrate::dense::{DenseLayer, Embedding, Head};
use thermocline_runtime::{Engine, Error, Logits, Mode, PlanRequest};
use thermocline_split::SplitCheckpoint;

/// Logits of a prefill in two batches of unequal length and of single tokens behind it.
fn trajectory(engine: &mut Engine) -> Vec<f32> {
    engine.clear();
    let tokens = prompt(64);
    let mut logits = engine.forward(&tokens[..32], Logits::All).unwrap();
    logits.extend(engine.forward(&tokens[32..45], Logits::Last).unwrap());
    for token in &tokens[45..] {
        logits.extend(engine.forward(&[*token], Logits::Last).unwrap());
    }
    logits
}

/// From the least budget to one that holds everything.
fn budgets(dir: &Path, mode: Mode) -> Vec<Option<u64>> {
    let (least, all) = budget_range(dir, mode);
    let step = |i: u64| Some(least + (all - least) * i / 8);
    (0..9).map(step).chain([Some(least + 1), Some(all - 1), None]).collect()
}

fn splits() -> Vec<PathBuf> {
    vec![
        split(&llama(), "bf16", &["--chunk-neurons", "8"]),
        split(&llama(), "q4", &["--chunk-neurons", "16", "--order", "random"]),
        split(&qwen_relu(), "q8", &["--chunk-neurons", "1"]),
        split(&qwen_relu(), "bf16", &["--chunk-neurons", "24", "--zstd-level", "3"]),
        split(&llama(), "q4", &["--chunk-neurons", "8", "--sketch"]),
    ]
}

#[test]
fn exact_logits_are_the_same_bits_for_every_budget_and_thread_count() {
    for dir in splits() {
        let expected = bits(&trajectory(&mut engine(&dir, request(Mode::Exact, None, 1)).unwrap()));
        for (i, budget) in budgets(&dir, Mode::Exact).into_iter().enumerate() {
            let mut streamed = engine(&dir, request(Mode::Exact, budget, 3 - i % 3)).unwrap();
            assert!(budget.is_none_or(|b| streamed.plan().total_bytes <= b));
            // Twice: reading ahead must not depend on what came before.
            for _ in 0..2 {
                let got = bits(&trajectory(&mut streamed));
                assert!(got == expected, "{} with {budget:?}", dir.display());
            }
        }
    }
}

#[test]
fn sparse_logits_are_the_same_bits_for_every_budget_and_thread_count() {
    for dir in splits() {
        for active in [0.05, 0.3, 0.7] {
            let mode = Mode::Sparse { active };
            let expected = bits(&trajectory(&mut engine(&dir, request(mode, None, 2)).unwrap()));
            for (i, budget) in budgets(&dir, mode).into_iter().enumerate() {
                let mut streamed = engine(&dir, request(mode, budget, 3 - i % 3)).unwrap();
                for _ in 0..2 {
                    let got = bits(&trajectory(&mut streamed));
                    assert!(got == expected, "{} with {budget:?} and {active}", dir.display());
                }
            }
        }
    }
}

/// Also where a part of the neurons has no sketch, because every token computes it: wherever these lie.
#[test]
fn neurons_that_are_always_computed_give_the_same_bits_for_every_budget_and_thread_count() {
    let dir = split(&llama(), "q4", &["--chunk-neurons", "8", "--sketch"]);
    let exact = bits(&trajectory(&mut engine(&dir, request(Mode::Exact, None, 1)).unwrap()));
    let (mode, mut before) = (Mode::Sparse { active: 0.1 }, Vec::new());
    for share in [0.0, 0.3, 0.77, 1.0] {
        let always = |budget, threads| PlanRequest { always: Some(share), ..request(mode, budget, threads) };
        let mut all = engine(&dir, always(None, 2)).unwrap();
        let expected = bits(&trajectory(&mut all));
        assert!(!before.contains(&expected), "{share} is like another share");
        assert_eq!(expected == exact, share == 1.0);
        before.push(expected.clone());
        let config = &all.split().manifest().config;
        let (first, n) = (all.plan().always_neurons, config.intermediate_size);
        // The channels of the columns are there for any neuron's sketch.
        let columns = (size_of::<u32>() * config.hidden_size * config.n_layers) as u64;
        assert_eq!(first, (share * n as f32).round() as usize);
        let active = all.last_active();
        assert!(active[..first].iter().copied().eq(0..first as u32), "{active:?}");
        assert_eq!(active.len() - first, ((n - first) as f32 * 0.1).round() as usize);
        let whole = engine(&dir, request(mode, None, 2)).unwrap();
        let sketches = |engine: &Engine| (engine.plan().fixed.predictors - columns) as f64;
        let left = sketches(&all) / sketches(&whole);
        assert!((left - (n - first) as f64 / n as f64).abs() < 1e-9, "{left} of the sketches");
        for (i, budget) in budgets(&dir, mode).into_iter().enumerate() {
            let mut streamed = engine(&dir, always(budget, 3 - i % 3)).unwrap();
            let got = bits(&trajectory(&mut streamed));
            assert!(got == expected, "{share} always, {budget:?}");
        }
    }
}

#[test]
fn sparse_with_every_neuron_is_exact() {
    for dir in splits() {
        let expected = bits(&trajectory(&mut engine(&dir, request(Mode::Exact, None, 2)).unwrap()));
        let mode = Mode::Sparse { active: 1.0 };
        for budget in [None, Some(budget_range(&dir, mode).0)] {
            let got = bits(&trajectory(&mut engine(&dir, request(mode, budget, 2)).unwrap()));
            assert!(got == expected, "{} with {budget:?}", dir.display());
        }
    }
}

#[test]
fn a_small_share_changes_the_output() {
    // Or else the tests above compare sparse mode with itself being exact.
    let dir = split(&llama(), "bf16", &["--chunk-neurons", "8"]);
    let exact = trajectory(&mut engine(&dir, request(Mode::Exact, None, 1)).unwrap());
    let sparse = trajectory(&mut engine(&dir, request(Mode::Sparse { active: 0.05 }, None, 1)).unwrap());
    let prefilled = 33 * 300;
    assert!(bits(&exact[..prefilled]) == bits(&sparse[..prefilled]), "prefill is dense in both modes");
    assert!(bits(&exact[prefilled..]) != bits(&sparse[prefilled..]));
}

#[test]
fn greedy_tokens_are_the_same_for_every_budget_and_thread_count() {
    let dir = split(&llama(), "q4", &["--chunk-neurons", "16", "--order", "random"]);
    for prompt in ["the lake rests", "A", "0123456789 ".repeat(9).as_str()] {
        let tokens = |budget: &str, threads: &str| {
            let fixed = ["run", "-m", text(&dir), "-p", prompt, "-n", "64", "--temp", "0", "--ignore-eos", "--json"];
            json(&[&fixed[..], &["--mode", "exact", "--ram-budget", budget, "-t", threads]].concat())["tokens"].clone()
        };
        let expected = tokens("auto", "1");
        assert_eq!(expected.as_array().unwrap().len(), 64);
        let needed = needed_bytes(&["run", "-m", text(&dir), "-p", prompt, "-n", "64", "-t", "3"]);
        for (extra, threads) in [(0, "1"), (1, "2"), (20_000, "3"), (60_000, "1"), (100_000, "2"), (1 << 24, "3")] {
            assert_eq!(tokens(&format!("{}B", needed + extra), threads), expected, "{needed} + {extra}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_budget_is_refused_or_right(share in 0.0f64..1.1, which in 0usize..5, n_threads in 1usize..4, sparse in any::<bool>()) {
        let dir = &splits()[which];
        let mode = if sparse { Mode::Sparse { active: 1.0 } } else { Mode::Exact };
        let (least, all) = budget_range(dir, mode);
        let budget = (all as f64 * share) as u64 + 1;
        match engine(dir, request(mode, Some(budget), n_threads)) {
            Ok(mut engine) => {
                prop_assert!(engine.plan().total_bytes <= budget);
                let mut whole = support::engine(dir, request(Mode::Exact, None, 1)).unwrap();
                prop_assert!(bits(&trajectory(&mut engine)) == bits(&trajectory(&mut whole)));
            }
            Err(Error::DoesNotFit { budget_bytes, needed_bytes, .. }) => {
                prop_assert!(budget_bytes == budget && needed_bytes > budget && budget < least);
                let request = request(mode, Some(needed_bytes), n_threads);
                prop_assert!(support::engine(dir, request).is_ok(), "the figure in the message is enough");
            }
            Err(other) => prop_assert!(false, "{other}"),
        }
    }
}

/// The runtime against candle's matrix products in f32 on the same decoded weights.
#[test]
fn logits_agree_with_an_independent_dense_forward() {
    for dir in splits() {
        let checkpoint = SplitCheckpoint::open(&dir).unwrap();
        let tokens = prompt(48);
        let mut x = Embedding::load(&checkpoint).unwrap().rows(&tokens).unwrap();
        for index in 0..checkpoint.split().layers().len() {
            let layer = DenseLayer::load(&checkpoint, index).unwrap();
            x = layer.attention(&x, 1, tokens.len()).unwrap();
            let neurons = layer.neurons(&layer.ffn_input(&x).unwrap()).unwrap();
            layer.ffn_output(&mut x, neurons.h).unwrap();
        }
        let expected = Head::load(&checkpoint).unwrap().logits(&x).unwrap();
        let scale = expected.iter().fold(0.0f32, |max, l| max.max(l.abs()));
        // Keys and values are kept in half precision: 2^-11 of each, which the sums over positions and two layers
        // neither cancel nor amplify. Everything else is f32.
        let tolerance = 2.0 * scale / 2048.0;
        let wide = PlanRequest { batch: 48, ..request(Mode::Exact, None, 2) };
        let mut batched = engine(&dir, wide).unwrap();
        let mut single = engine(&dir, request(Mode::Exact, Some(budget_range(&dir, Mode::Exact).0), 2)).unwrap();
        let one_by_one: Vec<f32> = tokens.iter().flat_map(|t| single.forward(&[*t], Logits::Last).unwrap()).collect();
        for (how, got) in [("batch", batched.forward(&tokens, Logits::All).unwrap()), ("single tokens", one_by_one)] {
            assert_eq!(got.len(), expected.len());
            let worst = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < tolerance, "{} in {how}: {worst}, tolerance {tolerance}", dir.display());
        }
    }
}

/// Positions, batches and single tokens in any mixture are one sequence.
#[test]
fn batches_of_any_length_give_one_sequence() {
    let dir = split(&qwen_relu(), "q8", &["--chunk-neurons", "1"]);
    let tokens = prompt(40);
    let mut engine = engine(&dir, request(Mode::Exact, None, 2)).unwrap();
    let whole = engine.forward(&tokens, Logits::All).unwrap();
    let scale = whole.iter().fold(0.0f32, |max, l| max.max(l.abs()));
    for lengths in [vec![1; 40], vec![7, 1, 1, 31], vec![2; 20], vec![39, 1]] {
        engine.clear();
        let mut pieces = Vec::new();
        let mut rest = &tokens[..];
        for n in lengths {
            pieces.extend(engine.forward(&rest[..n], Logits::All).unwrap());
            rest = &rest[n..];
        }
        assert!(rest.is_empty() && engine.len() == 40);
        // Sums of a few hundred f32 terms in another order, and half-precision keys that round to their neighbour.
        let worst = whole.iter().zip(&pieces).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 2.0 * scale / 2048.0, "{worst} of {scale}");
    }
}

#[test]
fn a_full_context_is_refused_and_leaves_the_sequence_alone() {
    let dir = split(&llama(), "bf16", &["--chunk-neurons", "8"]);
    let mut engine = engine(&dir, request(Mode::Exact, None, 1)).unwrap();
    let before = engine.forward(&prompt(159), Logits::Last).unwrap();
    assert!(matches!(
        engine.forward(&prompt(2), Logits::Last),
        Err(Error::PromptTooLong { prompt_tokens: 161, context: 160 })
    ));
    assert!(matches!(engine.forward(&[300], Logits::Last), Err(Error::Setting { .. })));
    assert_eq!(engine.len(), 159);
    engine.forward(&[5], Logits::Last).unwrap();
    engine.clear();
    assert!(bits(&engine.forward(&prompt(159), Logits::Last).unwrap()) == bits(&before));
}

/// A model with enough layers, chunks and neurons that reads made one layer early are partly wrong, cached neurons
/// are evicted while their own layer is computed, and late reads lie around early ones.
#[test]
fn cache_and_lookahead_change_no_bit() {
    let dir = split(&medium(), "q4", &["--chunk-neurons", "4", "--order", "random"]);
    let mode = Mode::Sparse { active: 0.1 };
    let decode = |engine: &mut Engine| -> Vec<u32> {
        engine.clear();
        let mut logits = engine.forward(&prompt(8), Logits::Last).unwrap();
        for token in prompt(40) {
            logits.extend(engine.forward(&[token], Logits::Last).unwrap());
        }
        bits(&logits)
    };
    let expected = decode(&mut engine(&dir, request(mode, None, 2)).unwrap());
    let (least, all) = budget_range(&dir, mode);
    let (mut hits, mut misses, mut foreseen) = (0, 0, 0);
    for i in 0..12 {
        let mut streamed = engine(&dir, request(mode, Some(least + (all - least) * i / 12), 2)).unwrap();
        assert!(decode(&mut streamed) == expected, "budget {i}/12");
        let account = streamed.account();
        (hits, misses) = (hits + account.cache_hits, misses + account.cache_misses);
        foreseen += account.foreseen_used;
    }
    assert!(hits > 0 && misses > 0 && foreseen > 0, "{hits} {misses} {foreseen}");
}

/// Compressed chunks, and chunks of one neuron, through buffers that hold a fraction of a layer.
#[test]
fn compressed_chunks_stream_to_the_same_bits() {
    let dir = split(&medium(), "bf16", &["--chunk-neurons", "16", "--zstd-level", "1"]);
    let expected = bits(&trajectory(&mut engine(&dir, request(Mode::Exact, None, 2)).unwrap()));
    let (least, all) = budget_range(&dir, Mode::Exact);
    for budget in [least, (least + all) / 2, all - 1] {
        let mut streamed = engine(&dir, request(Mode::Exact, Some(budget), 3)).unwrap();
        assert!(streamed.plan().streams());
        assert!(bits(&trajectory(&mut streamed)) == expected, "{budget}");
        assert!(streamed.account().bytes.disk > 0);
    }
}
