//! A split directory under construction: `OUT.partial`, locked, resumable, renamed when complete.

use crate::error::{Result, corrupt, io};
use crate::growing::Growing;
use crate::pack_layer::PackedLayer;
use crate::plane_file::PlaneFile;
use crate::planes::further_planes;
use crate::{LayerFile, Precision};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use thermocline_kernels::Encoding;
use xxhash_rust::xxh3::Xxh3;

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

    /// Where the files of layer `l` lie in the directory: those of each section, the base first.
    pub(crate) fn layer_files(l: usize, sections: &[(usize, Encoding)]) -> Vec<Vec<String>> {
        let of_section = |(s, (_, encoding)): (usize, &(usize, Encoding))| {
            let stem = match s {
                _ if s + 1 == sections.len() => format!("layers/{l:03}"),
                0 => format!("layers/{l:03}.hot"),
                s => format!("layers/{l:03}.hot{}", s + 1),
            };
            let further = further_planes(*encoding).iter().map(|plane| format!("{stem}.{}.thm", plane.name()));
            [format!("{stem}.thm")].into_iter().chain(further).collect()
        };
        sections.iter().enumerate().map(of_section).collect()
    }

    fn part_path(&self, l: usize) -> PathBuf {
        self.dir().join(format!("parts/{l:03}.part"))
    }

    /// Where plane `p` of section `s` of layer `l` grows.
    pub(crate) fn temporary_layer(&self, l: usize, s: usize, p: usize) -> PathBuf {
        self.dir().join(format!("parts/{l:03}.{s}.{p}.thm.tmp"))
    }

    /// Whether layer `l` was finished by an earlier run, and its files are whole and belong together.
    pub(crate) fn has_layer(&self, l: usize, files: &[Vec<String>]) -> bool {
        let open = |group: &Vec<String>| group.iter().map(|file| PlaneFile::open(&self.dir().join(file))).collect();
        let opened = files.iter().map(open).collect::<Result<Vec<Vec<_>>>>();
        opened
            .and_then(|groups| LayerFile::of_files(groups, Precision::Exact.into()))
            .is_ok_and(|layer| layer.layer() == l && layer.is_whole())
            && self.read_part(l).is_ok()
    }

    /// Writes the part file, then moves the layer's files in place.
    pub(crate) fn finish_layer(&self, l: usize, files: &[Vec<String>], packed: &PackedLayer) -> Result<()> {
        let path = self.part_path(l);
        // Field by field: with a sketch they are too large for a copy of them all.
        let fields = || packed.parts().into_iter().map(|field| ((field.len() as u64).to_le_bytes(), field));
        let mut hash = Xxh3::new();
        for (len, field) in fields() {
            hash.update(&len);
            hash.update(field);
        }
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&path)?;
            file.write_all(&hash.digest().to_le_bytes())?;
            for (len, field) in fields() {
                file.write_all(&len)?;
                file.write_all(field)?;
            }
            file.sync_all()
        };
        write().map_err(io(&path))?;
        for (s, group) in files.iter().enumerate() {
            for (p, file) in group.iter().enumerate().rev() {
                let to = self.dir().join(file);
                fs::rename(self.temporary_layer(l, s, p), &to).map_err(io(&to))?;
            }
        }
        Ok(())
    }

    pub(crate) fn read_part(&self, l: usize) -> Result<PackedLayer> {
        let path = self.part_path(l);
        let mut file = File::open(&path).map_err(io(&path))?;
        let file_bytes = file.metadata().map_err(io(&path))?.len();
        let word = |file: &mut File| -> Result<[u8; 8]> {
            let mut bytes = [0; 8];
            file.read_exact(&mut bytes).map_err(io(&path))?;
            Ok(bytes)
        };
        let sum = word(&mut file)?;
        let mut hash = Xxh3::new();
        let mut packed = PackedLayer::default();
        for field in packed.parts_mut() {
            let len = word(&mut file)?;
            // Lengths are read before the checksum of them is: a damaged one must not ask for all memory.
            if u64::from_le_bytes(len) > file_bytes {
                return Err(corrupt(&path, "part", "too short"));
            }
            *field = vec![0; u64::from_le_bytes(len) as usize];
            file.read_exact(field).map_err(io(&path))?;
            hash.update(&len);
            hash.update(field);
        }
        if hash.digest().to_le_bytes() != sum {
            return Err(corrupt(&path, "part", "checksum mismatch"));
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
