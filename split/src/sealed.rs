//! JSON files that carry a checksum of themselves: one that is not byte for byte its own canonical form is damaged.

use crate::Error;
use crate::error::{Result, corrupt, listed};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::ErrorKind;
use std::path::Path;
use thermocline_datasets::files;
use xxhash_rust::xxh3::xxh3_128;

/// No manifest is larger: a million tensors would not need it.
const MAX_BYTES: u64 = 64 << 20;

/// What such a file holds.
pub(crate) trait Sealed: Serialize + DeserializeOwned + Clone {
    /// The file's name in its directory.
    const FILE: &'static str;
    /// Its field `format`.
    const FORMAT: &'static str;
    /// The newest version that is read.
    const VERSION: u32;
    /// What the directory is called.
    const KIND: &'static str;
    /// Why a directory without it is none, and what makes one.
    const MISSING: &'static str;

    /// Its field `checksum`.
    fn checksum(&mut self) -> &mut String;

    /// The file's text.
    fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }

    /// XXH3-128 of the text with an empty checksum, in hexadecimal.
    fn expected_checksum(&self) -> String {
        let mut bare = self.clone();
        bare.checksum().clear();
        format!("{:032x}", xxh3_128(bare.to_json().as_bytes()))
    }

    /// Reads and checks the file in `dir`, as far as any such file can be.
    fn read_sealed(dir: &Path) -> Result<Self> {
        let path = dir.join(Self::FILE);
        let text = files::read(&path, MAX_BYTES).map_err(|e| match e.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => corrupt(dir, Self::FILE, Self::MISSING),
            _ => listed(&path)(e),
        })?;
        // The version is looked at first: a newer manifest may have fields that are unknown here.
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u64,
        }
        let head: Head = serde_json::from_slice(&text).map_err(|e| corrupt(&path, "json", e.to_string()))?;
        if head.format != Self::FORMAT {
            return Err(corrupt(&path, "format", format!("{:?} is not a {}", head.format, Self::KIND)));
        }
        if !(1..=u64::from(Self::VERSION)).contains(&head.version) {
            return Err(Error::UnsupportedVersion { path, got: head.version, max: Self::VERSION.into() });
        }
        let mut value: Self = serde_json::from_slice(&text).map_err(|e| corrupt(&path, "json", e.to_string()))?;
        if value.expected_checksum() != *value.checksum() || value.to_json().as_bytes() != text {
            let reason = format!("the manifest is damaged; fetch or make the {} again", Self::KIND);
            return Err(corrupt(&path, "checksum", reason));
        }
        Ok(value)
    }
}
