//! What the stored bytes of a planted split give: statistics of its trace, recall of its predictors.

use super::layer::rank;
use super::resident;
use super::rows::matrix;
use crate::pack_layer::{FACTORS, PackedLayer};
use std::ops::AddAssign;
use thermocline_calibrate::coactivation::BitMatrix;
use thermocline_calibrate::predictor::expected_magnitude;
use thermocline_datasets::planted::{Measured, PlantedModel, n_hot};
use thermocline_kernels::{Encoding, RowRef, unpack};

/// Tokens at which each predictor is asked.
const ASKED_TOKENS: usize = 16;
/// Distances of reuse, as `calibrate` counts it.
const LAGS: [usize; 3] = [1, 4, 16];

/// Counts over layers, to be added up in the layers' order.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counts {
    layers: u64,
    /// Neurons times tokens.
    cells: u64,
    active: u64,
    hot: u64,
    share_sd: f64,
    /// Active neurons that were active shortly before, and active neurons, by lag.
    reuse: [[u64; 2]; LAGS.len()],
    /// Pairs that fired together and the number expected by chance, inside and outside of clusters.
    together: [[f64; 2]; 2],
    /// Active neurons that were predicted, those that were foreseen one layer early, and active neurons.
    recall: [u64; 3],
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.layers += other.layers;
        self.cells += other.cells;
        self.active += other.active;
        self.hot += other.hot;
        self.share_sd += other.share_sd;
        for (a, b) in self.reuse.iter_mut().flatten().zip(other.reuse.iter().flatten()) {
            *a += b;
        }
        for (a, b) in self.together.iter_mut().flatten().zip(other.together.iter().flatten()) {
            *a += b;
        }
        for (a, b) in self.recall.iter_mut().zip(other.recall) {
            *a += b;
        }
    }
}

impl Counts {
    /// The counts of one layer.
    pub(super) fn of(model: &PlantedModel, l: usize, packed: &PackedLayer) -> Self {
        let n = model.shape().intermediate_size;
        let Ok(trace) = BitMatrix::new(model.trace_tokens().len(), n, packed.trace.clone()) else {
            unreachable!("the trace was made, or checked when it was read, with these sizes")
        };
        let mut counts = Self { layers: 1, cells: (n * trace.n_rows()) as u64, ..Self::default() };
        counts.rates(&trace);
        counts.reuse(&trace);
        counts.together(&trace, model.layer(l).clusters());
        counts.recall(model, &trace, packed);
        counts
    }

    fn rates(&mut self, trace: &BitMatrix) {
        let (n, tokens) = (trace.n_columns(), trace.n_rows() as f64);
        let hot = n_hot(n);
        let (mut sum, mut square) = (0.0, 0.0);
        for row in 0..trace.n_rows() {
            let active = trace.ones(row).count();
            self.active += active as u64;
            self.hot += trace.ones(row).take_while(|&i| i < hot).count() as u64;
            let share = active as f64 / n as f64;
            sum += share / tokens;
            square += share * share / tokens;
        }
        self.share_sd = (square - sum * sum).max(0.0).sqrt();
    }

    fn reuse(&mut self, trace: &BitMatrix) {
        for (&lag, [again, all]) in LAGS.iter().zip(&mut self.reuse) {
            for row in lag..trace.n_rows() {
                for (byte, &now) in trace.row(row).iter().enumerate() {
                    let before = (1..=lag).fold(0, |bits, d| bits | trace.row(row - d)[byte]);
                    *again += u64::from((now & before).count_ones());
                    *all += u64::from(now.count_ones());
                }
            }
        }
    }

    /// Counts neighbours in a list of neurons by cluster: each is in the cluster of the one before it, and the pairs
    /// half the list apart are in different ones.
    fn together(&mut self, trace: &BitMatrix, clusters: &[u32]) {
        let n = clusters.len();
        let mut by_cluster: Vec<usize> = (0..n).collect();
        by_cluster.sort_by_key(|&i| clusters[i]);
        let tokens = trace.n_rows();
        let words = tokens.div_ceil(64);
        let mut columns = vec![0u64; n * words];
        for row in 0..tokens {
            trace.ones(row).for_each(|i| columns[i * words + row / 64] |= 1 << (row % 64));
        }
        let column = |i: usize| &columns[i * words..(i + 1) * words];
        let ones = |i: usize| column(i).iter().map(|w| w.count_ones()).sum::<u32>();
        for (at, &a) in by_cluster.iter().enumerate() {
            for b in [by_cluster[(at + 1) % n], by_cluster[(at + n / 2) % n]] {
                let both: u32 = column(a).iter().zip(column(b)).map(|(a, b)| (a & b).count_ones()).sum();
                let [together, expected] = &mut self.together[usize::from(clusters[a] != clusters[b])];
                if a != b {
                    *together += f64::from(both);
                    *expected += f64::from(ones(a)) * f64::from(ones(b)) / tokens as f64;
                }
            }
        }
    }

    /// Asks the stored predictor for as many neurons as are active in the mean, with the embedding as the layer's
    /// input and as that of the layer before: what layers add to it is not what the predictor reads.
    fn recall(&mut self, model: &PlantedModel, trace: &BitMatrix, packed: &PackedLayer) {
        let (n, hidden, rank) = (trace.n_columns(), model.shape().hidden_size, rank(model));
        let activation = model.config().activation;
        let k = ((model.statistics().active_share * n as f64).round() as usize).clamp(1, n);
        let stored: Vec<f32> =
            packed.predictor_neurons.chunks_exact(4).map(|b| b.try_into().map_or(0.0, f32::from_le_bytes)).collect();
        let step = (trace.n_rows() / ASKED_TOKENS).max(1);
        for row in (0..trace.n_rows()).step_by(step).take(ASKED_TOKENS) {
            let token = model.trace_tokens().start + row;
            let bytes = matrix(1, hidden, |_, row| resident::embed(model, token, row));
            let mut x = vec![0.0; hidden];
            unpack(Encoding::Q4, RowRef::from_matrix_row(Encoding::Q4, hidden, &bytes), &mut x);
            let norm = (hidden as f32 / x.iter().map(|v| v * v).sum::<f32>()).sqrt();
            x.iter_mut().for_each(|v| *v *= norm);
            for (found, input) in self.recall.iter_mut().zip([&packed.predictor_input, &packed.predictor_ahead]) {
                let z = dots(Encoding::Q8, hidden, input, &x);
                let sums = dots(FACTORS, rank, &packed.predictor_factors, &z);
                let score = |i: usize| {
                    let (gate, up) = (sums[2 * i], sums[2 * i + 1]);
                    expected_magnitude(activation, gate, up, stored[i], stored[n + i]) * stored[2 * n + i]
                };
                let mut scored: Vec<(f32, usize)> = (0..n).map(|i| (score(i), i)).collect();
                scored.select_nth_unstable_by(k - 1, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
                *found += scored[..k].iter().filter(|(_, i)| trace.get(row, *i)).count() as u64;
            }
            self.recall[2] += trace.ones(row).count() as u64;
        }
    }

    /// The shares.
    pub(super) fn measured(&self, model: &PlantedModel) -> Measured {
        let share = |part: u64, of: u64| part as f64 / of.max(1) as f64;
        let lift = |[together, expected]: [f64; 2]| together / expected.max(f64::MIN_POSITIVE);
        let clustered = model.statistics().cluster_neurons > 1;
        let trace_tokens = model.trace_tokens().len();
        Measured {
            trace_tokens,
            active_share: share(self.active, self.cells),
            active_share_sd: self.share_sd / self.layers.max(1) as f64,
            hot_cover: share(self.hot, self.active),
            reuse: self.reuse.map(|[again, all]| share(again, all)),
            coactivation_inside: clustered.then(|| lift(self.together[0])),
            coactivation_outside: lift(self.together[1]),
            predictor_tokens: ASKED_TOKENS.min(trace_tokens),
            predictor_recall: share(self.recall[0], self.recall[2]),
            foresight_recall: Some(share(self.recall[1], self.recall[2])),
        }
    }
}

/// Every row of an encoded matrix times `x`.
fn dots(encoding: Encoding, columns: usize, rows: &[u8], x: &[f32]) -> Vec<f32> {
    let mut values = vec![0.0; columns];
    let dot = |row: &[u8]| {
        unpack(encoding, RowRef::from_matrix_row(encoding, columns, row), &mut values);
        values.iter().zip(x).map(|(v, x)| v * x).sum()
    };
    rows.chunks_exact(encoding.row_stride(columns)).map(dot).collect()
}
