use crate::{ModelConfig, Result};
use std::path::Path;

/// How a checkpoint stores a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SourceDtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// A block-quantised GGUF type, by its name there (`Q4_1`, `Q6_K`, ...).
    Quantized(&'static str),
}

/// What a checkpoint says of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Canonical shape, outermost first: `[rows, columns]` or `[n]`.
    pub shape: Vec<usize>,
    /// Storage type in the source.
    pub dtype: SourceDtype,
    /// Bytes in the source.
    pub n_bytes: u64,
}

/// A dense model on disk: its configuration, and its tensors one at a time.
///
/// Names are the canonical Hugging Face ones: `model.embed_tokens.weight`, `model.norm.weight`, `lm_head.weight`,
/// and per layer `model.layers.N.` + `input_layernorm.weight`, `post_attention_layernorm.weight`,
/// `self_attn.{q,k,v}_proj.{weight,bias}`, `self_attn.o_proj.weight`, `mlp.{gate,up,down}_proj.weight`.
/// A tied head is not listed; ask for `model.embed_tokens.weight`.
/// Rows are in the Hugging Face order (GGUF's interleaved llama query and key rows are put back).
pub trait Checkpoint: Send + Sync {
    /// The model's shape.
    fn config(&self) -> &ModelConfig;

    /// Where it lies, for messages.
    fn path(&self) -> &Path;

    /// What people call the model: the name that its file gives it, else the file's or the folder's. At most
    /// [`MAX_NAME_CHARS`] characters, none of them a control character; it comes from a file, so it is no markup.
    fn name(&self) -> String {
        printable(&file_name(self.path()))
    }

    /// Canonical names of every tensor that the architecture uses, sorted.
    fn names(&self) -> Vec<String>;

    /// Shape and storage of a tensor, if there is one of that name.
    fn info(&self, name: &str) -> Option<TensorInfo>;

    /// Rows `rows` of a matrix (or elements of a vector, seen as rows of length 1) as f32, row-major.
    ///
    /// # Errors
    /// If the tensor is missing, the range is outside it, or the file cannot be read.
    fn load_rows(&self, name: &str, rows: std::ops::Range<usize>) -> Result<Vec<f32>>;

    /// A whole tensor as f32, row-major.
    ///
    /// # Errors
    /// As [`Checkpoint::load_rows`].
    fn load(&self, name: &str) -> Result<Vec<f32>> {
        let info = self
            .info(name)
            .ok_or_else(|| crate::Error::MissingTensor { path: self.path().to_owned(), name: name.to_owned() })?;
        self.load_rows(name, 0..info.shape.first().copied().unwrap_or(0))
    }

    /// A digest of everything that decides the outputs (hex, 32 digits): file names, sizes and contents.
    /// Reads the files once; callers keep the result.
    ///
    /// # Errors
    /// If a file cannot be read.
    fn digest(&self) -> Result<String>;

    /// `tokenizer.json` text (taken from the folder, or built from GGUF metadata) and the chat template, if any.
    ///
    /// # Errors
    /// If there is no tokenizer or it is of a kind that is not supported.
    fn tokenizer_json(&self) -> Result<String>;

    /// The Jinja chat template, if the model has one.
    fn chat_template(&self) -> Option<String>;
}

/// Longest name of a model.
pub const MAX_NAME_CHARS: usize = 128;

/// A name without control characters, and of a length that fits a heading.
pub(crate) fn printable(name: &str) -> String {
    let plain = name.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>();
    plain.trim().chars().take(MAX_NAME_CHARS).collect()
}

/// The last part of a path; of `.` or `..`, that of where it leads.
pub(crate) fn file_name(path: &Path) -> String {
    let real = if path.file_name().is_none() { path.canonicalize().ok() } else { None };
    let name = real.as_deref().unwrap_or(path).file_name();
    name.map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Opens a `.gguf` file or a Hugging Face folder (`config.json`, safetensors shards, `tokenizer.json`).
///
/// # Errors
/// If it is neither, is damaged, or needs an architecture or type that is not supported. Everything that can be
/// checked without reading the tensors' bytes is checked here.
pub fn open_checkpoint(path: &Path) -> Result<Box<dyn Checkpoint>> {
    let metadata = std::fs::metadata(path).map_err(|source| crate::Error::Io { path: path.to_owned(), source })?;
    if metadata.is_dir() {
        return Ok(Box::new(crate::huggingface::FolderCheckpoint::open(path)?));
    }
    let unsupported = |what: &str, help: &str| {
        Err(crate::Error::Unsupported { path: path.to_owned(), what: what.into(), help: help.into() })
    };
    match path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase).as_deref() {
        Some("safetensors" | "json") => {
            unsupported("a single file of a model folder", "give the folder that holds config.json and the weights")
        }
        Some("bin" | "pt" | "pth" | "pkl" | "ckpt") => {
            unsupported("a pickled checkpoint", crate::huggingface::PICKLE_HELP)
        }
        _ => Ok(Box::new(crate::gguf::GgufCheckpoint::open(path)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_and_printable() {
        assert_eq!(printable("  Tiny\u{1b}[31m\n7B\u{0} "), "Tiny [31m 7B");
        let long = printable(&"\u{e9}".repeat(100_000));
        assert_eq!((long.chars().count(), printable("")), (MAX_NAME_CHARS, String::new()));
        assert_eq!(file_name(Path::new("a/b.gguf")), "b.gguf");
        assert!(!file_name(Path::new(".")).is_empty());
    }
}
