//! Embedding, attention and head matrices, in memory as far as the budget goes, the rest streamed by rows.

use crate::Result;
use crate::account::Account;
use crate::fetch::{DirectFile, Fetcher, Run};
use crate::prefill::MatrixBatch;
use crate::stream::Stream;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;
use thermocline_kernels::{AlignedBuf, Encoding, Kernels, MatrixRef, Pool, gemv, gemvs};
use thermocline_split::{TensorEntry, TensorFile};

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
    pub entry: TensorEntry,
    encoding: Encoding,
    pinned: AlignedBuf,
    pinned_rows: usize,
    /// Row ranges that are streamed, each one run.
    streamed: Vec<Range<usize>>,
}

impl Matrix {
    /// Reads the pinned rows; `run_bytes` bounds the streamed ranges.
    pub(crate) fn load(file: &TensorFile, entry: &TensorEntry, pinned_rows: usize, run_bytes: usize) -> Result<Self> {
        let encoding = entry.format.encoding().ok_or_else(|| thermocline_split::Error::Corrupt {
            path: file.path().to_owned(),
            field: entry.name.clone(),
            reason: "not an encoded matrix".to_owned(),
        })?;
        let row_bytes = entry.row_bytes();
        let mut pinned = AlignedBuf::zeroed(pinned_rows * row_bytes)?;
        // The checksum covers the whole tensor: what will be streamed is checked now, once.
        file.read_start(entry, &mut pinned[..pinned_rows * row_bytes])?;
        let per_run = (run_bytes / row_bytes).max(1);
        let streamed = (pinned_rows..entry.rows).step_by(per_run).map(|r| r..(r + per_run).min(entry.rows)).collect();
        Ok(Self { entry: entry.clone(), encoding, pinned, pinned_rows, streamed })
    }

    /// What is in memory.
    pub(crate) fn pinned_bytes(&self) -> &[u8] {
        &self.pinned[..self.pinned_rows * self.entry.row_bytes()]
    }

    /// The runs that one use of the matrix takes from the stream.
    pub(crate) fn runs(&self, file: &Arc<DirectFile>) -> impl Iterator<Item = Run> + '_ {
        let row_bytes = self.entry.row_bytes();
        let file = Arc::clone(file);
        self.streamed.iter().map(move |rows| Run {
            file: Arc::clone(&file),
            offset: self.entry.offset + (rows.start * row_bytes) as u64,
            len: rows.len() * row_bytes,
            chunks: None,
        })
    }

    /// Row `r`, decoded, if it is in memory.
    pub(crate) fn pinned_row(&self, r: usize, out: &mut [f32]) -> bool {
        if r >= self.pinned_rows {
            return false;
        }
        let matrix = self.sub(&self.pinned, self.pinned_rows);
        thermocline_kernels::unpack(self.encoding, matrix.row(r), out);
        true
    }

    fn sub<'a>(&self, data: &'a [u8], rows: usize) -> MatrixRef<'a> {
        MatrixRef::new(self.encoding, rows, self.entry.columns, data)
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
            account.bytes.host += matrices.iter().map(|m| m.pinned_bytes().len() as u64).sum::<u64>();
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
                Some(batch) => batch.add(&mut compute.pool, w, x, out),
            }
        };
        if self.pinned_rows > 0 {
            account.bytes.host += (self.pinned_rows * self.entry.row_bytes()) as u64;
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
