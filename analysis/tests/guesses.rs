//! Ways to guess which neurons a token needs, on a tiny model: what they keep, what they cost, and what they refuse.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::Path;
use thermocline_analysis::eval::tasks::{TaskChoice, TaskExample};
use thermocline_analysis::eval::{
    Evaluation, Fitted, Guesser, Mask, Positions, TaskKind, Windows, evaluate, evaluate_task, fit_guesses,
};
use thermocline_calibrate::{RunOptions, Settings, calibrate};
use thermocline_datasets::open_checkpoint;
use thermocline_datasets::write::{TinyModel, write_tiny_safetensors};
use thermocline_kernels::Encoding;
use thermocline_split::{Compression, CopyBits, Rounding, SplitCheckpoint, SplitOptions, split};

const CTX: usize = 48;
const WINDOWS: usize = 3;
const ALL: [Guesser; 9] = [
    Guesser::Signs,
    Guesser::Copies(CopyBits::One),
    Guesser::Copies(CopyBits::Two),
    Guesser::Copies(CopyBits::Three),
    Guesser::Previous,
    Guesser::AheadByOne,
    Guesser::AheadByTwo,
    Guesser::Trained,
    Guesser::LowRankAndPrevious,
];

fn tokens(n: usize) -> Vec<u32> {
    (0..n as u64).map(|i| ((i * i * 7919 + i * 104_729) % 297 + 3) as u32).collect()
}

fn make(dir: &Path) -> SplitCheckpoint {
    let model = TinyModel { n_layers: 3, ..TinyModel::default() };
    write_tiny_safetensors(&dir.join("model"), &model, 5).unwrap();
    let checkpoint = open_checkpoint(&dir.join("model")).unwrap();
    let settings = Settings { window_len: 64, n_samples: 128, ..Settings::default() };
    let options = RunOptions { resume: false, shard: None };
    let profile =
        calibrate(checkpoint.as_ref(), &tokens(512), &settings, &options, &dir.join("profile"), &mut |_| ()).unwrap();
    let options = SplitOptions {
        encoding: Encoding::Q4.into(),
        resident_encoding: Encoding::Q8,
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
    split(checkpoint.as_ref(), &profile, &options, &dir.join("split"), &|_, _| ()).unwrap();
    SplitCheckpoint::open(&dir.join("split")).unwrap()
}

/// All of a layer is the dense model, whoever chooses; of a part the better guesses keep more, and none more than the oracle.
#[test]
fn guesses_are_compared_at_the_same_share() {
    let dir = tempfile::tempdir().unwrap();
    let model = make(dir.path());
    let tokens = tokens(CTX * (WINDOWS + 12));
    let windows = Windows::new(&tokens[..CTX * WINDOWS], CTX, WINDOWS).unwrap();
    let others = Windows::new(&tokens[CTX * WINDOWS..], CTX, 12).unwrap();
    let masks: Vec<Mask> =
        ALL.into_iter().flat_map(|guesser| [1.0, 0.3].map(|share| Mask::Guessed(guesser, share))).collect();
    let masks = [&[Mask::Dense, Mask::Oracle(0.3), Mask::PredictedAlike(0.3)], &masks[..]].concat();
    let guesses = Some(fit_guesses(&model, Some(model.split()), &others, &masks, &|_, _| ()).unwrap());
    let fitted = Fitted { guesses, ..Fitted::default() };
    let results = evaluate(&model, Some(model.split()), &windows, &masks, &fitted, &|_, _| ()).unwrap();
    let of = |name: &str, share: f64| -> &Evaluation {
        results.iter().find(|r| r.mask == name && r.active == Some(share)).unwrap()
    };
    let oracle = of("oracle", 0.3).energy_recall.unwrap();
    for guesser in ALL {
        let (whole, some) = (of(guesser.name(), 1.0), of(guesser.name(), 0.3));
        assert_eq!(whole.losses, results[0].losses, "{}", guesser.name());
        assert!(whole.recall == Some(1.0) && some.kl.unwrap() > 1e-5, "{}", guesser.name());
        let energy = some.energy_recall.unwrap();
        // No choice of as many neurons keeps more, but each stream has states of its own.
        assert!(energy > 0.3 && energy < oracle + 0.02, "{}: {energy} of {oracle}", guesser.name());
        assert!((some.computed_share.unwrap() - 0.3).abs() < 0.01);
        let asked = some.predictor_bytes_share.unwrap();
        assert!((whole.bytes_share.unwrap() - 1.0 - asked).abs() < 1e-9, "{}", guesser.name());
        assert!(some.bytes_share.unwrap() < whole.bytes_share.unwrap());
        assert_eq!(asked > 0.0, guesser != Guesser::Previous);
        assert_eq!(some.predictor_multiply_adds.unwrap() > 0.0, guesser != Guesser::Previous);
    }
    let energy = |name: &str| of(name, 0.3).energy_recall.unwrap();
    let copies = ["signs", "copies-1", "copies-2", "copies-3"].map(energy);
    assert!(copies.is_sorted() && copies[3] > 0.97 * oracle, "{copies:?}, oracle {oracle}");
    let alike = of("predicted-alike", 0.3);
    assert!(energy("ahead-1") < alike.energy_recall.unwrap() && energy("ahead-2") < alike.energy_recall.unwrap());
    // Those that ask the split's predictor cost what it costs.
    for name in ["ahead-1", "ahead-2", "low-rank+previous"] {
        let gap = of(name, 0.3).predictor_bytes_share.unwrap() - alike.predictor_bytes_share.unwrap();
        assert!(gap.abs() < 1e-9, "{name}: {gap}");
    }
    assert_eq!(alike.predictor_multiply_adds, Some(3.0 * (32.0 * 64.0 + 2.0 * 192.0 * 32.0)));
    assert_eq!(of("ahead-1", 0.3).predictor_multiply_adds, alike.predictor_multiply_adds);
}

#[test]
fn guesses_refuse_what_they_cannot_be_asked() {
    let dir = tempfile::tempdir().unwrap();
    let model = make(dir.path());
    let tokens = tokens(CTX * WINDOWS);
    let windows = Windows::new(&tokens, CTX, WINDOWS).unwrap();
    let refused = |masks: &[Mask], split, fitted: &Fitted| {
        evaluate(&model, split, &windows, masks, fitted, &|_, _| ()).unwrap_err().to_string()
    };
    for guesser in ALL {
        let masks = [Mask::Guessed(guesser, 0.3)];
        if !matches!(guesser, Guesser::Signs | Guesser::Copies(_)) {
            let message = refused(&masks, None, &Fitted::default());
            assert!(message.contains(guesser.name()) && message.contains("needs a split"), "{message}");
            let unfitted = fit_guesses(&model, None, &windows, &masks, &|_, _| ()).unwrap_err();
            assert!(unfitted.to_string().contains("needs a split"), "{unfitted}");
        }
        if guesser.is_fitted() {
            let message = refused(&masks, Some(model.split()), &Fitted::default());
            assert!(message.contains(guesser.name()) && message.contains("--fit-text"), "{message}");
        }
        let choices = [1, 2].map(|t| TaskChoice { tokens: vec![t + 5], bytes: 1 }).to_vec();
        let examples = [TaskExample { context: vec![7, 8], choices, answer: 0 }];
        let task = (TaskKind::ALL[0], &examples[..]);
        let message = evaluate_task(&model, Some(model.split()), task, &masks, Positions::All, &|_, _| ()).unwrap_err();
        assert!(message.to_string().contains("measured on a text only"), "{message}");
    }
    // What was fitted to one share says nothing of another; copies do not depend on it.
    let masks =
        [Guesser::LowRankAndPrevious, Guesser::Copies(CopyBits::One)].map(|guesser| Mask::Guessed(guesser, 0.3));
    let guesses = Some(fit_guesses(&model, Some(model.split()), &windows, &masks, &|_, _| ()).unwrap());
    let fitted = Fitted { guesses, ..Fitted::default() };
    let message = refused(&[Mask::Guessed(Guesser::LowRankAndPrevious, 0.5)], Some(model.split()), &fitted);
    assert!(message.contains("low-rank+previous") && message.contains("--fit-text"), "{message}");
    let copies = [Mask::Guessed(Guesser::Copies(CopyBits::Two), 0.5)];
    evaluate(&model, Some(model.split()), &windows, &copies, &fitted, &|_, _| ()).unwrap();
}
