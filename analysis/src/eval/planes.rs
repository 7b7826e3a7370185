//! What each plane of the weights buys: the same text through the model at several precisions.

use super::likelihood::{TokenScores, add};
use super::{Evaluation, Mask, Windows};
use crate::{PlanesStudy, Result};
use std::path::Path;
use thermocline_calibrate::dense::{DenseLayer, Embedding, Head};
use thermocline_datasets::Checkpoint;
use thermocline_runtime::quality::Tally;
use thermocline_split::{Planes, Precision, Split, SplitCheckpoint};

/// Bytes of one model's logits that are held at once.
const LOGIT_BYTES: usize = 32 << 20;

/// Bits a feed-forward weight that `planes` reads, of planes that take what `study` says.
pub fn bits_per_weight(planes: Planes, study: &PlanesStudy) -> f64 {
    let bits = |precision| {
        let taken = study.planes.iter().enumerate().filter(|(i, plane)| match plane.plane.as_str() {
            "coarse" => precision >= Precision::Plus,
            "final" => precision == Precision::Exact,
            _ => *i == 0,
        });
        taken.map(|(_, plane)| plane.bits_per_weight).sum::<f64>()
    };
    (1.0 - planes.share()) * bits(Precision::Base) + planes.share() * bits(planes.precision())
}

/// Runs a text through the split at `dir` once for each of `choices`, and compares with all planes of all weights: the
/// ratios of perplexity and the KL divergences of the results are against that. Memory and progress as
/// [`super::evaluate`].
///
/// # Errors
/// If the split cannot be read, or the outputs are not finite.
pub fn evaluate_planes(
    dir: &Path,
    windows: &Windows<'_>,
    choices: &[Planes],
    progress: &dyn Fn(usize, usize),
) -> Result<Vec<Evaluation>> {
    let open = |planes| Ok(SplitCheckpoint::new(Split::open_at(dir, planes)?));
    let reference = open(Planes::from(Precision::Exact))?;
    let models = choices.iter().map(|&planes| open(planes)).collect::<Result<Vec<_>>>()?;
    let config = reference.config().clone();
    let all = || std::iter::once(&reference).chain(&models);
    let hidden = config.hidden_size;
    let mut streams = all().map(|m| Ok(Embedding::load(m)?.rows(windows.tokens())?)).collect::<Result<Vec<_>>>()?;
    let total = config.n_layers * streams.len();
    for index in 0..config.n_layers {
        for (i, (model, x)) in all().zip(&mut streams).enumerate() {
            progress(index * (1 + models.len()) + i, total);
            let layer = DenseLayer::load(model, index)?;
            for window in x.chunks_exact_mut(windows.ctx() * hidden) {
                let mut next = layer.attention(window, 1, windows.ctx())?;
                let input = layer.ffn_input(&next)?;
                let neurons = layer.neurons(&input)?;
                layer.ffn_output(&mut next, neurons.h)?;
                window.copy_from_slice(&next);
            }
        }
    }
    progress(total, total);
    let heads = all().map(|m| Ok(Head::load(m)?)).collect::<Result<Vec<_>>>()?;
    let positions = (LOGIT_BYTES / 4 / config.vocab_size.max(1)).clamp(1, 256);
    let mut scores = vec![TokenScores::default(); streams.len()];
    for start in (0..windows.tokens().len()).step_by(positions) {
        let end = (start + positions).min(windows.tokens().len());
        let targets: Vec<Option<u32>> = (start..end).map(|p| windows.next(p)).collect();
        let range = start * hidden..end * hidden;
        let logits = heads.iter().zip(&streams).map(|(head, x)| Ok(head.logits(&x[range.clone()])?));
        let logits = logits.collect::<Result<Vec<_>>>()?;
        for (scores, of_model) in scores.iter_mut().zip(&logits) {
            add(scores, &logits[0], of_model, config.vocab_size, &targets);
        }
    }
    let dense = scores[0].losses.clone();
    let tally = vec![Tally::whole(windows.tokens().len(), config.intermediate_size); config.n_layers];
    let results = choices.iter().zip(scores.into_iter().skip(1)).map(|(planes, scores)| {
        let mut result = Evaluation::new(Mask::Dense, windows, scores, Some(&dense), &tally)?;
        result.planes = Some(planes.to_string());
        Ok(result)
    });
    results.collect()
}
