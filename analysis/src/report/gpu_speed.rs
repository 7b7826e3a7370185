//! The section about benches on a GPU.

use super::figures::{gibibytes, gigabytes, percent, short};
use super::speed::with_origin;
use super::{CpuShare, Figure, GpuBenchFile, PlantedFile, Section, Setting, Sweep, Table, sweeps};
use crate::Result;
use crate::plots::{Axis, Body, Chart, Ink, Row, Rows, Series};
use polars::prelude::Column;

/// Rows of one chart; the table has the others.
const ROWS_MAX: usize = 40;

/// A tier's name, colour and bytes per token.
type Tier = (&'static str, Ink, fn(&GpuBenchFile) -> u64);

/// Where a token's bytes come from. Link and CPU share what lies in pinned memory.
const TIERS: [Tier; 4] = [
    ("VRAM", Ink::Series(0), |b| b.bytes_per_token.device),
    ("cache in VRAM", Ink::Series(3), |b| b.bytes_per_token.cache),
    ("RAM over the link", Ink::Series(1), |b| b.link_bytes_per_token),
    ("RAM by the CPU", Ink::Series(2), GpuBenchFile::cpu_bytes_per_token),
];

const MEASURED: Ink = Ink::Series(0);
const LIMIT: Ink = Ink::Series(1);

/// Speed, limits and bytes of every bench, speed over what they differ in, and the planted models among theirs.
pub(crate) fn benches(benches: &[GpuBenchFile], planted: &[PlantedFile]) -> Result<Section> {
    let missing = "thermocline bench -m SPLIT --mode sparse --vram-budget 16GiB --json > gpu.json";
    let mut section = Section::new("gpu", "Speed on a GPU", missing);
    if !benches.is_empty() {
        section.figures = vec![speed(benches), bytes(benches)];
        section.figures.extend(sweeps(benches).iter().map(over));
        section.tables.push(bench_table(benches)?);
    }
    if !planted.is_empty() {
        section.tables.push(planted_table(planted)?);
    }
    Ok(section)
}

/// `, all planted` and the like, for titles.
fn origin(benches: &[GpuBenchFile]) -> &'static str {
    match benches.iter().filter(|b| b.is_planted()).count() {
        0 => "",
        n if n == benches.len() => ", planted models",
        _ => ", some models planted",
    }
}

/// A row for each bench, up to what a chart holds.
fn rows(benches: &[GpuBenchFile], row: impl Fn(&GpuBenchFile) -> (Vec<f64>, String)) -> Vec<Row> {
    let shown = benches.iter().take(ROWS_MAX);
    shown.map(|b| (short(&b.name, 24), row(b))).map(|(label, (values, text))| Row { label, values, text }).collect()
}

/// Says that rows are missing, if they are.
fn left_out(benches: &[GpuBenchFile]) -> String {
    let n = benches.len().saturating_sub(ROWS_MAX);
    if n > 0 { format!(" {n} more benches are in the table.") } else { String::new() }
}

fn speed(benches: &[GpuBenchFile]) -> Figure {
    let rows = rows(benches, |b| {
        let (measured, limit) = (b.decode_tok_s.median, b.limit_tok_s());
        let text = match limit {
            Some(limit) => format!("{measured:.1} of {limit:.1}, {}", percent(b.limit_share)),
            None => format!("{measured:.1}"),
        };
        (vec![measured, limit.unwrap_or(0.0)], text)
    });
    let legend = vec![("measured", MEASURED), ("physical limit", LIMIT)];
    let chart = Chart {
        title: format!("Decode speed and its limit{}", origin(benches)),
        x: Axis::new("tokens per second"),
        y: Axis::new(""),
        body: Body::Rows(Rows { legend, rows, stacked: false }),
    };
    let reading = format!(
        "Medians of the repetitions. The limit is what the bytes of each run allow at the speeds of VRAM, link and \
         threads, each measured alone: VRAM first, then link and threads side by side.{}",
        left_out(benches)
    );
    Figure::new(chart, reading).named("speed")
}

fn bytes(benches: &[GpuBenchFile]) -> Figure {
    let rows = rows(benches, |b| {
        let values: Vec<f64> = TIERS.iter().map(|(.., of)| gigabytes(of(b))).collect();
        let pinned = gigabytes(b.bytes_per_token.host);
        let text = format!("{:.2} GB, RAM {pinned:.2}", values.iter().sum::<f64>());
        (values, text)
    });
    let chart = Chart {
        title: format!("Bytes read per token{}", origin(benches)),
        x: Axis::new("read (GB per token)"),
        y: Axis::new(""),
        body: Body::Rows(Rows { legend: TIERS.map(|(name, ink, _)| (name, ink)).to_vec(), rows, stacked: true }),
    };
    let reading = format!("{}{}", ram_part(benches).unwrap_or_default(), left_out(benches));
    Figure::new(chart, reading).named("bytes")
}

/// What RAM has of the bytes and of the limit's time, over all benches that tell.
fn ram_part(benches: &[GpuBenchFile]) -> Option<String> {
    let of_bytes = |b: &GpuBenchFile| {
        let [ram, vram] = [b.bytes_per_token.host, b.bytes_per_token.device.saturating_add(b.bytes_per_token.cache)];
        ram as f64 / (ram as f64 + vram as f64)
    };
    let of_time = |b: &GpuBenchFile| {
        let vram = b.bytes_per_token.device.saturating_add(b.bytes_per_token.cache) as f64;
        Some(1.0 - vram / b.hardware.device? * b.limit_tok_s()?)
    };
    let range = |shares: &dyn Fn(&GpuBenchFile) -> Option<f64>| {
        let known = || benches.iter().filter_map(shares).filter(|s| (0.0..=1.0).contains(s));
        Some((percent(known().reduce(f64::min)?), percent(known().reduce(f64::max)?)))
    };
    let ((bytes_low, bytes_high), (time_low, time_high)) = (range(&|b| Some(of_bytes(b)))?, range(&of_time)?);
    Some(format!(
        "RAM has {bytes_low} to {bytes_high} of the bytes, and {time_low} to {time_high} of the time that a token would \
         take at the limit."
    ))
}

/// Speed over the setting in which the benches of `sweep` differ.
fn over(sweep: &Sweep<'_>) -> Figure {
    let of = |y: &dyn Fn(&GpuBenchFile) -> Option<f64>| -> Vec<(f64, f64)> {
        sweep.points.iter().filter_map(|(x, b)| Some((*x, y(b)?))).collect()
    };
    let measured = of(&|b| Some(b.decode_tok_s.median));
    let limit = of(&GpuBenchFile::limit_tok_s);
    let top = measured.iter().chain(&limit).map(|p| p.1).fold(0.0, f64::max);
    let first = sweep.points[0].1;
    let (name, what) = match sweep.over {
        Setting::Active => ("over-active", "active share"),
        Setting::Vram => ("over-vram", "VRAM budget"),
        Setting::Prompt => ("over-context", "context"),
        Setting::Threads => ("over-threads", "threads"),
    };
    let mut y = Axis::new("tokens per second");
    if top > 0.0 {
        y = y.from_to(0.0, 1.08 * top);
    }
    let chart = Chart {
        title: format!("Decode speed by {what} \u{2013} {}", short(&with_origin(&first.model, first.is_planted()), 40)),
        x: Axis::new(sweep.over.label()),
        y,
        body: Body::Lines(vec![
            Series::new("measured", measured, MEASURED).marked(),
            Series::new("physical limit", limit, LIMIT).marked().dashed(),
        ]),
    };
    Figure::new(chart, sweep_reading(sweep, first)).named(name)
}

/// What is the same in all points, but for what `sweep` is over, and which benches they are.
fn sweep_reading(sweep: &Sweep<'_>, first: &GpuBenchFile) -> String {
    let all = [
        (Setting::Active, first.active().map_or("exact mode".to_owned(), |a| format!("{} active", percent(a)))),
        (Setting::Vram, format!("{:.1} GiB of VRAM", gibibytes(first.plan.request.vram_budget_bytes))),
        (Setting::Prompt, format!("{} tokens of prompt", first.settings.n_prompt)),
        (Setting::Threads, format!("{} threads", first.n_threads)),
    ];
    let same: Vec<String> = all.into_iter().filter(|(s, _)| *s != sweep.over).map(|(_, text)| text).collect();
    let names: Vec<&str> = sweep.points.iter().map(|(_, b)| b.name.as_str()).collect();
    let lengths = || sweep.points.iter().map(|(_, b)| b.settings.n_gen);
    let (shortest, longest) = (lengths().min().unwrap_or(0), lengths().max().unwrap_or(0));
    let length = if shortest == longest { shortest.to_string() } else { format!("{shortest} to {longest}") };
    let cpu = match first.cpu_share() {
        CpuShare::Auto => "auto".to_owned(),
        _ => cpu_share(first),
    };
    format!(
        "{}, CPU share {cpu}; {length} tokens generated. {}The limit is that of each run: {}.",
        same.join(", "),
        alone(sweep),
        names.join(", ")
    )
}

/// The speeds that the limits of `sweep` are made of: where they differ, so do the limits.
fn alone(sweep: &Sweep<'_>) -> String {
    let range = |tier: &str, of: fn(&GpuBenchFile) -> Option<f64>| {
        let speeds = || sweep.points.iter().filter_map(|(_, b)| of(b).filter(|s| *s > 0.0));
        let (low, high) = (speeds().reduce(f64::min)?, speeds().reduce(f64::max)?);
        let [low, high] = [low, high].map(|s| format!("{:.0}", s / 1e9));
        Some(if low == high { format!("{tier} {low} GB/s") } else { format!("{tier} {low} to {high} GB/s") })
    };
    let ranges = [
        range("VRAM", |b| b.hardware.device),
        range("link", |b| b.hardware.link),
        range("threads", |b| b.hardware.host),
    ];
    let known: Vec<String> = ranges.into_iter().flatten().collect();
    if known.is_empty() { String::new() } else { format!("Measured alone: {}. ", known.join(", ")) }
}

/// `off`, or the share, and whether it was chosen by the plan.
fn cpu_share(bench: &GpuBenchFile) -> String {
    match bench.cpu_share() {
        CpuShare::Off => "off".to_owned(),
        CpuShare::Auto => format!("auto, {}", percent(bench.host_share)),
        CpuShare::Given(share) => percent(share),
    }
}

fn bench_table(benches: &[GpuBenchFile]) -> Result<Table> {
    let text = |name: &str, of: &dyn Fn(&GpuBenchFile) -> Option<String>| {
        Column::new(name.into(), benches.iter().map(of).collect::<Vec<Option<String>>>())
    };
    let number = |name: &str, of: &dyn Fn(&GpuBenchFile) -> Option<f64>| {
        Column::new(name.into(), benches.iter().map(of).collect::<Vec<Option<f64>>>())
    };
    let whole = |name: &str, of: &dyn Fn(&GpuBenchFile) -> usize| {
        Column::new(name.into(), benches.iter().map(|b| of(b) as u64).collect::<Vec<u64>>())
    };
    let tier = |name: &str, i: usize| number(name, &|b| Some(gigabytes((TIERS[i].2)(b))));
    let columns = vec![
        text("bench", &|b| Some(b.name.clone())),
        text("model", &|b| Some(with_origin(&b.model, b.is_planted()))),
        text("device", &|b| Some(b.device.clone())),
        text("active", &|b| Some(b.active().map_or("all (exact)".to_owned(), percent))),
        number("VRAM budget, GiB", &|b| Some(gibibytes(b.plan.request.vram_budget_bytes))),
        number("VRAM counted by the driver, GiB", &|b| b.device_used_bytes.map(gibibytes)),
        whole("context", &|b| b.plan.request.base.context),
        whole("prompt", &|b| b.settings.n_prompt),
        whole("threads", &|b| b.n_threads),
        text("CPU share", &|b| Some(cpu_share(b))),
        number("tok/s", &|b| Some(b.decode_tok_s.median)),
        text("min\u{2013}max", &|b| b.range().map(|(min, max)| format!("{min:.2}\u{2013}{max:.2}"))),
        number("planned tok/s", &|b| Some(b.predicted.tok_s)),
        number("limit tok/s", &GpuBenchFile::limit_tok_s),
        number("of the limit", &|b| Some(b.limit_share)),
        text("limited by", &|b| Some(b.limit.clone())),
        number("link GB/s", &|b| b.link_bytes_per_second.map(|s| s / 1e9)),
        number("CPU GB/s", &|b| b.host_bytes_per_second.map(|s| s / 1e9)),
        number("link alone, GB/s", &|b| b.hardware.link.map(|s| s / 1e9)),
        number("CPU alone, GB/s", &|b| b.hardware.host.filter(|s| *s > 0.0).map(|s| s / 1e9)),
        tier("VRAM GB/token", 0),
        tier("cache GB/token", 1),
        tier("link GB/token", 2),
        tier("CPU GB/token", 3),
        // Without a cache the rate is not zero but none.
        number("cache hits", &|b| b.cache_hit_rate.filter(|_| b.plan.cache_bytes != Some(0))),
        number("prompt tok/s", &|b| Some(b.prompt_tok_s.median)),
    ];
    Table::new("benches on a GPU; medians over repetitions, speeds of link and CPU while decoding", columns)
}

fn planted_table(planted: &[PlantedFile]) -> Result<Table> {
    let number = |name: &str, of: &dyn Fn(&PlantedFile) -> f64| {
        Column::new(name.into(), planted.iter().map(of).collect::<Vec<f64>>())
    };
    let columns = vec![
        Column::new("model".into(), planted.iter().map(|p| p.model.clone()).collect::<Vec<_>>()),
        number("GB", &|p| gigabytes(p.bytes)),
        number("active share", &|p| p.measured.active_share),
        number("cover of the hottest 18 %", &|p| p.measured.hot_cover),
        number("active in the last token too", &|p| p.measured.reuse[0]),
        number("in one of the last 4", &|p| p.measured.reuse[1]),
        number("in one of the last 16", &|p| p.measured.reuse[2]),
        number("predictor recall", &|p| p.measured.predictor_recall),
    ];
    Table::new("planted models: random weights, activations made to measure; what their traces give", columns)
}
