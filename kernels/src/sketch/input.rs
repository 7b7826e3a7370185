use super::SKETCH_UNIT;
#[cfg(target_arch = "x86_64")]
use crate::x86::sketch::{Avx2, Avx512, FixedRows};
use crate::{Isa, Kernels};

/// Units whose digits lie together: a u64 of each in a vector.
pub(crate) const INPUT_UNITS: usize = 8;
/// Digits of a column.
const DIGITS: usize = 3;
/// Vectors of a digit of so many units: 8 columns of each unit, every other one of a stripe of 16.
pub(crate) const DIGIT_VECTORS: usize = 8;

/// The largest number of three signed digits.
const LARGEST: f32 = (0x7f_7f7f) as f32;
/// From the largest magnitude's exponent to the step's.
const STEP_EXPONENT: i32 = 22;
/// The least exponent of a unit's largest magnitude, as for [`PreparedInput`](crate::PreparedInput).
const LEAST_EXPONENT: i32 = -78;
/// Added to a number it leaves three unsigned bytes, each 128 above a digit.
const UNSIGNED: i32 = 0x80_8080;
/// Added to an f64 below 2^51 it leaves the nearest integer in the lowest bits.
const ROUNDS: f64 = 6_755_399_441_055_744.0;

/// The input of a layer, as the rows of its sketch are multiplied with it: made once by [`Kernels::sketch_input`], used for all of
/// them.
///
/// Where the CPU has AVX-512 VNNI and VBMI, or AVX-VNNI, products are those of integers. Within each unit of 64 columns `x_j` is then taken as
/// `t q_j`: `t` is a power of two, and `q_j` the nearest integer, of at most 24 bits with its sign. With `m` the largest magnitude of
/// the unit `|x_j - t q_j|` is at most `max(1.004 * 2^-23 m, 2^-101)`: all that the input loses. `q_j` is three signed digits of 8
/// bits; levels are one more than twice a byte, `l_j = 2 b_j + 1`, and `sum of b_j q_j` over the 32 columns of a lane is exact, in two
/// parts: the upper two digits and the lowest. What is rounded is the conversion of both, their sum with that of `q_j`, and one fused
/// addition for every eighth unit and lane:
///
/// ```text
/// |dot - sum w_j x_j|  <=  sum |w_j| max(1.004 * 2^-23 m, 2^-101)  +  (units / 8 + 12) 2^-24 sum |w_j t q_j|
/// ```
///
/// The loop over f32 products has about half a rounding for each column instead. An input with an infinity or a NaN is multiplied by
/// that loop.
#[derive(Debug, Clone)]
pub struct SketchInput {
    pub(crate) values: Vec<f32>,
    /// Empty if products are those of `values`.
    pub(crate) blocks: Vec<FixedUnits>,
    /// Whose kernels it is for.
    pub(crate) isa: Isa,
}

/// Eight units. Those that the last ones lack are zeros.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub(crate) struct FixedUnits {
    /// The lowest digit first. Byte i of lane u of vector 2 r + p is of column 16 r + 2 i + p of the unit that the kernels have
    /// in that lane: as a row's words come out of its bytes.
    pub digits: [[[[i8; 8]; INPUT_UNITS]; DIGIT_VECTORS]; DIGITS],
    /// -128 times the sum of the columns of half a unit, of the upper two digits together and of the lowest: bytes are stored 128 too
    /// large.
    pub offsets: [[[i32; 2]; INPUT_UNITS]; 2],
    /// The sum of `q_j` of the columns of half a unit.
    pub sums: [[f32; 2]; INPUT_UNITS],
    /// The unit's step, twice.
    pub steps: [[f32; 2]; INPUT_UNITS],
}

impl FixedUnits {
    const ZERO: Self = Self {
        digits: [[[[0; 8]; INPUT_UNITS]; DIGIT_VECTORS]; DIGITS],
        offsets: [[[0; 2]; INPUT_UNITS]; 2],
        sums: [[0.0; 2]; INPUT_UNITS],
        steps: [[0.0; 2]; INPUT_UNITS],
    };

    /// Takes the unit of `lane`; false if it has an infinity or a NaN.
    fn set(&mut self, lane: usize, x: &[f32; SKETCH_UNIT]) -> bool {
        // NaN is larger than anything here.
        let largest = x.iter().fold(0u32, |max, v| max.max(v.abs().to_bits()));
        if largest >= f32::INFINITY.to_bits() {
            return false;
        }
        let power_of_two = |exponent: i32| f32::from_bits(((exponent + 127) as u32) << 23);
        let exponent = ((largest >> 23) as i32 - 127).max(LEAST_EXPONENT) - STEP_EXPONENT;
        // What rounds to more than three digits have takes a step twice as large.
        let exponent = exponent + i32::from(f32::from_bits(largest) * power_of_two(-exponent) > LARGEST);
        let (step, inverse) = (power_of_two(exponent), f64::from(power_of_two(-exponent)));
        let (mut sums, mut lowest) = ([0i64; 2], [0i32; 2]);
        for (column, v) in x.iter().enumerate() {
            let q = (f64::from(*v) * inverse + ROUNDS).to_bits() as i32;
            let bytes = ((q + UNSIGNED) ^ UNSIGNED).to_le_bytes();
            let (stripe, i, odd) = (column / 16, column % 16 / 2, column % 2);
            for (digits, byte) in self.digits.iter_mut().zip(bytes) {
                digits[2 * stripe + odd][lane][i] = byte as i8;
            }
            sums[i / 4] += i64::from(q);
            lowest[i / 4] += i32::from(bytes[0] as i8);
        }
        for half in 0..2 {
            let upper = (sums[half] - i64::from(lowest[half])) >> 8;
            self.offsets[0][lane][half] = -128 * lowest[half];
            self.offsets[1][lane][half] = -128 * upper as i32;
            self.sums[lane][half] = sums[half] as f32;
        }
        self.steps[lane] = [step; 2];
        true
    }
}

impl SketchInput {
    /// Takes it apart; leaves nothing if it cannot.
    #[cfg(target_arch = "x86_64")]
    fn fix(&mut self, order: [usize; INPUT_UNITS]) {
        let (units, rest) = self.values.as_chunks::<SKETCH_UNIT>();
        if !rest.is_empty() {
            return;
        }
        self.blocks.resize(units.len().div_ceil(INPUT_UNITS), FixedUnits::ZERO);
        let blocks = self.blocks.iter_mut().zip(units.chunks(INPUT_UNITS));
        let is_fixed = blocks.fold(true, |is_fixed, (block, units)| {
            let lanes = order.iter().enumerate().filter_map(|(lane, u)| Some((lane, units.get(*u)?)));
            lanes.fold(is_fixed, |is_fixed, (lane, x)| block.set(lane, x) && is_fixed)
        });
        if !is_fixed {
            self.blocks.clear();
        }
    }
}

impl Kernels {
    /// Takes `x` for [`Kernels::sketch_dots`]: work for one layer, not for one row.
    pub fn sketch_input(&self, x: &[f32]) -> SketchInput {
        let mut input = SketchInput { values: x.to_vec(), blocks: Vec::new(), isa: self.isa() };
        #[cfg(target_arch = "x86_64")]
        match self.isa() {
            Isa::Avx512 if Avx512::has_fixed() => input.fix(Avx512::ORDER),
            Isa::Avx2 if Avx2::has_fixed() => input.fix(Avx2::ORDER),
            _ => {}
        }
        input
    }
}
