//! Which order the neurons get, and how many share a chunk: both measured on the profile's own sampled tokens.

use serde::Serialize;
use thermocline_calibrate::coactivation::{BitMatrix, order_by_rate, order_clustered, order_random, over_fetch};

/// Chunk lengths, in neurons, of the over-fetch table.
pub const TABLE_CHUNKS: [usize; 5] = [8, 16, 32, 64, 128];

/// Seed of the random order, which is only there to compare with.
const RANDOM_SEED: u64 = 1;

/// What a read costs besides its bytes, with several in flight (measured: 25 us each with two readers).
const READ_SECONDS: f64 = 12e-6;
/// A middling NVMe disk.
const DISK_BYTES_PER_SECOND: f64 = 2e9;

/// An order of a layer's neurons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OrderKind {
    /// By activation rate, highest first: every prefix is the best set of its size.
    Frequency,
    /// Groups of neurons that fire together, hottest group first.
    Coactivation,
    /// Shuffled.
    Random,
}

impl OrderKind {
    /// All kinds.
    pub const ALL: [OrderKind; 3] = [OrderKind::Frequency, OrderKind::Coactivation, OrderKind::Random];

    /// The name used in the manifest and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            OrderKind::Frequency => "frequency",
            OrderKind::Coactivation => "coactivation",
            OrderKind::Random => "random",
        }
    }

    /// The order, from activation rates and sampled active sets.
    pub fn order(self, rates: &[f64], active: &BitMatrix, chunk_neurons: usize) -> Vec<u32> {
        match self {
            OrderKind::Frequency => order_by_rate(rates),
            OrderKind::Coactivation => {
                let all: Vec<u32> = (0..rates.len() as u32).collect();
                order_clustered(active, &all, chunk_neurons)
            }
            OrderKind::Random => order_random(rates.len(), RANDOM_SEED),
        }
    }
}

/// Puts the `n` neurons of most energy, `energy [n_neurons]`, before all others, which stay in order. Some neurons of SwiGLU models fire
/// seldom and then outweigh all others together: massive activations (Sun et al., arXiv 2402.17762), whose down rows must be right
/// ("super weights": Yu et al., arXiv 2411.07191).
pub fn outliers_first(order: Vec<u32>, energy: &[f64], n: usize) -> Vec<u32> {
    let mut by_energy = order.clone();
    by_energy.sort_by(|&a, &b| energy[b as usize].total_cmp(&energy[a as usize]));
    by_energy.truncate(n);
    let mut is_outlier = vec![false; order.len()];
    by_energy.iter().for_each(|&id| is_outlier[id as usize] = true);
    by_energy.into_iter().chain(order.into_iter().filter(|&id| !is_outlier[id as usize])).collect()
}

/// Neurons read per neuron needed, for one order, at each of [`TABLE_CHUNKS`], mean over layers. Orders are fitted on
/// the first half of the sampled tokens and measured on the second.
#[derive(Debug, Clone, Serialize)]
pub struct OverFetch {
    /// Which order.
    pub order: OrderKind,
    /// One number a chunk length.
    pub read_per_used: [f64; TABLE_CHUNKS.len()],
}

/// Measures every order on the active sets of some layers.
pub fn over_fetch_table(layers: &[BitMatrix]) -> Vec<OverFetch> {
    OrderKind::ALL
        .into_iter()
        .map(|order| {
            let mut read_per_used = [0.0; TABLE_CHUNKS.len()];
            for active in layers {
                let (fit, test) = halves(active);
                for (mean, chunk) in read_per_used.iter_mut().zip(TABLE_CHUNKS) {
                    *mean += over_fetch(&test, &order.order(&fit.rates(), &fit, chunk), chunk) / layers.len() as f64;
                }
            }
            OverFetch { order, read_per_used }
        })
        .collect()
}

/// The order that reads least at the chunk length nearest to `chunk_neurons`; clusters must win by more than 2 %,
/// because only the frequency order makes every budget the best prefix.
pub fn best_order(table: &[OverFetch], chunk_neurons: usize) -> OrderKind {
    let column = TABLE_CHUNKS.iter().position(|&c| c >= chunk_neurons).unwrap_or(TABLE_CHUNKS.len() - 1);
    let read = |kind| table.iter().find(|t| t.order == kind).map_or(f64::INFINITY, |t| t.read_per_used[column]);
    if read(OrderKind::Coactivation) < 0.98 * read(OrderKind::Frequency) {
        OrderKind::Coactivation
    } else {
        OrderKind::Frequency
    }
}

/// The chunk length, a power of two up to 128, with the lowest expected read time per token: reads (neighbouring
/// chunks are one) times their latency, plus bytes over bandwidth. At 70B one bundle is 13.5 KiB and wins alone; small
/// models need several to fill a disk block.
pub fn best_chunk(layers: &[BitMatrix], bundle_bytes: usize) -> usize {
    let cost = |chunk: usize| -> f64 {
        layers
            .iter()
            .map(|active| {
                let (fit, test) = halves(active);
                let order = order_by_rate(&fit.rates());
                let mut place = vec![0usize; order.len()];
                order.iter().enumerate().for_each(|(p, &id)| place[id as usize] = p);
                let mut touched = vec![false; order.len().div_ceil(chunk)];
                let mut seconds = 0.0;
                for row in 0..test.n_rows() {
                    touched.fill(false);
                    test.ones(row).for_each(|id| touched[place[id] / chunk] = true);
                    let reads = touched.chunk_by(|a, b| a == b).filter(|run| run[0]).count();
                    let chunks = touched.iter().filter(|t| **t).count();
                    seconds +=
                        reads as f64 * READ_SECONDS + (chunks * chunk * bundle_bytes) as f64 / DISK_BYTES_PER_SECOND;
                }
                seconds
            })
            .sum()
    };
    let candidates = (0..8).map(|p| 1usize << p).filter(|&c| c == 128 || c * bundle_bytes >= 4096);
    candidates.min_by(|&a, &b| cost(a).total_cmp(&cost(b))).unwrap_or(128)
}

fn halves(active: &BitMatrix) -> (BitMatrix, BitMatrix) {
    let middle = active.n_rows() / 2;
    (active.rows(0..middle), active.rows(middle..active.n_rows()))
}
