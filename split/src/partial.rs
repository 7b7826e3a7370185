//! A split directory under construction: `OUT.partial`, locked, resumable, renamed when complete.

use crate::error::{Result, corrupt, io};
use crate::pack_layer::PackedLayer;
use crate::{Error, LayerFile};
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use thermocline_calibrate::disk::Space;
use xxhash_rust::xxh3::xxh3_64;

/// The directory, held under a lock of the operating system until it is dropped.
pub(crate) struct Partial {
    dir: PathBuf,
    /// Locked; the lock ends with the process, however that ends.
    _lock: File,
}

impl Partial {
    /// Opens `OUT.partial`. What an earlier run with the same `identity` finished is kept, anything else is removed.
    pub(crate) fn open(out: &Path, identity: &str) -> Result<Self> {
        let mut name = out.file_name().map(ToOwned::to_owned).unwrap_or_default();
        name.push(".partial");
        let dir = out.with_file_name(name);
        fs::create_dir_all(&dir).map_err(io(&dir))?;
        let lock_path = dir.join("lock");
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
        let identity_path = dir.join("identity.json");
        if fs::read_to_string(&identity_path).ok().as_deref() != Some(identity) {
            for sub in ["layers", "parts"] {
                match fs::remove_dir_all(dir.join(sub)) {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io(&dir)(e)),
                    _ => {}
                }
            }
            fs::write(&identity_path, identity).map_err(io(&identity_path))?;
        }
        for sub in ["layers", "parts"] {
            fs::create_dir_all(dir.join(sub)).map_err(io(&dir))?;
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

    fn layer_path(&self, l: usize) -> PathBuf {
        self.dir.join(format!("layers/{l:03}.thm"))
    }

    fn part_path(&self, l: usize) -> PathBuf {
        self.dir.join(format!("parts/{l:03}.part"))
    }

    pub(crate) fn temporary_layer(&self, l: usize) -> PathBuf {
        self.dir.join(format!("parts/{l:03}.thm.tmp"))
    }

    /// Whether layer `l` was finished by an earlier run and is whole.
    pub(crate) fn has_layer(&self, l: usize) -> bool {
        let Ok(file) = LayerFile::open(&self.layer_path(l)) else { return false };
        // Chunk by chunk: several threads may look at a layer each.
        let bundle_bytes = file.layout().bundle_bytes();
        let mut bundles = vec![0; file.chunk_neurons() * bundle_bytes];
        let mut whole = |c: usize| {
            let bundles = &mut bundles[..file.index()[c].n_neurons as usize * bundle_bytes];
            file.read_chunks(c..c + 1, bundles).is_ok()
        };
        (0..file.index().len()).all(&mut whole) && self.read_part(l).is_ok()
    }

    /// Writes the part file, then moves the layer file in place: a layer file implies its part.
    pub(crate) fn finish_layer(&self, l: usize, packed: &PackedLayer) -> Result<()> {
        let path = self.part_path(l);
        let mut body = Vec::new();
        for field in packed.parts() {
            body.extend_from_slice(&(field.len() as u64).to_le_bytes());
            body.extend_from_slice(field);
        }
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&path)?;
            file.write_all(&xxh3_64(&body).to_le_bytes())?;
            file.write_all(&body)?;
            file.sync_all()
        };
        write().map_err(io(&path))?;
        let to = self.layer_path(l);
        fs::rename(self.temporary_layer(l), &to).map_err(io(&to))
    }

    pub(crate) fn read_part(&self, l: usize) -> Result<PackedLayer> {
        let path = self.part_path(l);
        let bytes = fs::read(&path).map_err(io(&path))?;
        let bad = |reason: &str| corrupt(&path, "part", reason);
        let (sum, mut rest) = bytes.split_first_chunk::<8>().ok_or_else(|| bad("too short"))?;
        if xxh3_64(rest).to_le_bytes() != *sum {
            return Err(bad("checksum mismatch"));
        }
        let mut packed = PackedLayer::default();
        for field in packed.parts_mut() {
            let (len, tail) = rest.split_first_chunk::<8>().ok_or_else(|| bad("too short"))?;
            let (body, tail) =
                tail.split_at_checked(u64::from_le_bytes(*len) as usize).ok_or_else(|| bad("too short"))?;
            *field = body.to_vec();
            rest = tail;
        }
        Ok(packed)
    }

    /// Removes what only a resumed run needs and gives the directory its final name.
    pub(crate) fn publish(self, out: &Path) -> Result<()> {
        fs::remove_dir_all(self.dir.join("parts")).map_err(io(&self.dir))?;
        for name in ["identity.json", "lock"] {
            fs::remove_file(self.dir.join(name)).map_err(io(&self.dir))?;
        }
        for dir in [self.dir.join("layers"), self.dir.clone()] {
            File::open(&dir).and_then(|d| d.sync_all()).map_err(io(&dir))?;
        }
        fs::rename(&self.dir, out).map_err(io(out))?;
        let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(parent).and_then(|d| d.sync_all()).map_err(io(parent))
    }
}
