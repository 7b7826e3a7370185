//! The GPU engine against the CPU engine. Here the kernels are emulated on the CPU (`kernels/cuda/emulator`); with
//! `THERMOCLINE_TEST_DEVICE=cuda` the same tests run on a GPU.
#![cfg(feature = "cuda")]
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod support;

use std::path::{Path, PathBuf};
use support::{calibrating, engine, llama, ok, once, qwen_relu, request, split, splitting, text};
use thermocline_kernels::cuda::launch::ffn_blocks;
use thermocline_kernels::cuda::{Device, build_emulator};
use thermocline_runtime::{Engine, Error, GpuEngine, GpuPlan, GpuRequest, Logits, Mode, Plan};
use thermocline_split::{Precision, Split};

fn device() -> Device {
    if std::env::var("THERMOCLINE_TEST_DEVICE").is_ok_and(|d| d == "cuda") {
        return Device::open(0).unwrap();
    }
    Device::emulated(&build_emulator(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap()).unwrap()
}

fn demo(encoding: &str) -> PathBuf {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/demo/model");
    let profile = once("demo-model.profile", |path| drop(ok(&calibrating(&model, "1024", "128", path))));
    let name = format!("demo-model.{encoding}");
    once(&name, |path| drop(ok(&splitting(&model, &profile, &["--encoding", encoding], path))))
}

fn gpu_request(device: &Device, mode: Mode, vram: u64, cache_share: Option<f64>) -> GpuRequest {
    let n_blocks = ffn_blocks(device);
    GpuRequest {
        base: request(mode, None, 2),
        vram_budget_bytes: vram,
        context_bytes: 0,
        n_blocks,
        cache_share,
        lookahead: None,
    }
}

/// The least budget, and what everything takes.
fn vram_range(dir: &Path, device: &Device, mode: Mode) -> (u64, u64) {
    vram_range_of(&Split::open(dir).unwrap(), device, mode)
}

fn vram_range_of(split: &Split, device: &Device, mode: Mode) -> (u64, u64) {
    let least = match GpuPlan::new(split, gpu_request(device, mode, 1, None)) {
        Err(Error::VramTooSmall { needed_bytes, .. }) => needed_bytes,
        other => panic!("a budget of one byte: {other:?}"),
    };
    (least, GpuPlan::new(split, gpu_request(device, mode, u64::MAX / 2, None)).unwrap().total_bytes)
}

fn gpu(dir: &Path, request: GpuRequest, host_share: f32) -> GpuEngine {
    gpu_of(Split::open(dir).unwrap(), request, host_share)
}

fn gpu_of(split: Split, request: GpuRequest, host_share: f32) -> GpuEngine {
    let device = device();
    let plan = GpuPlan::new(&split, request).unwrap();
    assert!(plan.total_bytes <= request.vram_budget_bytes, "{plan:?}");
    let engine = GpuEngine::load(split, plan, device, Some(host_share), &|_, _| ()).unwrap();
    let taken = engine.device().allocated_bytes() as u64;
    assert!(taken <= request.vram_budget_bytes, "{taken} bytes taken of {}", request.vram_budget_bytes);
    engine
}

/// Tokens that follow no pattern.
fn tokens(n: usize, vocab: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * i * 31 + i * 7 + 3) % vocab) as u32).collect()
}

/// Relative to the largest logit: sums of a few thousand f32 products in another order, over all layers, and one bit of
/// a key or value here and there that rounds to f16 the other way.
const TOLERANCE: f32 = 2e-3;

fn assert_close(got: &[f32], want: &[f32], what: &str) {
    let scale = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    assert!(got.len() == want.len() && scale > 0.0);
    let worst = got
        .iter()
        .zip(want)
        .map(|(g, w)| (g - w).abs())
        .fold(0.0f32, |m, d| if d.is_nan() { f32::INFINITY } else { m.max(d) });
    assert!(worst <= TOLERANCE * scale, "{what}: off by {worst} of {scale}");
}

fn compare(mut cpu: Engine, mut gpu: GpuEngine, n: usize, what: &str) {
    let vocab = cpu.split().manifest().config.vocab_size;
    for (i, token) in tokens(n, vocab).into_iter().enumerate() {
        let want = cpu.forward(&[token], Logits::Last).unwrap();
        let got = gpu.forward(token).unwrap();
        assert_close(&got, &want, &format!("{what}, token {i}"));
    }
}

#[test]
fn exact_mode_gives_the_logits_of_the_cpu_engine_wherever_the_neurons_lie() {
    let dirs = [demo("bf16"), demo("q4"), split(&qwen_relu(), "q8", &[]), split(&llama(), "bf16", &[])];
    for dir in dirs {
        let (least, whole) = vram_range(&dir, &device(), Mode::Exact);
        for vram in [whole, (least + whole) / 2, least] {
            let what = format!("{}, {vram} of {least}..{whole} bytes", dir.display());
            let gpu = gpu(&dir, gpu_request(&device(), Mode::Exact, vram, None), 0.0);
            assert_eq!(gpu.plan().hot_bytes == 0, vram == least, "{what}");
            compare(engine(&dir, request(Mode::Exact, None, 2)).unwrap(), gpu, 24, &what);
        }
    }
}

/// Planes are decoded by kernels of their own: tokens, prompts, the CPU's share.
#[test]
fn further_planes_give_the_logits_of_the_cpu_engine() {
    for (encoding, precision, in_vram, share) in [
        ("bf16x", Precision::Exact, false, 0.0),
        ("q4+exact", Precision::Plus, false, 0.5),
        ("q4+exact", Precision::Exact, true, 0.0),
        ("q8+exact", Precision::Exact, false, 0.5),
    ] {
        let dir = demo(encoding);
        let open = || Split::open_at(&dir, precision).unwrap().with_alike_bundles();
        let (least, whole) = vram_range_of(&open(), &device(), Mode::Exact);
        let what = format!("{encoding} at {precision}");
        let plan = Plan::new(&open(), request(Mode::Exact, None, 2)).unwrap();
        let mut cpu = Engine::load(open(), plan, &|_, _| ()).unwrap();
        let vram = if in_vram { whole } else { least };
        let mut gpu = gpu_of(open(), gpu_request(&device(), Mode::Exact, vram, None), share);
        let prompt = tokens(20, cpu.split().manifest().config.vocab_size);
        let (want, got) = (cpu.prefill(&prompt).unwrap(), gpu.prefill(&prompt).unwrap());
        assert_close(&got, &want, &format!("{what}, after the prompt"));
        compare(cpu, gpu, 3, &what);
    }
}

#[test]
fn a_prompt_in_batches_gives_the_logits_of_its_tokens_one_by_one() {
    for dir in [demo("bf16"), demo("q4"), split(&qwen_relu(), "q8", &[])] {
        let (least, whole) = vram_range(&dir, &device(), Mode::Exact);
        for vram in [whole, least] {
            let mut cpu = engine(&dir, request(Mode::Exact, None, 2)).unwrap();
            let mut gpu = gpu(&dir, gpu_request(&device(), Mode::Exact, vram, None), 0.0);
            // Batches of 32: two whole ones and a part, then one token.
            let prompt = tokens(75, cpu.split().manifest().config.vocab_size);
            let (want, got) = (cpu.prefill(&prompt).unwrap(), gpu.prefill(&prompt).unwrap());
            assert_close(&got, &want, "after the prompt");
            let (want, got) = (cpu.forward(&[5], Logits::Last).unwrap(), gpu.forward(5).unwrap());
            assert_close(&got, &want, "the token after the prompt");
        }
    }
}

#[test]
fn sparse_mode_computes_the_same_neurons_as_the_cpu_engine_with_any_cache_and_any_share_of_the_host() {
    for dir in [demo("q4"), split(&qwen_relu(), "q8", &[])] {
        let mode = Mode::Sparse { active: 0.2 };
        let (least, whole) = vram_range(&dir, &device(), mode);
        let some = least + (whole - least) / 3;
        for (vram, cache, share, lookahead) in [
            (whole, None, 0.0, None),
            (some, Some(0.0), 0.0, Some(0)),
            (some, Some(0.0), 0.0, Some(30)),
            (some, Some(0.9), 0.0, Some(8)),
            (some, Some(0.5), 0.6, Some(50)),
            (least, None, 1.0, None),
        ] {
            let what = format!("{}, {vram} bytes, cache {cache:?}, host {share}, ahead {lookahead:?}", dir.display());
            let mut cpu = engine(&dir, request(mode, None, 2)).unwrap();
            let mut gpu = gpu(&dir, GpuRequest { lookahead, ..gpu_request(&device(), mode, vram, cache) }, share);
            let config = cpu.split().manifest().config.clone();
            let (mut same, mut all) = (0, 0);
            for (i, token) in tokens(24, config.vocab_size).into_iter().enumerate() {
                let want = cpu.forward(&[token], Logits::Last).unwrap();
                let got = gpu.forward(token).unwrap();
                let (ours, theirs) = (gpu.last_active().unwrap(), cpu.last_active().to_vec());
                assert_eq!(ours.len(), theirs.len());
                same += ours.iter().filter(|id| theirs.binary_search(id).is_ok()).count();
                all += ours.len();
                if ours == theirs {
                    assert_close(&got, &want, &format!("{what}, token {i}"));
                }
            }
            // Scores that differ in the last bits may change places at the threshold.
            assert!(same as f64 >= 0.998 * all as f64, "{what}: {same} of {all}");
            let account = gpu.account();
            assert_eq!(account.neurons_computed, 24 * (config.n_layers * all / 24) as u64, "{what}");
            assert_eq!(account.cache_hits > 0, gpu.plan().cache_slots() > 0, "{what}");
            assert_eq!(account.link_bytes == 0, vram == whole || share == 1.0, "{what}");
            let (fetched, used) = (account.foreseen, account.foreseen_used);
            assert_eq!(fetched > 0, lookahead.is_some_and(|n| n > 0), "{what}");
            assert!(fetched <= 24 * (config.n_layers * lookahead.unwrap_or(0)) as u64, "{what}: {fetched}");
            assert!(used <= fetched && (fetched == 0 || used > fetched / 20), "{what}: {used} of {fetched}");
        }
    }
}

/// The records of a GPU, of the CPU and of a planted split, as the program writes them, in one report.
#[cfg(feature = "analysis")]
#[test]
fn what_bench_and_run_print_is_reported() {
    let out = tempfile::tempdir().unwrap();
    let planted = out.path().join("planted");
    let record = |name: &str, on_gpu: bool, args: &[&str]| {
        let mut command = support::thermocline();
        if on_gpu {
            command.env("THERMOCLINE_VRAM_BUDGET", "1GiB");
            if std::env::var("THERMOCLINE_TEST_DEVICE").is_ok_and(|d| d == "cuda") {
                command.env_remove("THERMOCLINE_CUDA_EMULATOR");
            } else {
                let library = build_emulator(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap();
                command.env("THERMOCLINE_CUDA_EMULATOR", library);
            }
        }
        let ran = command.args(args).output().unwrap();
        assert!(ran.status.success(), "{args:?}: {}", String::from_utf8_lossy(&ran.stderr));
        let path = out.path().join(format!("{name}.json"));
        std::fs::write(&path, ran.stdout).unwrap();
        path
    };
    let model = text(&planted);
    let sparse = ["--mode", "sparse", "--active", "0.1", "--json", "-t", "2"];
    let bench = ["bench", "-m", model, "--n-prompt", "8", "--n-gen", "4", "-r", "2"];
    let run = ["run", "-m", model, "-p", "t0 t1", "-n", "24", "--temp", "0"];
    let paths = [
        record("split", false, &["split", "--planted", "tiny", "-o", model, "--json"]),
        record("gpu", true, &[&bench[..], &sparse].concat()),
        record("cpu", false, &[&bench[..], &sparse].concat()),
        record("run", true, &[&run[..], &sparse].concat()),
    ];
    let page = out.path().join("report.html");
    let inputs: Vec<&str> = paths.iter().map(|p| text(p)).collect();
    ok(&[&["report", "-o", text(&page), "--svg", text(&out.path().join("svg"))], &inputs[..]].concat());
    let html = std::fs::read_to_string(&page).unwrap();
    for part in ["<td class=\"text\">gpu</td>", "<td class=\"text\">cpu</td>", "planted-tiny-a", "found in VRAM"] {
        assert!(html.contains(part), "{part}");
    }
    assert!(out.path().join("svg/gpu-speed.svg").exists());
    for path in &paths[1..] {
        let record: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert_eq!((record["planted"].as_bool(), record["model"].as_str()), (Some(true), Some("planted-tiny-a")));
    }
}
