//! The bundles of one layer as a reader wants them: its planes, up to a precision, put together.

use crate::Error;
use crate::chunk::Codec;
use crate::delta::Delta;
use crate::error::{Result, corrupt};
use crate::manifest::{LayerEntry, Manifest, PlaneEntry};
use crate::plane_file::{ChunkEntry, PlaneFile};

use crate::precision::{Planes, Precision};
use crate::sealed::Sealed;
use crate::sections::{Section, Sections, open_group};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use thermocline_kernels::{BundleLayout, Encoding, Kernels, LayerLayout};

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

/// An open, checked layer: neuron order and chunk indices in memory, bundles on disk, in one file or in one for each plane.
#[derive(Debug)]
pub struct LayerFile {
    files: Vec<PlaneFile>,
    sections: Vec<Section>,
    order: Vec<u32>,
    /// Of the planes put together.
    stored: LayerLayout,
    /// Of what readers get: the same with room for the streams of other layers, or bf16 with a delta on it.
    layout: LayerLayout,
    delta: Option<Arc<Delta>>,
}

/// `decode(file, chunk of the file, bundles)`.
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
        Self::of_files(vec![vec![PlaneFile::open(path)?]], Precision::Base.into())
    }

    /// Opens what the manifest lists for a layer of these sections (neurons and encoding, hottest first), and of further
    /// planes those that `planes` takes.
    pub(crate) fn open_planes(
        dir: &Path,
        entry: &LayerEntry,
        sections: &[(usize, Encoding)],
        planes: Planes,
    ) -> Result<Self> {
        let listed = entry.hot.iter().map(|s| (s.neurons, s.encoding.clone()));
        let Some((&(_, last), hot)) = sections.split_last() else { unreachable!("a layer without neurons") };
        if !listed.eq(hot.iter().map(|(neurons, encoding)| (*neurons, encoding.name().to_owned()))) {
            let expected: Vec<String> = hot.iter().map(|(n, encoding)| format!("{n} in {encoding}")).collect();
            let reason = format!("not the neurons that packing.ffn_encoding says: [{}]", expected.join(", "));
            return Err(corrupt(&dir.join(Manifest::FILE), format!("hot of {}", entry.file), reason));
        }
        let base =
            PlaneEntry { file: entry.file.clone(), file_bytes: entry.file_bytes, checksum: entry.checksum.clone() };
        let rest: Vec<PlaneEntry> = [base].into_iter().chain(entry.planes.iter().cloned()).collect();
        let mut groups = Vec::with_capacity(sections.len());
        let listed = entry.hot.iter().map(|s| s.planes.as_slice()).chain([rest.as_slice()]);
        for (group, (_, encoding)) in listed.zip(hot.iter().chain([&(0, last)])) {
            groups.push(open_group(dir, group, *encoding, planes)?);
        }
        let layer = Self::of_files(groups, planes)?;
        let neurons = layer.files.iter().filter(|f| f.content().plane().is_none()).map(|f| f.place().neurons.len());
        match neurons.eq(sections.iter().map(|(n, _)| *n)) {
            true => Ok(layer),
            false => Err(corrupt(layer.path(), "header", "does not fit the manifest: files of two splits are mixed")),
        }
    }

    /// Puts files together, a group for each part of the layer, its base first.
    pub(crate) fn of_files(groups: Vec<Vec<PlaneFile>>, planes: Planes) -> Result<Self> {
        let Sections { files, sections, order, layout } = Sections::new(groups, planes)?;
        Ok(Self { files, sections, order, stored: layout.clone(), layout, delta: None })
    }

    /// Whether every chunk of every plane can be read and is what was written.
    pub(crate) fn is_whole(&self) -> bool {
        self.files.iter().all(PlaneFile::is_whole)
    }

    /// Puts a delta on the bundles, which then come as bf16.
    ///
    /// # Errors
    /// If some of the bundles are not exact.
    pub(crate) fn set_delta(&mut self, delta: Arc<Delta>) -> Result<()> {
        if let Some(encoding) = self.stored.encodings().find(|e| !e.is_exact()) {
            return Err(not_exact(self.path(), encoding));
        }
        let bf16 = BundleLayout::new(Encoding::Bf16, self.stored.hidden_size());
        if let Some(layout) = bf16.and_then(|bf16| LayerLayout::new([(self.order.len(), bf16)])) {
            self.layout = layout;
        }
        self.delta = Some(delta);
        Ok(())
    }

    /// The file of the layer's last section: the base of most or of all neurons.
    fn base(&self) -> &PlaneFile {
        let last = self.sections.last().map_or(0, |s| s.files.start);
        &self.files[last]
    }

    /// Where the base lies.
    pub fn path(&self) -> &Path {
        self.base().path()
    }

    /// Where the files lie.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(PlaneFile::path)
    }

    /// Which layer this is.
    pub fn layer(&self) -> usize {
        self.base().place().layer
    }

    /// Where the bundles lie, as they are when planes are put together.
    pub fn bundles(&self) -> &LayerLayout {
        &self.layout
    }

    /// The layout of the first bundle; of all where [`LayerFile::bundles`] are uniform.
    pub fn layout(&self) -> &BundleLayout {
        self.layout.of(0)
    }

    /// Neurons in every chunk but perhaps the last.
    pub fn chunk_neurons(&self) -> usize {
        self.base().chunk_neurons()
    }

    /// Chunks of the layer.
    pub fn n_chunks(&self) -> usize {
        self.order.len().div_ceil(self.chunk_neurons())
    }

    /// `order()[i]` is the checkpoint's number of the neuron at position i; hot first.
    pub fn order(&self) -> &[u32] {
        &self.order
    }

    /// The inverse of [`LayerFile::order`]: the place of each of the checkpoint's neurons.
    pub fn places(&self) -> Vec<u32> {
        let mut place = vec![0; self.order().len()];
        self.order().iter().enumerate().for_each(|(p, &id)| place[id as usize] = p as u32);
        place
    }

    /// Size of the files.
    pub fn file_bytes(&self) -> u64 {
        self.files.iter().map(PlaneFile::file_bytes).sum()
    }

    /// What each file has of `chunks`, as its own numbers of chunks; in the order of files, but for those that have nothing.
    ///
    /// # Panics
    /// If the range is outside the layer, here and below.
    fn parts(&self, chunks: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
        assert!(chunks.end <= self.n_chunks(), "chunks {chunks:?} of {}", self.n_chunks());
        let of_file = move |file: usize| {
            let mut all: Option<Range<usize>> = None;
            for s in self.sections.iter().filter(|s| s.files.contains(&file)) {
                let (start, end) = (chunks.start.max(s.chunks.start), chunks.end.min(s.chunks.end));
                if start < end {
                    let (start, end) = (start - s.first_chunk, end - s.first_chunk);
                    all = Some(all.map_or(start, |a| a.start)..end);
                }
            }
            all.map(|part| (file, part))
        };
        (0..self.files.len()).filter_map(of_file)
    }

    /// Bytes of `chunks` in the files.
    pub fn stored_bytes(&self, chunks: Range<usize>) -> u64 {
        let of_part = |(file, part): (usize, Range<usize>)| {
            self.files[file].index()[part].iter().map(|e| u64::from(e.stored_bytes)).sum::<u64>()
        };
        self.parts(chunks).map(of_part).sum()
    }

    /// Where the bytes of `chunks` lie: at most one piece of each file.
    pub fn stored_ranges(&self, chunks: Range<usize>) -> Vec<FileRange> {
        let of_part = |(file, part): (usize, Range<usize>)| {
            let entries = &self.files[file].index()[part];
            let bytes = entries.iter().map(|e| e.stored_bytes as usize).sum();
            FileRange { file, offset: entries.first().map_or(0, |e| e.offset), bytes }
        };
        self.parts(chunks).map(of_part).collect()
    }

    /// Bytes that the bundles of `chunks` take in memory at most without the room behind their streams, each a multiple of
    /// 16.
    pub fn trimmed_bytes(&self, chunks: Range<usize>) -> usize {
        let neurons = self.neurons(chunks.clone());
        let padded = self.layout.bytes(neurons.clone());
        if self.layout.encodings().all(|e| !e.has_stream()) {
            return padded;
        }
        let of_part = |(file, part): (usize, Range<usize>)| {
            let each = self.files[file].content().bundle_bytes();
            let of_chunk = |e: &ChunkEntry| match e.codec {
                Codec::Trimmed => e.stored_bytes as usize,
                _ => e.n_neurons as usize * each,
            };
            self.files[file].index()[part].iter().map(of_chunk).sum::<usize>()
        };
        let stored: usize = self.parts(chunks).map(of_part).sum();
        padded.min(stored + 16 * neurons.len())
    }

    /// Neurons of `chunks`.
    pub fn neurons(&self, chunks: Range<usize>) -> Range<usize> {
        let place = |c: usize| (c * self.chunk_neurons()).min(self.order.len());
        place(chunks.start)..place(chunks.end)
    }

    /// Whether the stored bytes of `chunks` are the bundles themselves.
    pub fn are_stored(&self, chunks: Range<usize>) -> bool {
        let mut parts = self.parts(chunks);
        let only = parts.next().filter(|_| parts.next().is_none() && self.delta.is_none());
        only.is_some_and(|(file, part)| self.files[file].index()[part].iter().all(|e| e.codec == Codec::Stored))
    }

    /// Chunks of all files.
    pub fn n_stored_chunks(&self) -> usize {
        self.files.iter().map(|f| f.index().len()).sum()
    }

    /// Chunks that are compressed, in all files.
    pub fn n_compressed(&self) -> usize {
        let entries = self.files.iter().flat_map(|p| p.index());
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
        self.decode_with(chunks, out, |f, c, bundles| self.files[f].read_chunk(c, &mut stored, bundles))
    }

    /// Checks and decodes `chunks` into `out`, from the bytes of [`LayerFile::stored_ranges`].
    ///
    /// # Errors
    /// If a checksum or a decoded size is wrong.
    ///
    /// # Panics
    /// If `stored` or `out` has another length.
    pub fn decode_chunks(&self, chunks: Range<usize>, stored: &[&[u8]], out: &mut [u8]) -> Result<()> {
        let mut rest = vec![&[][..]; self.files.len()];
        self.parts(chunks.clone()).zip(stored).for_each(|((file, _), bytes)| rest[file] = bytes);
        self.decode_with(chunks, out, |f, c, bundles| {
            let (now, later) = rest[f].split_at(self.files[f].index()[c].stored_bytes as usize);
            rest[f] = later;
            self.files[f].decode_chunk(c, now, bundles)
        })
    }

    /// Checks the stored bytes of `chunks`, which [`LayerFile::are_stored`].
    ///
    /// # Errors
    /// If a checksum is wrong.
    pub fn check_chunks(&self, chunks: Range<usize>, mut stored: &[u8]) -> Result<()> {
        for (file, c) in self.parts(chunks).flat_map(|(file, part)| part.map(move |c| (file, c))) {
            let (now, later) = stored.split_at(self.files[file].index()[c].stored_bytes as usize);
            self.files[file].check_chunk(c, now)?;
            stored = later;
        }
        Ok(())
    }

    /// `decode(file, chunk, bundles)` for all of them; the planes of a neuron become neighbours.
    fn decode_with(
        &self,
        chunks: Range<usize>,
        out: &mut [u8],
        mut decode: impl FnMut(usize, usize, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let neurons = self.neurons(chunks.clone());
        assert_eq!(out.len(), self.layout.bytes(neurons.clone()), "the bytes of chunks {chunks:?}");
        let (mut rest, mut stored, mut parts) = (&mut *out, Vec::new(), Vec::new());
        for c in chunks {
            let neurons = self.neurons(c..c + 1);
            let (bundles, later) = rest.split_at_mut(self.layout.bytes(neurons.clone()));
            rest = later;
            if self.delta.is_none() {
                self.decode_chunk(c, bundles, self.layout.of(neurons.start), &mut parts, &mut decode)?;
                continue;
            }
            let layout = self.stored.of(neurons.start);
            stored.resize(neurons.len() * layout.bundle_bytes(), 0);
            self.decode_chunk(c, &mut stored, layout, &mut parts, &mut decode)?;
            to_bf16(layout, &stored, self.layout.of(neurons.start), bundles);
        }
        match &self.delta {
            Some(delta) => self.patch(delta, neurons.start, out),
            None => Ok(()),
        }
    }

    /// The planes of chunk `c` put together as bundles of `layout`, which may have more room behind the streams; `parts` is
    /// memory that it may use.
    fn decode_chunk(
        &self,
        c: usize,
        bundles: &mut [u8],
        layout: &BundleLayout,
        parts: &mut Vec<u8>,
        decode: &mut DecodeChunk<'_>,
    ) -> Result<()> {
        let found = self.sections.iter().find(|s| s.chunks.contains(&c));
        let Some(section) = found else { unreachable!("chunk {c} of {}", self.n_chunks()) };
        let (in_file, size) = (c - section.first_chunk, layout.bundle_bytes());
        if let Range { start: only, end } = section.files.clone()
            && only + 1 == end
            && size == self.files[only].content().bundle_bytes()
        {
            return decode(only, in_file, bundles);
        }
        let mut first = 0;
        for file in section.files.clone() {
            let bytes = self.files[file].content().bundle_bytes();
            parts.resize(bundles.len() / size * bytes, 0);
            decode(file, in_file, parts)?;
            for (bundle, part) in bundles.chunks_exact_mut(size).zip(parts.chunks_exact(bytes)) {
                bundle[first..first + bytes].copy_from_slice(part);
            }
            first += bytes;
        }
        bundles.chunks_exact_mut(size).for_each(|bundle| bundle[first..].fill(0));
        Ok(())
    }

    /// Puts the delta on bundles of bf16, from neuron `first` in split order on.
    fn patch(&self, delta: &Delta, first: usize, bundles: &mut [u8]) -> Result<()> {
        // With a delta on it every bundle is bf16.
        let layout = self.layout.of(0);
        let (size, hidden) = (layout.bundle_bytes(), layout.hidden_size());
        let mut rows = [const { Vec::new() }; 3];
        for (i, bundles) in bundles.chunks_mut(PATCHED_NEURONS * size).enumerate() {
            let n = bundles.len() / size;
            let ids = &self.order()[first + i * PATCHED_NEURONS..][..n];
            for (which, rows) in rows.iter_mut().enumerate() {
                rows.resize(n * hidden, 0u16);
                for (bundle, row) in bundles.chunks_exact(size).zip(rows.chunks_exact_mut(hidden)) {
                    bytemuck::cast_slice_mut(row).copy_from_slice(layout.row(bundle, which).codes);
                }
            }
            let [gate, up, down] = &mut rows;
            delta.patch_neurons(self.layer(), ids, gate, up, down)?;
            for (which, rows) in rows.iter().enumerate() {
                for (bundle, row) in bundles.chunks_exact_mut(size).zip(rows.chunks_exact(hidden)) {
                    layout.row_mut(bundle, which).0.copy_from_slice(bytemuck::cast_slice(row));
                }
            }
        }
        Ok(())
    }
}

/// Exact bundles, laid out `from` one way, become bundles of bf16, `to` another.
fn to_bf16(from: &BundleLayout, stored: &[u8], to: &BundleLayout, out: &mut [u8]) {
    let kernels = Kernels::detect();
    let mut bits = vec![0u16; to.hidden_size()];
    let bundles = out.chunks_exact_mut(to.bundle_bytes());
    for (out, bundle) in bundles.zip(stored.chunks_exact(from.bundle_bytes())) {
        for which in 0..3 {
            kernels.decode(from.encoding(), from.row(bundle, which), &mut bits);
            to.row_mut(out, which).0.copy_from_slice(bytemuck::cast_slice(&bits));
        }
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
