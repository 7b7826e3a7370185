//! Streams of bits, least significant bit first.

/// Writes bits one after the other.
#[derive(Debug, Default)]
pub(super) struct BitWriter {
    bytes: Vec<u8>,
    /// Bits that do not yet fill a byte, in the lowest places.
    pending: u64,
    n_pending: usize,
}

impl BitWriter {
    /// Appends the lowest `n` bits of `value`, at most 32.
    pub fn put(&mut self, value: u32, n: usize) {
        self.pending |= u64::from(value & ((1u64 << n) - 1) as u32) << self.n_pending;
        self.n_pending += n;
        while self.n_pending >= 8 {
            self.bytes.push(self.pending as u8);
            self.pending >>= 8;
            self.n_pending -= 8;
        }
    }

    /// The bytes; the last one's unused bits are zero.
    pub fn into_bytes(mut self) -> Vec<u8> {
        if self.n_pending > 0 {
            self.bytes.push(self.pending as u8);
        }
        self.bytes
    }
}

/// Reads them; behind the end there are zeros.
#[derive(Debug)]
pub(super) struct BitReader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> BitReader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// The next `n` bits.
    pub fn take(&mut self, n: usize) -> u32 {
        let mut value = 0;
        for i in 0..n {
            let byte = self.bytes.get(self.at / 8).copied().unwrap_or(0);
            value |= u32::from(byte >> (self.at % 8) & 1) << i;
            self.at += 1;
        }
        value
    }
}
