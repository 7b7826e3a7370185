//! All masks in one pass over the layers, through calibrate's dense forward.

use super::bytes::LayerBytes;
use super::choosers::Choosers;
use super::guess::{Cost, Guessed, Guesses};
use super::likelihood::{TokenScores, add, positions_at_once};
use super::masked_layer::MaskedLayer;
use super::{Evaluation, Fitted, Mask, Positions, RowsRead, Windows};
use crate::{Error, Result};
use thermocline_calibrate::dense::{DenseLayer, Embedding, Head, Sequence};
use thermocline_datasets::Checkpoint;
use thermocline_runtime::quality::Tally;
use thermocline_runtime::{LayerActive, always_neurons, layer_active};
use thermocline_split::{GradedCurves, GradedThresholds, Split};

/// Hidden states of all positions under one mask, `[n_tokens, hidden_size]`, and what it lost, per layer.
struct Stream {
    mask: Mask,
    x: Vec<f32>,
    tally: Vec<Tally>,
    /// What of each layer a predictor or sketch chooses; empty for other masks.
    active: Vec<LayerActive>,
    /// For [`Mask::Inputs`]: energies from which inputs are read, layer by layer.
    thresholds: Vec<[f32; 4]>,
    /// Inputs that were read, by group.
    kept: [u64; 4],
    /// Gate, up and down rows that were read, where rows are chosen.
    rows_read: [u64; 3],
    /// What a guess keeps from layer to layer, and what asking it or a predictor took.
    guessed: Guessed,
}

impl Stream {
    fn new(mask: Mask, x: Vec<f32>, split: Option<&Split>, fitted: &Fitted) -> Result<Self> {
        let active = chosen_active(mask, split, fitted.graded.as_ref())?;
        Ok(Stream {
            mask,
            x,
            tally: Vec::new(),
            active,
            thresholds: Vec::new(),
            kept: [0; 4],
            rows_read: [0; 3],
            guessed: Guessed::default(),
        })
    }
}

/// What of each layer is chosen, in graded precision by the `fitted` thresholds or else the split's; empty for masks that ask
/// neither predictor nor sketch.
pub(crate) fn chosen_active(
    mask: Mask,
    split: Option<&Split>,
    fitted: Option<&GradedThresholds>,
) -> Result<Vec<LayerActive>> {
    match (mask, split) {
        (Mask::Predicted(share), Some(split)) => Ok(layer_active(split, share as f32)?),
        (Mask::PredictedAlike(share), Some(split)) => Ok(LayerActive::alike(&split.manifest().config, share as f32)),
        (Mask::Graded { active, always, alike }, Some(split)) => {
            let config = &split.manifest().config;
            let n_always = always_neurons(always as f32, config.intermediate_size);
            let stored = if alike || fitted.is_some() { None } else { split.graded_curves()? };
            let thresholds = fitted.or(stored.as_ref().map(GradedCurves::thresholds)).filter(|_| !alike);
            Ok(LayerActive::graded(config, n_always, active as f32, thresholds))
        }
        _ => Ok(Vec::new()),
    }
}

/// Refuses shares out of range, and masks that ask a predictor where there is none.
pub(crate) fn check_masks(masks: &[Mask], split: Option<&Split>) -> Result<()> {
    masks.iter().try_for_each(|mask| mask.check())?;
    let refuse = |reason: &str| Err(Error::Setting { flag: "--mask", reason: reason.to_owned() });
    if split.is_none() && masks.iter().any(|m| m.asks_predictor() || m.asks_sketch()) {
        return refuse("predicted and graded need a split, which has what they ask; -m names a checkpoint");
    }
    let asks_split = |mask: &&Mask| matches!(mask, Mask::Guessed(guesser, _) if guesser.needs_split());
    if let Some(mask) = masks.iter().find(asks_split).filter(|_| split.is_none()) {
        return refuse(&format!("{} needs a split, which has what it asks; -m names a checkpoint", mask.name()));
    }
    if split.is_some_and(|s| s.sketches().is_none()) && masks.iter().any(|m| m.asks_sketch()) {
        return refuse("graded needs a split with sketches: make one with split --sketch");
    }
    Ok(())
}

/// Runs `model` over `windows` once densely and once under each of `masks`, layer by layer, and compares.
///
/// `split` has the predictors for [`Mask::Predicted`], the sketches for [`Mask::Graded`]; its neurons must be in `model`'s
/// order, as they are if `model` is the [`thermocline_split::SplitCheckpoint`] of the same split. `fitted`, on another text,
/// is for [`Mask::Inputs`], [`Mask::Graded`] and [`Mask::Guessed`].
/// Memory: one layer as f32, one window's activations, and `4 * n_tokens * hidden_size` bytes for each mask and the dense
/// reference; as much again for each layer that a guess looks back, and for each copy of gate and up rows their size as f32.
/// `progress(done, total)` counts layers times streams.
///
/// # Errors
/// If a mask needs a split and there is none, a share is not in (0, 1], a tensor cannot be read, or the outputs are not
/// finite.
pub fn evaluate(
    model: &dyn Checkpoint,
    split: Option<&Split>,
    windows: &Windows<'_>,
    masks: &[Mask],
    fitted: &Fitted,
    progress: &dyn Fn(usize, usize),
) -> Result<Vec<Evaluation>> {
    evaluate_against(None, (model, split), windows, masks, fitted, progress)
}

/// The same, compared with another model of the same vocabulary, if there is a `reference`: [`Mask::Dense`] is compared, too, then, and
/// bytes are relative to those of its layers.
///
/// # Errors
/// As [`evaluate`], or if the vocabularies are not of one size.
pub fn evaluate_against(
    reference: Option<(&dyn Checkpoint, Option<&Split>)>,
    (model, split): (&dyn Checkpoint, Option<&Split>),
    windows: &Windows<'_>,
    masks: &[Mask],
    fitted: &Fitted,
    progress: &dyn Fn(usize, usize),
) -> Result<Vec<Evaluation>> {
    check_masks(masks, split)?;
    fitted.check(masks)?;
    let config = model.config();
    let mut bytes = LayerBytes::of(model, split)?;
    if let Some((model, split)) = reference {
        bytes = bytes.relative_to(&LayerBytes::of(model, split)?);
    }
    let reference = reference.map(|(model, _)| model);
    let of_inputs = bytes.of_inputs(config);
    let (ours, theirs) = (config.vocab_size, reference.unwrap_or(model).config().vocab_size);
    if ours != theirs {
        let reason = format!("it has {theirs} tokens, the model {ours}: their probabilities cannot be compared");
        return Err(Error::Setting { flag: "--reference", reason });
    }
    let x = Embedding::load(model)?.rows(windows.tokens())?;
    // The dense mask is the reference itself, if there is no other; every other one gets its own stream.
    let own = masks.iter().filter(|m| reference.is_some() || **m != Mask::Dense);
    let mut masked: Vec<Stream> =
        own.map(|&mask| Stream::new(mask, x.clone(), split, fitted)).collect::<Result<_>>()?;
    for stream in &mut masked {
        if let (Mask::Inputs(share), Some(costs)) = (stream.mask, &fitted.inputs) {
            stream.thresholds = costs.thresholds(of_inputs, share);
        }
    }
    let mut dense = Stream::new(Mask::Dense, x, split, fitted)?;
    let n_before = reference.map_or(0, |reference| reference.config().n_layers);
    let with_dense = usize::from(reference.is_none());
    let total = n_before + config.n_layers * (with_dense + masked.len());
    if let Some(reference) = reference {
        dense.x = Embedding::load(reference)?.rows(windows.tokens())?;
        for index in 0..n_before {
            progress(index, total);
            let layer = DenseLayer::load(reference, index)?;
            dense.advance((index, &layer), &layer.down_norms()?, &Choosers::default(), fitted, windows.ctx())?;
        }
    }
    for index in 0..config.n_layers {
        let layer = DenseLayer::load(model, index)?;
        let choosers = Choosers::load(split, masks, index)?;
        let down_norm = layer.down_norms()?;
        let guesses = Guesses::load((index, &layer), &down_norm, split, fitted.guesses.as_ref(), masks)?;
        let before = n_before + index * (with_dense + masked.len());
        for (i, stream) in std::iter::once(&mut dense).take(with_dense).chain(&mut masked).enumerate() {
            progress(before + i, total);
            if let (Mask::Guessed(guesser, share), Some(guess)) = (stream.mask, guesses.of(stream.mask)) {
                let of_layer = (&layer, down_norm.as_slice());
                let (guessed, x) = (&mut stream.guessed, &mut stream.x);
                stream.tally.push(guessed.forward((guesser, share), guess, of_layer, x, windows.ctx())?);
                continue;
            }
            if let Some((low_rank, _)) = choosers.predictor.as_ref().filter(|_| stream.mask.asks_predictor()) {
                stream.guessed.cost.multiply_adds += low_rank.multiply_adds() as f64;
            }
            stream.advance((index, &layer), &down_norm, &choosers, fitted, windows.ctx())?;
        }
    }
    progress(total, total);
    let read = |kept: [u64; 4]| {
        let each = kept.iter().zip(of_inputs).map(|(&kept, bytes)| kept as f64 * bytes);
        bytes.share_of(each.sum::<f64>() / windows.tokens().len() as f64)
    };
    let n_neurons = (windows.tokens().len() * config.n_layers * config.intermediate_size) as u64;
    let rows = |s: &Stream| s.chooses_rows().then(|| RowsRead::new(s.rows_read, n_neurons));
    let read: Vec<(Mask, f64, Option<RowsRead>)> = masked.iter().map(|s| (s.mask, read(s.kept), rows(s))).collect();
    let asked: Vec<(Mask, Cost)> = masked.iter().map(|s| (s.mask, s.guessed.cost)).collect();
    let mut evaluations = compare((model, reference), windows, masks, dense, masked)?;
    for (evaluation, mask) in evaluations.iter_mut().zip(masks) {
        let counted = read.iter().find(|(m, ..)| m == mask);
        if let Some(&(.., Some(rows))) = counted {
            evaluation.rows_read = Some(rows);
            evaluation.computed_share = Some(rows.bytes);
        }
        evaluation.bytes_share = match (mask, counted) {
            (Mask::Inputs(_), Some((_, inputs, _))) => Some(*inputs),
            (Mask::Graded { always, .. }, Some((.., Some(rows)))) => Some(bytes.graded_rows_share(*always, rows.bytes)),
            (Mask::Graded { always, .. }, _) => {
                evaluation.computed_share.map(|computed| bytes.graded_share(*always, computed))
            }
            _ => bytes.share(*mask),
        };
        evaluation.predictor_bytes_share = bytes.chooser_share(*mask);
        let cost = asked.iter().find(|(m, _)| m == mask).map(|(_, cost)| *cost);
        if let (Mask::Guessed(_, share), Some(cost)) = (mask, cost) {
            evaluation.bytes_share = Some(bytes.guessed_share(cost.bytes, *share));
            evaluation.predictor_bytes_share = Some(bytes.share_of(cost.bytes));
        }
        let asks = mask.asks_predictor() || matches!(mask, Mask::Guessed(..));
        evaluation.predictor_multiply_adds = cost.filter(|_| asks).map(|cost| cost.multiply_adds);
    }
    Ok(evaluations)
}

impl Stream {
    fn chooses_rows(&self) -> bool {
        self.active.iter().any(|layer| layer.of_rows().is_some())
    }

    /// One layer, window by window.
    fn advance(
        &mut self,
        (index, layer): (usize, &DenseLayer),
        down_norm: &[f32],
        choosers: &Choosers,
        fitted: &Fitted,
        ctx: usize,
    ) -> Result<()> {
        let costs = fitted.inputs.as_ref().and_then(|c| c.layer(index));
        let choice = self.mask.input_choice(costs.zip(self.thresholds.get(index).copied()));
        let chooses_neurons = choice.is_none() && !self.chooses_rows();
        let active = self.active.get(index);
        let masked = MaskedLayer::new(self.mask, layer, down_norm, choosers, active, choice)?;
        let (mut tally, sequences) = (Tally::default(), [Sequence::plain(ctx)]);
        for window in self.x.chunks_exact_mut(ctx * layer.hidden_size()) {
            tally = tally + masked.forward(window, &sequences, Positions::All)?;
        }
        self.kept.iter_mut().zip(masked.kept()).for_each(|(sum, kept)| *sum += kept);
        self.rows_read.iter_mut().zip(masked.rows_read()).for_each(|(sum, read)| *sum += read);
        if chooses_neurons {
            self.tally.push(tally);
        }
        Ok(())
    }
}

/// Logits of every stream at the same few positions at a time, so that no more than those are ever held.
fn compare(
    (model, reference): (&dyn Checkpoint, Option<&dyn Checkpoint>),
    windows: &Windows<'_>,
    masks: &[Mask],
    dense: Stream,
    masked: Vec<Stream>,
) -> Result<Vec<Evaluation>> {
    let (head, hidden) = (Head::load(model)?, model.config().hidden_size);
    let other_head = reference.map(Head::load).transpose()?;
    let (dense_head, dense_hidden) = match (&other_head, reference) {
        (Some(head), Some(reference)) => (head, reference.config().hidden_size),
        _ => (&head, hidden),
    };
    let positions = positions_at_once(head.vocab_size());
    let mut of_dense = TokenScores::default();
    let mut scores = vec![TokenScores::default(); masked.len()];
    for start in (0..windows.tokens().len()).step_by(positions) {
        let end = (start + positions).min(windows.tokens().len());
        let targets: Vec<Option<u32>> = (start..end).map(|p| windows.next(p)).collect();
        let of_reference = dense_head.logits(&dense.x[start * dense_hidden..end * dense_hidden])?;
        add(&mut of_dense, &of_reference, &of_reference, head.vocab_size(), &targets);
        for (stream, scores) in masked.iter().zip(&mut scores) {
            let logits = head.logits(&stream.x[start * hidden..end * hidden])?;
            add(scores, &of_reference, &logits, head.vocab_size(), &targets);
        }
    }
    let losses = of_dense.losses.clone();
    let mut rest = masked.iter().zip(scores);
    let mut out = Vec::with_capacity(masks.len());
    for &mask in masks {
        let (stream, scores) = match mask {
            Mask::Dense if reference.is_none() => (&dense, of_dense.clone()),
            // One stream was made for each of the other masks, in this order.
            _ => match rest.next() {
                Some(found) => found,
                None => continue,
            },
        };
        out.push(Evaluation::new(mask, windows, scores, Some(&losses), &stream.tally)?);
    }
    Ok(out)
}
