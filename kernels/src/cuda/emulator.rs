//! The backend for machines without a GPU: the same kernel sources, compiled for the CPU, one thread of the grid after
//! another. For tests and for debugging; it computes in hours what a GPU does in seconds.

use super::backend::{Arg, Backend, BackendEvent, BackendGraph, Launch, Queue};
use super::driver::SOURCES;
use super::error::{CudaError, Result};
use super::fault::{EmulatedFault, Faults};
use crate::AlignedBuf;
use libloading::Library;
use std::any::Any;
use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What the emulator's interface is made of besides the kernels.
const INTERFACE: [&str; 3] = [
    include_str!("../../cuda/emulator/emulator.cpp"),
    include_str!("../../cuda/emulator/emulator.hpp"),
    include_str!("../../cuda/emulator/kernels.hpp"),
];

/// A number that changes with the interface and with every kernel: a library of other sources would read other arguments.
fn abi() -> u32 {
    let mut digest = xxhash_rust::xxh3::Xxh3::new();
    SOURCES.iter().chain(&INTERFACE).for_each(|source| digest.update(source.as_bytes()));
    digest.digest() as u32
}

/// Memory that the emulated device has, so that tests can run out of it.
const MEMORY_BYTES: usize = 4 << 30;

/// The emulator's word for a kernel of which a block did not wait for the kernel before.
const DONE_WITHOUT_WAITING: c_int = 3;

type Emulate = unsafe extern "C" fn(*const c_char, *const u32, *const u32, u32, *mut *mut c_void) -> c_int;

#[derive(Debug)]
pub(super) struct Emulator {
    kernels: Arc<Kernels>,
    blocks: Mutex<HashMap<u64, AlignedBuf>>,
    taken: AtomicUsize,
    recorded: Mutex<Option<Vec<Task>>>,
}

#[derive(Debug)]
struct Kernels {
    emulate: Emulate,
    _library: Library,
    faults: Faults,
    /// The emulator has one set of fibers.
    busy: Mutex<()>,
}

/// What a queue can be given.
#[derive(Debug, Clone)]
enum Task {
    Launch(Launch),
    Copy { to: u64, from: u64, bytes: usize },
    Fill { to: u64, value: u8, bytes: usize },
    Gemm { shape: [usize; 4], a: u64, b: u64, b_is_transposed: bool, c: u64, add: bool },
}

impl Emulator {
    pub(super) fn load(path: &Path, fault: Option<EmulatedFault>) -> Result<Self> {
        let refused = |e: libloading::Error| CudaError::Emulator { path: path.to_owned(), reason: e.to_string() };
        // SAFETY: the library is the one that `build_emulator` makes; it has no constructors but a table of functions.
        let library = unsafe { Library::new(path) }.map_err(refused)?;
        // SAFETY: the types are those of the emulator's header.
        let (found, emulate) = unsafe {
            let abi = library.get::<unsafe extern "C" fn() -> u32>(b"thermocline_emulator_abi\0").map_err(refused)?;
            (abi(), *library.get::<Emulate>(b"thermocline_emulate\0").map_err(refused)?)
        };
        if found != abi() {
            let reason = "made from other sources than this program; build it again".to_owned();
            return Err(CudaError::Emulator { path: path.to_owned(), reason });
        }
        let faults = Faults::new(fault);
        let kernels = Arc::new(Kernels { emulate, _library: library, faults, busy: Mutex::new(()) });
        Ok(Self { kernels, blocks: Mutex::default(), taken: AtomicUsize::new(0), recorded: Mutex::new(None) })
    }

    fn check(&self, call: &'static str) -> Result<()> {
        self.kernels.faults.check(call)
    }

    fn give(&self, call: &'static str, task: Task) -> Result<()> {
        self.check(call)?;
        match &mut *lock(&self.recorded) {
            Some(recorded) => recorded.push(task),
            None => self.kernels.run(&task, false)?,
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Kernels {
    fn run(&self, task: &Task, in_graph: bool) -> Result<()> {
        match task {
            // As on a GPU, the calls after this one say so.
            _ if self.faults.is_broken() => {}
            Task::Launch(_) if self.faults.breaks_at_kernel() => {}
            Task::Launch(launch) => self.launch(launch, in_graph)?,
            // SAFETY: `Device` has checked that both ends are inside live blocks; kernels have ended.
            Task::Copy { to, from, bytes } => unsafe {
                std::ptr::copy(*from as *const u8, *to as *mut u8, *bytes);
            },
            // SAFETY: as above.
            Task::Fill { to, value, bytes } => unsafe { std::ptr::write_bytes(*to as *mut u8, *value, *bytes) },
            Task::Gemm { shape, a, b, b_is_transposed, c, add } => {
                let [m, n, k, stride] = *shape;
                // SAFETY: `gemm` has checked the three sizes; blocks are aligned to pages, offsets to elements.
                let (a, b, c) = unsafe {
                    (
                        std::slice::from_raw_parts(*a as *const half::bf16, m * k),
                        std::slice::from_raw_parts(*b as *const half::bf16, n * k),
                        std::slice::from_raw_parts_mut(*c as *mut f32, (m - 1) * stride + n),
                    )
                };
                let a: Vec<f32> = a.iter().map(|v| v.to_f32()).collect();
                let b: Vec<f32> = b.iter().map(|v| v.to_f32()).collect();
                let mut product = vec![0.0; m * n];
                if *b_is_transposed {
                    crate::matmul(m, n, k, &a, &b, &mut product, false);
                } else {
                    crate::matmul_nn(m, n, k, &a, &b, &mut product, false);
                }
                for (row, product) in c.chunks_mut(stride).zip(product.chunks_exact(n)) {
                    for (c, p) in row.iter_mut().zip(product) {
                        *c = if *add { *c + p } else { *p };
                    }
                }
            }
        }
        Ok(())
    }

    /// `in_graph`: it may begin before the kernel before it has ended.
    fn launch(&self, launch: &Launch, in_graph: bool) -> Result<()> {
        let name = CString::new(launch.kernel.as_str()).map_err(|_| CudaError::NoKernel(launch.kernel.clone()))?;
        let (grid, block) = ([launch.grid[0], launch.grid[1], 1], [launch.block, 1, 1]);
        let mut arguments: Vec<*mut c_void> = launch.args.iter().map(Arg::pointer).collect();
        let _one = lock(&self.busy);
        // SAFETY: `launch` gives each kernel the arguments that its source declares and has checked that what they
        // point to is large enough.
        let code = unsafe {
            (self.emulate)(name.as_ptr(), grid.as_ptr(), block.as_ptr(), launch.shared_bytes, arguments.as_mut_ptr())
        };
        match (code, in_graph) {
            (0, _) | (DONE_WITHOUT_WAITING, false) => Ok(()),
            (DONE_WITHOUT_WAITING, true) => Err(CudaError::Unordered(launch.kernel.clone())),
            _ => Err(CudaError::NoKernel(launch.kernel.clone())),
        }
    }
}

impl Backend for Emulator {
    fn name(&self) -> String {
        "emulated on the CPU".to_owned()
    }

    fn is_emulated(&self) -> bool {
        true
    }

    fn n_multiprocessors(&self) -> usize {
        4
    }

    fn shared_bytes(&self) -> usize {
        // Of the consumer GPUs.
        99 << 10
    }

    fn cache_bytes(&self) -> usize {
        1 << 20
    }

    fn memory(&self) -> Result<(usize, usize)> {
        self.check("cuMemGetInfo")?;
        Ok((MEMORY_BYTES - self.taken.load(Ordering::Relaxed), MEMORY_BYTES))
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        let free_bytes = MEMORY_BYTES - self.taken.load(Ordering::Relaxed);
        self.check("cuMemAlloc")?;
        if bytes > free_bytes || self.kernels.faults.refuses_memory() {
            return Err(CudaError::OutOfMemory { bytes, free_bytes });
        }
        let mut block = AlignedBuf::zeroed(bytes)?;
        // What nobody wrote must not look like something.
        block.fill(0xa5);
        let address = block.as_ptr() as u64;
        self.taken.fetch_add(bytes, Ordering::Relaxed);
        lock(&self.blocks).insert(address, block);
        Ok(address)
    }

    fn free(&self, address: u64, bytes: usize) {
        lock(&self.blocks).remove(&address);
        self.taken.fetch_sub(bytes.max(16), Ordering::Relaxed);
    }

    fn pin(&self, host: *mut u8, _: usize) -> Result<u64> {
        self.check("cuMemHostRegister")?;
        Ok(host as u64)
    }

    fn unpin(&self, _: *mut u8) {}

    fn upload(&self, to: u64, from: &[u8]) -> Result<()> {
        self.check("cuMemcpyHtoDAsync")?;
        self.kernels.run(&Task::Copy { to, from: from.as_ptr() as u64, bytes: from.len() }, false)
    }

    fn download(&self, to: &mut [u8], from: u64) -> Result<()> {
        self.check("cuMemcpyDtoH")?;
        self.kernels.run(&Task::Copy { to: to.as_mut_ptr() as u64, from, bytes: to.len() }, false)
    }

    fn copy(&self, _: Queue, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.give("cuMemcpyAsync", Task::Copy { to, from, bytes })
    }

    fn fill(&self, to: u64, value: u8, bytes: usize) -> Result<()> {
        self.give("cuMemsetD8Async", Task::Fill { to, value, bytes })
    }

    fn launch(&self, _: Queue, launch: Launch) -> Result<()> {
        self.give("cuLaunchKernelEx", Task::Launch(launch))
    }

    fn mark(&self, _: Queue) -> Result<Box<dyn BackendEvent>> {
        self.record()
    }

    fn wait(&self, _: Queue, _: &dyn BackendEvent) -> Result<()> {
        self.check("cuStreamWaitEvent")
    }

    fn begin_capture(&self) -> Result<()> {
        self.check("cuStreamBeginCapture")?;
        *lock(&self.recorded) = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<Box<dyn BackendGraph>> {
        let tasks = lock(&self.recorded).take().unwrap_or_default();
        self.check("cuStreamEndCapture")?;
        Ok(Box::new(EmulatedGraph { kernels: Arc::clone(&self.kernels), tasks }))
    }

    fn synchronize(&self) -> Result<()> {
        self.check("cuStreamSynchronize")
    }

    fn record(&self) -> Result<Box<dyn BackendEvent>> {
        self.check("cuEventRecord")?;
        Ok(Box::new(EmulatedEvent(Instant::now())))
    }

    fn gemm(&self, shape: [usize; 4], a: u64, b: u64, b_is_transposed: bool, c: u64, add: bool) -> Result<()> {
        self.give("cublasLtMatmul", Task::Gemm { shape, a, b, b_is_transposed, c, add })
    }
}

#[derive(Debug)]
struct EmulatedGraph {
    kernels: Arc<Kernels>,
    tasks: Vec<Task>,
}

impl BackendGraph for EmulatedGraph {
    fn start(&self) -> Result<()> {
        self.kernels.faults.check("cuGraphLaunch")?;
        self.tasks.iter().try_for_each(|task| self.kernels.run(task, true))
    }
}

#[derive(Debug)]
struct EmulatedEvent(Instant);

impl BackendEvent for EmulatedEvent {
    fn since(&self, earlier: &dyn BackendEvent) -> Result<f64> {
        let earlier: Option<&Self> = earlier.as_any().downcast_ref();
        Ok(earlier.map_or(0.0, |e| (self.0 - e.0).as_secs_f64() * 1e3))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Compiles the emulator from this crate's sources with `g++` and returns the library's path, in `folder`; nothing is
/// done if it is there already for the same sources. Several processes may ask at the same time.
///
/// # Errors
/// If there is no compiler, or it refuses the sources.
pub fn build_emulator(folder: &Path) -> Result<PathBuf> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let refused = |path: &Path| {
        let path = path.to_owned();
        move |e: std::io::Error| CudaError::Emulator { path, reason: e.to_string() }
    };
    let mut digest = xxhash_rust::xxh3::Xxh3::new();
    for folder in [sources.clone(), sources.join("emulator")] {
        let entries = std::fs::read_dir(&folder).map_err(refused(&folder))?;
        let mut files: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
        files.sort();
        for file in files {
            if file.extension().is_some_and(|e| ["cu", "cuh", "cpp", "h", "hpp", "S"].iter().any(|x| e == *x)) {
                digest.update(&std::fs::read(&file).map_err(refused(&file))?);
            }
        }
    }
    let library = folder.join(format!("emulator-{:016x}.so", digest.digest()));
    std::fs::create_dir_all(folder).map_err(refused(folder))?;
    let lock_path = folder.join("emulator.lock");
    let lock = std::fs::File::create(&lock_path).map_err(refused(&lock_path))?;
    lock.lock().map_err(refused(&lock_path))?;
    if library.exists() {
        return Ok(library);
    }
    let unfinished = library.with_extension("partial");
    let mut command = Command::new("g++");
    command.args(["-O2", "-g1", "-std=c++17", "-shared", "-fPIC", "-DTHERMOCLINE_EMULATED", "-x", "c++", "-o"]);
    command.arg(&unfinished).arg(format!("-DTHERMOCLINE_ABI={}u", abi()));
    let output = command.arg(sources.join("emulator/emulator.cpp")).output();
    let output = output.map_err(refused(Path::new("g++")))?;
    if !output.status.success() {
        return Err(CudaError::Compile(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    std::fs::rename(&unfinished, &library).map_err(refused(&library))?;
    Ok(library)
}
