//! Hidden states of all tokens, on disk between layers.
//!
//! Two files take turns: a layer reads one and writes the other, so the input of a layer that was interrupted is
//! intact. Each is checksummed as it is written and again as it is read. Nothing is flushed to the device: after a
//! power cut the checksum fails and the run falls back.

use crate::{
    Error, Result,
    error::{AtPath, check_len},
};
use std::{
    fs::File,
    io::{BufReader, BufWriter, Read, Write},
    path::{Path, PathBuf},
};
use xxhash_rust::xxh3::Xxh3;

const BUFFER_BYTES: usize = 1 << 20;

pub(crate) struct HiddenWriter {
    path: PathBuf,
    file: BufWriter<File>,
    hash: Xxh3,
}

impl HiddenWriter {
    pub(crate) fn create(path: PathBuf) -> Result<Self> {
        let file = File::create(&path).at(&path)?;
        Ok(HiddenWriter { file: BufWriter::with_capacity(BUFFER_BYTES, file), path, hash: Xxh3::new() })
    }

    pub(crate) fn write(&mut self, values: &[f32]) -> Result<()> {
        let bytes = bytemuck::cast_slice(values);
        self.hash.update(bytes);
        self.file.write_all(bytes).at(&self.path)
    }

    /// The checksum of everything written.
    pub(crate) fn finish(mut self) -> Result<String> {
        self.file.flush().at(&self.path)?;
        Ok(digest(&self.hash))
    }
}

pub(crate) struct HiddenReader {
    path: PathBuf,
    file: BufReader<File>,
    hash: Xxh3,
}

impl HiddenReader {
    pub(crate) fn open(path: PathBuf) -> Result<Self> {
        let file = File::open(&path).at(&path)?;
        Ok(HiddenReader { file: BufReader::with_capacity(BUFFER_BYTES, file), path, hash: Xxh3::new() })
    }

    /// The next `n` values.
    pub(crate) fn read(&mut self, n: usize) -> Result<Vec<f32>> {
        let mut values = vec![0.0f32; n];
        let bytes = bytemuck::cast_slice_mut(&mut values);
        self.file.read_exact(bytes).at(&self.path)?;
        self.hash.update(bytes);
        check_len("hidden states", values.len(), n)?;
        Ok(values)
    }

    /// Fails if what was read is not what was written.
    pub(crate) fn finish(self, expected: &str) -> Result<()> {
        let got = digest(&self.hash);
        if got == expected {
            return Ok(());
        }
        let reason = format!("checksum {got}, expected {expected}; run again with resume to fall back");
        Err(Error::Corrupt { path: self.path, field: "hidden states".into(), reason })
    }
}

/// The checksum of a file, in 32 hex digits, and its length.
pub(crate) fn file_digest(path: &Path) -> Result<String> {
    let mut file = File::open(path).at(path)?;
    let (mut hash, mut buffer) = (Xxh3::new(), vec![0u8; BUFFER_BYTES]);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(digest(&hash)),
            Ok(n) => hash.update(&buffer[..n]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => (),
            Err(error) => return Err(error).at(path),
        }
    }
}

/// The checksum of bytes in memory.
pub(crate) fn bytes_digest(bytes: &[u8]) -> String {
    let mut hash = Xxh3::new();
    hash.update(bytes);
    digest(&hash)
}

fn digest(hash: &Xxh3) -> String {
    format!("{:032x}", hash.digest128())
}
