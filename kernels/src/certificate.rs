//! A cheap proof that a row's dot product, as the exact kernel would compute it, is below zero.
//!
//! A ReLU neuron is zero where its gate is not positive, and most gates are far from positive: an 8-bit copy of the row,
//! half of a bf16 row's bytes and a quarter of its instructions, is enough to see that.
//!
//! # Why a certified dot product is negative
//!
//! Let `w` be the row and `x` the input, both `n` long, `w' = s c` and `x' = t q` their quantised forms (`c` of 8 bits,
//! `q` of 16, `s` and `t` one scale each) and `|.|` the Euclidean norm. What the kernels compute, in whatever order, is
//! `w.x` with an error of at most `g |w| |x|`, where `g = (n + 8) 2^-24 / (1 - (n + 8) 2^-24)`: every product passes
//! through at most `n` additions and three multiplications (Higham, *Accuracy and Stability*, 3.1; the sum of the
//! absolute products is at most `|w| |x|`). The fixed point of [`PreparedInput`](crate::PreparedInput) stays within it:
//! it leaves out at most `1.004 * 2^-23` of a group's largest magnitude, over the group `12 * 2^-24 |w| |x|`, and
//! rounds `n / 128 + 6` times, with `n` at least 32. (Its least step, 2^-100, is nothing beside an input that is
//! accepted below.) Where products underflow, 2^-118 in all comes on top. By the inequality of Cauchy and Schwarz
//!
//! ```text
//! w.x  =  w'.x' + (w - w').x' + w.(x - x')  <=  s t (c.q)  +  |w - w'| |x'|  +  |w| |x - x'|
//! ```
//!
//! `c.q` is an exact integer. `|w - w'|` is known from loading, `|x - x'|` is at most `0.55 t sqrt(n)`: half a step, and
//! what an f32 product by `1 / t` adds to it. The few f32 roundings of this side take the place of 56 more in `g`: with
//! at most 2^15 columns, `|w'|` is at most `|w| + |w - w'|`, which stands for `|w|` below, and the parts of `q` are not
//! larger together than `3 |q|`. Norms are computed in f64 and enlarged by a millionth before they become f32. The dot
//! product is certified if the right-hand side with all this is below -10^-30, which is far more than what underflows.
//!
//! Nothing is certified for values that could overflow or are not finite: [`Certificate::new`] and [`QuantisedInput::set`]
//! refuse magnitudes from 10^12 on, so that every dot product of what they accept is a finite number, certified or not.

use crate::{AlignedBuf, AllocError, Isa, Kernels};

/// Rows that are judged together, one bit each of a word.
pub const CERTIFIED_ROWS: usize = 32;
/// Columns of one row that lie together: what one lane of an integer dot product takes.
const STEP: usize = 4;
/// Sums of `u8 * i8` over many more columns could overflow an i32, and the derivation above uses it too.
const MOST_COLUMNS: usize = 1 << 15;
/// Magnitudes outside are not quantised: products of two of these neither overflow nor vanish.
const MAGNITUDES: std::ops::Range<f32> = 1e-12..1e12;
/// The largest code of an input: its upper and lower bytes, both signed, hold it with room for one rounding up.
const INPUT_LEVELS: f32 = 32_512.0;
/// 1.5 * 2^23: added to an f32 below 2^22 it leaves the nearest integer in the lowest bits. (The standard library's rounding
/// is a call for each value where SSE 4.1 is not taken for granted.)
const ROUNDER: f32 = 12_582_912.0;
/// How far below zero a bound must be; more than anything that underflows.
pub(crate) const MARGIN: f32 = 1e-30;
/// Makes an f64 norm an upper bound that stays one as f32 and through two f32 operations.
const ROUND_UP: f64 = 1.0 + 1e-6;

/// The 8-bit copy of some rows, and what its rounding can do to a dot product.
///
/// Codes are unsigned, 128 above the signed ones. 32 rows lie together: their first four columns row by row, then the next
/// four; an integer vector then holds one row a lane, and no sum over lanes is needed.
#[derive(Debug)]
pub struct Certificate {
    codes: AlignedBuf,
    factors: Vec<Factors>,
    rows: usize,
    steps: usize,
}

/// What 32 rows need besides their codes.
#[derive(Debug, Clone)]
pub(crate) struct Factors {
    /// The value of one code step.
    pub scale: [f32; CERTIFIED_ROWS],
    /// At least the norm of what the codes leave out.
    pub error: [f32; CERTIFIED_ROWS],
    /// At least the norm of the row and that of what the codes leave out together; infinite where no code could be found.
    pub norm: [f32; CERTIFIED_ROWS],
}

/// An input as the certificate needs it.
#[derive(Debug, Default)]
pub struct QuantisedInput {
    /// Four codes' upper bytes and four codes' lower bytes, as they stand in memory.
    pub(crate) codes: Vec<[i32; 2]>,
    /// 128 times the sums of the bytes: what the rows' offset adds to every dot product.
    pub(crate) offsets: [i32; 2],
    pub(crate) scale: f32,
    /// At least the norm of the quantised input.
    pub(crate) norm: f32,
    /// At least the norm of what quantising left out, with the exact kernel's roundings.
    pub(crate) error: f32,
}

/// The integer dot products of 32 rows with the upper and the lower bytes, offset included.
type Sums = [[i32; CERTIFIED_ROWS]; 2];

impl Certificate {
    /// Memory that a certificate takes.
    pub fn bytes(rows: usize, columns: usize) -> u64 {
        let (blocks, steps) = (rows.div_ceil(CERTIFIED_ROWS), columns.div_ceil(STEP));
        let codes = (blocks * steps * STEP * CERTIFIED_ROWS).next_multiple_of(4096);
        (codes + blocks * size_of::<Factors>()) as u64
    }

    /// The certificate of `rows` rows of `columns` values; `row(r, out)` decodes one. `None` if there are too many
    /// columns, or a value is so large, or no number, that a dot product could overflow.
    ///
    /// # Errors
    /// If the system has no memory for it.
    pub fn new(rows: usize, columns: usize, row: impl Fn(usize, &mut [f32])) -> Result<Option<Self>, AllocError> {
        let (blocks, steps) = (rows.div_ceil(CERTIFIED_ROWS), columns.div_ceil(STEP));
        if columns > MOST_COLUMNS {
            return Ok(None);
        }
        let mut codes = AlignedBuf::zeroed(blocks * steps * STEP * CERTIFIED_ROWS)?;
        let none = [0.0; CERTIFIED_ROWS];
        let mut factors = vec![Factors { scale: none, error: none, norm: [f32::INFINITY; CERTIFIED_ROWS] }; blocks];
        let mut values = vec![0.0; columns];
        for r in 0..rows {
            row(r, &mut values);
            if !values.iter().all(|v| v.abs() < MAGNITUDES.end) {
                return Ok(None);
            }
            let largest = values.iter().fold(0.0f32, |max, v| max.max(v.abs()));
            let (block, lane) = (r / CERTIFIED_ROWS, r % CERTIFIED_ROWS);
            if !MAGNITUDES.contains(&largest) {
                continue;
            }
            let scale = largest / 127.0;
            let (mut norm, mut error) = (0.0, 0.0);
            for (j, &v) in values.iter().enumerate() {
                let code = (v / scale).round_ties_even();
                norm += f64::from(v).powi(2);
                error += (f64::from(v) - f64::from(code) * f64::from(scale)).powi(2);
                let step = block * steps + j / STEP;
                codes[(step * CERTIFIED_ROWS + lane) * STEP + j % STEP] = (code as i32 + 128) as u8;
            }
            let (norm, error) = (norm.sqrt(), error.sqrt());
            let f = &mut factors[block];
            f.scale[lane] = scale;
            f.error[lane] = (error * ROUND_UP) as f32;
            f.norm[lane] = ((norm + error) * ROUND_UP) as f32;
        }
        Ok(Some(Self { codes, factors, rows, steps }))
    }

    /// Rows that it is about.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Bytes that judging 32 rows reads.
    pub fn block_bytes(&self) -> usize {
        self.steps * STEP * CERTIFIED_ROWS + size_of::<Factors>()
    }

    /// Which of the rows from `32 * block` on have a negative dot product with the input: a bit for each, the first the
    /// lowest. A bit that is not set says nothing; those behind the last row are not set.
    ///
    /// # Panics
    /// If there is no such block, or the input has another length.
    #[inline]
    pub fn negative(&self, kernels: &Kernels, block: usize, x: &QuantisedInput) -> u32 {
        assert_eq!(x.codes.len(), self.steps, "the input's length");
        let bytes = self.steps * STEP * CERTIFIED_ROWS;
        let codes = &self.codes[block * bytes..(block + 1) * bytes];
        let factors = &self.factors[block];
        #[cfg(target_arch = "x86_64")]
        match kernels.isa() {
            Isa::Avx512 if is_x86_feature_detected!("avx512vnni") => {
                // SAFETY: a `Kernels` of this set exists only where the CPU has it, VNNI was looked for, and there are
                // 128 bytes of codes for each of the input's steps.
                return unsafe { crate::x86::avx512::certificate(codes, factors, x) };
            }
            Isa::Avx512 | Isa::Avx2 => {
                // SAFETY: CPUs with AVX-512 have AVX2; lengths as above.
                let sums = unsafe { crate::x86::avx2::certificate_sums(codes, &x.codes) };
                return judge(factors, &sums, x);
            }
            Isa::Portable => {}
        }
        judge(factors, &portable_sums(codes, &x.codes), x)
    }
}

impl QuantisedInput {
    /// Memory for an input of `columns`.
    pub fn bytes(columns: usize) -> u64 {
        (columns.div_ceil(STEP) * size_of::<[i32; 2]>()) as u64
    }

    /// Takes `x`; false if it has a value that is too large or no number, or too many, or nothing but tiny ones. Nothing may
    /// then be judged by it.
    #[must_use]
    pub fn set(&mut self, x: &[f32]) -> bool {
        // The order of magnitudes is that of their bits, with what is no number above everything else.
        let largest = x.iter().fold(0, |max: u32, v| max.max(v.abs().to_bits()));
        let largest = f32::from_bits(largest);
        if !MAGNITUDES.contains(&largest) || x.len() > MOST_COLUMNS {
            return false;
        }
        let inverse = INPUT_LEVELS / largest;
        self.scale = largest / INPUT_LEVELS;
        let (mut sums, mut squares) = ([[0i32; STEP]; 2], [0.0f64; STEP]);
        let mut quantise = |x: &[f32; STEP]| {
            let codes = x.map(|v| (v * inverse + ROUNDER).to_bits() as i32 - ROUNDER.to_bits() as i32);
            let upper = codes.map(|c| (c + 128) >> 8);
            let lower: [i32; STEP] = std::array::from_fn(|j| codes[j] - 256 * upper[j]);
            for j in 0..STEP {
                squares[j] += f64::from(x[j]) * f64::from(x[j]);
                sums[0][j] += upper[j];
                sums[1][j] += lower[j];
            }
            [upper, lower].map(|part| i32::from_le_bytes(part.map(|c| c as u8)))
        };
        let (steps, rest) = x.as_chunks::<STEP>();
        self.codes.resize(x.len().div_ceil(STEP), [0; 2]);
        self.codes.iter_mut().zip(steps).for_each(|(codes, x)| *codes = quantise(x));
        if let Some(codes) = self.codes.get_mut(steps.len()) {
            let mut last = [0.0; STEP];
            last[..rest.len()].copy_from_slice(rest);
            *codes = quantise(&last);
        }
        self.offsets = sums.map(|s| 128 * s.iter().sum::<i32>());
        let n = x.len() as f64;
        let norm = squares.iter().sum::<f64>().sqrt();
        let error = 0.55 * f64::from(self.scale) * n.sqrt();
        let roundings = (n + 64.0) / f64::from(1 << 24);
        self.norm = ((norm + error) * ROUND_UP) as f32;
        self.error = ((error + roundings / (1.0 - roundings) * (norm + error)) * ROUND_UP) as f32;
        true
    }
}

fn portable_sums(codes: &[u8], x: &[[i32; 2]]) -> Sums {
    let mut sums = [[0; CERTIFIED_ROWS]; 2];
    for (codes, x) in codes.chunks_exact(STEP * CERTIFIED_ROWS).zip(x) {
        for (sums, x) in sums.iter_mut().zip(x) {
            let x = x.to_le_bytes().map(|b| i32::from(b as i8));
            for (sum, codes) in sums.iter_mut().zip(codes.as_chunks::<STEP>().0) {
                *sum += codes.iter().zip(x).map(|(&c, x)| i32::from(c) * x).sum::<i32>();
            }
        }
    }
    sums
}

fn judge(factors: &Factors, sums: &Sums, x: &QuantisedInput) -> u32 {
    let mut negative = [false; CERTIFIED_ROWS];
    for (r, negative) in negative.iter_mut().enumerate() {
        let [upper, lower] = [0, 1].map(|i| (sums[i][r] - x.offsets[i]) as f32);
        let value = (256.0 * upper + lower) * (factors.scale[r] * x.scale);
        let bound = factors.error[r] * x.norm + factors.norm[r] * x.error;
        *negative = value + bound < -MARGIN;
    }
    negative.iter().rev().fold(0, |bits, &n| bits << 1 | u32::from(n))
}
