use std::fmt;
use std::str::FromStr;

/// Columns that share a scale in the quantised encodings.
pub const GROUP: usize = 32;

/// How a row of weights is stored: a plane of codes, then a plane of scales.
///
/// | encoding | codes | scales | bits per weight |
/// | --- | --- | --- | --- |
/// | `bf16` | bfloat16, little-endian | none | 16 |
/// | `q8` | i8 | one f16 for each group of 32 | 8.5 |
/// | `q4` | 4 bits, offset 8; byte j of a group holds columns j (low) and j + 16 (high) | the same | 4.5 |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// bfloat16.
    Bf16,
    /// 8-bit codes, f16 scales for groups of 32.
    Q8,
    /// 4-bit codes, f16 scales for groups of 32.
    Q4,
}

impl Encoding {
    /// Every encoding, for tests and help texts.
    pub const ALL: [Encoding; 3] = [Encoding::Bf16, Encoding::Q8, Encoding::Q4];

    /// The name used in manifests and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Encoding::Bf16 => "bf16",
            Encoding::Q8 => "q8",
            Encoding::Q4 => "q4",
        }
    }

    /// The number used in binary headers.
    pub fn id(self) -> u32 {
        match self {
            Encoding::Bf16 => 1,
            Encoding::Q8 => 2,
            Encoding::Q4 => 3,
        }
    }

    /// The inverse of [`Encoding::id`].
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|e| e.id() == id)
    }

    /// Whether rows of `columns` weights can be stored: quantised rows are whole groups.
    pub fn accepts(self, columns: usize) -> bool {
        columns > 0 && (self == Encoding::Bf16 || columns.is_multiple_of(GROUP))
    }

    /// Bytes of the codes of a row.
    pub fn code_bytes(self, columns: usize) -> usize {
        match self {
            Encoding::Bf16 => columns * 2,
            Encoding::Q8 => columns,
            Encoding::Q4 => columns / 2,
        }
    }

    /// Bytes of the scales of a row.
    pub fn scale_bytes(self, columns: usize) -> usize {
        match self {
            Encoding::Bf16 => 0,
            Encoding::Q8 | Encoding::Q4 => columns / GROUP * 2,
        }
    }

    /// Bytes from one row of a matrix to the next: codes, scales, zeros up to a multiple of 16.
    pub fn row_stride(self, columns: usize) -> usize {
        (self.code_bytes(columns) + self.scale_bytes(columns)).next_multiple_of(16)
    }

    /// The first column of `row` whose weight is NaN or infinite; in quantised encodings the first of a group whose
    /// scale is.
    pub fn first_not_finite(self, row: RowRef<'_>) -> Option<usize> {
        // Sixteen bits with all exponent bits set.
        let (bytes, exponent, step) = match self {
            Encoding::Bf16 => (row.codes, 0x7f80, 1),
            Encoding::Q8 | Encoding::Q4 => (row.scales, 0x7c00, GROUP),
        };
        let special = |b: &[u8; 2]| u16::from_le_bytes(*b) & exponent == exponent;
        let (halves, _) = bytes.as_chunks::<2>();
        // Without a way out in the middle this is vector code, and the rule is that there is nothing to find.
        let any = halves.iter().fold(false, |any, b| any | special(b));
        if any { halves.iter().position(special).map(|i| i * step) } else { None }
    }

    /// Whether every weight of `row` is zero because of its scales, or in bf16 by itself.
    pub fn is_zero(self, row: RowRef<'_>) -> bool {
        let bytes = if self == Encoding::Bf16 { row.codes } else { row.scales };
        bytes.as_chunks::<2>().0.iter().all(|b| u16::from_le_bytes(*b) & 0x7fff == 0)
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Encoding {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|e| e.name() == s)
            .ok_or_else(|| format!("unknown encoding {s:?}; expected bf16, q8 or q4"))
    }
}

/// One encoded row, borrowed.
#[derive(Debug, Clone, Copy)]
pub struct RowRef<'a> {
    /// [`Encoding::code_bytes`] bytes.
    pub codes: &'a [u8],
    /// [`Encoding::scale_bytes`] bytes.
    pub scales: &'a [u8],
}

impl<'a> RowRef<'a> {
    /// The row at the start of `bytes`, in the layout of a matrix row.
    ///
    /// # Panics
    /// If `bytes` is shorter than a row.
    #[inline]
    pub fn from_matrix_row(encoding: Encoding, columns: usize, bytes: &'a [u8]) -> Self {
        let (codes, rest) = bytes.split_at(encoding.code_bytes(columns));
        RowRef { codes, scales: &rest[..encoding.scale_bytes(columns)] }
    }
}
