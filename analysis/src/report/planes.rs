//! What planes of the weights take, and what they buy.

use super::figures::short;
use super::{EvalFile, Figure, Section, Table};
use crate::Result;
use crate::eval::{Evaluation, bits_per_weight};
use crate::plots::{Axis, Body, Chart, Ink, N_SERIES, Series};
use crate::{PlaneStudy, PlanesStudy};
use polars::prelude::Column;
use thermocline_split::{Planes, Precision};

const MISSING: &str = "thermocline eval -m SPLIT --text FILE --planes base,plus,exact --json > planes.json";

/// One result with what it reads.
struct Point<'a> {
    file: &'a EvalFile,
    study: &'a PlanesStudy,
    planes: Planes,
    result: &'a Evaluation,
}

impl Point<'_> {
    fn bits(&self) -> f64 {
        bits_per_weight(self.planes, self.study)
    }

    /// Perplexity over that with all planes, less 1.
    fn cost(&self) -> f64 {
        self.result.perplexity_ratio.unwrap_or(1.0) - 1.0
    }
}

/// Accuracy over bits, and bits beside their entropy.
pub(crate) fn planes(evals: &[EvalFile]) -> Result<Section> {
    let mut section = Section::new("planes", "Planes of the weights", MISSING);
    let of_file = |file| points(file).unwrap_or_default();
    let points: Vec<Vec<Point<'_>>> = evals.iter().map(of_file).filter(|points| !points.is_empty()).collect();
    if points.is_empty() {
        return Ok(section);
    }
    section.figures.push(cost(&points));
    section.tables.push(results(&points)?);
    section.tables.push(stored(&points)?);
    Ok(section)
}

fn points(file: &EvalFile) -> Option<Vec<Point<'_>>> {
    let study = file.study.as_ref()?;
    let points = file.results.iter().filter_map(|result| {
        let planes = result.planes.as_ref()?.parse().ok()?;
        Some(Point { file, study, planes, result })
    });
    Some(points.collect())
}

fn cost(models: &[Vec<Point<'_>>]) -> Figure {
    let mut series = Vec::new();
    for (i, points) in models.iter().enumerate() {
        let (ink, label) = (Ink::Series(i % N_SERIES), points.first().map_or("", |p| p.file.model.as_str()));
        let line = |name: String, takes: &dyn Fn(Planes) -> bool| {
            let mine = points.iter().filter(|p| takes(p.planes) && p.cost() > 0.0);
            let mut line: Vec<(f64, f64)> = mine.map(|p| (p.bits(), 100.0 * p.cost())).collect();
            line.sort_by(|a, b| a.0.total_cmp(&b.0));
            Series::new(name, line, ink).marked()
        };
        series.push(line(short(label, 14), &Planes::is_whole));
        for precision in [Precision::Plus, Precision::Exact] {
            let ends = [Precision::Base, precision].map(Planes::from);
            let some = |planes: Planes| planes.precision() == precision && !planes.is_whole();
            if points.iter().any(|p| some(p.planes)) {
                let name = format!("{}, {precision} for some", short(label, 5));
                series.push(line(name, &|planes| ends.contains(&planes) || some(planes)).dashed());
            }
        }
    }
    let of = |precision: &str| {
        let point = models.iter().flatten().find(|p| p.planes.to_string() == precision)?;
        Some(format!("{} costs {:.2} % at {:.1} bits", precision, 100.0 * point.cost(), point.bits()))
    };
    let first = models.first().and_then(|points| points.first()).map_or("", |p| p.file.model.as_str());
    let costs: Vec<String> = ["base", "plus"].into_iter().filter_map(of).collect();
    let reading = format!("On {first}, {}; all planes are the checkpoint's bits.", costs.join(" and "));
    Figure::new(
        Chart {
            title: "What further planes buy".to_owned(),
            x: Axis::new("bits read for each feed-forward weight"),
            y: Axis::new("perplexity over all planes (%)").log(),
            body: Body::Lines(series),
        },
        reading,
    )
}

fn results(models: &[Vec<Point<'_>>]) -> Result<Table> {
    let rows: Vec<&Point<'_>> = models.iter().flatten().collect();
    let text = |name: &str, of: &dyn Fn(&Point<'_>) -> String| {
        Column::new(name.into(), rows.iter().map(|p| of(p)).collect::<Vec<String>>())
    };
    let number = |name: &str, of: &dyn Fn(&Point<'_>) -> Option<f64>| {
        Column::new(name.into(), rows.iter().map(|p| of(p)).collect::<Vec<Option<f64>>>())
    };
    let columns = vec![
        text("model", &|p| p.file.model.clone()),
        text("text", &|p| format!("{}, {} x {}", p.file.text, p.file.windows, p.file.ctx)),
        text("planes", &|p| p.planes.to_string()),
        number("bits", &|p| Some(p.bits())),
        number("perplexity", &|p| Some(p.result.perplexity)),
        number("of all planes", &|p| p.result.perplexity_ratio),
        text("95 %", &|p| {
            p.result.perplexity_ratio_ci95.map_or(String::new(), |r| format!("{:.4}\u{2013}{:.4}", r[0], r[1]))
        }),
        number("KL", &|p| p.result.kl),
        number("top-1", &|p| p.result.top1_agreement),
    ];
    Table::new("the same text at several precisions, against all planes", columns)
}

fn stored(models: &[Vec<Point<'_>>]) -> Result<Table> {
    let firsts = models.iter().filter_map(|points| points.first());
    let rows: Vec<(&str, &PlanesStudy, &PlaneStudy)> =
        firsts.flat_map(|p| p.study.planes.iter().map(|plane| (p.file.model.as_str(), p.study, plane))).collect();
    let number = |name: &str, of: &dyn Fn(&PlanesStudy, &PlaneStudy) -> Option<f64>| {
        Column::new(name.into(), rows.iter().map(|(_, s, p)| of(s, p)).collect::<Vec<Option<f64>>>())
    };
    let columns = vec![
        Column::new("model".into(), rows.iter().map(|(m, ..)| (*m).to_owned()).collect::<Vec<String>>()),
        Column::new("plane".into(), rows.iter().map(|(.., p)| p.plane.clone()).collect::<Vec<String>>()),
        number("bits a weight", &|_, p| Some(p.bits_per_weight)),
        number("entropy", &|_, p| Some(p.entropy_bits)),
        number("with zstd", &|_, p| Some(p.zstd_bits)),
        number("all planes, % of bf16", &|s, _| Some(100.0 * s.share_of_bf16)),
        number("entropy of bf16, %", &|s, _| Some(100.0 * s.bf16_entropy_bits / 16.0)),
        number("decoded, GB/s a thread", &|s, _| s.decode_gb_s),
        number("ms a token, one thread", &|s, _| s.decode_seconds_per_token.map(|t| 1e3 * t)),
    ];
    Table::new("what planes take, beside the entropy of their symbols", columns)
}
