//! `split`: a checkpoint and its profile in, a split directory out.

use crate::cli::{OrderName, ScalesName, Split};
use crate::output::{self, Progress};
use std::path::Path;
use thermocline_calibrate::Profile;
use thermocline_datasets::{Checkpoint, open_checkpoint};
use thermocline_kernels::Encoding;
use thermocline_runtime::budget::format_bytes;
use thermocline_split::order::{OrderKind, TABLE_CHUNKS};
use thermocline_split::{Compression, Scales, SplitOptions, SplitReport};

pub fn split(args: &Split) -> anyhow::Result<()> {
    super::run::limit_threads(args.threads)?;
    let checkpoint = open_checkpoint(&args.model)?;
    let profile = Profile::open(&args.profile)?;
    let mut options = defaults(checkpoint.as_ref(), args.encoding);
    options.resident_encoding = args.resident_encoding.unwrap_or(options.resident_encoding);
    options.order = match args.order {
        OrderName::Auto => None,
        OrderName::Frequency => Some(OrderKind::Frequency),
        OrderName::Coactivation => Some(OrderKind::Coactivation),
        OrderName::Random => Some(OrderKind::Random),
    };
    options.chunk_neurons = args.chunk_neurons;
    options.compression = if args.zstd_level == 0 { Compression::None } else { Compression::Zstd(args.zstd_level) };
    options.predictor_rank = args.predictor_rank.unwrap_or(options.predictor_rank);
    options.scales = match args.scales {
        ScalesName::Moments => Scales::Moments,
        ScalesName::LeastSquares => Scales::LeastSquares,
        ScalesName::Absmax => Scales::Absmax,
    };
    let report = make(checkpoint.as_ref(), &profile, &options, &args.output, args.json)?;
    if args.json {
        return output::json(&report);
    }
    print(&report);
    println!("next: thermocline run -m {} -p \"Hello\" -n 64", args.output.display());
    Ok(())
}

/// Options for a model, by encoding.
pub fn defaults(checkpoint: &dyn Checkpoint, encoding: Encoding) -> SplitOptions {
    SplitOptions {
        encoding,
        resident_encoding: if encoding == Encoding::Bf16 { Encoding::Bf16 } else { Encoding::Q8 },
        order: None,
        chunk_neurons: None,
        compression: Compression::None,
        predictor_rank: (checkpoint.config().hidden_size / 9).next_multiple_of(32),
        scales: Scales::Moments,
    }
}

/// Splits with a progress bar.
pub fn make(
    checkpoint: &dyn Checkpoint,
    profile: &Profile,
    options: &SplitOptions,
    out: &Path,
    quiet: bool,
) -> anyhow::Result<SplitReport> {
    let progress = Progress::new("split", quiet);
    let on_layer = |done: usize, total: usize| progress.set(done as u64, total as u64, format!("layer {done}/{total}"));
    let report = thermocline_split::split(checkpoint, profile, options, out, &on_layer);
    progress.finish();
    Ok(report?)
}

fn print(report: &SplitReport) {
    println!(
        "{}: {}, of which neurons {}",
        report.path.display(),
        format_bytes(report.bytes),
        format_bytes(report.ffn_bytes)
    );
    if report.resumed_layers > 0 {
        println!("{} layers were there from an interrupted run", report.resumed_layers);
    }
    println!("order {}, {} neurons a chunk; neurons read per neuron used:", report.order.name(), report.chunk_neurons);
    print!("{:>14}", "chunk");
    TABLE_CHUNKS.iter().for_each(|c| print!("{c:>8}"));
    println!();
    for row in &report.over_fetch {
        print!("{:>14}", row.order.name());
        row.read_per_used.iter().for_each(|r| print!("{r:>8.2}"));
        println!();
    }
}
