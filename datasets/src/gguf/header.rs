use super::reader::FieldReader;
pub use super::reader::MAX_ARRAY_DEPTH;
use super::{GgmlType, Value};
use crate::{Error, Result};
use std::collections::{BTreeMap, HashMap};
use std::io::{BufReader, Read};
use std::path::Path;

/// The newest format version that is read; 2 has the same layout, 1 had 32-bit counts.
pub const MAX_VERSION: u32 = 3;
/// The largest alignment that is accepted, in bytes.
pub const MAX_ALIGNMENT: u64 = 1 << 20;
/// The largest number of dimensions of a tensor.
const MAX_DIMS: u32 = 4;
/// What the data section is aligned to when the file does not say.
const DEFAULT_ALIGNMENT: u64 = 32;

/// A tensor's entry in the header, checked against the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// Outermost dimension first (the file has them the other way round).
    pub shape: Vec<usize>,
    /// Storage type.
    pub kind: GgmlType,
    /// Where its data starts in the file, in bytes.
    pub offset: u64,
    /// Length of its data, in bytes.
    pub n_bytes: u64,
}

/// The header of a GGUF file.
#[derive(Debug, Clone)]
pub struct GgufHeader {
    /// Format version.
    pub version: u32,
    /// Metadata by key.
    pub metadata: BTreeMap<String, Value>,
    /// Tensors by the file's own names.
    pub tensors: HashMap<String, GgufTensor>,
}

/// A tensor's entry before the data section's start is known.
struct Entry {
    name: String,
    shape: Vec<usize>,
    kind: GgmlType,
    offset: u64,
    n_bytes: u64,
}

impl GgufHeader {
    /// Reads and checks a header from the start of `input`, of a file that is `file_len` bytes long; `path` is for
    /// messages only.
    ///
    /// # Errors
    /// If the header breaks the format in any way, or a tensor does not lie within the file.
    pub fn read(input: impl Read, path: &Path, file_len: u64) -> Result<Self> {
        let mut reader = FieldReader::new(BufReader::with_capacity(1 << 16, input), path, file_len);
        if reader.u32("magic")? != u32::from_le_bytes(*b"GGUF") {
            return Err(reader.corrupt("magic", "not a GGUF file"));
        }
        let version = reader.u32("version")?;
        match version {
            2..=MAX_VERSION => {}
            0 => return Err(reader.corrupt("version", "0 is no version")),
            // A big-endian file's version reads as a multiple of 2^24 here.
            v if v.swap_bytes() <= MAX_VERSION => {
                return Err(Error::Unsupported {
                    path: path.to_owned(),
                    what: "a big-endian GGUF file".into(),
                    help: "convert it to little-endian".into(),
                });
            }
            v => {
                return Err(Error::UnsupportedVersion {
                    path: path.to_owned(),
                    got: v.into(),
                    max: MAX_VERSION.into(),
                });
            }
        }
        // A tensor's entry takes at least 24 bytes (name length, dimension count, type, offset); a key's 13.
        let n_tensors = reader.count("tensor_count", 24)?;
        let n_keys = reader.count("metadata_kv_count", 13)?;
        let metadata = read_metadata(&mut reader, n_keys)?;
        let alignment = alignment(&reader, &metadata)?;
        let mut entries = Vec::new();
        for index in 0..n_tensors {
            entries.push(read_entry(&mut reader, index, alignment)?);
        }
        let data_start = reader
            .offset()
            .checked_next_multiple_of(alignment)
            .ok_or_else(|| reader.corrupt("tensor data", "starts past the end of the address space"))?;
        let tensors = place(&reader, entries, data_start, file_len)?;
        Ok(Self { version, metadata, tensors })
    }
}

fn read_metadata<R: Read>(reader: &mut FieldReader<'_, R>, n_keys: usize) -> Result<BTreeMap<String, Value>> {
    let mut metadata = BTreeMap::new();
    for index in 0..n_keys {
        let key = reader.name(&format!("metadata key {index}"))?;
        let kind = reader.u32(&key)?;
        let value = reader.value(&key, kind)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(reader.corrupt(&key, "the key occurs twice"));
        }
    }
    Ok(metadata)
}

fn alignment<R: Read>(reader: &FieldReader<'_, R>, metadata: &BTreeMap<String, Value>) -> Result<u64> {
    let key = "general.alignment";
    let alignment = match metadata.get(key) {
        None => DEFAULT_ALIGNMENT,
        Some(Value::U32(v)) => u64::from(*v),
        Some(other) => return Err(reader.corrupt(key, format!("is a {}, expected uint32", other.type_name()))),
    };
    if !alignment.is_power_of_two() || !(8..=MAX_ALIGNMENT).contains(&alignment) {
        let reason = format!("{alignment}, expected a power of two from 8 to {MAX_ALIGNMENT}");
        return Err(reader.corrupt(key, reason));
    }
    Ok(alignment)
}

fn read_entry<R: Read>(reader: &mut FieldReader<'_, R>, index: usize, alignment: u64) -> Result<Entry> {
    let name = reader.name(&format!("name of tensor {index}"))?;
    let n_dims = reader.u32(&name)?;
    if n_dims == 0 || n_dims > MAX_DIMS {
        return Err(reader.corrupt(&name, format!("{n_dims} dimensions, expected 1 to {MAX_DIMS}")));
    }
    let mut dims = Vec::new();
    for _ in 0..n_dims {
        dims.push(reader.u64(&name)?);
    }
    let id = reader.u32(&name)?;
    let kind = GgmlType::from_id(id).ok_or_else(|| match GgmlType::foreign_name(id) {
        Some(foreign) => Error::Unsupported {
            path: reader.path().to_owned(),
            what: format!("the type {foreign} of tensor {name}"),
            help: "use a file with F32, F16, BF16, Q4_0 to Q8_0 or Q2_K to Q6_K tensors".into(),
        },
        None => reader.corrupt(&name, format!("unknown tensor type {id}")),
    })?;
    let offset = reader.u64(&name)?;
    let overflow = || reader.corrupt(&name, format!("the shape {dims:?} overflows"));
    let n_elements = dims.iter().try_fold(1u64, |n, d| n.checked_mul(*d)).ok_or_else(overflow)?;
    let shape: Option<Vec<usize>> = dims.iter().rev().map(|d| usize::try_from(*d).ok()).collect();
    let shape = shape.ok_or_else(overflow)?;
    let row = dims.first().copied().unwrap_or(0);
    let (block_len, block_bytes) = (kind.block_len() as u64, kind.block_bytes() as u64);
    if !row.is_multiple_of(block_len) || n_elements == 0 {
        let reason = format!("rows of {row} elements, expected a positive multiple of {}'s {block_len}", kind.name());
        return Err(reader.corrupt(&name, reason));
    }
    let blocks = n_elements.checked_div(block_len).unwrap_or(0);
    let n_bytes = blocks.checked_mul(block_bytes).ok_or_else(overflow)?;
    if !offset.is_multiple_of(alignment) {
        return Err(reader.corrupt(&name, format!("offset {offset} is no multiple of the alignment, {alignment}")));
    }
    Ok(Entry { name, shape, kind, offset, n_bytes })
}

/// Checks each entry against the file's length and its neighbours, in the order of their offsets.
fn place<R: Read>(
    reader: &FieldReader<'_, R>,
    mut entries: Vec<Entry>,
    data_start: u64,
    file_len: u64,
) -> Result<HashMap<String, GgufTensor>> {
    entries.sort_by_key(|e| e.offset);
    let mut tensors = HashMap::with_capacity(entries.len());
    let mut end_before = data_start;
    let mut name_before = String::new();
    for entry in entries {
        let Entry { name, shape, kind, offset, n_bytes } = entry;
        let start = data_start.checked_add(offset);
        let end = start.and_then(|s| s.checked_add(n_bytes)).filter(|e| *e <= file_len);
        let (Some(start), Some(end)) = (start, end) else {
            let reason = format!("{n_bytes} bytes at data offset {offset} end past the file's {file_len} bytes");
            return Err(reader.corrupt(&name, reason));
        };
        if start < end_before {
            return Err(reader.corrupt(&name, format!("overlaps tensor {name_before}")));
        }
        end_before = end;
        name_before.clone_from(&name);
        let tensor = GgufTensor { shape, kind, offset: start, n_bytes };
        if tensors.insert(name, tensor).is_some() {
            return Err(reader.corrupt(&name_before, "the tensor occurs twice"));
        }
    }
    Ok(tensors)
}
