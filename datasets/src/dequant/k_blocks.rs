//! Super-blocks of 256 with quantised sub-scales: 16 sub-blocks of 16 (`Q2_K`, `Q3_K`, `Q6_K`) or 8 of 32 (`Q4_K`,
//! `Q5_K`).

use super::half_at;

/// `[16 x (scale: 4 bits, minimum: 4 bits)][64 bytes of 2-bit quants][d: f16][dmin: f16]`.
/// Each half of 128 elements uses 32 bytes four times, two bits further each time.
pub fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    for sub in 0..16 {
        let (half, shift, group) = (sub / 8, sub % 8 / 2 * 2, sub % 2);
        let scale = d * f32::from(block[sub] & 15);
        let minimum = dmin * f32::from(block[sub] >> 4);
        for i in 0..16 {
            let quant = block[16 + 32 * half + 16 * group + i] >> shift & 3;
            out[16 * sub + i] = scale * f32::from(quant) - minimum;
        }
    }
}

/// `[32 bytes of third bits][64 bytes of low 2 bits][12 bytes: 16 scales of 6 bits][d: f16]`, quants from -4 to 3.
/// A scale's low nibbles fill the first 8 bytes (first eight scales low, last eight high); the last 4 bytes hold the
/// upper two bits, four scales to a byte, four apart.
pub fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let d = half_at(block, 108);
    for sub in 0..16 {
        let (half, pair, group) = (sub / 8, sub % 8 / 2, sub % 2);
        let low = block[96 + sub % 8] >> (sub / 8 * 4) & 15;
        let high = block[104 + sub % 4] >> (sub / 4 * 2) & 3;
        let scale = d * (f32::from(low | high << 4) - 32.0);
        for i in 0..16 {
            let low = block[32 + 32 * half + 16 * group + i] >> (2 * pair) & 3;
            let third = block[16 * group + i] >> (4 * half + pair) & 1;
            let quant = i32::from(low) - if third == 1 { 0 } else { 4 };
            out[16 * sub + i] = scale * quant as f32;
        }
    }
}

/// Scale and minimum of sub-block `sub` of 8, six bits each, from the 12 bytes at `at`: the first four plain in
/// the low bits of bytes 0-3 and 4-7, the others in nibbles of bytes 8-11 with their upper two bits on top of those.
fn six_bit_pair<const N: usize>(block: &[u8; N], at: usize, sub: usize) -> (f32, f32) {
    if sub < 4 {
        return (f32::from(block[at + sub] & 63), f32::from(block[at + sub + 4] & 63));
    }
    let nibbles = block[at + sub + 4];
    let scale = nibbles & 15 | block[at + sub - 4] >> 6 << 4;
    let minimum = nibbles >> 4 | block[at + sub] >> 6 << 4;
    (f32::from(scale), f32::from(minimum))
}

/// `[d: f16][dmin: f16][12 bytes: 8 scales and minima][128 bytes of nibbles]`; 32 bytes serve two sub-blocks.
pub fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for sub in 0..8 {
        let (scale, minimum) = six_bit_pair(block, 4, sub);
        let (scale, minimum) = (d * scale, dmin * minimum);
        for i in 0..32 {
            let quant = block[16 + sub / 2 * 32 + i] >> (sub % 2 * 4) & 15;
            out[32 * sub + i] = scale * f32::from(quant) - minimum;
        }
    }
}

/// `[d: f16][dmin: f16][12 bytes: 8 scales and minima][32 bytes of fifth bits][128 bytes of nibbles]`; bit `sub` of
/// fifth-bit byte `i` belongs to element `i` of sub-block `sub`.
pub fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for sub in 0..8 {
        let (scale, minimum) = six_bit_pair(block, 4, sub);
        let (scale, minimum) = (d * scale, dmin * minimum);
        for i in 0..32 {
            let low = block[48 + sub / 2 * 32 + i] >> (sub % 2 * 4) & 15;
            let fifth = block[16 + i] >> sub & 1;
            out[32 * sub + i] = scale * f32::from(low | fifth << 4) - minimum;
        }
    }
}

/// `[128 bytes of low nibbles][64 bytes of upper 2 bits][16 signed scales][d: f16]`, quants from -32 to 31.
/// Each half of 128 elements has four runs of 32: low nibbles of 64 bytes, then their high nibbles.
pub fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = half_at(block, 208);
    for run in 0..8 {
        let (half, quarter) = (run / 4, run % 4);
        for i in 0..32 {
            let low = block[64 * half + quarter % 2 * 32 + i] >> (quarter / 2 * 4) & 15;
            let high = block[128 + 32 * half + i] >> (quarter * 2) & 3;
            let quant = i32::from(low | high << 4) - 32;
            let scale = block[192 + 2 * run + i / 16] as i8;
            out[32 * run + i] = d * f32::from(scale) * quant as f32;
        }
    }
}

/// `[d: f32][256 signed bytes][16 sums of 16: i16]`; the sums only serve dot products.
pub fn q8_k(block: &[u8; 292], out: &mut [f32; 256]) {
    let d = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
    for i in 0..256 {
        out[i] = d * f32::from(block[4 + i] as i8);
    }
}
