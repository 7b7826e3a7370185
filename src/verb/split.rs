//! `split`: a checkpoint and its profile in, a split directory out.

use crate::cli::{OrderName, RoundingName, ScalesName, SketchBitsName, Split};
use crate::exit::Usage;
use crate::output::{self, Progress};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use thermocline_calibrate::Profile;
use thermocline_datasets::planted::{PlantedModel, Shape, Statistics};
use thermocline_datasets::{Checkpoint, open_checkpoint};
use thermocline_kernels::Encoding;
use thermocline_runtime::budget::format_bytes;
use thermocline_split::order::{OrderKind, TABLE_CHUNKS};
use thermocline_split::{
    Compression, LayerEncodings, Rounding, Scales, SketchForm, SplitOptions, SplitReport, planted_bytes, split_planted,
};

pub fn split(args: &Split) -> anyhow::Result<()> {
    super::run::limit_threads(args.threads)?;
    if let Some(shape) = &args.planted.shape {
        return planted(args, shape);
    }
    if let Some(flag) = args.planted.first_detail() {
        return Err(Usage(format!("{flag} is for --planted; add that, or leave it out")).into());
    }
    let (Some(model), Some(profile)) = (&args.model, &args.profile) else {
        return Err(Usage("split needs -m and --profile, or --planted".to_owned()).into());
    };
    let checkpoint = open_checkpoint(model)?;
    let profile = Profile::open(profile)?;
    let mut options = defaults(checkpoint.as_ref(), args.encoding.clone());
    options.resident_encoding = args.resident_encoding.unwrap_or(options.resident_encoding);
    options.attention_encoding = args.attention_encoding;
    options.order = match args.order {
        OrderName::Auto => None,
        OrderName::Frequency => Some(OrderKind::Frequency),
        OrderName::Coactivation => Some(OrderKind::Coactivation),
        OrderName::Random => Some(OrderKind::Random),
    };
    options.chunk_neurons = args.chunk_neurons;
    options.compression = match args.zstd_level {
        _ if args.archive => Compression::Archive(ARCHIVE_LEVEL),
        0 => Compression::None,
        level => Compression::Zstd(level),
    };
    options.predictor_rank = args.predictor_rank.unwrap_or(options.predictor_rank);
    options.outliers = args.outliers.unwrap_or(options.outliers);
    options.rounding = match args.rounding {
        RoundingName::Feedback => Rounding::Feedback,
        RoundingName::Nearest => Rounding::Nearest,
    };
    options.scales = match args.scales {
        ScalesName::Moments => Scales::Moments,
        ScalesName::LeastSquares => Scales::LeastSquares,
        ScalesName::Absmax => Scales::Absmax,
    };
    options.sketch = sketch_form(args);
    options.residuals = args.residuals;
    let report = make(checkpoint.as_ref(), &profile, &options, &args.output, args.json)?;
    if args.json {
        return output::json(&report);
    }
    print(&report);
    println!("next: thermocline run -m {} -p \"Hello\" -n 64", args.output.display());
    Ok(())
}

fn sketch_form(args: &Split) -> Option<SketchForm> {
    args.sketch.then_some(match args.sketch_bits {
        SketchBitsName::UpInThree => SketchForm::UpInThree,
        SketchBitsName::AllInTwo => SketchForm::AllInTwo,
    })
}

/// `--planted`: neither checkpoint nor profile.
fn planted(args: &Split, shape: &str) -> anyhow::Result<()> {
    let given = &args.planted;
    let case = given.case.as_deref().unwrap_or("a");
    let mut statistics = Statistics::case(case)?;
    let of_case = statistics;
    let set = |value: &mut f64, flag: Option<f64>| *value = flag.unwrap_or(*value);
    set(&mut statistics.active_share, given.planted_active);
    set(&mut statistics.hot_cover, given.planted_hot_cover);
    set(&mut statistics.cluster_correlation, given.planted_cluster_correlation);
    set(&mut statistics.reuse, given.planted_reuse);
    set(&mut statistics.shift, given.planted_shift);
    set(&mut statistics.predictor_noise, given.planted_predictor_noise);
    set(&mut statistics.foresight_noise, given.planted_foresight_noise);
    statistics.cluster_neurons = given.planted_clusters.unwrap_or(statistics.cluster_neurons);
    let case = if statistics == of_case { case } else { "custom" };
    let model = PlantedModel::new(Shape::named(shape)?, case, statistics, given.planted_seed.unwrap_or(0))?;
    let model = if given.planted_silu { model.with_silu() } else { model };
    let sketch = sketch_form(args);
    let bytes = planted_bytes(&model, sketch)?;
    if !args.json {
        let sketches = if args.sketch { format!(", sketches {}", format_bytes(bytes.sketches)) } else { String::new() };
        println!(
            "{}: neurons {}, attention and head {}, predictors {}{sketches}; {} of disk while it is written",
            model.name(),
            format_bytes(bytes.ffn),
            format_bytes(bytes.resident),
            format_bytes(bytes.predictors),
            format_bytes(bytes.needed)
        );
    }
    let progress = Mutex::new(Progress::new("split", args.json));
    let on_layer = |done: usize, total: usize| {
        let progress = progress.lock().unwrap_or_else(PoisonError::into_inner);
        progress.set(done as u64, total as u64, format!("part {done}/{total}"));
    };
    let report = split_planted(&model, sketch, &args.output, &on_layer);
    progress.into_inner().unwrap_or_else(PoisonError::into_inner).finish();
    let report = report?;
    if args.json {
        return output::json(&report);
    }
    print_size(&report.path, report.bytes, report.ffn_bytes, report.resumed_layers);
    let (m, p) = (&report.measured, model.statistics());
    let percent = |v: f64| format!("{:.1} %", 100.0 * v);
    println!("over {} tokens, all layers:      planted    measured", m.trace_tokens);
    for (what, planted, measured) in [
        ("active", Some(p.active_share), m.active_share),
        ("hottest 18 % cover", Some(p.hot_cover), m.hot_cover),
        ("active in the last token too", None, m.reuse[0]),
        ("in one of the last 4", None, m.reuse[1]),
        ("in one of the last 16", None, m.reuse[2]),
        ("predictor recall", None, m.predictor_recall),
        ("recall one layer early", None, m.foresight_recall.unwrap_or_default()),
    ] {
        println!("{what:<32}{:>8}{:>12}", planted.map_or(String::new(), percent), percent(measured));
    }
    let inside = m.coactivation_inside.map_or(String::new(), |v| format!("{v:.2} in clusters, "));
    println!("fire together, times chance: {inside}{:.2} outside", m.coactivation_outside);
    println!("next: thermocline run -m {} -p \"t0\" -n 64 --temp 0", args.output.display());
    Ok(())
}

/// zstd's level for archives: split planes are short of matches, and higher ones win less than a thousandth.
const ARCHIVE_LEVEL: i32 = 9;

/// Share of neurons that come first because of their energy, where those that do not fire are not zero.
const OUTLIERS: f64 = 0.02;

/// Options for a model, by encoding.
pub fn defaults(checkpoint: &dyn Checkpoint, encoding: LayerEncodings) -> SplitOptions {
    let resident_encoding = match encoding.common() {
        Encoding::Bf16 => Encoding::Bf16,
        Encoding::Bf16x => Encoding::Bf16x,
        Encoding::Q4Exact | Encoding::Q8Exact => Encoding::Q8Exact,
        Encoding::Q4 | Encoding::Q4Plus | Encoding::Q8 | Encoding::R4 => Encoding::Q8,
    };
    SplitOptions {
        encoding,
        resident_encoding,
        attention_encoding: None,
        order: None,
        chunk_neurons: None,
        compression: Compression::None,
        predictor_rank: (checkpoint.config().hidden_size / 9).next_multiple_of(32),
        outliers: if checkpoint.config().activation.is_sparse() { 0.0 } else { OUTLIERS },
        scales: Scales::Moments,
        rounding: Rounding::Feedback,
        sketch: None,
        residuals: false,
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

/// What was written, and what was there already.
fn print_size(path: &Path, bytes: u64, ffn_bytes: u64, resumed_layers: usize) {
    println!("{}: {}, of which neurons {}", path.display(), format_bytes(bytes), format_bytes(ffn_bytes));
    if resumed_layers > 0 {
        println!("{resumed_layers} layers were there from an interrupted run");
    }
}

fn print(report: &SplitReport) {
    print_size(&report.path, report.bytes, report.ffn_bytes, report.resumed_layers);
    if report.attention_lacks_moments {
        println!(
            "attention's codes are the nearest ones: the profile has no second moments of its inputs; calibrate again for better ones"
        );
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
