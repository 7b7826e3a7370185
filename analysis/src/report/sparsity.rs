//! Sections about how neurons fire.

use super::figures::{is_named, mean, ordered, percent};
use super::{Figure, LayerFigures, Neurons, Section, Table};
use crate::Result;
use crate::plots::{Axis, Body, Chart, HeatMap, Ink, Series};
use polars::prelude::Column;
use thermocline_calibrate::OVERLAP_LAGS;

const MISSING: &str = "thermocline report PROFILE ...";
/// Points of a curve over neurons: more than a column of pixels each shows nothing.
const POINTS: usize = 200;

/// Activation rates and what a hot set covers.
pub(crate) fn rates(neurons: &[Neurons]) -> Result<Section> {
    let mut section = Section::new("rates", "Activation rates", MISSING);
    for n in neurons {
        section.figures.push(rate_curves(n));
        section.figures.push(coverage(n));
        section.tables.push(layer_table(n)?);
    }
    Ok(section)
}

fn titled(n: &Neurons, what: &str) -> String {
    format!("{what} \u{2013} {}", super::figures::short(&n.name, 30))
}

/// One line a layer, three of them named.
fn per_layer(n: &Neurons, points: impl Fn(&LayerFigures) -> Vec<(f64, f64)>) -> Vec<Series> {
    let count = n.layers.len();
    let series = n.layers.iter().enumerate().map(|(l, layer)| {
        let series = Series::new(format!("layer {l}"), points(layer), ordered(l, count));
        if is_named(l, count) { series } else { series.unnamed() }
    });
    series.collect()
}

fn rate_curves(n: &Neurons) -> Figure {
    let points = |layer: &LayerFigures| {
        let len = layer.rates.len();
        let at = |i: usize| (i * len.saturating_sub(1)) / POINTS;
        (0..=POINTS)
            .map(|i| (100.0 * i as f64 / POINTS as f64, 100.0 * layer.rates.get(at(i)).unwrap_or(&0.0)))
            .collect()
    };
    let hottest = mean(n.layers.iter().map(|l| l.rates.first().copied().unwrap_or(0.0))).unwrap_or(0.0);
    let median = |l: &LayerFigures| l.rates.get(l.rates.len() / 2).copied().unwrap_or(0.0);
    let median = mean(n.layers.iter().map(median)).unwrap_or(0.0);
    let reading = format!(
        "A neuron is active when it is {}: the hottest of a layer is so at {} of the tokens, the median one at {} \
         (means over layers).",
        n.active_means,
        percent(hottest),
        percent(median)
    );
    Figure::new(
        Chart {
            title: titled(n, "Activation rate of every neuron"),
            x: Axis::new("neurons, hottest first (% of the layer)").from_to(0.0, 100.0),
            y: Axis::new("active at (% of tokens)").from_to(0.0, 100.0),
            body: Body::Lines(per_layer(n, points)),
        },
        reading,
    )
}

fn coverage(n: &Neurons) -> Figure {
    let points = |layer: &LayerFigures| {
        let mut sum = 0.0;
        let total: f64 = layer.rates.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        let len = layer.rates.len().max(1);
        let mut out = vec![(0.0, 0.0)];
        for (i, rate) in layer.rates.iter().enumerate() {
            sum += rate;
            if (i + 1) % (len / POINTS).max(1) == 0 || i + 1 == len {
                out.push((100.0 * (i + 1) as f64 / len as f64, 100.0 * sum / total));
            }
        }
        out
    };
    let mut series = per_layer(n, points);
    series.push(Series::new("all alike", vec![(0.0, 0.0), (100.0, 100.0)], Ink::Text).dashed());
    let at = |share: f64| mean(n.layers.iter().map(|l| l.coverage(share))).unwrap_or(0.0);
    let reading = format!(
        "Memory for the hottest 10, 30 and 50 % of the neurons serves {}, {} and {} of the activations (means over \
         layers); the rest has to come from elsewhere.",
        percent(at(0.1)),
        percent(at(0.3)),
        percent(at(0.5))
    );
    Figure::new(
        Chart {
            title: titled(n, "What a static hot set covers"),
            x: Axis::new("neurons in memory (% of the layer)").from_to(0.0, 100.0),
            y: Axis::new("activations served (%)").from_to(0.0, 100.0),
            body: Body::Lines(series),
        },
        reading,
    )
}

fn layer_table(n: &Neurons) -> Result<Table> {
    let column = |name: &str, of: &dyn Fn(&LayerFigures) -> f64| {
        Column::new(name.into(), n.layers.iter().map(of).collect::<Vec<f64>>())
    };
    let mut columns = vec![
        Column::new("layer".into(), (0..n.layers.len() as u32).collect::<Vec<_>>()),
        column("mean rate", &LayerFigures::mean_rate),
        column("hottest 10 % cover", &|l| l.coverage(0.1)),
        column("30 %", &|l| l.coverage(0.3)),
        column("50 %", &|l| l.coverage(0.5)),
    ];
    for (i, lag) in OVERLAP_LAGS.iter().enumerate() {
        let values: Vec<Option<f64>> = n.layers.iter().map(|l| l.overlap[i]).collect();
        columns.push(Column::new(format!("overlap, last {lag}").into(), values));
        columns.push(column(&format!("by chance, last {lag}"), &|l| l.overlap_by_chance(*lag)));
    }
    Table::new(format!("layers of {}", n.name), columns)
}

/// Which hot neurons fire together.
pub(crate) fn coactivation(neurons: &[Neurons]) -> Section {
    let mut section = Section::new("coactivation", "Co-activation", MISSING);
    section.figures = neurons.iter().filter(|n| n.n_lift() > 1).map(lift_map).collect();
    section
}

fn lift_map(n: &Neurons) -> Figure {
    let mut sizes: Vec<f64> = n.lift.iter().flatten().map(|v| v.abs()).collect();
    sizes.sort_by(f64::total_cmp);
    let limit = sizes.get(sizes.len() * 99 / 100).copied().unwrap_or(1.0).max(0.1);
    let median = sizes.get(sizes.len() / 2).copied().unwrap_or(0.0);
    let count = n.n_lift();
    let reading = format!(
        "Half of the pairs among the {count} hottest neurons of layer {} (active: {}) fire together within a factor \
         {:.2} of what their rates alone would give; the colours end at a factor {:.1}.",
        n.heat_layer,
        n.lift_means,
        median.exp2(),
        limit.exp2()
    );
    Figure::new(
        Chart {
            title: titled(n, &format!("Co-activation of the hottest neurons, layer {}", n.heat_layer)),
            x: Axis::new("neuron, by activation rate"),
            y: Axis::new("neuron, by activation rate"),
            body: Body::Heat(HeatMap {
                n: count,
                values: n.lift.clone(),
                limit,
                legend: "log2 of the lift over independence".to_owned(),
            }),
        },
        reading,
    )
}

/// How much of a token's set was active shortly before.
pub(crate) fn overlap(neurons: &[Neurons]) -> Section {
    let mut section = Section::new("overlap", "Temporal overlap", MISSING);
    section.figures =
        neurons.iter().filter(|n| n.layers.iter().any(|l| l.overlap[0].is_some())).map(overlap_lines).collect();
    section
}

fn overlap_lines(n: &Neurons) -> Figure {
    let mut series = Vec::new();
    for (i, lag) in OVERLAP_LAGS.iter().enumerate() {
        let tokens = if *lag == 1 { "last token".to_owned() } else { format!("last {lag}") };
        let measured = n.layers.iter().enumerate().filter_map(|(l, f)| Some((l as f64, 100.0 * f.overlap[i]?)));
        let chance = n.layers.iter().enumerate().map(|(l, f)| (l as f64, 100.0 * f.overlap_by_chance(*lag)));
        series.push(Series::new(tokens, measured.collect(), Ink::Series(i)).marked());
        series.push(Series::new("by rates alone", chance.collect(), Ink::Series(i)).dashed());
    }
    let measured = mean(n.layers.iter().filter_map(|l| l.overlap[0])).unwrap_or(0.0);
    let chance = mean(n.layers.iter().map(|l| l.overlap_by_chance(1))).unwrap_or(0.0);
    let reading = format!(
        "{} of the neurons that a token needs were active at the token before (mean over layers), {} by their rates \
         alone: what lies between the two is what a cache gains over a static hot set.",
        percent(measured),
        percent(chance)
    );
    Figure::new(
        Chart {
            title: titled(n, "Active now and shortly before"),
            x: Axis::new("layer"),
            y: Axis::new("of the active neurons (%)").from_to(0.0, 100.0),
            body: Body::Lines(series),
        },
        reading,
    )
}
