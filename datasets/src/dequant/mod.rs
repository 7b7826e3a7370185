//! Block formats to f32, one small function per format, and one table that says which belongs to which type.
//!
//! A function sees exactly one block as a fixed-size array, so every index in it is bounded by construction.
//! The order of the floating-point operations is ggml's (scale times sub-scale first, then the quant), so results
//! are equal to its own bit for bit.

mod k_blocks;
mod legacy;

use crate::gguf::GgmlType;
use half::f16;

/// Decodes whole blocks of `kind` from `bytes` into `out`; false if the lengths do not belong together.
#[must_use]
pub fn dequantize(kind: GgmlType, bytes: &[u8], out: &mut [f32]) -> bool {
    match kind {
        GgmlType::F32 => blocks(bytes, out, |b: &[u8; 4], o: &mut [f32; 1]| o[0] = f32::from_le_bytes(*b)),
        GgmlType::F16 => blocks(bytes, out, |b: &[u8; 2], o: &mut [f32; 1]| o[0] = f16::from_le_bytes(*b).to_f32()),
        // Shifted, not converted: a conversion would quiet signalling NaNs, and an exact copy must keep every bit.
        GgmlType::BF16 => blocks(bytes, out, |b: &[u8; 2], o: &mut [f32; 1]| {
            o[0] = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
        }),
        GgmlType::Q4_0 => blocks(bytes, out, legacy::q4_0),
        GgmlType::Q4_1 => blocks(bytes, out, legacy::q4_1),
        GgmlType::Q5_0 => blocks(bytes, out, legacy::q5_0),
        GgmlType::Q5_1 => blocks(bytes, out, legacy::q5_1),
        GgmlType::Q8_0 => blocks(bytes, out, legacy::q8_0),
        GgmlType::Q2_K => blocks(bytes, out, k_blocks::q2_k),
        GgmlType::Q3_K => blocks(bytes, out, k_blocks::q3_k),
        GgmlType::Q4_K => blocks(bytes, out, k_blocks::q4_k),
        GgmlType::Q5_K => blocks(bytes, out, k_blocks::q5_k),
        GgmlType::Q6_K => blocks(bytes, out, k_blocks::q6_k),
        GgmlType::Q8_K => blocks(bytes, out, k_blocks::q8_k),
    }
}

fn blocks<const BYTES: usize, const LEN: usize>(
    bytes: &[u8],
    out: &mut [f32],
    each: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) -> bool {
    let (bytes, odd_bytes) = bytes.as_chunks::<BYTES>();
    let (out, odd_out) = out.as_chunks_mut::<LEN>();
    if !odd_bytes.is_empty() || !odd_out.is_empty() || bytes.len() != out.len() {
        return false;
    }
    for (block, values) in bytes.iter().zip(out) {
        each(block, values);
    }
    true
}

/// The half-precision number at byte `at` of a block.
fn half_at<const N: usize>(block: &[u8; N], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use candle_core::quantized::{GgmlDType, QStorage, QTensor};

    #[test]
    fn every_bf16_keeps_its_bits() {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let mut values = vec![0.0; 1 << 16];
        assert!(dequantize(GgmlType::BF16, &bytes, &mut values));
        let kept = |(bits, value): (u32, &f32)| value.to_bits() == bits << 16;
        assert!((0u32..).zip(&values).all(kept), "a signalling NaN, or another value, was changed");
    }

    fn candle_type(kind: GgmlType) -> GgmlDType {
        match kind {
            GgmlType::F32 => GgmlDType::F32,
            GgmlType::F16 => GgmlDType::F16,
            GgmlType::BF16 => GgmlDType::BF16,
            GgmlType::Q4_0 => GgmlDType::Q4_0,
            GgmlType::Q4_1 => GgmlDType::Q4_1,
            GgmlType::Q5_0 => GgmlDType::Q5_0,
            GgmlType::Q5_1 => GgmlDType::Q5_1,
            GgmlType::Q8_0 => GgmlDType::Q8_0,
            GgmlType::Q2_K => GgmlDType::Q2K,
            GgmlType::Q3_K => GgmlDType::Q3K,
            GgmlType::Q4_K => GgmlDType::Q4K,
            GgmlType::Q5_K => GgmlDType::Q5K,
            GgmlType::Q6_K => GgmlDType::Q6K,
            GgmlType::Q8_K => GgmlDType::Q8K,
        }
    }

    /// Where a block keeps its half-precision scales: random bytes there may be NaN or infinite, and then results
    /// are NaN of unequal bits, which says nothing about the decoding.
    fn scale_offsets(kind: GgmlType) -> &'static [usize] {
        match kind {
            GgmlType::F32 | GgmlType::BF16 | GgmlType::Q8_K => &[],
            GgmlType::F16 | GgmlType::Q4_0 | GgmlType::Q5_0 | GgmlType::Q8_0 => &[0],
            GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4_K | GgmlType::Q5_K => &[0, 2],
            GgmlType::Q2_K => &[80, 82],
            GgmlType::Q3_K => &[108],
            GgmlType::Q6_K => &[208],
        }
    }

    #[test]
    fn random_blocks_decode_as_in_candle_bit_for_bit() {
        let mut state = 1u64;
        for kind in GgmlType::all() {
            let n_blocks = if kind.block_len() == 1 { 4096 } else { 256 };
            let mut bytes: Vec<u8> = (0..n_blocks * kind.block_bytes())
                .map(|_| {
                    state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
                    (state >> 56) as u8
                })
                .collect();
            for block in bytes.chunks_mut(kind.block_bytes()) {
                for at in scale_offsets(kind) {
                    block[at + 1] &= 0xBF; // clears the exponent's top bit: finite, below 2
                }
                if matches!(kind, GgmlType::F32 | GgmlType::BF16 | GgmlType::Q8_K) {
                    let top = if kind == GgmlType::BF16 { 1 } else { 3 };
                    block[top] &= 0xBF;
                }
            }
            let n = n_blocks * kind.block_len();
            let mut ours = vec![0.0; n];
            assert!(dequantize(kind, &bytes, &mut ours));
            // The vector's own alignment may not be what the reference's block structs need: it copies.
            let data = QStorage::from_data(bytes.into(), &Device::Cpu, candle_type(kind)).expect("storage");
            let tensor = QTensor::new(data, vec![n]).expect("tensor");
            let theirs = tensor.dequantize(&Device::Cpu).expect("decoded").to_vec1::<f32>().expect("values");
            for (i, (a, b)) in ours.iter().zip(&theirs).enumerate() {
                assert_eq!(a.to_bits(), b.to_bits(), "{} element {i}: {a} and {b}", kind.name());
            }
        }
    }

    #[test]
    fn lengths_that_do_not_belong_together_are_refused() {
        assert!(!dequantize(GgmlType::Q4_0, &[0; 17], &mut [0.0; 32]));
        assert!(!dequantize(GgmlType::Q4_0, &[0; 18], &mut [0.0; 31]));
        assert!(!dequantize(GgmlType::Q6_K, &[0; 420], &mut [0.0; 256]));
    }
}
