//! `layers/NNN.thm` and its neighbours: one plane of the bundles of one layer, in split order, in chunks. FORMAT.md
//! describes every byte.

use crate::content::Content;
use crate::error::{Result, corrupt, io, listed};
use crate::{Error, chunk};
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use thermocline_datasets::files;
use xxhash_rust::xxh3::xxh3_64;

/// First bytes of a layer file.
const MAGIC: &[u8; 8] = b"THMLAYER";
/// The version of a file with all neurons of its layer.
const WHOLE: u32 = 1;
/// That of a file with some of them; the newest that is read.
const PART: u32 = 2;
/// Bytes of the fixed header, its checksum included.
const HEADER_BYTES: usize = 80;
/// Bytes of an index entry.
const ENTRY_BYTES: usize = 32;
/// The data start at a multiple of this, so that O_DIRECT reads of the first chunk waste nothing.
const DATA_ALIGN: u64 = 4096;
/// No real model comes near; keeps every size below 2^63.
const MAX_NEURONS: u32 = 1 << 24;
const MAX_HIDDEN: u32 = 1 << 20;

/// Which neurons of which layer a file has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// The layer's number.
    pub layer: usize,
    /// Places in split order.
    pub neurons: Range<usize>,
    /// Neurons of the layer.
    pub layer_neurons: usize,
}

/// Where one chunk lies and how it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChunkEntry {
    /// First byte in the file.
    pub offset: u64,
    /// Bytes in the file.
    pub stored_bytes: u32,
    /// How they are stored.
    pub codec: chunk::Codec,
    /// Neurons in the chunk.
    pub n_neurons: u32,
    /// XXH3-64 of the stored bytes.
    pub checksum: u64,
}

/// An open, checked file: header, neuron order and chunk index in memory, bundles on disk.
#[derive(Debug)]
pub(crate) struct PlaneFile {
    path: PathBuf,
    file: File,
    place: Place,
    content: Content,
    chunk_neurons: usize,
    order: Vec<u32>,
    index: Vec<ChunkEntry>,
    file_bytes: u64,
    checksum: u64,
}

impl PlaneFile {
    /// Opens and checks a layer file: checksums of header, order and index; that the order is a permutation; that the
    /// chunks lie one behind the other, without holes, to the end of the file. Chunk data are checked when read.
    ///
    /// # Errors
    /// If the file cannot be read or any of that does not hold.
    pub fn open(path: &Path) -> Result<Self> {
        let file = files::open(path).map_err(listed(path))?;
        let file_bytes = file.metadata().map_err(io(path))?.len();
        let mut header = [0u8; HEADER_BYTES];
        if file_bytes < HEADER_BYTES as u64 {
            return Err(corrupt(
                path,
                "header",
                format!("the file has {file_bytes} bytes, a header has {HEADER_BYTES}"),
            ));
        }
        file.read_exact_at(&mut header, 0).map_err(io(path))?;
        if header.first_chunk::<8>() != Some(MAGIC) {
            return Err(corrupt(path, "magic", "not a Thermocline layer file"));
        }
        let u32_at = |at: usize| header.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
        let u64_at = |at: usize| header.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes);
        let version = u32_at(8);
        if version != WHOLE && version != PART {
            return Err(Error::UnsupportedVersion { path: path.to_owned(), got: version.into(), max: PART.into() });
        }
        let (layer, n_neurons, hidden_size) = (u32_at(12), u32_at(16), u32_at(20));
        let (encoding, chunk_neurons, n_chunks) = (u32_at(24), u32_at(28), u32_at(32));
        if n_neurons == 0 || n_neurons > MAX_NEURONS || hidden_size == 0 || hidden_size > MAX_HIDDEN {
            return Err(corrupt(path, "n_neurons, hidden_size", format!("{n_neurons}, {hidden_size} out of range")));
        }
        let (first, layer_neurons) = if version == WHOLE { (0, n_neurons) } else { (u32_at(56), u32_at(60)) };
        // A part is not all, and only the layer's last one may end within a chunk.
        let inside = first.checked_add(n_neurons).is_some_and(|end| end <= layer_neurons);
        let reserved = if version == WHOLE { 56 } else { 64 };
        let zero = header.get(reserved..72).is_some_and(|rest| rest.iter().all(|b| *b == 0));
        if !zero || !inside || layer_neurons > MAX_NEURONS || (version == PART && n_neurons == layer_neurons) {
            let reason = format!("{n_neurons} from {first} on of a layer's {layer_neurons}");
            return Err(corrupt(path, "neurons", reason));
        }
        if chunk_neurons == 0 || chunk_neurons > layer_neurons || n_chunks != n_neurons.div_ceil(chunk_neurons) {
            return Err(corrupt(
                path,
                "chunk_neurons",
                format!("{chunk_neurons} in {n_chunks} chunks for {n_neurons}"),
            ));
        }
        let bundle_bytes = u32_at(36);
        let content = Content::from_header(encoding, hidden_size as usize, bundle_bytes as usize).ok_or_else(|| {
            let reason = format!("number {encoding} with hidden size {hidden_size} and {bundle_bytes} bytes a bundle");
            corrupt(path, "encoding, bundle_bytes", reason)
        })?;
        let (data_offset, expected_bytes) = (u64_at(40), u64_at(48));
        let tables = n_neurons as usize * 4 + n_chunks as usize * ENTRY_BYTES;
        if expected_bytes != file_bytes {
            return Err(corrupt(path, "file_bytes", format!("{file_bytes} bytes, written with {expected_bytes}")));
        }
        if data_offset != (HEADER_BYTES as u64 + tables as u64).next_multiple_of(DATA_ALIGN) || data_offset > file_bytes
        {
            return Err(corrupt(path, "data_offset", format!("{data_offset} in a file of {file_bytes} bytes")));
        }
        let mut meta = vec![0u8; HEADER_BYTES - 8 + tables];
        let (head, rest) = meta.split_at_mut(HEADER_BYTES - 8);
        head.copy_from_slice(header.get(..HEADER_BYTES - 8).unwrap_or_default());
        file.read_exact_at(rest, HEADER_BYTES as u64).map_err(io(path))?;
        if xxh3_64(&meta) != u64_at(HEADER_BYTES - 8) {
            return Err(corrupt(path, "meta_checksum", "header, order or index are damaged"));
        }
        let (order, index) = meta.split_at(HEADER_BYTES - 8).1.split_at(n_neurons as usize * 4);
        let order = read_order(path, order, layer_neurons)?;
        let index = read_index(path, index, data_offset, file_bytes, n_neurons, chunk_neurons, &content)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            place: Place {
                layer: layer as usize,
                neurons: first as usize..(first + n_neurons) as usize,
                layer_neurons: layer_neurons as usize,
            },
            content,
            chunk_neurons: chunk_neurons as usize,
            order,
            index,
            file_bytes,
            checksum: u64_at(HEADER_BYTES - 8),
        })
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which neurons these are.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// What the bundles are.
    pub fn content(&self) -> &Content {
        &self.content
    }

    /// Neurons in every chunk but perhaps the last.
    pub fn chunk_neurons(&self) -> usize {
        self.chunk_neurons
    }

    /// `order()[i]` is the checkpoint's number of the file's i-th neuron; hot first.
    pub fn order(&self) -> &[u32] {
        &self.order
    }

    /// The order, which the layer keeps for all its files.
    pub fn take_order(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.order)
    }

    /// Every chunk, in order.
    pub fn index(&self) -> &[ChunkEntry] {
        &self.index
    }

    /// Size of the file.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Checksum of header, order and index, in hexadecimal; through the index it covers the chunks.
    pub fn checksum(&self) -> String {
        format!("{:016x}", self.checksum)
    }

    /// Reads, checks and decodes chunk `c` into `bundles`; `stored` is memory that it may use.
    pub fn read_chunk(&self, c: usize, stored: &mut Vec<u8>, bundles: &mut [u8]) -> Result<()> {
        let entry = &self.index[c];
        stored.resize(entry.stored_bytes as usize, 0);
        self.file.read_exact_at(stored, entry.offset).map_err(io(&self.path))?;
        self.decode_chunk(c, stored, bundles)
    }

    /// Whether every chunk can be read and is what was written.
    pub fn is_whole(&self) -> bool {
        let (mut stored, mut bundles) = (Vec::new(), Vec::new());
        (0..self.index.len()).all(|c| {
            bundles.resize(self.index[c].n_neurons as usize * self.content.bundle_bytes(), 0);
            self.read_chunk(c, &mut stored, &mut bundles).is_ok()
        })
    }

    /// Checks and decodes the stored bytes of chunk `c` into `bundles`.
    ///
    /// # Errors
    /// If the checksum or the decoded size is wrong.
    ///
    /// # Panics
    /// If there is no chunk `c`.
    pub fn decode_chunk(&self, c: usize, stored: &[u8], bundles: &mut [u8]) -> Result<()> {
        let entry = &self.index[c];
        let good = bundles.len() == entry.n_neurons as usize * self.content.bundle_bytes()
            && self.check_chunk(c, stored).is_ok()
            && chunk::decode(entry.codec, &self.content, stored, bundles);
        if good { Ok(()) } else { Err(self.corrupt_chunk(c)) }
    }

    /// Checks the stored bytes of chunk `c` (enough for a chunk that is stored as it is).
    ///
    /// # Errors
    /// If the checksum is wrong.
    pub fn check_chunk(&self, c: usize, stored: &[u8]) -> Result<()> {
        if self.index.get(c).is_some_and(|e| xxh3_64(stored) == e.checksum) {
            Ok(())
        } else {
            Err(self.corrupt_chunk(c))
        }
    }

    fn corrupt_chunk(&self, c: usize) -> Error {
        let first = self.place.neurons.start + c * self.chunk_neurons;
        let end = (first + self.chunk_neurons).min(self.place.neurons.end);
        Error::CorruptChunk { path: self.path.clone(), layer: self.place.layer, first, end }
    }
}

fn read_order(path: &Path, bytes: &[u8], layer_neurons: u32) -> Result<Vec<u32>> {
    let order: Vec<u32> = bytes.chunks_exact(4).map(|b| b.try_into().map_or(0, u32::from_le_bytes)).collect();
    let mut seen = vec![false; layer_neurons as usize];
    for (position, &id) in order.iter().enumerate() {
        match seen.get_mut(id as usize) {
            Some(s) if !*s => *s = true,
            Some(_) => return Err(corrupt(path, format!("order[{position}]"), format!("neuron {id} occurs twice"))),
            None => return Err(corrupt(path, format!("order[{position}]"), format!("neuron {id} of {}", seen.len()))),
        }
    }
    Ok(order)
}

fn read_index(
    path: &Path,
    bytes: &[u8],
    data_offset: u64,
    file_bytes: u64,
    n_neurons: u32,
    chunk_neurons: u32,
    content: &Content,
) -> Result<Vec<ChunkEntry>> {
    let mut expected_offset = data_offset;
    let mut left = n_neurons;
    let mut index = Vec::with_capacity(bytes.len() / ENTRY_BYTES);
    for (c, b) in bytes.chunks_exact(ENTRY_BYTES).enumerate() {
        let field = |name: &str| format!("index[{c}].{name}");
        let u32_at = |at: usize| b.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
        let u64_at = |at: usize| b.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes);
        let codec = chunk::Codec::from_id(u32_at(12))
            .filter(|codec| content.takes(*codec))
            .ok_or_else(|| corrupt(path, field("codec"), format!("number {} of such bundles", u32_at(12))))?;
        let entry = ChunkEntry {
            offset: u64_at(0),
            stored_bytes: u32_at(8),
            codec,
            n_neurons: u32_at(16),
            checksum: u64_at(24),
        };
        if entry.n_neurons != left.min(chunk_neurons) {
            return Err(corrupt(
                path,
                field("n_neurons"),
                format!("{}, expected {}", entry.n_neurons, left.min(chunk_neurons)),
            ));
        }
        left -= entry.n_neurons;
        let raw = u64::from(entry.n_neurons) * content.bundle_bytes() as u64;
        if entry.offset != expected_offset || (codec == chunk::Codec::Stored && u64::from(entry.stored_bytes) != raw) {
            return Err(corrupt(path, field("offset, stored_bytes"), "chunks must lie one behind the other"));
        }
        expected_offset += u64::from(entry.stored_bytes);
        index.push(entry);
    }
    if expected_offset != file_bytes {
        return Err(corrupt(path, "index", format!("chunks end at {expected_offset}, the file at {file_bytes}")));
    }
    Ok(index)
}

/// Writes a file: `bundles` in split order, `order` as in [`PlaneFile::order`]. Returns its size.
///
/// # Errors
/// If the file cannot be written.
pub(crate) fn write_plane(
    path: &Path,
    place: &Place,
    content: &Content,
    order: &[u32],
    bundles: &[u8],
    chunk_neurons: usize,
    compression: chunk::Compression,
) -> Result<u64> {
    use rayon::prelude::*;
    let chunks: Vec<_> = bundles
        .par_chunks(chunk_neurons * content.bundle_bytes())
        .map(|raw| (raw.len() / content.bundle_bytes(), chunk::encode(compression, content, raw)))
        .collect();
    let mut writer = PlaneWriter::create(path, place.clone(), *content, order, chunk_neurons)?;
    for (n, (codec, stored)) in &chunks {
        writer.list(*n, *codec, stored);
        writer.append(stored)?;
    }
    writer.finish()
}

/// A file being written, chunk by chunk; what stands in front of the chunks comes last.
pub(crate) struct PlaneWriter<'a> {
    path: &'a Path,
    place: Place,
    content: Content,
    order: &'a [u32],
    chunk_neurons: usize,
    file: BufWriter<File>,
    index: Vec<u8>,
    data_offset: u64,
    /// Where the next chunk begins.
    offset: u64,
}

impl<'a> PlaneWriter<'a> {
    /// Starts a file for neurons in this order ([`PlaneFile::order`]).
    pub(crate) fn create(
        path: &'a Path,
        place: Place,
        content: Content,
        order: &'a [u32],
        chunk_neurons: usize,
    ) -> Result<Self> {
        let n_chunks = order.len().div_ceil(chunk_neurons);
        let tables = order.len() * 4 + n_chunks * ENTRY_BYTES;
        let data_offset = ((HEADER_BYTES + tables) as u64).next_multiple_of(DATA_ALIGN);
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path).map_err(io(path))?);
        file.seek(SeekFrom::Start(data_offset)).map_err(io(path))?;
        let index = Vec::with_capacity(n_chunks * ENTRY_BYTES);
        Ok(Self { path, place, content, order, chunk_neurons, file, index, data_offset, offset: data_offset })
    }

    /// Appends bundles as they are: whole chunks, but perhaps for the layer's last.
    pub(crate) fn stored(&mut self, bundles: &[u8]) -> Result<()> {
        let bundle_bytes = self.content.bundle_bytes();
        for chunk in bundles.chunks(self.chunk_neurons * bundle_bytes) {
            self.list(chunk.len() / bundle_bytes, chunk::Codec::Stored, chunk);
        }
        self.append(bundles)
    }

    /// Enters the next chunk in the index.
    fn list(&mut self, n_neurons: usize, codec: chunk::Codec, stored: &[u8]) {
        self.index.extend_from_slice(&self.offset.to_le_bytes());
        for v in [stored.len() as u32, codec.id(), n_neurons as u32, 0] {
            self.index.extend_from_slice(&v.to_le_bytes());
        }
        self.index.extend_from_slice(&xxh3_64(stored).to_le_bytes());
        self.offset += stored.len() as u64;
    }

    fn append(&mut self, stored: &[u8]) -> Result<()> {
        self.file.write_all(stored).map_err(io(self.path))
    }

    /// Writes header, order and index. Returns the file's size.
    pub(crate) fn finish(self) -> Result<u64> {
        let mut meta = Vec::with_capacity(HEADER_BYTES - 8 + self.order.len() * 4 + self.index.len());
        meta.extend_from_slice(MAGIC);
        let is_whole = self.place.neurons.len() == self.place.layer_neurons;
        for v in [
            if is_whole { WHOLE } else { PART },
            self.place.layer as u32,
            self.order.len() as u32,
            self.content.hidden_size() as u32,
            self.content.id(),
            self.chunk_neurons as u32,
            (self.index.len() / ENTRY_BYTES) as u32,
            self.content.bundle_bytes() as u32,
        ] {
            meta.extend_from_slice(&v.to_le_bytes());
        }
        for v in [self.data_offset, self.offset] {
            meta.extend_from_slice(&v.to_le_bytes());
        }
        let part = if is_whole { [0; 2] } else { [self.place.neurons.start, self.place.layer_neurons] };
        for v in part.into_iter().chain([0; 2]) {
            meta.extend_from_slice(&(v as u32).to_le_bytes());
        }
        debug_assert_eq!(meta.len(), HEADER_BYTES - 8);
        for id in self.order {
            meta.extend_from_slice(&id.to_le_bytes());
        }
        meta.extend_from_slice(&self.index);
        let checksum = xxh3_64(&meta);
        let (head, rest) = meta.split_at(HEADER_BYTES - 8);
        let (mut file, file_bytes) = (self.file, self.offset);
        let write = || -> std::io::Result<()> {
            file.rewind()?;
            file.write_all(head)?;
            file.write_all(&checksum.to_le_bytes())?;
            file.write_all(rest)?;
            let file = file.into_inner().map_err(std::io::IntoInnerError::into_error)?;
            file.set_len(file_bytes)?;
            file.sync_all()
        };
        write().map_err(io(self.path))?;
        Ok(file_bytes)
    }
}
