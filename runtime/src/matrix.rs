//! Embedding, attention and head matrices, in memory as far as the budget goes, the rest streamed by rows.

use crate::Result;
use crate::account::Account;
use crate::fetch::{DirectFile, Fetcher, MatrixIndex, Run, RunContent, RunPart};
use crate::prefill::MatrixBatch;
use crate::stream::Stream;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;
use thermocline_kernels::{AlignedBuf, BundleLayout, Kernels, MatrixRef, Pool, gemv, gemvs};
use thermocline_split::{Flaw, Split, StoredMatrix, TensorEntry};

/// What computing needs besides the weights.
pub(crate) struct Compute {
    pub kernels: Kernels,
    pub pool: Pool,
}

/// The disk side of a pass; `None` if everything is in memory.
pub(crate) struct Disk<'a> {
    pub fetcher: &'a Fetcher,
    pub stream: &'a mut Stream,
}

/// A matrix whose first `pinned_rows` rows are in memory.
#[derive(Debug)]
pub(crate) struct Matrix {
    entry: TensorEntry,
    /// Of a row.
    layout: BundleLayout,
    /// Where each plane begins in its file.
    offsets: Vec<u64>,
    /// Bytes of a row in each.
    plane_bytes: Vec<usize>,
    /// Whether these are the rows themselves.
    is_stored: bool,
    index: Arc<MatrixIndex>,
    pinned: AlignedBuf,
    pinned_rows: usize,
    /// What is read of the pinned rows: there may be room behind streams.
    used_bytes: u64,
    /// Row ranges that are streamed, each one run.
    streamed: Vec<Range<usize>>,
}

impl Matrix {
    /// Reads the pinned rows; `run_bytes` bounds the streamed ranges.
    pub(crate) fn load(
        split: &Arc<Split>,
        matrix: &StoredMatrix<'_>,
        pinned_rows: usize,
        run_bytes: usize,
    ) -> Result<Self> {
        let (entry, row_bytes) = (matrix.entry(), matrix.row_bytes());
        let mut pinned = AlignedBuf::zeroed(pinned_rows * row_bytes)?;
        // The checksum covers the whole tensor: what will be streamed is checked now, once.
        matrix.read_start(&mut pinned[..pinned_rows * row_bytes])?;
        let per_run = (run_bytes / row_bytes).max(1);
        let streamed = (pinned_rows..entry.rows).step_by(per_run).map(|r| r..(r + per_run).min(entry.rows)).collect();
        let (offsets, plane_bytes) = matrix.planes().iter().map(|(_, t)| (t.offset, t.row_bytes())).unzip();
        let (entry, layout) = (entry.clone(), *matrix.layout());
        let index = Arc::new(MatrixIndex { split: Arc::clone(split), name: entry.name.clone() });
        let is_stored = matrix.is_stored();
        let rows = &pinned[..pinned_rows * row_bytes];
        let used_bytes = (layout.used_share(rows) * rows.len() as f64).round() as u64;
        Ok(Self { entry, layout, offsets, plane_bytes, is_stored, index, pinned, pinned_rows, used_bytes, streamed })
    }

    /// What is in memory.
    pub(crate) fn pinned_bytes(&self) -> &[u8] {
        &self.pinned[..self.pinned_rows * self.row_bytes()]
    }

    /// Bytes of a row.
    pub(crate) fn row_bytes(&self) -> usize {
        self.layout.bundle_bytes()
    }

    /// The first flaw of what is in memory.
    pub(crate) fn flaw(&self) -> Option<Flaw> {
        self.entry.matrix_flaw(&self.layout, self.pinned_bytes())
    }

    /// The runs that one use of the matrix takes from the stream; `files` has the file of each plane.
    pub(crate) fn runs<'a>(&'a self, files: &'a [Arc<DirectFile>]) -> impl Iterator<Item = Run> + 'a {
        self.streamed.iter().map(move |rows| {
            let planes = self.offsets.iter().zip(&self.plane_bytes).enumerate();
            let part = |(p, (offset, bytes)): (usize, (&u64, &usize))| RunPart {
                file: Arc::clone(&files[p.min(1)]),
                offset: offset + (rows.start * bytes) as u64,
                len: rows.len() * bytes,
            };
            let rows = || RunContent::Rows(Arc::clone(&self.index), rows.start);
            let content = if self.is_stored { RunContent::Plain } else { rows() };
            Run { parts: planes.map(part).collect(), content }
        })
    }

    /// Row `r`, decoded, if it is in memory.
    pub(crate) fn pinned_row(&self, kernels: &Kernels, r: usize, out: &mut [f32]) -> bool {
        let row = self.pinned_bytes().chunks_exact(self.row_bytes()).nth(r);
        row.inspect(|row| self.unpack(kernels, row, out)).is_some()
    }

    /// Decodes a row.
    pub(crate) fn unpack(&self, kernels: &Kernels, row: &[u8], out: &mut [f32]) {
        kernels.unpack(self.layout.encoding(), self.layout.row(row, 0), out);
    }

    fn sub<'a>(&self, data: &'a [u8], rows: usize) -> MatrixRef<'a> {
        let (encoding, columns, stride) = (self.layout.encoding(), self.entry.columns, self.row_bytes());
        MatrixRef { encoding, rows, columns, stride, data }
    }

    /// The products of several matrices with one token's `x`, one after the other in `out`, in one parallel loop, if all
    /// their rows are in memory; false, and nothing done, if not.
    pub(crate) fn apply_together<const N: usize>(
        matrices: [&Self; N],
        compute: &mut Compute,
        account: &mut Account,
        x: &[f32],
        out: &mut [f32],
    ) -> bool {
        let together = matrices.iter().all(|m| m.streamed.is_empty());
        if together {
            account.bytes.host += matrices.iter().map(|m| m.used_bytes).sum::<u64>();
            let parts = matrices.map(|m| m.sub(&m.pinned, m.pinned_rows));
            gemvs(&compute.kernels, &mut compute.pool, parts, x, out);
        }
        together
    }

    /// `out[t, :] = W x[t, :]` for `n` tokens.
    pub(crate) fn apply(
        &self,
        compute: &mut Compute,
        disk: Option<&mut Disk<'_>>,
        account: &mut Account,
        n: usize,
        x: &[f32],
        out: &mut [f32],
    ) -> Result<()> {
        let mut batch = (n > 1).then(|| MatrixBatch::new(self.entry.rows, self.entry.columns));
        let mut part = |compute: &mut Compute, data: &[u8], range: Range<usize>| {
            let w = self.sub(data, range.len());
            match &mut batch {
                None => gemv(&compute.kernels, &mut compute.pool, w, x, &mut out[range]),
                Some(batch) => batch.add(compute, w, x, out),
            }
        };
        if self.pinned_rows > 0 {
            account.bytes.host += self.used_bytes;
            part(compute, &self.pinned, 0..self.pinned_rows);
        }
        if let Some(disk) = disk {
            for range in &self.streamed {
                let begin = Instant::now();
                let staged = disk.stream.take(disk.fetcher)?;
                account.disk_wait += begin.elapsed();
                account.bytes.disk += staged.bytes().len() as u64;
                part(compute, staged.bytes(), range.clone());
                disk.fetcher.release(staged);
            }
        }
        Ok(())
    }
}
