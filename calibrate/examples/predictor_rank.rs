//! Energy recall of low-rank predictors against their rank, on tokens after those that the profile was made of:
//! `cargo run --release --example predictor_rank -- MODEL PROFILE TEXT N_WINDOWS`.

#[path = "support/text.rs"]
mod text;

use std::path::Path;
use thermocline_calibrate::{
    Input, Profile,
    dense::{DenseLayer, Embedding},
    predictor::{energy_recall, fit_low_rank},
};
use thermocline_datasets::open_checkpoint;

const RANKS: [usize; 6] = [16, 32, 64, 128, 192, 256];
const SHARES: [f64; 2] = [0.3, 0.5];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, profile, text, n_windows] = arguments.as_slice() else {
        return Err("usage: predictor_rank MODEL PROFILE TEXT N_WINDOWS".into());
    };
    let (checkpoint, profile) = (open_checkpoint(Path::new(model))?, Profile::open(Path::new(profile))?);
    let (config, window_len) = (checkpoint.config().clone(), profile.meta().settings.window_len);
    let n_windows: usize = n_windows.parse()?;
    let all = text::tokens(checkpoint.as_ref(), Path::new(text))?;
    let start = profile.meta().n_windows_total * window_len;
    let held_out = all.get(start..start + n_windows * window_len).ok_or("the text is too short")?;
    let mut x = Embedding::load(checkpoint.as_ref())?.rows(held_out)?;
    let mut table = [[0.0f64; RANKS.len() + 1]; SHARES.len()];
    for index in 0..config.n_layers {
        let layer = DenseLayer::load(checkpoint.as_ref(), index)?;
        x = layer.attention(&x, n_windows, window_len)?;
        let input = layer.ffn_input(&x)?;
        let h = layer.neurons(&input)?.h;
        let statistics = profile.layer(index)?;
        let norms = &statistics.down_norm;
        let actual: Vec<f32> = h.iter().zip(norms.iter().cycle()).map(|(h, norm)| h.abs() * norm).collect();
        let moment = profile.second_moment(index, Input::Ffn)?.ok_or("the profile has no second moments")?;
        let rank_max = RANKS[RANKS.len() - 1];
        let fit =
            layer.with_gate_up(|gate, up| fit_low_rank(&moment, gate, up, norms, config.activation, rank_max))??;
        let mut line = format!("layer {index:2}, top 30 %:");
        for (rank, column) in RANKS.into_iter().zip(0..) {
            let predicted = fit.truncated(rank).scores(&input, config.activation, norms)?;
            for (share, row) in SHARES.into_iter().zip(&mut table) {
                let recall = energy_recall(&predicted, &actual, config.intermediate_size, share);
                row[column] += recall / config.n_layers as f64;
                if share == SHARES[0] {
                    line += &format!(" {rank}: {recall:.3}");
                }
            }
        }
        for (share, row) in SHARES.into_iter().zip(&mut table) {
            let oracle = energy_recall(&actual, &actual, config.intermediate_size, share);
            row[RANKS.len()] += oracle / config.n_layers as f64;
        }
        println!("{line}");
        layer.ffn_output(&mut x, h)?;
    }
    println!("ranks {RANKS:?}, then the oracle; mean over {} layers, {} tokens", config.n_layers, held_out.len());
    for (share, row) in SHARES.into_iter().zip(&table) {
        println!("top {share}: {}", row.map(|recall| format!("{recall:.4}")).join("  "));
    }
    Ok(())
}
