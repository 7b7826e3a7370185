//! JSON from files that are not trusted: nesting is bounded before a parser sees it, sizes are bounded before they
//! are read, and objects keep every key, so that a repeated one can be refused.

use crate::{Error, Result, files};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use std::path::Path;

/// Objects and arrays may nest this deep.
const MAX_DEPTH: usize = 64;
/// Longest file of settings: what is in them becomes values that take many times their text.
pub const MAX_SETTINGS_BYTES: u64 = 1 << 20;
/// Longest settings of a tokenizer, which may list its tokens.
pub const MAX_TOKENIZER_SETTINGS_BYTES: u64 = 16 << 20;
/// Longest index of shards and longest tokenizer.
pub const MAX_FILE_BYTES: u64 = 256 << 20;

/// Refuses text that nests deeper than [`MAX_DEPTH`], without recursion.
pub fn check_depth(text: &[u8], path: &Path, field: &str) -> Result<()> {
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    for (at, byte) in text.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => {
                depth = depth.saturating_add(1);
                if depth > MAX_DEPTH {
                    return Err(corrupt(path, field, format!("JSON nests deeper than {MAX_DEPTH} at byte {at}")));
                }
            }
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    Ok(())
}

/// Reads a JSON file of bounded size and depth.
pub fn read(path: &Path, max_bytes: u64) -> Result<String> {
    let bytes = files::read(path, max_bytes).map_err(Error::refused(path))?;
    check_depth(&bytes, path, "json")?;
    String::from_utf8(bytes).map_err(|e| corrupt(path, "json", e.to_string()))
}

/// Parses text that [`check_depth`] let through.
pub fn parse<'a, T: Deserialize<'a>>(text: &'a str, path: &Path, field: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|e| corrupt(path, field, e.to_string()))
}

pub fn corrupt(path: &Path, field: &str, reason: impl Into<String>) -> Error {
    Error::Corrupt { path: path.to_owned(), field: field.to_owned(), reason: reason.into() }
}

/// An object as the list of its members, in order, repeated keys included.
#[derive(Debug)]
pub struct Members<V>(pub Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Members<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect<V>(std::marker::PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Collect<V> {
            type Value = Members<V>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<V>, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Collect(std::marker::PhantomData))
    }
}
