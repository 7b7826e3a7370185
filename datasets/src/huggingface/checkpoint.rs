use super::{SafetensorsEntry, config_json, json, parse_header, shards};
use crate::chat::MAX_TEMPLATE_BYTES;
use crate::checkpoint::file_name;
use crate::store::{Beside, SourceFile, StoredCheckpoint, StoredTensor, TensorStore};
use crate::{Error, ModelConfig, Result, digest, files};
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, SeqAccess, Visitor};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// Files beside the weights that decide what a model says.
const SIDE_FILES: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];

/// A model in a Hugging Face folder.
pub type FolderCheckpoint = StoredCheckpoint<FolderFiles>;

/// The files beside the weights; the tokenizer is read when it is asked for.
#[derive(Debug)]
pub struct FolderFiles {
    chat_template: Option<String>,
}

impl FolderCheckpoint {
    /// Opens a folder and checks everything but the tensors' bytes.
    ///
    /// # Errors
    /// If a file is missing or damaged, the files disagree, or something is needed that is not supported.
    pub fn open(folder: &Path) -> Result<Self> {
        let config_path = folder.join("config.json");
        if config_path.symlink_metadata().is_err() {
            return Err(json::corrupt(folder, "config.json", "the file is missing"));
        }
        for name in SIDE_FILES.iter().filter(|name| folder.join(name).symlink_metadata().is_ok()) {
            shards::check_inside(folder, folder, name)?;
        }
        let tokenizer_config: TokenizerConfig =
            optional_json(&folder.join("tokenizer_config.json"), json::MAX_TOKENIZER_SETTINGS_BYTES)?;
        let adds_bos = tokenizer_config.add_bos_token.unwrap_or(true);
        let shards = shards::find(folder)?;
        let mut config = config_json::read(&config_path, adds_bos)?;
        add_generation_ends(folder, &mut config)?;
        let mut files = Vec::new();
        let mut tensors = BTreeMap::new();
        let mut found_in: HashMap<String, String> = HashMap::new();
        for (number, name) in shards.files.iter().enumerate() {
            let file = SourceFile::open(&folder.join(name))?;
            for entry in parse_header(&file.file, &file.path, file.len)? {
                if let Some(before) = found_in.insert(entry.name.clone(), name.clone()) {
                    let reason = format!("the tensor is also in {before}");
                    return Err(json::corrupt(&file.path, &entry.name, reason));
                }
                tensors.insert(entry.name.clone(), (number, entry));
            }
            files.push(file);
        }
        if let Some((index, placed)) = &shards.index {
            for (tensor, file) in placed {
                let found = found_in.get(tensor);
                if found != Some(file) {
                    let found = found.map_or("in no file".to_owned(), |f| format!("in {f}"));
                    return Err(json::corrupt(index, tensor, format!("is placed in {file}, but it is {found}")));
                }
            }
        }
        check_layer_count(&config_path, &config, tensors.keys())?;
        let tensors = needed_tensors(&config, &files, tensors)?;
        let mut store = TensorStore { path: folder.to_owned(), files, tensors };
        store.keep_needed(&config, &config_path.display().to_string())?;
        let chat_template = chat_template(folder, tokenizer_config)?;
        Ok(Self { config, store, beside: FolderFiles { chat_template } })
    }
}

/// Chat models list the tokens that end a turn in `generation_config.json` only.
fn add_generation_ends(folder: &Path, config: &mut ModelConfig) -> Result<()> {
    let path = folder.join("generation_config.json");
    let given: GenerationConfig = optional_json(&path, json::MAX_SETTINGS_BYTES)?;
    let ids = config_json::token_ids(given.eos_token_id.as_ref(), &path, "eos_token_id")?;
    if let Some(id) = ids.iter().find(|id| **id as usize >= config.vocab_size) {
        let reason = format!("{id} is not below the vocabulary's {}", config.vocab_size);
        return Err(json::corrupt(&path, "eos_token_id", reason));
    }
    config.eos_token_ids.extend(ids);
    config.eos_token_ids.sort_unstable();
    config.eos_token_ids.dedup();
    Ok(())
}

fn check_layer_count<'a>(path: &Path, config: &ModelConfig, names: impl Iterator<Item = &'a String>) -> Result<()> {
    for name in names {
        let index = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        if index.is_some_and(|i| i >= config.n_layers) {
            let reason = format!("{}, but there is a tensor {name}", config.n_layers);
            return Err(json::corrupt(path, "num_hidden_layers", reason));
        }
    }
    Ok(())
}

/// Tensors of a readable type, and a refusal if one that is needed is of another type.
fn needed_tensors(
    config: &ModelConfig,
    files: &[SourceFile],
    mut found: BTreeMap<String, (usize, SafetensorsEntry)>,
) -> Result<BTreeMap<String, StoredTensor>> {
    let mut tensors = BTreeMap::new();
    for spec in crate::architectures::tensors(config) {
        let Some((file, entry)) = found.remove(&spec.name) else { continue };
        let kind = entry.dtype.map_err(|dtype| Error::Unsupported {
            path: files.get(file).map(|f| f.path.clone()).unwrap_or_default(),
            what: format!("the dtype {dtype} of tensor {}", spec.name),
            help: "convert the model to F32, F16 or BF16".into(),
        })?;
        let SafetensorsEntry { shape, offset, n_bytes, .. } = entry;
        tensors.insert(spec.name, StoredTensor { file, shape, kind, offset, n_bytes, interleaved: None });
    }
    Ok(tensors)
}

/// What matters of `generation_config.json`.
#[derive(Default, Deserialize)]
struct GenerationConfig {
    eos_token_id: Option<Value>,
}

/// What matters of `tokenizer_config.json`.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    add_bos_token: Option<bool>,
    chat_template: Option<Templates>,
}

fn optional_json<T: Default + DeserializeOwned>(path: &Path, max_bytes: u64) -> Result<T> {
    if !path.exists() {
        return Ok(T::default());
    }
    json::parse(&json::read(path, max_bytes)?, path, "json")
}

/// The template: a file of its own in newer folders, else a key of the tokenizer's settings, where it may be a list
/// of named ones.
fn chat_template(folder: &Path, tokenizer_config: TokenizerConfig) -> Result<Option<String>> {
    let own = folder.join("chat_template.jinja");
    if own.exists() {
        let bytes = files::read(&own, MAX_TEMPLATE_BYTES as u64).map_err(Error::refused(&own))?;
        return String::from_utf8(bytes).map(Some).map_err(|e| json::corrupt(&own, "text", e.to_string()));
    }
    Ok(tokenizer_config.chat_template.and_then(|templates| templates.0))
}

/// The template to use, of one or of a list of named ones.
struct Templates(Option<String>);

impl<'de> Deserialize<'de> for Templates {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Named {
            name: String,
            template: String,
        }
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Templates;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a template, or a list of named ones")
            }

            fn visit_str<E>(self, text: &str) -> Result<Templates, E> {
                Ok(Templates(Some(text.to_owned())))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut named: A) -> Result<Templates, A::Error> {
                let mut found = None;
                while let Some(Named { name, template }) = named.next_element()? {
                    found = found.or(Some(template).filter(|_| name == "default"));
                }
                Ok(Templates(found))
            }
        }
        deserializer.deserialize_any(Collect)
    }
}

impl Beside for FolderFiles {
    fn name(&self, store: &TensorStore) -> String {
        file_name(&store.path)
    }

    fn digest(&self, store: &TensorStore) -> Result<String> {
        let side = SIDE_FILES.iter().map(|name| store.path.join(name)).filter(|path| path.exists());
        let weights = store.files.iter().map(|file| file.path.clone());
        let named = |path: PathBuf| (file_name(&path), path);
        digest::digest_files(side.chain(weights).map(named).collect())
    }

    fn tokenizer_json(&self, store: &TensorStore) -> Result<String> {
        let path = store.path.join("tokenizer.json");
        if !path.exists() {
            let reason = format!("{} is missing; save the model's fast tokenizer there", path.display());
            return Err(Error::Tokenizer { reason });
        }
        json::read(&path, json::MAX_FILE_BYTES)
    }

    fn chat_template(&self) -> Option<String> {
        self.chat_template.clone()
    }
}
