//! Which safetensors files a folder consists of.

use super::{PICKLE_HELP, json};
use crate::{Error, Result};
use serde_json::Value;
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
    let text = json::read(index)?;
    let json::Members(members) = json::parse::<json::Members<Value>>(&text, index, "json")?;
    let mut maps = members.iter().filter(|(key, _)| key == "weight_map");
    if maps.next().is_none() || maps.next().is_some() {
        return Err(json::corrupt(index, "weight_map", "expected exactly one"));
    }
    // Parsed again with the map's own type: only a typed map keeps a repeated tensor name visible.
    let json::Members(typed) = json::parse::<json::Members<IndexMember>>(&text, index, "weight_map")?;
    let mut placed = BTreeMap::new();
    for (_, member) in typed {
        let IndexMember::Map(json::Members(entries)) = member else { continue };
        for (tensor, file) in entries {
            let Value::String(file) = file else { continue };
            if let Some(before) = placed.insert(tensor.clone(), file.clone()) {
                return Err(json::corrupt(index, &tensor, format!("is placed twice, in {before} and in {file}")));
            }
        }
    }
    Ok(placed)
}

/// A member of the index file: an object, of which the weight map is the one with file names, or anything else.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum IndexMember {
    Map(json::Members<Value>),
    Other(serde::de::IgnoredAny),
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
