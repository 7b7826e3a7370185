//! Proof that base and delta are the final model, bit for bit.

use super::bits::Shape;
use super::checkpoint::DeltaCheckpoint;
use super::matrix;
use crate::error::Result;
use crate::verify::{TensorReport, VerifyReport, compare, dtype_name};
use thermocline_datasets::Checkpoint;
use xxhash_rust::xxh3::xxh3_128;

/// Reconstructs every tensor and compares it with `final_model`, or, without one, with the digests that the delta was
/// made with. Whatever is not the same bits is a violation, of the configuration and the tokenizer too.
/// `progress(done, total)` counts tensors.
///
/// # Errors
/// If a tensor's shape differs, or a file is damaged or cannot be read.
pub fn verify_delta(
    rebuilt: &DeltaCheckpoint,
    final_model: Option<&dyn Checkpoint>,
    progress: &dyn Fn(usize, usize),
) -> Result<VerifyReport> {
    let delta = rebuilt.delta();
    let (n_chunks, tensors) = (delta.n_blocks(), &delta.manifest().tensors);
    let mut report = VerifyReport { tensors: Vec::new(), violations: Vec::new(), n_weights: 0, n_chunks };
    for (i, tensor) in tensors.iter().enumerate() {
        progress(i, tensors.len());
        let found = match final_model {
            Some(model) => compare(rebuilt, model, &tensor.name, &mut report.n_weights)?,
            None => by_digest(rebuilt, &tensor.name, &tensor.final_digest, &mut report.n_weights)?,
        };
        if !found.exact {
            report.violations.push(found.name.clone());
        }
        report.tensors.push(found);
    }
    if let Some(model) = final_model {
        let same = [
            ("config", rebuilt.config() == model.config()),
            ("tokenizer.json", rebuilt.tokenizer_json().ok() == model.tokenizer_json().ok()),
            ("chat_template.jinja", rebuilt.chat_template() == model.chat_template()),
        ];
        report.violations.extend(same.into_iter().filter(|(_, same)| !same).map(|(what, _)| what.to_owned()));
    }
    // Files that were kept are checked even if nothing is compared with them.
    for file in &delta.manifest().files {
        delta.plain_file(&file.file)?;
    }
    progress(tensors.len(), tensors.len());
    Ok(report)
}

fn by_digest(rebuilt: &DeltaCheckpoint, name: &str, expected: &str, n_weights: &mut u64) -> Result<TensorReport> {
    let missing =
        || thermocline_datasets::Error::MissingTensor { path: rebuilt.path().to_owned(), name: name.to_owned() };
    let info = rebuilt.info(name).ok_or_else(missing)?;
    let shape = Shape::new(name, &info.shape).ok_or_else(missing)?;
    let got = if shape.is_vector {
        let values = rebuilt.load(name)?;
        format!("{:032x}", xxh3_128(&values.iter().flat_map(|v| v.to_bits().to_le_bytes()).collect::<Vec<u8>>()))
    } else {
        let (rows, columns) = if shape.is_down { (shape.columns, shape.rows) } else { (shape.rows, shape.columns) };
        matrix::digest(rebuilt, name, rows, columns)?
    };
    *n_weights += (shape.rows * shape.columns) as u64;
    Ok(TensorReport {
        name: name.to_owned(),
        source: dtype_name(&info.dtype),
        stored: dtype_name(&info.dtype),
        exact: got == expected,
        relative_error: 0.0,
        largest_error: 0.0,
        first_not_finite: None,
        spoilt: None,
        all_zero: false,
    })
}
