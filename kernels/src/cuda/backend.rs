//! What a device must be able to do; the driver and the emulator both can.

use super::error::Result;
use std::fmt::Debug;

/// Where work waits its turn. Work of one queue runs in order; of two, at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    /// Kernels.
    Compute,
    /// Copies, and kernels that copy, beside them.
    Copy,
}

/// A kernel's argument.
#[derive(Debug, Clone)]
pub(super) enum Arg {
    Address(u64),
    U32(u32),
    U64(u64),
    F32(f32),
    /// A structure passed by value: its bytes, at an 8-byte boundary.
    Struct(Vec<u64>),
}

impl Arg {
    /// Where the value lies, as the driver wants it.
    pub(super) fn pointer(&self) -> *mut std::ffi::c_void {
        let value: *const u8 = match self {
            Arg::Address(v) | Arg::U64(v) => std::ptr::from_ref(v).cast(),
            Arg::U32(v) => std::ptr::from_ref(v).cast(),
            Arg::F32(v) => std::ptr::from_ref(v).cast(),
            Arg::Struct(words) => words.as_ptr().cast(),
        };
        value.cast_mut().cast()
    }
}

/// One kernel launch.
#[derive(Debug, Clone)]
pub(super) struct Launch {
    pub kernel: String,
    pub grid: [u32; 2],
    pub block: u32,
    pub shared_bytes: u32,
    pub args: Vec<Arg>,
}

/// Addresses are the device's; the caller (`Device`) keeps what they point to alive and in bounds.
pub(super) trait Backend: Debug + Send + Sync {
    fn name(&self) -> String;
    fn is_emulated(&self) -> bool;
    fn n_multiprocessors(&self) -> usize;
    /// Shared memory that a block may ask for.
    fn shared_bytes(&self) -> usize;
    /// The second-level cache.
    fn cache_bytes(&self) -> usize;
    /// Free and total bytes of device memory, as the driver counts them.
    fn memory(&self) -> Result<(usize, usize)>;
    fn allocate(&self, bytes: usize) -> Result<u64>;
    fn free(&self, address: u64, bytes: usize);
    /// Makes host memory readable from the device; returns its address there.
    fn pin(&self, host: *mut u8, bytes: usize) -> Result<u64>;
    fn unpin(&self, host: *mut u8);
    fn upload(&self, to: u64, from: &[u8]) -> Result<()>;
    fn download(&self, to: &mut [u8], from: u64) -> Result<()>;
    fn copy(&self, queue: Queue, to: u64, from: u64, bytes: usize) -> Result<()>;
    fn fill(&self, to: u64, value: u8, bytes: usize) -> Result<()>;
    fn launch(&self, queue: Queue, launch: Launch) -> Result<()>;
    /// What `queue` was given until now.
    fn mark(&self, queue: Queue) -> Result<Box<dyn BackendEvent>>;
    /// What `queue` is given from now on waits for that.
    fn wait(&self, queue: Queue, mark: &dyn BackendEvent) -> Result<()>;
    fn begin_capture(&self) -> Result<()>;
    fn end_capture(&self) -> Result<Box<dyn BackendGraph>>;
    fn synchronize(&self) -> Result<()>;
    /// The same of the compute queue, with the time at which it is done.
    fn record(&self) -> Result<Box<dyn BackendEvent>>;
    /// See `gemm.rs`: `shape` is m, n, k and the stride of c.
    fn gemm(&self, shape: [usize; 4], a: u64, b: u64, b_is_transposed: bool, c: u64, add: bool) -> Result<()>;
}

pub(super) trait BackendGraph: Debug + Send {
    fn start(&self) -> Result<()>;
}

pub(super) trait BackendEvent: Debug + Send {
    /// Milliseconds from `earlier` to this one; waits for both.
    fn since(&self, earlier: &dyn BackendEvent) -> Result<f64>;
    fn as_any(&self) -> &dyn std::any::Any;
}
