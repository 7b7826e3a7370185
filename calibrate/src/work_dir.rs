//! The folder of a run in progress, `<output>.work`, and the lock on it.

use crate::{Error, Result, error::AtPath};
use std::{
    ffi::OsString,
    fs::{self, File, TryLockError},
    io::Write,
    path::{Path, PathBuf},
};

/// Holds the lock; it goes with the process, however that ends.
pub(crate) struct WorkDir {
    path: PathBuf,
    _lock: File,
}

impl WorkDir {
    /// Creates `<output>.work` if need be and locks it.
    pub(crate) fn lock(output: &Path) -> Result<Self> {
        let mut name = output.file_name().map(OsString::from).unwrap_or_else(|| OsString::from("profile"));
        name.push(".work");
        let path = output.with_file_name(name);
        fs::create_dir_all(&path).at(&path)?;
        let lock_path = path.join("lock");
        let lock = File::create(&lock_path).at(&lock_path)?;
        match lock.try_lock() {
            Ok(()) if is_still_at(&lock, &lock_path) => Ok(WorkDir { path, _lock: lock }),
            // The holder finished and removed the folder between our open and our lock.
            Ok(()) | Err(TryLockError::WouldBlock) => Err(Error::Locked { path: lock_path }),
            Err(TryLockError::Error(error)) => Err(error).at(&lock_path),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Removes everything but the lock.
    pub(crate) fn clear(&self) -> Result<()> {
        for entry in fs::read_dir(&self.path).at(&self.path)? {
            let path = entry.at(&self.path)?.path();
            if path.is_dir() {
                fs::remove_dir_all(&path).at(&path)?;
            } else if path.file_name().is_some_and(|name| name != "lock") {
                fs::remove_file(&path).at(&path)?;
            }
        }
        Ok(())
    }

    /// Moves a finished folder inside the work folder to its final name, then removes the work folder.
    pub(crate) fn publish(self, finished: &Path, output: &Path) -> Result<()> {
        for entry in fs::read_dir(finished).at(finished)? {
            let path = entry.at(finished)?.path();
            File::open(&path).and_then(|file| file.sync_all()).at(&path)?;
        }
        fs::rename(finished, output).at(output)?;
        self.remove()
    }

    /// Removes the work folder.
    pub(crate) fn remove(self) -> Result<()> {
        fs::remove_dir_all(&self.path).at(&self.path)
    }
}

#[cfg(unix)]
fn is_still_at(lock: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |meta: fs::Metadata| (meta.dev(), meta.ino());
    match (lock.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(there)) => id(ours) == id(there),
        _ => false,
    }
}

#[cfg(not(unix))]
fn is_still_at(_lock: &File, path: &Path) -> bool {
    path.exists()
}

/// Writes a file so that its name always holds the old bytes or all of the new ones.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary).at(&temporary)?;
    file.write_all(bytes).at(&temporary)?;
    file.sync_all().at(&temporary)?;
    fs::rename(&temporary, path).at(path)
}
