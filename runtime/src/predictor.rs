//! Which neurons a token needs, from the layer's input alone.

use crate::Result;
use thermocline_calibrate::predictor::expected_magnitude;
use thermocline_datasets::Activation;
use thermocline_kernels::{Encoding, Kernels, MatrixRef, Pool, gemv, gemv_rows};
use thermocline_split::{Split, StoredPredictor};

/// Neurons that one task scores: their sums stay in the first-level cache.
const TASK_NEURONS: usize = 256;

/// The low-rank predictor of one layer: `z = B x`, then for every neuron the expected `|h| * ||d||` given
/// `a_gate . z`, `a_up . z` and what these leave out.
/// Fitted by truncated SVD of gate and up rows in the metric of the input covariance (calibrate, `predictor`).
#[derive(Debug)]
pub(crate) struct Predictor {
    rank: usize,
    hidden_size: usize,
    activation: Activation,
    /// q8 `[rank, hidden]`.
    input: Vec<u8>,
    /// The same for the input of the layer before.
    ahead: Option<Vec<u8>>,
    /// `[2 * ffn, rank]`: gate and up of each neuron.
    factors: Vec<u8>,
    encoding: Encoding,
    /// `[3, ffn]`: residuals of gate and up, lengths of the down columns.
    neurons: Vec<f32>,
}

impl Predictor {
    pub(crate) fn load(split: &Split, layer: usize) -> Result<Self> {
        let StoredPredictor { input, ahead, factors, neurons } = split.stored_predictor(layer)?;
        let (file, config) = (split.predictors(), &split.manifest().config);
        let encodings = (input.format.encoding(), factors.format.encoding());
        let (Some(Encoding::Q8), Some(encoding)) = encodings else {
            return Err(thermocline_split::Error::Corrupt {
                path: file.path().to_owned(),
                field: format!("predictors.{layer}.input, factors"),
                reason: "not stored as a predictor is".to_owned(),
            }
            .into());
        };
        Ok(Self {
            rank: input.rows,
            hidden_size: config.hidden_size,
            activation: config.activation,
            input: file.read(&input.name)?,
            ahead: ahead.map(|ahead| file.read(&ahead.name)).transpose()?,
            factors: file.read(&factors.name)?,
            encoding,
            neurons,
        })
    }

    /// Bytes that [`Predictor::scores`] reads, and [`Predictor::foresee`] as many.
    pub(crate) fn bytes(&self) -> u64 {
        (self.input.len() + self.factors.len() + 4 * self.neurons.len()) as u64
    }

    /// Scores of all neurons for the normalised input `x`, into `scores` `[ffn]`. A score that is not a number counts
    /// as zero: a broken predictor costs accuracy, never a crash.
    pub(crate) fn scores(&self, kernels: &Kernels, pool: &mut Pool, x: &[f32], scores: &mut [f32]) {
        self.scores_of(&self.input, kernels, pool, x, scores);
    }

    /// The same, one layer early: `x` is the input of the layer before, under this layer's norm.
    pub(crate) fn foresee(&self, kernels: &Kernels, pool: &mut Pool, x: &[f32], scores: &mut [f32]) {
        self.scores_of(self.ahead.as_ref().unwrap_or(&self.input), kernels, pool, x, scores);
    }

    fn scores_of(&self, input: &[u8], kernels: &Kernels, pool: &mut Pool, x: &[f32], scores: &mut [f32]) {
        let mut z = vec![0.0; self.rank];
        let input = MatrixRef::new(Encoding::Q8, self.rank, self.hidden_size, input);
        gemv(kernels, pool, input, x, &mut z);
        let ffn = scores.len();
        let factors = MatrixRef::new(self.encoding, 2 * ffn, self.rank, &self.factors);
        pool.for_each_chunk(scores, TASK_NEURONS, |task, scores| {
            let first = task * TASK_NEURONS;
            let mut sums = [0.0; 2 * TASK_NEURONS];
            let sums = &mut sums[..2 * scores.len()];
            gemv_rows(kernels, &factors, 2 * first, &z, sums);
            let of = |which: usize| &self.neurons[which * ffn + first..][..scores.len()];
            let [gate_sd, up_sd, norm] = [of(0), of(1), of(2)];
            for (i, score) in scores.iter_mut().enumerate() {
                let (g, u) = (sums[2 * i], sums[2 * i + 1]);
                let s = expected_magnitude(self.activation, g, u, gate_sd[i], up_sd[i]) * norm[i];
                *score = if s.is_nan() { 0.0 } else { s };
            }
        });
    }
}

/// Neurons that make up a share of a layer, at least one, at most all.
pub fn n_active(share: f32, n_neurons: usize) -> usize {
    ((share * n_neurons as f32).round() as usize).clamp(1, n_neurons.max(1))
}

/// Sum of `(h_i ||d_i||)^2`.
pub fn energy(h: &[f32], down_norm: &[f32]) -> f64 {
    h.iter().zip(down_norm).map(|(h, d)| f64::from(h * d).powi(2)).sum()
}

/// Scores are sorted into ranges by the upper 11 bits behind the sign: non-negative floats order like their bits.
const RANGES: usize = 1 << 11;

/// The bits of a score; of one that is negative or not a number, those of zero.
fn bits(score: f32) -> u32 {
    if score > 0.0 { score.to_bits() } else { 0 }
}

/// The range of such bits.
fn range(bits: u32) -> usize {
    (bits >> 20) as usize
}

/// How many neurons, those of the highest `costs` (not negative), must be computed so that the squares of the other costs add up
/// to no more than `allowed`.
pub fn n_needed(costs: &[f32], allowed: f64) -> usize {
    let square = |cost: f32| f64::from(cost.max(0.0)).powi(2);
    let mut ranges = vec![(0.0f64, 0usize); RANGES];
    for &cost in costs {
        let (squares, n) = &mut ranges[range(bits(cost))];
        *squares += square(cost);
        *n += 1;
    }
    let (mut sum, mut left_out, mut border) = (0.0, 0, 0);
    while let Some((squares, n)) = ranges.get(border).filter(|(squares, _)| sum + squares <= allowed) {
        sum += squares;
        left_out += n;
        border += 1;
    }
    // Of the range that does not fit, the lowest.
    let mut near: Vec<f32> = costs.iter().copied().filter(|&cost| range(bits(cost)) == border).collect();
    near.sort_unstable_by(f32::total_cmp);
    for cost in near {
        sum += square(cost);
        if sum > allowed {
            break;
        }
        left_out += 1;
    }
    costs.len() - left_out
}

/// The numbers of the `k` highest scores, ascending, into `out`; ties go to the lower number.
///
/// Counting the scores of each range finds the few among which the k-th largest lies, and a selection among these finds it: two
/// passes without a branch that depends on a score.
pub fn top_k(scores: &[f32], k: usize, out: &mut Vec<u32>) {
    out.clear();
    let k = k.min(scores.len());
    if k == 0 {
        return;
    }
    let mut counts = [0u32; RANGES];
    for &s in scores {
        counts[range(bits(s))] += 1;
    }
    // `left` of the scores in `bucket` belong to the set, and all in higher ones.
    let (mut bucket, mut left) = (counts.len() - 1, k);
    while (counts[bucket] as usize) < left {
        left -= counts[bucket] as usize;
        bucket -= 1;
    }
    let mut near: Vec<u32> = scores.iter().map(|&s| bits(s)).filter(|&b| range(b) == bucket).collect();
    let (above, &mut threshold, _) = near.select_nth_unstable_by(left - 1, |a, b| b.cmp(a));
    let mut ties = left - above.iter().filter(|&&b| b > threshold).count();
    // Every number is written; those that do not belong are written over by the next.
    out.resize(k + 1, 0);
    let mut n = 0;
    for (i, &s) in scores.iter().enumerate() {
        let b = bits(s);
        let tie = b == threshold && ties > 0;
        ties -= usize::from(tie);
        out[n] = i as u32;
        n += usize::from(b > threshold || tie);
    }
    out.truncate(k);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn as_few_as_keep_the_rest_below_what_is_allowed(costs in proptest::collection::vec(prop_oneof![0.0f32..1e3, Just(0.0), Just(1.0), 0.0f32..1e-3], 1..300), share in 0.0f64..1.2) {
            let squares = |costs: &[f32]| costs.iter().map(|&c| f64::from(c).powi(2)).sum::<f64>();
            let allowed = share * squares(&costs);
            let needed = n_needed(&costs, allowed);
            let mut falling = costs.clone();
            falling.sort_by(|a, b| b.total_cmp(a));
            prop_assert!(squares(&falling[needed..]) <= allowed * (1.0 + 1e-12));
            if needed > 0 {
                prop_assert!(squares(&falling[needed - 1..]) > allowed * (1.0 - 1e-12));
            }
        }

        #[test]
        fn top_k_is_the_sorted_prefix(scores in proptest::collection::vec(prop_oneof![0.0f32..1e3, Just(0.0), Just(1.0), 0.0f32..1e-30], 1..400), share in 0.0f64..1.2) {
            let k = (scores.len() as f64 * share) as usize;
            let mut got = Vec::new();
            top_k(&scores, k, &mut got);
            let mut want: Vec<u32> = (0..scores.len() as u32).collect();
            want.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
            want.truncate(k);
            want.sort_unstable();
            prop_assert_eq!(got, want);
        }
    }
}
