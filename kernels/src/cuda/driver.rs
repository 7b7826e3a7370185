//! The backend for real GPUs: the CUDA driver, loaded at run time.

use super::backend::{Backend, BackendEvent, BackendGraph, Launch, Queue};
use super::error::{CudaError, Result};
use cudarc::cublaslt::{result as lt, sys as lt_sys};
use cudarc::driver::{DriverError, result, sys};
use std::any::Any;
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// The kernels for the architectures that `kernels/cuda/build.sh` names, and PTX for later ones.
const FATBIN: &[u8] = include_bytes!("../../cuda/thermocline.fatbin");

/// In the order in which each may use what comes before it.
pub(super) const SOURCES: [&str; 28] = [
    include_str!("../../cuda/platform.cuh"),
    include_str!("../../cuda/decode.cuh"),
    include_str!("../../cuda/reduce.cuh"),
    include_str!("../../cuda/input.cuh"),
    include_str!("../../cuda/shares.cuh"),
    include_str!("../../cuda/embed.cu"),
    include_str!("../../cuda/gemv.cu"),
    include_str!("../../cuda/gemv_int.cu"),
    include_str!("../../cuda/attention.cu"),
    include_str!("../../cuda/expected.cuh"),
    include_str!("../../cuda/predict.cu"),
    include_str!("../../cuda/scores.cuh"),
    include_str!("../../cuda/foresee.cuh"),
    include_str!("../../cuda/choose.cu"),
    include_str!("../../cuda/divide.cu"),
    include_str!("../../cuda/ask.cu"),
    include_str!("../../cuda/ffn.cu"),
    include_str!("../../cuda/trellis.cuh"),
    include_str!("../../cuda/sketch.cu"),
    include_str!("../../cuda/fetch.cu"),
    include_str!("../../cuda/prefill.cu"),
    include_str!("../../cuda/prefill_residual.cu"),
    include_str!("../../cuda/attend_rows.cu"),
    include_str!("../../cuda/exact.cuh"),
    include_str!("../../cuda/exact_team.cuh"),
    include_str!("../../cuda/ffn_exact.cu"),
    include_str!("../../cuda/gemv_exact.cu"),
    include_str!("../../cuda/prefill_exact.cu"),
];

/// Dynamic shared memory that every kernel may take without asking: with its own arrays it must stay below 48 KiB.
const PLAIN_SHARED_BYTES: u32 = 4 << 10;

/// Scratch memory that cuBLASLt may use; its advice for Hopper.
const GEMM_WORKSPACE_BYTES: usize = 32 << 20;

#[derive(Debug)]
pub(super) struct Driver {
    device: sys::CUdevice,
    context: sys::CUcontext,
    module: sys::CUmodule,
    compute: sys::CUstream,
    copies: sys::CUstream,
    name: String,
    n_multiprocessors: usize,
    shared_bytes: usize,
    cache_bytes: usize,
    functions: Mutex<HashMap<String, Function>>,
    capturing: AtomicBool,
    gemm: OnceLock<Result<GemmLibrary>>,
}

#[derive(Debug, Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    /// Dynamic shared memory that it may take.
    shared_bytes: u32,
    /// Whether it was compiled with the instruction that waits for the kernel before.
    waits: bool,
}

/// From this architecture on kernels can wait for the one before (PTX ISA, `griddepcontrol`).
const WAITS_FROM: i32 = 90;

#[derive(Debug, Clone)]
struct GemmLibrary {
    handle: lt_sys::cublasLtHandle_t,
    workspace: u64,
}

// SAFETY: handles of the driver API may be used from any thread whose current context is theirs; every method makes it
// so first.
unsafe impl Send for Driver {}
// SAFETY: as above; the driver API locks what it shares, the table of functions has a lock of its own.
unsafe impl Sync for Driver {}

fn driver(call: &'static str) -> impl Fn(DriverError) -> CudaError {
    move |e| CudaError::Driver { call, reason: reason(e) }
}

/// The driver's own words. Only called after a driver call, so that the library is there.
fn reason(e: DriverError) -> String {
    let text = e.error_string().map(|s| s.to_string_lossy().into_owned());
    format!("{:?} ({})", e.0, text.unwrap_or_default())
}

fn blas(call: &'static str) -> impl Fn(lt::CublasError) -> CudaError {
    move |e| CudaError::Driver { call, reason: e.to_string() }
}

impl Driver {
    pub(super) fn open(ordinal: usize) -> Result<Self> {
        // SAFETY: only looks for the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        if result::init().is_err() {
            return Err(CudaError::NoDevice { ordinal, n_devices: 0 });
        }
        let n_devices = result::device::get_count().map_err(driver("cuDeviceGetCount"))?.max(0) as usize;
        if ordinal >= n_devices {
            return Err(CudaError::NoDevice { ordinal, n_devices });
        }
        let device = result::device::get(ordinal as i32).map_err(driver("cuDeviceGet"))?;
        let name = result::device::get_name(device).map_err(driver("cuDeviceGetName"))?;
        use sys::CUdevice_attribute as A;
        // SAFETY: the device comes from `device::get`.
        let attribute = |a| unsafe { result::device::get_attribute(device, a) }.map_err(driver("cuDeviceGetAttribute"));
        let major = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if major < 8 {
            return Err(CudaError::TooOld { name, major, minor });
        }
        let n_multiprocessors = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1) as usize;
        let shared_bytes = attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?.max(0) as usize;
        let cache_bytes = attribute(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?.max(0) as usize;
        // SAFETY: as above; released when this value is dropped.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(driver("cuDevicePrimaryCtxRetain"))?;
        // SAFETY: the context was just retained.
        unsafe { result::ctx::set_current(context) }.map_err(driver("cuCtxSetCurrent"))?;
        let image = image(major, minor)?;
        // SAFETY: the image is a fatbin, or PTX that ends in a zero byte.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) }.map_err(driver("cuModuleLoadData"))?;
        let stream = |priority| {
            result::stream::create_with_priority(result::stream::StreamKind::NonBlocking, priority)
                .map_err(driver("cuStreamCreateWithPriority"))
        };
        let (least, greatest) = result::stream::get_priority_range().map_err(driver("cuCtxGetStreamPriorityRange"))?;
        Ok(Self {
            device,
            context,
            module,
            compute: stream(least)?,
            // Its few blocks should not wait for room behind the many of the other.
            copies: stream(greatest)?,
            name,
            n_multiprocessors,
            shared_bytes,
            cache_bytes,
            functions: Mutex::default(),
            capturing: AtomicBool::new(false),
            gemm: OnceLock::new(),
        })
    }

    fn enter(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        unsafe { result::ctx::set_current(self.context) }.map_err(driver("cuCtxSetCurrent"))
    }

    fn stream(&self, queue: Queue) -> sys::CUstream {
        match queue {
            Queue::Compute => self.compute,
            Queue::Copy => self.copies,
        }
    }

    /// Recorded in `queue`.
    fn event(&self, queue: Queue, flags: sys::CUevent_flags) -> Result<Box<dyn BackendEvent>> {
        self.enter()?;
        let event = result::event::create(flags).map_err(driver("cuEventCreate"))?;
        let recorded = DriverEvent { event, context: self.context };
        // SAFETY: event and stream are alive.
        unsafe { result::event::record(event, self.stream(queue)) }.map_err(driver("cuEventRecord"))?;
        Ok(Box::new(recorded))
    }

    fn function(&self, name: &str, shared_bytes: u32) -> Result<Function> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        let mut function = match functions.get(name) {
            Some(function) => *function,
            None => {
                let symbol = CString::new(name).map_err(|_| CudaError::NoKernel(name.to_owned()))?;
                // SAFETY: the module is loaded as long as `self` lives.
                let handle = unsafe { result::module::get_function(self.module, symbol) }
                    .map_err(|_| CudaError::NoKernel(name.to_owned()))?;
                let version = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_PTX_VERSION;
                // SAFETY: the function was just found.
                let version = unsafe { result::function::get_function_attribute(handle, version) }
                    .map_err(driver("cuFuncGetAttribute"))?;
                Function { handle, shared_bytes: PLAIN_SHARED_BYTES, waits: version >= WAITS_FROM }
            }
        };
        if shared_bytes > function.shared_bytes {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function was just found in the module.
            unsafe { result::function::set_function_attribute(function.handle, attribute, shared_bytes as i32) }
                .map_err(driver("cuFuncSetAttribute"))?;
            function.shared_bytes = shared_bytes;
        }
        functions.insert(name.to_owned(), function);
        Ok(function)
    }

    fn gemm_library(&self) -> Result<GemmLibrary> {
        let made = self.gemm.get_or_init(|| {
            // SAFETY: only looks for the library.
            if !unsafe { lt_sys::is_culib_present() } {
                return Err(CudaError::NoLibrary { library: "libcublasLt.so" });
            }
            let workspace = self.allocate(GEMM_WORKSPACE_BYTES)?;
            Ok(GemmLibrary { handle: lt::create_handle().map_err(blas("cublasLtCreate"))?, workspace })
        });
        made.clone()
    }
}

/// The committed machine code; compiled from the sources instead where `THERMOCLINE_NVRTC` is set.
fn image(major: i32, minor: i32) -> Result<Vec<u8>> {
    if std::env::var_os("THERMOCLINE_NVRTC").is_none() {
        return Ok(FATBIN.to_vec());
    }
    // SAFETY: only looks for the library.
    if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        return Err(CudaError::NoLibrary { library: "libnvrtc.so" });
    }
    let source: String =
        SOURCES.iter().flat_map(|s| s.lines()).filter(|l| !l.starts_with("#include")).flat_map(|l| [l, "\n"]).collect();
    let options = cudarc::nvrtc::CompileOptions {
        options: vec![format!("--gpu-architecture=compute_{major}{minor}"), "--std=c++17".to_owned()],
        ..Default::default()
    };
    let ptx =
        cudarc::nvrtc::compile_ptx_with_opts(source, options).map_err(|e| CudaError::Compile(format!("{e:?}")))?;
    Ok(CString::new(ptx.to_src()).map_err(|e| CudaError::Compile(e.to_string()))?.into_bytes_with_nul())
}

impl Backend for Driver {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn is_emulated(&self) -> bool {
        false
    }

    fn n_multiprocessors(&self) -> usize {
        self.n_multiprocessors
    }

    fn shared_bytes(&self) -> usize {
        self.shared_bytes
    }

    fn cache_bytes(&self) -> usize {
        self.cache_bytes
    }

    fn memory(&self) -> Result<(usize, usize)> {
        self.enter()?;
        result::mem_get_info().map_err(driver("cuMemGetInfo"))
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.enter()?;
        // SAFETY: the memory is freed by `free` alone.
        unsafe { result::malloc_sync(bytes) }.map_err(|e| {
            if e.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                CudaError::OutOfMemory { bytes, free_bytes: result::mem_get_info().map_or(0, |(free, _)| free) }
            } else {
                driver("cuMemAlloc")(e)
            }
        })
    }

    fn free(&self, address: u64, _: usize) {
        if self.enter().is_ok() {
            // SAFETY: the address comes from `allocate`, and its owner is being dropped. An error would be an earlier
            // one's echo.
            let _ = unsafe { result::free_sync(address) };
        }
    }

    fn pin(&self, host: *mut u8, bytes: usize) -> Result<u64> {
        self.enter()?;
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: the caller owns the block and unpins it before it is freed.
        unsafe { sys::cuMemHostRegister_v2(host.cast(), bytes, flags) }
            .result()
            .map_err(|e| CudaError::Pin { bytes, reason: reason(e) })?;
        let mut address = 0;
        // SAFETY: the block was just registered as mapped.
        unsafe { sys::cuMemHostGetDevicePointer_v2(&mut address, host.cast(), 0) }
            .result()
            .map_err(driver("cuMemHostGetDevicePointer"))?;
        Ok(address)
    }

    fn unpin(&self, host: *mut u8) {
        if self.enter().is_ok() {
            // SAFETY: the block was registered by `pin`, and no work uses it any more.
            let _ = unsafe { sys::cuMemHostUnregister(host.cast()) };
        }
    }

    fn upload(&self, to: u64, from: &[u8]) -> Result<()> {
        self.enter()?;
        // On the queue of the kernels: a plain copy may return before it has arrived, and they do not wait for it.
        // SAFETY: the caller has checked that the destination is as long; `from` outlives the copy.
        unsafe {
            result::memcpy_htod_async(to, from, self.compute).map_err(driver("cuMemcpyHtoDAsync"))?;
            result::stream::synchronize(self.compute).map_err(driver("cuStreamSynchronize"))
        }
    }

    fn download(&self, to: &mut [u8], from: u64) -> Result<()> {
        self.enter()?;
        // SAFETY: as above.
        unsafe { result::memcpy_dtoh_sync(to, from) }.map_err(driver("cuMemcpyDtoH"))
    }

    fn copy(&self, queue: Queue, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: the caller has checked both ends, and keeps them until the work is done; addresses are unified.
        unsafe { sys::cuMemcpyAsync(to, from, bytes, self.stream(queue)) }.result().map_err(driver("cuMemcpyAsync"))
    }

    fn fill(&self, to: u64, value: u8, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: as above.
        unsafe { result::memset_d8_async(to, value, bytes, self.compute) }.map_err(driver("cuMemsetD8Async"))
    }

    fn launch(&self, queue: Queue, launch: Launch) -> Result<()> {
        self.enter()?;
        let function = self.function(&launch.kernel, launch.shared_bytes)?;
        let mut arguments: Vec<*mut c_void> = launch.args.iter().map(|a| a.pointer()).collect();
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        // Within a graph every kernel waits for the one before by itself, once it has asked for its weights.
        let overlaps = function.waits && queue == Queue::Compute && self.capturing.load(Ordering::Relaxed);
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: 1,
            blockDimX: launch.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: self.stream(queue),
            attrs: &mut attribute,
            numAttrs: u32::from(overlaps),
        };
        // SAFETY: `launch` gives each kernel the arguments that its source declares and has checked that what they
        // point to is large enough; the driver copies values and attributes before it returns.
        unsafe { sys::cuLaunchKernelEx(&config, function.handle, arguments.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(|e| CudaError::Driver {
                call: "cuLaunchKernelEx",
                reason: format!("{}: {}", launch.kernel, reason(e)),
            })
    }

    fn mark(&self, queue: Queue) -> Result<Box<dyn BackendEvent>> {
        self.event(queue, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    fn wait(&self, queue: Queue, mark: &dyn BackendEvent) -> Result<()> {
        self.enter()?;
        let other = || CudaError::Driver { call: "cuStreamWaitEvent", reason: "a mark of another device".to_owned() };
        let mark: &DriverEvent = mark.as_any().downcast_ref().ok_or_else(other)?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: event and stream are alive; the driver frees a destroyed event once nothing waits for it.
        unsafe { result::stream::wait_event(self.stream(queue), mark.event, flags) }
            .map_err(driver("cuStreamWaitEvent"))
    }

    fn begin_capture(&self) -> Result<()> {
        self.enter()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive.
        unsafe { result::stream::begin_capture(self.compute, mode) }.map_err(driver("cuStreamBeginCapture"))?;
        self.capturing.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn end_capture(&self) -> Result<Box<dyn BackendGraph>> {
        self.capturing.store(false, Ordering::Relaxed);
        self.enter()?;
        // SAFETY: the stream is alive and was put into capture by `begin_capture`.
        let graph = unsafe { result::stream::end_capture(self.compute) }.map_err(driver("cuStreamEndCapture"))?;
        // SAFETY: the graph was just made; the executable copy does not need it.
        let made = unsafe {
            result::graph::instantiate(
                graph,
                sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY,
            )
        };
        // SAFETY: as above, and it is not used again.
        let _ = unsafe { result::graph::destroy(graph) };
        let graph = made.map_err(driver("cuGraphInstantiate"))?;
        // SAFETY: graph and stream are alive.
        unsafe { result::graph::upload(graph, self.compute) }.map_err(driver("cuGraphUpload"))?;
        Ok(Box::new(DriverGraph { graph, stream: self.compute, context: self.context }))
    }

    fn synchronize(&self) -> Result<()> {
        self.enter()?;
        for stream in [self.copies, self.compute] {
            // SAFETY: the stream is alive.
            unsafe { result::stream::synchronize(stream) }.map_err(driver("cuStreamSynchronize"))?;
        }
        Ok(())
    }

    fn record(&self) -> Result<Box<dyn BackendEvent>> {
        self.event(Queue::Compute, sys::CUevent_flags::CU_EVENT_DEFAULT)
    }

    fn gemm(&self, shape: [usize; 4], a: u64, b: u64, b_is_transposed: bool, c: u64, add: bool) -> Result<()> {
        self.enter()?;
        let library = self.gemm_library()?;
        // cuBLASLt counts by columns: a row-major matrix is its transpose there, so b comes first.
        let bf16 = lt_sys::cudaDataType::CUDA_R_16BF;
        let f32 = lt_sys::cudaDataType::CUDA_R_32F;
        let [m, n, k, c_stride] = shape;
        let layout = |kind, rows: usize, columns: usize, stride: usize| {
            lt::create_matrix_layout(kind, rows as u64, columns as u64, stride as i64)
                .map_err(blas("cublasLtMatrixLayoutCreate"))
        };
        let (b_rows, b_columns) = if b_is_transposed { (k, n) } else { (n, k) };
        let (left, right, out) =
            (layout(bf16, b_rows, b_columns, b_rows)?, layout(bf16, k, m, k)?, layout(f32, n, m, c_stride)?);
        let compute = lt_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let task = lt::create_matmul_desc(compute, f32).map_err(blas("cublasLtMatmulDescCreate"))?;
        let preference = lt::create_matmul_pref().map_err(blas("cublasLtMatmulPreferenceCreate"))?;
        let transposed = u32::from(b_is_transposed);
        let (alpha, beta) = (1.0f32, if add { 1.0f32 } else { 0.0 });
        // SAFETY: the descriptors were just made and are destroyed once, below; the caller has checked the sizes of the
        // three matrices and keeps them until the work is done.
        let done = unsafe {
            let attribute = lt_sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
            let workspace = lt_sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            lt::set_matmul_desc_attribute(task, attribute, std::ptr::from_ref(&transposed).cast(), 4)
                .and_then(|()| {
                    let bytes: *const usize = &GEMM_WORKSPACE_BYTES;
                    lt::set_matmul_pref_attribute(preference, workspace, bytes.cast(), size_of::<usize>())
                })
                .and_then(|()| lt::get_matmul_algo_heuristic(library.handle, task, left, right, out, out, preference))
                .and_then(|best| {
                    let (alpha, beta) = (std::ptr::from_ref(&alpha).cast(), std::ptr::from_ref(&beta).cast());
                    let (left_data, right_data) = (b as *const c_void, a as *const c_void);
                    let (data, stream) = (c as *mut c_void, self.compute.cast());
                    let scratch = library.workspace as *mut c_void;
                    lt::matmul(
                        library.handle,
                        task,
                        alpha,
                        beta,
                        left_data,
                        left,
                        right_data,
                        right,
                        data,
                        out,
                        data,
                        out,
                        &best.algo,
                        scratch,
                        GEMM_WORKSPACE_BYTES,
                        stream,
                    )
                })
        };
        // SAFETY: each was made above and is not used again.
        unsafe {
            let _ = lt::destroy_matmul_pref(preference);
            let _ = lt::destroy_matmul_desc(task);
            for layout in [left, right, out] {
                let _ = lt::destroy_matrix_layout(layout);
            }
        }
        done.map_err(blas("cublasLtMatmul"))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        // SAFETY: everything was made by `open` or `gemm_library` and is not used again: memory, graphs and events
        // hold the backend or the context themselves. Errors would be echoes of earlier ones.
        unsafe {
            if let Some(Ok(library)) = self.gemm.get() {
                let _ = lt::destroy_handle(library.handle);
                let _ = result::free_sync(library.workspace);
            }
            let _ = result::stream::destroy(self.copies);
            let _ = result::stream::destroy(self.compute);
            let _ = result::module::unload(self.module);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

#[derive(Debug)]
struct DriverGraph {
    graph: sys::CUgraphExec,
    stream: sys::CUstream,
    context: sys::CUcontext,
}

// SAFETY: as for `Driver`.
unsafe impl Send for DriverGraph {}

impl BackendGraph for DriverGraph {
    fn start(&self) -> Result<()> {
        // SAFETY: the device that made the graph is alive: the memory that the graph keeps holds it.
        unsafe {
            result::ctx::set_current(self.context).map_err(driver("cuCtxSetCurrent"))?;
            result::graph::launch(self.graph, self.stream).map_err(driver("cuGraphLaunch"))
        }
    }
}

impl Drop for DriverGraph {
    fn drop(&mut self) {
        // SAFETY: the graph is not used again.
        let _ = unsafe { result::graph::exec_destroy(self.graph) };
    }
}

#[derive(Debug)]
struct DriverEvent {
    event: sys::CUevent,
    context: sys::CUcontext,
}

// SAFETY: as for `Driver`.
unsafe impl Send for DriverEvent {}

impl BackendEvent for DriverEvent {
    fn since(&self, earlier: &dyn BackendEvent) -> Result<f64> {
        let other = |reason: &str| CudaError::Driver { call: "cuEventElapsedTime", reason: reason.to_owned() };
        let earlier: &Self = earlier.as_any().downcast_ref().ok_or_else(|| other("an event of another device"))?;
        // SAFETY: both events are alive.
        unsafe {
            result::ctx::set_current(self.context).map_err(driver("cuCtxSetCurrent"))?;
            result::event::synchronize(self.event).map_err(driver("cuEventSynchronize"))?;
            result::event::elapsed(earlier.event, self.event).map(f64::from).map_err(driver("cuEventElapsedTime"))
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Drop for DriverEvent {
    fn drop(&mut self) {
        // SAFETY: the event is not used again.
        let _ = unsafe { result::event::destroy(self.event) };
    }
}
