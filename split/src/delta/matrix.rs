//! One matrix, compared block by block and written behind what is there already.

use super::bits::{self, Shape};
use super::encode::{Encoded, encode};
use super::index::{self, BlockEntry, BlockKind};
use super::manifest::{DeltaKind, DeltaTensor};
use crate::error::{Result, io};
use rayon::prelude::*;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use thermocline_datasets::Checkpoint;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// Weights that a thread loads at a time where a matrix is loaded whole.
const LOAD_WEIGHTS: usize = 1 << 20;

/// `delta.bin`, being written.
pub(super) struct DataFile {
    path: PathBuf,
    file: BufWriter<File>,
    /// Bytes written.
    pub at: u64,
}

impl DataFile {
    /// Goes on behind the first `at` bytes of what may be there.
    pub(super) fn open(path: &Path, at: u64) -> Result<Self> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(false).open(path).map_err(io(path))?;
        file.set_len(at).and_then(|()| file.seek(SeekFrom::Start(at))).map_err(io(path))?;
        Ok(Self { path: path.to_owned(), file: BufWriter::with_capacity(1 << 20, file), at })
    }

    /// When this returns, all that was written is on disk.
    pub(super) fn sync(&mut self) -> Result<()> {
        self.file.flush().and_then(|()| self.file.get_ref().sync_data()).map_err(io(&self.path))
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.at += bytes.len() as u64;
        self.file.write_all(bytes).map_err(io(&self.path))
    }

    /// Ends the file; it is on disk when this returns.
    pub(super) fn finish(self) -> Result<u64> {
        let file = self.file.into_inner().map_err(|e| io(&self.path)(e.into_error()))?;
        file.sync_all().map_err(io(&self.path))?;
        Ok(self.at)
    }
}

/// How a matrix is cut and compressed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    pub block_weights: usize,
    pub zstd_level: i32,
}

/// Number of blocks by kind: unchanged, sparse, dense.
pub(super) type BlockCounts = [u64; 3];

/// Compares a bf16 matrix and writes its blocks and their index. Memory: a few blocks for each thread; for a down
/// projection also the bits of both matrices.
pub(super) fn write(
    data: &mut DataFile,
    models: [&dyn Checkpoint; 2],
    name: &str,
    shape: Shape,
    cut: Cut,
    counts: &mut BlockCounts,
) -> Result<DeltaTensor> {
    let (rows, columns) = (shape.rows, shape.columns);
    let block_rows = index::block_rows(rows, columns, cut.block_weights);
    let mut tensor = DeltaTensor {
        name: name.to_owned(),
        kind: DeltaKind::Unchanged,
        rows,
        columns,
        changed: 0,
        offset: data.at,
        bytes: 0,
        block_rows,
        index_offset: 0,
        checksum: String::new(),
        final_digest: String::new(),
        low_rank: None,
    };
    let mut entries = Vec::new();
    let mut digest = Xxh3::new();
    let whole = if shape.is_down {
        let [base, changed] = models.map(|m| load_whole(m, name, columns, rows));
        let (base, changed) = (base?, changed?);
        changed.chunks(LOAD_WEIGHTS).for_each(|bits| digest.update(&bits::bytes(bits)));
        Some((base, changed))
    } else {
        None
    };
    let blocks: Vec<usize> = (0..rows.div_ceil(block_rows)).collect();
    // Batches of a few blocks for each thread, written in order before the next is loaded.
    for batch in blocks.chunks(4 * rayon::current_num_threads()) {
        let encoded = batch.par_iter().map(|&b| -> Result<(Encoded, Vec<u8>)> {
            let own = index::rows_of(&tensor, b);
            Ok(match &whole {
                Some((base, changed)) => {
                    let strips = [base, changed].map(|m| strip(m, rows, own.clone()));
                    (encode(&strips[0], &strips[1], columns, cut.zstd_level), Vec::new())
                }
                None => {
                    let base = bits::load(models[0], name, own.clone())?;
                    let changed = bits::load(models[1], name, own)?;
                    (encode(&base, &changed, columns, cut.zstd_level), bits::bytes(&changed))
                }
            })
        });
        for (block, final_bytes) in encoded.collect::<Result<Vec<_>>>()? {
            digest.update(&final_bytes);
            let Encoded { kind, changed, planes, bytes, checksum } = block;
            entries.push(BlockEntry { kind, offset: data.at, changed, planes, checksum });
            data.write(&bytes)?;
            tensor.changed += u64::from(changed);
        }
    }
    tensor.final_digest = format!("{:032x}", digest.digest128());
    if tensor.changed == 0 {
        tensor.block_rows = 0;
        return Ok(tensor);
    }
    for entry in &entries {
        counts[match entry.kind {
            BlockKind::Unchanged => 0,
            BlockKind::Sparse => 1,
            BlockKind::Dense => 2,
        }] += 1;
    }
    tensor.kind = DeltaKind::Blocks;
    tensor.index_offset = data.at;
    let index: Vec<u8> = entries.into_iter().flat_map(BlockEntry::to_bytes).collect();
    tensor.checksum = format!("{:016x}", xxh3_64(&index));
    data.write(&index)?;
    tensor.bytes = data.at - tensor.offset;
    Ok(tensor)
}

/// The digest of a matrix: XXH3-128 of its row-major bf16 bytes, loaded a few rows at a time.
pub(super) fn digest(model: &dyn Checkpoint, name: &str, rows: usize, columns: usize) -> Result<String> {
    let mut digest = Xxh3::new();
    let step = (4 * LOAD_WEIGHTS).div_ceil(columns.max(1));
    for first in (0..rows).step_by(step) {
        digest.update(&bits::bytes(&bits::load(model, name, first..(first + step).min(rows))?));
    }
    Ok(format!("{:032x}", digest.digest128()))
}

/// A whole matrix as bits, `[rows, columns]`, loaded by all threads.
fn load_whole(model: &dyn Checkpoint, name: &str, rows: usize, columns: usize) -> Result<Vec<u16>> {
    let mut out = vec![0u16; rows * columns];
    let step = (LOAD_WEIGHTS / columns).max(1);
    out.par_chunks_mut(step * columns).enumerate().try_for_each(|(i, out)| -> Result<()> {
        let first = i * step;
        out.copy_from_slice(&bits::load(model, name, first..first + out.len() / columns)?);
        Ok(())
    })?;
    Ok(out)
}

/// Columns `own` of a row-major matrix with `columns`, each as a row.
fn strip(matrix: &[u16], columns: usize, own: Range<usize>) -> Vec<u16> {
    let rows = matrix.len() / columns;
    let mut out = vec![0u16; own.len() * rows];
    for (r, row) in matrix.chunks_exact(columns).enumerate() {
        row[own.clone()].iter().enumerate().for_each(|(n, bits)| out[n * rows + r] = *bits);
    }
    out
}
