//! Sections about what runs and benches cost.

use super::figures::{megabytes, percent, short};
use super::gpu_record::planted_by_name;
use super::{BenchFile, Figure, RunFile, Section, Table, Tiers, vram_share};
use crate::Result;
use crate::plots::{Axis, Bar, Body, Chart, Ink, Series};
use polars::prelude::Column;
use serde_json::Value;

/// A tier's name and its bytes.
type Tier = (&'static str, fn(&Tiers) -> u64);

/// The tiers, in the order of their speed, with a colour each.
const TIERS: [Tier; 4] = [("VRAM", |t| t.device), ("cache", |t| t.cache), ("RAM", |t| t.host), ("disk", |t| t.disk)];

/// Bytes by tier over time.
pub(crate) fn runs(runs: &[RunFile]) -> Result<Section> {
    let missing = "thermocline run -m SPLIT -p PROMPT -n 64 --json > run.json";
    let mut section = Section::new("runs", "Runs", missing);
    let drawn = runs.iter().filter(|r| r.timeline.len() > 1);
    section.figures =
        drawn.flat_map(|run| [Some(bytes_over_time(run)), vram_share::over_time(run)]).flatten().collect();
    if !runs.is_empty() {
        section.tables.push(runs_table(runs)?);
    }
    Ok(section)
}

fn bytes_over_time(run: &RunFile) -> Figure {
    let used = TIERS.iter().enumerate().filter(|(_, (_, of))| run.timeline.iter().any(|(_, t)| of(t) > 0));
    let series = used.map(|(i, (name, of))| {
        let points = run.timeline.iter().map(|(token, t)| (*token as f64, megabytes(of(t)))).collect();
        Series::new(*name, points, Ink::Series(i))
    });
    let body = Body::Lines(series.collect());
    let hits = run
        .cache_hit_rate
        .map_or(String::new(), |h| format!(", {} of the cold neurons came from the cache", percent(h)));
    let b = &run.bytes_per_token;
    // With a GPU the cache is in its memory, and nothing is read from the disk.
    let sources = if b.device > 0 {
        [(b.device.saturating_add(b.cache), "VRAM"), (b.host, "RAM")]
    } else {
        [(b.host.saturating_add(b.cache), "RAM"), (b.disk, "disk")]
    };
    let [first, second] = sources.map(|(bytes, tier)| format!("{:.1} MB from {tier}", megabytes(bytes)));
    let reading = format!(
        "{}: {:.1} tok/s with {first} and {second} per token{hits}; {} of the {} limit.",
        mode(run),
        run.decode_tok_s,
        percent(run.limit_share),
        run.limit
    );
    let chart = Chart {
        title: format!("Bytes read per token \u{2013} {}", short(&run.name, 30)),
        x: Axis::new("generated token"),
        y: Axis::new("read (MB per token)"),
        body,
    };
    Figure::new(with_zero(chart), reading)
}

/// Amounts start at zero.
fn with_zero(mut chart: Chart) -> Chart {
    if let Body::Lines(series) = &chart.body {
        let top = series.iter().flat_map(|s| &s.points).map(|p| p.1).fold(0.0, f64::max);
        if top > 0.0 && top.is_finite() {
            chart.y.range = Some((0.0, 1.08 * top));
        }
    }
    chart
}

/// `exact`, or `sparse 0.3`.
fn mode(run: &RunFile) -> String {
    let name = run.mode.get("mode").and_then(Value::as_str).unwrap_or("mode not told");
    match run.mode.get("active").and_then(Value::as_f64) {
        Some(active) => format!("{name} {active:.2}"),
        None => name.to_owned(),
    }
}

/// The RAM budget of a plan, in MB; `None` if it was not limited.
fn budget(plan: &Value) -> Option<f64> {
    let places = ["/request/ram_budget_bytes", "/request/base/ram_budget_bytes"];
    places.iter().find_map(|place| plan.pointer(place)?.as_u64()).map(megabytes)
}

/// The VRAM budget of a plan, in MB; `None` on the CPU.
fn vram_budget(plan: &Value) -> Option<f64> {
    plan.pointer("/request/vram_budget_bytes").and_then(Value::as_u64).map(megabytes)
}

/// A model's name, with a word about one whose activations are made up.
pub(crate) fn with_origin(model: &str, planted: bool) -> String {
    // Most of their names say it.
    if planted && !planted_by_name(model) { format!("{model} (planted)") } else { model.to_owned() }
}

/// The model of a run, as far as the record tells.
fn model(run: &RunFile) -> String {
    with_origin(run.model.as_deref().unwrap_or("\u{2013}"), run.is_planted())
}

fn runs_table(runs: &[RunFile]) -> Result<Table> {
    let number = |name: &str, of: &dyn Fn(&RunFile) -> Option<f64>| {
        Column::new(name.into(), runs.iter().map(of).collect::<Vec<Option<f64>>>())
    };
    let columns = vec![
        Column::new("run".into(), runs.iter().map(|r| r.name.clone()).collect::<Vec<_>>()),
        Column::new("model".into(), runs.iter().map(model).collect::<Vec<_>>()),
        Column::new("mode".into(), runs.iter().map(mode).collect::<Vec<_>>()),
        number("RAM budget, MB", &|r| budget(&r.plan)),
        number("VRAM budget, MB", &|r| vram_budget(&r.plan)),
        number("prompt tok/s", &|r| Some(r.prompt_tok_s)),
        number("decode tok/s", &|r| Some(r.decode_tok_s)),
        number("VRAM MB/token", &|r| vram_budget(&r.plan).map(|_| megabytes(r.bytes_per_token.device))),
        number("RAM MB/token", &|r| Some(megabytes(r.bytes_per_token.host))),
        number("of it over the link", &|r| vram_budget(&r.plan).and(r.link_bytes_per_token).map(megabytes)),
        number("cache MB/token", &|r| Some(megabytes(r.bytes_per_token.cache))),
        number("disk MB/token", &|r| Some(megabytes(r.bytes_per_token.disk))),
        number("cache hits", &|r| r.cache_hit_rate),
        number("neurons computed", &|r| Some(r.computed_share)),
        number("of the limit", &|r| Some(r.limit_share)),
        number("peak memory, MB", &|r| r.peak_rss_bytes.map(megabytes)),
    ];
    Table::new("runs; the prompt is always computed densely", columns)
}

/// Planned against measured speed.
pub(crate) fn benches(benches: &[BenchFile]) -> Result<Section> {
    let mut section = Section::new(
        "bench",
        "Planned and measured speed",
        "thermocline bench -m SPLIT --vram-budget 0 --json > bench.json",
    );
    section.figures = benches.iter().map(planned_and_measured).collect();
    if !benches.is_empty() {
        section.tables.push(bench_table(benches)?);
    }
    Ok(section)
}

fn planned_and_measured(bench: &BenchFile) -> Figure {
    let bar = |label: &str, value: f64, ink| Bar { label: label.to_owned(), value, text: format!("{value:.1}"), ink };
    let (measured, planned) = (bench.decode_tok_s.median, bench.predicted.tok_s);
    let bars = vec![
        bar("measured", measured, Ink::Series(0)),
        bar("planned", planned, Ink::Series(1)),
        bar("physical limit", bench.predicted.limit_tok_s, Ink::Grid),
    ];
    let gap = if planned > 0.0 { measured / planned } else { 0.0 };
    let reading = format!(
        "Decoding runs at {} of the planned speed and is bound by the {}.",
        percent(gap),
        bench.predicted.bottleneck
    );
    Figure::new(
        Chart {
            title: format!("Decode speed \u{2013} {}", short(&bench.name, 30)),
            x: Axis::new("tokens per second"),
            y: Axis::new(""),
            body: Body::Bars(bars),
        },
        reading,
    )
}

fn bench_table(benches: &[BenchFile]) -> Result<Table> {
    let text = |name: &str, of: &dyn Fn(&BenchFile) -> String| {
        Column::new(name.into(), benches.iter().map(of).collect::<Vec<String>>())
    };
    let number = |name: &str, of: &dyn Fn(&BenchFile) -> Option<f64>| {
        Column::new(name.into(), benches.iter().map(of).collect::<Vec<Option<f64>>>())
    };
    let columns = vec![
        text("bench", &|b| b.name.clone()),
        text("model", &|b| with_origin(&b.model, b.is_planted())),
        text("processor", &|b| format!("{}, {}", b.cpu, b.isa)),
        number("RAM budget, MB", &|b| budget(&b.plan)),
        number("prompt tok/s", &|b| Some(b.prompt_tok_s.median)),
        number("decode tok/s", &|b| Some(b.decode_tok_s.median)),
        number("spread", &|b| b.decode_tok_s.spread),
        number("planned", &|b| Some(b.predicted.tok_s)),
        number("limit", &|b| Some(b.predicted.limit_tok_s)),
        number("RAM MB/token", &|b| Some(megabytes(b.bytes_per_token.host + b.bytes_per_token.cache))),
        number("disk MB/token", &|b| Some(megabytes(b.bytes_per_token.disk))),
        number("peak memory, MB", &|b| Some(megabytes(b.peak_rss_bytes))),
        text("formula", &|b| b.predicted.formula.clone()),
    ];
    Table::new("benches; medians over repetitions", columns)
}
