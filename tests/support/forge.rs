//! Damaged splits whose checksums are right, so that the checks behind the checksums are reached.

use std::fs;
use std::path::Path;
use thermocline_split::{Format, Manifest, TensorEntry, TensorFileEntry};
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
        offset..offset.saturating_add(self.u32_at(entry + 8) as usize)
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

    /// The checksum of header and tables, as the manifest has it.
    pub fn checksum(&self) -> String {
        self.bytes[HEADER_BYTES - 8..HEADER_BYTES].iter().rev().map(|b| format!("{b:02x}")).collect()
    }

    /// Stores every chunk as it is, with the room behind streams, each bundle changed by `change(neuron, bundle)`: what a
    /// decoder is given when no check before it finds anything. `used(bundle)` is a bundle's length without that room.
    pub fn store(&mut self, used: impl Fn(&[u8]) -> usize, mut change: impl FnMut(usize, &mut [u8])) -> &mut Self {
        let (bundle_bytes, [_, index, end]) = (self.u32_at(36) as usize, self.tables());
        let mut data = Vec::new();
        for c in 0..self.u32_at(32) as usize {
            let (entry, first) = (index + 32 * c, data.len());
            let mut stored = &self.bytes[self.chunk(c)];
            let trimmed = self.u32_at(entry + 12) == 2;
            for _ in 0..self.u32_at(entry + 16) {
                let n = if trimmed { used(stored) } else { bundle_bytes };
                let neuron = data.len() / bundle_bytes;
                data.extend(&stored[..n]);
                data.resize((neuron + 1) * bundle_bytes, 0);
                change(neuron, &mut data[neuron * bundle_bytes..]);
                stored = &stored[n..];
            }
            let offset = (self.data_at() + first) as u64;
            let sum = xxh3_64(&data[first..]);
            self.put(entry, &offset.to_le_bytes()).put(entry + 8, &((data.len() - first) as u32).to_le_bytes());
            self.put(entry + 12, &0u32.to_le_bytes()).put(entry + 24, &sum.to_le_bytes());
        }
        self.bytes.truncate(self.data_at());
        self.bytes.extend(data);
        let file_bytes = self.bytes.len() as u64;
        self.put(48, &file_bytes.to_le_bytes()).seal(end)
    }

    /// First byte of the chunks.
    pub fn data_at(&self) -> usize {
        self.tables()[2].next_multiple_of(4096)
    }

    pub fn write(&self, path: &Path) {
        fs::write(path, &self.bytes).unwrap();
    }
}

/// A plane of a layer, 0 is the base, written anew with the checksum that the manifest has for it.
pub fn plane(dir: &Path, layer: usize, plane: usize, file: &Layer) {
    manifest(dir, |m| {
        let entry = &mut m.layers[layer];
        let (name, bytes, checksum) = match plane.checked_sub(1) {
            None => (&entry.file, &mut entry.file_bytes, &mut entry.checksum),
            Some(p) => {
                let p = &mut entry.planes[p];
                (&p.file, &mut p.file_bytes, &mut p.checksum)
            }
        };
        file.write(&dir.join(name));
        (*bytes, *checksum) = (file.bytes.len() as u64, file.checksum());
    });
}

/// The same for a file of hot neurons.
pub fn hot(dir: &Path, layer: usize, section: usize, plane: usize, file: &Layer) {
    manifest(dir, |m| {
        let entry = &mut m.layers[layer].hot[section].planes[plane];
        file.write(&dir.join(&entry.file));
        (entry.file_bytes, entry.checksum) = (file.bytes.len() as u64, file.checksum());
    });
}

/// Writes `bytes` over stored bytes of chunk `c`, `at` bytes into it; every checksum fits again.
pub fn chunk(dir: &Path, layer: usize, c: usize, at: usize, bytes: &[u8]) {
    let path = dir.join(format!("layers/{layer:03}.thm"));
    let mut file = Layer::read(&path);
    let (start, end) = (file.chunk(c).start, file.tables()[2]);
    file.put(start + at, bytes).seal_chunk(c).seal(end).write(&path);
    manifest(dir, |m| m.layers[layer].checksum = file.checksum());
}

/// The same for a tensor of `resident.safetensors` or `resident-planes.safetensors`; `change` gets its bytes.
pub fn tensor(dir: &Path, name: &str, change: impl FnOnce(&mut [u8])) {
    let further = name.ends_with(".coarse") || name.ends_with(".final");
    let path = dir.join(if further { "resident-planes.safetensors" } else { "resident.safetensors" });
    let mut file = fs::read(&path).unwrap();
    manifest(dir, |m| {
        let entry = if further { m.resident_planes.as_mut().unwrap() } else { &mut m.resident };
        let tensor = entry.tensors.iter_mut().find(|t| t.name == name).unwrap();
        let bytes = &mut file[tensor.offset as usize..(tensor.offset + tensor.bytes) as usize];
        change(bytes);
        tensor.checksum = format!("{:016x}", xxh3_64(bytes));
    });
    fs::write(path, file).unwrap();
}

/// The same for a tensor of `predictors.safetensors`.
pub fn predictor(dir: &Path, name: &str, change: impl FnOnce(&mut [u8])) {
    listed_tensor(dir, name, |m| &mut m.predictors, change);
}

/// The same for a tensor of `sketches.safetensors`.
pub fn sketch(dir: &Path, name: &str, change: impl FnOnce(&mut [u8])) {
    listed_tensor(dir, name, |m| m.sketches.as_mut().unwrap(), change);
}

/// The same for a tensor of `residuals.safetensors`.
pub fn residual(dir: &Path, name: &str, change: impl FnOnce(&mut [u8])) {
    listed_tensor(dir, name, |m| m.residuals.as_mut().unwrap(), change);
}

fn listed_tensor(
    dir: &Path,
    name: &str,
    file: impl Fn(&mut Manifest) -> &mut TensorFileEntry,
    change: impl FnOnce(&mut [u8]),
) {
    let mut listed = None;
    manifest(dir, |m| listed = Some(file(m).file.clone()));
    let path = dir.join(listed.unwrap());
    let mut stored = fs::read(&path).unwrap();
    manifest(dir, |m| {
        let tensor = file(m).tensors.iter_mut().find(|t| t.name == name).unwrap();
        let bytes = &mut stored[tensor.offset as usize..(tensor.offset + tensor.bytes) as usize];
        change(bytes);
        tensor.checksum = format!("{:016x}", xxh3_64(bytes));
    });
    fs::write(path, stored).unwrap();
}

/// The last tensors of the file of shares, those of the curve, as they are but for what `change` does to their names, formats,
/// columns and contents.
pub fn curve(dir: &Path, change: impl FnOnce(&mut Vec<(String, Format, usize, Vec<u8>)>)) {
    manifest(dir, |m| {
        let entry = m.shares.as_mut().unwrap();
        let first = entry.tensors.iter().position(|t| t.name.starts_with("curve.")).unwrap();
        rewrite(dir, entry, first, |tensors| {
            let mut of_curve =
                tensors.drain(..).map(|(name, format, [_, columns], bytes)| (name, format, columns, bytes)).collect();
            change(&mut of_curve);
            tensors
                .extend(of_curve.into_iter().map(|(name, format, columns, bytes)| (name, format, [1, columns], bytes)));
        });
    });
}

/// Name, format, rows and columns, and contents of a tensor.
pub type Tensor = (String, Format, [usize; 2], Vec<u8>);

/// The tensors of a split's curves in graded precision, their checksums and the manifest's made good.
pub fn graded(dir: &Path, change: impl FnOnce(&mut Vec<Tensor>)) {
    manifest(dir, |m| rewrite(dir, m.graded.as_mut().unwrap(), 0, change));
}

/// The same of the sketches.
pub fn sketches(dir: &Path, change: impl FnOnce(&mut Vec<Tensor>)) {
    manifest(dir, |m| rewrite(dir, m.sketches.as_mut().unwrap(), 0, change));
}

/// The tensors of a file from the one of that number on.
fn rewrite(dir: &Path, entry: &mut TensorFileEntry, first: usize, change: impl FnOnce(&mut Vec<Tensor>)) {
    let path = dir.join(&entry.file);
    let mut file = fs::read(&path).unwrap();
    let old = entry.tensors.split_off(first);
    let contents = |t: &TensorEntry| file[t.offset as usize..(t.offset + t.bytes) as usize].to_vec();
    let mut tensors = old.iter().map(|t| (t.name.clone(), t.format, [t.rows, t.columns], contents(t))).collect();
    change(&mut tensors);
    file.truncate(old[0].offset as usize);
    for (name, format, [rows, columns], bytes) in tensors {
        let (offset, checksum) = (file.len() as u64, format!("{:016x}", xxh3_64(&bytes)));
        file.extend(&bytes);
        let bytes = bytes.len() as u64;
        entry.tensors.push(TensorEntry { name, format, rows, columns, offset, bytes, checksum });
    }
    entry.file_bytes = file.len() as u64;
    fs::write(path, file).unwrap();
}

/// A small file of a split, with its checksum.
pub fn plain_file(dir: &Path, name: &str, content: &str) {
    fs::write(dir.join(name), content).unwrap();
    manifest(dir, |m| {
        let entry = m.files.iter_mut().find(|f| f.file == name).unwrap();
        entry.checksum = format!("{:032x}", xxh3_128(content.as_bytes()));
    });
}
