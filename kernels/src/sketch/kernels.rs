use super::{SKETCH_UNIT, SketchInput, SketchMatrix};
#[cfg(target_arch = "x86_64")]
use crate::{Isa, x86::sketch};
use crate::{Kernels, ops};

impl Kernels {
    /// Dot products of the rows from `first` on with `x`, which has as many columns and was made by these kernels, one for each element of `out`.
    ///
    /// Rows are read once, one behind the other: `bits / 8 + 1/64` bytes a weight. One core of an Intel Xeon with AVX-512, VNNI and
    /// VBMI multiplies 25 billion weights of two bits a second from memory and 28 from its caches, of three bits 20 and 26, that is 7
    /// and 8 of the 10 GB/s of a plain read; without VNNI 18 and 16, by AVX2 13 and 9, by AVX2 with AVX-VNNI 16 and 15: instructions
    /// are the bound.
    ///
    /// # Panics
    /// If `x` is not as long as a row, or there are not so many rows.
    pub fn sketch_dots(&self, matrix: SketchMatrix<'_>, first: usize, x: &SketchInput, out: &mut [f32]) {
        assert_eq!(x.values.len(), matrix.columns(), "a sketch's input");
        assert_eq!(x.isa, self.isa(), "an input that other kernels have taken");
        assert!(
            first <= matrix.n_rows() && out.len() <= matrix.n_rows() - first,
            "rows {first} to {first} + {} of a sketch's {}",
            out.len(),
            matrix.n_rows()
        );
        #[cfg(target_arch = "x86_64")]
        match self.isa() {
            // SAFETY: a `Kernels` of this set exists only where the CPU has it, an input of theirs in fixed point where it can be;
            // lengths were checked above.
            Isa::Avx512 => return unsafe { sketch::dots::<sketch::Avx512>(matrix, first, x, out) },
            // SAFETY: as above.
            Isa::Avx2 => return unsafe { sketch::dots::<sketch::Avx2>(matrix, first, x, out) },
            Isa::Portable => {}
        }
        for (i, out) in out.iter_mut().enumerate() {
            *out = dot(matrix, first + i, &x.values);
        }
    }

    /// `y_j += a[i] * rows[i]_j` for all i in order, `y` `[columns]`: the same to the bit as a call for each row, with
    /// fewer loads and stores of `y`. Bounded as [`Kernels::sketch_dots`] is; rows further down the list are asked for
    /// meanwhile.
    ///
    /// # Panics
    /// If `y` is not as long as a row, `a` not as long as `rows`, or there is no such row.
    pub fn sketch_axpys(&self, matrix: SketchMatrix<'_>, rows: &[u32], a: &[f32], y: &mut [f32]) {
        assert_eq!(y.len(), matrix.columns(), "a sketch's output");
        assert_eq!(rows.len(), a.len(), "factors of a sketch's rows");
        let n_rows = matrix.n_rows();
        assert!(rows.iter().all(|r| (*r as usize) < n_rows), "a row beyond a sketch's {n_rows}");
        #[cfg(target_arch = "x86_64")]
        match self.isa() {
            // SAFETY: as in `sketch_dots`.
            Isa::Avx512 => return unsafe { sketch::axpys::<sketch::Avx512>(matrix, rows, a, y) },
            // SAFETY: as in `sketch_dots`.
            Isa::Avx2 => return unsafe { sketch::axpys::<sketch::Avx2>(matrix, rows, a, y) },
            Isa::Portable => {}
        }
        for (row, a) in rows.iter().zip(a) {
            axpy(matrix, *row as usize, *a, y);
        }
    }
}

/// Plain loops, a unit at a time.
fn dot(matrix: SketchMatrix<'_>, row: usize, x: &[f32]) -> f32 {
    let (bits, parts) = (matrix.bits(), matrix.parts(row));
    let units = x.chunks_exact(SKETCH_UNIT).enumerate();
    units
        .map(|(u, x)| {
            let (levels, scale) = parts.unit(bits, u);
            scale * ops::dot(&levels, x)
        })
        .sum()
}

/// As [`dot`].
fn axpy(matrix: SketchMatrix<'_>, row: usize, a: f32, y: &mut [f32]) {
    let (bits, parts) = (matrix.bits(), matrix.parts(row));
    for (u, y) in y.chunks_exact_mut(SKETCH_UNIT).enumerate() {
        let (levels, scale) = parts.unit(bits, u);
        ops::axpy(a * scale, &levels, y);
    }
}
