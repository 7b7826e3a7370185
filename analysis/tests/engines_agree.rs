//! The dense forward (candle) and the token engine (own kernels) share no code between weights and logits, so where
//! they agree both are right.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::Path;
use thermocline_analysis::eval::{
    Evaluation, Fitted, LayerQuality, Mask, Windows, evaluate, evaluate_decode, fit_input_costs, fit_shares,
    fit_windows, measure_curve, measure_graded_curves,
};
use thermocline_calibrate::{RunOptions, Settings, calibrate};
use thermocline_datasets::write::{TinyModel, write_tiny_safetensors};
use thermocline_datasets::{Activation, Architecture, open_checkpoint};
use thermocline_kernels::Encoding;
use thermocline_runtime::{AuditReport, Engine, Mode, Plan, PlanRequest};
use thermocline_split::{Compression, Rounding, Shares, SketchForm, Split, SplitCheckpoint, SplitOptions, split};

const CTX: usize = 48;
const WINDOWS: usize = 3;

fn tokens(n: usize) -> Vec<u32> {
    (0..n as u64).map(|i| ((i * i * 7919 + i * 104_729) % 297 + 3) as u32).collect()
}

fn make(dir: &Path, model: &TinyModel, encoding: Encoding) -> std::path::PathBuf {
    make_with(dir, model, encoding, Extra::Nothing)
}

/// What a split has besides predictors.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Extra {
    Nothing,
    Sketches,
    /// And what these leave.
    Residuals,
}

fn make_with(dir: &Path, model: &TinyModel, encoding: Encoding, extra: Extra) -> std::path::PathBuf {
    write_tiny_safetensors(&dir.join("model"), model, 5).unwrap();
    let checkpoint = open_checkpoint(&dir.join("model")).unwrap();
    let settings = Settings { window_len: 64, n_samples: 128, ..Settings::default() };
    let options = RunOptions { resume: false, shard: None };
    let profile =
        calibrate(checkpoint.as_ref(), &tokens(512), &settings, &options, &dir.join("profile"), &mut |_| ()).unwrap();
    let options = SplitOptions {
        encoding: encoding.into(),
        resident_encoding: encoding,
        attention_encoding: None,
        order: None,
        chunk_neurons: None,
        compression: Compression::None,
        predictor_rank: 32,
        outliers: 0.0,
        scales: thermocline_split::Scales::Moments,
        rounding: Rounding::Feedback,
        sketch: (extra != Extra::Nothing).then(SketchForm::default),
        residuals: extra == Extra::Residuals,
    };
    split(checkpoint.as_ref(), &profile, &options, &dir.join("split"), &|_, _| ()).unwrap();
    dir.join("split")
}

/// With what audits of every token found, in sparse mode.
fn decode(dir: &Path, mode: Mode, windows: &Windows<'_>) -> (Evaluation, Option<AuditReport>) {
    decode_with(dir, mode, None, windows)
}

/// The same with a share of the neurons that is always computed.
fn decode_with(
    dir: &Path,
    mode: Mode,
    always: Option<f32>,
    windows: &Windows<'_>,
) -> (Evaluation, Option<AuditReport>) {
    let split = Split::open(dir).unwrap();
    let request = PlanRequest { mode, always, ram_budget_bytes: None, context: CTX, batch: 1, n_threads: 2 };
    let plan = Plan::new(&split, request).unwrap();
    let mut engine = Engine::load(split, plan, &|_, _| ()).unwrap();
    engine.start_audit(usize::from(mode != Mode::Exact)).unwrap();
    (evaluate_decode(&mut engine, windows, &|_, _| ()).unwrap(), engine.audit())
}

/// Audits of decoding say what the dense forward says of the same mask on the same tokens. It also counts the last token of
/// each window, which is not decoded.
fn audits_agree(batch: &Evaluation, audit: &AuditReport) {
    assert_eq!((audit.tokens, audit.layers.len()), ((WINDOWS * (CTX - 1)) as u64, batch.layers.len()));
    for (want, got) in batch.layers.iter().zip(&audit.layers) {
        let figures =
            |q: &LayerQuality| [q.recall, q.precision, q.energy_recall, q.energy_recall_of_oracle, q.computed_share];
        for (want, got) in figures(want).into_iter().zip(figures(&got.quality)) {
            assert!((want - got).abs() < 0.01, "{want:?} {got:?}");
        }
        assert!(got.quality.recall < 0.99 && got.output_error > 0.01, "{got:?}");
    }
}

/// Largest and mean difference of the tokens' cross-entropies.
fn gaps(a: &Evaluation, b: &Evaluation) -> (f32, f32) {
    assert_eq!(a.losses.len(), WINDOWS * (CTX - 1));
    assert_eq!(a.losses.len(), b.losses.len());
    let gaps: Vec<f32> = a.losses.iter().zip(&b.losses).map(|(a, b)| (a - b).abs()).collect();
    (gaps.iter().copied().fold(0.0, f32::max), gaps.iter().sum::<f32>() / gaps.len() as f32)
}

fn check(model: &TinyModel, encoding: Encoding) {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), model, encoding);
    let tokens = tokens(CTX * WINDOWS);
    let windows = Windows::new(&tokens, CTX, WINDOWS).unwrap();
    let dense_model = SplitCheckpoint::open(&path).unwrap();
    let masks = [Mask::Dense, Mask::Exact, Mask::Predicted(0.3), Mask::Oracle(0.3)];
    let by_mask =
        evaluate(&dense_model, Some(dense_model.split()), &windows, &masks, &Fitted::default(), &|_, _| ()).unwrap();

    assert_eq!(by_mask[0].losses, by_mask[1].losses, "leaving out zeros changes nothing");
    assert!(by_mask[0].kl.unwrap() < 1e-9 && by_mask[0].top1_agreement == Some(1.0));
    assert!(by_mask[3].energy_recall > by_mask[2].energy_recall && by_mask[3].recall == Some(1.0));

    // The engine keeps keys and values as f16 and sums in another order: a few 1e-3 nats at most.
    let (largest, mean) = gaps(&by_mask[0], &decode(&path, Mode::Exact, &windows).0);
    assert!(largest < 1e-2 && mean < 1e-3, "dense: largest gap {largest}, mean {mean}");

    // Two scores that differ in the last digits can choose different neurons at the edge of the set; those weigh
    // little, so single tokens may differ more and the mean hardly.
    let (sparse, audit) = decode(&path, Mode::Sparse { active: 0.3 }, &windows);
    audits_agree(&by_mask[2], &audit.unwrap());
    let (largest, mean) = gaps(&by_mask[2], &sparse);
    assert!(largest < 0.2 && mean < 1e-2, "predicted: largest gap {largest}, mean {mean}");
    let share = sparse.computed_share.unwrap();
    assert!((share - by_mask[2].computed_share.unwrap()).abs() < 1e-6, "both compute the same number of neurons");
    // The masks matter: without them the engines would be further apart than the tolerance.
    assert!(gaps(&by_mask[0], &sparse).0 > 0.01);
}

#[test]
fn silu_bf16() {
    check(&TinyModel::default(), Encoding::Bf16);
}

#[test]
fn silu_q4() {
    check(&TinyModel::default(), Encoding::Q4);
}

#[test]
fn relu_q8_with_biases() {
    let model = TinyModel {
        architecture: Architecture::Qwen2,
        activation: Activation::Relu,
        tie_word_embeddings: false,
        ..TinyModel::default()
    };
    check(&model, Encoding::Q8);
}

fn graded(active: f64) -> Mask {
    Mask::Graded { active, always: 0.0, alike: false }
}

/// Sketches choose the same neurons in both engines, and stand for the others in the same way.
#[test]
fn sketches_are_used_alike_by_both_engines() {
    let dir = tempfile::tempdir().unwrap();
    let path = make_with(dir.path(), &TinyModel::default(), Encoding::Q4, Extra::Sketches);
    let tokens = tokens(CTX * WINDOWS);
    let windows = Windows::new(&tokens, CTX, WINDOWS).unwrap();
    let model = SplitCheckpoint::open(&path).unwrap();
    let masks = [Mask::Dense, graded(0.3), Mask::Oracle(0.3), graded(1.0)];
    let by_mask = evaluate(&model, Some(model.split()), &windows, &masks, &Fitted::default(), &|_, _| ()).unwrap();
    assert!(
        by_mask[1].kl < by_mask[2].kl,
        "the best choice, with nothing for the rest, is further from the dense model"
    );
    assert!(by_mask[3].kl.unwrap() < 1e-9, "nothing is left to the sketch");
    let (graded, audit) = decode(&path, Mode::Sparse { active: 0.3 }, &windows);
    assert_eq!(graded.mask, "graded");
    let audit = audit.unwrap();
    assert_eq!(audit.layers.len(), by_mask[1].layers.len());
    for (want, got) in by_mask[1].layers.iter().zip(&audit.layers) {
        assert!((want.energy_recall - got.quality.energy_recall).abs() < 0.01, "{want:?} {got:?}");
        assert!((want.recall - got.quality.recall).abs() < 0.01 && got.output_error > 0.01, "{want:?} {got:?}");
    }
    let (largest, mean) = gaps(&by_mask[1], &graded);
    assert!(largest < 0.2 && mean < 1e-2, "graded: largest gap {largest}, mean {mean}");
    assert!(gaps(&by_mask[0], &graded).0 > 0.01);
}

/// Neurons that are always computed are the same in both engines, which choose among the others alike; the more, the nearer to the
/// dense model, and the less of a sketch is read.
#[test]
fn neurons_are_always_computed_alike_by_both_engines() {
    let dir = tempfile::tempdir().unwrap();
    let path = make_with(dir.path(), &TinyModel::default(), Encoding::Q4, Extra::Sketches);
    let tokens = tokens(CTX * WINDOWS);
    let windows = Windows::new(&tokens, CTX, WINDOWS).unwrap();
    let model = SplitCheckpoint::open(&path).unwrap();
    let masks = [0.0, 0.4, 0.8, 1.0].map(|always| Mask::Graded { active: 0.2, always, alike: false });
    let by_mask = evaluate(&model, Some(model.split()), &windows, &masks, &Fitted::default(), &|_, _| ()).unwrap();
    assert!(by_mask.windows(2).all(|pair| pair[0].kl > pair[1].kl));
    assert!(by_mask[3].kl.unwrap() < 1e-9, "nothing is left to the sketch");
    let n = model.split().manifest().config.intermediate_size as f64;
    for (result, always) in by_mask.iter().zip([0.0f64, 0.4, 0.8, 1.0]) {
        let first = (always * n).round();
        let computed = first + if first < n { f64::round(0.2 * (n - first)) } else { 0.0 };
        assert!((result.computed_share.unwrap() - computed / n).abs() < 1e-9, "{always}: {:?}", result.computed_share);
        assert_eq!(result.always, Some(always).filter(|a| *a > 0.0));
        let sketches = result.predictor_bytes_share.unwrap() / by_mask[0].predictor_bytes_share.unwrap();
        assert!((sketches - (1.0 - always)).abs() < 1e-9, "{always}: {sketches}");
    }
    let mode = Mode::Sparse { active: 0.2 };
    for (want, always) in by_mask.iter().zip([0.0, 0.4, 0.8, 1.0]) {
        let (got, audit) = decode_with(&path, mode, Some(always), &windows);
        assert_eq!(got.active, want.active);
        assert!((got.always.unwrap_or(0.0) - want.always.unwrap_or(0.0)).abs() < 0.5 / n);
        for (want, got) in want.layers.iter().zip(&audit.unwrap().layers) {
            assert!((want.energy_recall - got.quality.energy_recall).abs() < 0.01, "{always}: {want:?} {got:?}");
            assert!((want.recall - got.quality.recall).abs() < 0.01, "{always}: {want:?} {got:?}");
        }
        let (largest, mean) = gaps(want, &got);
        assert!(largest < 0.2 && mean < 1e-2, "{always}: largest gap {largest}, mean {mean}");
    }
    let refused = Mask::Graded { active: 0.2, always: 1.5, alike: false };
    let refused = evaluate(&model, Some(model.split()), &windows, &[refused], &Fitted::default(), &|_, _| ());
    assert!(refused.unwrap_err().to_string().contains("--always"));
}

/// Thresholds leave the share that they were fitted to, on its text, and both engines go by them; tokens and layers differ in how many
/// neurons they compute, where most of a layer are zero, or in how many single rows they read.
#[test]
fn graded_thresholds_are_used_alike_by_both_engines() {
    let residuals = Extra::Residuals;
    for (activation, extra) in
        [(Activation::Silu, Extra::Sketches), (Activation::Silu, residuals), (Activation::Relu, Extra::Sketches)]
    {
        let dir = tempfile::tempdir().unwrap();
        let path = make_with(dir.path(), &TinyModel { activation, ..TinyModel::default() }, Encoding::Q4, extra);
        let tokens = tokens(CTX * WINDOWS);
        let windows = Windows::new(&tokens, CTX, WINDOWS).unwrap();
        let model = SplitCheckpoint::open(&path).unwrap();
        let curves = measure_graded_curves(&model, model.split(), (&windows, &windows), 7, &|_, _| ()).unwrap();
        Split::put_graded_curves(&path, &curves).unwrap();
        let model = SplitCheckpoint::open(&path).unwrap();
        let of_rows = activation == Activation::Silu;
        let version = if extra == residuals { 8 } else { 6 + u32::from(of_rows) };
        assert_eq!(model.split().manifest().version, version);
        let factors = curves.thresholds().error_factors();
        assert_eq!(factors.map(<[_]>::len), of_rows.then_some(model.split().layers().len()));
        let masks = [(0.0, false), (0.0, true), (0.5, false), (0.3, false)];
        let masks = masks.map(|(always, alike)| Mask::Graded { active: 0.3, always, alike });
        let by_mask = evaluate(&model, Some(model.split()), &windows, &masks, &Fitted::default(), &|_, _| ()).unwrap();
        for (result, share) in by_mask.iter().zip([0.3, 0.3, 0.65, 0.51]) {
            // Masked layers drift from the dense ones that thresholds were fitted to.
            assert!((result.computed_share.unwrap() - share).abs() < 0.03, "{share}: {:?}", result.computed_share);
        }
        assert_eq!(by_mask[1].mask, "graded-alike");
        assert!(by_mask[1].rows_read.is_none() && !by_mask[1].layers.is_empty());
        if of_rows {
            for (result, always) in by_mask.iter().zip([0.0, 0.0, 0.5, 0.3]) {
                let Some(read) = result.rows_read else { continue };
                assert!((read.gate + read.up + read.down - 3.0 * read.bytes).abs() < 1e-9, "{read:?}");
                assert!([read.gate, read.up, read.down].iter().all(|r| *r > always), "{read:?}");
                assert!(result.recall.is_none() && result.computed_share == Some(read.bytes));
            }
            assert!(by_mask[0].rows_read.is_some());
            // Residuals are not the reference's own rows.
            assert!(
                extra == residuals || by_mask[0].kl < by_mask[1].kl,
                "{:?} by rows, {:?} by neurons",
                by_mask[0].kl,
                by_mask[1].kl
            );
            // As many bytes are counted as for whole neurons.
            let [of_rows, of_neurons] = [0, 1].map(|i| by_mask[i].bytes_share.unwrap());
            assert!((of_rows - of_neurons).abs() < 0.03, "{of_neurons} {of_rows}");
        } else {
            let spread = |e: &Evaluation| {
                let shares = e.layers.iter().map(|l| l.computed_share);
                shares.clone().fold(0.0, f64::max) - shares.fold(1.0, f64::min)
            };
            assert!(by_mask[0].rows_read.is_none());
            let spreads = [0, 1].map(|i| spread(&by_mask[i]));
            assert!(spreads[0] > 2e-3 && spreads[1] < 1e-9, "{spreads:?}");
        }
        // The curve is of the same masks.
        let increase = by_mask[0].perplexity_ratio.unwrap() - 1.0;
        let point = curves.curves()[0].curve.points().find(|p| p.0 == 0.3).unwrap();
        assert!((f64::from(point.1) - increase).abs() < 1e-6, "{point:?} {increase}");
        for (want, always) in by_mask.iter().zip([Some(0.0), None, Some(0.5)]) {
            let Some(always) = always else { continue };
            let (got, audit) = decode_with(&path, Mode::Sparse { active: 0.3 }, Some(always), &windows);
            let (computed, decoded) = (want.computed_share.unwrap(), got.computed_share.unwrap());
            assert!((computed - decoded).abs() < 0.01, "{always}: {computed} {decoded}");
            for (want, got) in want.layers.iter().zip(&audit.unwrap().layers) {
                assert!((want.computed_share - got.quality.computed_share).abs() < 0.01, "{always}: {want:?} {got:?}");
                assert!((want.energy_recall - got.quality.energy_recall).abs() < 0.01, "{always}: {want:?} {got:?}");
            }
            let (largest, mean) = gaps(want, &got);
            assert!(largest < 0.2 && mean < 1e-2, "{activation:?} {always}: largest gap {largest}, mean {mean}");
        }
        // Of everything there is nothing to choose, and it is the split's own.
        let whole = evaluate(&model, Some(model.split()), &windows, &[graded(1.0)], &Fitted::default(), &|_, _| ());
        assert!(whole.unwrap()[0].kl.unwrap() < 1e-9);
        let split = Split::open(&path).unwrap();
        let mode = Mode::Sparse { active: 0.3 };
        let request = PlanRequest { mode, always: None, ram_budget_bytes: None, context: CTX, batch: 1, n_threads: 2 };
        let plan = Plan::new(&split, request).unwrap();
        let limited = Engine::load(split, plan, &|_, _| ()).unwrap().limit_error(0.1);
        assert_eq!(limited.is_err(), of_rows, "{limited:?}");
    }
}

/// So do errors that are limited: as many neurons as that takes, of every token and layer, in both engines.
#[test]
fn errors_are_limited_alike_by_both_engines() {
    let dir = tempfile::tempdir().unwrap();
    let model = TinyModel { activation: Activation::Relu, ..TinyModel::default() };
    let path = make_with(dir.path(), &model, Encoding::Bf16, Extra::Sketches);
    let tokens = tokens(CTX * WINDOWS);
    let windows = Windows::new(&tokens, CTX, WINDOWS).unwrap();
    let model = SplitCheckpoint::open(&path).unwrap();
    let masks = [Mask::Dense, Mask::GradedError(0.1), Mask::GradedError(0.03)];
    let by_mask = evaluate(&model, Some(model.split()), &windows, &masks, &Fitted::default(), &|_, _| ()).unwrap();
    let shares = [1, 2].map(|i| by_mask[i].computed_share.unwrap());
    assert!(0.02 < shares[0] && shares[0] < shares[1] && shares[1] < 0.9, "{shares:?}");
    assert!(by_mask[2].kl < by_mask[1].kl && by_mask[2].kl.unwrap() > 0.0);

    let split = Split::open(&path).unwrap();
    let mode = Mode::Sparse { active: 1.0 };
    let request = PlanRequest { mode, always: None, ram_budget_bytes: None, context: CTX, batch: 1, n_threads: 2 };
    let plan = Plan::new(&split, request).unwrap();
    let mut engine = Engine::load(split, plan, &|_, _| ()).unwrap();
    for refused in [0.0, 1.0, f32::NAN] {
        assert!(engine.limit_error(refused).unwrap_err().to_string().contains("--max-error"));
    }
    engine.limit_error(0.1).unwrap();
    let decoded = evaluate_decode(&mut engine, &windows, &|_, _| ()).unwrap();
    assert!((decoded.computed_share.unwrap() - shares[0]).abs() < 0.01, "{:?} {shares:?}", decoded.computed_share);
    let (largest, mean) = gaps(&by_mask[1], &decoded);
    assert!(largest < 0.2 && mean < 1e-2, "largest gap {largest}, mean {mean}");
    assert!(gaps(&by_mask[0], &decoded).0 > 0.01);
}

/// The costs of shares, kept in the split, change what both engines compute, in the same way.
#[test]
fn shares_are_measured_kept_and_used_by_both_engines() {
    let dir = tempfile::tempdir().unwrap();
    let model = TinyModel { activation: Activation::Silu, ..TinyModel::default() };
    let path = make(dir.path(), &model, Encoding::Bf16);
    let tokens = tokens(CTX * WINDOWS);
    let windows = Windows::new(&tokens, CTX, WINDOWS).unwrap();
    let masks = [Mask::Predicted(0.3), Mask::PredictedAlike(0.3)];
    let both = || {
        let model = SplitCheckpoint::open(&path).unwrap();
        evaluate(&model, Some(model.split()), &windows, &masks, &Fitted::default(), &|_, _| ()).unwrap()
    };
    let before = both();
    assert_eq!(before[0].losses, before[1].losses, "nothing was measured yet");

    let opened = SplitCheckpoint::open(&path).unwrap();
    let steps = std::cell::Cell::new((0, 0));
    let shares = fit_shares(&opened, opened.split(), &windows, &|done, total| steps.set((done, total))).unwrap();
    assert_eq!(steps.get().0, steps.get().1);
    for layer in shares.layers() {
        assert!(layer.loss.windows(2).all(|w| w[0] > w[1]) && layer.loss[0] > 0.0, "{:?}", layer.loss);
    }
    Split::put_shares(&path, &shares).unwrap();
    let split = Split::open(&path).unwrap();
    assert_eq!((split.shares().unwrap().as_ref(), split.manifest().version), (Some(&shares), 3));

    let after = both();
    assert_eq!(after[1].losses, before[1].losses, "shares alike are as before");
    assert!(after[0].losses != before[0].losses && after[0].kl < before[0].kl, "{:?} {:?}", after[0].kl, before[0].kl);
    let (engine, audit) = decode(&path, Mode::Sparse { active: 0.3 }, &windows);
    audits_agree(&after[0], &audit.unwrap());
    let (largest, mean) = gaps(&after[0], &engine);
    assert!(largest < 0.2 && mean < 1e-2, "predicted: largest gap {largest}, mean {mean}");
    assert!((engine.computed_share.unwrap() - 0.3).abs() < 0.01);

    // In place of those that are there, and another model's not at all.
    let mut layers = shares.layers().to_vec();
    layers[0].loss[0] *= 2.0;
    let hidden = split.manifest().config.hidden_size;
    let other = Shares::new(shares.grid().to_vec(), layers.clone(), hidden).unwrap();
    Split::put_shares(&path, &other).unwrap();
    assert_eq!(Split::open(&path).unwrap().shares().unwrap(), Some(other));
    let files = std::fs::read_dir(&path).unwrap().filter_map(|f| f.unwrap().file_name().into_string().ok());
    assert_eq!(files.filter(|f| f.contains("shares") || f.ends_with(".tmp")).count(), 1);
    let fewer = Shares::new(shares.grid().to_vec(), layers.split_off(1), hidden).unwrap();
    assert!(Split::put_shares(&path, &fewer).is_err());

    // A damaged file is named.
    let file = path.join(&Split::open(&path).unwrap().manifest().shares.as_ref().unwrap().file);
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let error = Split::open(&path).unwrap().shares().unwrap_err().to_string();
    assert!(error.contains("shares") && error.contains("checksum"), "{error}");
}

/// The curve is what the masks say of the windows behind those that shares were fitted to, and stays in the split.
#[test]
fn a_curve_is_what_the_masks_say_behind_the_fitted_windows() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), &TinyModel { activation: Activation::Silu, ..TinyModel::default() }, Encoding::Q4);
    let tokens = tokens(5 * 2 * 24 + 7);
    let (fitting, behind) = fit_windows(&tokens, 24, 2).unwrap();
    let opened = SplitCheckpoint::open(&path).unwrap();
    let shares = fit_shares(&opened, opened.split(), &fitting, &|_, _| ()).unwrap();
    Split::put_shares(&path, &shares).unwrap();
    let fitted = SplitCheckpoint::open(&path).unwrap();
    let steps = std::cell::Cell::new((0, 0));
    let curve = measure_curve(&fitted, fitted.split(), &behind, u128::MAX - 5, &|done, total| steps.set((done, total)))
        .unwrap();
    assert_eq!(steps.get().0, steps.get().1);

    // Behind the first 48 tokens, from the start of the text that is left.
    let rest = Windows::new(&tokens[2 * 24..], 4 * 24, 2).unwrap();
    let masks = [0.1, 0.5, 0.9].map(Mask::Predicted);
    let said = evaluate(&fitted, Some(fitted.split()), &rest, &masks, &Fitted::default(), &|_, _| ()).unwrap();
    let points: Vec<_> = curve.points().collect();
    assert_eq!((points.len(), curve.tokens()), (9, 2 * (4 * 24 - 1)));
    for (i, said) in [0, 4, 8].into_iter().zip(&said) {
        let (share, increase, high) = points[i];
        assert_eq!(share, said.active.unwrap() as f32);
        assert_eq!(increase, (said.perplexity_ratio.unwrap() - 1.0) as f32);
        assert_eq!(high, (said.perplexity_ratio_ci95.unwrap()[1] - 1.0) as f32);
        assert!(high > increase);
    }
    // Of random weights: farther away, on whichever side.
    assert!(points[0].1.abs() > points[8].1.abs(), "{points:?}");

    // A split without a curve is what it always was; with one, a version of its own.
    let version = || Split::open(&path).unwrap().manifest().version;
    assert_eq!(version(), 3);
    let whole = shares.clone().with_curve(curve);
    Split::put_shares(&path, &whole).unwrap();
    assert_eq!((Split::open(&path).unwrap().shares().unwrap(), version()), (Some(whole), 4));
    Split::put_shares(&path, &shares).unwrap();
    assert_eq!((Split::open(&path).unwrap().shares().unwrap(), version()), (Some(shares), 3));
}

/// A method that keeps everything is the dense model; what it reads, and what it costs, falls with its share.
#[test]
fn peers_keep_what_they_are_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let model = TinyModel { activation: Activation::Silu, ..TinyModel::default() };
    let path = make(dir.path(), &model, Encoding::Bf16);
    let tokens = tokens(2 * CTX * WINDOWS);
    let windows = Windows::new(&tokens, CTX, WINDOWS).unwrap();
    let opened = SplitCheckpoint::open(&path).unwrap();
    let others = Windows::new(&tokens[CTX * WINDOWS..], CTX, WINDOWS).unwrap();
    let costs = fit_input_costs(&opened, &others, &|_, _| ()).unwrap();
    let fitted = Fitted { inputs: Some(costs), ..Fitted::default() };
    for of in [Mask::Teal, Mask::Wina, Mask::Cats, Mask::Inputs] {
        let masks = [Mask::Dense, of(1.0), of(0.8), of(0.4)];
        let results = evaluate(&opened, Some(opened.split()), &windows, &masks, &fitted, &|_, _| ()).unwrap();
        let [dense, whole, most, some] = results.as_slice() else { panic!("four results") };
        let name = &whole.mask;
        let largest = dense.losses.iter().zip(&whole.losses).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(largest < 1e-4, "{name}: {largest}");
        assert!(whole.kl.unwrap() < 1e-6 && 1e-5 < most.kl.unwrap() && most.kl < some.kl, "{name}");
        let shares = [whole, most, some].map(|r| r.bytes_share.unwrap());
        assert!((shares[0] - 1.0).abs() < 1e-6 && shares[1] < 0.95 && shares[2] < shares[1], "{name}: {shares:?}");
        if *name == "inputs" {
            assert!((shares[1] - 0.8).abs() < 0.1 && (shares[2] - 0.4).abs() < 0.15, "{shares:?}");
        }
    }
    let nothing_known = evaluate(&opened, None, &windows, &[Mask::Inputs(0.5)], &Fitted::default(), &|_, _| ());
    assert!(nothing_known.unwrap_err().to_string().contains("--fit-text"));
}
