//! `bench`: measured speed beside the planned one.

use crate::cli::Bench;
use crate::output::{self, Progress};
use serde::Serialize;
use thermocline_kernels::{AlignedBuf, Kernels, Pool};
use thermocline_runtime::budget::format_bytes;
use thermocline_runtime::hardware::kernel_speed;
use thermocline_runtime::{BenchReport, BenchSettings};
use thermocline_split::Split;

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
}

pub fn bench(args: &Bench) -> anyhow::Result<()> {
    let split = Split::open(&args.placement.model)?;
    let layout = *split.layers()[0].layout();
    let threads = args.placement.threads.checked()?;
    let kernel = || Ok(kernel_speed(&mut Pool::new(threads)?, &AlignedBuf::zeroed(KERNEL_PROBE_BYTES)?, &layout));
    let settings = BenchSettings { n_prompt: args.n_prompt, n_gen: args.n_gen, repetitions: args.repetitions };
    let model = split.manifest().source.model.clone();
    let mut engine = super::run::load(split, &args.placement, args.n_prompt + args.n_gen, 128, args.json)?;
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
        });
    }
    super::plan::print(&report.plan);
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
        "{:.1} tok/s; per token: RAM {}, cache {}, disk {}; {:.0} % of the limit{disk}; peak memory {}",
        d.median,
        format_bytes(b.host),
        format_bytes(b.cache),
        format_bytes(b.disk),
        100.0 * report.limit_share,
        format_bytes(report.peak_rss_bytes)
    );
    Ok(())
}
