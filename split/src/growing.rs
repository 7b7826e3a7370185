//! A directory that grows as `OUT.partial`, under a lock, and gets its final name when it is complete.

use crate::Error;
use crate::error::{Result, io};
use std::fs::{self, File, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use thermocline_calibrate::disk::Space;

/// Name of the locked file. A directory that holds it is not complete.
pub(crate) const LOCK: &str = "lock";

/// The directory, held under a lock of the operating system until it is dropped.
pub(crate) struct Growing {
    dir: PathBuf,
    /// Locked; the lock ends with the process, however that ends.
    _lock: File,
}

impl Growing {
    /// Makes or takes over `OUT.partial`, with whatever an earlier run left there.
    pub(crate) fn open(out: &Path) -> Result<Self> {
        let mut name = out.file_name().map(ToOwned::to_owned).unwrap_or_default();
        name.push(".partial");
        let dir = out.with_file_name(name);
        fs::create_dir_all(&dir).map_err(io(&dir))?;
        let lock_path = dir.join(LOCK);
        let lock = File::create(&lock_path).map_err(io(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::Locked { path: dir }),
            Err(TryLockError::Error(e)) => return Err(io(&lock_path)(e)),
        }
        // Between opening and locking, the process that held the lock may have published the directory: the lock is
        // then on a file that is no longer there.
        let same = |a: &fs::Metadata, b: &fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
        match (lock.metadata(), fs::metadata(&lock_path)) {
            (Ok(held), Ok(there)) if same(&held, &there) && !out.exists() => {}
            _ => return Err(Error::Locked { path: dir }),
        }
        Ok(Self { dir, _lock: lock })
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Refuses to start what the disk cannot hold.
    pub(crate) fn check_space(&self, needed: u64) -> Result<()> {
        let space = Space::of(&self.dir);
        if space.holds(needed) {
            return Ok(());
        }
        Err(Error::DiskFull { path: self.dir.clone(), needed, available: space.available_bytes })
    }

    /// Gives the directory its final name, after everything in it (and in the folders `inside` it) is on disk.
    pub(crate) fn publish(self, out: &Path, inside: &[&str]) -> Result<()> {
        fs::remove_file(self.dir.join(LOCK)).map_err(io(&self.dir))?;
        for dir in inside.iter().map(|name| self.dir.join(name)).chain([self.dir.clone()]) {
            File::open(&dir).and_then(|d| d.sync_all()).map_err(io(&dir))?;
        }
        fs::rename(&self.dir, out).map_err(io(out))?;
        let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(parent).and_then(|d| d.sync_all()).map_err(io(parent))
    }
}
