use super::metadata::Metadata;
use super::{GgufHeader, Value};
use crate::checkpoint::file_name;
use crate::store::{Beside, SourceFile, StoredCheckpoint, StoredTensor, TensorStore};
use crate::{Error, Result, architectures, digest, tokenizer};
use std::collections::BTreeMap;
use std::path::Path;

/// A model in one GGUF file.
pub type GgufCheckpoint = StoredCheckpoint<GgufHeader>;

impl GgufCheckpoint {
    /// Opens a file and checks everything but the tensors' bytes.
    ///
    /// # Errors
    /// If the file is damaged, misses something, or needs what is not supported.
    pub fn open(path: &Path) -> Result<Self> {
        let file = SourceFile::open(path)?;
        let mut header = GgufHeader::read(&file.file, path, file.len)?;
        if header.metadata.contains_key("split.count") && split_count(&header) > 1 {
            return Err(Error::Unsupported {
                path: path.to_owned(),
                what: "a GGUF model in several files".into(),
                help: "join them with llama.cpp's `llama-gguf-split --merge`".into(),
            });
        }
        let metadata = Metadata { header: &header, path };
        let family = metadata.family()?;
        let config = metadata.config(family)?;
        let mut tensors = BTreeMap::new();
        for spec in architectures::tensors(&config) {
            if let Some(found) = header.tensors.remove(&spec.gguf_name) {
                let interleaved = family.gguf_interleaves_qk && spec.role.is_rotated();
                let stored = StoredTensor {
                    file: 0,
                    shape: found.shape,
                    kind: found.kind,
                    offset: found.offset,
                    n_bytes: found.n_bytes,
                    interleaved: interleaved.then_some(config.head_dim),
                };
                tensors.insert(spec.name, stored);
            }
        }
        let mut store = TensorStore { path: path.to_owned(), files: vec![file], tensors };
        store.keep_needed(&config, "the metadata")?;
        Ok(Self { config, store, beside: header })
    }

    /// The file's metadata.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.beside.metadata
    }
}

fn split_count(header: &GgufHeader) -> u64 {
    header.metadata.get("split.count").and_then(Value::as_u64).unwrap_or(0)
}

impl Beside for GgufHeader {
    fn name(&self, store: &TensorStore) -> String {
        let given = self.metadata.get("general.name").and_then(Value::as_str).filter(|name| !name.trim().is_empty());
        given.map_or_else(|| file_name(&store.path), str::to_owned)
    }

    fn digest(&self, store: &TensorStore) -> Result<String> {
        // One file: its own name says nothing, and a renamed copy is the same model.
        digest::digest_files(vec![(String::new(), store.path.clone())])
    }

    fn tokenizer_json(&self, store: &TensorStore) -> Result<String> {
        tokenizer::from_gguf(&Metadata { header: self, path: &store.path })
    }

    fn chat_template(&self) -> Option<String> {
        self.metadata.get("tokenizer.chat_template").and_then(Value::as_str).map(str::to_owned)
    }
}
