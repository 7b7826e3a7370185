//! Weights as their 16 bits: what a delta compares and changes.

use crate::Error;
use crate::error::Result;
use std::ops::Range;
use thermocline_datasets::{Checkpoint, SourceDtype};
use thermocline_kernels::exact::{bits16, value16};

/// The bits of values that were widened from bf16.
pub(super) fn narrow(values: &[f32]) -> Vec<u16> {
    values.iter().map(|v| bits16(*v)).collect()
}

/// bf16 bits as f32, payloads of NaNs included.
pub(super) fn widen(bits: &[u16]) -> Vec<f32> {
    bits.iter().map(|b| value16(*b)).collect()
}

/// Rows of a bf16 matrix, `[rows.len(), columns]`.
pub(super) fn load(checkpoint: &dyn Checkpoint, name: &str, rows: Range<usize>) -> Result<Vec<u16>> {
    Ok(narrow(&checkpoint.load_rows(name, rows)?))
}

/// Little-endian bytes of bf16 bits.
pub(super) fn bytes(bits: &[u16]) -> Vec<u8> {
    bits.iter().flat_map(|b| b.to_le_bytes()).collect()
}

/// A tensor as a delta stores it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// Stored rows: neurons for a down projection; 1 for a vector.
    pub rows: usize,
    /// Stored columns.
    pub columns: usize,
    /// Whether it is a vector.
    pub is_vector: bool,
    /// Whether stored rows are the checkpoint's columns.
    pub is_down: bool,
}

impl Shape {
    /// From the checkpoint's shape; `None` if it has neither one nor two dimensions.
    pub(super) fn new(name: &str, shape: &[usize]) -> Option<Self> {
        let is_down = name.ends_with(".mlp.down_proj.weight");
        match *shape {
            [columns] => Some(Self { rows: 1, columns, is_vector: true, is_down: false }),
            [rows, columns] if is_down => Some(Self { rows: columns, columns: rows, is_vector: false, is_down }),
            [rows, columns] => Some(Self { rows, columns, is_vector: false, is_down }),
            _ => None,
        }
    }
}

/// Refuses a matrix that is not bf16.
pub(super) fn check_dtype(checkpoint: &dyn Checkpoint, name: &str) -> Result<()> {
    let info = checkpoint.info(name);
    let dtype = info.map(|i| i.dtype);
    if dtype == Some(SourceDtype::Bf16) {
        return Ok(());
    }
    let dtype = dtype.map_or("missing".to_owned(), |d| crate::verify::dtype_name(&d));
    Err(Error::NotBf16 { path: checkpoint.path().to_owned(), tensor: name.to_owned(), dtype })
}
