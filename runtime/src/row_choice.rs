//! Which rows of a layer's neurons are read, one by one, and what stands for those that are not.

use std::sync::Mutex;
#[cfg(feature = "cuda")]
use std::sync::atomic::{AtomicU32, Ordering};
#[cfg(feature = "cuda")]
use thermocline_kernels::cuda::launch::HOST_ROWS;
use thermocline_split::ALL_ROWS;

/// Neurons whose down row was not read, or is but a residual, and their activations.
pub(crate) type LeftToSketch = Mutex<Vec<(u32, f32)>>;

/// Which rows of a layer's neurons are read, from neuron `first` on; of those before all are.
#[derive(Clone, Copy)]
pub(crate) struct RowChoice<'a> {
    pub first: usize,
    /// As numbers.
    pub rows: &'a [f32],
    /// Gate and up products of the sketch, for rows that are not read; of residuals for all.
    pub products: &'a [[f32; 2]],
    /// Gets those whose down row is not read, and all whose rows are residuals, in no order.
    pub left: &'a LeftToSketch,
}

impl RowChoice<'_> {
    /// Those of neuron `n`.
    pub(crate) fn of(&self, n: usize) -> RowsOfNeuron {
        match n.checked_sub(self.first) {
            Some(i) => RowsOfNeuron { rows: self.rows[i] as u8, products: self.products[i] },
            None => RowsOfNeuron { rows: ALL_ROWS, products: [0.0; 2] },
        }
    }
}

/// What is read of a neuron, and its gate and up products by the sketch.
#[derive(Clone, Copy)]
pub(crate) struct RowsOfNeuron {
    pub rows: u8,
    pub products: [f32; 2],
}

impl RowsOfNeuron {
    /// Whether one of [`thermocline_split::GATE_ROW`] and the like is among them.
    pub(crate) fn has(self, row: u8) -> bool {
        self.rows & row > 0
    }
}

/// Neurons that the host computes for a device, as that lists them.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy)]
pub(crate) struct HostList<'a> {
    /// Numbers, ascending and counted from a first one, and rows to read ([`thermocline_kernels::cuda::launch::HOST_ROWS`]).
    pub entries: &'a [AtomicU32],
    /// Of each its gate and up products, for rows that are not read; `None` where all are.
    pub known: Option<&'a [AtomicU32]>,
}

#[cfg(feature = "cuda")]
impl HostList<'_> {
    /// The number of an entry.
    pub(crate) fn number(entry: &AtomicU32) -> usize {
        (entry.load(Ordering::Relaxed) & ((1 << HOST_ROWS) - 1)) as usize
    }

    /// The rows of entry `i`.
    pub(crate) fn rows(&self, i: usize) -> RowsOfNeuron {
        let rows = (self.entries[i].load(Ordering::Relaxed) >> HOST_ROWS) as u8;
        let product = |at: usize| self.known.map_or(0.0, |known| f32::from_bits(known[at].load(Ordering::Relaxed)));
        RowsOfNeuron { rows, products: [product(2 * i), product(2 * i + 1)] }
    }

    /// Rows to read.
    pub(crate) fn n_rows(&self) -> u64 {
        (0..self.entries.len()).map(|i| u64::from(self.rows(i).rows.count_ones())).sum()
    }
}
