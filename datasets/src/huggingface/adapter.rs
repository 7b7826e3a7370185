//! LoRA adapters as PEFT saves them: `adapter_config.json` and `adapter_model.safetensors`.
//! Paper: arXiv 2106.09685. Everything that would make the sum `base + scale * B A` the wrong one is refused.

use super::{SafetensorsEntry, json, parse_header};
use crate::gguf::GgmlType;
use crate::store::SourceFile;
use crate::{Checkpoint, Error, Result, SourceDtype, digest};
use half::f16;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// Largest rank: above any real one.
const MAX_RANK: usize = 1 << 14;

/// Two matrices whose product is added to one of the base model's.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraFactors {
    /// `A`, `[rank, columns]`, row-major.
    pub a: Vec<f32>,
    /// `B`, `[rows, rank]`, row-major.
    pub b: Vec<f32>,
    /// Whether every value is a bf16, because the file's are.
    pub is_bf16: bool,
}

/// An adapter whose settings, names and shapes fit a base model.
#[derive(Debug)]
pub struct LoraAdapter {
    folder: PathBuf,
    file: SourceFile,
    rank: usize,
    scale: f32,
    /// `A` and `B` in the file, by the canonical name of the base model's matrix.
    modules: BTreeMap<String, (SafetensorsEntry, SafetensorsEntry)>,
}

/// The settings that decide the sum; all others are for training.
#[derive(Deserialize)]
struct Config {
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    target_modules: Option<Value>,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    init_lora_weights: Value,
    /// Everything else; [`REFUSED`] says what may not be set.
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

/// Settings that must be left out, `null`, `false`, `"none"` or empty, and what to do if they are not.
const REFUSED: [(&str, &str); 13] = [
    ("use_dora", MERGE),
    ("use_qalora", MERGE),
    ("use_bdlora", MERGE),
    ("rank_pattern", MERGE),
    ("alpha_pattern", MERGE),
    ("modules_to_save", MERGE),
    ("trainable_token_indices", MERGE),
    ("target_parameters", MERGE),
    ("layer_replication", MERGE),
    ("bias", MERGE),
    ("lora_bias", MERGE),
    ("fan_in_fan_out", MERGE),
    ("alora_invocation_tokens", "an activated adapter depends on the prompt and has no merged model"),
];
const MERGE: &str =
    "merge the adapter into the model (`merge_and_unload`, then `save_pretrained`) and give that folder";

impl LoraAdapter {
    /// Whether `folder` holds an adapter rather than a model.
    pub fn is_adapter(folder: &Path) -> bool {
        folder.join(CONFIG).exists()
    }

    /// Opens an adapter and checks it against `base`: settings, and name, type and shape of every tensor.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a setting other than plain LoRA, and [`Error::Corrupt`] if a file is damaged or does
    /// not fit the base model.
    pub fn open(folder: &Path, base: &dyn Checkpoint) -> Result<Self> {
        let path = folder.join(CONFIG);
        let config: Config = json::parse(&json::read(&path, json::MAX_SETTINGS_BYTES)?, &path, "json")?;
        let scale = check_config(&config, &path)?;
        let pickle = folder.join("adapter_model.bin");
        let weights = folder.join(WEIGHTS);
        if !weights.exists() && pickle.exists() {
            let help = "pickles can run code when they are opened; save the adapter again with safe_serialization=True";
            return Err(Error::Unsupported { path: pickle, what: "a pickled adapter".into(), help: help.into() });
        }
        let file = SourceFile::open(&weights)?;
        let entries = parse_header(&file.file, &file.path, file.len)?;
        let modules = pair(entries, &file.path)?;
        for (name, (a, b)) in &modules {
            check_module(name, a, b, config.r, base, &file.path)?;
        }
        check_targets(config.target_modules.as_ref(), &modules, &path)?;
        Ok(Self { folder: folder.to_owned(), file, rank: config.r, scale, modules })
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// Rows of every `A`, columns of every `B`.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// What products are multiplied with before they are added: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with
    /// `use_rslora`; computed in f64 and rounded to f32 once.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Canonical names of the matrices that it changes, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.modules.keys().map(String::as_str)
    }

    /// The factors for a matrix; `None` if the adapter leaves it alone.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn factors(&self, name: &str) -> Result<Option<LoraFactors>> {
        let Some((a, b)) = self.modules.get(name) else { return Ok(None) };
        let is_bf16 = [a, b].iter().all(|e| e.dtype == Ok(GgmlType::BF16));
        Ok(Some(LoraFactors { a: self.values(a)?, b: self.values(b)?, is_bf16 }))
    }

    fn values(&self, entry: &SafetensorsEntry) -> Result<Vec<f32>> {
        let too_large = |_| json::corrupt(&self.file.path, &entry.name, "too large for this machine");
        let mut bytes = vec![0; usize::try_from(entry.n_bytes).map_err(too_large)?];
        self.file.read_at(&entry.name, entry.offset, &mut bytes)?;
        Ok(match entry.dtype {
            Ok(GgmlType::F32) => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Ok(GgmlType::F16) => bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            _ => {
                let widen = |b: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
                bytes.as_chunks::<2>().0.iter().map(widen).collect()
            }
        })
    }

    /// A digest of both files (hex, 32 digits): names, sizes and contents.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn digest(&self) -> Result<String> {
        let named = |name: &str| (name.to_owned(), self.folder.join(name));
        digest::digest_files(vec![named(CONFIG), named(WEIGHTS)])
    }

    /// The adapter's own `tokenizer.json`, if it brings one.
    ///
    /// # Errors
    /// If it is there and cannot be read.
    pub fn tokenizer_json(&self) -> Result<Option<String>> {
        let path = self.folder.join("tokenizer.json");
        if path.exists() { json::read(&path, json::MAX_FILE_BYTES).map(Some) } else { Ok(None) }
    }
}

/// Refuses what is not plain LoRA; returns the scale.
fn check_config(config: &Config, path: &Path) -> Result<f32> {
    let unsupported = |what: String, help: &str| Error::Unsupported { path: path.to_owned(), what, help: help.into() };
    if config.peft_type != "LORA" {
        return Err(unsupported(format!("peft_type {:?}", config.peft_type), MERGE));
    }
    for (key, help) in REFUSED {
        let harmless = match config.rest.get(key) {
            None | Some(Value::Null | Value::Bool(false)) => true,
            Some(Value::String(text)) => text == "none",
            Some(Value::Array(items)) => items.is_empty(),
            Some(Value::Object(members)) => members.is_empty(),
            Some(_) => false,
        };
        if !harmless {
            let value = config.rest.get(key).map(ToString::to_string).unwrap_or_default();
            return Err(unsupported(format!("{key}: {value}"), help));
        }
    }
    // These start from a base that they have changed, so the adapter is no difference to the one that was published.
    let init = config.init_lora_weights.as_str().unwrap_or_default().to_lowercase();
    if ["pissa", "olora", "corda", "loftq"].iter().any(|kind| init.starts_with(kind)) {
        return Err(unsupported(format!("init_lora_weights: {init:?}, which changes the base model"), MERGE));
    }
    if config.r == 0 || config.r > MAX_RANK {
        return Err(json::corrupt(path, "r", format!("{}, expected 1 to {MAX_RANK}", config.r)));
    }
    let rank = config.r as f64;
    let scale = (config.lora_alpha / if config.use_rslora { rank.sqrt() } else { rank }) as f32;
    if !scale.is_finite() {
        return Err(json::corrupt(path, "lora_alpha", format!("{} is no scale", config.lora_alpha)));
    }
    Ok(scale)
}

/// The file's tensors as pairs, by the name of the matrix that they change.
fn pair(entries: Vec<SafetensorsEntry>, path: &Path) -> Result<BTreeMap<String, (SafetensorsEntry, SafetensorsEntry)>> {
    let (mut all_a, mut all_b) = (BTreeMap::new(), BTreeMap::new());
    for entry in entries {
        let module = entry.name.strip_prefix("base_model.model.");
        let found = module.and_then(|m| {
            let (module, list) = match m.strip_suffix(".lora_A.weight") {
                Some(module) => (module, &mut all_a),
                None => (m.strip_suffix(".lora_B.weight")?, &mut all_b),
            };
            Some((format!("{module}.weight"), list))
        });
        let Some((name, list)) = found else {
            let what = format!("the tensor {}", entry.name);
            return Err(Error::Unsupported { path: path.to_owned(), what, help: MERGE.into() });
        };
        list.insert(name, entry);
    }
    if all_a.is_empty() {
        return Err(json::corrupt(path, "tensors", "there are none, so nothing is changed"));
    }
    let mut modules = BTreeMap::new();
    for (name, a) in all_a {
        let Some(b) = all_b.remove(&name) else {
            return Err(json::corrupt(path, &a.name, "there is no lora_B for it"));
        };
        modules.insert(name, (a, b));
    }
    match all_b.into_values().next() {
        Some(b) => Err(json::corrupt(path, &b.name, "there is no lora_A for it")),
        None => Ok(modules),
    }
}

fn check_module(
    name: &str,
    a: &SafetensorsEntry,
    b: &SafetensorsEntry,
    rank: usize,
    base: &dyn Checkpoint,
    path: &Path,
) -> Result<()> {
    let Some(info) = base.info(name) else {
        let reason = format!("the base model {} has no tensor {name}", base.path().display());
        return Err(json::corrupt(path, &a.name, reason));
    };
    let [rows, columns] = info.shape[..] else {
        return Err(json::corrupt(path, &a.name, format!("{name} of the base model is no matrix")));
    };
    if info.dtype != SourceDtype::Bf16 {
        let what = format!("{name}, which is {:?} in {},", info.dtype, base.path().display());
        let help = "an adapter is added to bf16 weights; give the model in BF16".into();
        return Err(Error::Unsupported { path: path.to_owned(), what, help });
    }
    for (entry, shape) in [(a, [rank, columns]), (b, [rows, rank])] {
        if entry.shape != shape {
            let reason = format!("its shape is {:?}, but r and the base model ask for {shape:?}", entry.shape);
            return Err(json::corrupt(path, &entry.name, reason));
        }
        if let Err(dtype) = &entry.dtype {
            let what = format!("the dtype {dtype} of tensor {}", entry.name);
            let help = "save the adapter in F32, F16 or BF16".into();
            return Err(Error::Unsupported { path: path.to_owned(), what, help });
        }
    }
    Ok(())
}

/// A list of target modules must name what the file holds: an adapter of which a part is missing is no adapter.
fn check_targets(targets: Option<&Value>, modules: &BTreeMap<String, impl Sized>, path: &Path) -> Result<()> {
    // A pattern, or "all-linear": what the file holds is all that is known.
    let Some(Value::Array(targets)) = targets else { return Ok(()) };
    let targets: Vec<&str> = targets.iter().filter_map(Value::as_str).collect();
    let belongs = |name: &str, target: &str| {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        module.strip_suffix(target).is_some_and(|before| before.is_empty() || before.ends_with('.'))
    };
    if let Some(name) = modules.keys().find(|name| !targets.iter().any(|t| belongs(name, t))) {
        return Err(json::corrupt(path, "target_modules", format!("{name} has factors but is not listed")));
    }
    if let Some(target) = targets.iter().find(|t| !modules.keys().any(|name| belongs(name, t))) {
        return Err(json::corrupt(path, "target_modules", format!("{target} is listed but has no factors")));
    }
    Ok(())
}
