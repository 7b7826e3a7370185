use std::path::PathBuf;

/// What can go wrong on the way to a GPU and on it.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// No driver on this machine.
    #[error("no CUDA driver on this machine (libcuda.so.1 is not found)")]
    NoDriver,
    /// A driver, but no such device.
    #[error("no CUDA device {ordinal} ({n_devices} found); see CUDA_VISIBLE_DEVICES")]
    NoDevice {
        /// The number asked for.
        ordinal: usize,
        /// Devices that the driver shows.
        n_devices: usize,
    },
    /// The device is older than the oldest that the kernels are built for.
    #[error("{name} has compute capability {major}.{minor}; 8.0 or newer is needed")]
    TooOld {
        /// Its name.
        name: String,
        /// Its compute capability.
        major: i32,
        /// As above.
        minor: i32,
    },
    /// The device has no memory left.
    #[error("the GPU has no {bytes} bytes left ({free_bytes} are free)")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// Bytes that were free.
        free_bytes: usize,
    },
    /// The system does not let so much host memory be pinned.
    #[error(
        "the driver cannot pin {bytes} bytes of host memory: {reason}; lower --ram-budget, or raise the limit on locked memory"
    )]
    Pin {
        /// Bytes asked for.
        bytes: usize,
        /// The driver's words.
        reason: String,
    },
    /// A driver call failed.
    #[error("CUDA: {call} failed: {reason}")]
    Driver {
        /// The call.
        call: &'static str,
        /// The driver's words.
        reason: String,
    },
    /// A library that prompts need is not on this machine.
    #[error("{library} is not found; install it with the CUDA runtime, or put its folder on the library path")]
    NoLibrary {
        /// Its name.
        library: &'static str,
    },
    /// A kernel is not in the module.
    #[error("kernel {0} is not in the module: sources and program do not belong together")]
    NoKernel(String),
    /// A kernel of a graph has a block that does not wait for the kernel before.
    #[error("kernel {0} does not wait for the one before it: it needs wait_for_previous in every block")]
    Unordered(String),
    /// The kernels could not be compiled.
    #[error("compiling the kernels failed: {0}")]
    Compile(String),
    /// The emulator could not be built or loaded.
    #[error("{path}: the emulator cannot be used: {reason}", path = .path.display())]
    Emulator {
        /// The library.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The system has no such block of host memory.
    #[error(transparent)]
    Host(#[from] crate::AllocError),
}

/// `Result` with [`CudaError`].
pub type Result<T, E = CudaError> = std::result::Result<T, E>;
