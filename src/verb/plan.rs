//! `plan`: what fits where, and how fast that should be, before anything is loaded.

use crate::cli::PlanArgs;
use crate::output;
use serde::Serialize;
use thermocline_runtime::budget::format_bytes;
#[cfg(feature = "cuda")]
use thermocline_runtime::{GpuPlan, GpuRequest, GpuSpeeds, Mode, PlanRequest};
use thermocline_runtime::{Hardware, Plan, PlannedSection, Prediction};
use thermocline_split::Promise;
#[cfg(feature = "cuda")]
use thermocline_split::Split;

/// Tokens of context where the flags name none, and of a prompt that are computed at once.
const CONTEXT: usize = 512;
const BATCH: usize = 128;

/// What `plan --json` prints.
#[derive(Serialize)]
struct Output {
    plan: Plan,
    hardware: Hardware,
    predicted: Prediction,
    #[serde(skip_serializing_if = "Option::is_none")]
    promise: Option<Promise>,
}

pub fn plan(args: &PlanArgs) -> anyhow::Result<()> {
    let split = super::load::placed_split(&args.placement)?;
    let (placement, promise) = super::load::promised(&split, &args.placement, CONTEXT, BATCH)?;
    let request = super::load::request(&placement, CONTEXT, BATCH);
    #[cfg(feature = "cuda")]
    if let Some(device) = super::load::open_device(&placement, args.json)? {
        let plan = super::load::gpu_plan(&split, &placement, request, &device)?;
        let n_threads = super::load::host_threads(&placement);
        let layout = *split.layers()[0].bundles().largest().bundles();
        let streamed = (plan.streamed_sketches > 0).then(|| split.sketch_form());
        let hardware = thermocline_runtime::measure_tiers(&device, layout, n_threads, streamed)?;
        // What `--cpu-share 0` leaves to the link.
        let on_host = placement.cpu_share != Some(0.0);
        let speeds = GpuSpeeds { host: if on_host { hardware.host } else { 0.0 }, ..hardware };
        let (predicted, exact) = (plan.predict(&speeds), exact_plan(&split, &plan));
        let predicted_exact = exact.map(|plan| plan.predict(&speeds));
        if args.json {
            return output::json(&GpuOutput { plan, hardware, predicted, predicted_exact, promise });
        }
        print_promise(promise.as_ref());
        print_gpu_plan(&plan, split.sketches().is_some(), &device, &predicted);
        if let Some(exact) = predicted_exact {
            println!("in exact mode      {:.1} tok/s", exact.tok_s);
        }
        return Ok(());
    }
    let plan = Plan::new(&split, request)?;
    let hardware = Hardware::measure(&split, plan.request.n_threads)?;
    let predicted = plan.predict(&hardware);
    if args.json {
        return output::json(&Output { plan, hardware, predicted, promise });
    }
    print_promise(promise.as_ref());
    print(&plan, split.sketches().is_some());
    println!(
        "expected per token: {} from RAM, {} from disk",
        format_bytes(plan.ram_bytes_per_token),
        format_bytes(plan.disk_bytes_per_token)
    );
    println!(
        "expected speed     {:.1} tok/s, bound by the {} ({:.1} tok/s at the physical limit)",
        predicted.tok_s, predicted.bottleneck, predicted.limit_tok_s
    );
    println!("                   {}", predicted.formula);
    Ok(())
}

/// Which share `--max-ppl-increase` stands for.
pub fn print_promise(promise: Option<&Promise>) {
    if let Some(promise) = promise {
        println!("{promise}");
    }
}

/// What the memory of that which chooses neurons is called.
fn chooser_name(has_sketches: bool) -> &'static str {
    if has_sketches { "sketches" } else { "predictors" }
}

/// How neurons are in memory that are not always computed.
fn as_residuals(residuals: bool) -> &'static str {
    if residuals { ", as what their sketches leave of them unless they are always computed" } else { "" }
}

/// Of which neurons there is no sketch, if `n` of each layer are computed by every token.
fn always_computed(n: usize, hot_neurons: &[usize]) -> String {
    match n {
        0 => String::new(),
        n => format!("but of the first {n} neurons of each of {} layers, which are always computed", hot_neurons.len()),
    }
}

/// The tiers as a table.
pub fn print(plan: &Plan, has_sketches: bool) {
    let row = |name: &str, bytes: u64, what: String| println!("  {name:<18} {:>10}  {what}", format_bytes(bytes));
    let budget = plan.request.ram_budget_bytes.map_or("auto".to_owned(), format_bytes);
    println!("RAM budget {budget}; all weights {}", format_bytes(plan.dense_bytes));
    row("matrices", plan.pinned_bytes, "embedding, attention, head".to_owned());
    let (hot, layers) = (plan.hot_neurons.iter().sum::<usize>(), plan.hot_neurons.len());
    row("hot neurons", plan.hot_bytes, format!("{hot} in {layers} layers{}", as_residuals(plan.residuals)));
    print_sections(&plan.sections);
    if plan.certificate_bytes > 0 {
        row("gate certificates", plan.certificate_bytes, "8-bit copies of the gates".to_owned());
    }
    let expected = match plan.cache_slots {
        0 => String::new(),
        n => format!(
            "{n} slots; expected to hold {:.0} % of the cold neurons that a token needs",
            100.0 * plan.cache_hit_rate
        ),
    };
    row("neuron cache", plan.cache_bytes, expected);
    row(chooser_name(has_sketches), plan.fixed.predictors, always_computed(plan.always_neurons, &plan.hot_neurons));
    row("keys and values", plan.fixed.kv_cache, format!("{} tokens", plan.request.context));
    row("norms, scratch", plan.fixed.vectors + plan.fixed.scratch, String::new());
    row("disk buffers", plan.fixed.staging, String::new());
    row("total", plan.total_bytes, String::new());
    if let Some(bytes) = plan.residuals_would_take {
        println!(
            "note: with what sketches leave of the neurons in memory, {} in all, nothing would be read from disk; this budget is too \
             small for that, and neurons are read whole",
            format_bytes(bytes)
        );
    }
    if let Some(exact) = plan.exact_disk_bytes_per_token.filter(|&exact| exact <= plan.disk_bytes_per_token) {
        println!(
            "note: sparse mode is expected to read {} a token from disk, exact mode {}: the neurons that it skips lie in \
             chunks that it reads for others; with --mode exact this budget gives more",
            format_bytes(plan.disk_bytes_per_token),
            format_bytes(exact)
        );
    }
}

/// Sections that are alike in many layers take one line.
fn print_sections(sections: &[PlannedSection]) {
    let mut counts: Vec<(&PlannedSection, usize)> = Vec::new();
    for s in sections {
        let alike = |(first, _): &&mut (&PlannedSection, usize)| {
            (first.neurons, first.encoding, first.bundle_bytes) == (s.neurons, s.encoding, s.bundle_bytes)
        };
        match counts.iter_mut().find(alike) {
            Some((_, n)) => *n += 1,
            None => counts.push((s, 1)),
        }
    }
    for (s, layers) in counts {
        println!(
            "    {} neurons of a layer in {}, {} bytes each, in {layers} layers",
            s.neurons, s.encoding, s.bundle_bytes
        );
    }
}

/// What `plan --json` prints where there is a GPU.
#[cfg(feature = "cuda")]
#[derive(Serialize)]
struct GpuOutput {
    plan: GpuPlan,
    hardware: GpuSpeeds,
    predicted: thermocline_runtime::GpuPrediction,
    /// Of exact mode, where the plan is for sparse mode and both fit.
    #[serde(skip_serializing_if = "Option::is_none")]
    predicted_exact: Option<thermocline_runtime::GpuPrediction>,
    #[serde(skip_serializing_if = "Option::is_none")]
    promise: Option<Promise>,
}

/// The same for exact mode, if `plan` is for sparse mode, which should be the faster one.
#[cfg(feature = "cuda")]
fn exact_plan(split: &Split, plan: &GpuPlan) -> Option<GpuPlan> {
    let base = PlanRequest { mode: Mode::Exact, always: None, ..plan.request.base };
    let request = GpuRequest { base, cache_share: None, lookahead: None, host_layers: None, ..plan.request };
    (plan.request.base.mode != Mode::Exact).then(|| GpuPlan::new(split, request).ok()).flatten()
}

#[cfg(feature = "cuda")]
fn print_gpu_plan(
    plan: &GpuPlan,
    has_sketches: bool,
    device: &thermocline_kernels::cuda::Device,
    predicted: &thermocline_runtime::GpuPrediction,
) {
    println!("{}", device.name());
    print_gpu(plan, has_sketches);
    println!(
        "expected per token: VRAM {}, cache {}, RAM {}",
        format_bytes(plan.device_bytes_per_token),
        format_bytes(plan.cache_bytes_per_token),
        format_bytes(plan.host_bytes_per_token)
    );
    println!("expected speed     {:.1} tok/s, bound by {}", predicted.tok_s, predicted.bottleneck);
    println!("                   {}", predicted.formula);
    if predicted.host_layers > 0 {
        println!("                   the CPU's threads choose and compute all of {} layers", predicted.host_layers);
    }
}

/// The tiers of a GPU as a table.
#[cfg(feature = "cuda")]
pub fn print_gpu(plan: &GpuPlan, has_sketches: bool) {
    let row = |name: &str, bytes: u64, what: String| println!("  {name:<18} {:>10}  {what}", format_bytes(bytes));
    println!(
        "VRAM budget {}; all weights {}",
        format_bytes(plan.request.vram_budget_bytes),
        format_bytes(plan.dense_bytes)
    );
    let fixed = &plan.fixed;
    row("matrices", fixed.matrices, "attention, head".to_owned());
    let (hot, layers) = (plan.hot_neurons.iter().sum::<usize>(), plan.hot_neurons.len());
    let residuals = as_residuals(plan.residuals);
    row("hot neurons", plan.hot_bytes, format!("{hot} in {layers} layers{residuals}"));
    print_sections(&plan.sections);
    let expected = match plan.cache_slots() {
        0 => String::new(),
        n => format!(
            "{n} slots; expected to hold {:.0} % of the cold neurons that a token needs",
            100.0 * plan.cache_hit_rate
        ),
    };
    row("neuron cache", plan.cache_bytes, expected);
    for (policy, hits) in &plan.cache_policies {
        println!("    {policy}: {:.1} % of the cold neurons, replayed", 100.0 * hits);
    }
    if plan.lookahead_neurons > 0 {
        let what = format!("room for {} neurons, while attention is computed", plan.lookahead_neurons);
        row("fetched early", fixed.lookahead, what);
    }
    if plan.mixed_cold_layers > 0 && plan.request.base.mode != Mode::Exact {
        let layers = plan.mixed_cold_layers;
        println!("    several encodings in RAM in {layers} layers: no cache, and only the last is fetched early");
    }
    let sketched = match (plan.streamed_sketches, layers) {
        (0, _) => always_computed(plan.always_neurons, &plan.hot_neurons),
        (n, _) if n == layers => "places for those of all layers, which lie in RAM".to_owned(),
        (n, _) => format!("of {} layers, and places for those of {n} others, which lie in RAM", layers - n),
    };
    row(chooser_name(has_sketches), fixed.predictors, sketched);
    row("keys and values", fixed.kv_cache, format!("{} tokens", plan.request.base.context));
    row("norms, scratch", fixed.vectors + fixed.scratch, String::new());
    row("prompt buffers", fixed.prefill, String::new());
    row("CUDA context", fixed.context, "taken before the first weight, other processes' included".to_owned());
    row("total", plan.total_bytes, String::new());
    let sketches = match plan.streamed_bytes_per_token {
        0 => String::new(),
        bytes => format!(
            ", and {} of sketches, which every token reads: copied over the link, or by the CPU in layers that it computes",
            format_bytes(bytes)
        ),
    };
    row("pinned RAM", plan.pinned_bytes, format!("the other neurons{residuals}{sketches}"));
    if plan.host_sketch_bytes > 0 {
        row("RAM", plan.host_sketch_bytes, "of sketches, for what the CPU computes".to_owned());
    }
    if plan.audit_bytes > 0 {
        row("RAM", plan.audit_bytes, "while tokens are audited (--audit-every)".to_owned());
    }
    if let Some(bytes) = plan.attention_in_q4_spares {
        println!(
            "note: attention in q4 (split --attention-encoding q4) would leave {} more to neurons",
            format_bytes(bytes)
        );
    }
    if let Some(bytes) = plan.streamed_in_two_bits {
        println!(
            "note: of sketches in 2.1 bits (split --sketch-bits 2.1), which diverge more at the same share, every token would read {} from RAM",
            format_bytes(bytes)
        );
    }
}
