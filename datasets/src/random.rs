/// SplitMix64: tiny, seedable, and the same on every machine, which is all that is asked of it.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The stream of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A stream of its own for every `place` under one seed, so that any part can be made without those before it.
    pub fn at(seed: u64, place: &[u64]) -> Self {
        let mut random = Self(seed);
        for &part in place {
            random = Self(random.next_u64() ^ part.wrapping_mul(0xD134_2543_DE82_EF95));
        }
        // One step more, so that neighbours do not start a constant apart.
        Self(random.next_u64())
    }

    /// 64 random bits.
    #[inline]
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1), with 24 bits.
    pub fn uniform(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 / (1u32 << 24) as f32
    }

    /// About normal, mean 0, variance 1: the sum of twelve uniforms less six, so no transcendental function whose
    /// last bit depends on the platform is involved.
    pub fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }

    /// The same from the four quarters of one number: lighter tails (none beyond 3.5), a twelfth of the time.
    #[inline]
    pub fn quick_normal(&mut self) -> f32 {
        let bits = self.next_u64();
        let sum: u32 = [0, 16, 32, 48].into_iter().map(|shift| (bits >> shift) as u32 & 0xffff).sum();
        // Four uniforms in 0..=65535: mean 131070, standard deviation 65536 / sqrt(3).
        (sum as f32 - 131_070.0) * (1.732_050_8 / 65_536.0)
    }

    /// Uniform in `0..n`.
    ///
    /// # Panics
    /// If `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "there is no number below 0");
        // The upper half of a 128-bit product; its bias, n / 2^64, is nothing.
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// Random bytes.
    #[inline]
    pub fn fill(&mut self, bytes: &mut [u8]) {
        let (words, rest) = bytes.as_chunks_mut::<8>();
        words.iter_mut().for_each(|word| *word = self.next_u64().to_le_bytes());
        let last = self.next_u64().to_le_bytes();
        rest.iter_mut().zip(last).for_each(|(byte, last)| *byte = last);
    }

    /// A shuffled `0..n`.
    pub fn permutation(&mut self, n: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..n as u32).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}
