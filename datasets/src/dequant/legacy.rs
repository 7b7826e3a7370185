//! Blocks of 32 with one half-precision scale `d`, and for the `_1` types an offset `m`: `x = d * q (+ m)`.
//! Low nibbles are the first 16 elements, high nibbles the last 16.

use super::half_at;

/// `[d: f16][16 bytes of nibbles]`, quants from -8 to 7.
pub fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for i in 0..16 {
        let byte = block[2 + i];
        out[i] = (i32::from(byte & 15) - 8) as f32 * d;
        out[i + 16] = (i32::from(byte >> 4) - 8) as f32 * d;
    }
}

/// `[d: f16][m: f16][16 bytes of nibbles]`, quants from 0 to 15.
pub fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for i in 0..16 {
        let byte = block[4 + i];
        out[i] = f32::from(byte & 15) * d + m;
        out[i + 16] = f32::from(byte >> 4) * d + m;
    }
}

/// The fifth bits of elements `i` and `i + 16`, as 0 or 16, from the 32-bit field at `at`.
fn fifth_bits<const N: usize>(block: &[u8; N], at: usize, i: usize) -> (u8, u8) {
    let field = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    let bit = |n: usize| if field >> n & 1 == 1 { 16 } else { 0 };
    (bit(i), bit(i + 16))
}

/// `[d: f16][fifth bits: u32][16 bytes of nibbles]`, quants from -16 to 15.
pub fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for i in 0..16 {
        let (byte, (low, high)) = (block[6 + i], fifth_bits(block, 2, i));
        out[i] = (i32::from(byte & 15 | low) - 16) as f32 * d;
        out[i + 16] = (i32::from(byte >> 4 | high) - 16) as f32 * d;
    }
}

/// `[d: f16][m: f16][fifth bits: u32][16 bytes of nibbles]`, quants from 0 to 31.
pub fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for i in 0..16 {
        let (byte, (low, high)) = (block[8 + i], fifth_bits(block, 4, i));
        out[i] = f32::from(byte & 15 | low) * d + m;
        out[i + 16] = f32::from(byte >> 4 | high) * d + m;
    }
}

/// `[d: f16][32 signed bytes]`.
pub fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for i in 0..32 {
        out[i] = f32::from(block[2 + i] as i8) * d;
    }
}
