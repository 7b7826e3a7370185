//! From flags to a loaded engine: on the GPU if there is one, else on the CPU, and it says which.

use crate::cli::{ModeName, Placement};
use crate::exit::Usage;
use crate::output::Progress;
use std::path::Path;
use thermocline_runtime::{Decoder, Engine, Mode, Plan, PlanRequest};
use thermocline_split::delta::Delta;
use thermocline_split::{Planes, Precision, Promise, Shares, Split};

#[cfg(feature = "cuda")]
pub use gpu::{gpu_plan, host_threads, open_device};

/// A loaded model.
pub enum Loaded {
    Cpu(Box<Engine>),
    #[cfg(feature = "cuda")]
    Gpu(Box<thermocline_runtime::GpuEngine>),
}

impl Loaded {
    pub fn decoder(&mut self) -> &mut dyn Decoder {
        match self {
            Loaded::Cpu(engine) => &mut **engine,
            #[cfg(feature = "cuda")]
            Loaded::Gpu(engine) => &mut **engine,
        }
    }
}

/// A split, with a delta on it, which needs all planes: of some neurons they will not do.
pub fn open_split(path: &Path, planes: Planes, delta: Option<&Path>) -> anyhow::Result<Split> {
    let Some(delta) = delta else { return Ok(Split::open_at(path, planes)?) };
    let planes = if planes.is_whole() { Precision::Exact.into() } else { planes };
    Ok(Split::open_at(path, planes)?.with_delta(Delta::open(delta)?)?)
}

/// The split that the flags name.
pub fn placed_split(args: &Placement) -> anyhow::Result<Split> {
    // From here on until everything is loaded: tokenizers leave more behind than some models' layers take.
    thermocline_kernels::return_freed_blocks();
    open_split(&args.model, args.precision, args.delta.as_deref())
}

/// The flags with the share of the neurons that `--max-ppl-increase` stands for, and the promise behind it, if that is given; context
/// and batch are as for [`load`].
pub fn promised(
    split: &Split,
    args: &Placement,
    wanted: usize,
    batch: usize,
) -> anyhow::Result<(Placement, Option<Promise>)> {
    let mut args = args.clone();
    let Some(increase) = args.max_ppl_increase else { return Ok((args, None)) };
    let refused = |reason: &str| Err(Usage(format!("--max-ppl-increase {reason}")).into());
    if args.mode == ModeName::Exact {
        return refused("is for --mode sparse; exact mode computes the dense model's output");
    }
    if args.delta.is_some() {
        return refused("speaks of the split's own weights, without --delta; give --active");
    }
    if args.precision.precision() != Precision::Base {
        return refused("speaks of --precision base, at which it was measured; give --active");
    }
    let unmeasured = || {
        let dir = split.dir().display();
        let command = format!("`thermocline eval -m {dir} --text FILE --fit-shares`");
        format!("needs to know what shares of the neurons cost, which {dir} does not say; {command} measures it")
    };
    let promise = if split.sketches().is_some() {
        let Some(curves) = split.graded_curves()? else { return refused(&unmeasured()) };
        // What is always computed does not depend on what is chosen of the others.
        let always = always_share(split, &args, wanted, batch)?;
        args.always = Some(always);
        match curves.promise(always as f32, increase) {
            Some(promise) => promise,
            None => return refused(&unmeasured()),
        }
    } else {
        let shares = split.shares()?;
        let Some(curve) = shares.as_ref().and_then(Shares::curve) else { return refused(&unmeasured()) };
        curve.promise(increase)
    };
    args.active = promise.active;
    Ok((args, Some(promise)))
}

/// The share of the neurons that is always computed: as given, or on a GPU as many as its plan finds room for.
fn always_share(split: &Split, args: &Placement, wanted: usize, batch: usize) -> anyhow::Result<f64> {
    if let Some(share) = args.always {
        return Ok(share);
    }
    #[cfg(feature = "cuda")]
    if let Some(device) = open_device(args, true)? {
        let plan = gpu_plan(split, args, request(args, wanted, batch), &device)?;
        return Ok(plan.always_neurons as f64 / split.manifest().config.intermediate_size as f64);
    }
    #[cfg(not(feature = "cuda"))]
    let _ = (split, wanted, batch);
    Ok(0.0)
}

/// Plans and loads, with a progress bar. `wanted` is the context if none is given.
pub fn load(split: Split, args: &Placement, wanted: usize, batch: usize, quiet: bool) -> anyhow::Result<Loaded> {
    let mut loaded = load_somewhere(split, args, wanted, batch, quiet)?;
    if let Some(error) = args.max_error {
        loaded.decoder().limit_error(error)?;
    }
    Ok(loaded)
}

fn load_somewhere(split: Split, args: &Placement, wanted: usize, batch: usize, quiet: bool) -> anyhow::Result<Loaded> {
    let request = request(args, wanted, batch);
    #[cfg(feature = "cuda")]
    if let Some(device) = open_device(args, quiet)? {
        let loaded = gpu::load(split, args, request, device, quiet);
        thermocline_kernels::keep_freed_blocks();
        return loaded;
    }
    #[cfg(not(feature = "cuda"))]
    if matches!(args.vram_budget, crate::cli::VramBudget::Bytes(_)) {
        let text = "--vram-budget: this build has no GPU engine; give 0, or build with the feature cuda";
        return Err(Usage(text.to_owned()).into());
    }
    load_on_cpu(split, request, quiet)
}

/// The same on the CPU, whatever there is.
fn load_on_cpu(split: Split, request: PlanRequest, quiet: bool) -> anyhow::Result<Loaded> {
    let plan = Plan::new(&split, request)?;
    let progress = Progress::new("load", quiet);
    let on_layer = |done: usize, total: usize| progress.set(done as u64, total as u64, format!("layer {done}/{total}"));
    let engine = Engine::load(split, plan, &on_layer);
    progress.finish();
    thermocline_kernels::keep_freed_blocks();
    Ok(Loaded::Cpu(Box::new(engine?)))
}

/// What the flags ask for.
pub fn request(args: &Placement, wanted: usize, batch: usize) -> PlanRequest {
    PlanRequest {
        mode: match args.mode {
            ModeName::Exact => Mode::Exact,
            ModeName::Sparse => Mode::Sparse { active: args.active },
        },
        always: args.always.map(|share| share as f32),
        ram_budget_bytes: args.ram_budget,
        context: args.ctx_size.unwrap_or(wanted),
        batch,
        n_threads: args.threads.count(),
    }
}

#[cfg(feature = "cuda")]
mod gpu {
    use super::Loaded;
    use crate::cli::{Placement, VramBudget};
    use crate::exit::Usage;
    use crate::output::Progress;
    use thermocline_kernels::cuda::launch::ffn_blocks;
    use thermocline_kernels::cuda::{CudaError, Device, EmulatedFault};
    use thermocline_runtime::budget::format_bytes;
    use thermocline_runtime::{Error, GpuEngine, GpuPlan, GpuRequest, PlanRequest};
    use thermocline_split::Split;

    /// Names the emulator's library, in place of a GPU: for tests and debugging.
    const EMULATOR: &str = "THERMOCLINE_CUDA_EMULATOR";

    /// What is wrong with the emulated device ([`EmulatedFault`]): for tests.
    const FAULT: &str = "THERMOCLINE_CUDA_FAULT";

    /// Free memory that `auto` leaves to others.
    const LEFT_BYTES: usize = 256 << 20;

    /// What the driver takes after the first look: code, the graph, scratch memory of the products. 0.09 GiB were seen on an
    /// H200.
    const DRIVER_BYTES: u64 = 160 << 20;

    /// Prompt tokens that are computed at once.
    const PROMPT_BATCH: usize = 512;

    /// The GPU that the flags ask for; `None` if they, or the machine, have none.
    pub fn open_device(args: &Placement, quiet: bool) -> anyhow::Result<Option<Device>> {
        if args.vram_budget == VramBudget::None {
            return Ok(None);
        }
        let opened = match std::env::var_os(EMULATOR) {
            Some(library) => match fault()? {
                Some(fault) => Device::faulty(library.as_ref(), fault),
                None => Device::emulated(library.as_ref()),
            },
            None => Device::open(0),
        };
        match (opened, args.vram_budget) {
            (Ok(device), _) => Ok(Some(device)),
            (Err(e @ (CudaError::NoDriver | CudaError::NoDevice { .. })), VramBudget::Auto) => {
                if !quiet {
                    eprintln!("running on the CPU: {e}");
                }
                Ok(None)
            }
            (Err(e @ (CudaError::NoDriver | CudaError::NoDevice { .. })), _) => {
                let reason = format!("{e}; leave it out, or give 0, to run on the CPU with --ram-budget");
                Err(Error::Setting { flag: "--vram-budget", reason }.into())
            }
            (Err(e), _) => Err(Error::from(e).into()),
        }
    }

    fn fault() -> anyhow::Result<Option<EmulatedFault>> {
        let Ok(text) = std::env::var(FAULT) else { return Ok(None) };
        Ok(Some(text.parse().map_err(|e| Usage(format!("{FAULT}: {e}")))?))
    }

    /// Threads that compute beside a GPU: one core is left to the thread that waits for the device.
    pub fn host_threads(args: &Placement) -> usize {
        args.threads.threads.unwrap_or_else(|| args.threads.count().saturating_sub(1).max(1))
    }

    /// The plan for a device and a budget.
    pub fn gpu_plan(split: &Split, args: &Placement, base: PlanRequest, device: &Device) -> anyhow::Result<GpuPlan> {
        // Every batch streams all cold neurons: the larger, the better.
        let batch = if base.batch > 1 { PROMPT_BATCH.min(base.context) } else { 1 };
        let base = PlanRequest { n_threads: host_threads(args), batch, ..base };
        let (free, total) = device.memory().map_err(Error::from)?;
        let vram_budget_bytes = match args.vram_budget {
            VramBudget::Bytes(bytes) => bytes,
            _ => total.saturating_sub(LEFT_BYTES) as u64,
        };
        let request = GpuRequest {
            base,
            vram_budget_bytes,
            context_bytes: (total - free) as u64 + DRIVER_BYTES,
            n_blocks: ffn_blocks(device),
            cache_share: args.cache_share,
            lookahead: args.lookahead,
            host_layers: args.cpu_layers,
        };
        Ok(GpuPlan::new(split, request)?)
    }

    pub(super) fn load(
        split: Split,
        args: &Placement,
        base: PlanRequest,
        device: Device,
        quiet: bool,
    ) -> anyhow::Result<Loaded> {
        let plan = gpu_plan(&split, args, base, &device)?;
        if !quiet {
            eprintln!(
                "{}: {} of VRAM, {} pinned in RAM",
                device.name(),
                format_bytes(plan.total_bytes),
                format_bytes(plan.pinned_bytes)
            );
        }
        let progress = Progress::new("load", quiet);
        let on_layer =
            |done: usize, total: usize| progress.set(done as u64, total as u64, format!("layer {done}/{total}"));
        let share = args.cpu_share.map(|s| s as f32);
        let mut engine = GpuEngine::load(split, plan.clone(), device.clone(), share, &on_layer);
        if let (Err(e @ Error::VramRefused { .. }), Some(smaller)) = (&engine, plan.smaller()) {
            // Others may have taken memory since it was counted: once, with less.
            progress.note(&format!("{e}; trying with {}", format_bytes(smaller.vram_budget_bytes)));
            let split = super::placed_split(args)?;
            let plan = GpuPlan::new(&split, smaller)?;
            engine = GpuEngine::load(split, plan, device, share, &on_layer);
        }
        progress.finish();
        Ok(Loaded::Gpu(Box::new(engine?)))
    }
}
