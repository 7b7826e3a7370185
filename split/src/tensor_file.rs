//! Safetensors files of our own making, written in one pass and described, with checksums, by the manifest.

use crate::error::{Result, corrupt, io, listed};
use crate::planes::Plane;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use thermocline_datasets::files;
use thermocline_kernels::Encoding;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// The data of a tensor file start at a multiple of this: direct reads of whole layers waste nothing.
const DATA_ALIGN: usize = 4096;
/// No row of a model is longer; sums of lengths stay far from what a number holds.
const COLUMNS_MAX: usize = 1 << 32;
/// What is read at a time to check a tensor that is not kept.
const PIECE_BYTES: usize = 256 << 10;

/// What a tensor's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Little-endian f32, row-major.
    F32,
    /// Bytes or bitmaps.
    U8,
    /// Rows of an encoding, [`Encoding::row_stride`] bytes each.
    Bf16,
    /// As above.
    Q8,
    /// As above.
    Q4,
    /// Rows with room for the longest stream of the matrix.
    Bf16x,
    /// Coarse planes over rows of the same name.
    Coarse,
    /// Heads and streams over rows of the same name, with room for the longest.
    Final,
}

impl Format {
    /// The encoding, if rows are encoded.
    pub fn encoding(self) -> Option<Encoding> {
        match self {
            Format::F32 | Format::U8 | Format::Coarse | Format::Final => None,
            Format::Bf16x => Some(Encoding::Bf16x),
            Format::Bf16 => Some(Encoding::Bf16),
            Format::Q8 => Some(Encoding::Q8),
            Format::Q4 => Some(Encoding::Q4),
        }
    }

    /// Of a plane over a matrix.
    pub(crate) fn of_plane(plane: Plane) -> Self {
        match plane {
            Plane::Coarse => Format::Coarse,
            Plane::Final => Format::Final,
        }
    }

    /// The inverse; `None` if it is no plane over a matrix.
    pub(crate) fn plane(self) -> Option<Plane> {
        [Plane::Coarse, Plane::Final].into_iter().find(|p| Self::of_plane(*p) == self)
    }

    /// Bytes of one row of `columns`; `None` if rows of that length cannot be stored. With streams: the least.
    pub fn row_bytes(self, columns: usize) -> Option<usize> {
        if columns > COLUMNS_MAX {
            return None;
        }
        let groups = |bytes: usize| Encoding::Q4.accepts(columns).then_some(bytes);
        match self {
            Format::Coarse => groups(Encoding::Q4Plus.coarse_bytes(columns).next_multiple_of(16)),
            Format::Final => groups(Encoding::Q4Exact.head_bytes(columns)),
            Format::F32 => columns.checked_mul(4),
            Format::U8 => Some(columns),
            Format::Bf16 | Format::Bf16x | Format::Q8 | Format::Q4 => {
                self.encoding().filter(|e| e.accepts(columns)).map(|e| e.row_stride(columns))
            }
        }
    }

    /// Whether rows have streams, and are as long as the longest needs.
    fn has_streams(self) -> bool {
        matches!(self, Format::Bf16x | Format::Final)
    }

    /// More than any row takes: 16 bits a column, and no more codes than twice as many.
    fn most_row_bytes(self, columns: usize) -> Option<usize> {
        let streams = if self.has_streams() { columns.checked_mul(6)?.checked_add(64)? } else { 0 };
        self.row_bytes(columns)?.checked_add(streams)
    }
}

/// Of the base, where there are further planes; residuals are bytes of their own.
impl From<Encoding> for Format {
    fn from(e: Encoding) -> Self {
        match e {
            Encoding::Bf16 => Format::Bf16,
            Encoding::Q8 | Encoding::Q8Exact => Format::Q8,
            Encoding::Bf16x => Format::Bf16x,
            Encoding::Q4 | Encoding::Q4Plus | Encoding::Q4Exact => Format::Q4,
            Encoding::R4 => Format::U8,
        }
    }
}

/// One tensor, as the manifest lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    /// Its name: canonical (Hugging Face) for weights.
    pub name: String,
    /// What its bytes are.
    pub format: Format,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// First byte in the file.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
    /// XXH3-64 of them, in hexadecimal.
    pub checksum: String,
}

impl TensorEntry {
    /// Bytes from one row to the next.
    pub fn row_bytes(&self) -> usize {
        if self.format.has_streams() {
            return (self.bytes / self.rows.max(1) as u64) as usize;
        }
        self.format.row_bytes(self.columns).unwrap_or(0)
    }

    /// Whether size and shape fit each other.
    fn is_sound(&self) -> bool {
        let rows = |bytes: Option<usize>| bytes.and_then(|b| b.checked_mul(self.rows)).map(|b| b as u64);
        let (least, most) = (rows(self.format.row_bytes(self.columns)), rows(self.format.most_row_bytes(self.columns)));
        let each = self.bytes.checked_rem(self.rows as u64);
        match (least, most) {
            (Some(least), Some(most)) if self.format.has_streams() => {
                self.rows > 0
                    && (least..=most).contains(&self.bytes)
                    && each == Some(0)
                    && self.row_bytes().is_multiple_of(16)
            }
            (least, _) => least == Some(self.bytes),
        }
    }
}

/// A file of the split and the tensors in it, in file order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorFileEntry {
    /// File name in the split directory.
    pub file: String,
    /// Its size.
    pub file_bytes: u64,
    /// Its tensors.
    pub tensors: Vec<TensorEntry>,
}

/// A tensor file being written; tensors come in the order in which they were announced.
pub(crate) struct Writer {
    path: PathBuf,
    file: BufWriter<File>,
    entry: TensorFileEntry,
    next: usize,
    /// Room for the header, its length included.
    data_at: u64,
    /// Where the next tensor begins.
    at: u64,
}

impl Writer {
    /// Starts `dir/name` with tensors `(name, format, rows, columns)`.
    pub(crate) fn create(dir: &Path, name: &str, tensors: Vec<(String, Format, usize, usize)>) -> Result<Self> {
        let path = dir.join(name);
        let mut entries = Vec::with_capacity(tensors.len());
        let mut at = 0u64;
        for (name, format, rows, columns) in tensors {
            let row_bytes = format
                .most_row_bytes(columns)
                .ok_or_else(|| corrupt(&path, name.clone(), format!("{format:?} cannot store rows of {columns}")))?;
            let bytes = (rows * row_bytes) as u64;
            entries.push(TensorEntry { name, format, rows, columns, offset: at, bytes, checksum: String::new() });
            at += bytes;
        }
        // Streams may turn out shorter; the header does not become longer by that.
        let data_at = (header(&entries, 0).len() + 8).next_multiple_of(DATA_ALIGN) as u64;
        let mut file = BufWriter::with_capacity(1 << 20, File::create(&path).map_err(io(&path))?);
        file.seek(SeekFrom::Start(data_at)).map_err(io(&path))?;
        let entry = TensorFileEntry { file: name.to_owned(), file_bytes: 0, tensors: entries };
        Ok(Self { path, file, entry, next: 0, data_at, at: data_at })
    }

    /// Writes the next announced tensor, which must be `name`.
    pub(crate) fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let entry = self.entry.tensors.get_mut(self.next).filter(|e| e.name == name);
        let entry = entry.and_then(|e| {
            (e.offset, e.bytes) = (self.at, bytes.len() as u64);
            e.is_sound().then_some(e)
        });
        let Some(entry) = entry else {
            return Err(corrupt(&self.path, name, "not the tensor that was announced"));
        };
        entry.checksum = format!("{:016x}", xxh3_64(bytes));
        self.next += 1;
        self.at += bytes.len() as u64;
        self.file.write_all(bytes).map_err(io(&self.path))
    }

    /// Ends the file and returns its manifest entry.
    pub(crate) fn finish(mut self) -> Result<TensorFileEntry> {
        if self.next != self.entry.tensors.len() {
            return Err(corrupt(&self.path, "tensors", "not all announced tensors were written"));
        }
        self.entry.file_bytes = self.at;
        let mut json = header(&self.entry.tensors, self.data_at).into_bytes();
        json.resize(self.data_at as usize - 8, b' ');
        let write = || -> std::io::Result<()> {
            let mut file = self.file;
            file.rewind()?;
            file.write_all(&(json.len() as u64).to_le_bytes())?;
            file.write_all(&json)?;
            let file = file.into_inner().map_err(std::io::IntoInnerError::into_error)?;
            file.set_len(self.at)?;
            file.sync_all()
        };
        write().map_err(io(&self.path))?;
        Ok(self.entry)
    }
}

/// The safetensors header of tensors at offsets from `data_at` on.
fn header(tensors: &[TensorEntry], data_at: u64) -> String {
    let mut header = serde_json::Map::new();
    for t in tensors {
        let (dtype, row) = match t.format {
            Format::F32 => ("F32", t.columns),
            _ => ("U8", (t.bytes / t.rows.max(1) as u64) as usize),
        };
        let first = t.offset - data_at;
        let value =
            serde_json::json!({"dtype": dtype, "shape": [t.rows, row], "data_offsets": [first, first + t.bytes]});
        header.insert(t.name.clone(), value);
    }
    serde_json::Value::Object(header).to_string()
}

/// An open tensor file.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    entry: TensorFileEntry,
}

impl TensorFile {
    /// Opens a file that the manifest lists and checks sizes, order and bounds.
    ///
    /// # Errors
    /// If the file is missing, or does not fit its entry.
    pub fn open(dir: &Path, entry: &TensorFileEntry) -> Result<Self> {
        let path = dir.join(&entry.file);
        let file = files::open(&path).map_err(listed(&path))?;
        let file_bytes = file.metadata().map_err(io(&path))?.len();
        if file_bytes != entry.file_bytes {
            return Err(corrupt(&path, "size", format!("{file_bytes} bytes, manifest says {}", entry.file_bytes)));
        }
        let mut end = None;
        for t in &entry.tensors {
            if !t.is_sound() || end.is_some_and(|e| e != t.offset) {
                return Err(corrupt(&path, &t.name, "shape, size and place do not fit each other"));
            }
            end = t.offset.checked_add(t.bytes);
            if end.is_none_or(|e| e > file_bytes) {
                return Err(corrupt(&path, &t.name, "lies past the end of the file"));
            }
        }
        if end.is_some_and(|e| e != file_bytes) {
            return Err(corrupt(&path, "size", "bytes behind the last tensor"));
        }
        Ok(Self { path, file, entry: entry.clone() })
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors, in file order.
    pub fn tensors(&self) -> &[TensorEntry] {
        &self.entry.tensors
    }

    /// Bytes of all tensors.
    pub fn data_bytes(&self) -> u64 {
        self.entry.tensors.iter().map(|t| t.bytes).sum()
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// If there is none.
    pub fn entry(&self, name: &str) -> Result<&TensorEntry> {
        let found = self.entry.tensors.iter().find(|t| t.name == name);
        found.ok_or_else(|| corrupt(&self.path, name, "the tensor is missing"))
    }

    /// Reads a whole tensor into `out` and checks it.
    ///
    /// # Errors
    /// If it cannot be read or its checksum is wrong.
    ///
    /// # Panics
    /// If `out` is not as long as the tensor.
    pub fn read_into(&self, tensor: &TensorEntry, out: &mut [u8]) -> Result<()> {
        assert_eq!(out.len() as u64, tensor.bytes, "a buffer of the tensor's size");
        self.file.read_exact_at(out, tensor.offset).map_err(io(&self.path))?;
        if format!("{:016x}", xxh3_64(out)) != tensor.checksum {
            return Err(corrupt(&self.path, &tensor.name, "checksum mismatch; fetch or make the split again"));
        }
        Ok(())
    }

    /// Reads a whole tensor.
    ///
    /// # Errors
    /// As [`TensorFile::read_into`].
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let entry = self.entry(name)?;
        let mut out = vec![0; entry.bytes as usize];
        self.read_into(entry, &mut out)?;
        Ok(out)
    }

    /// Reads rows `first .. first + n` as they are stored (unchecked: the checksum covers whole tensors).
    ///
    /// # Errors
    /// If the rows are outside the tensor or cannot be read.
    pub fn read_rows(&self, tensor: &TensorEntry, first: usize, n: usize) -> Result<Vec<u8>> {
        if first.checked_add(n).is_none_or(|end| end > tensor.rows) {
            return Err(corrupt(&self.path, &tensor.name, format!("rows {first}+{n} of {}", tensor.rows)));
        }
        let mut out = vec![0; n * tensor.row_bytes()];
        let offset = tensor.offset + (first * tensor.row_bytes()) as u64;
        self.file.read_exact_at(&mut out, offset).map_err(io(&self.path))?;
        Ok(out)
    }

    /// Reads a whole tensor, a piece at a time, checks it, and keeps its first rows: `out` holds as many whole rows as
    /// are wanted.
    ///
    /// # Errors
    /// If it cannot be read or its checksum is wrong.
    ///
    /// # Panics
    /// If `out` is longer than the tensor.
    pub fn read_start(&self, tensor: &TensorEntry, out: &mut [u8]) -> Result<()> {
        self.read_part(tensor, 0, out)
    }

    /// The same with the rows from `first` on.
    ///
    /// # Errors
    /// If it cannot be read or its checksum is wrong.
    ///
    /// # Panics
    /// If the tensor has not so many rows.
    pub fn read_part(&self, tensor: &TensorEntry, first: usize, out: &mut [u8]) -> Result<()> {
        let first = first * tensor.row_bytes();
        assert!((first + out.len()) as u64 <= tensor.bytes, "no more rows than the tensor has");
        let end = first + out.len();
        self.read_by(tensor, PIECE_BYTES, |at, piece| {
            let (from, to) = (at.clamp(first, end), (at + piece.len()).clamp(first, end));
            if from < to {
                out[from - first..to - first].copy_from_slice(&piece[from - at..to - at]);
            }
        })
    }

    /// Reads a whole tensor in pieces of `piece_bytes`, `take(place, piece)` each, and checks it at the end.
    ///
    /// # Errors
    /// If it cannot be read or its checksum is wrong.
    pub(crate) fn read_by(
        &self,
        tensor: &TensorEntry,
        piece_bytes: usize,
        mut take: impl FnMut(usize, &[u8]),
    ) -> Result<()> {
        let mut hash = Xxh3::new();
        let mut piece = vec![0; piece_bytes.min(tensor.bytes as usize)];
        let mut at = 0;
        while at < tensor.bytes {
            let piece_bytes = piece.len().min((tensor.bytes - at) as usize);
            let piece = &mut piece[..piece_bytes];
            self.file.read_exact_at(piece, tensor.offset + at).map_err(io(&self.path))?;
            hash.update(piece);
            take(at as usize, piece);
            at += piece_bytes as u64;
        }
        if format!("{:016x}", hash.digest()) != tensor.checksum {
            return Err(corrupt(&self.path, &tensor.name, "checksum mismatch; fetch or make the split again"));
        }
        Ok(())
    }

    /// Reads an f32 tensor.
    ///
    /// # Errors
    /// If it is not f32, cannot be read, or its checksum is wrong.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        if self.entry(name)?.format != Format::F32 {
            return Err(corrupt(&self.path, name, "expected f32"));
        }
        Ok(self.read(name)?.chunks_exact(4).map(|b| b.try_into().map_or(0.0, f32::from_le_bytes)).collect())
    }
}
