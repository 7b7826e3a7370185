//! What predictors find for their bytes.

use super::figures::{mean, percent, short};
use super::{EvalFile, Figure};
use crate::eval::Evaluation;
use crate::plots::{Axis, Body, Chart, Ink, Series};
use std::collections::BTreeMap;

/// A predictor's bytes, relative to all of the layers' weights, and the share of the energy that its choice keeps.
type Point = (f64, f64);

/// One checkpoint on one text at one share of the neurons, whatever splits were made of it.
#[derive(Default)]
struct Group {
    /// A split's name.
    model: String,
    /// Share of the neurons.
    active: f64,
    /// By rising bytes, under each of [`PREDICTED`].
    predicted: [Vec<Point>; PREDICTED.len()],
    /// What oracles keep.
    oracle: Vec<f64>,
}

/// Masks that ask a predictor or a sketch, and what the legend calls them.
const PREDICTED: [(&str, &str); 3] =
    [("predicted", "predicted"), ("predicted-alike", "alike"), ("graded", "by sketches")];

/// The energy that predictors of all records find, over their bytes, with the oracle's of as many neurons.
pub(super) fn energy_by_bytes(evals: &[EvalFile]) -> Option<Figure> {
    let groups = groups(evals);
    let points = || groups.iter().flat_map(|g| g.predicted.iter().flatten());
    let right = 110.0 * points().map(|p| p.0).fold(0.0, f64::max);
    // The ten below the lowest: differences of a few percent are what this is about.
    let low = (10.0 * points().map(|p| p.1).fold(1.0, f64::min)).floor().clamp(0.0, 9.0) * 10.0;
    let is_one = groups.windows(2).all(|w| w[0].model == w[1].model);
    let mut series = Vec::new();
    for (i, group) in groups.iter().enumerate() {
        let whose = if is_one { String::new() } else { format!(", {}", short(&group.model, 9)) };
        let named = |what: &str| format!("{what} {}{whose}", percent(group.active));
        for (which, points) in group.predicted.iter().enumerate().filter(|(_, points)| !points.is_empty()) {
            let points = points.iter().map(|p| (100.0 * p.0, 100.0 * p.1)).collect();
            series.push(
                Series::new(named(PREDICTED[which].1), points, Ink::Series(PREDICTED.len() * i + which)).marked(),
            );
        }
        if let Some(level) = mean(group.oracle.iter().copied()) {
            let level = vec![(0.0, 100.0 * level), (right, 100.0 * level)];
            let first = group.predicted.iter().position(|points| !points.is_empty()).unwrap_or(0);
            series.push(Series::new(named("oracle"), level, Ink::Series(PREDICTED.len() * i + first)).dashed());
        }
    }
    let reading = reading(&groups)?;
    let chart = Chart {
        title: "Energy that predictors find, against their bytes".to_owned(),
        x: Axis::new("bytes of the predictors (% of the layers' weights)").from_to(0.0, right),
        y: Axis::new("energy recall (%)").from_to(low, 100.0),
        body: Body::Lines(series),
    };
    Some(Figure::new(chart, reading))
}

/// Groups in which a predictor was measured.
fn groups(evals: &[EvalFile]) -> Vec<Group> {
    let mut groups: BTreeMap<_, Group> = BTreeMap::new();
    for file in evals {
        // Older records do not say what they were split from.
        let source = if file.source_digest.is_empty() { &file.model_digest } else { &file.source_digest };
        for result in file.results.iter().filter(|r| r.planes.is_none()) {
            let (Some(active), Some(energy)) = (result.active, result.energy_recall) else { continue };
            // Positive numbers are in the order of their bits.
            let key = (source, &file.text, file.ctx, file.windows, active.to_bits());
            let group = groups.entry(key).or_default();
            if group.model.is_empty() {
                (group.model, group.active) = (file.model.clone(), active);
            }
            let which = PREDICTED.iter().position(|(mask, _)| *mask == result.mask);
            if let Some((which, bytes)) = which.zip(bytes_of_predictors(file, result)) {
                group.predicted[which].push((bytes, energy));
            } else if result.mask == "oracle" {
                group.oracle.push(energy);
            }
        }
    }
    let mut groups: Vec<Group> =
        groups.into_values().filter(|g| g.predicted.iter().any(|points| !points.is_empty())).collect();
    for points in groups.iter_mut().flat_map(|g| &mut g.predicted) {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    groups
}

/// As the record says; older ones do not, but an oracle of as many neurons reads the same without asking anyone.
fn bytes_of_predictors(file: &EvalFile, predicted: &Evaluation) -> Option<f64> {
    let of_oracle = || {
        let oracle = file.results.iter().find(|r| r.mask == "oracle" && r.active == predicted.active)?;
        Some(predicted.bytes_share? - oracle.bytes_share?)
    };
    predicted.predictor_bytes_share.or_else(of_oracle)
}

/// Says it of the group with most predictors.
fn reading(groups: &[Group]) -> Option<String> {
    let measured = |group: &'_ &Group| group.predicted.iter().map(Vec::len).max();
    let group = groups.iter().rev().max_by_key(measured)?;
    let points = group.predicted.iter().find(|points| !points.is_empty())?;
    let (first, last) = (points.first()?, points.last()?);
    let said = |p: &Point| format!("of {} of the layers' bytes finds {} of the energy", percent(p.0), percent(p.1));
    let smaller = if points.len() > 1 { format!(", one {}", said(first)) } else { String::new() };
    let oracle = mean(group.oracle.iter().copied());
    let oracle = oracle.map_or(String::new(), |o| format!("; an oracle of as many neurons keeps {}", percent(o)));
    Some(format!(
        "At {} active a predictor {}{smaller} (means over layers){oracle}.",
        percent(group.active),
        said(last)
    ))
}
