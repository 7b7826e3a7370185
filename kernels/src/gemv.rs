use crate::{Encoding, Kernels, Pool, RowRef};

/// An encoded matrix `[rows, columns]`, borrowed: rows of [`Encoding::row_stride`] bytes one after the other.
#[derive(Debug, Clone, Copy)]
pub struct MatrixRef<'a> {
    /// How each row is stored.
    pub encoding: Encoding,
    /// Rows (outputs).
    pub rows: usize,
    /// Columns (inputs).
    pub columns: usize,
    /// `rows * row_stride` bytes or more.
    pub data: &'a [u8],
}

impl<'a> MatrixRef<'a> {
    /// Row `r`.
    ///
    /// # Panics
    /// If there is no such row.
    #[inline]
    pub fn row(&self, r: usize) -> RowRef<'a> {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        let stride = self.encoding.row_stride(self.columns);
        RowRef::from_matrix_row(self.encoding, self.columns, &self.data[r * stride..(r + 1) * stride])
    }
}

/// Rows that one task computes: enough to amortise the hand-over, few enough to balance.
const TASK_ROWS: usize = 32;

/// `y = W x`: `x` is `[columns]`, `y` is `[rows]`. Reads the matrix once; bounded by memory bandwidth.
///
/// # Panics
/// If the lengths do not fit.
pub fn gemv(kernels: &Kernels, pool: &mut Pool, w: MatrixRef<'_>, x: &[f32], y: &mut [f32]) {
    assert_eq!((w.columns, w.rows), (x.len(), y.len()), "the matrix's shape");
    pool.for_each_chunk(y, TASK_ROWS, |task, y| gemv_rows(kernels, &w, task * TASK_ROWS, x, y));
}

/// The rows from `first` on, one for each element of `y`, on this thread.
fn gemv_rows(kernels: &Kernels, w: &MatrixRef<'_>, first: usize, x: &[f32], y: &mut [f32]) {
    let mut quads = y.chunks_exact_mut(4);
    let mut r = first;
    for quad in &mut quads {
        let rows = [w.row(r), w.row(r + 1), w.row(r + 2), w.row(r + 3)];
        quad.copy_from_slice(&kernels.dots(w.encoding, rows, x));
        r += 4;
    }
    for y in quads.into_remainder() {
        [*y] = kernels.dots(w.encoding, [w.row(r)], x);
        r += 1;
    }
}
