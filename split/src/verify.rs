//! Proof of a split against the checkpoint that it was made from.

use crate::error::Result;
use crate::{Error, Split, SplitCheckpoint, TensorFile};
use serde::Serialize;
use thermocline_datasets::{Checkpoint, SourceDtype};

/// Rows compared at a time.
const BLOCK_ROWS: usize = 4096;

/// One tensor, compared.
#[derive(Debug, Clone, Serialize)]
pub struct TensorReport {
    /// Canonical name.
    pub name: String,
    /// Storage type in the checkpoint.
    pub source: String,
    /// Storage type in the split.
    pub stored: String,
    /// Whether every value is equal, bit for bit.
    pub exact: bool,
    /// Square root of (squared error / squared values), 0 if exact.
    pub relative_error: f64,
    /// Largest absolute difference.
    pub largest_error: f32,
    /// Row-major index of the first value of the checkpoint that is not finite.
    pub first_not_finite: Option<u64>,
    /// The same in the split, where the checkpoint's value is finite.
    pub spoilt: Option<u64>,
    /// Whether every value of the checkpoint is zero.
    pub all_zero: bool,
}

/// All tensors, compared.
#[derive(Debug, Clone, Serialize)]
pub struct VerifyReport {
    /// One entry a tensor.
    pub tensors: Vec<TensorReport>,
    /// Tensors that must be exact (stored in a type that holds their source's values) and are not, and tensors with
    /// values that are not finite where the source's are.
    pub violations: Vec<String>,
    /// Weights compared.
    pub n_weights: u64,
    /// Chunks whose checksums were checked (each also decoded).
    pub n_chunks: u64,
}

/// Compares every tensor of `split` with `checkpoint`, and so reads every chunk. bf16 of a bf16 source, and f32 of
/// anything, must be exact; for every other pair the error is reported.
///
/// # Errors
/// If the split was made from another model, or either cannot be read.
pub fn verify(split: Split, checkpoint: &dyn Checkpoint, progress: &dyn Fn(usize, usize)) -> Result<VerifyReport> {
    let (got, expected) = (split.manifest().source.model_digest.clone(), checkpoint.digest()?);
    if got != expected {
        return Err(Error::WrongSource { path: split.dir().to_owned(), got, expected });
    }
    // Everything that the comparison of weights below does not read: predictors, sketches and their residuals, statistics, costs
    // of shares, tokenizer.
    let further = split.resident_planes().into_iter().chain(split.sketches()).chain(split.residuals());
    for file in [split.predictors(), split.statistics(), split.resident()].into_iter().chain(further) {
        check_tensors(file)?;
    }
    split.shares()?;
    split.graded_curves()?;
    check_plain_files(&split)?;
    let n_chunks = split.layers().iter().map(|l| l.n_stored_chunks() as u64).sum();
    let stored = SplitCheckpoint::new(split);
    let names = in_layer_order(checkpoint.names());
    let mut report = VerifyReport { tensors: Vec::new(), violations: Vec::new(), n_weights: 0, n_chunks };
    for (i, name) in names.iter().enumerate() {
        progress(i, names.len());
        let tensor = compare(&stored, checkpoint, name, &mut report.n_weights)?;
        let holds = tensor.stored == "F32" || (tensor.stored == "BF16" && tensor.source == "BF16");
        if (holds && !tensor.exact) || tensor.spoilt.is_some() {
            report.violations.push(name.clone());
        }
        report.tensors.push(tensor);
    }
    progress(names.len(), names.len());
    Ok(report)
}

impl Split {
    /// Reads everything and checks it without a checkpoint: checksums, and weights for values that are not finite and
    /// tensors of zeros. `progress(done, total)` counts layers and files.
    ///
    /// # Errors
    /// If a file cannot be read or is damaged, and [`Error::Unsound`] as from [`Split::check_weights`].
    pub fn check(&self, progress: &dyn Fn(usize, usize)) -> Result<()> {
        [Some(self.statistics()), self.sketches(), self.residuals()]
            .into_iter()
            .flatten()
            .try_for_each(check_tensors)?;
        self.shares()?;
        self.graded_curves()?;
        check_plain_files(self)?;
        self.check_weights(progress)
    }
}

fn check_tensors(file: &TensorFile) -> Result<()> {
    file.tensors().iter().try_for_each(|tensor| file.read(&tensor.name).map(drop))
}

fn check_plain_files(split: &Split) -> Result<()> {
    split.manifest().files.iter().try_for_each(|file| split.plain_file(&file.file).map(drop))
}

/// Layer by layer, so that each layer's bundles are read once.
fn in_layer_order(mut names: Vec<String>) -> Vec<String> {
    names.sort_by_cached_key(|n| (n.split('.').nth(2).and_then(|l| l.parse::<usize>().ok()), n.clone()));
    names
}

/// Tensor `name` of `a` beside that of its source `b`.
pub(crate) fn compare(a: &dyn Checkpoint, b: &dyn Checkpoint, name: &str, n_weights: &mut u64) -> Result<TensorReport> {
    let missing = |c: &dyn Checkpoint| thermocline_datasets::Error::MissingTensor {
        path: c.path().to_owned(),
        name: name.to_owned(),
    };
    let stored = a.info(name).ok_or_else(|| missing(a))?;
    let source = b.info(name).ok_or_else(|| missing(b))?;
    if stored.shape != source.shape {
        let what =
            format!("{name}: shape {:?} in the split or base, {:?} in the checkpoint", stored.shape, source.shape);
        return Err(Error::Settings { what });
    }
    let rows = source.shape[0];
    let (mut error, mut size, mut largest, mut exact) = (0.0f64, 0.0f64, 0.0f32, true);
    let (mut first_not_finite, mut spoilt, mut all_zero, mut at) = (None, None, true, 0u64);
    for first in (0..rows).step_by(BLOCK_ROWS) {
        let range = first..(first + BLOCK_ROWS).min(rows);
        let (got, want) = (a.load_rows(name, range.clone())?, b.load_rows(name, range)?);
        for (g, w) in got.iter().zip(&want) {
            if !w.is_finite() && first_not_finite.is_none() {
                first_not_finite = Some(at);
            }
            if w.is_finite() && !g.is_finite() && spoilt.is_none() {
                spoilt = Some(at);
            }
            all_zero &= *w == 0.0;
            exact &= g.to_bits() == w.to_bits();
            let difference = g - w;
            error += f64::from(difference) * f64::from(difference);
            size += f64::from(*w) * f64::from(*w);
            largest = largest.max(difference.abs());
            at += 1;
        }
    }
    *n_weights += at;
    Ok(TensorReport {
        name: name.to_owned(),
        source: dtype_name(&source.dtype),
        stored: dtype_name(&stored.dtype),
        exact,
        relative_error: if exact { 0.0 } else { (error / size.max(f64::MIN_POSITIVE)).sqrt() },
        largest_error: largest,
        first_not_finite,
        spoilt,
        all_zero,
    })
}

/// The name that people know a storage type by.
pub(crate) fn dtype_name(dtype: &SourceDtype) -> String {
    match dtype {
        SourceDtype::F32 => "F32".to_owned(),
        SourceDtype::F16 => "F16".to_owned(),
        SourceDtype::Bf16 => "BF16".to_owned(),
        SourceDtype::Quantized(name) => (*name).to_owned(),
        _ => "unknown".to_owned(),
    }
}
