//! The trellis code of a sketch's weights: how a column's bits and those of the columns before it choose its level.
//!
//! Half of a weight's choice is spread over its neighbours. Each column has a branch bit u and one or two point bits. Six branch
//! bits before it are its state; they and u select one of four subsets of the levels, 2 y1 + y0 with
//! `y1 = u(t) ^ u(t-1) ^ u(t-6)` and `y0 = u(t-2) ^ u(t-4)`, and the point bits one of the two or four levels in it. So a column
//! in two bits has eight levels, of which any one row can use four at a time, and the best sequence for a whole row comes
//! closer to it than levels of its own would: of normal weights 0.082 of the energy is lost in two bits and 0.022 in three, where the
//! best four and eight levels (Max 1960) lose 0.1175 and 0.0345.
//!
//! Papers: Ungerboeck, Channel coding with multilevel/phase signals (1982), table I, the code of 64 states; Marcellin and
//! Fischer, Trellis coded quantization of memoryless and Gauss-Markov sources (1990).
//!
//! Branch bits of a unit of 64 columns lie in one word, column 16 r + m in bit 4 m + r, so that a whole unit's subsets are a few
//! shifts of words, and a shift of a word leaves the codes of 16 neighbouring columns in its nibbles.

use super::SketchBits;

/// States of the trellis: the last six branch bits, the latest lowest.
pub const TRELLIS_STATES: usize = 64;

/// Columns of a word that one bit of its nibbles has.
const STRIPE: usize = 16;

const NIBBLES: u64 = 0x1111_1111_1111_1111;

/// Levels found for normal weights by turns of trellis search and averages (Lloyd's rule). They are odd, so that all of them are
/// one more than twice a signed byte, and the other sign is the byte with all bits inverted.
const LEVELS_OF_TWO: [i16; 8] = [-255, -145, -79, -25, 25, 79, 145, 255];
const LEVELS_OF_THREE: [i16; 16] = [-255, -185, -139, -105, -77, -55, -31, -11, 11, 31, 55, 77, 105, 139, 185, 255];

impl SketchBits {
    /// Levels, rising, alike on both sides of zero; every fourth is of one subset.
    pub fn levels(self) -> &'static [i16] {
        match self {
            SketchBits::Two => &LEVELS_OF_TWO,
            SketchBits::Three => &LEVELS_OF_THREE,
        }
    }

    /// The scale that suits normal weights of mean square 1.
    pub fn normal_scale(self) -> f32 {
        match self {
            SketchBits::Two => 1.88 / 255.0,
            SketchBits::Three => 2.55 / 255.0,
        }
    }
}

/// The subset, 0 to 3, of a column with this branch bit behind `state`.
#[inline]
pub fn trellis_subset(state: usize, branch: usize) -> usize {
    let y1 = branch ^ state ^ state >> 5;
    let y0 = state >> 1 ^ state >> 3;
    2 * (y1 & 1) + (y0 & 1)
}

/// The state behind a column with this branch bit.
#[inline]
pub fn trellis_next(state: usize, branch: usize) -> usize {
    (2 * state + branch) % TRELLIS_STATES
}

/// The bit of a unit's words that belongs to a column.
#[inline]
pub(crate) fn bit_of(column: usize) -> usize {
    4 * (column % STRIPE) + column / STRIPE
}

/// Both bits, y0 and y1, of the subsets of a unit's columns: `branches` are its branch bits, `before` those of the unit in front
/// of it, or 0.
#[inline(always)]
pub(crate) fn subsets(branches: u64, before: u64) -> [u64; 2] {
    // Sixteen columns earlier: the stripe before, which of the first one is the last of the unit in front.
    let stripe_before = (branches << 1) & !NIBBLES | (before >> 3) & NIBBLES;
    let earlier = |n: u32| branches << (4 * n) | stripe_before >> (64 - 4 * n);
    [earlier(2) ^ earlier(4), branches ^ earlier(1) ^ earlier(6)]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words against a walk along the trellis.
    #[test]
    fn words_have_the_subsets_of_their_columns() {
        let mut seed = 7u64;
        let mut random = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            seed ^ seed >> 31
        };
        let (mut state, mut before) = (0, 0);
        for _ in 0..50 {
            let branches = random();
            let [y0, y1] = subsets(branches, before);
            for column in 0..64 {
                let bit = |word: u64| (word >> bit_of(column) & 1) as usize;
                assert_eq!(2 * bit(y1) + bit(y0), trellis_subset(state, bit(branches)), "column {column}");
                state = trellis_next(state, bit(branches));
            }
            before = branches;
        }
    }

    /// From every state two subsets can be reached, of levels two steps apart: Ungerboeck's rules.
    #[test]
    fn branches_that_part_and_meet_are_far_from_each_other() {
        for state in 0..TRELLIS_STATES {
            let reached = [0, 1].map(|branch| trellis_subset(state, branch));
            assert_eq!(reached[0] ^ reached[1], 2);
            // The two states that lead to the same one.
            let other = state ^ (TRELLIS_STATES / 2);
            assert_eq!(trellis_next(state, 0), trellis_next(other, 0));
            assert_eq!(trellis_subset(state, 0) ^ trellis_subset(other, 0), 2);
        }
    }
}
