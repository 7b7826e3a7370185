//! Sketches: low-bit copies of a layer's neurons that are always in memory. Gate and up rows tell which neurons a token
//! needs, down rows stand for the neurons that are not computed.
//!
//! A row of `n` weights, `n` a multiple of 64, in 2 or 3 bits is, without padding between its parts or behind it:
//!
//! | bytes | what |
//! | --- | --- |
//! | 16 for each unit of 64 columns | bits 2k and 2k + 1 of byte i (k 0..4, i 0..16): the lower two bits of the code of the unit's column 16 k + i |
//! | 8 for each unit, only in 3 bits | four u16: bit i of number k is the third bit of the code of column 16 k + i |
//! | 1 for each unit | its scale code s |
//! | 2 | a bfloat16, the row's scale r |
//!
//! The value of a column is `r s (code - (levels - 1) / 2)`: 4 or 8 uniform levels around zero, none of them zero. All of
//! these are exact in f32: r has 8 significant bits, s 8, the level 3. With `n` columns a weight takes
//! `bits + 1/8 + 16/n` bits.

mod kernels;
#[cfg(feature = "cuda")]
mod planes;
mod row;

#[cfg(feature = "cuda")]
pub use planes::sketch_planes;
pub(crate) use row::Parts;
#[cfg(target_arch = "x86_64")]
pub(crate) use row::{CODE_BYTES, HIGH_BYTES};
pub use row::{SKETCH_UNIT, SketchBits, SketchMatrix, sketch_row, sketch_scales, unsketch};
