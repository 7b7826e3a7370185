//! Tables for people and notebooks: `neurons.parquet` and `layers.parquet`. Plain column types, so that pandas,
//! DuckDB and polars read them alike. The program itself reads `statistics.safetensors`.

use crate::{ActiveSet, Error, LayerStatistics, Profile, Result};
use polars::prelude::{Column, DataFrame, ParquetCompression, ParquetWriter};
use std::{fs::File, path::Path};

/// Writes both tables into the profile's directory.
pub(crate) fn write(profile: &Profile) -> Result<()> {
    let (mut neurons, mut layers) = (Neurons::default(), Layers::default());
    for layer in 0..profile.config().n_layers {
        let statistics = profile.layer(layer)?;
        neurons.push(layer, &statistics);
        layers.push(layer, &statistics);
    }
    save(&profile.dir().join("neurons.parquet"), neurons.into_columns())?;
    save(&profile.dir().join("layers.parquet"), layers.into_columns())
}

fn save(path: &Path, columns: Vec<Column>) -> Result<()> {
    let failed = |reason: String| Error::Table { path: path.to_owned(), reason };
    let height = columns.first().map_or(0, Column::len);
    let mut table = DataFrame::new(height, columns).map_err(|error| failed(error.to_string()))?;
    let file = File::create(path).map_err(|error| failed(error.to_string()))?;
    // Uncompressed: the parquet feature alone brings no codec, and a 70B model's table is 200 MB.
    let writer = ParquetWriter::new(file).with_compression(ParquetCompression::Uncompressed);
    writer.finish(&mut table).map(|_| ()).map_err(|error| failed(error.to_string()))
}

/// One row per neuron.
#[derive(Default)]
struct Neurons {
    layer: Vec<u32>,
    neuron: Vec<u32>,
    down_norm: Vec<f32>,
    rates: [Vec<f64>; 5],
    mean_abs: Vec<f64>,
    mean_square: Vec<f64>,
    energy: Vec<f64>,
    quantiles: [Vec<f32>; 3],
}

const RATES: [(&str, ActiveSet); 5] = [
    ("rate_nonzero", ActiveSet::Nonzero),
    ("rate_top_10", ActiveSet::Top(0)),
    ("rate_top_20", ActiveSet::Top(1)),
    ("rate_top_30", ActiveSet::Top(2)),
    ("rate_top_50", ActiveSet::Top(3)),
];

const QUANTILES: [(&str, f64); 3] = [("abs_h_p50", 0.5), ("abs_h_p90", 0.9), ("abs_h_p99", 0.99)];

impl Neurons {
    fn push(&mut self, layer: usize, statistics: &LayerStatistics) {
        let n = statistics.down_norm.len();
        self.layer.extend(std::iter::repeat_n(layer as u32, n));
        self.neuron.extend(0..n as u32);
        self.down_norm.extend(&statistics.down_norm);
        for (column, (_, set)) in self.rates.iter_mut().zip(RATES) {
            column.extend(statistics.activation_rate(set));
        }
        self.mean_abs.extend(&statistics.mean_abs);
        self.mean_square.extend(&statistics.mean_square);
        self.energy.extend(&statistics.energy);
        for (column, (_, q)) in self.quantiles.iter_mut().zip(QUANTILES) {
            column.extend((0..n).map(|neuron| statistics.quantile_abs(neuron, q)));
        }
    }

    fn into_columns(self) -> Vec<Column> {
        let mut columns = vec![
            Column::new("layer".into(), self.layer),
            Column::new("neuron".into(), self.neuron),
            Column::new("down_norm".into(), self.down_norm),
            Column::new("mean_abs_h".into(), self.mean_abs),
            Column::new("mean_square_h".into(), self.mean_square),
            Column::new("energy".into(), self.energy),
        ];
        let rates = RATES.into_iter().zip(self.rates);
        columns.extend(rates.map(|((name, _), values)| Column::new(name.into(), values)));
        let quantiles = QUANTILES.into_iter().zip(self.quantiles);
        columns.extend(quantiles.map(|((name, _), values)| Column::new(name.into(), values)));
        columns
    }
}

/// One row per layer.
#[derive(Default)]
struct Layers {
    layer: Vec<u32>,
    n_tokens: Vec<u64>,
    active_share: Vec<f64>,
    energy: Vec<f64>,
    hottest_30_cover: Vec<f64>,
    overlaps: [Vec<Option<f64>>; 9],
}

const OVERLAPS: [(&str, ActiveSet); 3] =
    [("nonzero", ActiveSet::Nonzero), ("top_10", ActiveSet::Top(0)), ("top_30", ActiveSet::Top(2))];

impl Layers {
    fn push(&mut self, layer: usize, statistics: &LayerStatistics) {
        let rates = statistics.activation_rate(ActiveSet::Nonzero);
        self.layer.push(layer as u32);
        self.n_tokens.push(statistics.n_tokens);
        self.active_share.push(rates.iter().sum::<f64>() / rates.len().max(1) as f64);
        self.energy.push(statistics.energy.iter().sum());
        let mut hits = statistics.activation_rate(ActiveSet::Top(0));
        hits.sort_by(|a, b| b.total_cmp(a));
        let hottest = hits.iter().take(crate::settings::top_count(0.3, hits.len())).sum::<f64>();
        self.hottest_30_cover.push(hottest / hits.iter().sum::<f64>());
        let values = OVERLAPS.into_iter().flat_map(|(_, set)| statistics.overlap(set));
        self.overlaps.iter_mut().zip(values).for_each(|(column, value)| column.push(value));
    }

    fn into_columns(self) -> Vec<Column> {
        let mut columns = vec![
            Column::new("layer".into(), self.layer),
            Column::new("n_tokens".into(), self.n_tokens),
            Column::new("nonzero_share".into(), self.active_share),
            Column::new("energy".into(), self.energy),
            Column::new("hottest_30_cover_of_top_10".into(), self.hottest_30_cover),
        ];
        let lags = OVERLAPS
            .into_iter()
            .flat_map(|(name, _)| crate::OVERLAP_LAGS.into_iter().map(move |lag| format!("overlap_{name}_last_{lag}")));
        columns.extend(lags.zip(self.overlaps).map(|(name, values)| Column::new(name.into(), values)));
        columns
    }
}
