use crate::{Encoding, Kernels, Pool, RowRef, prefetch};

/// An encoded matrix `[rows, columns]`, borrowed: rows in the layout of [`RowRef::from_matrix_row`], one after the other.
#[derive(Debug, Clone, Copy)]
pub struct MatrixRef<'a> {
    /// How each row is stored.
    pub encoding: Encoding,
    /// Rows (outputs).
    pub rows: usize,
    /// Columns (inputs).
    pub columns: usize,
    /// Bytes from one row to the next: [`Encoding::row_stride`], and room for the longest stream.
    pub stride: usize,
    /// `rows * stride` bytes or more.
    pub data: &'a [u8],
}

impl<'a> MatrixRef<'a> {
    /// A matrix in an encoding without streams.
    pub fn new(encoding: Encoding, rows: usize, columns: usize, data: &'a [u8]) -> Self {
        Self { encoding, rows, columns, stride: encoding.row_stride(columns), data }
    }

    /// Row `r`.
    ///
    /// # Panics
    /// If there is no such row.
    #[inline]
    pub fn row(&self, r: usize) -> RowRef<'a> {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        let bytes = &self.data[r * self.stride..(r + 1) * self.stride];
        RowRef::from_matrix_row(self.encoding, self.columns, bytes)
    }
}

/// Rows that one task computes: enough to amortise the hand-over, few enough to balance.
const TASK_ROWS: usize = 64;

/// `y = W x`: `x` is `[columns]`, `y` is `[rows]`. Reads the matrix once; bounded by memory bandwidth.
///
/// # Panics
/// If the lengths do not fit.
pub fn gemv(kernels: &Kernels, pool: &mut Pool, w: MatrixRef<'_>, x: &[f32], y: &mut [f32]) {
    gemvs(kernels, pool, [w], x, y);
}

/// Several matrices times one input in one parallel loop, `y` one product after the other: small matrices would leave
/// threads idle, and each loop has its hand-over.
///
/// # Panics
/// If the lengths do not fit.
pub fn gemvs<const N: usize>(kernels: &Kernels, pool: &mut Pool, w: [MatrixRef<'_>; N], x: &[f32], y: &mut [f32]) {
    assert!(w.iter().all(|w| w.columns == x.len()), "the matrices' columns");
    assert_eq!(w.iter().map(|w| w.rows).sum::<usize>(), y.len(), "the matrices' rows");
    pool.for_each_chunk(y, TASK_ROWS, |task, mut y| {
        let mut row = task * TASK_ROWS;
        for w in &w {
            if row < w.rows {
                let (mine, rest) = y.split_at_mut(y.len().min(w.rows - row));
                gemv_rows(kernels, w, row, x, mine);
                (row, y) = (w.rows, rest);
            }
            row -= w.rows;
        }
    });
}

/// How far ahead of the computation memory is asked for: a few hundred nanoseconds of a core's bandwidth. Two rows at a
/// time are two streams, which the hardware prefetcher follows badly: without this, half the speed is lost.
pub const PREFETCH_BYTES: usize = 3072;

/// The rows from `first` on, one for each element of `y`, on this thread.
///
/// # Panics
/// If a row or the input is too short.
pub fn gemv_rows(kernels: &Kernels, w: &MatrixRef<'_>, first: usize, x: &[f32], y: &mut [f32]) {
    let stride = w.stride;
    // Short rows four at a time: the end of each, adding up one vector's lanes, is as long as its products.
    if stride <= SHORT_ROW_BYTES {
        rows_by::<4>(kernels, w, first, x, y)
    } else {
        rows_by::<2>(kernels, w, first, x, y)
    }
}

/// Rows of which four at a time are still asked for in small portions.
const SHORT_ROW_BYTES: usize = 1024;

fn rows_by<const N: usize>(kernels: &Kernels, w: &MatrixRef<'_>, first: usize, x: &[f32], y: &mut [f32]) {
    let stride = w.stride;
    let end = (first + y.len()) * stride;
    let (groups, rest) = y.as_chunks_mut::<N>();
    let mut r = first;
    for group in groups {
        let ahead = ((r + N) * stride + PREFETCH_BYTES).min(end);
        prefetch(&w.data[ahead..(ahead + N * stride).min(end)]);
        *group = kernels.dots(w.encoding, std::array::from_fn(|i| w.row(r + i)), x);
        r += N;
    }
    for (y, r) in rest.iter_mut().zip(r..) {
        [*y] = kernels.dots(w.encoding, [w.row(r)], x);
    }
}
