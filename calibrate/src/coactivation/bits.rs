use crate::{Error, Result};
use std::ops::Range;

/// Bits `[n_rows, n_columns]`, a row per sampled token and a column per neuron; each row starts at a byte, and
/// column `i` is bit `i % 8` of byte `i / 8`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitMatrix {
    n_rows: usize,
    n_columns: usize,
    bytes: Vec<u8>,
}

impl BitMatrix {
    /// Takes packed rows, `[n_rows, ceil(n_columns / 8)]`.
    ///
    /// # Errors
    /// If there are too few or too many bytes.
    pub fn new(n_rows: usize, n_columns: usize, bytes: Vec<u8>) -> Result<Self> {
        let expected = n_rows.saturating_mul(n_columns.div_ceil(8));
        if bytes.len() != expected {
            return Err(Error::Shape { what: "bit matrix".to_owned(), got: bytes.len(), expected });
        }
        Ok(Self::from_bytes(n_rows, n_columns, bytes))
    }

    /// As [`BitMatrix::new`], where the length is known to be right.
    pub(crate) fn from_bytes(n_rows: usize, n_columns: usize, bytes: Vec<u8>) -> Self {
        debug_assert_eq!(bytes.len(), n_rows * n_columns.div_ceil(8));
        BitMatrix { n_rows, n_columns, bytes }
    }

    /// Tokens.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Neurons.
    pub fn n_columns(&self) -> usize {
        self.n_columns
    }

    /// The packed rows.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// One packed row.
    pub fn row(&self, row: usize) -> &[u8] {
        let width = self.n_columns.div_ceil(8);
        &self.bytes[row * width..(row + 1) * width]
    }

    /// One bit.
    pub fn get(&self, row: usize, column: usize) -> bool {
        self.row(row)[column / 8] >> (column % 8) & 1 == 1
    }

    /// Columns of a row that are set, ascending.
    pub fn ones(&self, row: usize) -> impl Iterator<Item = usize> + '_ {
        self.row(row)
            .iter()
            .enumerate()
            .flat_map(|(index, &byte)| (0..8).filter(move |bit| byte >> bit & 1 == 1).map(move |bit| index * 8 + bit))
    }

    /// Some of the rows.
    pub fn rows(&self, rows: Range<usize>) -> BitMatrix {
        let width = self.n_columns.div_ceil(8);
        let bytes = self.bytes[rows.start * width..rows.end * width].to_vec();
        BitMatrix { n_rows: rows.len(), n_columns: self.n_columns, bytes }
    }

    /// Share of rows in which each column is set, `[n_columns]`.
    pub fn rates(&self) -> Vec<f64> {
        let mut counts = vec![0u32; self.n_columns];
        (0..self.n_rows).flat_map(|row| self.ones(row)).for_each(|column| counts[column] += 1);
        counts.into_iter().map(|count| f64::from(count) / self.n_rows.max(1) as f64).collect()
    }
}
