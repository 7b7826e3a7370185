//! The Parquet tables, read back.
#![cfg(feature = "analysis")]
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use polars::prelude::{ParquetReader, SerReader};
use std::fs::File;
use support::{RandomCheckpoint, random_tokens, tiny_config};
use thermocline_calibrate::{ActiveSet, RunOptions, Settings, calibrate};
use thermocline_datasets::Activation;

#[test]
fn tables_hold_what_the_statistics_hold() {
    let dir = tempfile::TempDir::new().unwrap();
    let model = RandomCheckpoint::new(tiny_config(Activation::Relu), 7);
    let settings = Settings { window_len: 40, n_samples: 40, sample_run_len: 10, ..Settings::default() };
    let (tokens, out) = (random_tokens(120, 50, 3), dir.path().join("p"));
    let profile = calibrate(&model, &tokens, &settings, &RunOptions::default(), &out, &mut |_| ()).unwrap();
    let read = |name: &str| ParquetReader::new(File::open(out.join(name)).unwrap()).finish().unwrap();
    let neurons = read("neurons.parquet");
    assert_eq!(neurons.height(), 3 * 150);
    let rates: Vec<f64> =
        neurons.column("rate_top_10").unwrap().f64().unwrap().iter().skip(150).take(150).map(Option::unwrap).collect();
    assert_eq!(rates, profile.layer(1).unwrap().activation_rate(ActiveSet::Top(0)));
    let layers = read("layers.parquet");
    assert_eq!(layers.height(), 3);
    let overlap = layers.column("overlap_nonzero_last_4").unwrap().f64().unwrap().get(2).unwrap();
    assert_eq!(Some(overlap), profile.layer(2).unwrap().overlap(ActiveSet::Nonzero)[1]);
}
