//! Damaged splits whose checksums are right, so that the checks behind the checksums are reached.

use std::fs;
use std::path::Path;
use thermocline_split::Manifest;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

const HEADER_BYTES: usize = 80;

/// Changes a manifest and seals it again.
pub fn manifest(dir: &Path, change: impl FnOnce(&mut Manifest)) {
    let path = dir.join("manifest.json");
    let mut manifest: Manifest = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut manifest);
    let pretty = |m: &Manifest| serde_json::to_string_pretty(m).unwrap() + "\n";
    manifest.checksum = String::new();
    manifest.checksum = format!("{:032x}", xxh3_128(pretty(&manifest).as_bytes()));
    fs::write(path, pretty(&manifest)).unwrap();
}

/// A layer file in memory.
pub struct Layer {
    pub bytes: Vec<u8>,
}

impl Layer {
    pub fn read(path: &Path) -> Self {
        Self { bytes: fs::read(path).unwrap() }
    }

    pub fn u32_at(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().unwrap())
    }

    pub fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// First byte of the order, of the index, and one past the index.
    pub fn tables(&self) -> [usize; 3] {
        let index = HEADER_BYTES + 4 * self.u32_at(16) as usize;
        [HEADER_BYTES, index, index + 32 * self.u32_at(32) as usize]
    }

    /// Where chunk `c` lies.
    pub fn chunk(&self, c: usize) -> std::ops::Range<usize> {
        let entry = self.tables()[1] + 32 * c;
        let offset = u64::from_le_bytes(self.bytes[entry..entry + 8].try_into().unwrap()) as usize;
        offset..offset + self.u32_at(entry + 8) as usize
    }

    /// Recomputes the checksum of chunk `c`.
    pub fn seal_chunk(&mut self, c: usize) -> &mut Self {
        let sum = xxh3_64(&self.bytes[self.chunk(c)]);
        let at = self.tables()[1] + 32 * c + 24;
        self.put(at, &sum.to_le_bytes())
    }

    /// Recomputes the checksum of header and tables (of their true lengths, given by `tables` before any forgery).
    pub fn seal(&mut self, end: usize) -> &mut Self {
        let mut meta = self.bytes[..HEADER_BYTES - 8].to_vec();
        meta.extend(&self.bytes[HEADER_BYTES..end]);
        self.put(HEADER_BYTES - 8, &xxh3_64(&meta).to_le_bytes())
    }

    pub fn write(&self, path: &Path) {
        fs::write(path, &self.bytes).unwrap();
    }
}

/// Writes `bytes` over stored bytes of chunk `c`, `at` bytes into it; every checksum fits again.
pub fn chunk(dir: &Path, layer: usize, c: usize, at: usize, bytes: &[u8]) {
    let path = dir.join(format!("layers/{layer:03}.thm"));
    let mut file = Layer::read(&path);
    let (start, end) = (file.chunk(c).start, file.tables()[2]);
    file.put(start + at, bytes).seal_chunk(c).seal(end).write(&path);
    let checksum = file.bytes[HEADER_BYTES - 8..HEADER_BYTES].iter().rev().map(|b| format!("{b:02x}")).collect();
    manifest(dir, |m| m.layers[layer].checksum = checksum);
}

/// The same for a tensor of `resident.safetensors`; `change` gets its bytes.
pub fn tensor(dir: &Path, name: &str, change: impl FnOnce(&mut [u8])) {
    let path = dir.join("resident.safetensors");
    let mut file = fs::read(&path).unwrap();
    manifest(dir, |m| {
        let tensor = m.resident.tensors.iter_mut().find(|t| t.name == name).unwrap();
        let bytes = &mut file[tensor.offset as usize..(tensor.offset + tensor.bytes) as usize];
        change(bytes);
        tensor.checksum = format!("{:016x}", xxh3_64(bytes));
    });
    fs::write(path, file).unwrap();
}
