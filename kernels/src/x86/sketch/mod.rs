//! Rows of sketches: which rows are taken together and what is asked for meanwhile, the same for all sets of
//! instructions; `avx512.rs` and `avx2.rs` have the rows themselves.

mod avx2;
mod avx2_vnni;
mod avx512;
mod avx512_vnni;

pub(crate) use avx2::Avx2;
pub(crate) use avx512::Avx512;

use super::Ahead;
use crate::sketch::{FixedUnits, INPUT_UNITS, Parts, SketchInput};
use crate::{PREFETCH_BYTES, SKETCH_UNIT, SketchBits, SketchMatrix};

/// Rows that are multiplied together: each has one sum, which would wait for its own last addition.
const DOTS: usize = 4;
/// Rows that are added in one pass.
const AXPYS: usize = 8;

/// Kernels of rows in one set of instructions; `HIGH` if they have second point bits.
pub(crate) trait Rows {
    /// Units that are decoded at once.
    const UNITS: usize;

    /// Asks for what is `ahead` once for each [`Rows::UNITS`] units.
    ///
    /// # Safety
    /// The CPU has the set, `rows` have `layout`, `x` has as many units.
    unsafe fn dots<const N: usize, const HIGH: bool>(
        layout: &Layout,
        rows: [Parts<'_>; N],
        x: &[f32],
        ahead: Ahead<'_>,
    ) -> [f32; N];

    /// Asks for what is `ahead` at each unit.
    ///
    /// # Safety
    /// As [`Rows::dots`], with `y` for `x`.
    unsafe fn axpys<const N: usize, const HIGH: bool>(
        layout: &Layout,
        rows: [Parts<'_>; N],
        a: [f32; N],
        y: &mut [f32],
        ahead: Ahead<'_>,
    );
}

/// The same kernels for inputs in fixed point, on CPUs that have more than the set.
pub(crate) trait FixedRows: Rows {
    /// How the units of [`FixedUnits`] lie.
    const ORDER: [usize; INPUT_UNITS];

    /// Whether the CPU has what these take besides the set.
    fn has_fixed() -> bool;

    /// As [`Rows::dots`].
    ///
    /// # Safety
    /// As there, and the CPU has what [`FixedRows::has_fixed`] asks for.
    unsafe fn fixed_dots<const N: usize, const HIGH: bool>(
        layout: &Layout,
        rows: [Parts<'_>; N],
        x: &[FixedUnits],
        ahead: Ahead<'_>,
    ) -> [f32; N];
}

/// How long rows are, and what their codes mean.
pub(crate) struct Layout {
    units: usize,
    /// The levels; in two bits twice, so that the fourth bit of an index does not matter.
    levels: [f32; 16],
    /// A level is one more than twice its byte.
    bytes: [i8; 16],
}

impl Layout {
    fn of(matrix: &SketchMatrix<'_>) -> Self {
        let levels = matrix.bits().levels();
        let level = |i| levels[i % levels.len()];
        let (levels, bytes) =
            (std::array::from_fn(|i| f32::from(level(i))), std::array::from_fn(|i| (level(i) >> 1) as i8));
        Self { units: matrix.columns() / SKETCH_UNIT, levels, bytes }
    }
}

/// As [`Kernels::sketch_dots`](crate::Kernels::sketch_dots).
///
/// # Safety
/// The CPU has the set; `x` is as long as a row, and in fixed point only where [`FixedRows::has_fixed`].
pub(crate) unsafe fn dots<R: FixedRows>(matrix: SketchMatrix<'_>, first: usize, x: &SketchInput, out: &mut [f32]) {
    match matrix.bits() {
        // SAFETY: by this function's contract.
        SketchBits::Two => unsafe { dots_of::<R, false>(matrix, first, x, out) },
        // SAFETY: as above.
        SketchBits::Three => unsafe { dots_of::<R, true>(matrix, first, x, out) },
    }
}

/// # Safety
/// As [`dots`]; `HIGH` is whether there are second point bits.
unsafe fn dots_of<R: FixedRows, const HIGH: bool>(
    matrix: SketchMatrix<'_>,
    first: usize,
    x: &SketchInput,
    out: &mut [f32],
) {
    let layout = Layout::of(&matrix);
    let is_fixed = !x.blocks.is_empty();
    let steps = layout.units.div_ceil(R::UNITS);
    let end = first + out.len();
    // Whole rows, as far ahead as other matrices' rows.
    let lead = DOTS + PREFETCH_BYTES.div_ceil(matrix.row_bytes());
    let (groups, rest) = out.as_chunks_mut::<DOTS>();
    let mut r = first;
    for group in groups {
        let ahead = matrix.ahead((r + lead).min(end)..(r + lead + DOTS).min(end));
        let rows = std::array::from_fn(|i| matrix.parts(r + i));
        // SAFETY: by this function's contract.
        *group = unsafe {
            if is_fixed {
                R::fixed_dots::<DOTS, HIGH>(&layout, rows, &x.blocks, Ahead::new(&ahead, steps))
            } else {
                R::dots::<DOTS, HIGH>(&layout, rows, &x.values, Ahead::new(&ahead, steps))
            }
        };
        r += DOTS;
    }
    for (out, r) in rest.iter_mut().zip(r..) {
        // SAFETY: as above.
        [*out] = unsafe {
            if is_fixed {
                R::fixed_dots::<1, HIGH>(&layout, [matrix.parts(r)], &x.blocks, Ahead::new(&[], 1))
            } else {
                R::dots::<1, HIGH>(&layout, [matrix.parts(r)], &x.values, Ahead::new(&[], 1))
            }
        };
    }
}

/// As [`Kernels::sketch_axpys`](crate::Kernels::sketch_axpys).
///
/// # Safety
/// The CPU has the set; `y` is as long as a row.
pub(crate) unsafe fn axpys<R: Rows>(matrix: SketchMatrix<'_>, rows: &[u32], a: &[f32], y: &mut [f32]) {
    match matrix.bits() {
        // SAFETY: by this function's contract.
        SketchBits::Two => unsafe { axpys_of::<R, false>(matrix, rows, a, y) },
        // SAFETY: as above.
        SketchBits::Three => unsafe { axpys_of::<R, true>(matrix, rows, a, y) },
    }
}

/// # Safety
/// As [`axpys`]; `HIGH` is whether there are second point bits.
unsafe fn axpys_of<R: Rows, const HIGH: bool>(matrix: SketchMatrix<'_>, rows: &[u32], a: &[f32], y: &mut [f32]) {
    let layout = Layout::of(&matrix);
    let row = |r: &u32| matrix.parts(*r as usize);
    let lead = AXPYS + PREFETCH_BYTES / matrix.row_bytes();
    let (groups, last) = rows.as_chunks::<AXPYS>();
    let (factors, last_factors) = a.as_chunks::<AXPYS>();
    for (i, (group, a)) in groups.iter().zip(factors).enumerate() {
        let soon = rows.get(i * AXPYS + lead..).unwrap_or(&[]);
        let ahead: [&[u8]; AXPYS] = std::array::from_fn(|n| soon.get(n).map_or(&[][..], |r| row(r).codes));
        let rows = group.each_ref().map(row);
        // SAFETY: by this function's contract.
        unsafe { R::axpys::<AXPYS, HIGH>(&layout, rows, *a, y, Ahead::new(&ahead, layout.units)) };
    }
    for (r, a) in last.iter().zip(last_factors) {
        // SAFETY: as above.
        unsafe { R::axpys::<1, HIGH>(&layout, [row(r)], [*a], y, Ahead::new(&[], 1)) };
    }
}
