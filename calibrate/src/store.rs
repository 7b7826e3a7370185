//! `statistics.safetensors`: all layers' sections behind one header.
//!
//! Tensors are named `layers.N.<section>`; `sample_tokens [n_samples]` (u64) holds the sampled tokens' places in the
//! corpus. Wide elements come first, so that every tensor is aligned. The bytes depend on the statistics only: a
//! merged profile's file is identical to one run's.

use crate::{
    Error, Result, Settings,
    error::AtPath,
    statistics::{Dtype, Input, LayerSums, Section, sections},
};
use serde_json::{Map, Value, json};
use std::{
    fs::File,
    io::{BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};
use thermocline_datasets::{ModelConfig, files};

/// No tensor's entry in a header is shorter: name, type, shape and place.
const ENTRY_BYTES_MIN: u64 = 64;

/// Where a tensor lies in the data part.
struct Placed {
    name: String,
    section: Section,
    /// Layer and byte offset in the layer's file; `None` for `sample_tokens`.
    source: Option<(usize, usize)>,
    start: u64,
}

/// All tensors in file order.
fn layout(config: &ModelConfig, settings: &Settings, n_samples: usize) -> Vec<Placed> {
    let samples = Section { name: "sample_tokens", dtype: Dtype::U64, shape: vec![n_samples] };
    let mut out = vec![Placed { name: samples.name.to_owned(), section: samples, source: None, start: 0 }];
    for width in [8, 4, 1] {
        for layer in 0..config.n_layers {
            let mut offset = 0;
            for section in sections(config, settings, n_samples) {
                let (n_bytes, name) = (section.n_bytes(), format!("layers.{layer}.{}", section.name));
                if section.dtype.n_bytes() == width {
                    out.push(Placed { name, section, source: Some((layer, offset)), start: 0 });
                }
                offset += n_bytes;
            }
        }
    }
    let mut start = 0;
    for placed in &mut out {
        placed.start = start;
        start = start.saturating_add(placed.section.n_bytes() as u64);
    }
    out
}

/// Length prefix and JSON, padded with spaces to a multiple of 8.
fn header(layout: &[Placed]) -> Vec<u8> {
    let entries = layout.iter().map(|placed| {
        let dtype = match placed.section.dtype {
            Dtype::U8 => "U8",
            Dtype::U32 => "U32",
            Dtype::F32 => "F32",
            Dtype::U64 => "U64",
            Dtype::I64 => "I64",
        };
        let end = placed.start.saturating_add(placed.section.n_bytes() as u64);
        let entry = json!({"dtype": dtype, "shape": placed.section.shape, "data_offsets": [placed.start, end]});
        (placed.name.clone(), entry)
    });
    let mut text = Value::Object(entries.collect::<Map<_, _>>()).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.append(&mut text);
    out
}

/// Writes the file; `layer_path` names each layer's encoded sums.
pub(crate) fn write(
    path: &Path,
    config: &ModelConfig,
    settings: &Settings,
    sample_tokens: &[u64],
    layer_path: impl Fn(usize) -> PathBuf,
) -> Result<()> {
    let layout = layout(config, settings, sample_tokens.len());
    let mut out = BufWriter::new(File::create(path).at(path)?);
    out.write_all(&header(&layout)).at(path)?;
    for placed in &layout {
        match placed.source {
            None => out.write_all(bytemuck::cast_slice(sample_tokens)).at(path)?,
            Some((layer, offset)) => {
                let from = layer_path(layer);
                let mut file = File::open(&from).at(&from)?;
                file.seek(SeekFrom::Start(offset as u64)).at(&from)?;
                let n_bytes = placed.section.n_bytes() as u64;
                let copied = std::io::copy(&mut file.take(n_bytes), &mut out).at(path)?;
                if copied != n_bytes {
                    let reason = format!("{copied} bytes, expected {n_bytes}");
                    return Err(Error::Corrupt { path: from, field: placed.name.clone(), reason });
                }
            }
        }
    }
    out.flush().at(path)
}

/// Whether second moments, the largest part of a layer's sums, are read with the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moments {
    Read,
    Skip,
}

/// An open statistics file whose header is exactly what the configuration and the settings demand.
pub(crate) struct StatisticsFile {
    path: PathBuf,
    layout: Vec<Placed>,
    data_start: u64,
    config: ModelConfig,
    settings: Settings,
    n_samples: usize,
}

impl StatisticsFile {
    pub(crate) fn open(path: PathBuf, config: &ModelConfig, settings: &Settings, n_samples: usize) -> Result<Self> {
        let corrupt = |field: &str, reason: String| Error::Corrupt { path: path.clone(), field: field.into(), reason };
        let mut file = files::open(&path).map_err(Error::unreadable(&path))?;
        let got = file.metadata().at(&path)?.len();
        // Nothing is laid out that the file cannot hold.
        let least = config.n_layers as u64 * sections(config, settings, n_samples).len() as u64 * ENTRY_BYTES_MIN;
        if got < least {
            return Err(corrupt("length", format!("{got} bytes, {} layers take at least {least}", config.n_layers)));
        }
        let layout = layout(config, settings, n_samples);
        let expected = header(&layout);
        let data_bytes = layout.last().map_or(0, |last| last.start.saturating_add(last.section.n_bytes() as u64));
        let len = data_bytes.saturating_add(expected.len() as u64);
        if got != len {
            return Err(corrupt("length", format!("{got} bytes, expected {len}")));
        }
        let mut found = vec![0u8; expected.len()];
        file.read_exact(&mut found).at(&path)?;
        if found != expected {
            return Err(corrupt("header", "tensors are not those that profile.json demands".to_owned()));
        }
        let (config, settings) = (config.clone(), settings.clone());
        Ok(StatisticsFile { path, layout, data_start: expected.len() as u64, config, settings, n_samples })
    }

    fn read(&self, file: &mut File, placed: &Placed) -> Result<Vec<u8>> {
        file.seek(SeekFrom::Start(self.data_start + placed.start)).at(&self.path)?;
        let mut bytes = vec![0u8; placed.section.n_bytes()];
        file.read_exact(&mut bytes).at(&self.path)?;
        Ok(bytes)
    }

    pub(crate) fn sample_tokens(&self) -> Result<Vec<u64>> {
        let mut file = File::open(&self.path).at(&self.path)?;
        let Some(first) = self.layout.first() else { return Ok(Vec::new()) };
        let bytes = self.read(&mut file, first)?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|chunk| u64::from_le_bytes(*chunk)).collect())
    }

    /// Sums of the products of an input's channels; empty if they were not kept.
    pub(crate) fn moment(&self, layer: usize, input: Input) -> Result<Vec<i64>> {
        let name = format!("layers.{layer}.{}", input.moment());
        let placed = self.layout.iter().find(|placed| placed.name == name).ok_or_else(|| self.no_layer(layer))?;
        let bytes = self.read(&mut File::open(&self.path).at(&self.path)?, placed)?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|chunk| i64::from_le_bytes(*chunk)).collect())
    }

    /// One layer's sums.
    pub(crate) fn layer(&self, layer: usize, moments: Moments) -> Result<LayerSums> {
        let is_read =
            |name: &str| moments == Moments::Read || Input::ALL.iter().all(|input| !name.ends_with(input.moment()));
        let mut file = File::open(&self.path).at(&self.path)?;
        let mut bytes = Vec::new();
        // File order within a layer is the sections' order, because both put wide elements first.
        let of_layer = |placed: &&Placed| placed.source.is_some_and(|(l, _)| l == layer) && is_read(&placed.name);
        for placed in self.layout.iter().filter(of_layer) {
            bytes.append(&mut self.read(&mut file, placed)?);
        }
        let mut sections = sections(&self.config, &self.settings, self.n_samples);
        sections.retain(|section| is_read(section.name));
        LayerSums::decode(&bytes, &sections).ok_or_else(|| self.no_layer(layer))
    }

    fn no_layer(&self, layer: usize) -> Error {
        Error::Corrupt {
            path: self.path.clone(),
            field: format!("layers.{layer}"),
            reason: format!("no such layer; the model has {}", self.config.n_layers),
        }
    }
}
