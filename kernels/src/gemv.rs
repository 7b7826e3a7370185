use crate::{Encoding, Kernels, Pool, RowRef, prefetch};

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
const TASK_ROWS: usize = 64;

/// `y = W x`: `x` is `[columns]`, `y` is `[rows]`. Reads the matrix once; bounded by memory bandwidth.
///
/// # Panics
/// If the lengths do not fit.
pub fn gemv(kernels: &Kernels, pool: &mut Pool, w: MatrixRef<'_>, x: &[f32], y: &mut [f32]) {
    assert_eq!((w.columns, w.rows), (x.len(), y.len()), "the matrix's shape");
    pool.for_each_chunk(y, TASK_ROWS, |task, y| gemv_rows(kernels, &w, task * TASK_ROWS, x, y));
}

/// How far ahead of the computation memory is asked for: a few hundred nanoseconds of a core's bandwidth. Two rows at a
/// time are two streams, which the hardware prefetcher follows badly: without this, half the speed is lost.
pub const PREFETCH_BYTES: usize = 3072;

/// The rows from `first` on, one for each element of `y`, on this thread.
///
/// # Panics
/// If a row or the input is too short.
pub fn gemv_rows(kernels: &Kernels, w: &MatrixRef<'_>, first: usize, x: &[f32], y: &mut [f32]) {
    let stride = w.encoding.row_stride(w.columns);
    let end = (first + y.len()) * stride;
    let mut pairs = y.chunks_exact_mut(2);
    let mut r = first;
    for pair in &mut pairs {
        let ahead = ((r + 2) * stride + PREFETCH_BYTES).min(end);
        prefetch(&w.data[ahead..(ahead + 2 * stride).min(end)]);
        pair.copy_from_slice(&kernels.dots(w.encoding, [w.row(r), w.row(r + 1)], x));
        r += 2;
    }
    for y in pairs.into_remainder() {
        [*y] = kernels.dots(w.encoding, [w.row(r)], x);
    }
}
