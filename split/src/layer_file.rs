//! The bundles of one layer as a reader wants them: its planes, up to a precision, put together.

use crate::Error;
use crate::chunk::Codec;
use crate::content::Content;
use crate::delta::Delta;
use crate::error::{Result, corrupt};
use crate::manifest::{LayerEntry, PlaneEntry};
use crate::plane_file::PlaneFile;
use crate::planes::{Plane, further_planes, joined};
use crate::precision::Precision;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use thermocline_kernels::{BundleLayout, Encoding, Kernels};

/// Bytes of one of a layer's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileRange {
    /// Which: an index into [`LayerFile::paths`].
    pub file: usize,
    /// First byte.
    pub offset: u64,
    /// How many.
    pub bytes: usize,
}

/// An open, checked layer: neuron order and chunk index in memory, bundles on disk, in one file or in one for each plane.
#[derive(Debug)]
pub struct LayerFile {
    /// The base first.
    planes: Vec<PlaneFile>,
    /// Of the planes put together.
    stored: BundleLayout,
    /// Of what readers get: the same with room for the streams of other layers, or bf16 with a delta on it.
    layout: BundleLayout,
    delta: Option<Arc<Delta>>,
}

/// `decode(plane, chunk, bundles)`.
type DecodeChunk<'a> = dyn FnMut(usize, usize, &mut [u8]) -> Result<()> + 'a;

/// Neurons that a delta changes in one pass: it reads a block of rows once for each.
const PATCHED_NEURONS: usize = 4096;

impl LayerFile {
    /// Opens the file of a layer in one plane and checks it: checksums of header, order and index; that the order is a
    /// permutation; that the chunks lie one behind the other, without holes, to the end of the file. Chunk data are
    /// checked when read.
    ///
    /// # Errors
    /// If the file cannot be read or any of that does not hold.
    pub fn open(path: &Path) -> Result<Self> {
        Self::of_planes(vec![PlaneFile::open(path)?], Precision::Base)
    }

    /// Opens the planes that `precision` takes of those that the manifest lists for this encoding.
    pub(crate) fn open_planes(
        dir: &Path,
        entry: &LayerEntry,
        encoding: Encoding,
        precision: Precision,
    ) -> Result<Self> {
        let planes = further_planes(encoding);
        if planes.len() != entry.planes.len() {
            let reason = format!("{} planes of a layer in {encoding}", entry.planes.len());
            return Err(corrupt(&dir.join(&entry.file), "planes", reason));
        }
        let base =
            PlaneEntry { file: entry.file.clone(), file_bytes: entry.file_bytes, checksum: entry.checksum.clone() };
        let further = planes.iter().zip(&entry.planes).filter(|(plane, _)| precision.takes(**plane));
        let mut planes = Vec::new();
        for entry in [&base].into_iter().chain(further.map(|(_, entry)| entry)) {
            let path = dir.join(&entry.file);
            let plane = PlaneFile::open(&path)?;
            if plane.file_bytes() != entry.file_bytes || plane.checksum() != entry.checksum {
                return Err(corrupt(&path, "header", "does not fit the manifest: files of two splits are mixed"));
            }
            planes.push(plane);
        }
        Self::of_planes(planes, precision)
    }

    /// Puts planes together, the base first, if they are of one layer and make an encoding.
    pub(crate) fn of_planes(planes: Vec<PlaneFile>, precision: Precision) -> Result<Self> {
        let Some((base, further)) = planes.split_first() else { unreachable!("a layer has a base") };
        let Content::Bundles(stored) = *base.content() else {
            return Err(corrupt(base.path(), "encoding", "a further plane where the base should be"));
        };
        let misfit = |file: &PlaneFile| corrupt(file.path(), "header", "does not fit the layer's base");
        for plane in further {
            let same = plane.layer() == base.layer()
                && plane.content().hidden_size() == base.content().hidden_size()
                && plane.order() == base.order()
                && plane.chunk_neurons() == base.chunk_neurons();
            if !same {
                return Err(misfit(plane));
            }
        }
        let (hidden, base_encoding) = (stored.hidden_size(), stored.encoding());
        let over: Vec<Plane> = further.iter().filter_map(|p| p.content().plane()).collect();
        let total = planes.iter().map(|p| p.content().bundle_bytes()).sum();
        let encoding = joined(base_encoding, &over).filter(|_| over.len() == further.len());
        match encoding.and_then(|encoding| BundleLayout::of_bundle_bytes(encoding, hidden, total)) {
            Some(layout) => Ok(Self { planes, stored: layout, layout, delta: None }),
            None => {
                let reason = format!("{} planes over {base_encoding} at {precision}", further.len());
                Err(corrupt(base.path(), "encoding", reason))
            }
        }
    }

    /// Whether every chunk of every plane can be read and is what was written.
    pub(crate) fn is_whole(&self) -> bool {
        self.planes.iter().all(PlaneFile::is_whole)
    }

    /// Leaves as much room behind streams as the layer with the longest needs: bundles of all layers are then alike.
    pub(crate) fn pad_to(&mut self, bundle_bytes: usize) {
        let (encoding, hidden_size) = (self.stored.encoding(), self.stored.hidden_size());
        self.layout = BundleLayout::of_bundle_bytes(encoding, hidden_size, bundle_bytes).unwrap_or(self.layout);
    }

    /// Puts a delta on the bundles, which then come as bf16.
    ///
    /// # Errors
    /// If the bundles are not exact.
    pub(crate) fn set_delta(&mut self, delta: Arc<Delta>) -> Result<()> {
        let encoding = self.stored.encoding();
        let bf16 = BundleLayout::new(Encoding::Bf16, self.stored.hidden_size()).filter(|_| encoding.is_exact());
        self.layout = bf16.ok_or_else(|| not_exact(self.path(), encoding))?;
        self.delta = Some(delta);
        Ok(())
    }

    fn base(&self) -> &PlaneFile {
        &self.planes[0]
    }

    /// Where the base lies.
    pub fn path(&self) -> &Path {
        self.base().path()
    }

    /// Where the files lie, the base's first.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.planes.iter().map(PlaneFile::path)
    }

    /// Which layer this is.
    pub fn layer(&self) -> usize {
        self.base().layer()
    }

    /// The bundles' layout, as they are when planes are put together.
    pub fn layout(&self) -> &BundleLayout {
        &self.layout
    }

    /// Neurons in every chunk but perhaps the last.
    pub fn chunk_neurons(&self) -> usize {
        self.base().chunk_neurons()
    }

    /// Chunks of the layer.
    pub fn n_chunks(&self) -> usize {
        self.base().index().len()
    }

    /// `order()[i]` is the checkpoint's number of the neuron at position i; hot first.
    pub fn order(&self) -> &[u32] {
        self.base().order()
    }

    /// The inverse of [`LayerFile::order`]: the place of each of the checkpoint's neurons.
    pub fn places(&self) -> Vec<u32> {
        let mut place = vec![0; self.order().len()];
        self.order().iter().enumerate().for_each(|(p, &id)| place[id as usize] = p as u32);
        place
    }

    /// Size of the files.
    pub fn file_bytes(&self) -> u64 {
        self.planes.iter().map(PlaneFile::file_bytes).sum()
    }

    /// Checksum of the base's header, order and index, in hexadecimal; through the index it covers the chunks.
    pub fn checksum(&self) -> String {
        self.base().checksum()
    }

    /// Bytes of `chunks` in the files.
    ///
    /// # Panics
    /// If the range is outside the layer, here and below.
    pub fn stored_bytes(&self, chunks: Range<usize>) -> u64 {
        let of_plane = |p: &PlaneFile| p.index()[chunks.clone()].iter().map(|e| u64::from(e.stored_bytes)).sum::<u64>();
        self.planes.iter().map(of_plane).sum()
    }

    /// Where the bytes of `chunks` lie: one piece of each file.
    pub fn stored_ranges(&self, chunks: Range<usize>) -> Vec<FileRange> {
        let of_plane = |(file, p): (usize, &PlaneFile)| {
            let entries = &p.index()[chunks.clone()];
            let bytes = entries.iter().map(|e| e.stored_bytes as usize).sum();
            FileRange { file, offset: entries.first().map_or(0, |e| e.offset), bytes }
        };
        self.planes.iter().enumerate().map(of_plane).collect()
    }

    /// Neurons in `chunks`.
    pub fn n_neurons(&self, chunks: Range<usize>) -> usize {
        (chunks.end * self.chunk_neurons()).min(self.order().len())
            - (chunks.start * self.chunk_neurons()).min(self.order().len())
    }

    /// Whether the stored bytes of `chunks` are the bundles themselves.
    pub fn are_stored(&self, chunks: Range<usize>) -> bool {
        self.planes.len() == 1
            && self.delta.is_none()
            && self.base().index()[chunks].iter().all(|e| e.codec == Codec::Stored)
    }

    /// Chunks that are compressed, in all files.
    pub fn n_compressed(&self) -> usize {
        let entries = self.planes.iter().flat_map(|p| p.index());
        entries.filter(|e| matches!(e.codec, Codec::Zstd | Codec::ZstdPlanes)).count()
    }

    /// Reads, checks and decodes chunks `chunks` into `out` (their bundles, one behind the other).
    ///
    /// # Errors
    /// If a file cannot be read, or a chunk's checksum or size is wrong.
    ///
    /// # Panics
    /// If `out` has another length than the bundles.
    pub fn read_chunks(&self, chunks: Range<usize>, out: &mut [u8]) -> Result<()> {
        let mut stored = Vec::new();
        self.decode_with(chunks, out, |p, c, bundles| self.planes[p].read_chunk(c, &mut stored, bundles))
    }

    /// Checks and decodes `chunks` into `out`, from the bytes of [`LayerFile::stored_ranges`].
    ///
    /// # Errors
    /// If a checksum or a decoded size is wrong.
    ///
    /// # Panics
    /// If `stored` or `out` has another length.
    pub fn decode_chunks(&self, chunks: Range<usize>, stored: &[&[u8]], out: &mut [u8]) -> Result<()> {
        let mut rest = stored.to_vec();
        self.decode_with(chunks, out, |p, c, bundles| {
            let (now, later) = rest[p].split_at(self.planes[p].index()[c].stored_bytes as usize);
            rest[p] = later;
            self.planes[p].decode_chunk(c, now, bundles)
        })
    }

    /// Checks the stored bytes of `chunks`, which [`LayerFile::are_stored`].
    ///
    /// # Errors
    /// If a checksum is wrong.
    pub fn check_chunks(&self, chunks: Range<usize>, mut stored: &[u8]) -> Result<()> {
        for c in chunks {
            let (now, later) = stored.split_at(self.base().index()[c].stored_bytes as usize);
            self.base().check_chunk(c, now)?;
            stored = later;
        }
        Ok(())
    }

    /// `decode(plane, chunk, bundles)` for all of them; the planes of a neuron become neighbours.
    fn decode_with(
        &self,
        chunks: Range<usize>,
        out: &mut [u8],
        mut decode: impl FnMut(usize, usize, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        if let Some(delta) = &self.delta {
            let first = chunks.start * self.chunk_neurons();
            let (size, mut stored) = (self.layout.bundle_bytes(), Vec::new());
            let mut rest = &mut *out;
            for c in chunks {
                let n = self.n_neurons(c..c + 1);
                let (bundles, tail) = rest.split_at_mut(n * size);
                rest = tail;
                stored.resize(n * self.stored.bundle_bytes(), 0);
                self.decode_stored(c..c + 1, &mut stored, self.stored.bundle_bytes(), &mut decode)?;
                self.to_bf16(&stored, bundles);
            }
            assert!(rest.is_empty(), "the output is longer than the chunks");
            return self.patch(delta, first, out);
        }
        self.decode_stored(chunks, out, self.layout.bundle_bytes(), &mut decode)
    }

    /// Exact bundles become bundles of bf16.
    fn to_bf16(&self, stored: &[u8], out: &mut [u8]) {
        let kernels = Kernels::detect();
        let mut bits = vec![0u16; self.layout.hidden_size()];
        let bundles = out.chunks_exact_mut(self.layout.bundle_bytes());
        for (out, bundle) in bundles.zip(stored.chunks_exact(self.stored.bundle_bytes())) {
            for which in 0..3 {
                kernels.decode(self.stored.encoding(), self.stored.row(bundle, which), &mut bits);
                self.layout.row_mut(out, which).0.copy_from_slice(bytemuck::cast_slice(&bits));
            }
        }
    }

    /// Puts the delta on bundles of bf16, from neuron `first` in split order on.
    fn patch(&self, delta: &Delta, first: usize, bundles: &mut [u8]) -> Result<()> {
        let (size, hidden) = (self.layout.bundle_bytes(), self.layout.hidden_size());
        let mut rows = [const { Vec::new() }; 3];
        for (i, bundles) in bundles.chunks_mut(PATCHED_NEURONS * size).enumerate() {
            let n = bundles.len() / size;
            let ids = &self.order()[first + i * PATCHED_NEURONS..][..n];
            for (which, rows) in rows.iter_mut().enumerate() {
                rows.resize(n * hidden, 0u16);
                for (bundle, row) in bundles.chunks_exact(size).zip(rows.chunks_exact_mut(hidden)) {
                    bytemuck::cast_slice_mut(row).copy_from_slice(self.layout.row(bundle, which).codes);
                }
            }
            let [gate, up, down] = &mut rows;
            delta.patch_neurons(self.layer(), ids, gate, up, down)?;
            for (which, rows) in rows.iter().enumerate() {
                for (bundle, row) in bundles.chunks_exact_mut(size).zip(rows.chunks_exact(hidden)) {
                    self.layout.row_mut(bundle, which).0.copy_from_slice(bytemuck::cast_slice(row));
                }
            }
        }
        Ok(())
    }

    /// The planes of `chunks` put together, `size` bytes a neuron.
    fn decode_stored(
        &self,
        chunks: Range<usize>,
        out: &mut [u8],
        size: usize,
        decode: &mut DecodeChunk<'_>,
    ) -> Result<()> {
        let mut plane_bundles = Vec::new();
        let mut rest = out;
        for c in chunks {
            let n = self.n_neurons(c..c + 1);
            let (bundles, tail) = rest.split_at_mut(n * size);
            rest = tail;
            if self.planes.len() == 1 && size == self.stored.bundle_bytes() {
                decode(0, c, bundles)?;
                continue;
            }
            let mut first = 0;
            for (p, plane) in self.planes.iter().enumerate() {
                let bytes = plane.content().bundle_bytes();
                plane_bundles.resize(n * bytes, 0);
                decode(p, c, &mut plane_bundles)?;
                for (bundle, part) in bundles.chunks_exact_mut(size).zip(plane_bundles.chunks_exact(bytes)) {
                    bundle[first..first + bytes].copy_from_slice(part);
                }
                first += bytes;
            }
            bundles.chunks_exact_mut(size).for_each(|bundle| bundle[first..].fill(0));
        }
        assert!(rest.is_empty(), "the output is longer than the chunks");
        Ok(())
    }
}

/// What a delta cannot be put on.
pub(crate) fn not_exact(path: &Path, encoding: Encoding) -> Error {
    let path = path.display();
    let what = format!(
        "{path}: a delta needs the base's own bits, and {encoding} has not got them; \
         use --precision exact, of a split with --encoding bf16, bf16x or q4+exact of a BF16 checkpoint"
    );
    Error::Settings { what }
}

/// What the manifest says of a layer whose files are written, the base first.
pub(crate) fn layer_entry(dir: &Path, files: &[String]) -> Result<LayerEntry> {
    let mut planes = Vec::with_capacity(files.len());
    for file in files {
        let written = PlaneFile::open(&dir.join(file))?;
        planes.push(PlaneEntry { file: file.clone(), file_bytes: written.file_bytes(), checksum: written.checksum() });
    }
    let mut planes = planes.into_iter();
    match planes.next() {
        Some(PlaneEntry { file, file_bytes, checksum }) => {
            Ok(LayerEntry { file, file_bytes, checksum, planes: planes.collect() })
        }
        None => Err(Error::Settings { what: "a layer without files".to_owned() }),
    }
}
