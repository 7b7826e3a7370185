use std::path::PathBuf;

/// What can go wrong while a model is planned, loaded or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The budget is too small for what must be in memory.
    #[error(
        "--ram-budget {budget_bytes} bytes is too small: {needed_bytes} bytes are needed for {what}; \
         give more, or lower -c (context)"
    )]
    DoesNotFit {
        /// What was asked for.
        budget_bytes: u64,
        /// The least that works.
        needed_bytes: u64,
        /// What takes it.
        what: String,
    },
    /// The VRAM budget is too small for what must be on the device.
    #[error(
        "--vram-budget {budget_bytes} bytes is too small: {needed_bytes} bytes are needed for {what}; \
         give more, lower -c (context), or run on the CPU (--vram-budget 0)"
    )]
    VramTooSmall {
        /// What was asked for.
        budget_bytes: u64,
        /// The least that works.
        needed_bytes: u64,
        /// What takes it.
        what: String,
    },
    /// The device has less memory than the plan takes.
    #[cfg(feature = "cuda")]
    #[error(
        "{source}: the plan takes {needed_bytes} bytes; give a smaller --vram-budget, or free memory on the device"
    )]
    VramRefused {
        /// What the plan takes.
        needed_bytes: u64,
        /// The device's answer.
        source: thermocline_kernels::cuda::CudaError,
    },
    /// The GPU, or its driver, failed.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] thermocline_kernels::cuda::CudaError),
    /// The system refuses to start a thread that computes for the device.
    #[cfg(feature = "cuda")]
    #[error("cannot start host thread {nth} of {n_threads}: {source}; use fewer threads (-t)")]
    HostThreads {
        /// Which one, from 1.
        nth: usize,
        /// Threads wanted.
        n_threads: usize,
        /// The cause.
        source: std::io::Error,
    },
    /// A thread that computes for the device has failed.
    #[cfg(feature = "cuda")]
    #[error("a thread that computes cold neurons has failed; this is a bug, please report it with the message above")]
    HostThreadFailed,
    /// A file was replaced or cut while the model ran.
    #[error("{path}: the file changed while it was in use (read {got} of {expected} bytes at {offset}); start again", path = .path.display())]
    ModelChanged {
        /// The file.
        path: PathBuf,
        /// Where the read began.
        offset: u64,
        /// Bytes asked for.
        expected: usize,
        /// Bytes that were there.
        got: usize,
    },
    /// The disk failed, again and again.
    #[error("{path}: {source} (at byte {offset}, after {attempts} attempts)", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// How often it was tried.
        attempts: u32,
        /// The last cause.
        source: std::io::Error,
    },
    /// The prompt and the answer do not fit in the context.
    #[error("the prompt has {prompt_tokens} tokens, the context {context}; shorten it or raise -c")]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens of the context.
        context: usize,
    },
    /// The system refuses to start a thread that computes.
    #[error("{0}; use fewer threads (-t), or raise the limit on processes or memory")]
    Threads(#[from] thermocline_kernels::PoolError),
    /// The system refuses to start a thread that reads from disk.
    #[error(
        "cannot start reader thread {nth} of {n_readers}: {source}; use fewer threads (-t), \
         or a --ram-budget that holds everything, which needs no readers"
    )]
    Readers {
        /// Which one, from 1.
        nth: usize,
        /// Threads wanted.
        n_readers: usize,
        /// The cause.
        source: std::io::Error,
    },
    /// The system has less memory than the plan takes.
    #[error("{0}; give a --ram-budget that this machine has, or lower -c (context)")]
    OutOfMemory(#[from] thermocline_kernels::AllocError),
    /// A setting out of its range.
    #[error("{flag}: {reason}")]
    Setting {
        /// The flag.
        flag: &'static str,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// The split is damaged.
    #[error(transparent)]
    Split(#[from] thermocline_split::Error),
    /// The tokenizer or chat template failed.
    #[error(transparent)]
    Text(#[from] thermocline_datasets::Error),
}

/// `Result` with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
