use crate::{Encoding, RowRef};

/// Rows of a neuron: gate, up, down.
const ROWS: usize = 3;

/// What a GPU asks for at a time.
const LINE_BYTES: usize = 128;
/// Bundles with streams begin at multiples of a line from this length on: at most a thirtieth more.
const ALIGNED_FROM: usize = 4096;

/// Where the three rows of a neuron lie in its bundle, or the one row of a matrix in its bytes.
///
/// A bundle is: gate codes, up codes, down codes, gate scales, up scales, down scales, zeros up to a multiple of 16; the
/// three coarse planes, zeros up to a multiple of 16; the three heads; the three streams, zeros up to a multiple of 16.
/// What an encoding does not have is left out. Each row has `columns` columns (the down *column* of the neuron is stored
/// as a row). Codes come first so that every code plane starts at a multiple of 16 when there is a multiple of 32
/// columns: one 16-byte load a GPU thread. The parts are so divided that a bundle is the bundles of its planes, one after
/// the other: a split keeps these in files of their own.
///
/// Streams have different lengths; there is room for the longest of the layer, so that bundles are as long as each
/// other and are found by their number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BundleLayout {
    encoding: Encoding,
    columns: usize,
    rows: usize,
    code_bytes: usize,
    scale_bytes: usize,
    coarse_bytes: usize,
    head_bytes: usize,
    /// Where the coarse planes begin: the end of the base's part.
    coarse_at: usize,
    /// Where the heads begin.
    head_at: usize,
    bundle_bytes: usize,
}

impl BundleLayout {
    /// The layout for a model; `None` if the encoding cannot store rows of `hidden_size`, or has streams.
    pub fn new(encoding: Encoding, hidden_size: usize) -> Option<Self> {
        if encoding.has_stream() { None } else { Self::with_streams(encoding, hidden_size, 0) }
    }

    /// The same with room for `stream_bytes` of streams, all three rows of a neuron together, and up to the end of a line:
    /// over a link, two parts of a line cost as much as two lines. Short bundles are not made longer by a large part.
    pub fn with_streams(encoding: Encoding, hidden_size: usize, stream_bytes: usize) -> Option<Self> {
        let layout = Self::of_rows(encoding, hidden_size, ROWS, stream_bytes)?;
        if !encoding.has_stream() || layout.bundle_bytes < ALIGNED_FROM {
            return Some(layout);
        }
        Self::of_bundle_bytes(encoding, hidden_size, layout.bundle_bytes.next_multiple_of(LINE_BYTES))
    }

    /// One row of a matrix, with room for `stream_bytes`.
    pub fn matrix_row(encoding: Encoding, columns: usize, stream_bytes: usize) -> Option<Self> {
        Self::of_rows(encoding, columns, 1, stream_bytes)
    }

    /// The layout of neurons of `bundle_bytes`, with streams wherever there is room; `None` if no such bundle is as long.
    pub fn of_bundle_bytes(encoding: Encoding, hidden_size: usize, bundle_bytes: usize) -> Option<Self> {
        Self::of_bytes(encoding, hidden_size, ROWS, bundle_bytes)
    }

    /// The same for matrix rows of `row_bytes`.
    pub fn of_row_bytes(encoding: Encoding, columns: usize, row_bytes: usize) -> Option<Self> {
        Self::of_bytes(encoding, columns, 1, row_bytes)
    }

    fn of_bytes(encoding: Encoding, columns: usize, rows: usize, bytes: usize) -> Option<Self> {
        let fixed = Self::of_rows(encoding, columns, rows, 0)?.streams_at();
        let room = if encoding.has_stream() { bytes.checked_sub(fixed)? } else { 0 };
        Self::of_rows(encoding, columns, rows, room).filter(|layout| layout.bundle_bytes == bytes)
    }

    fn of_rows(encoding: Encoding, columns: usize, rows: usize, stream_bytes: usize) -> Option<Self> {
        if !encoding.accepts(columns) {
            return None;
        }
        let (code_bytes, scale_bytes) = (encoding.code_bytes(columns), encoding.scale_bytes(columns));
        let (coarse_bytes, head_bytes) = (encoding.coarse_bytes(columns), encoding.head_bytes(columns));
        let coarse_at = (rows * (code_bytes + scale_bytes)).next_multiple_of(16);
        let head_at = coarse_at + (rows * coarse_bytes).next_multiple_of(16);
        let bundle_bytes = (head_at + rows * head_bytes + stream_bytes).next_multiple_of(16);
        Some(Self {
            encoding,
            columns,
            rows,
            code_bytes,
            scale_bytes,
            coarse_bytes,
            head_bytes,
            coarse_at,
            head_at,
            bundle_bytes,
        })
    }

    /// The encoding of all rows.
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// Columns of each row.
    pub fn hidden_size(&self) -> usize {
        self.columns
    }

    /// Bytes of one bundle.
    pub fn bundle_bytes(&self) -> usize {
        self.bundle_bytes
    }

    /// Bytes of the base's part of a bundle: what a split without further planes has.
    pub fn base_bytes(&self) -> usize {
        self.coarse_at
    }

    /// Bytes of the coarse planes of a bundle.
    pub fn coarse_bytes(&self) -> usize {
        self.head_at - self.coarse_at
    }

    /// Bytes of heads and streams.
    pub fn final_bytes(&self) -> usize {
        self.bundle_bytes - self.head_at
    }

    /// Where the streams begin: the end of the heads.
    fn streams_at(&self) -> usize {
        self.head_at + self.rows * self.head_bytes
    }

    /// Bytes of the bundle that begins with `bytes`, without the room behind its streams; without any streams if its heads
    /// are not there. The number is more than [`BundleLayout::bundle_bytes`] where heads are damaged.
    pub fn used_bytes(&self, bytes: &[u8]) -> usize {
        let heads = bytes.get(self.head_at..self.streams_at()).unwrap_or_default();
        let of_row = |head: &[u8]| self.encoding.stream_bytes(head);
        self.streams_at() + heads.chunks_exact(self.head_bytes.max(1)).map(of_row).sum::<usize>()
    }

    /// Share of the bytes of `bundles` that are read: without the room behind their streams. 1 for none.
    pub fn used_share(&self, bundles: &[u8]) -> f64 {
        if !self.encoding.has_stream() || bundles.is_empty() {
            return 1.0;
        }
        let used = bundles.chunks_exact(self.bundle_bytes).map(|b| self.used_bytes(b).min(self.bundle_bytes));
        used.sum::<usize>() as f64 / bundles.len() as f64
    }

    /// Bytes that `bundle` takes in memory without the room behind its streams: a multiple of 16.
    pub fn trimmed_bytes(&self, bundle: &[u8]) -> usize {
        if !self.encoding.has_stream() {
            return self.bundle_bytes;
        }
        self.used_bytes(bundle).min(self.bundle_bytes).next_multiple_of(16)
    }

    /// Row `which` (0 gate, 1 up, 2 down) of a bundle, which need not have the room behind its streams.
    ///
    /// # Panics
    /// If `bundle` ends before its streams, or there is no such row.
    #[inline]
    pub fn row<'a>(&self, bundle: &'a [u8], which: usize) -> RowRef<'a> {
        assert!(which < self.rows, "row {which} of {}", self.rows);
        let part = |from: usize, bytes: usize| &bundle[from + which * bytes..from + (which + 1) * bytes];
        let mut row = RowRef {
            codes: part(0, self.code_bytes),
            scales: part(self.rows * self.code_bytes, self.scale_bytes),
            ..RowRef::default()
        };
        if self.coarse_bytes > 0 {
            row.coarse = part(self.coarse_at, self.coarse_bytes);
        }
        if self.head_bytes > 0 {
            row.head = part(self.head_at, self.head_bytes);
            let streams = &bundle[self.streams_at()..bundle.len().min(self.bundle_bytes)];
            let heads = bundle[self.head_at..].chunks_exact(self.head_bytes).take(which);
            let before: usize = heads.map(|head| self.encoding.stream_bytes(head)).sum();
            // Of a damaged bundle there may be nothing left.
            row.stream = streams.get(before..).unwrap_or_default();
        }
        row
    }

    /// Codes and scales of row `which`, to be written.
    ///
    /// # Panics
    /// As [`BundleLayout::row`].
    pub fn row_mut<'a>(&self, bundle: &'a mut [u8], which: usize) -> (&'a mut [u8], &'a mut [u8]) {
        assert!(which < self.rows, "row {which} of {}", self.rows);
        let (codes, scales) = bundle.split_at_mut(self.rows * self.code_bytes);
        let (c, s) = (which * self.code_bytes, which * self.scale_bytes);
        (&mut codes[c..c + self.code_bytes], &mut scales[s..s + self.scale_bytes])
    }

    /// Writes row `which`, given as a matrix row (codes, then scales), into a bundle.
    ///
    /// # Panics
    /// As [`BundleLayout::row`], or if `row` is shorter than a row.
    pub fn set_row(&self, bundle: &mut [u8], which: usize, row: &[u8]) {
        let (codes, scales) = self.row_mut(bundle, which);
        codes.copy_from_slice(&row[..self.code_bytes]);
        scales.copy_from_slice(&row[self.code_bytes..self.code_bytes + self.scale_bytes]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_bundles_with_streams_are_whole_lines_and_are_found_by_their_length() {
        for encoding in Encoding::ALL {
            for (hidden, stream) in [(256, 100), (256, 3000), (8192, 1), (8192, 20_000), (5120, 12_345)] {
                let stream = if encoding.has_stream() { stream } else { 0 };
                let layout = BundleLayout::with_streams(encoding, hidden, stream).expect("whole groups");
                let bytes = layout.bundle_bytes();
                let least = layout.streams_at() + stream;
                assert!(bytes >= least && bytes < least + LINE_BYTES, "{encoding} {hidden} {stream}: {bytes}");
                if encoding.has_stream() && bytes >= ALIGNED_FROM {
                    assert!(bytes.is_multiple_of(LINE_BYTES), "{encoding} {hidden} {stream}: {bytes}");
                } else {
                    assert!(bytes < least + 16, "{encoding} {hidden} {stream}: {bytes}");
                }
                assert_eq!(BundleLayout::of_bundle_bytes(encoding, hidden, bytes), Some(layout));
            }
        }
    }
}
