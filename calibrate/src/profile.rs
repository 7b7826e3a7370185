//! A finished profile directory: `profile.json`, `statistics.safetensors` and, with the `analysis` feature, tables.

use crate::{
    Error, Result, Settings, Shard,
    coactivation::BitMatrix,
    error::AtPath,
    hidden::file_digest,
    record::Identity,
    run::fresh_dir,
    settings::{OVERLAP_LAGS, TOP_SHARES},
    statistics::{HISTOGRAM_BINS, Input, LayerSums, SamplePlan, bin_middle, from_fixed, from_fixed_moment},
    store::{self, Moments, StatisticsFile},
    work_dir::{WorkDir, write_atomically},
};
use ndarray::Array2;
use serde::{Deserialize, Serialize};
use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
};
use thermocline_datasets::{MAX_NAME_CHARS, ModelConfig, files};

const META: &str = "profile.json";
const STATISTICS: &str = "statistics.safetensors";
/// Longest `profile.json` that is read: it has no lists.
const META_BYTES_MAX: u64 = 1 << 20;
const MISSING: &str = "missing, so this is no profile; `thermocline calibrate` makes one";

/// `profile.json`: what the statistics are of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProfileMeta {
    /// Version of the directory's format.
    pub format_version: u64,
    /// What the checkpoint is called; empty in profiles that were made before it was kept.
    #[serde(default)]
    pub model_name: String,
    /// The checkpoint's digest.
    pub model_digest: String,
    /// Digest of the whole corpus' token ids, of all shards together.
    pub corpus_digest: String,
    /// The model's shape.
    pub config: ModelConfig,
    /// What was measured.
    pub settings: Settings,
    /// The part of the corpus, if not all of it.
    pub shard: Option<Shard>,
    /// First window of the corpus that was run.
    pub first_window: usize,
    /// Windows that were run.
    pub n_windows: usize,
    /// Windows of the whole corpus.
    pub n_windows_total: usize,
    /// Tokens that were run.
    pub n_tokens: u64,
    /// Tokens whose active sets were kept.
    pub n_samples: usize,
    /// Wall time, over all attempts and shards.
    pub seconds: f64,
    /// Floating-point operations of the dense forward.
    pub flops: f64,
    /// Checksum of `statistics.safetensors`.
    pub statistics_digest: String,
}

impl ProfileMeta {
    /// The version that this program writes, and the newest that it reads; the first had no [`Settings::attention_moments`].
    pub const VERSION: u64 = 2;

    pub(crate) fn identity(&self) -> Identity {
        Identity {
            model_digest: self.model_digest.clone(),
            corpus_digest: self.corpus_digest.clone(),
            settings: self.settings.clone(),
            shard: self.shard,
        }
    }

    /// What would make sizes or rates nonsense.
    fn check(&self) -> Result<(), (&'static str, String)> {
        let window_len = self.settings.window_len;
        self.settings.check().map_err(|error| ("settings", error.to_string()))?;
        let end = self.first_window.checked_add(self.n_windows).filter(|&end| end <= self.n_windows_total);
        if end.is_none() || self.n_windows == 0 {
            return Err(("n_windows", format!("{} from {}", self.n_windows, self.first_window)));
        }
        if self.n_windows_total.checked_mul(window_len).is_none_or(|n| u32::try_from(n).is_err())
            || self.n_tokens != (self.n_windows * window_len) as u64
        {
            return Err(("n_tokens", format!("{} of {} windows", self.n_tokens, self.n_windows)));
        }
        let name = &self.model_name;
        if name.chars().count() > MAX_NAME_CHARS || name.chars().any(char::is_control) {
            return Err(("model_name", format!("more than {MAX_NAME_CHARS} characters, or control characters")));
        }
        if self.n_samples > self.settings.n_samples {
            return Err(("n_samples", format!("{}, at most {}", self.n_samples, self.settings.n_samples)));
        }
        Ok(())
    }
}

/// A profile directory, opened for reading.
pub struct Profile {
    dir: PathBuf,
    meta: ProfileMeta,
    statistics: StatisticsFile,
}

impl Profile {
    /// Opens a profile directory and checks that every tensor has the shape that its configuration demands.
    /// Checksums are not verified here: see [`Profile::verify`].
    ///
    /// # Errors
    /// If a file is missing, damaged or of a newer version.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(META);
        let corrupt = |field: &str, reason: String| Error::Corrupt { path: path.clone(), field: field.into(), reason };
        let text = files::read(&path, META_BYTES_MAX).map_err(|e| match e.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => corrupt("file", MISSING.to_owned()),
            _ => Error::unreadable(&path)(e),
        })?;
        let value: serde_json::Value = serde_json::from_slice(&text).map_err(|e| corrupt("JSON", e.to_string()))?;
        match value.get("format_version").and_then(serde_json::Value::as_u64) {
            Some(1..=ProfileMeta::VERSION) => (),
            Some(got) => return Err(Error::UnsupportedVersion { path, got, max: ProfileMeta::VERSION }),
            None => return Err(corrupt("format_version", "missing".to_owned())),
        }
        let meta: ProfileMeta = serde_json::from_value(value).map_err(|e| corrupt("fields", e.to_string()))?;
        meta.check().map_err(|(field, reason)| corrupt(field, reason))?;
        meta.config.check(&path)?;
        let statistics = StatisticsFile::open(dir.join(STATISTICS), &meta.config, &meta.settings, meta.n_samples)?;
        Ok(Profile { dir: dir.to_owned(), meta, statistics })
    }

    /// Reads the statistics and compares their checksum.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if it differs.
    pub fn verify(&self) -> Result<()> {
        let path = self.dir.join(STATISTICS);
        let (got, expected) = (file_digest(&path)?, &self.meta.statistics_digest);
        if got == *expected {
            return Ok(());
        }
        Err(Error::Corrupt { path, field: "checksum".into(), reason: format!("{got}, expected {expected}") })
    }

    /// What the statistics are of.
    pub fn meta(&self) -> &ProfileMeta {
        &self.meta
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.meta.config
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Places in the corpus of the sampled tokens, the rows of the co-activation bitmaps, `[n_samples]`; runs of
    /// `settings.sample_run_len` neighbours.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn sample_tokens(&self) -> Result<Vec<u64>> {
        self.statistics.sample_tokens()
    }

    /// Statistics of one layer.
    ///
    /// # Errors
    /// If there is no such layer, or the file cannot be read.
    pub fn layer(&self, layer: usize) -> Result<LayerStatistics> {
        Ok(LayerStatistics::new(&self.meta, self.statistics.layer(layer, Moments::Skip)?))
    }

    /// Mean of `x_i * x_j` of one of a layer's inputs, `[width, width]`; `None` if it was not kept.
    ///
    /// # Errors
    /// As [`Profile::layer`].
    pub fn second_moment(&self, layer: usize, input: Input) -> Result<Option<Array2<f64>>> {
        if !self.meta.settings.moments().any(|kept| kept == input) {
            return Ok(None);
        }
        let (sums, width) = (self.statistics.moment(layer, input)?, input.width(&self.meta.config));
        let mut out = Array2::zeros((width, width));
        let pairs = (0..width).flat_map(|i| (i..width).map(move |j| (i, j)));
        for ((i, j), sum) in pairs.zip(sums) {
            out[(i, j)] = from_fixed_moment(sum) / self.meta.n_tokens as f64;
            out[(j, i)] = out[(i, j)];
        }
        Ok(Some(out))
    }

    pub(crate) fn layer_sums(&self, layer: usize) -> Result<LayerSums> {
        self.statistics.layer(layer, Moments::Read)
    }
}

/// Which neurons count as active at a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActiveSet {
    /// Activation is not zero.
    Nonzero,
    /// Among the largest |h| * ||d||: index into [`TOP_SHARES`].
    Top(usize),
}

/// What was measured of one layer. Rates and means are over all tokens of the run.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerStatistics {
    /// Tokens.
    pub n_tokens: u64,
    /// `||d_i||`, the norms of the columns of `down_proj`, `[intermediate_size]`.
    pub down_norm: Vec<f32>,
    /// Tokens at which the neuron was not zero, `[intermediate_size]`.
    pub nonzero: Vec<u32>,
    /// Tokens at which the neuron was among the largest |h| * ||d||, for each of [`TOP_SHARES`],
    /// `[intermediate_size]` each.
    pub top: [Vec<u32>; TOP_SHARES.len()],
    /// Mean of |h|, `[intermediate_size]`.
    pub mean_abs: Vec<f64>,
    /// Mean of h^2, `[intermediate_size]`: the weights of `down_proj`'s columns when it is quantised.
    pub mean_square: Vec<f64>,
    /// Mean of (|h| * ||d||)^2, `[intermediate_size]`.
    pub energy: Vec<f64>,
    /// Counts of |h| in logarithmic bins, zeros left out, `[intermediate_size, HISTOGRAM_BINS]`.
    pub histogram: Vec<u32>,
    /// Active sets of the sampled tokens, `[n_samples, intermediate_size]`: not zero where activations can be zero,
    /// otherwise the top `settings.active_share`.
    pub active: BitMatrix,
    /// Top 10 % of the sampled tokens, `[n_samples, intermediate_size]`.
    pub active_top10: BitMatrix,
    /// Mean squares of the feed-forward input, `[hidden_size]`.
    pub ffn_input_mean_square: Vec<f64>,
    /// Mean squares of the input of the query, key and value projections, `[hidden_size]`.
    pub qkv_input_mean_square: Vec<f64>,
    /// Mean squares of the input of the output projection, `[n_heads * head_dim]`.
    pub attention_output_mean_square: Vec<f64>,
    /// Mean squares of [`Input::Mixture`], `[hidden_size]`; empty if they were not kept.
    pub mixture_mean_square: Vec<f64>,
    overlap: [[[u64; 2]; OVERLAP_LAGS.len()]; 3],
}

impl LayerStatistics {
    fn new(meta: &ProfileMeta, sums: LayerSums) -> Self {
        let (n, ffn) = (meta.n_tokens as f64, meta.config.intermediate_size);
        let means = |sums: &[i128]| sums.iter().map(|&sum| from_fixed(sum) / n).collect::<Vec<f64>>();
        let mean_square = means(&sums.square);
        let norms = sums.down_norm.iter().map(|&norm| f64::from(norm));
        let [ffn_squares, qkv_squares, output_squares, mixture_squares] = &sums.input_squares;
        let top = |share: usize| sums.top.chunks(ffn).nth(share).unwrap_or_default().to_vec();
        LayerStatistics {
            n_tokens: meta.n_tokens,
            energy: mean_square.iter().zip(norms).map(|(square, norm)| square * norm * norm).collect(),
            mean_abs: means(&sums.abs),
            mean_square,
            top: std::array::from_fn(top),
            active: BitMatrix::from_bytes(meta.n_samples, ffn, sums.active),
            active_top10: BitMatrix::from_bytes(meta.n_samples, ffn, sums.active_top10),
            ffn_input_mean_square: means(ffn_squares),
            qkv_input_mean_square: means(qkv_squares),
            attention_output_mean_square: means(output_squares),
            mixture_mean_square: means(mixture_squares),
            overlap: sums.overlap,
            nonzero: sums.nonzero,
            histogram: sums.histogram,
            down_norm: sums.down_norm,
        }
    }

    /// Share of tokens at which each neuron is in the set, `[intermediate_size]`.
    pub fn activation_rate(&self, set: ActiveSet) -> Vec<f64> {
        let counts = match set {
            ActiveSet::Nonzero => &self.nonzero,
            ActiveSet::Top(share) => &self.top[share],
        };
        counts.iter().map(|&count| f64::from(count) / self.n_tokens as f64).collect()
    }

    /// The value that |h| of `neuron` stays below at a share `q` of the tokens, to within 12.5 % (a bin of the
    /// histogram).
    pub fn quantile_abs(&self, neuron: usize, q: f64) -> f32 {
        let bins = &self.histogram[neuron * HISTOGRAM_BINS..(neuron + 1) * HISTOGRAM_BINS];
        let mut below = self.n_tokens.saturating_sub(u64::from(self.nonzero[neuron]));
        let wanted = (q.clamp(0.0, 1.0) * self.n_tokens as f64).ceil() as u64;
        if below >= wanted {
            return 0.0;
        }
        for (bin, &count) in bins.iter().enumerate() {
            below += u64::from(count);
            if below >= wanted {
                return bin_middle(bin);
            }
        }
        bin_middle(HISTOGRAM_BINS - 1)
    }

    /// Share of a token's active set that was also active at one of the last 1, 4, 16 tokens ([`OVERLAP_LAGS`]),
    /// over tokens with so many predecessors in their window. Counted for [`ActiveSet::Nonzero`] (where activations
    /// can be zero) and for the top 10 % and 30 %; `None` otherwise, and where there was no such token.
    pub fn overlap(&self, set: ActiveSet) -> [Option<f64>; OVERLAP_LAGS.len()] {
        let counts = match set {
            ActiveSet::Nonzero => self.overlap[0],
            ActiveSet::Top(0) => self.overlap[1],
            ActiveSet::Top(2) => self.overlap[2],
            ActiveSet::Top(_) => [[0, 0]; OVERLAP_LAGS.len()],
        };
        counts.map(|[hits, total]| (total > 0).then(|| hits as f64 / total as f64))
    }
}

/// Completes a profile inside the work folder and moves it to its final name.
pub(crate) fn write_profile(
    work: WorkDir,
    out_dir: &Path,
    mut meta: ProfileMeta,
    sample_tokens: &[u64],
    layer_path: impl Fn(&WorkDir, usize) -> PathBuf,
) -> Result<Profile> {
    let dir = work.join("profile");
    fresh_dir(&dir)?;
    let statistics = dir.join(STATISTICS);
    store::write(&statistics, &meta.config, &meta.settings, sample_tokens, |layer| layer_path(&work, layer))?;
    meta.statistics_digest = file_digest(&statistics)?;
    let path = dir.join(META);
    write_atomically(&path, &serde_json::to_vec_pretty(&meta).map_err(std::io::Error::from).at(&path)?)?;
    #[cfg(feature = "analysis")]
    crate::tables::write(&Profile::open(&dir)?)?;
    work.publish(&dir, out_dir)?;
    Profile::open(out_dir)
}

/// The sample plan that a profile's run followed.
pub(crate) fn sample_plan(meta: &ProfileMeta) -> SamplePlan {
    SamplePlan::new(&meta.settings, meta.n_windows_total)
}
