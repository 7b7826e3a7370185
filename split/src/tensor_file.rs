//! Safetensors files of our own making, written in one pass and described, with checksums, by the manifest.

use crate::error::{Result, corrupt, io, listed};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use thermocline_kernels::Encoding;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// The data of a tensor file start at a multiple of this: direct reads of whole layers waste nothing.
const DATA_ALIGN: usize = 4096;
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
}

impl Format {
    /// The encoding, if rows are encoded.
    pub fn encoding(self) -> Option<Encoding> {
        match self {
            Format::F32 | Format::U8 => None,
            Format::Bf16 => Some(Encoding::Bf16),
            Format::Q8 => Some(Encoding::Q8),
            Format::Q4 => Some(Encoding::Q4),
        }
    }

    /// Bytes of one row of `columns`; `None` if rows of that length cannot be stored.
    pub fn row_bytes(self, columns: usize) -> Option<usize> {
        match self.encoding() {
            Some(e) => e.accepts(columns).then(|| e.row_stride(columns)),
            None => columns.checked_mul(if self == Format::F32 { 4 } else { 1 }),
        }
    }
}

impl From<Encoding> for Format {
    fn from(e: Encoding) -> Self {
        match e {
            Encoding::Bf16 => Format::Bf16,
            Encoding::Q8 => Format::Q8,
            Encoding::Q4 => Format::Q4,
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
        self.format.row_bytes(self.columns).unwrap_or(0)
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
}

impl Writer {
    /// Starts `dir/name` with tensors `(name, format, rows, columns)`.
    pub(crate) fn create(dir: &Path, name: &str, tensors: Vec<(String, Format, usize, usize)>) -> Result<Self> {
        let path = dir.join(name);
        let mut entries = Vec::with_capacity(tensors.len());
        let mut header = serde_json::Map::new();
        let mut at = 0u64;
        for (name, format, rows, columns) in tensors {
            let row_bytes = format
                .row_bytes(columns)
                .ok_or_else(|| corrupt(&path, name.clone(), format!("{format:?} cannot store rows of {columns}")))?;
            let bytes = (rows * row_bytes) as u64;
            let (dtype, shape) = match format {
                Format::F32 => ("F32", [rows, columns]),
                _ => ("U8", [rows, row_bytes]),
            };
            let value = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [at, at + bytes]});
            header.insert(name.clone(), value);
            entries.push(TensorEntry { name, format, rows, columns, offset: at, bytes, checksum: String::new() });
            at += bytes;
        }
        let mut json = serde_json::Value::Object(header).to_string().into_bytes();
        json.resize((json.len() + 8).next_multiple_of(DATA_ALIGN) - 8, b' ');
        for entry in &mut entries {
            entry.offset += json.len() as u64 + 8;
        }
        let mut file = BufWriter::with_capacity(1 << 20, File::create(&path).map_err(io(&path))?);
        file.write_all(&(json.len() as u64).to_le_bytes()).and_then(|()| file.write_all(&json)).map_err(io(&path))?;
        let file_bytes = json.len() as u64 + 8 + at;
        let entry = TensorFileEntry { file: name.to_owned(), file_bytes, tensors: entries };
        Ok(Self { path, file, entry, next: 0 })
    }

    /// Writes the next announced tensor, which must be `name`.
    pub(crate) fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let entry = self.entry.tensors.get_mut(self.next).filter(|e| e.name == name && e.bytes == bytes.len() as u64);
        let Some(entry) = entry else {
            return Err(corrupt(&self.path, name, "not the tensor that was announced"));
        };
        entry.checksum = format!("{:016x}", xxh3_64(bytes));
        self.next += 1;
        self.file.write_all(bytes).map_err(io(&self.path))
    }

    /// Ends the file and returns its manifest entry.
    pub(crate) fn finish(self) -> Result<TensorFileEntry> {
        if self.next != self.entry.tensors.len() {
            return Err(corrupt(&self.path, "tensors", "not all announced tensors were written"));
        }
        let file = self.file.into_inner().map_err(|e| io(&self.path)(e.into_error()))?;
        file.sync_all().map_err(io(&self.path))?;
        Ok(self.entry)
    }
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
        let file = File::open(&path).map_err(listed(&path))?;
        let file_bytes = file.metadata().map_err(io(&path))?.len();
        if file_bytes != entry.file_bytes {
            return Err(corrupt(&path, "size", format!("{file_bytes} bytes, manifest says {}", entry.file_bytes)));
        }
        let mut end = None;
        for t in &entry.tensors {
            let bytes = t.format.row_bytes(t.columns).and_then(|b| b.checked_mul(t.rows)).map(|b| b as u64);
            if bytes != Some(t.bytes) || end.is_some_and(|e| e != t.offset) {
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
        assert!(out.len() as u64 <= tensor.bytes, "no more rows than the tensor has");
        self.file.read_exact_at(out, tensor.offset).map_err(io(&self.path))?;
        let mut hash = Xxh3::new();
        hash.update(out);
        let mut piece = vec![0; PIECE_BYTES.min(tensor.bytes as usize - out.len())];
        let mut at = out.len() as u64;
        while at < tensor.bytes {
            let n = piece.len().min((tensor.bytes - at) as usize);
            self.file.read_exact_at(&mut piece[..n], tensor.offset + at).map_err(io(&self.path))?;
            hash.update(&piece[..n]);
            at += n as u64;
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
