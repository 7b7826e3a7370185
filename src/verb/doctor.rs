//! `doctor`: what this machine can do, and what is missing.

use crate::cli::Doctor;
use crate::output;
use crate::settings::Settings;
use anyhow::Context;
use serde::Serialize;
use std::io::Write;
use thermocline_kernels::{AlignedBuf, BundleLayout, Encoding, Isa, Kernels};
use thermocline_runtime::hardware::{StagingShape, disk_speed, kernel_speed, ram_speed};

/// Bytes on which RAM is measured, and bytes of the file on which the disk is.
const PROBE_BYTES: usize = 256 << 20;

/// What `doctor --json` prints.
#[derive(Serialize)]
struct Report {
    cpu: String,
    n_threads: usize,
    isa: &'static str,
    isas: Vec<&'static str>,
    ram_total_bytes: u64,
    ram_available_bytes: u64,
    ram_bytes_per_second: f64,
    q4_kernel_bytes_per_second: f64,
    disk_dir: String,
    disk_bytes_per_second: f64,
    gpu: String,
    settings_file: Option<String>,
}

pub fn doctor(args: &Doctor, settings: &Settings) -> anyhow::Result<()> {
    let mut pool = super::run::pool(args.threads)?;
    let memory = AlignedBuf::zeroed(PROBE_BYTES)?;
    let layout = BundleLayout::new(Encoding::Q4, 4096).context("whole groups")?;
    let report = Report {
        cpu: cpu_name(),
        n_threads: pool.n_threads(),
        isa: Kernels::detect().isa().name(),
        isas: Isa::ALL.into_iter().filter(|i| i.is_available()).map(Isa::name).collect(),
        ram_total_bytes: meminfo("MemTotal:"),
        ram_available_bytes: meminfo("MemAvailable:"),
        ram_bytes_per_second: ram_speed(&mut pool, &memory),
        q4_kernel_bytes_per_second: kernel_speed(&mut pool, &memory, &layout),
        disk_dir: args.dir.display().to_string(),
        disk_bytes_per_second: disk(args, &memory)?,
        gpu: gpu(),
        settings_file: settings.path.as_ref().map(|p| p.display().to_string()),
    };
    if args.json {
        return output::json(&report);
    }
    let gb = 1e9;
    println!("cpu     {}, {} threads, kernels: {}", report.cpu, report.n_threads, report.isas.join(", "));
    println!(
        "ram     {:.1} GB, {:.1} GB available, {:.1} GB/s",
        report.ram_total_bytes as f64 / gb,
        report.ram_available_bytes as f64 / gb,
        report.ram_bytes_per_second / gb
    );
    println!(
        "kernel  {:.1} GB/s of q4 neurons from RAM, decoded and multiplied",
        report.q4_kernel_bytes_per_second / gb
    );
    println!("disk    {:.2} GB/s past the page cache, in {}", report.disk_bytes_per_second / gb, report.disk_dir);
    println!("gpu     {}", report.gpu);
    println!("config  {}", in_effect(settings));
    Ok(())
}

fn disk(args: &Doctor, memory: &[u8]) -> anyhow::Result<f64> {
    let at = || format!("{}: cannot write a temporary file of {PROBE_BYTES} bytes", args.dir.display());
    let mut file = tempfile::NamedTempFile::new_in(&args.dir).with_context(at)?;
    file.write_all(memory).and_then(|()| file.as_file().sync_all()).with_context(at)?;
    Ok(disk_speed(std::iter::once(file.path()), &StagingShape::default())?)
}

/// The processor's name, as the system gives it.
pub fn cpu_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|l| l.starts_with("model name")).and_then(|l| l.split_once(':'));
    line.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

fn meminfo(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find(|l| l.starts_with(key)).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Which settings file is in effect, and what it sets.
fn in_effect(settings: &Settings) -> String {
    let Some(path) = &settings.path else {
        let usual = settings.usual_path.as_ref().map_or("no home folder".to_owned(), |p| p.display().to_string());
        return format!("no settings file ({usual} is not there)");
    };
    let set: Vec<String> = settings.set.iter().map(|(verb, flag)| format!("{verb} --{flag}")).collect();
    let set = if set.is_empty() { "nothing".to_owned() } else { set.join(", ") };
    format!("{} sets {set}", path.display())
}

/// The GPU that `run` would use, or why it would use none.
#[cfg(not(feature = "cuda"))]
fn gpu() -> String {
    "this build has no GPU engine (feature cuda): everything runs on the CPU".to_owned()
}

/// The GPU that `run` would use, or why it would use none.
#[cfg(feature = "cuda")]
fn gpu() -> String {
    match measure_gpu() {
        Ok(line) => line,
        Err(e) => format!("none: {e}; everything runs on the CPU"),
    }
}

#[cfg(feature = "cuda")]
fn measure_gpu() -> Result<String, thermocline_kernels::cuda::CudaError> {
    use thermocline_kernels::cuda::{Device, Queue};
    /// Bytes that are copied to measure the link: large enough that nothing else counts.
    const LINK_BYTES: usize = 64 << 20;
    let device = Device::open(0)?;
    let (free, total) = device.memory()?;
    let (host, memory) = (device.pin(AlignedBuf::zeroed(LINK_BYTES)?)?, device.allocate(LINK_BYTES)?);
    let mut best = 0.0f64;
    for _ in 0..5 {
        let begin = device.record()?;
        device.copy(Queue::Compute, &memory.view(), &host.view())?;
        best = best.max(LINK_BYTES as f64 / device.record()?.since(&begin)? / 1e6);
    }
    let gb = 1e9;
    Ok(format!(
        "{}, {} multiprocessors, {:.1} GB, {:.1} GB free, {best:.1} GB/s over the link",
        device.name(),
        device.n_multiprocessors(),
        total as f64 / gb,
        free as f64 / gb
    ))
}
