//! Streams of bits, least significant bit first.

/// Writes bits one after the other.
#[derive(Debug, Default)]
pub(super) struct BitWriter {
    bytes: Vec<u8>,
    n_bits: usize,
}

impl BitWriter {
    /// Appends the lowest `n` bits of `value`.
    pub fn put(&mut self, value: u32, n: usize) {
        for i in 0..n {
            if self.n_bits.is_multiple_of(8) {
                self.bytes.push(0);
            }
            if let Some(last) = self.bytes.last_mut() {
                *last |= ((value >> i & 1) as u8) << (self.n_bits % 8);
            }
            self.n_bits += 1;
        }
    }

    /// The bytes; the last one's unused bits are zero.
    pub fn into_bytes(self) -> Vec<u8> {
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
