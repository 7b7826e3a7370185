//! How the neurons that a token computes are divided between the layers.

use super::figures::percent;
use super::{Divided, Figure, Neurons, Section};
use crate::plots::{Axis, Body, Chart, Ink, Series};

const MISSING: &str = "thermocline eval -m SPLIT --text FILE --fit-shares";

/// Each layer's share, of every split that says what shares cost.
pub(crate) fn division(neurons: &[Neurons]) -> Section {
    let mut section = Section::new("shares", "Division of neurons between layers", MISSING);
    section.figures = neurons.iter().filter_map(lines).collect();
    section
}

fn lines(n: &Neurons) -> Option<Figure> {
    let mut series = Vec::new();
    for (i, divided) in n.divided.iter().enumerate() {
        let points = divided.layers.iter().enumerate().map(|(l, share)| (l as f64, 100.0 * share));
        let level = 100.0 * divided.active;
        let last = divided.layers.len().saturating_sub(1) as f64;
        series.push(
            Series::new(format!("{} of all", percent(divided.active)), points.collect(), Ink::Series(i)).marked(),
        );
        let alike = Series::new("alike", vec![(0.0, level), (last, level)], Ink::Series(i)).dashed();
        series.push(if i + 1 == n.divided.len() { alike } else { alike.unnamed() });
    }
    // What is said is said of the middle one.
    let said = n.divided.get(n.divided.len() / 2)?;
    let Extremes { most, least } = extremes(said)?;
    let reading = format!(
        "Of {} of all neurons layer {} computes most, {} of its own, and layer {} least, {}; dashed: the same share in all \
         layers.",
        percent(said.active),
        most.0,
        percent(most.1),
        least.0,
        percent(least.1)
    );
    let chart = Chart {
        title: format!("How --active is divided \u{2013} {}", super::figures::short(&n.name, 30)),
        x: Axis::new("layer"),
        y: Axis::new("neurons computed (% of the layer)").from_to(0.0, 100.0),
        body: Body::Lines(series),
    };
    Some(Figure::new(chart, reading))
}

/// The layers with the largest and the smallest share, and these.
struct Extremes {
    most: (usize, f64),
    least: (usize, f64),
}

fn extremes(divided: &Divided) -> Option<Extremes> {
    let each = || divided.layers.iter().copied().enumerate();
    let most = each().rev().max_by(|a, b| a.1.total_cmp(&b.1))?;
    Some(Extremes { most, least: each().min_by(|a, b| a.1.total_cmp(&b.1))? })
}
