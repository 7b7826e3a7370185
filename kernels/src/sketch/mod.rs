//! Sketches: low-bit copies of a layer's neurons that are always in memory. Gate and up rows tell which neurons a token
//! needs, down rows stand for the neurons that are not computed.
//!
//! A row of `n` weights, `n` a multiple of 64, in 2 or 3 bits is, without padding between its parts or behind it:
//!
//! | bytes | what |
//! | --- | --- |
//! | 16 for each unit of 64 columns | two u64: the branch bits and the first point bits; bit 4 m + r is that of the unit's column 16 r + m |
//! | 8 for each unit, only in 3 bits | a u64: the second point bits |
//! | 1 for each unit | its scale code s |
//! | 2 | a bfloat16, the row's scale r |
//!
//! The value of a column is `r s` times one of 8 or 16 levels, odd numbers up to 255 on both sides of zero, which [`trellis`]
//! chooses. All of these are exact in f32: r has 8 significant bits, s 8, the level 8. With `n` columns a weight takes
//! `bits + 1/8 + 16/n` bits.

mod input;
mod kernels;
#[cfg(feature = "cuda")]
mod planes;
mod row;
pub mod trellis;

pub use input::SketchInput;
#[cfg(target_arch = "x86_64")]
pub(crate) use input::{DIGIT_VECTORS, FixedUnits, INPUT_UNITS};
#[cfg(feature = "cuda")]
pub use planes::sketch_planes;
pub(crate) use row::Parts;
#[cfg(target_arch = "x86_64")]
pub(crate) use row::{CODE_BYTES, PLANE_BYTES};
pub use row::{SKETCH_UNIT, SketchBits, SketchMatrix, sketch_row, sketch_scales, unsketch};
pub use trellis::{TRELLIS_STATES, trellis_next, trellis_subset};
