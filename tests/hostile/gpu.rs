//! A GPU that refuses memory and one that fails (cases 32 and 33): the emulated one, with a fault
//! (`kernels/src/cuda/fault.rs`).

use crate::harness::Table;
use crate::support::{Ran, bits, llama, prompt, request, split, text, thermocline};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;
use thermocline_kernels::cuda::launch::ffn_blocks;
use thermocline_kernels::cuda::{CudaError, Device, EmulatedFault, build_emulator};
use thermocline_runtime::{Error, GpuEngine, GpuPlan, GpuRequest, Mode};
use thermocline_split::Split;

/// The emulated device's memory is the process's: model, buffers, the stacks of a block's threads.
const DEVICE_BYTES: u64 = 128 << 20;

/// Nothing here takes so long, on any machine, unless a thread waits for ever.
const FOR_EVER: Duration = Duration::from_secs(300);

fn emulator() -> PathBuf {
    build_emulator(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap()
}

fn tiny() -> PathBuf {
    split(&llama(), "q4", &["--chunk-neurons", "8", "--order", "random"])
}

/// Variables that give the program an emulated GPU, with a fault.
fn on_gpu(fault: &str) -> [(&'static str, String); 3] {
    let emulator = text(&emulator()).to_owned();
    [
        ("THERMOCLINE_VRAM_BUDGET", "1GiB".to_owned()),
        ("THERMOCLINE_CUDA_EMULATOR", emulator),
        ("THERMOCLINE_CUDA_FAULT", fault.to_owned()),
    ]
}

/// A table with the split in its folder, and arguments that answer from it.
fn answering(name: &'static str) -> (Table, Vec<String>) {
    let table = Table::new(name);
    let dir = table.folder().join("SPLIT");
    std::os::unix::fs::symlink(tiny(), &dir).unwrap();
    let run =
        ["run", "-m", text(&dir), "-p", "the lake", "-n", "8", "--temp", "0", "--ignore-eos", "-t", "1", "--json"];
    (table, run.map(str::to_owned).to_vec())
}

fn ends(table: &mut Table, fault: &str, code: i32, case: u8, name: &str, args: &[&str]) -> String {
    let given = on_gpu(fault);
    let given = given.each_ref().map(|(name, value)| (*name, value.as_str()));
    table.ends_with(&given, code, DEVICE_BYTES, case, name, args)
}

#[test]
fn memory_that_is_refused_shrinks_the_hot_neurons_once() {
    let (mut table, run) = answering("gpu-memory");
    let run: Vec<&str> = run.iter().map(String::as_str).collect();
    let said = ends(&mut table, "memory:1", 0, 32, "refused-once", &run);
    assert_eq!(said.matches("trying with").count(), 1, "{said}");
    let said = ends(&mut table, "memory:2", 3, 32, "refused-twice", &run);
    assert_eq!(said.matches("trying with").count(), 1, "{said}");
    let said = ends(&mut table, "memory:1", 3, 32, "no-budget", &[&run[..], &["--vram-budget", "1B"]].concat());
    let least = said.split(" bytes are needed").next().unwrap().rsplit(' ').next().unwrap();
    let least = format!("{least}B");
    ends(&mut table, "memory:1", 3, 32, "nothing-to-shrink", &[&run[..], &["--vram-budget", &least]].concat());
    ends(&mut table, "memory:none", 2, 32, "no-such-fault", &run);
    table.check();
}

/// The smaller plan gives the same answer.
#[test]
fn a_shrunken_plan_answers_as_the_first_would_have() {
    let (_table, run) = answering("gpu-memory");
    let answer = |fault: Option<&str>| -> Value {
        let mut command = thermocline();
        command.envs(on_gpu(fault.unwrap_or_default()));
        if fault.is_none() {
            command.env_remove("THERMOCLINE_CUDA_FAULT");
        }
        let ran: Ran = command.args(&run).output().unwrap().into();
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        serde_json::from_str(&ran.stdout).unwrap()
    };
    let (whole, shrunken) = (answer(None), answer(Some("memory:1")));
    assert_eq!(whole["tokens"], shrunken["tokens"]);
    let hot = |answer: &Value| answer["plan"]["hot_bytes"].as_u64().unwrap();
    assert!(0 < hot(&shrunken) && hot(&shrunken) < hot(&whole), "{} of {}", hot(&shrunken), hot(&whole));
}

#[test]
fn an_error_that_sticks_ends_the_program() {
    let (mut table, run) = answering("gpu-error");
    let run: Vec<&str> = run.iter().map(String::as_str).collect();
    for kernel in [1, 20, 80] {
        ends(&mut table, &format!("kernel:{kernel}"), 1, 33, &format!("kernel-{kernel}"), &run);
    }
    table.check();
}

/// An engine with half of the cold neurons on the host's threads, a cache, and neurons fetched beforehand.
fn load(device: &Device, vram: u64) -> Result<GpuEngine, Error> {
    let split = Split::open(&tiny()).unwrap();
    let request = GpuRequest {
        base: request(Mode::Sparse { active: 0.3 }, None, 2),
        vram_budget_bytes: vram,
        context_bytes: 0,
        n_blocks: ffn_blocks(device),
        cache_share: Some(0.5),
        lookahead: Some(8),
        host_layers: None,
    };
    let plan = GpuPlan::new(&split, request)?;
    GpuEngine::load(split, plan, device.clone(), Some(0.5), &|_, _| ())
}

/// Between the least and what everything takes.
fn budget(device: &Device) -> u64 {
    let least = match load(device, 1) {
        Err(Error::VramTooSmall { needed_bytes, .. }) => needed_bytes,
        other => panic!("a budget of one byte: {:?}", other.err()),
    };
    least + 20_000
}

/// Logits of a prompt and of tokens after it, as bits, up to the first error; and that error. What was loaded is dropped.
fn logits(device: &Device, vram: u64) -> (Vec<Vec<u32>>, Option<Error>) {
    let mut engine = match load(device, vram) {
        Ok(engine) => engine,
        Err(e) => return (Vec::new(), Some(e)),
    };
    let allocated = device.allocated_bytes();
    let tokens = prompt(16);
    let mut answers = Vec::new();
    let mut step = |engine: &mut GpuEngine, i: usize| {
        let answer = if i == 0 { engine.prefill(&tokens[..10]) } else { engine.forward(tokens[9 + i]) };
        answer.map(|logits| answers.push(bits(&logits)))
    };
    let error = (0..7).find_map(|i| step(&mut engine, i).err());
    if error.is_some() {
        assert!(step(&mut engine, 0).is_err() && step(&mut engine, 1).is_err(), "no answer after an error");
    }
    assert_eq!(device.allocated_bytes(), allocated, "the engine asks for no memory while it runs");
    (answers, error)
}

/// The same on a thread of its own, which must come to its end.
fn logits_in_time(fault: EmulatedFault, vram: u64) -> (Vec<Vec<u32>>, Option<Error>) {
    let (sender, receiver) = mpsc::channel();
    let runner = std::thread::spawn(move || {
        let device = Device::faulty(&emulator(), fault).unwrap();
        let _ = sender.send(logits(&device, vram));
    });
    let ended = receiver.recv_timeout(FOR_EVER);
    assert!(!matches!(ended, Err(mpsc::RecvTimeoutError::Timeout)), "{fault:?}: it hangs");
    runner.join().unwrap();
    ended.unwrap()
}

#[test]
fn an_engine_whose_device_fails_ends_with_an_error_and_no_wrong_logits() {
    let sound = Device::emulated(&emulator()).unwrap();
    let vram = budget(&sound);
    let (expected, error) = logits(&sound, vram);
    assert!(error.is_none() && expected.len() == 7, "{error:?}");
    let fails_at = |kernel: u64| {
        let (got, error) = logits_in_time(EmulatedFault::Kernel(kernel), vram);
        assert!(expected.starts_with(&got), "kernel {kernel}: wrong logits");
        match error {
            None => assert_eq!(got.len(), 7),
            Some(Error::Cuda(CudaError::Driver { .. })) => assert!(got.len() < 7, "kernel {kernel}"),
            Some(e) => panic!("kernel {kernel}: {e:?}"),
        }
        got.len()
    };
    // The first number beyond the last kernel.
    let beyond = (0..).map(|i| 1u64 << i).find(|&kernel| fails_at(kernel) == 7).unwrap();
    // Spread evenly, and in step with no layer.
    let mut stages = [0; 8];
    for i in 0..24 {
        let share = (f64::from(i) * 0.618_034).fract();
        stages[fails_at(1 + (share * beyond as f64) as u64)] += 1;
    }
    assert!(
        stages.iter().filter(|&&n| n > 0).count() >= 6,
        "failures at load, in the prompt and in tokens: {stages:?}"
    );
}

#[test]
fn an_engine_that_was_refused_memory_can_be_loaded_with_less() {
    let sound = Device::emulated(&emulator()).unwrap();
    let vram = budget(&sound);
    let (expected, _) = logits(&sound, vram);
    let device = Device::faulty(&emulator(), EmulatedFault::Memory(1)).unwrap();
    match load(&device, 10 * vram) {
        Err(Error::VramRefused { needed_bytes, source: CudaError::OutOfMemory { bytes, free_bytes } }) => {
            assert!(needed_bytes == bytes as u64 && free_bytes > bytes, "{needed_bytes}, {bytes} of {free_bytes}");
        }
        other => panic!("{:?}", other.err()),
    }
    assert_eq!(device.allocated_bytes(), 0);
    let (got, error) = logits(&device, vram);
    assert!(error.is_none() && got == expected, "{error:?}");
}
