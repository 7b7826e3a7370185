//! All masks in one walk over the layers.

use super::pack::{Pass, passes};
use super::score::{ChoiceScore, scores};
use super::{Positions, TaskExample, TaskKind, TaskResult};
use crate::eval::Mask;
use crate::eval::batch::{check_masks, chosen_active};
use crate::eval::bytes::LayerBytes;
use crate::eval::choosers::Choosers;
use crate::eval::masked_layer::MaskedLayer;
use crate::{Error, Result};
use thermocline_calibrate::dense::{DenseLayer, Embedding, Head};
use thermocline_datasets::Checkpoint;
use thermocline_runtime::LayerActive;
use thermocline_split::Split;

/// Hidden states of a pass under one mask, `[n_rows, hidden_size]`.
struct Stream {
    mask: Mask,
    x: Vec<f32>,
    active: Vec<LayerActive>,
}

/// Runs `model` over `examples` once densely and once under each of `masks`, and compares; a result for each of `masks`.
///
/// `split` is as for [`crate::eval::evaluate`]. Memory: one layer as f32, the activations of 1024 rows or of the longest
/// example, and up to 1 GiB of hidden states; where these do not hold all examples, layers are read again for the others.
/// `progress(done, total)` counts layers times streams times passes.
///
/// # Errors
/// If a mask needs a split and there is none, a share is not in (0, 1], a tensor cannot be read, or the outputs are not
/// finite.
pub fn evaluate_task(
    model: &dyn Checkpoint,
    split: Option<&Split>,
    (kind, examples): (TaskKind, &[TaskExample]),
    masks: &[Mask],
    positions: Positions,
    progress: &dyn Fn(usize, usize),
) -> Result<Vec<TaskResult>> {
    check_masks(masks, split)?;
    if let Some(mask) = masks.iter().find(|m| m.is_for_texts()) {
        let reason = format!("{} is measured on a text only (--text), not on tasks", mask.name());
        return Err(Error::Setting { flag: "--mask", reason });
    }
    let hidden_size = model.config().hidden_size;
    // The dense mask is the reference itself; every other one gets its own stream.
    let streams: Vec<Mask> =
        std::iter::once(Mask::Dense).chain(masks.iter().copied().filter(|m| *m != Mask::Dense)).collect();
    let passes = passes(examples, streams.len(), hidden_size);
    let (embedding, head) = (Embedding::load(model)?, Head::load(model)?);
    let per_pass = model.config().n_layers * streams.len();
    let mut of_stream: Vec<Vec<Vec<ChoiceScore>>> = vec![Vec::new(); streams.len()];
    for (i, pass) in passes.iter().enumerate() {
        let x = embedding.rows(&pass.tokens)?;
        let on_step = |done: usize| progress(i * per_pass + done, passes.len() * per_pass);
        let ended = run_pass((model, split), pass, &x, &streams, positions, &on_step)?;
        for (stream, of_stream) in ended.iter().zip(&mut of_stream) {
            of_stream.extend(scores(&head, pass, &stream.x, hidden_size, stream.mask)?);
        }
    }
    progress(passes.len() * per_pass, passes.len() * per_pass);
    let bytes = LayerBytes::of(model, split)?;
    let Some(dense) = of_stream.first() else { return Ok(Vec::new()) };
    let result = |mask: &Mask| {
        let stream = streams.iter().position(|m| m == mask).unwrap_or(0);
        TaskResult::new(*mask, bytes.share(*mask), kind, examples, &of_stream[stream], dense)
    };
    Ok(masks.iter().map(result).collect())
}

/// All layers for one pass.
fn run_pass(
    (model, split): (&dyn Checkpoint, Option<&Split>),
    pass: &Pass,
    x: &[f32],
    masks: &[Mask],
    positions: Positions,
    on_step: &dyn Fn(usize),
) -> Result<Vec<Stream>> {
    let stream = |&mask: &Mask| Ok(Stream { mask, x: x.to_vec(), active: chosen_active(mask, split, None)? });
    let mut streams: Vec<Stream> = masks.iter().map(stream).collect::<Result<_>>()?;
    let (groups, hidden) = (pass.groups(), model.config().hidden_size);
    for index in 0..model.config().n_layers {
        let layer = DenseLayer::load(model, index)?;
        let choosers = Choosers::load(split, masks, index)?;
        let down_norm = layer.down_norms()?;
        for (i, stream) in streams.iter_mut().enumerate() {
            on_step(index * masks.len() + i);
            let (active, choice) = (stream.active.get(index), stream.mask.input_choice(None));
            let masked = MaskedLayer::new(stream.mask, &layer, &down_norm, &choosers, active, choice)?;
            for (sequences, rows) in &groups {
                let x = &mut stream.x[rows.start * hidden..rows.end * hidden];
                masked.forward(x, &pass.sequences[sequences.clone()], positions)?;
            }
        }
    }
    Ok(streams)
}
