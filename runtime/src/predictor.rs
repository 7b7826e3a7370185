//! Which neurons a token needs, from the layer's input alone.

use crate::Result;
use thermocline_calibrate::predictor::expected_magnitude;
use thermocline_datasets::Activation;
use thermocline_kernels::{Encoding, Kernels, MatrixRef, Pool, gemv};
use thermocline_split::Split;

/// The low-rank predictor of one layer: `z = B x`, then for every neuron the expected `|h| * ||d||` given
/// `a_gate . z`, `a_up . z` and what these leave out.
/// Fitted by truncated SVD of gate and up rows in the metric of the input covariance (calibrate, `predictor`).
#[derive(Debug)]
pub(crate) struct Predictor {
    rank: usize,
    hidden_size: usize,
    activation: Activation,
    input: Vec<u8>,
    gate_up: Vec<u8>,
    residual: Vec<f32>,
    down_norm: Vec<f32>,
}

impl Predictor {
    pub(crate) fn load(split: &Split, layer: usize) -> Result<Self> {
        let name = |part: &str| format!("predictors.{layer}.{part}");
        let file = split.predictors();
        let config = &split.manifest().config;
        let (input, gate_up) = (file.entry(&name("input"))?, file.entry(&name("gate_up"))?);
        let rank = input.rows;
        let fits = input.format.encoding() == Some(Encoding::Q8)
            && gate_up.format.encoding() == Some(Encoding::Q8)
            && input.columns == config.hidden_size
            && (gate_up.rows, gate_up.columns) == (2 * config.intermediate_size, rank);
        let down_norm = file.read_f32(&name("down_norm"))?;
        let residual = file.read_f32(&name("residual"))?;
        if !fits || down_norm.len() != config.intermediate_size || residual.len() != 2 * config.intermediate_size {
            return Err(thermocline_split::Error::Corrupt {
                path: file.path().to_owned(),
                field: name("input, gate_up, residual, down_norm"),
                reason: "shapes do not fit the model".to_owned(),
            }
            .into());
        }
        Ok(Self {
            rank,
            hidden_size: config.hidden_size,
            activation: config.activation,
            input: file.read(&name("input"))?,
            gate_up: file.read(&name("gate_up"))?,
            residual,
            down_norm,
        })
    }

    /// Bytes that every token reads.
    pub(crate) fn bytes(&self) -> u64 {
        (self.input.len() + self.gate_up.len() + 12 * self.down_norm.len()) as u64
    }

    /// Scores of all neurons for the normalised input `x`, into `scores` `[ffn]`. A score that is not a number counts
    /// as zero: a broken predictor costs accuracy, never a crash.
    pub(crate) fn scores(&self, kernels: &Kernels, pool: &mut Pool, x: &[f32], scores: &mut [f32]) {
        let mut z = vec![0.0; self.rank];
        let input = MatrixRef { encoding: Encoding::Q8, rows: self.rank, columns: self.hidden_size, data: &self.input };
        gemv(kernels, pool, input, x, &mut z);
        let stride = Encoding::Q8.row_stride(self.rank);
        let rows = MatrixRef {
            encoding: Encoding::Q8,
            rows: self.gate_up.len() / stride,
            columns: self.rank,
            data: &self.gate_up,
        };
        let (gate_sd, up_sd) = self.residual.split_at(self.down_norm.len());
        pool.for_each_chunk(scores, 128, |task, scores| {
            let first = task * 128;
            for (i, score) in scores.iter_mut().enumerate() {
                let n = first + i;
                let [g, u] = kernels.dots(Encoding::Q8, [rows.row(2 * n), rows.row(2 * n + 1)], &z);
                let s = expected_magnitude(self.activation, g, u, gate_sd[n], up_sd[n]) * self.down_norm[n];
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
