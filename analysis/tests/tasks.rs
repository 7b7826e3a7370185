//! Zero-shot tasks: scores against an independent computation, one choice at a time, and files that cannot be asked.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use thermocline_analysis::Error;
use thermocline_analysis::eval::tasks::{TaskChoice, TaskExample};
use thermocline_analysis::eval::{Mask, Positions, TaskFile, TaskKind, TaskResult, active_count};
use thermocline_analysis::eval::{Windows, evaluate_task, fit_shares, read_task};
use thermocline_calibrate::dense::{DenseLayer, Embedding, Head};
use thermocline_calibrate::{RunOptions, Settings, calibrate};
use thermocline_datasets::write::{TinyModel, tiny_tokenizer_json, write_tiny_safetensors};
use thermocline_datasets::{Activation, Architecture, Checkpoint, Tokenizer, open_checkpoint};
use thermocline_kernels::Encoding;
use thermocline_split::{Compression, Rounding, Split, SplitCheckpoint, SplitOptions, split};

fn tokens(n: usize, seed: u64) -> Vec<u32> {
    (0..n as u64).map(|i| ((i * i * 7919 + i * 104_729 + seed * 977) % 297 + 3) as u32).collect()
}

/// Contexts and choices of many lengths, of one token too.
fn examples() -> Vec<TaskExample> {
    let example = |i: usize| {
        let n_choices = 2 + i % 3;
        let choice = |c: usize| {
            let n = 1 + (i + 2 * c) % 5;
            TaskChoice { tokens: tokens(n, (10 * i + c) as u64 + 1), bytes: 1 + (7 * i + 3 * c) % 11 }
        };
        TaskExample {
            context: tokens(1 + 17 * i % 140, i as u64),
            choices: (0..n_choices).map(choice).collect(),
            answer: i % n_choices,
        }
    };
    (0..12).map(example).collect()
}

fn biased() -> TinyModel {
    TinyModel { architecture: Architecture::Qwen2, tie_word_embeddings: false, ..TinyModel::default() }
}

fn make_split(dir: &Path, model: &TinyModel) -> SplitCheckpoint {
    write_tiny_safetensors(&dir.join("model"), model, 5).unwrap();
    let checkpoint = open_checkpoint(&dir.join("model")).unwrap();
    let settings = Settings { window_len: 64, n_samples: 128, ..Settings::default() };
    let options = RunOptions { resume: false, shard: None };
    let text = tokens(512, 0);
    let profile =
        calibrate(checkpoint.as_ref(), &text, &settings, &options, &dir.join("profile"), &mut |_| ()).unwrap();
    let options = SplitOptions {
        encoding: Encoding::Bf16.into(),
        resident_encoding: Encoding::Bf16,
        attention_encoding: None,
        order: None,
        chunk_neurons: None,
        compression: Compression::None,
        predictor_rank: 32,
        outliers: 0.0,
        scales: thermocline_split::Scales::Moments,
        rounding: Rounding::Feedback,
        sketch: None,
        residuals: false,
    };
    let path = dir.join("split");
    split(checkpoint.as_ref(), &profile, &options, &path, &|_, _| ()).unwrap();
    let opened = SplitCheckpoint::open(&path).unwrap();
    let shares = fit_shares(&opened, opened.split(), &Windows::new(&text, 64, 2).unwrap(), &|_, _| ()).unwrap();
    Split::put_shares(&path, &shares).unwrap();
    SplitCheckpoint::open(&path).unwrap()
}

fn ask(model: &SplitCheckpoint, examples: &[TaskExample], masks: &[Mask], positions: Positions) -> Vec<TaskResult> {
    let asked = (TaskKind::Cloze, examples);
    evaluate_task(model, Some(model.split()), asked, masks, positions, &|_, _| ()).unwrap()
}

/// Log-likelihood of one choice behind its context: one forward, no packing, softmax by hand in f64. The oracle's share of
/// neurons is kept from row `first_masked` on, over a context that is computed without a mask before.
fn one_choice(
    model: &dyn Checkpoint,
    example: &TaskExample,
    choice: &TaskChoice,
    share: f64,
    first_masked: usize,
) -> f64 {
    let (config, n_context) = (model.config(), example.context.len());
    let all: Vec<u32> = example.context.iter().chain(&choice.tokens).copied().collect();
    let n = all.len();
    let embedded = Embedding::load(model).unwrap().rows(&all).unwrap();
    let (mut dense, mut x) = (embedded.clone(), embedded);
    for index in 0..config.n_layers {
        let layer = DenseLayer::load(model, index).unwrap();
        let norms = layer.down_norms().unwrap();
        let forward = |x: &[f32], from: usize| {
            let mut next = layer.attention(x, 1, n).unwrap();
            let mut h = layer.neurons(&layer.ffn_input(&next).unwrap()).unwrap().h;
            for h in h.chunks_exact_mut(config.intermediate_size).skip(from) {
                let mut order: Vec<usize> = (0..h.len()).collect();
                order.sort_by(|&a, &b| (h[b].abs() * norms[b]).total_cmp(&(h[a].abs() * norms[a])));
                order[active_count(share, h.len())..].iter().for_each(|&i| h[i] = 0.0);
            }
            layer.ffn_output(&mut next, h).unwrap();
            next
        };
        x = forward(&x, first_masked);
        dense = forward(&dense, n);
        x[..first_masked * config.hidden_size].copy_from_slice(&dense[..first_masked * config.hidden_size]);
    }
    let logits = Head::load(model).unwrap().logits(&x).unwrap();
    let log_softmax = |(i, &target): (usize, &u32)| {
        let row = &logits[(n_context - 1 + i) * config.vocab_size..][..config.vocab_size];
        let total: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
        f64::from(row[target as usize]) - total.ln()
    };
    choice.tokens.iter().enumerate().map(log_softmax).sum()
}

/// All examples packed, against each choice alone.
fn check(model: &SplitCheckpoint, share: f64, positions: Positions) {
    let (examples, mask) = (examples(), if share < 1.0 { Mask::Oracle(share) } else { Mask::Dense });
    let first_masked = |e: &TaskExample| if positions == Positions::Decoded { e.context.len() } else { 0 };
    let of_choices = |e: &TaskExample| -> Vec<f64> {
        e.choices.iter().map(|choice| one_choice(model, e, choice, share, first_masked(e))).collect()
    };
    let likelihoods: Vec<Vec<f64>> = examples.iter().map(of_choices).collect();
    let best = |values: Vec<f64>| (0..values.len()).max_by(|&a, &b| values[a].total_cmp(&values[b])).unwrap();
    let (mut right, mut right_by_bytes, mut loss) = (0, 0, 0.0);
    for (e, of_choices) in examples.iter().zip(&likelihoods) {
        let by_bytes = of_choices.iter().zip(&e.choices).map(|(l, c)| l / c.bytes as f64).collect();
        right += usize::from(best(of_choices.clone()) == e.answer);
        right_by_bytes += usize::from(best(by_bytes) == e.answer);
        loss -= of_choices[e.answer] / examples.len() as f64;
    }
    let n = examples.len() as f64;
    let result = ask(model, &examples, &[mask], positions).remove(0);
    assert!((result.answer_loss - loss).abs() < 1e-4, "{mask:?} {positions:?}: {} {loss}", result.answer_loss);
    assert!((result.accuracy.share - right as f64 / n).abs() < 1e-9, "{mask:?} {positions:?}");
    assert!((result.accuracy_by_bytes.unwrap().share - right_by_bytes as f64 / n).abs() < 1e-9);
    // Each choice, asked for as the answer.
    for (e, of_choices) in examples.iter().zip(&likelihoods).skip(5).take(3) {
        for (answer, expected) in of_choices.iter().enumerate() {
            let result = ask(model, &[TaskExample { answer, ..e.clone() }], &[mask], positions).remove(0);
            assert!((result.answer_loss + expected).abs() < 1e-4, "{answer}: {} {expected}", result.answer_loss);
        }
    }
}

#[test]
fn packed_examples_score_as_each_alone() {
    for model in [TinyModel::default(), biased()] {
        let dir = tempfile::tempdir().unwrap();
        let split = make_split(dir.path(), &model);
        check(&split, 1.0, Positions::All);
        check(&split, 0.3, Positions::All);
        check(&split, 0.3, Positions::Decoded);
    }
}

/// Under every mask an example has the score that it has alone, whatever it is packed with.
#[test]
fn examples_know_nothing_of_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let split = make_split(dir.path(), &TinyModel { activation: Activation::Silu, ..TinyModel::default() });
    let of = [Mask::Predicted, Mask::PredictedAlike, Mask::Cats, Mask::Teal, Mask::Wina, Mask::OracleH];
    let masks: Vec<Mask> = of.into_iter().map(|of| of(0.4)).chain([Mask::Dense, Mask::Exact]).collect();
    let examples = examples();
    for positions in [Positions::All, Positions::Decoded] {
        let together = ask(&split, &examples, &masks, positions);
        let mut alone = vec![0.0; masks.len()];
        for e in &examples {
            let results = ask(&split, std::slice::from_ref(e), &masks, positions);
            alone.iter_mut().zip(results).for_each(|(sum, r)| *sum += r.answer_loss / examples.len() as f64);
        }
        for (result, alone) in together.iter().zip(&alone) {
            // Scores that nearly tie may choose other neurons at the edge of a set.
            let gap = (result.answer_loss - alone).abs();
            assert!(gap < 2e-3, "{} {positions:?}: {} {alone}", result.mask, result.answer_loss);
        }
        let loss = |mask: &str| together.iter().find(|r| r.mask == mask).unwrap().answer_loss;
        assert_eq!(loss("dense"), loss("exact"));
        for mask in ["predicted", "predicted-alike", "cats", "teal", "wina", "oracle-h"] {
            assert!((loss(mask) - loss("dense")).abs() > 1e-3, "{mask} {positions:?} changes nothing");
        }
    }
}

/// What the dense model computed is not masked: with `decoded` an answer of one token is the dense model's under every mask.
#[test]
fn a_prompt_is_dense() {
    let dir = tempfile::tempdir().unwrap();
    let split = make_split(dir.path(), &TinyModel::default());
    let mut examples = examples();
    for choice in examples.iter_mut().flat_map(|e| &mut e.choices) {
        choice.tokens.truncate(1);
    }
    let of = [Mask::Predicted, Mask::Oracle, Mask::Cats, Mask::Teal, Mask::Wina];
    let masks: Vec<Mask> = of.into_iter().map(|of| of(0.1)).chain([Mask::Dense]).collect();
    let decoded = ask(&split, &examples, &masks, Positions::Decoded);
    let all = ask(&split, &examples, &masks, Positions::All);
    let dense = decoded.last().unwrap().answer_loss;
    assert_eq!(dense, all.last().unwrap().answer_loss);
    for (decoded, all) in decoded.iter().zip(&all).take(5) {
        assert!((decoded.answer_loss - dense).abs() < 1e-5, "{}: {} {dense}", decoded.mask, decoded.answer_loss);
        assert_eq!((decoded.accuracy.lost, decoded.accuracy.gained), (0, 0), "{}", decoded.mask);
        assert!((all.answer_loss - dense).abs() > 1e-3, "{}", all.mask);
    }
}

/// A word that the model itself would have written is right, and only then.
#[test]
fn a_last_word_is_right_if_it_is_the_likeliest() {
    let dir = tempfile::tempdir().unwrap();
    let split = make_split(dir.path(), &TinyModel::default());
    let (mut examples, head) = (Vec::new(), Head::load(&split).unwrap());
    for i in 0..4usize {
        let context = tokens(20 + i, i as u64);
        let mut all = context.clone();
        for _ in 0..3 {
            let mut x = Embedding::load(&split).unwrap().rows(&all).unwrap();
            for index in 0..split.config().n_layers {
                let layer = DenseLayer::load(&split, index).unwrap();
                x = layer.attention(&x, 1, all.len()).unwrap();
                let neurons = layer.neurons(&layer.ffn_input(&x).unwrap()).unwrap();
                layer.ffn_output(&mut x, neurons.h).unwrap();
            }
            let logits = head.logits(&x[(all.len() - 1) * split.config().hidden_size..]).unwrap();
            let likeliest = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
            all.push(likeliest as u32);
        }
        let mut word = all.split_off(context.len());
        // One of four words has another last token, another one another first.
        match i {
            2 => word[2] = (word[2] + 1) % 300,
            3 => word[0] = (word[0] + 1) % 300,
            _ => (),
        }
        examples.push(TaskExample { context, choices: vec![TaskChoice { tokens: word, bytes: 3 }], answer: 0 });
    }
    let asked = (TaskKind::Lambada, examples.as_slice());
    let results = evaluate_task(&split, None, asked, &[Mask::Dense], Positions::All, &|_, _| ()).unwrap();
    assert_eq!(results[0].accuracy.share, 0.5);
    assert!((results[0].word_perplexity.unwrap().ln() - results[0].answer_loss).abs() < 1e-9);
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_json(&tiny_tokenizer_json(&TinyModel::default())).unwrap()
}

fn read(kind: TaskKind, text: &str, max_context: usize) -> Result<Vec<TaskExample>, Box<Error>> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("task.jsonl");
    fs::write(&path, text).unwrap();
    read_task(&TaskFile { kind, path }, &tokenizer(), max_context, None).map_err(Box::new)
}

#[test]
fn text_becomes_context_and_choices() {
    let tokenizer = tokenizer();
    let decoded = |tokens: &[u32]| tokenizer.decode(tokens).unwrap();
    let text = "{\"text\": \"the end of the  road \\n\", \"other\": 7}\n\n{\"text\": \"a\\nb\"}";
    let examples = read(TaskKind::Lambada, text, 100).unwrap();
    let parts: Vec<_> = examples.iter().map(|e| (decoded(&e.context), decoded(&e.choices[0].tokens))).collect();
    let expected = [("the end of the", "  road"), ("a", "\nb")].map(|(a, b)| (a.to_owned(), b.to_owned()));
    assert_eq!(parts, expected);
    assert_eq!(examples[0].choices[0].bytes, 4);

    let line = "{\"context\": \"the sea \", \"choices\": [\"was\", \" was wet\", \"wet\"], \"answer\": 2}";
    let examples = read(TaskKind::Cloze, line, 100).unwrap();
    let choices: Vec<_> = examples[0].choices.iter().map(|c| (decoded(&c.tokens), c.bytes)).collect();
    assert_eq!((decoded(&examples[0].context), examples[0].answer), ("the sea".to_owned(), 2));
    assert_eq!(choices, [(" was".to_owned(), 3), ("  was wet".to_owned(), 7), (" wet".to_owned(), 3)]);
    // A token that reaches over the border ("he" of "t" and "h") is the choice's.
    let examples = read(TaskKind::Cloze, "{\"context\":\"x t\",\"choices\":[\"he\",\"o\"],\"answer\":0}", 100).unwrap();
    let whole: Vec<_> =
        examples[0].choices.iter().map(|c| decoded(&[&examples[0].context[..], &c.tokens].concat())).collect();
    assert_eq!(whole, ["x the", "x to"]);
}

#[test]
fn files_that_cannot_be_asked_are_refused_by_line_and_field() {
    let long = format!("{{\"text\": \"{} end\"}}", "the ".repeat(40));
    let cloze = |fields: &str| {
        format!("{{\"context\": \"the sea\", \"choices\": [\" a\", \" b\"], \"answer\": 0}}\n{{{fields}}}")
    };
    let lambada = [
        ("{\"text\": \"a b\"}\n{\"txt\": \"a b\"}", 2, "text", "is missing (the line has: txt)"),
        ("{\"text\": 7}", 1, "text", "is no text"),
        ("\n\n{\"text\": \"  \\n\"}", 3, "text", "is empty"),
        ("{\"text\": \" word \"}", 1, "text", "one word"),
        ("[1]", 1, "JSON", "no object"),
        ("{\"text\": \"a b", 1, "JSON", "no object"),
        (long.as_str(), 1, "text", "trained for 32"),
    ];
    let of_cloze = [
        ("\"choices\": [\"a\", \"b\"], \"answer\": 0", "context", "is missing"),
        ("\"context\": \" \", \"choices\": [\"a\", \"b\"], \"answer\": 0", "context", "is empty"),
        ("\"context\": \"a\", \"answer\": 0", "choices", "is missing"),
        ("\"context\": \"a\", \"choices\": \"a\", \"answer\": 0", "choices", "no list"),
        ("\"context\": \"a\", \"choices\": [\" b\"], \"answer\": 0", "choices", "takes two"),
        ("\"context\": \"a\", \"choices\": [\" b\", 3], \"answer\": 0", "choices[1]", "is no text"),
        ("\"context\": \"a\", \"choices\": [\" b\", \"\"], \"answer\": 0", "choices[1]", "is empty"),
        ("\"context\": \"a\", \"choices\": [\" b\", \" c\"]", "answer", "is missing"),
        ("\"context\": \"a\", \"choices\": [\" b\", \" c\"], \"answer\": 2", "answer", "0 to 1"),
        ("\"context\": \"a\", \"choices\": [\" b\", \" c\"], \"answer\": -1", "answer", "0 to 1"),
        ("\"context\": \"a\", \"choices\": [\" b\", \" c\"], \"answer\": 0.5", "answer", "0 to 1"),
    ];
    let refused =
        |kind: TaskKind, text: &str, line: u64, field: &str, reason: &str| match *read(kind, text, 32).unwrap_err() {
            Error::Example { line: got_line, field: got_field, reason: got, .. } => {
                assert_eq!((got_line, got_field.as_str()), (line, field), "{text}");
                assert!(got.contains(reason), "{text}: {got}");
            }
            other => panic!("{text}: {other}"),
        };
    lambada.iter().for_each(|(text, line, field, reason)| refused(TaskKind::Lambada, text, *line, field, reason));
    of_cloze.iter().for_each(|(fields, field, reason)| refused(TaskKind::Cloze, &cloze(fields), 2, field, reason));
    let too_long = format!("\"context\": \"a\", \"choices\": [\" b\", \"{}\"], \"answer\": 0", " c".repeat(40));
    refused(TaskKind::Cloze, &cloze(&too_long), 2, "choices[1]", "trained for 32");
    // A token that all choices share with nothing before it leaves no context.
    refused(
        TaskKind::Cloze,
        &cloze("\"context\": \"h\", \"choices\": [\"er\", \"e\"], \"answer\": 0"),
        2,
        "context",
        "no token",
    );

    for text in ["", "\n \n"] {
        assert!(matches!(*read(TaskKind::Cloze, text, 32).unwrap_err(), Error::Input { .. }));
    }
    let missing = TaskFile { kind: TaskKind::Cloze, path: PathBuf::from("/nonexistent/task.jsonl") };
    assert!(matches!(read_task(&missing, &tokenizer(), 32, None), Err(Error::Io { .. })));
}

/// The set in the repository is what its script is said to make.
#[test]
fn committed_cloze_set_is_sound() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../datasets/tasks/litbank-cloze.jsonl");
    let file = TaskFile { kind: TaskKind::Cloze, path: path.clone() };
    let examples = read_task(&file, &tokenizer(), 1 << 20, None).unwrap();
    assert_eq!(examples.len(), 100);
    assert_eq!(read_task(&file, &tokenizer(), 1 << 20, Some(7)).unwrap(), examples[..7]);
    let (mut names, mut answers) = (0, [0; 10]);
    for line in fs::read_to_string(&path).unwrap().lines() {
        let example: serde_json::Value = serde_json::from_str(line).unwrap();
        let choices: Vec<&str> = example["choices"].as_array().unwrap().iter().map(|c| c.as_str().unwrap()).collect();
        assert_eq!(choices.len(), 10);
        // Ten different words, all of them from the context, and one rest of the sentence.
        let shortest = choices.iter().map(|c| c.len()).min().unwrap();
        let same = |n: &usize| choices.iter().all(|c| c[c.len() - n..] == choices[0][choices[0].len() - n..]);
        let rest = (0..shortest).rev().find(|n| choices[0].is_char_boundary(choices[0].len() - n) && same(n)).unwrap();
        assert!(rest > 0, "{line}");
        let word = |c: &str| c.trim_start().split(|c: char| !c.is_ascii_alphabetic()).next().unwrap().to_owned();
        let mut words: Vec<String> = choices.iter().map(|c| word(c)).collect();
        assert!(words.iter().all(|w| example["context"].as_str().unwrap().contains(w.as_str())), "{line}");
        words.sort();
        words.dedup();
        assert_eq!(words.len(), 10, "{line}");
        names += usize::from(example["kind"] == "name");
        answers[example["answer"].as_u64().unwrap() as usize] += 1;
    }
    assert_eq!(names, 50);
    assert!(answers.iter().all(|n| *n > 0), "{answers:?}");
}
