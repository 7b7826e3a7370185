//! One block of rows, decoded: read, checked, and ready to be applied to rows of the base.

use super::index::{BlockEntry, BlockKind};
use std::cell::RefCell;
use std::ops::Range;
use thermocline_kernels::patch::Patcher;
use xxhash_rust::xxh3::xxh3_64;

/// Buffers and the decompressor that a thread keeps from block to block.
#[derive(Default)]
pub(super) struct Decoder {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
    pub stored: Vec<u8>,
    planes: [Vec<u8>; 3],
    differences: Vec<u16>,
    /// Place in `differences` of each row's first, and their number.
    starts: Vec<usize>,
}

thread_local! {
    static DECODER: RefCell<Decoder> = RefCell::default();
}

/// Runs `work` with this thread's decoder, or with a new one inside of such work.
pub(super) fn with_decoder<T>(work: impl FnOnce(&mut Decoder) -> T) -> T {
    DECODER.with(|held| match held.try_borrow_mut() {
        Ok(mut decoder) => work(&mut decoder),
        Err(_) => work(&mut Decoder::default()),
    })
}

/// A decoded block.
pub(super) struct Block<'a> {
    kind: BlockKind,
    columns: usize,
    planes: &'a [Vec<u8>; 3],
    differences: &'a [u16],
    starts: &'a [usize],
}

impl Decoder {
    /// Decodes the block whose stored bytes are in `self.stored`; what is wrong, else. `rows` are its own.
    pub(super) fn decode(
        &mut self,
        entry: &BlockEntry,
        rows: usize,
        columns: usize,
        patcher: Patcher,
    ) -> Result<Block<'_>, &'static str> {
        if xxh3_64(&self.stored) != entry.checksum {
            return Err("checksum mismatch; fetch or make the delta again");
        }
        let lengths = entry.plane_bytes(rows, columns).ok_or("a block's size overflows")?;
        let mut rest = &self.stored[..];
        for ((plane, length), stored) in self.planes.iter_mut().zip(lengths).zip(entry.planes) {
            let (bytes, behind) = rest.split_at_checked(stored as usize).ok_or("a plane ends past the block")?;
            rest = behind;
            plane.clear();
            if bytes.len() == length {
                plane.extend_from_slice(bytes);
                continue;
            }
            // Exactly as long as the index implies: a frame that would be longer is refused by the decompressor.
            plane.resize(length, 0);
            let zstd = match &mut self.zstd {
                Some(zstd) => zstd,
                none => none.insert(zstd::bulk::Decompressor::new().map_err(|_| "no memory to decompress with")?),
            };
            if !zstd.decompress_to_buffer(bytes, &mut plane[..]).is_ok_and(|n| n == length) {
                return Err("a plane does not decompress to its length");
            }
        }
        if entry.kind == BlockKind::Sparse {
            self.take_differences(entry, columns, patcher)?;
        }
        let (planes, differences, starts) = (&self.planes, &self.differences[..], &self.starts[..]);
        Ok(Block { kind: entry.kind, columns, planes, differences, starts })
    }

    fn take_differences(&mut self, entry: &BlockEntry, columns: usize, patcher: Patcher) -> Result<(), &'static str> {
        let [bitmap, low, high] = &self.planes;
        self.differences.clear();
        let wide = low.iter().zip(high).map(|(low, high)| u16::from(*low) | u16::from(*high) << 8);
        self.differences.extend(wide);
        self.starts.clear();
        let mut n = 0usize;
        self.starts.push(0);
        for bits in bitmap.chunks_exact(columns.div_ceil(8).max(1)) {
            n = n.saturating_add(patcher.count_bits(bits));
            self.starts.push(n);
        }
        if n as u64 != u64::from(entry.changed) { Err("bitmap and number of changes do not fit") } else { Ok(()) }
    }
}

impl Block<'_> {
    /// Turns `bits`, the base's row `row` of this block, into the final model's; false if the block is damaged.
    #[must_use]
    pub(super) fn apply(&self, patcher: Patcher, row: usize, bits: &mut [u16]) -> bool {
        let patched = match self.kind {
            BlockKind::Unchanged => Some(()),
            BlockKind::Sparse => self.sparse(patcher, row, bits),
            BlockKind::Dense => {
                let [_, low, high] = self.planes;
                let place = place(row, self.columns);
                low.get(place.clone()).zip(high.get(place)).and_then(|(low, high)| patcher.dense(bits, low, high))
            }
        };
        patched.is_some()
    }

    fn sparse(&self, patcher: Patcher, row: usize, bits: &mut [u16]) -> Option<()> {
        let [bitmap, ..] = self.planes;
        let bitmap = bitmap.get(place(row, self.columns.div_ceil(8)))?;
        let differences = self.differences.get(*self.starts.get(row)?..*self.starts.get(row.checked_add(1)?)?)?;
        patcher.sparse(bits, bitmap, differences)
    }
}

fn place(row: usize, stride: usize) -> Range<usize> {
    let start = row.saturating_mul(stride);
    start..start.saturating_add(stride)
}
