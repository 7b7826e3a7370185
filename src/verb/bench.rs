//! `bench`: measured speed beside the planned one.

use super::load::{Loaded, load};
use super::run::tiers;
use crate::cli::Bench;
use crate::output::{self, Progress};
use serde::Serialize;
use thermocline_kernels::{Kernels, Pool};
use thermocline_runtime::budget::format_bytes;
use thermocline_runtime::hardware::{kernel_speed, probe_bundles, probe_memory};
use thermocline_runtime::{BenchReport, BenchSettings};
use thermocline_split::Promise;

/// Bytes of bundles on which the kernel alone is timed: beyond the last-level cache.
const KERNEL_PROBE_BYTES: usize = 128 << 20;

/// What `bench --json` prints.
#[derive(Serialize)]
struct Output {
    version: &'static str,
    command: Vec<String>,
    cpu: String,
    isa: &'static str,
    model: String,
    #[serde(flatten)]
    report: BenchReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    promise: Option<Promise>,
}

pub fn bench(args: &Bench) -> anyhow::Result<()> {
    let split = super::load::placed_split(&args.placement)?;
    let wanted = args.n_prompt + args.n_gen;
    let (placement, promise) = super::load::promised(&split, &args.placement, wanted, 128)?;
    let layout = *split.layers()[0].bundles().largest().bundles();
    let threads = args.placement.threads.checked()?;
    let bundles = probe_bundles(&split)?;
    let kernel = || {
        let memory = probe_memory(&bundles, KERNEL_PROBE_BYTES)?;
        Ok(kernel_speed(&mut Pool::new(threads)?, &memory, &layout))
    };
    let settings = BenchSettings {
        n_prompt: args.n_prompt,
        n_gen: args.n_gen,
        repetitions: args.repetitions,
        greedy: args.greedy,
    };
    let model = split.manifest().source.model.clone();
    let has_sketches = split.sketches().is_some();
    #[cfg_attr(not(feature = "cuda"), allow(clippy::infallible_destructuring_match))]
    let mut engine = match load(split, &placement, wanted, 128, args.json)? {
        Loaded::Cpu(engine) => engine,
        #[cfg(feature = "cuda")]
        Loaded::Gpu(mut engine) => return on_gpu(args, settings, &model, &mut engine, promise),
    };
    let progress = Progress::new("bench", args.json);
    let on_run = |done: usize, total: usize| progress.set(done as u64, total as u64, format!("run {done}/{total}"));
    let report = thermocline_runtime::bench(&mut engine, settings, kernel, &on_run);
    progress.finish();
    let report = report?;
    if args.json {
        return output::json(&Output {
            version: env!("CARGO_PKG_VERSION"),
            command: std::env::args().skip(1).collect(),
            cpu: super::doctor::cpu_name(),
            isa: Kernels::detect().isa().name(),
            model,
            report,
            promise,
        });
    }
    super::plan::print_promise(promise.as_ref());
    super::plan::print(&report.plan, has_sketches);
    let (p, d) = (&report.prompt_tok_s, &report.decode_tok_s);
    println!("prompt   {:>8.1} tok/s (+- {:.1} %), {} tokens", p.median, 100.0 * p.spread, settings.n_prompt);
    println!("decode   {:>8.1} tok/s (+- {:.1} %), {} tokens", d.median, 100.0 * d.spread, settings.n_gen);
    if let Some(dense) = &report.dense_decode_tok_s {
        let ratio = d.median / dense.median;
        println!("dense    {:>8.1} tok/s with every neuron computed: leaving out zeros is {ratio:.2} x", dense.median);
    }
    println!(
        "planned  {:>8.1} tok/s, bound by the {}; limit {:.1} tok/s",
        report.predicted.tok_s, report.predicted.bottleneck, report.predicted.limit_tok_s
    );
    println!("         {}", report.predicted.formula);
    let b = &report.bytes_per_token;
    let disk = report.disk_limit_share.map_or(String::new(), |s| format!(", {:.0} % of the disk limit", 100.0 * s));
    println!(
        "{:.1} tok/s; per token: {}; {:.0} % of the limit{disk}; peak memory {}",
        d.median,
        tiers(b),
        100.0 * report.limit_share,
        format_bytes(report.peak_rss_bytes)
    );
    Ok(())
}

/// What `bench --json` prints where there is a GPU.
#[cfg(feature = "cuda")]
#[derive(Serialize)]
struct GpuOutput {
    version: &'static str,
    command: Vec<String>,
    cpu: String,
    model: String,
    #[serde(flatten)]
    report: thermocline_runtime::GpuBenchReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    promise: Option<Promise>,
}

#[cfg(feature = "cuda")]
fn on_gpu(
    args: &Bench,
    settings: BenchSettings,
    model: &str,
    engine: &mut thermocline_runtime::GpuEngine,
    promise: Option<Promise>,
) -> anyhow::Result<()> {
    let progress = Progress::new("bench", args.json);
    let on_run = |done: usize, total: usize| progress.set(done as u64, total as u64, format!("run {done}/{total}"));
    let report = engine.bench(settings, &on_run);
    progress.finish();
    let report = report?;
    if args.json {
        return output::json(&GpuOutput {
            version: env!("CARGO_PKG_VERSION"),
            command: std::env::args().skip(1).collect(),
            cpu: super::doctor::cpu_name(),
            model: model.to_owned(),
            report,
            promise,
        });
    }
    super::plan::print_promise(promise.as_ref());
    super::plan::print_gpu(&report.plan, engine.split().sketches().is_some());
    let (p, d, h) = (&report.prompt_tok_s, &report.decode_tok_s, &report.hardware);
    let gb = |speed: f64| speed / 1e9;
    // A model that is in VRAM as a whole uses nothing else.
    let others = [(h.link, "link"), (h.copies, "link in copies"), (h.host, "CPU"), (h.sketches, "CPU in sketches")]
        .map(
            |(speed, tier)| {
                if speed.is_finite() && speed > 0.0 { format!(", {:.1} GB/s {tier}", gb(speed)) } else { String::new() }
            },
        );
    println!("speeds   {:>8.0} GB/s VRAM{}, each alone", gb(h.device), others.concat());
    println!("prompt   {:>8.1} tok/s (+- {:.1} %), {} tokens", p.median, 100.0 * p.spread, settings.n_prompt);
    println!("decode   {:>8.1} tok/s (+- {:.1} %), {} tokens", d.median, 100.0 * d.spread, settings.n_gen);
    println!("planned  {:>8.1} tok/s, bound by {}", report.predicted.tok_s, report.predicted.bottleneck);
    println!("         {}", report.predicted.formula);
    if report.bytes_per_token.host > 0 {
        println!(
            "decoding {:>8.1} GB/s over the link, {:.1} GB/s by the CPU's threads, which compute {:.0} % of the misses{}{}",
            gb(report.link_bytes_per_second),
            gb(report.host_bytes_per_second),
            100.0 * report.host_share,
            match report.host_layers {
                0 => String::new(),
                n => format!(" and all of {n} layers"),
            },
            report.foreseen_used.map_or(String::new(), |used| format!(
                "; {} neurons a layer fetched beforehand, {:.0} % of them needed",
                report.lookahead,
                100.0 * used
            ))
        );
    }
    println!(
        "VRAM     planned {}, the driver counts {}",
        format_bytes(report.plan.total_bytes),
        format_bytes(report.device_used_bytes)
    );
    let hits = report.cache_hit_rate.map_or(String::new(), |h| format!(", cache hits {:.0} %", 100.0 * h));
    println!(
        "{:.1} tok/s; per token: {}{hits}; {:.0} % of the {} limit; peak memory {}",
        d.median,
        tiers(&report.bytes_per_token),
        100.0 * report.limit_share,
        report.limit,
        format_bytes(report.peak_rss_bytes)
    );
    Ok(())
}
