//! Embedding, attention and head matrices as a reader wants them: their planes, up to a precision, put together.

use crate::delta::Delta;
use crate::error::{Result, corrupt};
use crate::layer_file::not_exact;
use crate::planes::{Plane, further_planes, joined};
use crate::{Format, Manifest, Precision, Split, TensorEntry, TensorFile};
use rayon::prelude::*;
use std::path::Path;
use thermocline_kernels::{BundleLayout, Encoding, Kernels};

/// What is read at a time of a plane that becomes part of rows.
const PIECE_BYTES: usize = 256 << 10;

/// A matrix of a split, in one tensor or in one for each plane.
#[derive(Debug)]
pub struct StoredMatrix<'a> {
    /// The base first.
    planes: Vec<(&'a TensorFile, &'a TensorEntry)>,
    /// Of a row with its planes put together.
    stored: BundleLayout,
    /// Of what readers get: the same, or bf16 with a delta on it.
    layout: BundleLayout,
    delta: Option<&'a Delta>,
}

/// Whether a matrix is one of attention's.
pub(crate) fn is_attention(matrix: &str) -> bool {
    matrix.contains(".self_attn.")
}

/// That the manifest lists the planes that its encoding of matrices has, of every matrix: a run at full precision would
/// otherwise quietly take the base.
pub(crate) fn check_planes(manifest: &Manifest, dir: &Path) -> Result<()> {
    let path = dir.join("manifest.json");
    let parse = |field: &str, name: &str| name.parse().map_err(|e: String| corrupt(&path, field, e));
    let resident: Encoding = parse("packing.resident_encoding", &manifest.packing.resident_encoding)?;
    let attention = manifest.packing.attention_encoding.as_deref();
    let attention = attention.map_or(Ok(resident), |name| parse("packing.attention_encoding", name))?;
    let matrices = manifest.resident.tensors.iter().filter(|t| t.format.encoding().is_some());
    let expected = matrices.flat_map(|t| {
        let encoding = if is_attention(&t.name) { attention } else { resident };
        let plane = |p: &Plane| (format!("{}.{}", t.name, p.name()), Format::of_plane(*p), t.rows, t.columns);
        further_planes(encoding).iter().map(plane).collect::<Vec<_>>()
    });
    let listed = manifest.resident_planes.iter().flat_map(|f| &f.tensors);
    match listed.map(|t| (t.name.clone(), t.format, t.rows, t.columns)).eq(expected) {
        true => Ok(()),
        false => Err(corrupt(
            &path,
            "resident_planes",
            format!("not the planes of matrices in {resident}, attention in {attention}"),
        )),
    }
}

impl Split {
    /// A matrix of embedding, attention or head, at this split's precision.
    ///
    /// # Errors
    /// If there is none of that name, or its planes do not fit each other.
    pub fn matrix(&self, name: &str) -> Result<StoredMatrix<'_>> {
        let base = (self.resident(), self.resident().entry(name)?);
        let mut planes = vec![base];
        let precision = self.planes().of_matrices();
        if let Some(file) = self.resident_planes() {
            for plane in [Plane::Coarse, Plane::Final].into_iter().filter(|p| precision.takes(*p)) {
                let name = format!("{name}.{}", plane.name());
                planes.extend(file.tensors().iter().find(|t| t.name == name).map(|entry| (file, entry)));
            }
        }
        StoredMatrix::new(planes, precision)?.with_delta(self.delta())
    }

    /// All of them, in file order.
    ///
    /// # Errors
    /// As [`Split::matrix`].
    pub fn matrices(&self) -> Result<Vec<StoredMatrix<'_>>> {
        let encoded = self.resident().tensors().iter().filter(|t| t.format.encoding().is_some());
        encoded.map(|t| self.matrix(&t.name)).collect()
    }
}

impl<'a> StoredMatrix<'a> {
    fn new(planes: Vec<(&'a TensorFile, &'a TensorEntry)>, precision: Precision) -> Result<Self> {
        let Some(&(file, base)) = planes.first() else { unreachable!("a matrix has a base") };
        let bad = |reason: &str| corrupt(file.path(), &base.name, reason);
        let stored = base.format.encoding().ok_or_else(|| bad("not an encoded matrix"))?;
        if planes.iter().any(|(_, t)| (t.rows, t.columns) != (base.rows, base.columns)) {
            return Err(bad("planes of different shapes"));
        }
        let over: Vec<Plane> = planes.iter().skip(1).filter_map(|(_, t)| t.format.plane()).collect();
        let encoding = joined(stored, &over).filter(|_| over.len() + 1 == planes.len());
        let n = planes.len() - 1;
        let encoding = encoding.ok_or_else(|| bad(&format!("{n} planes over {stored} at {precision}")))?;
        let total = planes.iter().map(|(_, t)| t.row_bytes()).sum();
        let layout = BundleLayout::of_row_bytes(encoding, base.columns, total);
        let layout = layout.ok_or_else(|| bad("rows do not fit the encoding"))?;
        Ok(Self { planes, stored: layout, layout, delta: None })
    }

    fn with_delta(mut self, delta: Option<&'a Delta>) -> Result<Self> {
        if delta.is_some() {
            let encoding = self.stored.encoding();
            let bf16 = BundleLayout::matrix_row(Encoding::Bf16, self.stored.hidden_size(), 0);
            let bf16 = bf16.filter(|_| encoding.is_exact());
            self.layout = bf16.ok_or_else(|| not_exact(self.planes[0].0.path(), encoding))?;
            self.delta = delta;
        }
        Ok(self)
    }

    /// The base's entry: name, rows and columns.
    pub fn entry(&self) -> &'a TensorEntry {
        self.planes[0].1
    }

    /// Whether it is one of attention's.
    pub fn is_attention(&self) -> bool {
        is_attention(&self.entry().name)
    }

    /// The tensors of the planes and their files, the base first.
    pub fn planes(&self) -> &[(&'a TensorFile, &'a TensorEntry)] {
        &self.planes
    }

    /// The layout of a row, as they are when planes are put together.
    pub fn layout(&self) -> &BundleLayout {
        &self.layout
    }

    /// Bytes from one row to the next.
    pub fn row_bytes(&self) -> usize {
        self.layout.bundle_bytes()
    }

    /// Bytes of all rows.
    pub fn bytes(&self) -> u64 {
        (self.entry().rows * self.row_bytes()) as u64
    }

    /// Reads rows `first .. first + n` (unchecked: the checksum covers whole tensors).
    ///
    /// # Errors
    /// If the rows are outside the matrix or cannot be read.
    pub fn read_rows(&self, first: usize, n: usize) -> Result<Vec<u8>> {
        let parts = self.planes.iter().map(|(file, t)| file.read_rows(t, first, n)).collect::<Result<Vec<_>>>()?;
        let mut out = vec![0; n * self.row_bytes()];
        self.join(first, &parts.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut out)?;
        Ok(out)
    }

    /// Reads everything, a piece at a time, checks it, and keeps the first rows: `out` holds as many whole rows as are
    /// wanted.
    ///
    /// # Errors
    /// If it cannot be read or a checksum is wrong.
    ///
    /// # Panics
    /// If `out` is longer than the matrix.
    pub fn read_start(&self, out: &mut [u8]) -> Result<()> {
        if self.delta.is_some() {
            let mut stored = vec![0; out.len() / self.row_bytes() * self.stored.bundle_bytes()];
            self.read_stored(&mut stored)?;
            return self.finish(0, &stored, out);
        }
        self.read_stored(out)
    }

    /// The same without a delta.
    fn read_stored(&self, out: &mut [u8]) -> Result<()> {
        if let [(file, t)] = self.planes.as_slice() {
            return file.read_start(t, out);
        }
        let row_bytes = self.stored.bundle_bytes();
        let mut first = 0;
        for (file, t) in &self.planes {
            let bytes = t.row_bytes();
            file.read_by(t, bytes * (PIECE_BYTES / bytes).max(1), |at, piece| {
                let rows = out.chunks_exact_mut(row_bytes).skip(at / bytes);
                rows.zip(piece.chunks_exact(bytes))
                    .for_each(|(row, part)| row[first..first + bytes].copy_from_slice(part));
            })?;
            first += bytes;
        }
        Ok(())
    }

    /// Whether the stored bytes are the rows themselves.
    pub fn is_stored(&self) -> bool {
        self.planes.len() == 1 && self.delta.is_none()
    }

    /// Makes rows, from `first` on, of the stored bytes of their planes.
    ///
    /// # Errors
    /// If a delta cannot be read.
    ///
    /// # Panics
    /// If a part is shorter than its rows.
    pub fn join(&self, first: usize, parts: &[&[u8]], out: &mut [u8]) -> Result<()> {
        let bytes: Vec<usize> = self.planes.iter().map(|(_, t)| t.row_bytes()).collect();
        if self.delta.is_none() {
            join_rows(parts, &bytes, out);
            return Ok(());
        }
        let mut stored = vec![0; out.len() / self.row_bytes() * self.stored.bundle_bytes()];
        join_rows(parts, &bytes, &mut stored);
        self.finish(first, &stored, out)
    }

    /// Exact rows, from `first` on, become bf16 with the delta on them.
    fn finish(&self, first: usize, stored: &[u8], out: &mut [u8]) -> Result<()> {
        let (columns, n) = (self.layout.hidden_size(), out.len() / self.row_bytes());
        let mut bits = vec![0u16; n * columns];
        let kernels = Kernels::detect();
        let rows = bits.par_chunks_exact_mut(columns).zip(stored.par_chunks_exact(self.stored.bundle_bytes()));
        rows.for_each(|(bits, row)| kernels.decode(self.stored.encoding(), self.stored.row(row, 0), bits));
        if let Some(delta) = self.delta {
            delta.patch_rows(&self.entry().name, first..first + n, &mut bits)?;
        }
        for (out, bits) in out.chunks_exact_mut(self.row_bytes()).zip(bits.chunks_exact(columns)) {
            self.layout.row_mut(out, 0).0.copy_from_slice(bytemuck::cast_slice(bits));
        }
        Ok(())
    }
}

/// Rows of several planes, `bytes[p]` each of plane p, become rows with the planes one after the other.
fn join_rows(parts: &[&[u8]], bytes: &[usize], out: &mut [u8]) {
    for (i, row) in out.chunks_exact_mut(bytes.iter().sum()).enumerate() {
        let mut first = 0;
        for (part, &bytes) in parts.iter().zip(bytes) {
            row[first..first + bytes].copy_from_slice(&part[i * bytes..(i + 1) * bytes]);
            first += bytes;
        }
    }
}
