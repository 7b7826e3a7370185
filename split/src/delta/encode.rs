//! One block of rows, compared and encoded in whichever form is smaller.

use super::index::BlockKind;
use thermocline_kernels::patch::key_difference;
use xxhash_rust::xxh3::xxh3_64;

/// A block as it will be stored.
#[derive(Debug, PartialEq)]
pub(super) struct Encoded {
    pub kind: BlockKind,
    pub changed: u32,
    pub planes: [u32; 3],
    pub bytes: Vec<u8>,
    pub checksum: u64,
}

/// Encodes what turns `base` into `changed`, rows of `columns`, at a zstd level (0 stores all as it is).
pub(super) fn encode(base: &[u16], changed: &[u16], columns: usize, level: i32) -> Encoded {
    let stride = columns.div_ceil(8);
    let mut bitmap = vec![0u8; base.len() / columns.max(1) * stride];
    let mut differences = Vec::new();
    let rows = base.chunks_exact(columns).zip(changed.chunks_exact(columns));
    for ((base, changed), bits) in rows.zip(bitmap.chunks_exact_mut(stride)) {
        for (j, (b, c)) in base.iter().zip(changed).enumerate() {
            if b != c {
                bits[j / 8] |= 1 << (j % 8);
                differences.push(key_difference(*b, *c));
            }
        }
    }
    let n_changed = differences.len() as u32;
    if n_changed == 0 {
        return Encoded { kind: BlockKind::Unchanged, changed: 0, planes: [0; 3], bytes: Vec::new(), checksum: 0 };
    }
    let sparse = store([bitmap, low(&differences), high(&differences)], level);
    // Below a quarter a bit a column never costs more than the zeros do.
    let (kind, (planes, bytes)) = if differences.len() >= base.len() / 4 {
        let all: Vec<u16> = base.iter().zip(changed).map(|(b, c)| key_difference(*b, *c)).collect();
        let dense = store([Vec::new(), low(&all), high(&all)], level);
        if dense.1.len() < sparse.1.len() { (BlockKind::Dense, dense) } else { (BlockKind::Sparse, sparse) }
    } else {
        (BlockKind::Sparse, sparse)
    };
    let checksum = xxh3_64(&bytes);
    Encoded { kind, changed: n_changed, planes, bytes, checksum }
}

fn low(differences: &[u16]) -> Vec<u8> {
    differences.iter().map(|d| *d as u8).collect()
}

fn high(differences: &[u16]) -> Vec<u8> {
    differences.iter().map(|d| (*d >> 8) as u8).collect()
}

/// Each plane a zstd frame of its own where that is shorter: the statistics of bitmaps, low and high bytes have nothing
/// in common, and one frame of all three would code them with one table.
fn store(planes: [Vec<u8>; 3], level: i32) -> ([u32; 3], Vec<u8>) {
    let mut bytes = Vec::new();
    let stored = planes.map(|plane| {
        let frame = if level == 0 { None } else { zstd::bulk::compress(&plane, level).ok() };
        let plane = frame.filter(|frame| frame.len() < plane.len()).unwrap_or(plane);
        bytes.extend_from_slice(&plane);
        plane.len() as u32
    });
    (stored, bytes)
}
