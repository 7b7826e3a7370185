use std::path::PathBuf;

/// What can be wrong with a model, a tokenizer or a text.
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
    /// A file breaks its own format.
    #[error("{path}: {field}: {reason}", path = .path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// The field, key, tensor or byte offset at fault.
        field: String,
        /// What is wrong, and what was expected.
        reason: String,
    },
    /// A well-formed file of a version that this program does not read.
    #[error("{path}: version {got} is not supported (newest: {max})", path = .path.display())]
    UnsupportedVersion {
        /// The file.
        path: PathBuf,
        /// The version found.
        got: u64,
        /// The newest version that can be read.
        max: u64,
    },
    /// A well-formed file that needs something that is not implemented.
    #[error("{path}: {what} is not supported; {help}", path = .path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What is not supported.
        what: String,
        /// What to do instead.
        help: String,
    },
    /// A tensor that the architecture needs is not there.
    #[error("{path}: tensor {name} is missing", path = .path.display())]
    MissingTensor {
        /// The file or folder.
        path: PathBuf,
        /// The canonical tensor name.
        name: String,
    },
    /// A corpus, column or glob without usable text.
    #[error("{path}: {reason}", path = .path.display())]
    Corpus {
        /// The file, or the pattern.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The tokenizer could not be built or refused a text.
    #[error("tokenizer: {reason}")]
    Tokenizer {
        /// What is wrong.
        reason: String,
    },
    /// A planted model that cannot be made.
    #[error("{setting}: {reason}")]
    Planted {
        /// The flag or name at fault.
        setting: &'static str,
        /// What is wrong, and what would do.
        reason: String,
    },
    /// The chat template failed or ran over its limits.
    #[error("chat template: {reason}")]
    Template {
        /// What is wrong.
        reason: String,
    },
}

impl Error {
    /// The error of a file that could not be opened or read: damage if the file itself is at fault.
    pub(crate) fn refused(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| match crate::files::is_refusal(&source) {
            true => Error::Corrupt { path: path.to_owned(), field: "file".into(), reason: source.to_string() },
            false => Error::Io { path: path.to_owned(), source },
        }
    }
}

/// `Result` with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
