use super::value::{Array, Value};
use crate::{Error, Result};
use std::io::Read;
use std::path::Path;

/// Arrays of arrays may nest this deep; no known file goes beyond one level.
pub const MAX_ARRAY_DEPTH: u32 = 4;

/// Longest key or tensor name that is accepted, in bytes (the format says 65,535 for keys).
const MAX_NAME_BYTES: u64 = 65_535;

/// Reads little-endian fields in sequence and knows how many bytes the file still has, so that no length is
/// believed beyond that.
pub struct FieldReader<'a, R> {
    input: R,
    path: &'a Path,
    offset: u64,
    len: u64,
}

impl<'a, R: Read> FieldReader<'a, R> {
    pub fn new(input: R, path: &'a Path, len: u64) -> Self {
        Self { input, path, offset: 0, len }
    }

    pub fn path(&self) -> &Path {
        self.path
    }

    /// Bytes consumed so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes that the file has after the current offset.
    pub fn remaining(&self) -> u64 {
        self.len.saturating_sub(self.offset)
    }

    pub fn corrupt(&self, field: &str, reason: impl Into<String>) -> Error {
        Error::Corrupt {
            path: self.path.to_owned(),
            field: field.to_owned(),
            reason: format!("{} (at byte {})", reason.into(), self.offset),
        }
    }

    fn bytes<const N: usize>(&mut self, field: &str) -> Result<[u8; N]> {
        let mut out = [0; N];
        self.fill(field, &mut out)?;
        Ok(out)
    }

    fn fill(&mut self, field: &str, out: &mut [u8]) -> Result<()> {
        let n = out.len() as u64;
        if n > self.remaining() {
            return Err(self.corrupt(field, format!("the file ends here, {n} more bytes expected")));
        }
        self.input.read_exact(out).map_err(|source| Error::Io { path: self.path.to_owned(), source })?;
        self.offset = self.offset.saturating_add(n);
        Ok(())
    }

    pub fn u32(&mut self, field: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes(field)?))
    }

    pub fn u64(&mut self, field: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes(field)?))
    }

    /// A count of things that take at least `min_bytes` each: more than the rest of the file can hold is refused.
    pub fn count(&mut self, field: &str, min_bytes: u64) -> Result<usize> {
        let n = self.u64(field)?;
        let limit = self.remaining().checked_div(min_bytes).unwrap_or(0);
        if n > limit {
            return Err(self.corrupt(field, format!("{n} is more than the rest of the file can hold ({limit})")));
        }
        usize::try_from(n).map_err(|_| self.corrupt(field, format!("{n} does not fit in memory")))
    }

    /// A key or tensor name.
    pub fn name(&mut self, field: &str) -> Result<String> {
        let name = self.string(field)?;
        if name.len() as u64 > MAX_NAME_BYTES {
            return Err(self.corrupt(field, format!("name of {} bytes, at most {MAX_NAME_BYTES}", name.len())));
        }
        Ok(name)
    }

    fn string(&mut self, field: &str) -> Result<String> {
        let n = self.count(field, 1)?;
        let mut bytes = vec![0; n];
        self.fill(field, &mut bytes)?;
        String::from_utf8(bytes).map_err(|e| self.corrupt(field, format!("not UTF-8: {e}")))
    }

    /// A value of the type that is numbered `kind`.
    pub fn value(&mut self, field: &str, kind: u32) -> Result<Value> {
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.bytes(field)?)),
            1 => Value::I8(i8::from_le_bytes(self.bytes(field)?)),
            2 => Value::U16(u16::from_le_bytes(self.bytes(field)?)),
            3 => Value::I16(i16::from_le_bytes(self.bytes(field)?)),
            4 => Value::U32(self.u32(field)?),
            5 => Value::I32(i32::from_le_bytes(self.bytes(field)?)),
            6 => Value::F32(f32::from_le_bytes(self.bytes(field)?)),
            7 => Value::Bool(self.bool(field)?),
            8 => Value::String(self.string(field)?),
            9 => Value::Array(self.array(field, 0)?),
            10 => Value::U64(self.u64(field)?),
            11 => Value::I64(i64::from_le_bytes(self.bytes(field)?)),
            12 => Value::F64(f64::from_le_bytes(self.bytes(field)?)),
            other => return Err(self.corrupt(field, format!("unknown value type {other}"))),
        })
    }

    fn bool(&mut self, field: &str) -> Result<bool> {
        match self.bytes(field)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(self.corrupt(field, format!("truth value {other}, expected 0 or 1"))),
        }
    }

    fn array(&mut self, field: &str, depth: u32) -> Result<Array> {
        if depth >= MAX_ARRAY_DEPTH {
            return Err(self.corrupt(field, format!("arrays nest deeper than {MAX_ARRAY_DEPTH}")));
        }
        let kind = self.u32(field)?;
        Ok(match kind {
            0 => Array::U8(self.elements(field, 1, |r| Ok(u8::from_le_bytes(r.bytes(field)?)))?),
            1 => Array::I8(self.elements(field, 1, |r| Ok(i8::from_le_bytes(r.bytes(field)?)))?),
            2 => Array::U16(self.elements(field, 2, |r| Ok(u16::from_le_bytes(r.bytes(field)?)))?),
            3 => Array::I16(self.elements(field, 2, |r| Ok(i16::from_le_bytes(r.bytes(field)?)))?),
            4 => Array::U32(self.elements(field, 4, |r| r.u32(field))?),
            5 => Array::I32(self.elements(field, 4, |r| Ok(i32::from_le_bytes(r.bytes(field)?)))?),
            6 => Array::F32(self.elements(field, 4, |r| Ok(f32::from_le_bytes(r.bytes(field)?)))?),
            7 => Array::Bool(self.elements(field, 1, |r| r.bool(field))?),
            8 => Array::String(self.elements(field, 8, |r| r.string(field))?),
            9 => Array::Array(self.elements(field, 12, |r| r.array(field, depth.saturating_add(1)))?),
            10 => Array::U64(self.elements(field, 8, |r| r.u64(field))?),
            11 => Array::I64(self.elements(field, 8, |r| Ok(i64::from_le_bytes(r.bytes(field)?)))?),
            12 => Array::F64(self.elements(field, 8, |r| Ok(f64::from_le_bytes(r.bytes(field)?)))?),
            other => return Err(self.corrupt(field, format!("unknown array element type {other}"))),
        })
    }

    fn elements<T>(
        &mut self,
        field: &str,
        min_bytes: u64,
        mut each: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let n = self.count(field, min_bytes)?;
        let mut out = Vec::with_capacity(n);
        for _ in 0..n {
            out.push(each(self)?);
        }
        Ok(out)
    }
}
