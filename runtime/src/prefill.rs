//! Batches of tokens: weights are decoded to f32, a piece at a time, and multiplied by ordinary matrix products.
//!
//! Pieces have fixed boundaries and every product runs on one thread, so that the result does not depend on where the
//! weights came from nor on the number of threads.

use crate::chooser::SketchedLayer;
use crate::matrix::Compute;
use thermocline_datasets::Activation;
use thermocline_kernels::{Encoding, LayerLayout, MatrixRef, Pool, matmul, matmul_nn};

/// Neurons, or rows of a matrix, that are in memory as f32 at a time.
pub(crate) const PIECE: usize = 256;
/// Tokens that one task multiplies.
const TASK_TOKENS: usize = 32;

/// A matrix times a batch, fed with rows in ascending order: `out[t, r] = W[r, :] x[t, :]`.
#[derive(Debug)]
pub(crate) struct MatrixBatch {
    rows: usize,
    decoded: Vec<f32>,
    filled: usize,
    done: usize,
}

impl MatrixBatch {
    /// For a matrix of `rows` by `columns`.
    pub(crate) fn new(rows: usize, columns: usize) -> Self {
        Self { rows, decoded: vec![0.0; PIECE.min(rows) * columns], filled: 0, done: 0 }
    }

    /// Takes the next rows; multiplies whenever a piece is complete. `x` is `[n, columns]`, `out` is `[n, rows]`.
    pub(crate) fn add(&mut self, compute: &mut Compute, w: MatrixRef<'_>, x: &[f32], out: &mut [f32]) {
        let Compute { kernels, pool } = compute;
        let mut next = 0;
        while next < w.rows {
            let piece = PIECE.min(self.rows - self.done);
            let n = (piece - self.filled).min(w.rows - next);
            let decoded = &mut self.decoded[self.filled * w.columns..(self.filled + n) * w.columns];
            pool.for_each_chunk(decoded, w.columns, |r, out| kernels.unpack(w.encoding, w.row(next + r), out));
            next += n;
            self.filled += n;
            if self.filled < piece {
                return;
            }
            let (first, decoded) = (self.done, &self.decoded);
            pool.for_each_chunk(out, TASK_TOKENS * self.rows, |task, out| {
                let n = out.len() / self.rows;
                let x = &x[task * TASK_TOKENS * w.columns..][..n * w.columns];
                let mut product = vec![0.0; n * piece];
                matmul(n, piece, w.columns, x, decoded, &mut product, false);
                for (out, product) in out.chunks_exact_mut(self.rows).zip(product.chunks_exact(piece)) {
                    out[first..first + piece].copy_from_slice(product);
                }
            });
            self.done += piece;
            self.filled = 0;
        }
    }
}

/// A feed-forward layer over a batch, fed with bundles in ascending order.
#[derive(Debug)]
pub(crate) struct FfnBatch {
    hidden_size: usize,
    activation: Activation,
    n_neurons: usize,
    /// `[PIECE, hidden]` each.
    rows: [Vec<f32>; 3],
    /// Neurons of the current piece that are decoded.
    filled: usize,
    /// Neurons that were multiplied.
    done: usize,
}

impl FfnBatch {
    pub(crate) fn new(hidden_size: usize, activation: Activation, n_neurons: usize) -> Self {
        let rows = std::array::from_fn(|_| vec![0.0; PIECE.min(n_neurons) * hidden_size]);
        Self { hidden_size, activation, n_neurons, rows, filled: 0, done: 0 }
    }

    /// Memory of the decoded piece.
    pub(crate) fn bytes(hidden_size: usize, n_neurons: usize) -> u64 {
        (3 * 4 * PIECE.min(n_neurons) * hidden_size) as u64
    }

    /// Forgets a layer that was broken off.
    pub(crate) fn reset(&mut self) {
        (self.filled, self.done) = (0, 0);
    }

    /// Takes the next bundles; multiplies whenever a piece is complete. `x` and `y` are `[n, hidden]`, `y += FFN(x)`. Residuals are of
    /// the `sketch`.
    pub(crate) fn add(
        &mut self,
        compute: &mut Compute,
        layout: &LayerLayout,
        sketch: Option<&SketchedLayer>,
        x: &[f32],
        mut bundles: &[u8],
        y: &mut [f32],
    ) {
        let Compute { kernels, pool } = compute;
        let hidden = layout.hidden_size();
        while !bundles.is_empty() {
            let piece = PIECE.min(self.n_neurons - self.done);
            let first = self.done + self.filled;
            let n = (piece - self.filled).min(layout.n_in(first, bundles.len()));
            let (now, later) = bundles.split_at(layout.bytes(first..first + n));
            for (which, rows) in self.rows.iter_mut().enumerate() {
                let rows = &mut rows[self.filled * hidden..(self.filled + n) * hidden];
                pool.for_each_chunk(rows, 16 * hidden, |task, rows| {
                    for (r, out) in rows.chunks_exact_mut(hidden).enumerate() {
                        let neuron = first + task * 16 + r;
                        let (of, bundle) = (layout.of(neuron), layout.bundle(now, first, neuron));
                        kernels.unpack(of.encoding(), of.row(bundle, which), out);
                        if of.encoding() == Encoding::R4
                            && let Some(sketch) = sketch
                        {
                            sketch.add_row(which, neuron, out);
                        }
                    }
                });
            }
            bundles = later;
            self.filled += n;
            if self.filled == piece {
                self.multiply(pool, x, y);
            }
        }
    }

    fn multiply(&mut self, pool: &mut Pool, x: &[f32], y: &mut [f32]) {
        let (hidden, piece, activation) = (self.hidden_size, self.filled, self.activation);
        let [gate, up, down] = &self.rows;
        pool.for_each_chunk(y, TASK_TOKENS * hidden, |task, y| {
            let n = y.len() / hidden;
            let x = &x[task * TASK_TOKENS * hidden..][..n * hidden];
            let (mut g, mut u) = (vec![0.0; n * piece], vec![0.0; n * piece]);
            matmul(n, piece, hidden, x, gate, &mut g, false);
            matmul(n, piece, hidden, x, up, &mut u, false);
            for (g, u) in g.iter_mut().zip(&u) {
                *g = activation.apply(*g, *u);
            }
            matmul_nn(n, hidden, piece, &g, down, y, true);
        });
        self.done += self.filled;
        self.filled = 0;
        if self.done == self.n_neurons {
            self.done = 0;
        }
    }
}
