use std::path::PathBuf;

/// What can go wrong while a model is evaluated or a report is made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The checkpoint could not be read.
    #[error("{0}")]
    Model(#[from] thermocline_datasets::Error),
    /// The dense forward failed, or a profile could not be read.
    #[error("{0}")]
    Calibrate(#[from] thermocline_calibrate::Error),
    /// The split could not be read.
    #[error("{0}")]
    Split(#[from] thermocline_split::Error),
    /// The token engine failed.
    #[error("{0}")]
    Runtime(#[from] thermocline_runtime::Error),
    /// A setting that makes no sense, alone or with this model or text.
    #[error("{flag}: {reason}")]
    Setting {
        /// The command line's flag.
        flag: &'static str,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// The model's outputs are not numbers.
    #[error("position {position}: the logits are not finite under mask {mask}")]
    NotFinite {
        /// Which mask.
        mask: &'static str,
        /// Which token of the evaluated text.
        position: usize,
    },
    /// The operating system refused or failed.
    #[error("{path}: {source}", path = .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file that is nothing a report is made of.
    #[error("{path}: {reason}", path = .path.display())]
    Input {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what is accepted.
        reason: String,
    },
    /// A file whose fields are not as this program writes them.
    #[error("{path}: {field}: {reason}", path = .path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field, with those that it lies in before it.
        field: String,
        /// What is wrong.
        reason: String,
    },
    /// An example of a task that cannot be asked.
    #[error("{path}: line {line}: {field}: {reason}", path = .path.display())]
    Example {
        /// The file.
        path: PathBuf,
        /// Which line, from 1.
        line: u64,
        /// The field.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A plot could not be drawn.
    #[error("plot {plot:?}: {reason}")]
    Plot {
        /// Its title.
        plot: String,
        /// The cause.
        reason: String,
    },
    /// A table could not be built.
    #[error("table: {0}")]
    Table(#[from] polars::error::PolarsError),
}

/// `Result` with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
