//! Copies of gate and up rows in one to three bits a weight, to guess by; nothing of them is kept in a split.

use crate::{Error, Result};
use thermocline_kernels::{SKETCH_UNIT, SketchBits};

/// Bits of a copy's weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyBits {
    /// A sign.
    One,
    /// Four levels, as a sketch has them.
    Two,
    /// Eight levels.
    Three,
}

impl CopyBits {
    /// Bits of a weight, without scales.
    pub fn bits(self) -> usize {
        match self {
            CopyBits::One => 1,
            CopyBits::Two => 2,
            CopyBits::Three => 3,
        }
    }

    /// How a sketch stores such rows, if it can.
    pub(super) fn of_sketch(self) -> Option<SketchBits> {
        match self {
            CopyBits::One => None,
            CopyBits::Two => Some(SketchBits::Two),
            CopyBits::Three => Some(SketchBits::Three),
        }
    }

    /// Bytes of a row: the weights' bits, a byte for the scale of each unit of 64, two for the row's.
    pub(super) fn row_bytes(self, columns: usize) -> Result<usize> {
        if columns == 0 || !columns.is_multiple_of(SKETCH_UNIT) {
            return Err(Error::Settings {
                what: format!("copies: hidden size {columns} is no multiple of {SKETCH_UNIT}"),
            });
        }
        Ok(columns / 8 * self.bits() + columns / SKETCH_UNIT + 2)
    }
}

/// Rows in few bits.
#[derive(Debug, Clone)]
pub struct RowCopy {
    /// Their values, `[n_rows, columns]`.
    pub rows: Vec<f32>,
    /// Root mean square of what each row's product with an input loses, `[n_rows]`.
    pub errors: Vec<f32>,
    /// Bytes that a row takes.
    pub row_bytes: usize,
}
