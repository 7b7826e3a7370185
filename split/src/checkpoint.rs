//! A split seen as the dense model that it encodes: what evaluation and `verify` compare with the source.

use crate::{Precision, Result, Split};
use rayon::prelude::*;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use thermocline_datasets::{Checkpoint, Error, ModelConfig, SourceDtype, TensorInfo};
use thermocline_kernels::{Encoding, Kernels};

/// Tensors of a split, decoded, under their canonical names and in the checkpoint's neuron order.
/// Holds the encoded bundles of one layer at a time.
pub struct SplitCheckpoint {
    split: Split,
    kernels: Kernels,
    layer: Mutex<Option<Arc<DecodedLayer>>>,
}

struct DecodedLayer {
    layer: usize,
    bundles: Vec<u8>,
    /// Place in the split of each of the checkpoint's neurons.
    place: Vec<u32>,
}

impl SplitCheckpoint {
    /// Opens a split directory with all its planes: what it holds of the checkpoint.
    ///
    /// # Errors
    /// As [`Split::open_at`].
    pub fn open(dir: &Path) -> Result<Self> {
        Ok(Self::new(Split::open_at(dir, Precision::Exact)?))
    }

    /// Takes an open split.
    pub fn new(split: Split) -> Self {
        Self { split, kernels: Kernels::detect(), layer: Mutex::new(None) }
    }

    /// The split behind it.
    pub fn split(&self) -> &Split {
        &self.split
    }

    /// `model.layers.N.mlp.P_proj.weight` as (N, 0 gate, 1 up, 2 down).
    fn bundle_row(&self, name: &str) -> Option<(usize, usize)> {
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let which = ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"];
        let layer = layer.parse().ok().filter(|&l: &usize| l < self.split.layers().len())?;
        Some((layer, which.iter().position(|w| *w == rest)?))
    }

    fn decoded(&self, layer: usize) -> Result<Arc<DecodedLayer>> {
        let mut held = self.layer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = held.as_ref().filter(|d| d.layer == layer) {
            return Ok(Arc::clone(found));
        }
        *held = None;
        let file = &self.split.layers()[layer];
        let mut bundles = vec![0; file.bundles().bytes(0..file.order().len())];
        file.read_chunks(0..file.n_chunks(), &mut bundles)?;
        let decoded = Arc::new(DecodedLayer { layer, bundles, place: file.places() });
        *held = Some(Arc::clone(&decoded));
        Ok(decoded)
    }

    fn bundle_rows(&self, layer: usize, which: usize, rows: Range<usize>) -> Result<Vec<f32>> {
        let decoded = self.decoded(layer)?;
        let layout = self.split.layers()[layer].bundles();
        let hidden = layout.hidden_size();
        let unpack = |id: usize, out: &mut [f32]| {
            let p = decoded.place[id] as usize;
            let row = layout.of(p).row(layout.bundle(&decoded.bundles, 0, p), which);
            self.kernels.unpack(layout.of(p).encoding(), row, out);
        };
        if which < 2 {
            let mut out = vec![0.0; rows.len() * hidden];
            for (id, out) in rows.zip(out.chunks_exact_mut(hidden)) {
                unpack(id, out);
            }
            return Ok(out);
        }
        let ffn = decoded.place.len();
        let (mut out, mut column) = (vec![0.0; rows.len() * ffn], vec![0.0; hidden]);
        for id in 0..ffn {
            unpack(id, &mut column);
            for (r, v) in column[rows.clone()].iter().enumerate() {
                out[r * ffn + id] = *v;
            }
        }
        Ok(out)
    }

    fn tensor_rows(&self, name: &str, rows: Range<usize>) -> Result<Vec<f32>> {
        let tensor = self.split.resident().entry(name)?;
        if tensor.format.encoding().is_none() {
            let all = self.split.vector(name)?;
            let n = rows.len();
            return Ok(all.into_iter().skip(rows.start).take(n).collect());
        }
        let matrix = self.split.matrix(name)?;
        let (layout, columns) = (matrix.layout(), tensor.columns);
        let bytes = matrix.read_rows(rows.start, rows.len())?;
        let mut out = vec![0.0; rows.len() * columns];
        let rows = out.par_chunks_exact_mut(columns).zip(bytes.par_chunks_exact(matrix.row_bytes()));
        rows.for_each(|(out, row)| self.kernels.unpack(layout.encoding(), layout.row(row, 0), out));
        Ok(out)
    }

    fn damaged(&self, error: crate::Error) -> Error {
        Error::Corrupt { path: self.split.dir().to_owned(), field: "split".to_owned(), reason: error.to_string() }
    }
}

fn dtype(encoding: Encoding) -> SourceDtype {
    match encoding {
        Encoding::Bf16 | Encoding::Bf16x | Encoding::Q4Exact | Encoding::Q8Exact => SourceDtype::Bf16,
        Encoding::Q8 => SourceDtype::Quantized("q8"),
        Encoding::Q4 => SourceDtype::Quantized("q4"),
        Encoding::Q4Plus => SourceDtype::Quantized("q4+plus"),
        Encoding::R4 => SourceDtype::Quantized("r4"),
    }
}

impl Checkpoint for SplitCheckpoint {
    fn config(&self) -> &ModelConfig {
        &self.split.manifest().config
    }

    fn path(&self) -> &Path {
        self.split.dir()
    }

    fn name(&self) -> String {
        self.split.manifest().source.model.clone()
    }

    fn names(&self) -> Vec<String> {
        let resident = self.split.resident().tensors().iter().map(|t| t.name.clone());
        let mut names: Vec<_> = resident.collect();
        for l in 0..self.split.layers().len() {
            names.extend(["gate", "up", "down"].map(|p| format!("model.layers.{l}.mlp.{p}_proj.weight")));
        }
        names.sort();
        names
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        if let Some((layer, which)) = self.bundle_row(name) {
            let file = &self.split.layers()[layer];
            let (ffn, layout) = (file.order().len(), file.bundles());
            let hidden = layout.hidden_size();
            let shape = if which < 2 { vec![ffn, hidden] } else { vec![hidden, ffn] };
            let n_bytes = (layout.bytes(0..ffn) / 3) as u64;
            // Of several encodings, one that is not exact says what the tensor is.
            let encoding = layout.encodings().find(|e| !e.is_exact()).unwrap_or(layout.of(0).encoding());
            return Some(TensorInfo { shape, dtype: dtype(encoding), n_bytes });
        }
        let t = self.split.resident().tensors().iter().find(|t| t.name == name)?;
        Some(match self.split.matrix(name) {
            Ok(m) => {
                TensorInfo { shape: vec![t.rows, t.columns], dtype: dtype(m.layout().encoding()), n_bytes: m.bytes() }
            }
            Err(_) => TensorInfo { shape: vec![t.columns], dtype: SourceDtype::F32, n_bytes: t.bytes },
        })
    }

    fn load_rows(&self, name: &str, rows: Range<usize>) -> thermocline_datasets::Result<Vec<f32>> {
        let missing = || Error::MissingTensor { path: self.split.dir().to_owned(), name: name.to_owned() };
        let n_rows = self.info(name).ok_or_else(missing)?.shape[0];
        if rows.start > rows.end || rows.end > n_rows {
            let reason = format!("rows {rows:?} of {n_rows}");
            return Err(Error::Corrupt { path: self.split.dir().to_owned(), field: name.to_owned(), reason });
        }
        if let Some((layer, which)) = self.bundle_row(name) {
            return self.bundle_rows(layer, which, rows).map_err(|e| self.damaged(e));
        }
        self.tensor_rows(name, rows).map_err(|e| self.damaged(e))
    }

    /// The manifest's checksum: it covers the checksums of everything else.
    fn digest(&self) -> thermocline_datasets::Result<String> {
        Ok(self.split.manifest().checksum.clone())
    }

    fn tokenizer_json(&self) -> thermocline_datasets::Result<String> {
        self.split.tokenizer_json().map_err(|e| self.damaged(e))
    }

    fn chat_template(&self) -> Option<String> {
        self.split.plain_file("chat_template.jinja").ok().flatten()
    }
}
