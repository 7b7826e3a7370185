//! The GPU engine against the CPU engine. Here the kernels are emulated on the CPU (`kernels/cuda/emulator`); with
//! `THERMOCLINE_TEST_DEVICE=cuda` the same tests run on a GPU, one at a time (`-- --test-threads 1`): while one captures a graph,
//! no other may use the device.
#![cfg(feature = "cuda")]
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod support;

use std::path::{Path, PathBuf};
use support::{
    Made, calibrating, copy_dir, engine, engine_of, four_layers, llama, ok, once, qwen_relu, request, split, splitting,
};
use thermocline_datasets::write::TinyModel;
use thermocline_kernels::cuda::launch::ffn_blocks;
use thermocline_kernels::cuda::{Device, build_emulator};
use thermocline_runtime::{
    Decoder, Engine, Error, GpuEngine, GpuPlan, GpuRequest, GpuSpeeds, LayerAudit, Logits, Mode, Plan, PlanRequest,
    layer_active, n_active,
};
use thermocline_split::{
    Curve, GradedCurve, GradedCurves, GradedThresholds, LayerCost, LayerFile, Planes, Precision, Shares, Split,
};

const SKETCHED: &[&str] = &["--chunk-neurons", "8", "--sketch"];
const RESIDUALS: &[&str] = &["--chunk-neurons", "8", "--sketch", "--residuals"];
/// Residuals of sketches that have two bits of all rows.
const FEWER_BITS: &[&str] = &["--chunk-neurons", "8", "--sketch", "--residuals", "--sketch-bits", "2.1"];

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
        host_layers: Some(0),
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

/// The same with another neuron in some layer, which is as good: sums in another order can choose it.
const OTHER_NEURON: f32 = 5e-2;

/// The largest difference, relative to the largest logit.
fn off_by(got: &[f32], want: &[f32]) -> f32 {
    let scale = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    assert!(got.len() == want.len() && scale > 0.0);
    let worst = got
        .iter()
        .zip(want)
        .map(|(g, w)| (g - w).abs())
        .fold(0.0f32, |m, d| if d.is_nan() { f32::INFINITY } else { m.max(d) });
    worst / scale
}

fn assert_close(got: &[f32], want: &[f32], what: &str) {
    let off = off_by(got, want);
    assert!(off <= TOLERANCE, "{what}: off by {off} of the largest");
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
        let open = || Split::open_at(&dir, precision).unwrap();
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

/// Layers with shares of their own, one of them all of its neurons, and with something that stands for the others.
#[test]
fn neurons_are_divided_between_layers_as_by_the_cpu_engine() {
    let dir = tempfile::tempdir().unwrap();
    copy_dir(&demo("q4"), dir.path());
    let config = Split::open(dir.path()).unwrap().manifest().config.clone();
    let cost = |l: usize| LayerCost {
        loss: vec![1.0 / (1 + l * l) as f32, 0.5 / (1 + l * l) as f32],
        left_out: (0..2 * config.hidden_size).map(|i| ((i * 7 + l) % 11) as f32 / 100.0 - 0.05).collect(),
    };
    let shares = Shares::new(vec![0.05, 0.3], (0..config.n_layers).map(cost).collect(), config.hidden_size).unwrap();
    Split::put_shares(dir.path(), &shares).unwrap();
    let open = || Split::open(dir.path()).unwrap();
    for active in [0.1, 0.6] {
        let mode = Mode::Sparse { active };
        let counts: Vec<usize> = layer_active(&open(), active).unwrap().iter().map(|l| l.n_active).collect();
        assert!(counts[0] > counts[config.n_layers - 1], "{counts:?}");
        let (least, whole) = vram_range(dir.path(), &device(), mode);
        for (vram, share, lookahead) in [(whole, 0.0, None), (least + (whole - least) / 3, 0.5, Some(8))] {
            let request = GpuRequest { lookahead, ..gpu_request(&device(), mode, vram, Some(0.0)) };
            let gpu = agree(&open, request, share, &format!("{active} active, {vram} bytes"));
            assert_eq!(Some(gpu.last_active().unwrap().len()), counts.last().copied());
            assert_eq!(gpu.account().neurons_computed, 8 * counts.iter().sum::<usize>() as u64);
        }
    }
}

fn greedy(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
}

/// Logits and greedy tokens of both engines: after a prompt in exact mode, then token by token; in sparse mode where both
/// chose the same neurons, which they nearly always must.
fn agree(open: &dyn Fn() -> Split, request: GpuRequest, share: f32, what: &str) -> GpuEngine {
    let mut gpu = gpu_of(open(), request, share);
    let n = gpu.split().manifest().config.intermediate_size;
    let sketched = gpu.is_graded() && request.base.mode != Mode::Exact;
    // What a GPU always computes goes by its memory; a CPU is told.
    let always = sketched.then(|| gpu.plan().always_neurons as f32 / n as f32);
    let base = PlanRequest { always, ram_budget_bytes: None, ..request.base };
    let mut cpu = engine_of(open(), base).unwrap();
    let prompt = tokens(20, cpu.split().manifest().config.vocab_size);
    let (want, got) = (cpu.prefill(&prompt).unwrap(), gpu.prefill(&prompt).unwrap());
    assert_close(&got, &want, &format!("{what}, after the prompt"));
    let (mut token, mut same) = (greedy(&want), 0);
    for i in 0..8 {
        let want = cpu.forward(&[token], Logits::Last).unwrap();
        let got = gpu.forward(token).unwrap();
        token = greedy(&want);
        let off = off_by(&got, &want);
        let is_close =
            off <= TOLERANCE && (base.mode == Mode::Exact || gpu.last_active().unwrap() == cpu.last_active());
        if is_close {
            assert_eq!(greedy(&got), token, "{what}, token {i}");
            same += 1;
        }
        let may_differ = base.mode != Mode::Exact && off <= OTHER_NEURON;
        assert!(is_close || may_differ, "{what}, token {i}: off by {off} of the largest");
    }
    assert!(same >= 7, "{what}: {same} of 8 tokens with the same neurons");
    gpu
}

/// Wherever the neurons are, and whoever computes them.
#[test]
fn sketches_choose_and_stand_in_as_on_the_cpu() {
    let fewer: &[&str] = &["--chunk-neurons", "8", "--sketch", "--sketch-bits", "2.1"];
    for (made, encoding, how) in [
        (llama(), "q4", SKETCHED),
        (llama(), "q4", fewer),
        (qwen_relu(), "q8", SKETCHED),
        (four_layers(), "q4,hot@0.25=q8", SKETCHED),
    ] {
        let dir = split(&made, encoding, how);
        let open = || Split::open(&dir).unwrap();
        let config = open().manifest().config.clone();
        let n = config.intermediate_size;
        let sketch_bytes: u64 = open().sketches().unwrap().tensors().iter().map(|t| t.bytes).sum();
        for active in [0.1, 0.4] {
            let mode = Mode::Sparse { active };
            let (least, whole) = vram_range_of(&open(), &device(), mode);
            let request = |vram: u64, always: Option<f32>| {
                let request = gpu_request(&device(), mode, vram, None);
                GpuRequest { base: PlanRequest { always, ..request.base }, ..request }
            };
            for (vram, always, share) in [
                (whole, None, 0.0),
                (whole + sketch_bytes, Some(0.3), 0.0),
                (least + (whole - least) / 2, None, 0.0),
                (least + (whole - least) / 2, Some(0.1), 0.6),
                (least + (whole - least) / 3, None, 0.6),
                (least, None, 1.0),
                (whole + sketch_bytes, Some(1.0), 0.0),
            ] {
                let what = format!("{encoding}, {active} active, {vram} bytes, always {always:?}, host {share}");
                let gpu = agree(&open, request(vram, always), share, &what);
                let plan = gpu.plan();
                let n_always = plan.always_neurons;
                assert!(plan.hot_neurons.iter().all(|&hot| hot >= n_always), "{what}");
                match always {
                    Some(share) => assert_eq!(n_always, (share * n as f32).round() as usize, "{what}"),
                    None => assert_eq!(n_always == n, vram == whole, "{what}"),
                }
                // Neurons are always computed where all sketches fit; the least there must be are two, or those of all layers but a few.
                let streamed = plan.streamed_sketches;
                assert!(streamed == 0 || always.is_some() || n_always == 0, "{what}");
                assert!(vram > least || (streamed == config.n_layers) == (config.n_layers > 2), "{what}: {streamed}");
                // Every layer's channels of columns are there as long as one neuron has a sketch.
                let columns = (4 * config.hidden_size * config.n_layers) as u64;
                let of_neurons = (sketch_bytes - columns) * (n - n_always) as u64 / n as u64;
                let of_rest = of_neurons + if n_always < n { columns } else { 0 };
                let rounding = (6 * 256 * config.n_layers) as u64;
                let read = plan.chooser_bytes_per_token;
                assert!((of_rest..=of_rest + rounding).contains(&read), "{what}");
                let on_device = config.n_layers - streamed + streamed.min(2);
                assert_eq!(plan.fixed.predictors, read / config.n_layers as u64 * on_device as u64, "{what}");
                assert_eq!((plan.lookahead_neurons, plan.cache_slots()), (0, 0), "{what}");
                let n_chosen = if n_always < n { n_active(active, n - n_always) } else { 0 };
                assert_eq!(gpu.last_active().unwrap().len(), n_always + n_chosen, "{what}");
                let computed = (8 * config.n_layers * (n_always + n_chosen)) as u64;
                assert_eq!(gpu.account().neurons_computed, computed, "{what}");
            }
            let flag = |request: GpuRequest| match GpuPlan::new(&open(), request) {
                Err(Error::Setting { flag, .. }) => flag,
                other => panic!("{other:?}"),
            };
            assert_eq!(flag(GpuRequest { lookahead: Some(4), ..request(whole, None) }), "--lookahead");
            assert_eq!(flag(GpuRequest { cache_share: Some(0.5), ..request(whole, None) }), "--cache-share");
            assert_eq!(flag(request(whole, Some(1.5))), "--always");
            let too_small = GpuPlan::new(&open(), request(least, Some(0.9)));
            assert!(matches!(too_small, Err(Error::VramTooSmall { needed_bytes, .. }) if needed_bytes > least));
        }
    }
}

/// Sketches that VRAM has no room for come from pinned memory: every token reads them over the link, and is the same to the bit.
#[test]
fn sketches_that_do_not_fit_cross_the_link() {
    for (how, rows, share) in [
        (SKETCHED, false, 0.0),
        (SKETCHED, true, 0.5),
        (RESIDUALS, true, 0.0),
        (RESIDUALS, true, 1.0),
        (FEWER_BITS, true, 0.5),
    ] {
        let (_guard, dir) = with_thresholds(&split(&four_layers(), "q4", how), rows);
        let open = || Split::open(&dir).unwrap();
        let config = open().manifest().config.clone();
        let (least, _) = vram_range_of(&open(), &device(), Mode::Sparse { active: 0.3 });
        let request = |vram: u64| {
            let request = gpu_request(&device(), Mode::Sparse { active: 0.3 }, vram, None);
            GpuRequest { base: PlanRequest { always: Some(0.0), ..request.base }, ..request }
        };
        let of_layer = GpuPlan::new(&open(), request(least)).unwrap().fixed.predictors / 2;
        let mut before: Option<(u64, u64, Vec<Vec<f32>>)> = None;
        for (n, streamed) in [(2, 0), (1, 3), (0, 4)] {
            let what = format!("{how:?}, {streamed} streamed, host {share}");
            let mut gpu = agree(&open, request(least + n * of_layer), share, &what);
            let plan = gpu.plan().clone();
            assert_eq!((plan.streamed_sketches, plan.hot_bytes), (streamed, 0), "{what}");
            assert_eq!(plan.streamed_bytes_per_token, streamed as u64 * of_layer, "{what}");
            let would_help = streamed > 0 && how != FEWER_BITS;
            assert_eq!(plan.streamed_in_two_bits.is_some(), would_help, "{what}");
            assert!(
                plan.streamed_in_two_bits.is_none_or(|fewer| fewer < streamed as u64 * of_layer),
                "{what}: {plan:?}"
            );
            // A device that refuses is asked for less as long as there is something that need not be there.
            assert_eq!(plan.spare_sketch_bytes, n * of_layer, "{what}");
            let smaller = plan.smaller().map(|request| GpuPlan::new(&open(), request).unwrap().total_bytes);
            assert!(smaller.map_or(n == 0, |total| total < plan.total_bytes), "{what}: {smaller:?}");
            gpu.clear();
            let start = gpu.account();
            let mut logits = vec![gpu.prefill(&[1, 2, 3]).unwrap()];
            let prompt = gpu.account().link_bytes - start.link_bytes;
            logits.extend((3..6).map(|token| gpu.forward(token).unwrap()));
            let link = gpu.account().link_bytes - start.link_bytes - prompt;
            let Some((resident_prompt, resident_link, want)) = &before else {
                before = Some((prompt, link, logits));
                continue;
            };
            assert_eq!(&logits, want, "{what}: a sketch is the same wherever it comes from");
            // A token reads them once, a prompt where residuals are added to them. What crosses is what there is, without the places' room.
            let crossed = link - resident_link;
            let most = 3 * plan.streamed_bytes_per_token;
            assert!(
                crossed <= most && most - crossed <= (3 * 6 * 256 * streamed) as u64,
                "{what}: {crossed} of {most}"
            );
            assert_eq!(prompt > *resident_prompt, plan.residuals, "{what}");
            assert!(gpu.account().early_link_bytes >= crossed, "{what}");
        }
        // The threads' share and the RAM budget count them.
        let plan = GpuPlan::new(&open(), request(least)).unwrap();
        let within = |ram: u64| {
            let base = PlanRequest { ram_budget_bytes: Some(ram), ..request(least).base };
            GpuPlan::new(&open(), GpuRequest { base, ..request(least) })
        };
        // And what an audit takes.
        assert!(plan.audit_bytes > (4 * config.n_layers * config.intermediate_size) as u64);
        let all = plan.pinned_bytes + plan.host_sketch_bytes + plan.audit_bytes;
        assert!(within(all).is_ok());
        let refused = within(all - 1).unwrap_err().to_string();
        assert!(refused.contains("sketches"), "{refused}");
        assert!(plan.host_bytes_per_token > plan.streamed_bytes_per_token && config.n_layers == 4);
    }
}

/// Layers whose sketches VRAM has no room for, left to the host's threads: whoever chooses and computes them, by whatever rule, in
/// whatever encodings, it is what the CPU engine does.
#[test]
fn layers_that_the_host_chooses_and_computes_are_those_of_the_cpu_engine() {
    let mode = Mode::Sparse { active: 0.3 };
    for (encoding, how, thresholds) in [
        ("q4", SKETCHED, None),
        ("q4", SKETCHED, Some(false)),
        ("q4", SKETCHED, Some(true)),
        ("q4", RESIDUALS, Some(true)),
        ("q4", FEWER_BITS, Some(true)),
        ("q4,hot@0.25=q8", SKETCHED, Some(true)),
        ("bf16x", SKETCHED, Some(true)),
    ] {
        let made = split(&four_layers(), encoding, how);
        let with = thresholds.map(|rows| with_thresholds(&made, rows));
        let dir = with.as_ref().map_or(made.as_path(), |(_guard, dir)| dir);
        let open = || Split::open(dir).unwrap();
        let config = open().manifest().config.clone();
        let (least, _) = vram_range_of(&open(), &device(), mode);
        let request = |layers: usize| {
            let request = gpu_request(&device(), mode, least, None);
            let base = PlanRequest { always: Some(0.0), ..request.base };
            GpuRequest { base, host_layers: Some(layers), ..request }
        };
        let mut computed = Vec::new();
        // The emulator is slow: once all of it.
        let is_plain = encoding == "q4" && thresholds.is_none();
        for &layers in if is_plain { &[0, 1, 3, 4][..] } else { &[1, 4] } {
            let what = format!("{encoding}, {how:?}, thresholds {thresholds:?}, {layers} layers of the host");
            let mut gpu = agree(&open, request(layers), 1.0, &what);
            assert_eq!((gpu.host_layers(), gpu.plan().host_layers()), (layers, 4), "{what}");
            computed.push(gpu.account().neurons_computed);
            let before = gpu.account();
            gpu.forward(5).unwrap();
            let (after, streamed) = (gpu.account(), gpu.plan().streamed_bytes_per_token);
            // The threads have all rows but those of neurons whose down row is not read, and the link the sketches of the other
            // layers, without the places' room.
            let (crossed, most) = (after.link_bytes - before.link_bytes, streamed * (4 - layers as u64) / 4);
            let row_bytes = open().layers()[0].bundles().of(0).bundle_bytes() / 3;
            let others =
                if thresholds == Some(true) { config.intermediate_size / 8 * row_bytes * (4 - layers) } else { 0 };
            assert!(
                crossed <= most + others as u64 && most <= crossed + (6 * 256 * (4 - layers)) as u64,
                "{what}: {crossed} of {most}, and at most {others} of rows"
            );
            if is_plain && layers == 4 {
                let rows = open().sketch_form().row_bytes(config.hidden_size);
                let (n, n_active) = (config.intermediate_size, n_active(0.3, config.intermediate_size));
                let bundles = open().layers()[0].bundles().clone();
                let active = gpu.last_active().unwrap();
                assert_eq!(active.len(), n_active, "{what}");
                let of_layer = n * (rows[0] + rows[1] + 16) + (n - n_active) * rows[2];
                let all = config.n_layers * (of_layer + n_active * bundles.of(0).bundle_bytes());
                assert_eq!(after.bytes.host - before.bytes.host, all as u64, "{what}");
                let sketches = after.host_sketch_bytes - before.host_sketch_bytes;
                assert_eq!(sketches, (config.n_layers * of_layer) as u64, "{what}");
            }
        }
        let (most, fewest) = (computed.iter().max().unwrap(), computed.iter().min().unwrap());
        assert!(most - fewest <= most / 20 + 3, "{encoding}, {thresholds:?}: {computed:?}");
        if !is_plain {
            continue;
        }
        // As many as is fastest: all where copies are slow, none where the threads are, or are not there.
        let plan = |host_layers| GpuPlan::new(&open(), GpuRequest { host_layers, ..request(0) }).unwrap();
        let speeds = |host: f64, sketches: f64| GpuSpeeds { device: 4e12, link: 1e6, copies: 1.1e6, host, sketches };
        let predicted = |n, host, sketches| plan(n).predict(&speeds(host, sketches)).host_layers;
        assert_eq!([1e9, 1e3].map(|sketches| predicted(None, 1e9, sketches)), [4, 0]);
        assert_eq!([predicted(None, 0.0, 1e9), predicted(Some(3), 1e9, 1e3)], [0, 3]);
        let tok_s = |n| plan(Some(n)).predict(&speeds(1e9, 1e9)).tok_s;
        assert!((0..4).all(|n| tok_s(n + 1) > tok_s(n)));
        // Half of the rows of the other layers over the link.
        agree(&open, request(2), 0.5, encoding);
        let refused = |request: GpuRequest, share: f32| {
            let loaded = GpuPlan::new(&open(), request)
                .and_then(|plan| GpuEngine::load(open(), plan, device(), Some(share), &|_, _| ()));
            matches!(loaded, Err(Error::Setting { flag: "--cpu-layers", .. }))
        };
        let exact = gpu_request(&device(), Mode::Exact, 2 * least, None);
        assert!(refused(request(5), 1.0) && refused(request(1), 0.0) && !refused(request(0), 0.0));
        assert!(refused(GpuRequest { host_layers: Some(1), ..exact }, 1.0));
    }
}

/// A copy of a split with thresholds of neurons or of rows, around the costs that the second layer's sketch tells of an input of ones.
fn with_thresholds(of: &Path, rows: bool) -> (tempfile::TempDir, PathBuf) {
    let (guard, dir) = support::copy(of);
    let split = Split::open(&dir).unwrap();
    let config = split.manifest().config.clone();
    let rms = (0..config.n_layers).map(|l| 1.0 + l as f32).collect();
    let (always, active) = (vec![0.0f32, 0.5], vec![0.1f32, 0.5]);
    let sketch = split.sketch(1).unwrap().unwrap();
    let costs = (0..sketch.n_neurons()).flat_map(|i| match rows {
        true => sketch.row_costs(config.activation, i, 0.3, 0.3).map(f32::sqrt).to_vec(),
        false => vec![sketch.judge(config.activation, i, 0.3, 0.3).0],
    });
    let mut costs: Vec<f32> = costs.collect();
    costs.sort_by(f32::total_cmp);
    let at = |share: usize| costs[costs.len() * share / 100] / 2.0;
    let mut thresholds =
        GradedThresholds::new(rms, always.clone(), active.clone(), vec![at(80), at(40), at(80), at(40)]).unwrap();
    if rows {
        thresholds = thresholds.of_rows((0..config.n_layers).map(|l| [1.0 + 0.1 * l as f32, 0.9]).collect()).unwrap();
    }
    let curve = |&always: &f32| GradedCurve {
        always,
        curve: Curve::new(active.clone(), vec![0.1; 2], vec![0.1; 2], 10, 3).unwrap(),
    };
    let curves = GradedCurves::new(thresholds, always.iter().map(curve).collect()).unwrap();
    Split::put_graded_curves(&dir, &curves).unwrap();
    (guard, dir)
}

/// Thresholds in place of a share: as many neurons as the CPU engine computes, which differ from layer to layer.
#[test]
fn graded_thresholds_choose_as_on_the_cpu() {
    let made = split(&four_layers(), "q4", SKETCHED);
    let (_guard, dir) = with_thresholds(&made, false);
    let open = || Split::open(&dir).unwrap();
    let config = open().manifest().config.clone();
    let mode = Mode::Sparse { active: 0.3 };
    let (least, whole) = vram_range_of(&open(), &device(), mode);
    for (vram, share) in [(least, 0.0), (least + (whole - least) / 2, 0.6)] {
        let what = format!("{vram} bytes, host {share}");
        let gpu = agree(&open, gpu_request(&device(), mode, vram, None), share, &what);
        let (computed, all) = (gpu.account().neurons_computed, gpu.account().neurons_total);
        let always = 8 * (config.n_layers * gpu.plan().always_neurons) as u64;
        assert!(computed > always && computed < all, "{what}: {computed} of {all}");
        let alike = (8 * config.n_layers) as u64 * n_active(0.3, config.intermediate_size) as u64;
        assert!(always > 0 || computed != alike, "{what}");
    }
}

/// Single rows of neurons, wherever these lie, whoever computes them, in whatever encodings; where rows are streams, all of a neuron.
#[test]
fn single_rows_are_read_as_on_the_cpu() {
    let splits = [
        (four_layers(), "q4", SKETCHED),
        (four_layers(), "q4,hot@0.25=q8", SKETCHED),
        (llama(), "bf16", SKETCHED),
        (qwen_relu(), "q8", SKETCHED),
        (llama(), "bf16x", SKETCHED),
        (four_layers(), "q4", RESIDUALS),
        (four_layers(), "q4", FEWER_BITS),
        (llama(), "bf16", RESIDUALS),
    ];
    for (made, encoding, how) in splits {
        let (_guard, dir) = with_thresholds(&split(&made, encoding, how), true);
        let open = || Split::open(&dir).unwrap();
        let mode = Mode::Sparse { active: 0.3 };
        let (least, whole) = vram_range_of(&open(), &device(), mode);
        let sketch_bytes: u64 = open().sketches().unwrap().tensors().iter().map(|t| t.bytes).sum();
        let mut computed = Vec::new();
        for (vram, always, share) in [
            (least, Some(0.0), 0.0),
            (least, Some(0.0), 0.5),
            (least, Some(0.0), 1.0),
            (whole + sketch_bytes, Some(0.0), 0.0),
            (least + (whole - least) / 2, None, 0.4),
        ] {
            let what = format!("{encoding}, {vram} bytes, always {always:?}, host {share}");
            let request = gpu_request(&device(), mode, vram, None);
            let request = GpuRequest { base: PlanRequest { always, ..request.base }, ..request };
            let gpu = agree(&open, request, share, &what);
            let account = gpu.account();
            assert_eq!(gpu.plan().residuals, how.contains(&"--residuals"), "{what}");
            let of_always = (8 * gpu.plan().hot_neurons.len() * gpu.plan().always_neurons) as u64;
            assert!(account.neurons_computed > of_always && account.neurons_computed < account.neurons_total, "{what}");
            if always.is_some() {
                computed.push(account.neurons_computed);
            }
            assert_eq!(account.cache_hits, 0, "{what}");
        }
        // Who reads them and where they lie changes nothing of what is read, but what is near a threshold.
        let (most, fewest) = (computed.iter().max().unwrap(), computed.iter().min().unwrap());
        assert!(most - fewest <= most / 20 + 3, "{encoding}: {computed:?}");
    }
}

/// Audits find what the CPU engine's find, and change no bit of what is computed.
#[test]
fn audits_say_what_the_cpu_engine_says_and_change_nothing() {
    let mode = Mode::Sparse { active: 0.3 };
    let sketched = split(&four_layers(), "q4,hot@0.25=q8", SKETCHED);
    let residuals = split(&four_layers(), "q4", RESIDUALS);
    let (_guard, residuals) = with_thresholds(&residuals, true);
    for dir in [demo("q4"), sketched, residuals] {
        let (least, whole) = vram_range(&dir, &device(), mode);
        let is_sketched = Split::open(&dir).unwrap().sketches().is_some();
        let hosts = if is_sketched { vec![(least, 0.5, 3)] } else { Vec::new() };
        for (vram, share, layers) in [(whole, 0.0, 0), (least + (whole - least) / 3, 0.5, 0)].into_iter().chain(hosts) {
            let what = format!("{}, {vram} bytes, host {share}, {layers} of its layers", dir.display());
            // What is fetched early is the device's to compute: two engines must not each find their own number of it.
            let lookahead = (!is_sketched).then_some(8);
            let request_of_host =
                || GpuRequest { host_layers: Some(layers), lookahead, ..gpu_request(&device(), mode, vram, None) };
            let gpu = || gpu(&dir, request_of_host(), share);
            let (mut plain, mut audited) = (gpu(), gpu());
            let n = audited.split().manifest().config.intermediate_size as f32;
            let always = audited.is_graded().then(|| audited.plan().always_neurons as f32 / n);
            let mut cpu = engine(&dir, PlanRequest { always, ..request(mode, None, 2) }).unwrap();
            cpu.start_audit(2).unwrap();
            audited.start_audit(2).unwrap();
            for token in tokens(6, cpu.split().manifest().config.vocab_size) {
                cpu.forward(&[token], Logits::Last).unwrap();
                assert_eq!(audited.forward(token).unwrap(), plain.forward(token).unwrap(), "{what}");
            }
            assert_eq!(format!("{:?}", audited.account()), format!("{:?}", plain.account()), "{what}");
            let (want, got) = (cpu.audit().unwrap(), Decoder::audit(&audited).unwrap());
            assert!(Decoder::audit(&plain).is_none() && got.seconds > 0.0);
            assert_eq!((got.every, got.tokens, got.layers.len()), (2, 3, want.layers.len()));
            for (got, want) in got.layers.iter().zip(&want.layers) {
                let figures = |l: &LayerAudit| [l.quality.recall, l.quality.energy_recall, l.output_error];
                for (got, want) in figures(got).into_iter().zip(figures(want)) {
                    assert!((got - want).abs() < 0.005, "{what}: {got}, the CPU {want}");
                }
            }
            audited.start_audit(0).unwrap();
            assert!(Decoder::audit(&audited).is_none());
        }
        let mut exact = gpu_of(Split::open(&dir).unwrap(), gpu_request(&device(), Mode::Exact, whole * 2, None), 0.0);
        assert!(matches!(exact.start_audit(2), Err(Error::Setting { flag: "--audit-every", .. })));
    }
}

/// Where no share is given, some are tried; nothing of that is left in the account.
#[test]
fn a_share_is_found_where_none_is_given() {
    let dir = split(&llama(), "q4", &["--chunk-neurons", "8"]);
    for mode in [Mode::Exact, Mode::Sparse { active: 0.5 }] {
        let (least, _) = vram_range(&dir, &device(), mode);
        let split = Split::open(&dir).unwrap();
        let request = GpuRequest { lookahead: Some(0), ..gpu_request(&device(), mode, least, Some(0.0)) };
        let plan = GpuPlan::new(&split, request).unwrap();
        let mut gpu = GpuEngine::load(split, plan, device(), None, &|_, _| ()).unwrap();
        let (share, account) = (gpu.host_share(), gpu.account());
        assert!(!gpu.host_share_given() && gpu.is_empty() && (0.0..=1.0).contains(&share), "{mode:?}: {share}");
        assert_eq!((account.neurons_total, account.bytes.host), (0, 0), "{mode:?}");
        assert!(gpu.measured().host > 0.0, "{mode:?}");
        gpu.forward(1).unwrap();
        assert_eq!(gpu.host_share(), share, "{mode:?}: the same for every token");
        let account = gpu.account();
        assert_eq!(account.bytes.host > account.link_bytes, share > 0.0, "{mode:?}");
    }
    // And layers of the host.
    let (dir, mode) = (split(&four_layers(), "q4", SKETCHED), Mode::Sparse { active: 0.5 });
    let (least, _) = vram_range(&dir, &device(), mode);
    let open = || Split::open(&dir).unwrap();
    let request = GpuRequest { host_layers: None, ..gpu_request(&device(), mode, least, None) };
    let plan = GpuPlan::new(&open(), request).unwrap();
    let mut gpu = GpuEngine::load(open(), plan, device(), None, &|_, _| ()).unwrap();
    let (layers, predicted) = (gpu.host_layers(), gpu.predicted());
    assert!(layers <= 4 && predicted.host_layers <= 4 && gpu.measured().sketches > 0.0);
    assert_eq!(predicted.formula.contains("of sketches / "), predicted.host_layers > 0, "{}", predicted.formula);
    assert_eq!((gpu.account().neurons_total, gpu.account().bytes.host), (0, 0));
    gpu.forward(1).unwrap();
    assert_eq!(gpu.host_layers(), layers);
}

/// Of a sketch a token reads gate and up rows of all neurons that it has, and down rows of those that are not computed.
#[test]
fn bytes_of_sketches_are_those_of_the_rows_that_are_read() {
    let dir = split(&llama(), "q4", SKETCHED);
    let mode = Mode::Sparse { active: 0.25 };
    let (_, whole) = vram_range(&dir, &device(), mode);
    let request = gpu_request(&device(), mode, 2 * whole, None);
    let request = GpuRequest { base: PlanRequest { always: Some(0.25), ..request.base }, ..request };
    let mut gpu = gpu(&dir, request, 0.0);
    gpu.forward(3).unwrap();
    let (config, fixed) = (gpu.split().manifest().config.clone(), gpu.plan().fixed);
    let n_active = gpu.account().neurons_computed;
    let down_row = gpu.split().sketch_form().row_bytes(config.hidden_size)[2] as u64;
    let bundle = gpu.split().layers()[0].bundles().of(0).bundle_bytes() as u64;
    let kv = (4 * config.n_layers * config.n_kv_heads * config.head_dim) as u64;
    let n_always = (config.n_layers * gpu.plan().always_neurons) as u64;
    assert!(n_always > 0 && n_always < n_active);
    let want = fixed.matrices + fixed.predictors + kv + n_active * bundle - (n_active - n_always) * down_row;
    assert_eq!(gpu.account().bytes.device, want);
}

/// Where hot neurons end in a layer, by its first section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HotEnds {
    Nowhere,
    InTheFirst,
    BehindTheFirst,
    AtTheEnd,
}

/// Budgets with which hot neurons of some layer end there and there. Plans for these and others fill them, by bytes.
fn budgets_by_hot_end(split: &Split, device: &Device, mode: Mode) -> Vec<(HotEnds, u64)> {
    let ends = |plan: &GpuPlan| -> Vec<HotEnds> {
        let of_layer = |(file, &hot): (&LayerFile, &usize)| {
            let (first, n) = (file.bundles().sections()[0].neurons().end, file.order().len());
            match hot {
                0 => HotEnds::Nowhere,
                _ if hot < first && first < n => HotEnds::InTheFirst,
                _ if hot < n => HotEnds::BehindTheFirst,
                _ => HotEnds::AtTheEnd,
            }
        };
        split.layers().iter().zip(&plan.hot_neurons).map(of_layer).collect()
    };
    let (least, whole) = vram_range_of(split, device, mode);
    // What rounding leaves: a chunk and a neuron of each layer, and the alignment of memory.
    let chunk = |f: &LayerFile| (f.chunk_neurons() + 1) * f.bundles().longest(0..f.order().len()) + 512;
    let rest = split.layers().iter().map(chunk).sum::<usize>() as u64;
    let planned = (0..=16).map(|i| {
        let vram = least + (whole - least) * i / 16;
        let plan = GpuPlan::new(split, gpu_request(device, mode, vram, Some(0.0))).unwrap();
        assert!(plan.total_bytes <= vram && plan.total_bytes + rest >= vram, "{} of {vram}", plan.total_bytes);
        (ends(&plan), vram)
    });
    let planned: Vec<_> = planned.collect();
    let with = |end: HotEnds| planned.iter().find(|(ends, _)| ends.contains(&end)).map(|(_, vram)| (end, *vram));
    [HotEnds::Nowhere, HotEnds::InTheFirst, HotEnds::BehindTheFirst, HotEnds::AtTheEnd]
        .into_iter()
        .filter_map(with)
        .collect()
}

/// Layers in encodings of their own; layers of several sections, in files of their own and by further planes of some neurons.
#[test]
fn layers_that_differ_and_layers_of_several_encodings_give_what_the_cpu_engine_gives() {
    let chunks = &["--chunk-neurons", "8"][..];
    let splits = [
        ("q4,0=bf16x,2=q8", "base", false),
        ("q4,hot@0.25=q8", "base", true),
        ("q8+exact,1-2:hot@0.5=bf16,3=q4", "plus", true),
        ("q4+exact", "plus@0.3", true),
        ("q4,hot@0.6=q8+exact,hot@0.2=bf16x", "exact@0.4", true),
    ];
    for (encoding, planes, has_sections) in splits {
        let dir = split(&four_layers(), encoding, chunks);
        let open = || Split::open_at(&dir, planes.parse::<Planes>().unwrap()).unwrap();
        for mode in [Mode::Exact, Mode::Sparse { active: 0.3 }] {
            let budgets = budgets_by_hot_end(&open(), &device(), mode);
            assert_eq!(budgets.len() == 4, has_sections, "{encoding} at {planes}: {budgets:?}");
            for (i, (end, vram)) in budgets.into_iter().enumerate() {
                let share = [0.5, 0.0, 1.0][i % 3];
                let what = format!("{encoding} at {planes}, {mode:?}, hot ends {end:?}, host {share}");
                let request = GpuRequest { lookahead: Some(0), ..gpu_request(&device(), mode, vram, Some(0.0)) };
                agree(&open, request, share, &what);
            }
        }
    }
}

/// A plan that has no room for all neurons says what attention in q4 would leave to them.
#[test]
fn plans_say_what_attention_in_q4_would_spare() {
    let mode = Mode::Exact;
    let mut of_q4 = 0;
    for attention in ["q4", "q8", "bf16"] {
        let dir = split(&llama(), "q4", &["--attention-encoding", attention]);
        let split = Split::open(&dir).unwrap();
        let (least, whole) = vram_range_of(&split, &device(), mode);
        let plan = |vram| GpuPlan::new(&split, gpu_request(&device(), mode, vram, None)).unwrap();
        assert_eq!(plan(whole).attention_in_q4_spares, None);
        let (spared, matrices) = (plan(least).attention_in_q4_spares, plan(least).fixed.matrices);
        if attention == "q4" {
            assert_eq!(spared, None);
            of_q4 = matrices;
            continue;
        }
        // Matrices end at a multiple of 256.
        let (spared, rounding) = (spared.unwrap(), (4 * 256 * split.manifest().config.n_layers) as u64);
        assert!(
            spared > 0 && (matrices - of_q4).abs_diff(spared) <= rounding,
            "{attention}: {spared}, {matrices}, {of_q4}"
        );
    }
}

/// Attention in an encoding of its own, under tied and untied heads.
#[test]
fn attention_in_another_encoding_gives_what_the_cpu_engine_gives() {
    for (made, given) in [
        (four_layers(), &["--attention-encoding", "q4"][..]),
        (llama(), &["--attention-encoding", "q4"]),
        (llama(), &["--resident-encoding", "bf16", "--attention-encoding", "q8"]),
    ] {
        let dir = split(&made, "q4", given);
        let open = || Split::open(&dir).unwrap();
        for mode in [Mode::Exact, Mode::Sparse { active: 0.3 }] {
            agree(&open, gpu_request(&device(), mode, 1 << 30, Some(0.0)), 0.0, &format!("{given:?}, {mode:?}"));
        }
    }
}

/// What lies in the last section is cached and fetched early, and nothing else is.
#[test]
fn layers_of_several_encodings_have_caches_and_early_fetching() {
    let dir = split(&four_layers(), "q4,hot@0.1=q8,2=bf16x", &["--chunk-neurons", "8"]);
    let (open, mode) = (|| Split::open(&dir).unwrap(), Mode::Sparse { active: 0.3 });
    let (mut cached, mut left_out) = (0, 0);
    let (least, whole) = vram_range_of(&open(), &device(), mode);
    for eighths in [1, 4, 6] {
        for (cache, ahead, share) in [(0.0, 20, 0.0), (0.5, 0, 0.0), (0.5, 20, 0.5)] {
            let what = format!("{eighths} eighths in VRAM, cache {cache}, ahead {ahead}, host {share}");
            // With room for what is fetched early.
            let vram = least + (whole - least) * eighths / 8 + if ahead > 0 { 1 << 15 } else { 0 };
            let request = GpuRequest { lookahead: Some(ahead), ..gpu_request(&device(), mode, vram, Some(cache)) };
            let gpu = agree(&open, request, share, &what);
            let (plan, account) = (gpu.plan(), gpu.account());
            assert_eq!(account.foreseen > 0, plan.lookahead_neurons > 0, "{what}");
            assert_eq!(account.cache_hits > 0, plan.cache_slots() > 0, "{what}");
            let mut mixed = 0;
            for ((file, &hot), &sets) in open().layers().iter().zip(&plan.hot_neurons).zip(&plan.cache_sets) {
                let several_cold = file.bundles().within(hot..file.order().len()).count() > 1;
                assert!(!several_cold || sets == 0, "{what}");
                mixed += usize::from(several_cold);
                cached += usize::from(sets > 0 && file.bundles().sections().len() > 1);
                left_out += usize::from(several_cold && cache > 0.0);
            }
            assert_eq!(plan.mixed_cold_layers, mixed, "{what}");
        }
    }
    assert!(cached > 0 && left_out > 0, "{cached} with a cache, {left_out} without");
}

/// With one layer the neurons of a token are known, and so are the bytes of each tier.
#[test]
fn bytes_are_those_of_the_sections() {
    let four = four_layers();
    let made = Made { name: "one", model: TinyModel { n_layers: 1, ..four.model }, ..four };
    for (encoding, mode) in [
        ("q4,hot@0.25=q8", Mode::Sparse { active: 0.3 }),
        ("q4,hot@0.25=q8", Mode::Exact),
        ("q8", Mode::Sparse { active: 0.3 }),
    ] {
        let dir = split(&made, encoding, &["--chunk-neurons", "8"]);
        let opened = Split::open(&dir).unwrap();
        let layout = opened.layers()[0].bundles();
        for (end, vram) in budgets_by_hot_end(&opened, &device(), mode) {
            for (cache, share) in [(0.0, 0.0), (0.0, 0.7), (0.5, 0.3)] {
                let mut gpu = gpu(&dir, gpu_request(&device(), mode, vram, Some(cache)), share);
                let (fixed, hot) = (gpu.plan().fixed, gpu.plan().hot_neurons[0]);
                let config = gpu.split().manifest().config.clone();
                for (i, token) in tokens(12, config.vocab_size).into_iter().enumerate() {
                    let before = gpu.account().bytes;
                    gpu.forward(token).unwrap();
                    let read = gpu.account().bytes;
                    let active = match mode {
                        Mode::Exact => (0..layout.n_neurons() as u32).collect(),
                        Mode::Sparse { .. } => gpu.last_active().unwrap(),
                    };
                    let (in_vram, cold): (Vec<u32>, Vec<u32>) = active.iter().partition(|&&n| (n as usize) < hot);
                    let bytes =
                        |ids: &[u32]| -> u64 { ids.iter().map(|&n| layout.of(n as usize).bundle_bytes() as u64).sum() };
                    let kv = 4 * (config.n_kv_heads * config.head_dim * (i + 1)) as u64;
                    let what =
                        format!("{encoding}, {mode:?}, hot ends {end:?}, cache {cache}, host {share}, token {i}");
                    let device = read.device - before.device;
                    assert_eq!(device, fixed.matrices + fixed.predictors + kv + bytes(&in_vram), "{what}");
                    let others = (read.host - before.host) + (read.cache - before.cache);
                    assert_eq!(others, bytes(&cold), "{what}");
                }
            }
        }
    }
}

/// The records of a GPU, of the CPU and of a planted split, as the program writes them, in one report.
#[cfg(feature = "analysis")]
#[test]
fn what_bench_and_run_print_is_reported() {
    use support::text;
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
    // A plan for sparse mode says what exact mode would do.
    for (mode, says) in [("sparse", true), ("exact", false)] {
        let path = record("plan", true, &["plan", "-m", model, "--mode", mode, "--json"]);
        let plan: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert_eq!(plan["predicted_exact"]["tok_s"].as_f64().is_some_and(|speed| speed > 0.0), says, "{plan}");
    }
}
