use super::json;
use crate::gguf::GgmlType;
use crate::{Error, Result};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::collections::HashSet;
use std::io::Read;
use std::path::Path;

/// Longest header that is read, in bytes, as in the format's own reader.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The member that is no tensor.
const METADATA: &str = "__metadata__";

/// A tensor of a safetensors file, checked against the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SafetensorsEntry {
    /// Its name in the file.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its type, if it is one that is read (`F32`, `F16`, `BF16`), else the file's name for it.
    pub dtype: Result<GgmlType, String>,
    /// Where its data starts in the file, in bytes.
    pub offset: u64,
    /// Length of its data, in bytes.
    pub n_bytes: u64,
}

/// Most dimensions of a tensor.
const MAX_DIMS: usize = 16;

/// A tensor's description as the header has it. Integers are unsigned, so negative and fractional ones are refused
/// by the parser, with their line and column; nothing is kept that a description does not need.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Dims,
    data_offsets: (u64, u64),
}

/// A shape of bounded length.
struct Dims(Vec<u64>);

impl<'de> Deserialize<'de> for Dims {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Dims;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "a shape of at most {MAX_DIMS} dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut dims: A) -> Result<Dims, A::Error> {
                let mut out = Vec::new();
                while let Some(dim) = dims.next_element()? {
                    if out.len() == MAX_DIMS {
                        return Err(serde::de::Error::custom(format!("more than {MAX_DIMS} dimensions")));
                    }
                    out.push(dim);
                }
                Ok(Dims(out))
            }
        }
        deserializer.deserialize_seq(Collect)
    }
}

/// The members of a header, in order, but for what people say of the file.
struct Header(Vec<(String, Option<RawEntry>)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Header;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut members = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    let entry = match name.as_str() {
                        METADATA => map.next_value::<IgnoredAny>().map(|_| None),
                        _ => map.next_value().map(Some),
                    };
                    let entry = entry.map_err(|e| serde::de::Error::custom(format!("{name}: {e}")))?;
                    members.push((name, entry));
                }
                Ok(Header(members))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

/// Reads and checks a header from the start of `input`, of a file that is `file_len` bytes long; entries come in the
/// order of their data. `path` is for messages only.
///
/// # Errors
/// If the header breaks the format, or the data does not fill the rest of the file exactly.
pub fn parse_header(mut input: impl Read, path: &Path, file_len: u64) -> Result<Vec<SafetensorsEntry>> {
    let corrupt = |field: &str, reason: String| json::corrupt(path, field, reason);
    let failed = |source| Error::Io { path: path.to_owned(), source };
    if file_len < 8 {
        return Err(corrupt("header length", format!("the file has {file_len} bytes, expected at least 8")));
    }
    let mut len = [0; 8];
    input.read_exact(&mut len).map_err(failed)?;
    let len = u64::from_le_bytes(len);
    let limit = MAX_HEADER_BYTES.min(file_len.saturating_sub(8));
    if len > limit {
        return Err(corrupt("header length", format!("{len} bytes, at most {limit} are possible here")));
    }
    let mut text = vec![0; usize::try_from(len).unwrap_or(0)];
    input.read_exact(&mut text).map_err(failed)?;
    json::check_depth(&text, path, "header")?;
    let text = String::from_utf8(text).map_err(|e| corrupt("header", e.to_string()))?;
    let Header(members) = json::parse(&text, path, "header")?;
    let mut seen = HashSet::with_capacity(members.len());
    let mut entries = Vec::new();
    let data_start = len.saturating_add(8);
    if let Some((name, _)) = members.iter().find(|(name, _)| !seen.insert(name)) {
        return Err(corrupt(name, "the tensor occurs twice".to_owned()));
    }
    drop(text);
    for (name, raw) in members {
        if let Some(raw) = raw {
            entries.push(check_entry(path, name, raw, data_start)?);
        }
    }
    entries.sort_by_key(|e| (e.offset, e.n_bytes));
    let mut end_before = data_start;
    for entry in &entries {
        if entry.offset != end_before {
            let what = if entry.offset < end_before { "overlap" } else { "hole" };
            let reason = format!("{what}: its data starts at byte {}, expected {end_before}", entry.offset);
            return Err(corrupt(&entry.name, reason));
        }
        end_before = end_before.saturating_add(entry.n_bytes);
        if end_before > file_len {
            let reason = format!("its data ends at byte {end_before}, past the file's {file_len}");
            return Err(corrupt(&entry.name, reason));
        }
    }
    if end_before != file_len {
        return Err(corrupt("tensor data", format!("ends at byte {end_before}, but the file has {file_len}")));
    }
    Ok(entries)
}

fn check_entry(path: &Path, name: String, raw: RawEntry, data_start: u64) -> Result<SafetensorsEntry> {
    let corrupt = |reason: String| json::corrupt(path, &name, reason);
    let (start, end) = raw.data_offsets;
    let n_bytes = end.checked_sub(start).ok_or_else(|| corrupt(format!("data_offsets run from {start} to {end}")))?;
    let offset = data_start.checked_add(start).filter(|o| o.checked_add(n_bytes).is_some());
    let offset = offset.ok_or_else(|| corrupt(format!("data_offsets from {start} to {end} overflow")))?;
    let overflow = || corrupt(format!("the shape {:?} overflows", raw.shape.0));
    let n_elements = raw.shape.0.iter().try_fold(1u64, |n, d| n.checked_mul(*d)).ok_or_else(overflow)?;
    let shape: Option<Vec<usize>> = raw.shape.0.iter().map(|d| usize::try_from(*d).ok()).collect();
    let bits = dtype_bits(&raw.dtype).ok_or_else(|| corrupt(format!("unknown dtype {:?}", raw.dtype)))?;
    let expected = n_elements.checked_mul(bits).ok_or_else(overflow)?.div_ceil(8);
    if expected != n_bytes {
        let reason = format!("{n_bytes} bytes, but {} of shape {:?} takes {expected}", raw.dtype, raw.shape.0);
        return Err(corrupt(reason));
    }
    let dtype = match raw.dtype.as_str() {
        "F32" => Ok(GgmlType::F32),
        "F16" => Ok(GgmlType::F16),
        "BF16" => Ok(GgmlType::BF16),
        _ => Err(raw.dtype),
    };
    Ok(SafetensorsEntry {
        name,
        shape: shape.ok_or_else(|| json::corrupt(path, "shape", "overflows"))?,
        dtype,
        offset,
        n_bytes,
    })
}

/// Bits of an element, for every type of the format.
fn dtype_bits(name: &str) -> Option<u64> {
    Some(match name {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" => 8,
        "U16" | "I16" | "F16" | "BF16" => 16,
        "U32" | "I32" | "F32" => 32,
        "U64" | "I64" | "F64" | "C64" => 64,
        _ => return None,
    })
}
