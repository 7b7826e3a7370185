//! Which neurons a token needs, from the layer's input alone.

use crate::Result;
use thermocline_calibrate::predictor::expected_magnitude;
use thermocline_datasets::Activation;
use thermocline_kernels::{Encoding, GROUP, Kernels, MatrixRef, Pool, RowRef, gemv};
use thermocline_split::{Split, TensorEntry};

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
    /// q8 `[rank, ffn rounded up]`: gate, up.
    factors: [Vec<u8>; 2],
    /// `[5, ffn]`: lengths of gate and up rows, their residuals, lengths of the down columns.
    neurons: Vec<f32>,
}

impl Predictor {
    pub(crate) fn load(split: &Split, layer: usize) -> Result<Self> {
        let name = |part: &str| format!("predictors.{layer}.{part}");
        let file = split.predictors();
        let config = &split.manifest().config;
        let ffn = config.intermediate_size;
        let (input, gate, up) = (file.entry(&name("input"))?, file.entry(&name("gate"))?, file.entry(&name("up"))?);
        let q8 = |t: &TensorEntry, rows, columns| {
            t.format.encoding() == Some(Encoding::Q8) && (t.rows, t.columns) == (rows, columns)
        };
        let (rank, columns) = (input.rows, ffn.next_multiple_of(GROUP));
        let neurons = file.read_f32(&name("neurons"))?;
        let fits = q8(input, rank, config.hidden_size) && q8(gate, rank, columns) && q8(up, rank, columns);
        if !fits || !rank.is_multiple_of(4) || neurons.len() != 5 * ffn {
            return Err(thermocline_split::Error::Corrupt {
                path: file.path().to_owned(),
                field: name("input, gate, up, neurons"),
                reason: "shapes do not fit the model".to_owned(),
            }
            .into());
        }
        Ok(Self {
            rank,
            hidden_size: config.hidden_size,
            activation: config.activation,
            input: file.read(&name("input"))?,
            factors: [file.read(&name("gate"))?, file.read(&name("up"))?],
            neurons,
        })
    }

    /// Bytes that every token reads.
    pub(crate) fn bytes(&self) -> u64 {
        (self.input.len() + self.factors[0].len() + self.factors[1].len() + 4 * self.neurons.len()) as u64
    }

    /// Scores of all neurons for the normalised input `x`, into `scores` `[ffn]`. A score that is not a number counts
    /// as zero: a broken predictor costs accuracy, never a crash.
    pub(crate) fn scores(&self, kernels: &Kernels, pool: &mut Pool, x: &[f32], scores: &mut [f32]) {
        let mut z = vec![0.0; self.rank];
        let input = MatrixRef { encoding: Encoding::Q8, rows: self.rank, columns: self.hidden_size, data: &self.input };
        gemv(kernels, pool, input, x, &mut z);
        let ffn = scores.len();
        let columns = ffn.next_multiple_of(GROUP);
        let stride = Encoding::Q8.row_stride(columns);
        pool.for_each_chunk(scores, TASK_NEURONS, |task, scores| {
            let first = task * TASK_NEURONS;
            let n = scores.len().next_multiple_of(GROUP);
            let [mut gate, mut up] = [[0.0; TASK_NEURONS]; 2];
            for (factor, sums) in self.factors.iter().zip([&mut gate, &mut up]) {
                // The rank is a multiple of 32: four rows at a time leave none over.
                for (rows, z) in factor.chunks_exact(4 * stride).zip(z.chunks_exact(4)) {
                    let part = |r: usize| {
                        let (codes, scales) = rows[r * stride..(r + 1) * stride].split_at(columns);
                        RowRef { codes: &codes[first..first + n], scales: &scales[first / GROUP * 2..] }
                    };
                    let parts = [part(0), part(1), part(2), part(3)];
                    kernels.axpys(Encoding::Q8, parts, [z[0], z[1], z[2], z[3]], &mut sums[..n]);
                }
            }
            let of = |which: usize| &self.neurons[which * ffn + first..][..scores.len()];
            let [gate_length, up_length, gate_sd, up_sd, norm] = [of(0), of(1), of(2), of(3), of(4)];
            for (i, score) in scores.iter_mut().enumerate() {
                let (g, u) = (gate[i] * gate_length[i], up[i] * up_length[i]);
                let s = expected_magnitude(self.activation, g, u, gate_sd[i], up_sd[i]) * norm[i];
                *score = if s.is_nan() { 0.0 } else { s };
            }
        });
    }
}

/// The numbers of the `k` highest scores, ascending, into `out`; ties go to the lower number.
///
/// Non-negative floats order like their bits, so the k-th largest is found by counting 11 bits at a time: two passes
/// and a scan, a few microseconds for a layer.
pub fn top_k(scores: &[f32], k: usize, out: &mut Vec<u32>) {
    out.clear();
    let k = k.min(scores.len());
    if k == 0 {
        return;
    }
    let bits = |s: &f32| if *s > 0.0 { s.to_bits() } else { 0 };
    let mut left = k;
    let mut prefix = 0u32;
    for (shift, width) in [(21u32, 11u32), (10, 11), (0, 10)] {
        let mut counts = [0u32; 1 << 11];
        let high = shift + width;
        for s in scores {
            let b = bits(s);
            if high >= 32 || b >> high == prefix {
                counts[(b >> shift) as usize & ((1 << width) - 1)] += 1;
            }
        }
        let mut bucket = (1usize << width) - 1;
        while (counts[bucket] as usize) < left {
            left -= counts[bucket] as usize;
            bucket -= 1;
        }
        prefix = prefix << width | bucket as u32;
    }
    // `left` of the neurons whose bits equal `prefix` belong to the set, and all above.
    for (i, s) in scores.iter().enumerate() {
        let b = bits(s);
        if b > prefix {
            out.push(i as u32);
        } else if b == prefix && left > 0 {
            left -= 1;
            out.push(i as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
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
