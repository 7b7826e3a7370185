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
