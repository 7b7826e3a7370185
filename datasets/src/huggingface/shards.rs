//! Which safetensors files a folder consists of.

use super::{PICKLE_HELP, json};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The folder's weight files by name, and which file an index puts each tensor in (empty without an index).
#[derive(Debug)]
pub struct Shards {
    pub files: Vec<String>,
    pub index: Option<(PathBuf, BTreeMap<String, String>)>,
}

/// Finds the weights of a folder; nothing is opened but the index.
pub fn find(folder: &Path) -> Result<Shards> {
    let index = folder.join(INDEX);
    if index.exists() {
        let placed = read_index(folder, &index)?;
        let mut files: Vec<String> = placed.values().cloned().collect();
        files.sort();
        files.dedup();
        for file in &files {
            check_inside(folder, &index, file)?;
        }
        return Ok(Shards { files, index: Some((index, placed)) });
    }
    if folder.join(SINGLE).symlink_metadata().is_ok() {
        check_inside(folder, folder, SINGLE)?;
        return Ok(Shards { files: vec![SINGLE.to_owned()], index: None });
    }
    let mut pickles: Vec<PathBuf> = std::fs::read_dir(folder)
        .map_err(|source| Error::Io { path: folder.to_owned(), source })?
        .flatten()
        .map(|entry| entry.path())
        .filter(|p| p.extension().is_some_and(|e| ["bin", "pt", "pth", "pkl", "ckpt"].iter().any(|x| e == *x)))
        .collect();
    pickles.sort();
    match pickles.into_iter().next() {
        Some(path) => Err(Error::Unsupported { path, what: "a pickled checkpoint".into(), help: PICKLE_HELP.into() }),
        None => Err(json::corrupt(folder, SINGLE, format!("neither it nor {INDEX} is in the folder"))),
    }
}

fn read_index(folder: &Path, index: &Path) -> Result<BTreeMap<String, String>> {
    check_inside(folder, folder, INDEX)?;
    let text = json::read(index, json::MAX_FILE_BYTES)?;
    // Everything but the map is passed over, and the map has a type of its own: a repeated name stays visible.
    let Index { weight_map: json::Members(members) } = json::parse(&text, index, "weight_map")?;
    let mut placed = BTreeMap::new();
    for (tensor, file) in members {
        if let Some(before) = placed.insert(tensor.clone(), file.clone()) {
            return Err(json::corrupt(index, &tensor, format!("is placed twice, in {before} and in {file}")));
        }
    }
    Ok(placed)
}

/// The index file.
#[derive(serde::Deserialize)]
struct Index {
    weight_map: json::Members<String>,
}

/// Refuses file names that lead out of the folder. Links are followed, because the hub's cache consists of them;
/// their targets must be in the folder or in the cache's own place for contents, `../../blobs`.
pub fn check_inside(folder: &Path, named_in: &Path, file: &str) -> Result<()> {
    let refuse = |reason: String| json::corrupt(named_in, file, reason);
    let mut parts = Path::new(file).components();
    if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
        return Err(refuse("a file name leads out of the folder; expected a plain name".to_owned()));
    }
    let path = folder.join(file);
    let canonical = |p: &Path| p.canonicalize().map_err(|source| Error::Io { path: p.to_owned(), source });
    let target = match path.canonicalize() {
        Ok(target) => target,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(refuse("the file is missing".to_owned())),
        Err(e) if e.kind() == std::io::ErrorKind::InvalidInput => return Err(refuse(e.to_string())),
        Err(source) => return Err(Error::Io { path, source }),
    };
    let home = canonical(folder)?;
    let blobs = home.parent().and_then(Path::parent).map(|p| p.join("blobs"));
    let inside = target.parent() == Some(home.as_path())
        || (blobs.is_some()
            && target.parent() == blobs.as_deref()
            && home.parent().is_some_and(|p| p.ends_with("snapshots")));
    if inside { Ok(()) } else { Err(refuse(format!("a link leads out of the folder, to {}", target.display()))) }
}
