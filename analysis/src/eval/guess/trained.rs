//! A network of two layers that was trained to name the top share, in 8 bits.

use super::{Cost, Guess, Seen};
use crate::Result;
use thermocline_calibrate::predictor::TwoLayer;
use thermocline_kernels::{Encoding, RowRef, ScaleFit, pack, unpack};

/// How its matrices would be stored: as the input matrix of the split's own predictor is.
const ENCODING: Encoding = Encoding::Q8;

/// A layer's network as it would be stored.
pub(super) struct Trained {
    network: TwoLayer,
    bytes: usize,
}

impl Trained {
    /// Rounds `network`'s matrices; biases stay as they are.
    pub(super) fn new(network: &TwoLayer) -> Result<Self> {
        let mut network = network.clone();
        let (hidden, rank) = (network.hidden_size, network.rank);
        let bytes = round(&mut network.first, hidden)? + round(&mut network.second, rank)?;
        let biases = size_of::<f32>() * (network.first_bias.len() + network.second_bias.len());
        Ok(Self { network, bytes: bytes + biases })
    }
}

/// Rounds `rows [n_rows, columns]` to what is read back, and says how many bytes they take.
fn round(rows: &mut [f32], columns: usize) -> Result<usize> {
    let mut stored = vec![0; ENCODING.row_stride(columns)];
    for row in rows.chunks_exact_mut(columns) {
        pack(ENCODING, row, ScaleFit::LeastSquares, &mut stored).map_err(|error| {
            let reason = format!("a trained predictor: {error}");
            thermocline_calibrate::Error::Fit { reason }
        })?;
        unpack(ENCODING, RowRef::from_matrix_row(ENCODING, columns, &stored), row);
    }
    Ok(rows.len() / columns * stored.len())
}

impl Guess for Trained {
    fn scores(&self, seen: &Seen<'_>) -> Result<Vec<f32>> {
        Ok(self.network.scores(seen.input)?)
    }

    fn cost(&self) -> Cost {
        let multiply_adds = self.network.first.len() + self.network.second.len();
        Cost { bytes: self.bytes as f64, multiply_adds: multiply_adds as f64 }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::eval::guess::tests::{assert_near, dot, layers, noise};

    #[test]
    fn scores_are_the_odds_of_the_rounded_network() {
        let layer = layers(1).remove(0);
        let (hidden, ffn, rank) = (layer.hidden_size(), layer.intermediate_size(), 32);
        let network = TwoLayer {
            rank,
            hidden_size: hidden,
            intermediate_size: ffn,
            first: noise(rank * hidden, 1).iter().map(|v| 0.1 * v).collect(),
            first_bias: noise(rank, 2),
            second: noise(ffn * rank, 3).iter().map(|v| 0.1 * v).collect(),
            second_bias: noise(ffn, 4),
        };
        let trained = Trained::new(&network).unwrap();
        for (whole, stored) in [(&network.first, &trained.network.first), (&network.second, &trained.network.second)] {
            assert!(whole != stored && whole.iter().zip(stored).all(|(a, b)| (a - b).abs() < 2e-3));
        }
        let input = noise(5 * hidden, 5);
        let stored = &trained.network;
        let wanted = input.chunks_exact(hidden).flat_map(|x| {
            let rows = stored.first.chunks_exact(hidden).zip(&stored.first_bias);
            let inner: Vec<f32> = rows.map(|(row, bias)| (dot(row, x) + bias).max(0.0)).collect();
            let rows = stored.second.chunks_exact(rank).zip(&stored.second_bias);
            rows.map(|(row, bias)| (dot(row, &inner) + bias).exp()).collect::<Vec<_>>()
        });
        let got = trained.scores(&Seen { layer: &layer, input: &input, earlier: &[], given: &[] }).unwrap();
        assert_near(&got, &wanted.collect::<Vec<_>>());
        // 8 bits and a 16-bit scale for each 32 weights, rows on multiples of 16 bytes; biases of 4 bytes.
        let weights = rank * (hidden + ffn);
        let bytes = rank * 80 + ffn * 48 + 4 * (rank + ffn);
        assert_eq!(trained.cost(), Cost { bytes: bytes as f64, multiply_adds: weights as f64 });
    }
}
