//! The index of a tensor's blocks: 40 bytes each, behind the blocks.

use super::manifest::DeltaTensor;

/// Bytes of an entry.
pub(super) const ENTRY_BYTES: usize = 40;
/// Most weights of a block, unless it is a single row: what a reader holds decoded at a time is bounded by it.
pub(super) const BLOCK_WEIGHTS_MAX: usize = 1 << 22;

/// How a block's rows are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BlockKind {
    /// Not at all.
    Unchanged,
    /// Bitmaps of the changed columns, then their differences.
    Sparse,
    /// The differences of all columns.
    Dense,
}

/// One block, as the index has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BlockEntry {
    pub kind: BlockKind,
    /// First stored byte in `delta.bin`.
    pub offset: u64,
    /// Elements that differ.
    pub changed: u32,
    /// Stored bytes of the planes: bitmap, low bytes, high bytes. As long as the plane: as it is; shorter: a zstd frame.
    pub planes: [u32; 3],
    /// XXH3-64 of all stored bytes.
    pub checksum: u64,
}

impl BlockEntry {
    pub(super) fn to_bytes(self) -> [u8; ENTRY_BYTES] {
        let kind: u32 = match self.kind {
            BlockKind::Unchanged => 0,
            BlockKind::Sparse => 1,
            BlockKind::Dense => 2,
        };
        let fields = self.offset.to_le_bytes().into_iter().chain(kind.to_le_bytes()).chain(self.changed.to_le_bytes());
        let fields = fields.chain(self.planes.into_iter().flat_map(u32::to_le_bytes)).chain([0; 4]);
        let mut out = [0; ENTRY_BYTES];
        out.iter_mut().zip(fields.chain(self.checksum.to_le_bytes())).for_each(|(o, b)| *o = b);
        out
    }

    fn from_bytes(bytes: &[u8; ENTRY_BYTES]) -> Option<Self> {
        let (words, _) = bytes.as_chunks::<4>();
        let [o0, o1, kind, changed, bitmap, low, high, zero, c0, c1] = words else { return None };
        let wide = |low: &[u8; 4], high: &[u8; 4]| {
            u64::from(u32::from_le_bytes(*low)) | u64::from(u32::from_le_bytes(*high)) << 32
        };
        let kind = match u32::from_le_bytes(*kind) {
            0 => BlockKind::Unchanged,
            1 => BlockKind::Sparse,
            2 => BlockKind::Dense,
            _ => return None,
        };
        if *zero != [0; 4] {
            return None;
        }
        Some(Self {
            kind,
            offset: wide(o0, o1),
            changed: u32::from_le_bytes(*changed),
            planes: [bitmap, low, high].map(|b| u32::from_le_bytes(*b)),
            checksum: wide(c0, c1),
        })
    }

    /// Stored bytes of all planes.
    pub(super) fn stored_bytes(&self) -> u64 {
        self.planes.iter().fold(0u64, |sum, n| sum.saturating_add(u64::from(*n)))
    }

    /// Decoded lengths of the planes of a block of `rows` by `columns`; `None` on overflow.
    pub(super) fn plane_bytes(&self, rows: usize, columns: usize) -> Option<[usize; 3]> {
        let changed = usize::try_from(self.changed).ok()?;
        let all = rows.checked_mul(columns)?;
        Some(match self.kind {
            BlockKind::Unchanged => [0; 3],
            BlockKind::Sparse => [rows.checked_mul(columns.div_ceil(8))?, changed, changed],
            BlockKind::Dense => [0, all, all],
        })
    }

    fn fits(&self, rows: usize, columns: usize) -> bool {
        let (Some(planes), Some(all)) = (self.plane_bytes(rows, columns), rows.checked_mul(columns)) else {
            return false;
        };
        let count_fits = match self.kind {
            BlockKind::Unchanged => self.changed == 0 && self.checksum == 0,
            _ => self.changed > 0 && u64::from(self.changed) <= all as u64,
        };
        // A plane without bytes is stored without bytes, any other with at least one.
        let stored_fits = |(stored, plane): (&u32, usize)| *stored as usize <= plane && (*stored == 0) == (plane == 0);
        count_fits && self.planes.iter().zip(planes).all(stored_fits)
    }
}

/// How many rows a block holds where its rows have so many columns.
pub(super) fn block_rows(rows: usize, columns: usize, weights: usize) -> usize {
    weights.checked_div(columns).unwrap_or(0).clamp(1, rows.max(1))
}

/// Rows of block `b`.
pub(super) fn rows_of(tensor: &DeltaTensor, b: usize) -> std::ops::Range<usize> {
    let start = b.saturating_mul(tensor.block_rows).min(tensor.rows);
    start..start.saturating_add(tensor.block_rows).min(tensor.rows)
}

/// Reads an index and checks every entry against the tensor and against its neighbours; what is wrong, else.
pub(super) fn parse(tensor: &DeltaTensor, bytes: &[u8]) -> Result<Vec<BlockEntry>, String> {
    let (entries, rest) = bytes.as_chunks::<ENTRY_BYTES>();
    if !rest.is_empty() || tensor.block_rows == 0 || entries.len() != tensor.rows.div_ceil(tensor.block_rows) {
        return Err(format!("{} bytes of index for {} rows", bytes.len(), tensor.rows));
    }
    let (mut at, mut changed) = (tensor.offset, 0u64);
    let mut out = Vec::with_capacity(entries.len());
    for (b, bytes) in entries.iter().enumerate() {
        let entry = BlockEntry::from_bytes(bytes).filter(|e| e.fits(rows_of(tensor, b).len(), tensor.columns));
        let entry = entry.filter(|e| e.offset == at).ok_or_else(|| format!("block {b} does not fit the tensor"))?;
        at = at.saturating_add(entry.stored_bytes());
        changed = changed.saturating_add(entry.changed.into());
        out.push(entry);
    }
    if at != tensor.index_offset || changed != tensor.changed {
        return Err("the blocks are not what the tensor's entry says".to_owned());
    }
    Ok(out)
}
