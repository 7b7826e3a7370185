use crate::{Error, Result};
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use xxhash_rust::xxh3::Xxh3;

/// How much is read at a time.
const PIECE_BYTES: usize = 1 << 20;

/// XXH3 (128 bits, hex) over the files' names, sizes and contents, in the order of their names.
/// A name is relative to the checkpoint, so moving the checkpoint keeps the digest.
pub fn digest_files(mut files: Vec<(String, PathBuf)>) -> Result<String> {
    files.sort();
    let mut hash = Xxh3::new();
    let mut piece = vec![0; PIECE_BYTES];
    for (name, path) in files {
        let failed = |source| Error::Io { path: path.clone(), source };
        let mut file = File::open(&path).map_err(failed)?;
        let len = file.metadata().map_err(failed)?.len();
        hash.update(&(name.len() as u64).to_le_bytes());
        hash.update(name.as_bytes());
        hash.update(&len.to_le_bytes());
        loop {
            let n = match file.read(&mut piece) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(failed(e)),
            };
            hash.update(piece.get(..n).unwrap_or_default());
        }
    }
    Ok(format!("{:032x}", hash.digest128()))
}
