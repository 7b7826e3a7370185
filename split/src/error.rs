use std::path::{Path, PathBuf};
use thermocline_datasets::files;

/// What can go wrong with a split directory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused or failed.
    #[error("{path}: {source}", path = .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// There is no room for the split; what was finished stays in the partial directory.
    #[error(
        "{path}: disk full: the split needs about {needed} bytes in all, {available} are free; \
         make room and run the same command again, it continues",
        path = .path.display()
    )]
    DiskFull {
        /// Where it was to go.
        path: PathBuf,
        /// Bytes that the whole split takes.
        needed: u64,
        /// Bytes that are free there.
        available: u64,
    },
    /// There is no room for the delta; what is finished of it is kept.
    #[error(
        "{path}: disk full after {written} bytes of the delta; make room and run the same command again, which goes on from there",
        path = .path.display()
    )]
    DeltaDiskFull {
        /// Where it was to go.
        path: PathBuf,
        /// Bytes that had been written.
        written: u64,
    },
    /// Two models that no delta leads between.
    #[error("{what}: {base} in the base, {changed} in the final model; a delta needs two models of one shape")]
    DifferentModels {
        /// The tensor, or the field of the configuration.
        what: String,
        /// Its shape or value in the base.
        base: String,
        /// The same in the final model.
        changed: String,
    },
    /// A matrix of which there are no 16 bits to compare.
    #[error(
        "{path}: tensor {tensor} is {dtype}; a delta compares bf16 bits, give models with BF16 matrices",
        path = .path.display()
    )]
    NotBf16 {
        /// The model.
        path: PathBuf,
        /// The canonical tensor name.
        tensor: String,
        /// Its type there.
        dtype: String,
    },
    /// A file breaks the format.
    #[error("{path}: {field}: {reason}", path = .path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// The field at fault.
        field: String,
        /// What is wrong.
        reason: String,
    },
    /// A chunk's bytes are not what was written.
    #[error("{path}: layer {layer}, neurons {first}..{end}: checksum mismatch; fetch or make the split again", path = .path.display())]
    CorruptChunk {
        /// The layer file.
        path: PathBuf,
        /// The layer.
        layer: usize,
        /// First neuron of the chunk, in split order.
        first: usize,
        /// One past its last neuron.
        end: usize,
    },
    /// A weight that no sound model has.
    #[error("{path}: {flaw}; mend the checkpoint and split it again", path = .path.display())]
    Unsound {
        /// The file of the split.
        path: PathBuf,
        /// Which, and where.
        flaw: crate::Flaw,
    },
    /// A split of a version that this program does not read.
    #[error("{path}: format version {got} is not supported (newest: {max}); update thermocline", path = .path.display())]
    UnsupportedVersion {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        got: u64,
        /// The newest that can be read.
        max: u64,
    },
    /// The sketches of an earlier version, whose rows had another code.
    #[error(
        "{path}: sketches of version {version}, which this program does not read any more; make the split again with split --sketch",
        path = .path.display()
    )]
    OldSketches {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// Something was made from another model than the one given.
    #[error(
        "{path}: made from a model with digest {got}, but the one given has {expected}; give the one that it was made from",
        path = .path.display()
    )]
    WrongSource {
        /// The profile or split.
        path: PathBuf,
        /// Its source digest.
        got: String,
        /// The digest of the model at hand.
        expected: String,
    },
    /// The output exists already.
    #[error("{path} exists; remove it or choose another -o", path = .path.display())]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// Another process is writing the same output.
    #[error("{path}: another process writes it; wait until that has ended, or choose another output", path = .path.display())]
    Locked {
        /// The output.
        path: PathBuf,
    },
    /// A setting that makes no sense for this model.
    #[error("{what}")]
    Settings {
        /// Which, why, and what would.
        what: String,
    },
    /// A weight that the encoding cannot hold.
    #[error("tensor {tensor}, row {row}: {source}")]
    Pack {
        /// The canonical tensor name.
        tensor: String,
        /// Its row.
        row: usize,
        /// Column, value and encoding.
        source: thermocline_kernels::PackError,
    },
    /// The checkpoint failed.
    #[error(transparent)]
    Checkpoint(#[from] thermocline_datasets::Error),
    /// The profile failed.
    #[error(transparent)]
    Profile(#[from] thermocline_calibrate::Error),
}

/// `Result` with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Turns an I/O error into one that names the path.
pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
    move |source| Error::Io { path: path.to_owned(), source }
}

/// A format error.
pub(crate) fn corrupt(path: &Path, field: impl Into<String>, reason: impl Into<String>) -> Error {
    Error::Corrupt { path: path.to_owned(), field: field.into(), reason: reason.into() }
}

/// Turns a failure to open a file that the manifest lists: a missing one is damage of the split.
pub(crate) fn listed(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
    move |source| match source.kind() {
        std::io::ErrorKind::NotFound => corrupt(path, "file", "missing; fetch or make the split again"),
        _ if files::is_refusal(&source) => corrupt(path, "file", source.to_string()),
        _ => Error::Io { path: path.to_owned(), source },
    }
}
