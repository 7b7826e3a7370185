//! Which GPU benches belong on one line: those that differ in one setting.

use super::GpuBenchFile;
use super::figures::gibibytes;
use std::collections::BTreeMap;

/// A setting over which speed is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setting {
    /// Share of the neurons that are computed.
    Active,
    /// VRAM budget.
    Vram,
    /// Tokens before the first that is generated.
    Prompt,
    /// Threads that compute cold neurons.
    Threads,
}

/// Benches that differ in one setting alone.
#[derive(Debug, Clone)]
pub struct Sweep<'a> {
    /// That setting.
    pub over: Setting,
    /// The benches by its value, at least two values.
    pub points: Vec<(f64, &'a GpuBenchFile)>,
}

impl Setting {
    /// All of them, in the order of the page.
    pub const ALL: [Setting; 4] = [Setting::Active, Setting::Vram, Setting::Prompt, Setting::Threads];

    /// The axis: quantity and unit.
    pub fn label(self) -> &'static str {
        match self {
            Setting::Active => "active share (% of the neurons)",
            Setting::Vram => "VRAM budget (GiB)",
            Setting::Prompt => "context before decoding (tokens)",
            Setting::Threads => "CPU threads",
        }
    }

    /// Its place among [`settings`].
    fn key(self) -> &'static str {
        match self {
            Setting::Active => "active",
            Setting::Vram => "VRAM",
            Setting::Prompt => "prompt",
            Setting::Threads => "threads",
        }
    }

    /// Its value in the axis' unit; `None` where it has none.
    fn value(self, bench: &GpuBenchFile) -> Option<f64> {
        match self {
            Setting::Active => bench.active().map(|active| 100.0 * active),
            Setting::Vram => Some(gibibytes(bench.plan.request.vram_budget_bytes)),
            Setting::Prompt => Some(bench.settings.n_prompt as f64),
            Setting::Threads => Some(bench.n_threads as f64),
        }
    }
}

/// Everything that decides the speed, to the last digit. How many tokens are generated and how often is no setting but
/// the length of the measurement; the context counts as far as it is larger than that needs.
fn settings(bench: &GpuBenchFile) -> Vec<(&'static str, String)> {
    let (asked, measured) = (&bench.plan.request, &bench.settings);
    let needed = measured.n_prompt.saturating_add(measured.n_gen);
    vec![
        ("model", bench.model.clone()),
        ("planted", bench.is_planted().to_string()),
        ("device", bench.device.clone()),
        ("active", format!("{:?}", bench.active())),
        ("sketches", format!("{:?}", bench.plan.sketch_bits)),
        ("VRAM", asked.vram_budget_bytes.to_string()),
        ("prompt", measured.n_prompt.to_string()),
        ("context to spare", asked.base.context.saturating_sub(needed).to_string()),
        ("threads", bench.n_threads.to_string()),
        ("CPU share", format!("{:?}", bench.cpu_share())),
        ("cache share", format!("{:?}", asked.cache_share)),
        ("lookahead", format!("{:?}", asked.lookahead)),
        ("CPU layers", format!("{:?}", asked.host_layers)),
        ("RAM", format!("{:?}", asked.base.ram_budget_bytes)),
        ("greedy", measured.greedy.to_string()),
    ]
}

/// For each setting the largest group of benches that differ in nothing else, if two have different values: the group
/// with most values, of several the one whose first bench comes first by name. The order of `benches` does not matter.
pub fn sweeps(benches: &[GpuBenchFile]) -> Vec<Sweep<'_>> {
    let mut sorted: Vec<&GpuBenchFile> = benches.iter().collect();
    sorted.sort_by_key(|b| (&b.name, settings(b)));
    Setting::ALL.into_iter().filter_map(|over| largest(&sorted, over)).collect()
}

fn largest<'a>(sorted: &[&'a GpuBenchFile], over: Setting) -> Option<Sweep<'a>> {
    let mut groups: BTreeMap<_, Vec<(f64, &GpuBenchFile)>> = BTreeMap::new();
    for bench in sorted {
        let Some(value) = over.value(bench) else { continue };
        let mut rest = settings(bench);
        rest.retain(|(name, _)| *name != over.key());
        groups.entry(rest).or_default().push((value, bench));
    }
    let mut sweeps: Vec<(usize, &str, Sweep<'a>)> = Vec::new();
    for mut points in groups.into_values() {
        let first = points[0].1.name.as_str();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let n_values = 1 + points.windows(2).filter(|p| p[0].0 != p[1].0).count();
        sweeps.push((n_values, first, Sweep { over, points }));
    }
    sweeps.retain(|(n_values, ..)| *n_values > 1);
    sweeps.into_iter().min_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(b.1))).map(|(.., sweep)| sweep)
}
