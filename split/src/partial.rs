//! A split directory under construction: `OUT.partial`, locked, resumable, renamed when complete.

use crate::error::{Result, corrupt, io};
use crate::growing::Growing;
use crate::pack_layer::PackedLayer;
use crate::plane_file::PlaneFile;
use crate::planes::Plane;
use crate::{LayerFile, Precision};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::xxh3_64;

/// The directory, and what is finished in it.
pub(crate) struct Partial {
    growing: Growing,
}

impl Partial {
    /// Opens `OUT.partial`. What an earlier run with the same `identity` finished is kept, anything else is removed.
    pub(crate) fn open(out: &Path, identity: &str) -> Result<Self> {
        let growing = Growing::open(out)?;
        let dir = growing.dir();
        let identity_path = dir.join("identity.json");
        if fs::read_to_string(&identity_path).ok().as_deref() != Some(identity) {
            for sub in ["layers", "parts"] {
                match fs::remove_dir_all(dir.join(sub)) {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io(dir)(e)),
                    _ => {}
                }
            }
            fs::write(&identity_path, identity).map_err(io(&identity_path))?;
        }
        for sub in ["layers", "parts"] {
            fs::create_dir_all(dir.join(sub)).map_err(io(dir))?;
        }
        Ok(Self { growing })
    }

    pub(crate) fn dir(&self) -> &Path {
        self.growing.dir()
    }

    /// Refuses to start what the disk cannot hold.
    pub(crate) fn check_space(&self, needed: u64) -> Result<()> {
        self.growing.check_space(needed)
    }

    /// Where the planes of layer `l` lie in the directory, the base first.
    pub(crate) fn layer_files(l: usize, planes: &[Plane]) -> Vec<String> {
        let further = planes.iter().map(|plane| format!("layers/{l:03}.{}.thm", plane.name()));
        [format!("layers/{l:03}.thm")].into_iter().chain(further).collect()
    }

    fn part_path(&self, l: usize) -> PathBuf {
        self.dir().join(format!("parts/{l:03}.part"))
    }

    /// Where plane `p` of layer `l` grows.
    pub(crate) fn temporary_layer(&self, l: usize, p: usize) -> PathBuf {
        self.dir().join(format!("parts/{l:03}.{p}.thm.tmp"))
    }

    /// Whether layer `l` was finished by an earlier run, and its planes are whole and belong together.
    pub(crate) fn has_layer(&self, l: usize, planes: &[Plane]) -> bool {
        let files = Self::layer_files(l, planes);
        let opened = files.iter().map(|file| PlaneFile::open(&self.dir().join(file))).collect::<Result<Vec<_>>>();
        opened
            .and_then(|planes| LayerFile::of_files(vec![planes], Precision::Exact.into()))
            .is_ok_and(|layer| layer.layer() == l && layer.is_whole())
            && self.read_part(l).is_ok()
    }

    /// Writes the part file, then moves the layer's files in place, the base last: it implies the others.
    pub(crate) fn finish_layer(&self, l: usize, planes: &[Plane], packed: &PackedLayer) -> Result<()> {
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
        for (p, file) in Self::layer_files(l, planes).iter().enumerate().rev() {
            let to = self.dir().join(file);
            fs::rename(self.temporary_layer(l, p), &to).map_err(io(&to))?;
        }
        Ok(())
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
        let dir = self.dir();
        fs::remove_dir_all(dir.join("parts")).map_err(io(dir))?;
        fs::remove_file(dir.join("identity.json")).map_err(io(dir))?;
        self.growing.publish(out, &["layers"])
    }
}
