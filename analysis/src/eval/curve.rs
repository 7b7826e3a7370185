//! What sparse mode costs at every share of the neurons, measured on text that the shares were not fitted to.

use super::graded_thresholds::fit_graded_thresholds;
use super::{Evaluation, Fitted, Mask, Windows, evaluate};
use crate::{Error, Result};
use thermocline_datasets::Checkpoint;
use thermocline_split::{Curve, GradedCurve, GradedCurves, Split};

/// Shares of all neurons that are measured.
const SHARES: [f64; 9] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9];

/// In graded precision: shares of the neurons that are always computed, and of the others.
const ALWAYS: [f64; 4] = [0.0, 0.25, 0.5, 0.75];
const GRADED_SHARES: [f64; 7] = [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7];

/// The curve's windows are so many times as long as those that shares are fitted to: neurons that are left out cost more where
/// more tokens before were computed so, and a perplexity needs more tokens than a mean.
const LONGER: usize = 4;

/// The first `n` windows of `ctx` tokens of a text, for [`super::fit_shares`], and behind them as many four times as long, for
/// [`measure_curve`].
///
/// # Errors
/// If a window has fewer than two tokens, or the text is too short for both.
pub fn fit_windows(tokens: &[u32], ctx: usize, n: usize) -> Result<(Windows<'_>, Windows<'_>)> {
    let of = |ctx: usize| ctx.checked_mul(n);
    let longer = ctx.checked_mul(LONGER);
    let both = of(ctx).zip(longer.and_then(of)).and_then(|(fit, curve)| Some((fit, curve, fit.checked_add(curve)?)));
    let (fit, curve, longer) = match (both, longer) {
        (Some((fit, curve, all)), Some(longer)) if all <= tokens.len() => (fit, curve, longer),
        (Some((fit, curve, all)), _) => {
            let got = tokens.len();
            let reason = format!(
                "{n}: the text has {got} tokens, and {all} are needed: {fit} that shares are fitted to, and behind them \
                 {curve} that show what they cost; give a longer text, or a smaller --windows or --ctx"
            );
            return Err(Error::Setting { flag: "--windows", reason });
        }
        (None, _) => {
            let reason = format!("{n} windows of {ctx} tokens are more than can be counted");
            return Err(Error::Setting { flag: "--windows", reason });
        }
    };
    let fitting = Windows::new(tokens, ctx, n)?;
    Ok((fitting, Windows::new(&tokens[fit..fit + curve], longer, n)?))
}

/// Measures on `windows` how much the perplexity rises over the dense model's where sparse mode computes a share of the
/// neurons of `split`, at nine shares; `model` is the same split, seen as a dense model. Whatever the split says that shares
/// cost decides how they are divided, as it does when it runs. `text_digest` is the XXH3-128 of the text. Memory: one layer
/// as f32, one window's activations, and `40 * n_tokens * hidden_size` bytes; time: that of ten dense passes.
/// `progress(done, total)` counts layers times streams.
///
/// # Errors
/// If a tensor or a predictor cannot be read, or the outputs are not finite.
pub fn measure_curve(
    model: &dyn Checkpoint,
    split: &Split,
    windows: &Windows<'_>,
    text_digest: u128,
    progress: &dyn Fn(usize, usize),
) -> Result<Curve> {
    let results = evaluate(model, Some(split), windows, &SHARES.map(Mask::Predicted), &Fitted::default(), progress)?;
    curve_of(&SHARES, &results, text_digest)
}

/// Fits thresholds of graded precision on `fitting`, for each of four shares of the neurons that are always computed, at seven shares of
/// the others, or of their rows; what that costs is not measured.
/// Memory: `4 * (hidden_size + 5 * intermediate_size)` bytes for each token of `fitting`, a layer and its sketch as f32; time: that of
/// one dense pass over `fitting`. `progress(done, total)` counts layers.
///
/// # Errors
/// If the split has no sketches, or a tensor cannot be read, or the residual stream is not finite.
pub fn fit_graded(
    model: &dyn Checkpoint,
    split: &Split,
    fitting: &Windows<'_>,
    progress: &dyn Fn(usize, usize),
) -> Result<GradedCurves> {
    let shares = (&ALWAYS[..], &GRADED_SHARES[..]);
    Ok(GradedCurves::new(fit_graded_thresholds(model, split, fitting, shares, progress)?, Vec::new())?)
}

/// The same, and measures on `windows` what the perplexity rises by at each of these shares.
/// Memory: also that of [`measure_curve`] with `116 * n_tokens * hidden_size` bytes; time: also that of 29 dense passes over `windows`.
/// `progress(done, total)` counts layers times streams.
///
/// # Errors
/// As above, and if the outputs are not finite.
pub fn measure_graded_curves(
    model: &dyn Checkpoint,
    split: &Split,
    (fitting, windows): (&Windows<'_>, &Windows<'_>),
    text_digest: u128,
    progress: &dyn Fn(usize, usize),
) -> Result<GradedCurves> {
    let n_layers = model.config().n_layers;
    let masks = ALWAYS.map(|always| GRADED_SHARES.map(|active| Mask::Graded { active, always, alike: false }));
    let masks = masks.as_flattened();
    let all = n_layers * (2 + masks.len());
    let thresholds = fit_graded(model, split, fitting, &|done, _| progress(done, all))?.thresholds().clone();
    let fitted = Fitted { graded: Some(thresholds.clone()), ..Fitted::default() };
    let on_step = |done: usize, _: usize| progress(n_layers + done, all);
    let results = evaluate(model, Some(split), windows, masks, &fitted, &on_step)?;
    let of_each = ALWAYS.iter().zip(results.chunks(GRADED_SHARES.len()));
    let curves = of_each.map(|(&always, results)| {
        Ok(GradedCurve { always: always as f32, curve: curve_of(&GRADED_SHARES, results, text_digest)? })
    });
    Ok(GradedCurves::new(thresholds, curves.collect::<Result<_>>()?)?)
}

/// What `results`, of one mask at each of `shares`, say of the perplexity.
fn curve_of(shares: &[f64], results: &[Evaluation], text_digest: u128) -> Result<Curve> {
    let (mut increases, mut highs) = (Vec::new(), Vec::new());
    for result in results {
        // Every mask was compared with the dense model.
        let increase = result.perplexity_ratio.unwrap_or(f64::NAN) - 1.0;
        let high = result.perplexity_ratio_ci95.map_or(f64::NAN, |ends| ends[1]) - 1.0;
        increases.push(increase as f32);
        highs.push(high.max(increase) as f32);
    }
    let tokens = results.first().map_or(0, |r| r.tokens as u64);
    Ok(Curve::new(shares.iter().map(|&s| s as f32).collect(), increases, highs, tokens, text_digest)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_follow_each_other_or_say_how_many_tokens_they_need() {
        let tokens: Vec<u32> = (0..100).collect();
        let (fit, curve) = fit_windows(&tokens, 10, 2).unwrap();
        assert_eq!((fit.tokens(), fit.ctx()), (&tokens[..20], 10));
        assert_eq!((curve.tokens(), curve.ctx(), curve.len()), (&tokens[20..], 40, 2));
        let said = fit_windows(&tokens[..99], 10, 2).unwrap_err().to_string();
        assert!(said.contains("--windows") && said.contains("99 tokens") && said.contains("100 are needed"), "{said}");
        for (ctx, n) in [(1, 1), (10, 0), (usize::MAX, 2), (usize::MAX / 2, 1), (2, usize::MAX)] {
            assert!(matches!(fit_windows(&tokens, ctx, n), Err(Error::Setting { .. })), "{ctx} {n}");
        }
    }
}
