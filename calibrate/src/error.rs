use std::path::PathBuf;
use thermocline_datasets::files;

/// What can be wrong with a calibration or a profile.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The checkpoint could not be read.
    #[error(transparent)]
    Model(#[from] thermocline_datasets::Error),
    /// The operating system refused or failed.
    #[error("{path}: {source}", path = .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A matrix product failed in candle.
    #[error("candle: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A tensor, a token list or a buffer has another length than the configuration says.
    #[error("{what}: {got} values, expected {expected}")]
    Shape {
        /// Which tensor or argument.
        what: String,
        /// Values found.
        got: usize,
        /// Values expected.
        expected: usize,
    },
    /// A token id is outside the vocabulary.
    #[error("token id {id} at position {position} is outside the vocabulary of {vocab_size}")]
    TokenId {
        /// The id.
        id: u32,
        /// Its index in the token list.
        position: usize,
        /// Rows of the embedding.
        vocab_size: usize,
    },
    /// A setting that makes no sense, alone or with this model.
    #[error("setting {name}: {reason}")]
    Setting {
        /// The field.
        name: &'static str,
        /// What is wrong, and what is allowed.
        reason: String,
    },
    /// The model produced NaN or infinity, or a value beyond what the exact sums can hold.
    #[error("layer {layer}, window {window}: {what} is not finite or too large to sum exactly")]
    NotFinite {
        /// Decoder layer.
        layer: usize,
        /// Global window index.
        window: usize,
        /// Which statistic.
        what: &'static str,
    },
    /// Another process is writing to the same output.
    #[error("{path}: locked by another process; wait until that has ended, or choose another output", path = .path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// There is no room for what the run writes.
    #[error(
        "{path}: disk full: calibration needs about {needed} bytes there in all, {available} are free; make room and run \
         again with --resume, or use fewer tokens (--tokens) or shards (--shard)",
        path = .path.display()
    )]
    DiskFull {
        /// The folder of the run in progress.
        path: PathBuf,
        /// Bytes that the whole run takes ([`crate::disk::disk_bytes`]).
        needed: u64,
        /// Bytes that are free there.
        available: u64,
    },
    /// The output exists already.
    #[error("{path} exists already; remove it or choose another output", path = .path.display())]
    OutputExists {
        /// The profile directory.
        path: PathBuf,
    },
    /// An interrupted run was made from something else than what is asked for now.
    #[error(
        "{path}: cannot resume: {what} was {was}, now {now}; ask for the same again, or start over without --resume",
        path = .path.display()
    )]
    ResumeMismatch {
        /// The interrupted run's folder, or the finished profile.
        path: PathBuf,
        /// What changed: `model`, `corpus`, `setting ...`, `shard`.
        what: String,
        /// Its value in the interrupted run.
        was: String,
        /// Its value now.
        now: String,
    },
    /// Profiles that cannot be merged.
    #[error("{path}: cannot merge: {reason}", path = .path.display())]
    Merge {
        /// The profile at fault.
        path: PathBuf,
        /// What differs, is missing or overlaps.
        reason: String,
    },
    /// A profile file breaks the format.
    #[error("{path}: {field}: {reason}", path = .path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// The field or tensor at fault.
        field: String,
        /// What is wrong, and what was expected.
        reason: String,
    },
    /// A well-formed profile of a version that this program does not read.
    #[error("{path}: profile version {got} is not supported (newest: {max})", path = .path.display())]
    UnsupportedVersion {
        /// The file.
        path: PathBuf,
        /// The version found.
        got: u64,
        /// The newest version that can be read.
        max: u64,
    },
    /// An eigenvalue decomposition did not converge, or its matrix is not finite.
    #[error("predictor fit: {reason}")]
    Fit {
        /// What went wrong.
        reason: String,
    },
    /// A Parquet table could not be written.
    #[error("{path}: parquet: {reason}", path = .path.display())]
    Table {
        /// The file.
        path: PathBuf,
        /// The cause.
        reason: String,
    },
}

impl Error {
    /// A file of a profile that cannot be opened or read: damage, unless the system is at fault.
    pub(crate) fn unreadable(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| match source.kind() {
            _ if files::is_refusal(&source) => {
                Error::Corrupt { path: path.to_owned(), field: "file".into(), reason: source.to_string() }
            }
            std::io::ErrorKind::NotFound => {
                let reason = "missing; fetch the profile again, or calibrate again".to_owned();
                Error::Corrupt { path: path.to_owned(), field: "file".into(), reason }
            }
            _ => Error::Io { path: path.to_owned(), source },
        }
    }
}

/// `Result` with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Attaches the path to an I/O result.
pub(crate) trait AtPath<T> {
    fn at(self, path: &std::path::Path) -> Result<T>;
}

impl<T> AtPath<T> for std::io::Result<T> {
    fn at(self, path: &std::path::Path) -> Result<T> {
        self.map_err(|source| Error::Io { path: path.to_owned(), source })
    }
}

/// `Err(Shape)` unless the lengths agree.
pub(crate) fn check_len(what: &str, got: usize, expected: usize) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::Shape { what: what.to_owned(), got, expected }) }
}
