//! Sections about what leaving neurons out costs.

use super::figures::{mean, percent, short};
use super::{EvalFile, Figure, Section, Table, TasksFile, predictors, tasks};
use crate::Result;
use crate::eval::Evaluation;
use crate::plots::{Axis, Body, Chart, Ink, N_SERIES, Series};
use polars::prelude::Column;
use std::collections::BTreeMap;

const MISSING: &str = "thermocline eval -m SPLIT --text FILE --mask predicted --active 0.1,0.3,0.5 --json > eval.json";

/// Results of one model on one text under one kind of mask, by share.
struct Family<'a> {
    label: String,
    results: Vec<(&'a EvalFile, &'a Evaluation)>,
}

/// Results about masks: where planes are compared, no neuron is left out.
fn masks(file: &EvalFile) -> impl Iterator<Item = &Evaluation> {
    file.results.iter().filter(|r| r.planes.is_none())
}

fn families(evals: &[EvalFile]) -> Vec<Family<'_>> {
    let subject =
        |f: &EvalFile| (f.model.clone(), f.encoding.clone(), f.reference.clone(), f.text.clone(), f.ctx, f.windows);
    let mut subjects: Vec<_> = evals.iter().map(subject).collect();
    subjects.sort();
    subjects.dedup();
    let mut by_key: BTreeMap<_, Vec<(&EvalFile, &Evaluation)>> = BTreeMap::new();
    for file in evals {
        for result in masks(file) {
            let key = (subject(file), kind(result), result.engine.clone());
            by_key.entry(key).or_default().push((file, result));
        }
    }
    let families = by_key.into_iter().map(|((subject, kind, engine), mut results)| {
        results.sort_by(|a, b| a.1.active.unwrap_or(1.0).total_cmp(&b.1.active.unwrap_or(1.0)));
        let mut label = kind;
        if engine == "decode" {
            label.push_str(", decoded");
        }
        if subjects.len() > 1 {
            label = format!("{label}, {} {}", short(&subject.0, 20), short(&subject.1, 14));
        }
        if let Some(reference) = subject.2.filter(|_| evals.iter().any(|f| f.reference != evals[0].reference)) {
            label = format!("{label}, against {}", short(&reference, 10));
        }
        Family { label, results }
    });
    families.collect()
}

/// The mask, what its shares are of, and behind which share they are.
fn kind(result: &Evaluation) -> String {
    let rows = if result.rows_read.is_some() { " by rows" } else { "" };
    let always = result.always.map_or_else(String::new, |share| format!(" behind {}", percent(share)));
    format!("{}{rows}{always}", result.mask)
}

/// Perplexity and KL against the share that is computed, and what tasks say.
pub(crate) fn accuracy(evals: &[EvalFile], tasks: &[TasksFile]) -> Result<Section> {
    let mut section = Section::new("accuracy", "Accuracy against active share", MISSING);
    section.tables.extend(tasks::table(tasks)?);
    let families = families(evals);
    let Some(lowest) = families.iter().flat_map(|f| &f.results).map(|r| r.1.perplexity).min_by(f64::total_cmp) else {
        return Ok(section);
    };
    section.figures.push(perplexity(&families, lowest));
    section.figures.extend(divergence(&families));
    section.figures.extend(divergence_by_bytes(&families));
    section.tables.insert(0, results_table(evals)?);
    Ok(section)
}

/// Lines over a share of each result; masks without one are level lines.
fn over(
    families: &[Family<'_>],
    share: impl Fn(&Evaluation) -> Option<f64>,
    of: impl Fn(&Evaluation) -> Option<f64>,
) -> Vec<Series> {
    let mut series = Vec::new();
    for (i, family) in families.iter().enumerate() {
        let point = |(_, r): &(&EvalFile, &Evaluation)| Some((100.0 * share(r)?, of(r)?));
        let points: Vec<(f64, f64)> = family.results.iter().filter_map(point).collect();
        if !points.is_empty() {
            series.push(Series::new(family.label.clone(), points, Ink::Series(i % N_SERIES)).marked());
        } else if let Some(level) = family.results.first().and_then(|(_, r)| of(r)) {
            let label = family.label.clone();
            series.push(Series::new(label, vec![(0.0, level), (100.0, level)], Ink::Series(i % N_SERIES)).dashed());
        }
    }
    series
}

/// The axis of [`over`] for the share that was asked for: of the neurons, but for masks that leave out something else.
fn share_axis(families: &[Family<'_>]) -> Axis {
    const OTHERS: [(&str, &str); 3] = [("teal", "inputs"), ("wina", "inputs"), ("inputs", "bytes")];
    let is_shown = |mask: &str| families.iter().flat_map(|f| &f.results).any(|(_, r)| r.mask == mask);
    let shown = OTHERS.into_iter().filter(|(mask, _)| is_shown(mask));
    let mut others: Vec<String> = shown.map(|(mask, what)| format!("{mask}: of {what}")).collect();
    if families.iter().flat_map(|f| &f.results).any(|(_, r)| r.rows_read.is_some()) {
        others.push("graded: of rows' bytes".to_owned());
    }
    let label = match others.as_slice() {
        [] => "neurons computed (% of each layer)".to_owned(),
        others => format!("share (% of each layer's neurons; {})", others.join(", ")),
    };
    Axis::new(label).from_to(0.0, 100.0)
}

fn perplexity(families: &[Family<'_>], lowest: f64) -> Figure {
    let results: Vec<&Evaluation> = families.iter().flat_map(|f| f.results.iter().map(|r| r.1)).collect();
    let cost = |mask: &str| {
        let of_mask = results.iter().filter(|r| r.mask == mask && r.active.is_some());
        let near = of_mask.min_by(|a, b| {
            let gap = |r: &Evaluation| (r.active.unwrap_or(1.0) - 0.3).abs();
            gap(a).total_cmp(&gap(b))
        })?;
        let ratio = near.perplexity_ratio?;
        Some(format!("{} at {} active costs {:+.1} %", mask, percent(near.active?), 100.0 * (ratio - 1.0)))
    };
    let costs: Vec<String> = ["oracle", "predicted"].into_iter().filter_map(cost).collect();
    let reading = if costs.is_empty() {
        format!("The lowest perplexity measured here is {lowest:.2}.")
    } else {
        format!("Over the dense perplexity, {}; masks apply at every position.", costs.join(" and "))
    };
    let series = over(families, |r| r.active, |r| Some(r.perplexity));
    Figure::new(
        Chart {
            title: "Perplexity against active share".to_owned(),
            x: share_axis(families),
            y: Axis::new("perplexity").log(),
            body: Body::Lines(series),
        },
        reading,
    )
}

/// What a token reads against what it costs: the lower left is where to be.
fn divergence_by_bytes(families: &[Family<'_>]) -> Option<Figure> {
    let of = |r: &Evaluation| Some((r.bytes_share?, r.kl.filter(|kl| *kl > 0.0)?));
    let series = over(families, |r| of(r).map(|p| p.0), |r| of(r).map(|p| p.1));
    // With sketches a token can read more than the dense model's.
    let most = series.iter().flat_map(|s| &s.points).map(|p| p.0).fold(100.0, f64::max);
    let all = families.iter().flat_map(|f| f.results.iter().map(|(file, r)| (f.label.as_str(), *file, *r)));
    let runnable: Vec<_> = all.filter(|(_, _, r)| !r.mask.starts_with("oracle") && of(r).is_some()).collect();
    // Figures of one model on one text are compared, and those of all that was compared with one other.
    let subject = |f: &EvalFile| {
        let model = || (f.model.clone(), f.encoding.clone());
        let of = f.reference.clone().map_or_else(model, |reference| (reference, String::new()));
        (of, f.reference.is_some(), f.text.clone(), f.ctx, f.windows)
    };
    let is_beaten = |file: &EvalFile, point: Option<(f64, f64)>| {
        let same = runnable.iter().filter(|(_, other, _)| subject(other) == subject(file));
        let mut points = same.map(|(_, _, r)| of(r));
        points.any(|other| {
            other.zip(point).is_some_and(|((b, k), (bytes, kl))| b <= bytes && k <= kl && (b, k) != (bytes, kl))
        })
    };
    let front = runnable.iter().filter(|(_, file, r)| !is_beaten(file, of(r)));
    let front: Vec<String> =
        front.map(|(label, _, r)| format!("{label} at {}", percent(r.active.unwrap_or(1.0)))).collect();
    (!front.is_empty()).then(|| {
        let whole = if has_reference(families) { "the reference's layers" } else { "the layers" };
        let reading = format!(
            "Of what can be run nothing else is both closer and smaller than {}. Bytes are those of the layers' weights and \
             of predictors, as they are stored; an oracle is counted as if it cost nothing to ask.",
            front.join(", ")
        );
        Figure::new(
            Chart {
                title: format!("Distance from the {} against bytes", compared_with(families)),
                x: Axis::new(format!("bytes that a token reads (% of {whole})")).from_to(0.0, 10.0 * (most / 10.0).ceil()),
                y: Axis::new("KL(dense || masked), nats per token").log(),
                body: Body::Lines(series),
            },
            reading,
        )
    })
}

/// What distances are from.
fn compared_with(families: &[Family<'_>]) -> String {
    let mut references: Vec<_> = families.iter().flat_map(|f| &f.results).map(|(file, _)| &file.reference).collect();
    references.dedup();
    match references.as_slice() {
        [Some(only)] => format!("reference {only}"),
        _ if has_reference(families) => "dense model or reference".to_owned(),
        _ => "dense model".to_owned(),
    }
}

fn has_reference(families: &[Family<'_>]) -> bool {
    families.iter().flat_map(|f| &f.results).any(|(file, _)| file.reference.is_some())
}

fn divergence(families: &[Family<'_>]) -> Option<Figure> {
    let sparse = |r: &Evaluation| r.kl.filter(|kl| r.active.is_some() && *kl > 0.0);
    let series = over(families, |r| r.active, sparse);
    let best = families.iter().flat_map(|f| &f.results).filter(|(_, r)| sparse(r).is_some());
    let best = best.min_by(|a, b| a.1.kl.unwrap_or(0.0).total_cmp(&b.1.kl.unwrap_or(0.0)))?.1;
    let closest = format!(
        "closest to the {} here is {} at {} active, {:.3} nats per token away, with the same likeliest \
         token at {} of the positions.",
        compared_with(families),
        best.mask,
        percent(best.active.unwrap_or(1.0)),
        best.kl.unwrap_or(0.0),
        percent(best.top1_agreement.unwrap_or(0.0))
    );
    let equal = families.iter().flat_map(|f| &f.results).filter(|(_, r)| r.active.is_some() && r.kl == Some(0.0));
    let equal: Vec<String> =
        equal.map(|(_, r)| format!("{} at {}", r.mask, percent(r.active.unwrap_or(1.0)))).collect();
    let reading = if equal.is_empty() {
        format!("The {closest}")
    } else {
        format!("No distance at all, so not on this axis: {}. Of the others the {closest}", equal.join(", "))
    };
    Some(Figure::new(
        Chart {
            title: format!("Distance from the {}", compared_with(families)),
            x: share_axis(families),
            y: Axis::new("KL(dense || masked), nats per token").log(),
            body: Body::Lines(series),
        },
        reading,
    ))
}

fn results_table(evals: &[EvalFile]) -> Result<Table> {
    let rows: Vec<(&EvalFile, &Evaluation)> = evals.iter().flat_map(|f| masks(f).map(move |r| (f, r))).collect();
    let text = |name: &str, of: &dyn Fn(&EvalFile, &Evaluation) -> String| {
        Column::new(name.into(), rows.iter().map(|(f, r)| of(f, r)).collect::<Vec<String>>())
    };
    let number = |name: &str, of: &dyn Fn(&Evaluation) -> Option<f64>| {
        Column::new(name.into(), rows.iter().map(|(_, r)| of(r)).collect::<Vec<Option<f64>>>())
    };
    let columns = vec![
        text("model", &|f, _| f.model.clone()),
        text("neurons", &|f, _| f.encoding.clone()),
        text("text", &|f, _| format!("{}, {} x {}", f.text, f.windows, f.ctx)),
        text("against", &|f, _| f.reference.clone().unwrap_or_else(|| "dense".to_owned())),
        text("mask", &|_, r| if r.engine == "decode" { format!("{}, decoded", r.mask) } else { r.mask.clone() }),
        text("active", &|_, r| r.active.map_or("\u{2013}".to_owned(), percent)),
        text("bytes", &|_, r| r.bytes_share.map_or("\u{2013}".to_owned(), percent)),
        number("perplexity", &|r| Some(r.perplexity)),
        text("95 %", &|_, r| format!("{:.1}\u{2013}{:.1}", r.perplexity_ci95[0], r.perplexity_ci95[1])),
        number("ratio", &|r| r.perplexity_ratio),
        number("KL", &|r| r.kl),
        number("top-1", &|r| r.top1_agreement),
        number("recall", &|r| r.recall),
        number("energy recall", &|r| r.energy_recall),
    ];
    Table::new("evaluations; masks at every position, as if each had been decoded", columns)
}

/// Recall and energy recall, layer by layer, and energy over what predictors take.
pub(crate) fn recall(evals: &[EvalFile]) -> Section {
    let mut section = Section::new("recall", "Recall by layer", MISSING);
    let families = families(evals);
    let shown: Vec<(String, &Evaluation)> = families
        .iter()
        .flat_map(|f| f.results.iter().map(move |(_, r)| (f.label.clone(), *r)))
        .filter(|(_, r)| r.active.is_some() && !r.layers.is_empty())
        .map(|(label, r)| (format!("{label} {}", percent(r.active.unwrap_or(1.0))), r))
        .collect();
    let predicted: Vec<_> = shown.iter().filter(|(_, r)| r.mask == "predicted").collect();
    if let Some(mean_recall) = mean(predicted.iter().filter_map(|(_, r)| r.recall)) {
        let series = predicted.iter().enumerate().map(|(i, (label, r))| {
            let points = r.layers.iter().map(|l| (l.layer as f64, 100.0 * l.recall));
            Series::new(label.clone(), points.collect(), Ink::Series(i % N_SERIES)).marked()
        });
        let body = Body::Lines(series.collect());
        let reading = format!(
            "The predictor finds {} of the neurons that the oracle would choose on the same states (mean over layers \
             and shares); an oracle finds all.",
            percent(mean_recall)
        );
        section.figures.push(Figure::new(by_layer("Recall of the predictor", "recall (%)", body), reading));
    }
    let worst = shown.iter().filter_map(|(label, r)| {
        let low = r.layers.iter().min_by(|a, b| a.energy_recall.total_cmp(&b.energy_recall))?;
        Some((label, low))
    });
    if let Some((label, low)) = worst.min_by(|a, b| a.1.energy_recall.total_cmp(&b.1.energy_recall)) {
        // A colour a share, dashed for oracles, so that each prediction is seen beside the best there is.
        let mut shares: Vec<f64> = shown.iter().filter_map(|(_, r)| r.active).collect();
        shares.sort_by(f64::total_cmp);
        shares.dedup();
        let series = shown.iter().map(|(label, r)| {
            let points = r.layers.iter().map(|l| (l.layer as f64, 100.0 * l.energy_recall)).collect();
            let share = shares.iter().position(|s| Some(*s) == r.active).unwrap_or(0);
            let series = Series::new(label.clone(), points, Ink::Series(share % N_SERIES));
            if r.mask == "predicted" { series.marked() } else { series.dashed() }
        });
        let reading = format!(
            "Energy, the sum of (|h| \u{b7} ||d||)\u{b2}, is what accuracy follows: {label} keeps least of it in layer \
             {}, {}.",
            low.layer,
            percent(low.energy_recall)
        );
        let chart = by_layer("Energy that the chosen neurons keep", "energy recall (%)", Body::Lines(series.collect()));
        section.figures.push(Figure::new(chart, reading));
    }
    section.figures.extend(predictors::energy_by_bytes(evals));
    section
}

fn by_layer(title: &str, y: &str, body: Body) -> Chart {
    Chart { title: title.to_owned(), x: Axis::new("layer"), y: Axis::new(y).from_to(0.0, 100.0), body }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shares of neurons and of rows, and behind different shares, are no points of one line.
    #[test]
    fn shares_of_different_things_are_told_apart() {
        let record = include_str!("../../records/cpu-zen5-2core/eval-qwen05-graded.json");
        let record: serde_json::Value = serde_json::from_str(record).unwrap();
        let results: Vec<Evaluation> = serde_json::from_value(record["results"].clone()).unwrap();
        let mut kinds: Vec<String> = results.iter().map(kind).collect();
        kinds.dedup();
        assert_eq!(kinds, ["dense", "graded by rows", "graded by rows behind 53 %"]);
    }

    /// What was compared with the checkpoint is no line with what was compared with the split itself, and splits of one checkpoint
    /// beat each other.
    #[test]
    fn what_was_compared_with_another_model_is_told_apart() {
        let records = [
            include_str!("../../records/cpu-zen5-2core/eval-smollm2-reference-residuals.json"),
            include_str!("../../records/cpu-zen5-2core/eval-smollm2-reference-q4.json"),
            include_str!("../../records/cpu-zen5-2core/eval-smollm2-graded.json"),
        ];
        let files = records.map(|record| serde_json::from_str::<EvalFile>(record).unwrap());
        let all = families(&files);
        let against = all.iter().filter(|f| f.label.ends_with(", against smollm2")).count();
        assert_eq!((against, compared_with(&all).as_str()), (4, "dense model or reference"));
        assert!(all.iter().all(|f| f.results.iter().all(|(file, _)| file.model == f.results[0].0.model)));
        let of_one = families(&files[..2]);
        assert!(of_one.iter().all(|f| !f.label.contains("against")) && compared_with(&of_one) == "reference smollm2");
        let front = divergence_by_bytes(&of_one).unwrap().reading;
        // Thirty percent of the rows are nearer than all of them in q4, for fewer bytes.
        assert!(front.contains("smollm2-r4 q4 at 30 %") && !front.contains("dense"), "{front}");
        assert_eq!(compared_with(&families(&files[2..])), "dense model");
    }
}
