//! A histogram of |h| with four bins per octave, read straight off the bits of the f32.

/// Bins: four per octave from 2^-24 to 2^8. Smaller values (but not zero) fall into the first, larger ones into the
/// last.
pub const HISTOGRAM_BINS: usize = 128;

/// Exponent and first two bits of the fraction of 2^-24.
const FIRST: u32 = (127 - 24) << 2;

/// The bin of a non-negative value.
#[inline(always)]
pub(crate) fn bin(value: f32) -> usize {
    ((value.to_bits() >> 21).saturating_sub(FIRST) as usize).min(HISTOGRAM_BINS - 1)
}

/// The value in the middle of a bin.
pub(crate) fn bin_middle(bin: usize) -> f32 {
    let edge = |bin: usize| f32::from_bits((FIRST + bin as u32) << 21);
    0.5 * (edge(bin) + edge(bin + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn middles_lie_in_their_bins() {
        for i in 0..HISTOGRAM_BINS {
            assert_eq!(bin(bin_middle(i)), i);
        }
        assert_eq!((bin(1e-30), bin(f32::INFINITY)), (0, HISTOGRAM_BINS - 1));
        // A bin is at most a quarter of its lower edge wide, so its middle is within 12.5 %.
        assert!((bin_middle(bin(0.9)) / 0.9 - 1.0).abs() < 0.125);
    }
}
