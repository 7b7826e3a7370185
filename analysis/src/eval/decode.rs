//! The same perplexity through the token engine, so that two engines that share no code check each other.

use super::likelihood::{TokenScores, cross_entropy};
use super::{Evaluation, Mask, Windows};
use crate::{Error, Result};
use thermocline_runtime::{Decoder, Mode};

/// Decodes `windows` token by token with `engine`, in its own mode. There is no dense reference here: KL, agreement and
/// recall are `None`. `progress(done, total)` counts tokens.
///
/// # Errors
/// If a window is longer than the engine's context, the disk fails, or the outputs are not finite.
pub fn evaluate_decode(
    engine: &mut dyn Decoder,
    windows: &Windows<'_>,
    progress: &dyn Fn(usize, usize),
) -> Result<Evaluation> {
    let context = engine.context();
    if windows.ctx() > context {
        let reason = format!("{} tokens do not fit in the engine's context of {context}", windows.ctx());
        return Err(Error::Setting { flag: "--ctx", reason });
    }
    let before = engine.account();
    let mut scores = TokenScores::default();
    for (position, &token) in windows.tokens().iter().enumerate() {
        if position.is_multiple_of(windows.ctx()) {
            engine.clear();
        }
        progress(position, windows.tokens().len());
        // The last token of a window predicts nothing that is counted.
        if let Some(next) = windows.next(position) {
            let logits = engine.decode(token)?;
            scores.losses.push(cross_entropy(&logits, next));
        }
    }
    progress(windows.tokens().len(), windows.tokens().len());
    let mask = match engine.mode() {
        Mode::Exact => Mask::Exact,
        // 0.3 as f32 is 0.30000001 as f64; nobody asked for more than six digits.
        Mode::Sparse { active } => {
            let rounded = |share: f64| (share * 1e6).round() / 1e6;
            let active = rounded(f64::from(active));
            match engine.is_graded() {
                true => Mask::Graded { active, always: rounded(engine.always_share()), alike: false },
                false => Mask::Predicted(active),
            }
        }
    };
    let mut evaluation = Evaluation::new(mask, windows, scores, None, &[])?;
    let after = engine.account();
    let (computed, all) =
        (after.neurons_computed - before.neurons_computed, after.neurons_total - before.neurons_total);
    evaluation.engine = "decode".to_owned();
    evaluation.computed_share = (all > 0).then(|| computed as f64 / all as f64);
    Ok(evaluation)
}
