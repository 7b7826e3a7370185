use super::trellis::{bit_of, subsets};
use half::bf16;

/// Columns of a sketch's row that share a scale code.
pub const SKETCH_UNIT: usize = 64;
/// Bytes of one bit of all of a unit's columns.
pub(crate) const PLANE_BYTES: usize = SKETCH_UNIT / 8;
/// Bytes of a unit's branch bits and first point bits.
pub(crate) const CODE_BYTES: usize = 2 * PLANE_BYTES;
/// The bfloat16 at a row's end.
const SCALE_BYTES: usize = 2;
/// The largest scale code of a unit.
const SCALE_CODE_MAX: f64 = 255.0;

/// Bits of a sketch's weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SketchBits {
    /// A branch bit and a point bit.
    Two,
    /// A branch bit and two point bits.
    Three,
}

impl SketchBits {
    /// Bits of a code.
    pub fn bits(self) -> usize {
        match self {
            SketchBits::Two => 2,
            SketchBits::Three => 3,
        }
    }

    /// Bytes of a row.
    ///
    /// # Panics
    /// If `columns` is zero or not a multiple of [`SKETCH_UNIT`].
    pub fn row_bytes(self, columns: usize) -> usize {
        let units = units(columns);
        units * (CODE_BYTES + self.high_bytes() + 1) + SCALE_BYTES
    }

    /// Bytes of a unit's second point bits.
    pub(super) fn high_bytes(self) -> usize {
        match self {
            SketchBits::Two => 0,
            SketchBits::Three => PLANE_BYTES,
        }
    }
}

fn units(columns: usize) -> usize {
    assert!(
        columns > 0 && columns.is_multiple_of(SKETCH_UNIT),
        "a sketch's {columns} columns, which must be whole units of {SKETCH_UNIT}"
    );
    columns / SKETCH_UNIT
}

/// The parts of one row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parts<'a> {
    /// Branch bits and first point bits, `[units, 2, 8]`.
    pub codes: &'a [u8],
    /// Second point bits, `[units, 8]`; empty in two bits.
    pub high: &'a [u8],
    /// Scale codes, `[units]`.
    pub scales: &'a [u8],
    /// The row's scale.
    pub scale: f32,
}

impl<'a> Parts<'a> {
    /// # Panics
    /// If `row` is not as long as a row.
    #[inline]
    pub(crate) fn new(bits: SketchBits, columns: usize, row: &'a [u8]) -> Self {
        assert_eq!(row.len(), bits.row_bytes(columns), "the bytes of a sketch's row");
        let units = columns / SKETCH_UNIT;
        let (codes, rest) = row.split_at(units * CODE_BYTES);
        let (high, rest) = rest.split_at(units * bits.high_bytes());
        let (scales, scale) = rest.split_at(units);
        Self::of(codes, high, scales, scale)
    }

    #[inline]
    fn of(codes: &'a [u8], high: &'a [u8], scales: &'a [u8], scale: &[u8]) -> Self {
        Self { codes, high, scales, scale: bf16::from_le_bytes([scale[0], scale[1]]).to_f32() }
    }

    /// Branch bits (plane 0) or point bits (planes 1 and 2) of unit `u`.
    fn word(&self, plane: usize, u: usize) -> u64 {
        let at = match plane {
            0 | 1 => &self.codes[u * CODE_BYTES + plane * PLANE_BYTES..],
            _ => &self.high[u * PLANE_BYTES..],
        };
        at.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    /// The levels and the scale of unit `u`, one column after the other.
    pub(crate) fn unit(&self, bits: SketchBits, u: usize) -> ([f32; SKETCH_UNIT], f32) {
        let before = if u > 0 { self.word(0, u - 1) } else { 0 };
        let [y0, y1] = subsets(self.word(0, u), before);
        let planes = [y0, y1, self.word(1, u), if bits == SketchBits::Three { self.word(2, u) } else { 0 }];
        let levels = bits.levels();
        let level = |column| {
            let index = planes.iter().rev().fold(0, |index, plane| 2 * index + (plane >> bit_of(column) & 1) as usize);
            f32::from(levels[index])
        };
        (std::array::from_fn(level), self.scale * f32::from(self.scales[u]))
    }
}

/// A row's scale: the least bfloat16 with which the largest of the wished scales needs no code above 255.
fn row_scale(scales: &[f32]) -> bf16 {
    assert!(scales.iter().all(|s| s.is_finite() && *s >= 0.0), "a sketch's scale that is negative or not finite");
    let largest = scales.iter().fold(0.0, |max: f32, s| max.max(*s));
    if largest == 0.0 {
        return bf16::ZERO;
    }
    // Up to an f32 that is not below the quotient, and from it up to a bfloat16: in f64, so that nothing vanishes.
    let wish = f64::from(largest) / SCALE_CODE_MAX;
    let nearest = wish as f32;
    let above = if f64::from(nearest) < wish { nearest.next_up() } else { nearest };
    bf16::from_bits(((above.to_bits() + 0xffff) >> 16) as u16)
}

/// The code of a unit's scale: the nearest.
fn scale_code(wish: f32, row_scale: bf16) -> u8 {
    match row_scale.to_f64() {
        0.0 => 0,
        scale => (f64::from(wish) / scale).round() as u8,
    }
}

/// The scales that [`sketch_row`] stores for the wished ones, as they are read back, both `[columns / 64]`: those that codes
/// should be chosen for.
///
/// # Panics
/// If the lengths differ, or a scale is negative or not finite.
pub fn sketch_scales(scales: &[f32], out: &mut [f32]) {
    assert_eq!(scales.len(), out.len(), "scales of a sketch's units");
    let scale = row_scale(scales);
    for (out, wish) in out.iter_mut().zip(scales) {
        *out = scale.to_f32() * f32::from(scale_code(*wish, scale));
    }
}

/// Writes a row: `codes` `[columns]`, the branch bit of each column in bit 0 and its point bits above, which
/// [`super::trellis`] explains; `scales` `[columns / 64]`, the wished value of one in each unit; `out` [`SketchBits::row_bytes`]
/// long. [`sketch_scales`] says what becomes of the scales. Those from about 2^120 on can make values infinite.
///
/// # Panics
/// If the lengths do not fit, a code has further bits, or a scale is negative or not finite.
pub fn sketch_row(bits: SketchBits, codes: &[u8], scales: &[f32], out: &mut [u8]) {
    let units = units(codes.len());
    assert_eq!(scales.len(), units, "scales of a sketch's units");
    assert_eq!(out.len(), bits.row_bytes(codes.len()), "the bytes of a sketch's row");
    assert!(codes.iter().all(|c| c >> bits.bits() == 0), "a sketch's code of too many bits");
    let (low, rest) = out.split_at_mut(units * CODE_BYTES);
    let (high, rest) = rest.split_at_mut(units * bits.high_bytes());
    for (u, codes) in codes.chunks_exact(SKETCH_UNIT).enumerate() {
        let word = |plane: usize| {
            let bits = codes.iter().enumerate().map(|(column, code)| u64::from(code >> plane & 1) << bit_of(column));
            bits.fold(0, |word, bit| word | bit).to_le_bytes()
        };
        let (branches, points) = low[u * CODE_BYTES..][..CODE_BYTES].split_at_mut(PLANE_BYTES);
        branches.copy_from_slice(&word(0));
        points.copy_from_slice(&word(1));
        if bits == SketchBits::Three {
            high[u * PLANE_BYTES..][..PLANE_BYTES].copy_from_slice(&word(2));
        }
    }
    let scale = row_scale(scales);
    let (scale_codes, last) = rest.split_at_mut(units);
    scale_codes.iter_mut().zip(scales).for_each(|(code, wish)| *code = scale_code(*wish, scale));
    last.copy_from_slice(&scale.to_le_bytes());
}

/// The values of a row, `[columns]`: plain loops, exact.
///
/// # Panics
/// If `out` is not whole units, or `row` not as long as a row of so many columns.
pub fn unsketch(bits: SketchBits, row: &[u8], out: &mut [f32]) {
    let parts = Parts::new(bits, out.len(), row);
    for (u, out) in out.chunks_exact_mut(SKETCH_UNIT).enumerate() {
        let (levels, scale) = parts.unit(bits, u);
        out.iter_mut().zip(levels).for_each(|(out, level)| *out = scale * level);
    }
}

/// How the rows of a sketch lie.
#[derive(Debug, Clone, Copy)]
enum Arrangement {
    /// One behind the other.
    Rows,
    /// Taken apart, as [`super::sketch_planes`] does.
    #[cfg(feature = "cuda")]
    Planes,
}

/// A sketch of some rows, borrowed; nothing of it is aligned.
#[derive(Debug, Clone, Copy)]
pub struct SketchMatrix<'a> {
    bits: SketchBits,
    columns: usize,
    row_bytes: usize,
    n_rows: usize,
    arrangement: Arrangement,
    bytes: &'a [u8],
}

impl<'a> SketchMatrix<'a> {
    /// Of rows one behind the other, `[rows, row_bytes]`.
    ///
    /// # Panics
    /// If `columns` is zero or not a multiple of [`SKETCH_UNIT`], or `bytes` are not whole rows.
    pub fn new(bits: SketchBits, columns: usize, bytes: &'a [u8]) -> Self {
        Self::arranged(bits, columns, Arrangement::Rows, bytes)
    }

    /// Of rows that [`sketch_planes`](super::sketch_planes) has taken apart.
    ///
    /// # Panics
    /// As [`SketchMatrix::new`].
    #[cfg(feature = "cuda")]
    pub fn of_planes(bits: SketchBits, columns: usize, bytes: &'a [u8]) -> Self {
        Self::arranged(bits, columns, Arrangement::Planes, bytes)
    }

    fn arranged(bits: SketchBits, columns: usize, arrangement: Arrangement, bytes: &'a [u8]) -> Self {
        let row_bytes = bits.row_bytes(columns);
        assert!(bytes.len().is_multiple_of(row_bytes), "a sketch's {} bytes, in rows of {row_bytes}", bytes.len());
        Self { bits, columns, row_bytes, n_rows: bytes.len() / row_bytes, arrangement, bytes }
    }

    /// Bits of a weight.
    pub fn bits(&self) -> SketchBits {
        self.bits
    }

    /// Columns of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Rows.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// The bytes of row `i`.
    ///
    /// # Panics
    /// If there is no such row, or rows are taken apart.
    #[inline]
    pub fn row(&self, i: usize) -> &'a [u8] {
        assert!(i < self.n_rows, "row {i} of a sketch's {}", self.n_rows);
        assert!(matches!(self.arrangement, Arrangement::Rows), "a row that is taken apart");
        &self.bytes[i * self.row_bytes..][..self.row_bytes]
    }

    /// The parts of row `i`.
    ///
    /// # Panics
    /// If there is no such row.
    #[inline]
    pub(crate) fn parts(&self, i: usize) -> Parts<'a> {
        match self.arrangement {
            Arrangement::Rows => Parts::new(self.bits, self.columns, self.row(i)),
            #[cfg(feature = "cuda")]
            Arrangement::Planes => {
                assert!(i < self.n_rows, "row {i} of a sketch's {}", self.n_rows);
                let [codes, high, scales, row_scales] = self.planes();
                let of_row = |plane: &'a [u8]| &plane[plane.len() / self.n_rows * i..][..plane.len() / self.n_rows];
                Parts::of(of_row(codes), of_row(high), of_row(scales), of_row(row_scales))
            }
        }
    }

    /// Codes, second point bits, scale codes and scales of all rows.
    #[cfg(feature = "cuda")]
    #[inline]
    fn planes(&self) -> [&'a [u8]; 4] {
        let (n, units) = (self.n_rows, self.columns / SKETCH_UNIT);
        let (codes, rest) = self.bytes.split_at(n * units * CODE_BYTES);
        let (high, rest) = rest.split_at(n * units * self.bits.high_bytes());
        let (row_scales, scales) = rest.split_at(n * SCALE_BYTES);
        [codes, high, scales, row_scales]
    }

    /// What should be asked for before `rows` are read: all of their codes.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    pub(crate) fn ahead(&self, rows: std::ops::Range<usize>) -> [&'a [u8]; 2] {
        match self.arrangement {
            Arrangement::Rows => [&self.bytes[rows.start * self.row_bytes..rows.end * self.row_bytes], &[]],
            #[cfg(feature = "cuda")]
            Arrangement::Planes => {
                let [codes, high, ..] = self.planes();
                [codes, high].map(|plane| {
                    let of_row = plane.len() / self.n_rows.max(1);
                    &plane[rows.start * of_row..rows.end * of_row]
                })
            }
        }
    }
}
