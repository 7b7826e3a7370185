//! Room on disk, asked for before work starts rather than missed when it is nearly done.

use crate::{Settings, statistics::sections};
use std::{io::ErrorKind, path::Path};
use thermocline_datasets::ModelConfig;

/// What the file system of a folder has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes that are free.
    pub available_bytes: u64,
    /// Bytes that an earlier attempt left in the folder: they are part of what is needed, or make room for it.
    pub present_bytes: u64,
}

impl Space {
    /// That of the file system where `dir` is or will be; no limit if the system does not say.
    pub fn of(dir: &Path) -> Self {
        let there = dir.ancestors().find(|p| p.exists()).unwrap_or(Path::new("."));
        let stat = rustix::fs::statvfs(there);
        let available_bytes = stat.map_or(u64::MAX, |stat| stat.f_bavail.saturating_mul(stat.f_frsize));
        Self { available_bytes, present_bytes: bytes_below(dir) }
    }

    /// Whether `needed_bytes` in all fit.
    pub fn holds(&self, needed_bytes: u64) -> bool {
        self.available_bytes.saturating_add(self.present_bytes) >= needed_bytes
    }
}

/// Bytes of all files below `dir`; 0 if there is no such folder.
pub fn bytes_below(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let sizes = entries.flatten().map(|e| match e.metadata() {
        Ok(m) if m.is_dir() => bytes_below(&e.path()),
        Ok(m) => m.len(),
        Err(_) => 0,
    });
    sizes.sum()
}

/// Whether a write failed because there is no room for it.
pub fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge)
}

/// Bytes on disk, at most, that [`crate::calibrate`] takes while it runs: hidden states of `n_tokens` tokens twice
/// (`8 * n_tokens * hidden_size`), the statistics of all layers twice (as they are finished, and in the profile), and
/// tables. The profile that stays is less than half of the statistics' part and the tables.
pub fn disk_bytes(config: &ModelConfig, settings: &Settings, n_tokens: u64, n_samples: usize) -> u64 {
    /// Bytes of a neuron's row in `neurons.parquet`, uncompressed.
    const ROW_BYTES: u64 = 14 * 8;
    /// Records, `profile.json`, headers.
    const SMALL_FILES_BYTES: u64 = 1 << 20;
    let layers = config.n_layers as u64;
    let hidden = n_tokens.saturating_mul(8 * config.hidden_size as u64);
    let layer: usize = sections(config, settings, n_samples).iter().map(|section| section.n_bytes()).sum();
    let rows = layers * config.intermediate_size as u64 * ROW_BYTES;
    // The layer at hand is written under a temporary name first.
    hidden.saturating_add((2 * layers + 1) * layer as u64 + rows + SMALL_FILES_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_earlier_attempt_left_counts_as_room() {
        let space = Space { available_bytes: 1000, present_bytes: 24 };
        assert!(space.holds(1000) && space.holds(1024) && !space.holds(1025));
        assert!(Space { available_bytes: u64::MAX, present_bytes: 24 }.holds(u64::MAX), "unlimited");
    }

    #[test]
    fn a_folder_that_is_not_there_yet_has_its_parents_room() {
        let dir = tempfile::TempDir::new().expect("a folder");
        std::fs::create_dir(dir.path().join("a")).expect("a folder");
        std::fs::write(dir.path().join("a/b"), [0; 4321]).expect("written");
        assert_eq!(Space::of(dir.path()).present_bytes, 4321);
        let new = Space::of(&dir.path().join("new/newer"));
        assert!(new.present_bytes == 0 && new.available_bytes > 0 && new.available_bytes < u64::MAX);
    }
}
