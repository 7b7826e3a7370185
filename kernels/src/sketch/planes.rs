use super::row::CODE_BYTES;
use super::{SKETCH_UNIT, SketchMatrix};

/// The rows of `matrix` taken apart for a device whose threads read neighbouring units together; as many bytes as before. One
/// behind the other: branch and first point bits of all rows, `[rows, units, 16]`; second point bits, `[rows, units, 8]`, if there are
/// any; bfloat16 scales, `[rows]`; scale codes, `[rows, units]`.
pub fn sketch_planes(matrix: SketchMatrix<'_>) -> Vec<u8> {
    let (n, units, bits) = (matrix.n_rows(), matrix.columns() / SKETCH_UNIT, matrix.bits());
    let (low, high) = (units * CODE_BYTES, units * bits.high_bytes());
    let parts = [0..low, low..low + high, low + high + units..matrix.row_bytes(), low + high..low + high + units];
    let mut out = Vec::with_capacity(n * matrix.row_bytes());
    for part in parts {
        (0..n).for_each(|row| out.extend_from_slice(&matrix.row(row)[part.clone()]));
    }
    out
}
