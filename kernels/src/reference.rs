//! Plain f32 loops: what every other variant must agree with.

use crate::{Encoding, RowRef, unpack};

/// `sum_j row_j * x_j`, in column order.
pub fn dot(encoding: Encoding, row: RowRef<'_>, x: &[f32]) -> f32 {
    let mut values = vec![0.0; x.len()];
    unpack(encoding, row, &mut values);
    values.iter().zip(x).map(|(a, b)| a * b).sum()
}

/// `y_j += a * row_j`.
pub fn axpy(encoding: Encoding, row: RowRef<'_>, a: f32, y: &mut [f32]) {
    let mut values = vec![0.0; y.len()];
    unpack(encoding, row, &mut values);
    for (y, v) in y.iter_mut().zip(values) {
        *y += a * v;
    }
}
