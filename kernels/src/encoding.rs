use std::fmt;
use std::str::FromStr;

/// Columns that share a scale in the quantised encodings.
pub const GROUP: usize = 32;

/// Columns whose variable-length codes lie together, with their length in the row's head: what one warp decodes, and
/// where another one can start.
pub const SEGMENT: usize = 1024;

/// Columns that are coded together: a vector of bytes.
pub const BLOCK: usize = 64;

/// Symbols that `bf16x` has codes for.
pub(crate) const SYMBOLS: usize = 9;

/// How a row of weights is stored.
///
/// | encoding | parts | bits per weight | value |
/// | --- | --- | --- | --- |
/// | `bf16` | bfloat16, little-endian | 16 | the bfloat16 |
/// | `q8` | i8 codes; one f16 scale for each group of 32 | 8.5 | code * scale |
/// | `q4` | 4-bit codes, offset 8 (byte j of a group holds columns j, low, and j + 16, high); scales | 4.5 | (code - 8) * scale |
/// | `bf16x` | sign and mantissa, exponents coded ([`mod@exact::bf16x`](crate::exact::bf16x)) | about 10.6 | the bfloat16 |
/// | `q4+plus` | `q4`, and a coarse plane of 4 more bits | 8.5 | the middle of a sixteenth of the code's range |
/// | `q4+exact` | `q4+plus`, and a final plane ([`mod@exact::residual`](crate::exact::residual)) | about 11.4 | the bfloat16 |
/// | `q8+exact` | `q8`, and a final plane | about 11.3 | the bfloat16 |
/// | `r4` | as `q4` | 4.5 | (code - 8) * scale, which is added to what a sketch has |
///
/// `r4` is for what a sketch ([`crate::sketch`]) leaves of a row, not for weights: no split has a section of it.
///
/// The parts of a row are planes: codes, scales, coarse codes, a head of lengths, a stream of codes of variable length.
/// What is stored is exactly a bfloat16 where the last column says so, whatever its bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// bfloat16.
    Bf16,
    /// 8-bit codes, f16 scales for groups of 32.
    Q8,
    /// 4-bit codes, f16 scales for groups of 32.
    Q4,
    /// bfloat16 with coded exponents.
    Bf16x,
    /// `Q4` with the coarse plane.
    Q4Plus,
    /// `Q4` with both planes.
    Q4Exact,
    /// `Q8` with the final plane.
    Q8Exact,
    /// What a sketch leaves of a row, in the codes of `Q4`.
    R4,
}

impl Encoding {
    /// Every encoding of weights, for tests and help texts.
    pub const ALL: [Encoding; 7] = [
        Encoding::Bf16,
        Encoding::Q8,
        Encoding::Q4,
        Encoding::Bf16x,
        Encoding::Q4Plus,
        Encoding::Q4Exact,
        Encoding::Q8Exact,
    ];

    /// Those with one plane of codes, whose rows are as long as each other.
    pub const PLAIN: [Encoding; 3] = [Encoding::Bf16, Encoding::Q8, Encoding::Q4];

    /// The name used in manifests and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Encoding::Bf16 => "bf16",
            Encoding::Q8 => "q8",
            Encoding::Q4 => "q4",
            Encoding::Bf16x => "bf16x",
            Encoding::Q4Plus => "q4+plus",
            Encoding::Q4Exact => "q4+exact",
            Encoding::Q8Exact => "q8+exact",
            Encoding::R4 => "r4",
        }
    }

    /// The number used in binary headers.
    pub fn id(self) -> u32 {
        match self {
            Encoding::Bf16 => 1,
            Encoding::Q8 => 2,
            Encoding::Q4 => 3,
            Encoding::Bf16x => 4,
            Encoding::Q4Plus => 5,
            Encoding::Q4Exact => 6,
            Encoding::Q8Exact => 7,
            Encoding::R4 => 8,
        }
    }

    /// The inverse of [`Encoding::id`], of an encoding of weights.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|e| e.id() == id)
    }

    /// The encoding that is left without its further planes.
    pub fn base(self) -> Self {
        match self {
            Encoding::Q4Plus | Encoding::Q4Exact => Encoding::Q4,
            Encoding::Q8Exact => Encoding::Q8,
            plain => plain,
        }
    }

    /// Whether every bfloat16 comes back bit for bit.
    pub fn is_exact(self) -> bool {
        matches!(self, Encoding::Bf16 | Encoding::Bf16x | Encoding::Q4Exact | Encoding::Q8Exact)
    }

    /// Whether rows have a head and a stream: codes of variable length.
    pub fn has_stream(self) -> bool {
        self.is_exact() && self != Encoding::Bf16
    }

    /// Whether rows are one plane of codes and its scales, each found without the others.
    pub fn is_plain(self) -> bool {
        self == Encoding::R4 || Self::PLAIN.contains(&self)
    }

    /// Whether rows of `columns` weights can be stored: quantised rows are whole groups.
    pub fn accepts(self, columns: usize) -> bool {
        let free = matches!(self, Encoding::Bf16 | Encoding::Bf16x);
        columns > 0 && (free || columns.is_multiple_of(GROUP))
    }

    /// Bytes of the codes of a row.
    pub fn code_bytes(self, columns: usize) -> usize {
        match self.base() {
            Encoding::Bf16 => columns * 2,
            Encoding::Bf16x => columns + columns.div_ceil(BLOCK) * (BLOCK / 4),
            Encoding::Q8 => columns,
            _ => columns / 2,
        }
    }

    /// Bytes of the scales of a row.
    pub fn scale_bytes(self, columns: usize) -> usize {
        match self.base() {
            Encoding::Bf16 | Encoding::Bf16x => 0,
            _ => columns / GROUP * 2,
        }
    }

    /// Bytes of the coarse plane of a row.
    pub fn coarse_bytes(self, columns: usize) -> usize {
        if matches!(self, Encoding::Q4Plus | Encoding::Q4Exact) { columns / 2 } else { 0 }
    }

    /// Bytes of the head of a row: what its stream cannot be read without.
    pub fn head_bytes(self, columns: usize) -> usize {
        let segments = columns.div_ceil(SEGMENT);
        match self {
            Encoding::Bf16x => SYMBOLS + 2 * segments,
            Encoding::Q4Exact | Encoding::Q8Exact => 4 * segments,
            _ => 0,
        }
    }

    /// Bytes of the stream of a row, by its head; 0 without one.
    pub fn stream_bytes(self, head: &[u8]) -> usize {
        let (lengths, step) = match self {
            Encoding::Bf16x => (head.get(SYMBOLS..).unwrap_or_default(), 2),
            Encoding::Q4Exact | Encoding::Q8Exact => (head, 4),
            _ => return 0,
        };
        let length = |entry: &[u8]| entry.first_chunk().map_or(0, |b| usize::from(u16::from_le_bytes(*b)));
        lengths.chunks_exact(step).map(length).sum()
    }

    /// Bytes from one row of a matrix to the next, without a stream: codes and scales up to a multiple of 16, the same of
    /// the coarse plane, the head.
    pub fn row_stride(self, columns: usize) -> usize {
        let base = (self.code_bytes(columns) + self.scale_bytes(columns)).next_multiple_of(16);
        base + self.coarse_bytes(columns).next_multiple_of(16) + self.head_bytes(columns)
    }

    /// The first column of `row` whose weight is NaN or infinite; in quantised encodings the first of a group whose
    /// scale is.
    pub fn first_not_finite(self, row: RowRef<'_>) -> Option<usize> {
        if self.has_stream() {
            let mut bits = vec![0; self.columns(row)];
            crate::Kernels::detect().decode(self, row, &mut bits);
            return bits.iter().position(|b| b & 0x7f80 == 0x7f80);
        }
        // Sixteen bits with all exponent bits set.
        let (bytes, exponent, step) = match self {
            Encoding::Bf16 => (row.codes, 0x7f80, 1),
            _ => (row.scales, 0x7c00, GROUP),
        };
        let special = |b: &[u8; 2]| u16::from_le_bytes(*b) & exponent == exponent;
        let (halves, _) = bytes.as_chunks::<2>();
        // Without a way out in the middle this is vector code, and the rule is that there is nothing to find.
        let any = halves.iter().fold(false, |any, b| any | special(b));
        if any { halves.iter().position(special).map(|i| i * step) } else { None }
    }

    /// Whether every weight of `row` is zero because of its scales, or in exact encodings by itself.
    pub fn is_zero(self, row: RowRef<'_>) -> bool {
        if self.has_stream() {
            let mut bits = vec![0; self.columns(row)];
            crate::Kernels::detect().decode(self, row, &mut bits);
            return bits.iter().all(|b| b & 0x7fff == 0);
        }
        let bytes = if self == Encoding::Bf16 { row.codes } else { row.scales };
        bytes.as_chunks::<2>().0.iter().all(|b| u16::from_le_bytes(*b) & 0x7fff == 0)
    }

    /// Columns of `row`.
    fn columns(self, row: RowRef<'_>) -> usize {
        match self.base() {
            Encoding::Bf16 => row.codes.len() / 2,
            Encoding::Bf16x => row.codes.len() - row.codes.len().div_ceil(BLOCK / 4 * 5) * (BLOCK / 4),
            Encoding::Q8 => row.codes.len(),
            _ => row.codes.len() * 2,
        }
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
            .ok_or_else(|| format!("unknown encoding {s:?}; expected one of {}", Self::ALL.map(Self::name).join(", ")))
    }
}

/// One encoded row, borrowed: its planes, each empty where the encoding has none.
#[derive(Debug, Clone, Copy, Default)]
pub struct RowRef<'a> {
    /// [`Encoding::code_bytes`] bytes.
    pub codes: &'a [u8],
    /// [`Encoding::scale_bytes`] bytes.
    pub scales: &'a [u8],
    /// [`Encoding::coarse_bytes`] bytes.
    pub coarse: &'a [u8],
    /// [`Encoding::head_bytes`] bytes.
    pub head: &'a [u8],
    /// [`Encoding::stream_bytes`] bytes, and whatever comes after them.
    pub stream: &'a [u8],
}

impl<'a> RowRef<'a> {
    /// The row at the start of `bytes`, in the layout of a matrix row: what [`Encoding::row_stride`] counts, then the
    /// stream.
    ///
    /// # Panics
    /// If `bytes` is shorter than a row.
    #[inline]
    pub fn from_matrix_row(encoding: Encoding, columns: usize, bytes: &'a [u8]) -> Self {
        let (code_bytes, scale_bytes) = (encoding.code_bytes(columns), encoding.scale_bytes(columns));
        let (codes, rest) = bytes.split_at(code_bytes);
        let mut row = RowRef { codes, scales: &rest[..scale_bytes], ..RowRef::default() };
        if encoding != encoding.base() || encoding.has_stream() {
            let coarse_at = (code_bytes + scale_bytes).next_multiple_of(16);
            let coarse_bytes = encoding.coarse_bytes(columns);
            row.coarse = &bytes[coarse_at..coarse_at + coarse_bytes];
            let tail = &bytes[coarse_at + coarse_bytes.next_multiple_of(16)..];
            (row.head, row.stream) = tail.split_at(encoding.head_bytes(columns));
        }
        row
    }
}
