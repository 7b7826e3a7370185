//! What an interrupted run has finished of a delta: a line for each tensor, written once the tensor's bytes are on disk.

use super::manifest::DeltaTensor;
use super::matrix::BlockCounts;
use crate::error::{Result, io};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Its name in the directory, until that is complete.
pub(super) const JOURNAL_FILE: &str = "journal";

/// A finished tensor.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Finished {
    pub tensor: DeltaTensor,
    /// Blocks by kind, of this tensor and those before it.
    pub blocks: BlockCounts,
    /// Bytes of the data file after it.
    pub data_bytes: u64,
}

/// The file: a line that says what is being made, then one for each finished tensor.
pub(super) struct Journal {
    path: PathBuf,
    file: File,
}

impl Journal {
    /// Opens the journal in `dir`, and what is finished according to it: whole lines of a run with the same `identity`,
    /// a line of text, as far as they are about `names` in this order and the data file, `data_bytes` long, holds them.
    pub(super) fn open(dir: &Path, identity: &str, names: &[&str], data_bytes: u64) -> Result<(Self, Vec<Finished>)> {
        let path = dir.join(JOURNAL_FILE);
        let text = fs::read_to_string(&path).unwrap_or_default();
        let mut lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        let head = format!("{identity}\n");
        let (mut finished, mut whole): (Vec<Finished>, usize) = (Vec::new(), 0);
        if lines.next() == Some(&head) {
            whole = head.len();
            for (line, name) in lines.zip(names) {
                let before = finished.last().map_or(0, |f| f.data_bytes);
                match serde_json::from_str::<Finished>(line) {
                    Ok(f) if f.tensor.name == *name && (before..=data_bytes).contains(&f.data_bytes) => {
                        whole += line.len();
                        finished.push(f);
                    }
                    _ => break,
                }
            }
        }
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path).map_err(io(&path))?;
        let mut journal = Self { path, file };
        // What comes after the last whole line is written again.
        let cut = journal.file.set_len(whole as u64).and_then(|()| journal.file.seek(SeekFrom::End(0)));
        cut.map_err(io(&journal.path))?;
        if whole == 0 {
            journal.write(&head)?;
        }
        Ok((journal, finished))
    }

    /// Adds a tensor whose bytes are on disk.
    pub(super) fn add(&mut self, finished: &Finished) -> Result<()> {
        let line = serde_json::to_string(finished).map_err(std::io::Error::other).map_err(io(&self.path))?;
        self.write(&format!("{line}\n"))
    }

    fn write(&mut self, line: &str) -> Result<()> {
        self.file.write_all(line.as_bytes()).and_then(|()| self.file.sync_data()).map_err(io(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delta::manifest::DeltaKind;

    fn finished(name: &str, data_bytes: u64) -> Finished {
        let tensor = DeltaTensor {
            name: name.to_owned(),
            kind: DeltaKind::Unchanged,
            rows: 1,
            columns: 4,
            changed: 0,
            offset: 16,
            bytes: 0,
            block_rows: 0,
            index_offset: 0,
            checksum: String::new(),
            final_digest: String::new(),
            low_rank: None,
        };
        Finished { tensor, blocks: [data_bytes, 0, 0], data_bytes }
    }

    fn names(dir: &Path, identity: &str, data_bytes: u64) -> Vec<String> {
        let (_, finished) = Journal::open(dir, identity, &["a", "b", "c"], data_bytes).expect("a journal");
        finished.into_iter().map(|f| f.tensor.name).collect()
    }

    #[test]
    fn whole_lines_of_the_same_run_count() {
        let folder = tempfile::tempdir().expect("a folder");
        let (dir, path) = (folder.path(), folder.path().join(JOURNAL_FILE));
        let (mut journal, none) = Journal::open(dir, "one", &["a", "b", "c"], 0).expect("a journal");
        assert!(none.is_empty());
        journal.add(&finished("a", 20)).expect("a line");
        journal.add(&finished("b", 30)).expect("a line");
        drop(journal);
        assert_eq!(names(dir, "one", 30), ["a", "b"]);
        let text = fs::read_to_string(&path).expect("text");
        // Data that never came to the disk, and a line that was being written.
        assert_eq!(names(dir, "one", 29), ["a"]);
        for cut in text.find("\"b\"").expect("b")..text.len() {
            fs::write(&path, &text[..cut]).expect("a cut journal");
            assert_eq!(names(dir, "one", 30), ["a"], "cut at {cut}");
        }
        // It goes on behind the last whole line.
        let (mut journal, _) = Journal::open(dir, "one", &["a", "b", "c"], 30).expect("a journal");
        journal.add(&finished("b", 30)).expect("a line");
        assert_eq!(fs::read_to_string(&path).expect("text"), text);
        // Another order of tensors, or another run.
        let (_, of_others) = Journal::open(dir, "one", &["a", "c"], 30).expect("a journal");
        assert_eq!(of_others.len(), 1);
        assert!(names(dir, "two", 30).is_empty());
        assert!(names(dir, "one", 30).is_empty(), "the journal is the other run's now");
    }
}
