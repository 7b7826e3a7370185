//! Neurons read per active neuron, for orders and chunk sizes, on held-out samples of a profile:
//! `cargo run --release --example chunk_order -- PROFILE`.

use std::path::Path;
use thermocline_calibrate::{
    Profile,
    coactivation::{order_by_rate, order_clustered, order_random, over_fetch},
};

const CHUNKS: [usize; 5] = [8, 16, 32, 64, 128];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = std::env::args().nth(1).ok_or("usage: chunk_order PROFILE")?;
    let profile = Profile::open(Path::new(&directory))?;
    let n_layers = profile.config().n_layers;
    for (name, top10) in [("active set (top 30 % unless sparse)", false), ("top 10 %", true)] {
        // [order][chunk]
        let mut table = [[0.0f64; CHUNKS.len()]; 4];
        for index in 0..n_layers {
            let layer = profile.layer(index)?;
            let active = if top10 { &layer.active_top10 } else { &layer.active };
            let (fit, test) = (active.rows(0..active.n_rows() / 2), active.rows(active.n_rows() / 2..active.n_rows()));
            let by_rate = order_by_rate(&fit.rates());
            let (hot, cold) = by_rate.split_at(by_rate.len() * 3 / 10);
            for (column, chunk_len) in CHUNKS.into_iter().enumerate() {
                let orders = [
                    order_random(by_rate.len(), 1),
                    by_rate.clone(),
                    order_clustered(&fit, &by_rate, chunk_len),
                    [hot, &order_clustered(&fit, cold, chunk_len)].concat(),
                ];
                for (row, order) in table.iter_mut().zip(&orders) {
                    row[column] += over_fetch(&test, order, chunk_len) / n_layers as f64;
                }
            }
        }
        println!("{name}: neurons read / active, chunks of {CHUNKS:?}");
        for (order, row) in ["random", "by rate", "clustered", "hot 30 %, rest clustered"].iter().zip(&table) {
            println!("  {order:26} {}", row.map(|ratio| format!("{ratio:6.2}")).join(" "));
        }
    }
    Ok(())
}
