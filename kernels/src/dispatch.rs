use crate::{BundleLayout, Encoding, PreparedInput, RowRef, exact, reference};
use std::cell::Cell;

/// An instruction set that there are kernels for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 F, BW, VL.
    Avx512,
    /// AVX2, FMA, F16C.
    Avx2,
    /// Plain Rust, which the compiler vectorises for the target's baseline.
    Portable,
}

impl Isa {
    /// Best first.
    pub const ALL: [Isa; 3] = [Isa::Avx512, Isa::Avx2, Isa::Portable];

    /// Whether this CPU has it.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx512 | Isa::Avx2 => false,
            Isa::Portable => true,
        }
    }

    /// The name shown by `doctor`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Portable => "portable",
        }
    }
}

/// The row kernels of one instruction set. Inputs and sums are f32, or prepared for the rows of one encoding; on one
/// CPU, within a set, a result depends on its inputs only, never on the alignment, on the rows beside it or on what
/// else runs, so that all tiers and thread counts agree to the bit.
#[derive(Debug, Clone, Copy)]
pub struct Kernels {
    isa: Isa,
}

impl Kernels {
    /// The kernels of `isa`, or `None` if this CPU lacks it.
    pub fn new(isa: Isa) -> Option<Self> {
        isa.is_available().then_some(Self { isa })
    }

    /// The best that this CPU has.
    pub fn detect() -> Self {
        Isa::ALL.into_iter().find_map(Self::new).unwrap_or(Self { isa: Isa::Portable })
    }

    /// Which instruction set these are for.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// `N` dot products with one input: `sum_j rows[n]_j * x_j`.
    ///
    /// # Panics
    /// If a row is shorter than `x`, or `x` is not whole groups for a quantised encoding.
    #[inline]
    pub fn dots<const N: usize>(&self, encoding: Encoding, rows: [RowRef<'_>; N], x: &[f32]) -> [f32; N] {
        self.dots_ahead(encoding, rows, x, &[])
    }

    /// Takes `x` for [`Kernels::prepared_dots`] of rows in `encoding`: work for one layer, not for one row. What is made for
    /// `q4` serves rows in every other encoding as well.
    pub fn prepare(&self, encoding: Encoding, x: &[f32], input: &mut PreparedInput) {
        input.values.clear();
        input.values.extend_from_slice(x);
        input.is_fixed = false;
        #[cfg(target_arch = "x86_64")]
        if self.isa == Isa::Avx512
            && matches!(encoding, Encoding::Q4 | Encoding::R4)
            && encoding.accepts(x.len())
            && is_x86_feature_detected!("avx512vnni")
        {
            // SAFETY: a `Kernels` of this set exists only where the CPU has it, and VNNI was looked for.
            input.is_fixed = unsafe { crate::x86::vnni::fix(x, &mut input.fixed) };
        }
    }

    /// As [`Kernels::dots`], with an input that [`Kernels::prepare`] made of `x` for this encoding or for `q4`. Results differ from
    /// those of [`Kernels::dots`] by roundings: whoever compares rows must take one of the two for all.
    ///
    /// # Panics
    /// As [`Kernels::dots`].
    #[inline]
    pub fn prepared_dots<const N: usize>(
        &self,
        encoding: Encoding,
        rows: [RowRef<'_>; N],
        input: &PreparedInput,
    ) -> [f32; N] {
        self.prepared_dots_ahead(encoding, rows, input, &[])
    }

    #[inline]
    fn prepared_dots_ahead<const N: usize>(
        &self,
        encoding: Encoding,
        rows: [RowRef<'_>; N],
        input: &PreparedInput,
        ahead: &[&[u8]],
    ) -> [f32; N] {
        #[cfg(target_arch = "x86_64")]
        if input.is_fixed && self.isa == Isa::Avx512 && matches!(encoding, Encoding::Q4 | Encoding::R4) {
            let columns = input.values.len();
            for row in &rows {
                check(encoding, row, columns);
            }
            // SAFETY: the set as in `dots_ahead`; inputs are fixed only where there is VNNI, from whole groups of as
            // many columns as were just checked.
            return unsafe { crate::x86::vnni::dots(rows, &input.fixed, columns / crate::GROUP, ahead) };
        }
        self.dots_ahead(encoding, rows, &input.values, ahead)
    }

    /// [`Kernels::dots`], asking for `ahead` meanwhile.
    #[inline]
    fn dots_ahead<const N: usize>(
        &self,
        encoding: Encoding,
        rows: [RowRef<'_>; N],
        x: &[f32],
        ahead: &[&[u8]],
    ) -> [f32; N] {
        if encoding.has_stream() {
            return self.decoded(encoding, rows, x.len(), |rows| self.dots_ahead(Encoding::Bf16, rows, x, ahead));
        }
        for row in &rows {
            check(encoding, row, x.len());
        }
        #[cfg(target_arch = "x86_64")]
        match self.isa {
            // SAFETY: a `Kernels` of this set exists only where the CPU has it; lengths were checked above.
            Isa::Avx512 => return unsafe { crate::x86::avx512::dots(encoding, rows, x, ahead) },
            // SAFETY: as above.
            Isa::Avx2 => return unsafe { crate::x86::avx2::dots(encoding, rows, x, ahead) },
            Isa::Portable => {}
        }
        // Plain loops do not wait for memory.
        let _ = ahead;
        rows.map(|row| reference::dot(encoding, row, x))
    }

    /// `y_j += a * row_j`.
    ///
    /// # Panics
    /// As [`Kernels::dots`].
    #[inline]
    pub fn axpy(&self, encoding: Encoding, row: RowRef<'_>, a: f32, y: &mut [f32]) {
        self.axpys(encoding, [row], [a], y, &[]);
    }

    /// `y_j += a[n] * rows[n]_j` for all n in order: the same to the bit as `N` calls of [`Kernels::axpy`], with one
    /// load and store of `y`. Memory that will be read soon, `ahead`, is asked for meanwhile.
    ///
    /// # Panics
    /// As [`Kernels::dots`].
    #[inline]
    pub fn axpys<const N: usize>(
        &self,
        encoding: Encoding,
        rows: [RowRef<'_>; N],
        a: [f32; N],
        y: &mut [f32],
        ahead: &[&[u8]],
    ) {
        if encoding.has_stream() {
            return self.decoded(encoding, rows, y.len(), |rows| self.axpys(Encoding::Bf16, rows, a, y, ahead));
        }
        for row in &rows {
            check(encoding, row, y.len());
        }
        #[cfg(target_arch = "x86_64")]
        match self.isa {
            // SAFETY: as in `dots_ahead`.
            Isa::Avx512 => return unsafe { crate::x86::avx512::axpys(encoding, rows, a, y, ahead) },
            // SAFETY: as in `dots_ahead`.
            Isa::Avx2 => return unsafe { crate::x86::avx2::axpys(encoding, rows, a, y, ahead) },
            Isa::Portable => {}
        }
        // Plain loops do not wait for memory.
        let _ = ahead;
        rows.into_iter().zip(a).for_each(|(row, a)| reference::axpy(encoding, row, a, y));
    }

    /// The bfloat16 bits of `row`, as long as `out`: the same as [`exact::decode`] for rows that were packed, any bits
    /// for others.
    ///
    /// # Panics
    /// If the encoding is not exact, or as [`Kernels::dots`].
    pub fn decode(&self, encoding: Encoding, row: RowRef<'_>, out: &mut [u16]) {
        self.decode_rows(encoding, [row], out.len(), out);
    }

    /// Rows of `columns` columns, one behind the other in `out`.
    fn decode_rows<const N: usize>(&self, encoding: Encoding, rows: [RowRef<'_>; N], columns: usize, out: &mut [u16]) {
        assert_eq!(out.len(), N * columns, "the rows' numbers");
        rows.iter().for_each(|row| check(encoding, row, columns));
        #[cfg(target_arch = "x86_64")]
        if self.isa == Isa::Avx512
            && encoding == Encoding::Bf16x
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("popcnt")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx512vbmi2")
        {
            // SAFETY: the features were just looked for, those of the set as in `dots_ahead`; lengths were checked.
            return unsafe { crate::x86::exact::bf16x(rows, columns, out) };
        }
        for (row, out) in rows.into_iter().zip(out.chunks_exact_mut(columns)) {
            self.decode_row(encoding, row, out);
        }
    }

    /// One row, where rows together are no faster; it was checked.
    fn decode_row(&self, encoding: Encoding, row: RowRef<'_>, out: &mut [u16]) {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("bmi2") && is_x86_feature_detected!("popcnt") {
            use crate::x86::{exact, exact_bmi2};
            match (self.isa, encoding) {
                // SAFETY: BMI2 and POPCNT were just looked for, the rest is the set's; lengths were checked.
                (Isa::Avx512, Encoding::Q4Exact) => return unsafe { exact::residual::<true>(row, out) },
                // SAFETY: as above.
                (Isa::Avx512, Encoding::Q8Exact) => return unsafe { exact::residual::<false>(row, out) },
                // SAFETY: as above.
                (Isa::Avx2, Encoding::Q4Exact) => return unsafe { exact_bmi2::residual::<true>(row, out) },
                // SAFETY: as above.
                (Isa::Avx2, Encoding::Q8Exact) => return unsafe { exact_bmi2::residual::<false>(row, out) },
                // SAFETY: as above; a CPU with AVX-512 has AVX2.
                (Isa::Avx2 | Isa::Avx512, Encoding::Bf16x) => return unsafe { exact_bmi2::bf16x(row, out) },
                _ => {}
            }
        }
        exact::decode(encoding, row, out);
    }

    /// `row` as f32, as [`unpack`](crate::unpack) gives it.
    ///
    /// # Panics
    /// As [`Kernels::dots`].
    pub fn unpack(&self, encoding: Encoding, row: RowRef<'_>, out: &mut [f32]) {
        if encoding.has_stream() {
            self.decoded(encoding, [row], out.len(), |[row]| crate::unpack(Encoding::Bf16, row, out));
        } else {
            crate::unpack(encoding, row, out);
        }
    }

    /// Calls `then` with `rows` as bfloat16, decoded into memory of this thread's: so the results are those of rows that
    /// are stored as bfloat16.
    fn decoded<const N: usize, T>(
        &self,
        encoding: Encoding,
        rows: [RowRef<'_>; N],
        columns: usize,
        then: impl FnOnce([RowRef<'_>; N]) -> T,
    ) -> T {
        thread_local!(static BITS: Cell<Vec<u16>> = const { Cell::new(Vec::new()) });
        // Taken, not borrowed: nothing that `then` does can find it in use.
        let mut bits = BITS.take();
        bits.resize(bits.len().max(N * columns), 0);
        self.decode_rows(encoding, rows, columns, &mut bits[..N * columns]);
        let rows = std::array::from_fn(|n| {
            let codes = bytemuck::cast_slice(&bits[n * columns..(n + 1) * columns]);
            RowRef { codes, ..RowRef::default() }
        });
        let result = then(rows);
        BITS.set(bits);
        result
    }

    /// Gate and up pre-activations of the neuron in `bundle` for a prepared input. Memory that will be read soon,
    /// `ahead`, is asked for meanwhile.
    #[inline]
    pub fn pre_activations(
        &self,
        layout: &BundleLayout,
        bundle: &[u8],
        input: &PreparedInput,
        ahead: &[&[u8]],
    ) -> (f32, f32) {
        let rows = [layout.row(bundle, 0), layout.row(bundle, 1)];
        let [g, u] = self.prepared_dots_ahead(layout.encoding(), rows, input, ahead);
        (g, u)
    }
}

#[inline]
fn check(encoding: Encoding, row: &RowRef<'_>, columns: usize) {
    assert!(
        encoding.accepts(columns)
            && row.codes.len() >= encoding.code_bytes(columns)
            && row.scales.len() >= encoding.scale_bytes(columns)
            && row.coarse.len() >= encoding.coarse_bytes(columns)
            && row.head.len() >= encoding.head_bytes(columns),
        "row too short, or not whole groups"
    );
}

/// Asks for all cache lines of `bytes`; a hint without effect on results.
#[inline]
pub fn prefetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes.chunks(64) {
        // SAFETY: a prefetch has no effect but on the caches, whatever the address; SSE is part of x86-64.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}
