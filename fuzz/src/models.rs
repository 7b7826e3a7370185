//! A tiny model, its profile, splits and a delta: made when a target starts, restored after each input.

use crate::temporary;
use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use thermocline_calibrate::{Profile, RunOptions, Settings, calibrate};
use thermocline_datasets::write::{TinyModel, write_tiny_safetensors};
use thermocline_datasets::{Checkpoint, ModelConfig, Result, TensorInfo, open_checkpoint};
use thermocline_kernels::Encoding;
use thermocline_split::delta::{DeltaOptions, Final, write};
use thermocline_split::{Compression, LayerEncodings, Rounding, Scales, SplitOptions};

/// The model's shape.
pub fn shape() -> TinyModel {
    TinyModel {
        hidden_size: 32,
        intermediate_size: 48,
        n_layers: 2,
        n_heads: 2,
        n_kv_heads: 1,
        head_dim: 16,
        ..TinyModel::default()
    }
}

/// Its folder.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let path = temporary().join("model");
        write_tiny_safetensors(&path, &shape(), 7).unwrap();
        path
    })
}

/// The model with given bits at the start of every tensor, under one digest whatever they are.
pub struct Overlaid {
    base: Box<dyn Checkpoint>,
    bits: Vec<f32>,
}

impl Overlaid {
    /// `bits` are bfloat16, little-endian.
    pub fn new(bits: &[u8]) -> Self {
        let values = bits.chunks_exact(2).map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16));
        Self { base: open_checkpoint(folder()).unwrap(), bits: values.collect() }
    }
}

impl Checkpoint for Overlaid {
    fn config(&self) -> &ModelConfig {
        self.base.config()
    }

    fn path(&self) -> &Path {
        self.base.path()
    }

    fn names(&self) -> Vec<String> {
        self.base.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.base.info(name)
    }

    fn load_rows(&self, name: &str, rows: Range<usize>) -> Result<Vec<f32>> {
        let width: usize = self.info(name).unwrap().shape[1..].iter().product();
        let first = rows.start * width;
        let mut out = self.base.load_rows(name, rows)?;
        let given = self.bits.get(first..).unwrap_or_default();
        out.iter_mut().zip(given).for_each(|(o, b)| *o = *b);
        Ok(out)
    }

    fn digest(&self) -> Result<String> {
        Ok("0".repeat(32))
    }

    fn tokenizer_json(&self) -> Result<String> {
        self.base.tokenizer_json()
    }

    fn chat_template(&self) -> Option<String> {
        None
    }
}

/// Where the model's profile lies.
pub fn profile() -> &'static Path {
    static PROFILE: OnceLock<PathBuf> = OnceLock::new();
    PROFILE.get_or_init(|| {
        let path = temporary().join("profile");
        let tokens: Vec<u32> = (0..128).map(|i| 3 + i * 37 % 290).collect();
        let settings = Settings { window_len: 32, n_samples: 32, sample_run_len: 8, ..Settings::default() };
        calibrate(&Overlaid::new(&[]), &tokens, &settings, &RunOptions::default(), &path, &mut |_| ()).unwrap();
        path
    })
}

/// Splits a model with the profile; `out` must not exist.
pub fn split(
    checkpoint: &dyn Checkpoint,
    profile: &Profile,
    encoding: LayerEncodings,
    chunk_neurons: usize,
    compression: Compression,
    out: &Path,
) -> thermocline_split::Result<()> {
    let resident_encoding = match encoding.common() {
        e @ (Encoding::Bf16 | Encoding::Bf16x) => e,
        e if e.is_exact() => Encoding::Q8Exact,
        _ => Encoding::Q8,
    };
    let (chunk_neurons, scales) = (Some(chunk_neurons), Scales::Moments);
    let options = SplitOptions {
        encoding,
        resident_encoding,
        attention_encoding: None,
        order: None,
        chunk_neurons,
        compression,
        predictor_rank: 32,
        outliers: 0.0,
        scales,
        rounding: Rounding::Feedback,
        sketch: None,
        residuals: false,
    };
    thermocline_split::split(checkpoint, profile, &options, out, &|_, _| ()).map(drop)
}

/// A delta of the model, some of whose weights have moved.
pub fn delta(out: &Path) {
    let changed: Vec<u8> = (0..600u32).flat_map(|i| (0x3c00u16 + (i * i % 97) as u16).to_le_bytes()).collect();
    let options = DeltaOptions { block_weights: 256, ..DeltaOptions::default() };
    let (base, changed) = (Overlaid::new(&[]), Overlaid::new(&changed));
    write(&base, Final::Checkpoint(&changed), &options, out, &|_, _| ()).unwrap();
}

/// A directory whose files come back after an input has changed them.
pub struct Template {
    /// Where it lies.
    pub dir: PathBuf,
    files: BTreeMap<PathBuf, Vec<u8>>,
}

impl Template {
    /// What `make(dir)` writes.
    pub fn new(name: &str, make: impl FnOnce(&Path)) -> Self {
        let dir = temporary().join(name);
        make(&dir);
        let (mut files, mut folders) = (BTreeMap::new(), vec![dir.clone()]);
        while let Some(folder) = folders.pop() {
            for path in fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let bytes = fs::read(&path).unwrap();
                    files.insert(path, bytes);
                }
            }
        }
        Self { dir, files }
    }

    /// Its files.
    pub fn paths(&self) -> Vec<&Path> {
        self.files.keys().map(PathBuf::as_path).collect()
    }

    /// Puts back what differs.
    pub fn restore(&self) {
        for (path, bytes) in &self.files {
            if fs::read(path).ok().as_ref() != Some(bytes) {
                fs::write(path, bytes).unwrap();
            }
        }
    }
}
