//! Where a GPU run found its active neurons, token by token.

use super::figures::{percent, short};
use super::{Figure, RunFile};
use crate::plots::{Axis, Body, Chart, Ink, Series};
use serde_json::Value;

/// Tokens of the moving mean.
const WINDOW: usize = 16;

/// Bytes of a token's active neurons, by where they lay.
struct Neurons {
    hot: f64,
    cached: f64,
    missed: f64,
}

/// The share of the active neurons that VRAM held: hot ones, and with them those of the cache. `None` for runs on the
/// CPU, in exact mode, or of programs that did not keep what this needs.
pub(super) fn over_time(run: &RunFile) -> Option<Figure> {
    let neurons = neurons(run)?;
    let share = |of: &dyn Fn(&Neurons) -> f64| -> Vec<(f64, f64)> {
        let all = neurons.iter().map(|(token, n)| (*token, 100.0 * of(n) / (n.hot + n.cached + n.missed)));
        all.filter(|p| p.1.is_finite()).collect()
    };
    let each = share(&|n| n.hot + n.cached);
    let vram = moving_mean(&each);
    let (first, last) = (vram.first()?.1, vram.last()?.1);
    let least = vram.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1))?;
    let series = vec![
        Series::new("each token", each, Ink::Series(5)),
        Series::new(format!("mean of {WINDOW}"), vram, Ink::Text),
        Series::new("hot neurons", share(&|n| n.hot), Ink::Series(2)),
    ];
    let percent = |v: f64| percent(v / 100.0);
    let reading = format!(
        "VRAM holds {} of the active neurons at first, {} at last, and least, {}, at token {}; the mean is over the \
         {WINDOW} tokens before. Above the hot neurons lies what the cache holds.",
        percent(first),
        percent(last),
        percent(least.1),
        least.0
    );
    let chart = Chart {
        title: format!("Active neurons found in VRAM \u{2013} {}", short(&run.name, 30)),
        x: Axis::new("generated token"),
        y: Axis::new("in VRAM (% of the active neurons)").from_to(0.0, 100.0),
        body: Body::Lines(series),
    };
    Some(Figure::new(chart, reading))
}

/// What a token reads from the device besides hot neurons is known: matrices, predictors or sketches, keys and values of the
/// positions so far.
fn neurons(run: &RunFile) -> Option<Vec<(f64, Neurons)>> {
    let number = |place: &str| run.plan.pointer(place).and_then(Value::as_f64);
    if run.mode.get("mode").and_then(Value::as_str) != Some("sparse") {
        return None;
    }
    // Runs of before there were sketches in pinned memory have what is read on the device.
    let chooser = number("/chooser_bytes_per_token").or_else(|| number("/fixed/predictors"));
    let fixed = number("/fixed/matrices")? + chooser?;
    let position = number("/fixed/kv_cache")? / number("/request/base/context").filter(|n| *n >= 1.0)?;
    number("/request/vram_budget_bytes")?;
    let of_token = |&(token, tiers): &(usize, super::Tiers)| {
        let others = fixed + position * (run.prompt_tokens as f64 + token as f64);
        let hot = (tiers.device as f64 - others).max(0.0);
        (token as f64, Neurons { hot, cached: tiers.cache as f64, missed: tiers.host as f64 })
    };
    Some(run.timeline.iter().map(of_token).collect())
}

/// Means of each point and those before it, from the first whole window on.
fn moving_mean(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mean = |w: &[(f64, f64)]| (w[w.len() - 1].0, w.iter().map(|p| p.1).sum::<f64>() / w.len() as f64);
    points.windows(WINDOW.min(points.len()).max(1)).map(mean).collect()
}
