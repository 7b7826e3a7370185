use crate::{Encoding, RowRef};

/// Where the three rows of a neuron lie in its bundle.
///
/// A bundle is: gate codes, up codes, down codes, gate scales, up scales, down scales, zeros up to a multiple of 16.
/// Each row has `hidden_size` columns (the down *column* of the neuron is stored as a row). Codes come first so that
/// every code plane starts at a multiple of 16 when `hidden_size` is a multiple of 32: one 16-byte load a GPU thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BundleLayout {
    encoding: Encoding,
    hidden_size: usize,
    code_bytes: usize,
    scale_bytes: usize,
    bundle_bytes: usize,
}

impl BundleLayout {
    /// The layout for a model; `None` if the encoding cannot store rows of `hidden_size`.
    pub fn new(encoding: Encoding, hidden_size: usize) -> Option<Self> {
        let (code_bytes, scale_bytes) = (encoding.code_bytes(hidden_size), encoding.scale_bytes(hidden_size));
        let bundle_bytes = (3 * (code_bytes + scale_bytes)).next_multiple_of(16);
        encoding.accepts(hidden_size).then_some(Self { encoding, hidden_size, code_bytes, scale_bytes, bundle_bytes })
    }

    /// The encoding of all three rows.
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// Columns of each row.
    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    /// Bytes of one bundle.
    pub fn bundle_bytes(&self) -> usize {
        self.bundle_bytes
    }

    /// Row `which` (0 gate, 1 up, 2 down) of a bundle.
    ///
    /// # Panics
    /// If `bundle` is shorter than [`BundleLayout::bundle_bytes`] or `which > 2`.
    #[inline]
    pub fn row<'a>(&self, bundle: &'a [u8], which: usize) -> RowRef<'a> {
        assert!(which < 3, "a bundle has three rows");
        let codes = which * self.code_bytes;
        let scales = 3 * self.code_bytes + which * self.scale_bytes;
        RowRef { codes: &bundle[codes..codes + self.code_bytes], scales: &bundle[scales..scales + self.scale_bytes] }
    }

    /// Codes and scales of row `which`, to be written.
    ///
    /// # Panics
    /// As [`BundleLayout::row`].
    pub fn row_mut<'a>(&self, bundle: &'a mut [u8], which: usize) -> (&'a mut [u8], &'a mut [u8]) {
        assert!(which < 3, "a bundle has three rows");
        let (codes, scales) = bundle.split_at_mut(3 * self.code_bytes);
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
