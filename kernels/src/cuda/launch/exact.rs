//! Shapes of the kernels that decode streams and coarse planes (`kernels/cuda/exact.cuh`).

use crate::cuda::device::Device;
use crate::{BLOCK, BundleLayout, Encoding, SEGMENT};

/// Warps of a block, if its teams are not larger: two such blocks share a multiprocessor.
const WARPS: usize = 8;
/// The largest teams, those of a block of their own.
const MAX_WARPS: usize = 16;
/// What decoders of a damaged bundle may read behind it (`kSlackBytes` in `kernels/cuda/exact.cuh`).
const SLACK_BYTES: usize = 2048 + 16;
/// Shared memory that a block of these kernels has beside what it asks for, and the system's own.
const OTHER_SHARED_BYTES: usize = 2 << 10;

/// Whether rows in this encoding have kernels of their own.
pub(super) fn is_planar(encoding: Encoding) -> bool {
    !encoding.is_plain()
}

/// The encoding in names of kernels.
pub(super) fn suffix(encoding: Encoding) -> String {
    encoding.name().replace('+', "")
}

/// Teams of warps that pass bundles or rows through shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Teams {
    /// Warps of a team.
    pub warps: usize,
    /// Teams of a block.
    pub n: usize,
    /// Bundles, or rows, of a team in shared memory; 0 if they are read in place.
    pub stages: usize,
    /// Dynamic shared memory of a block.
    pub shared_bytes: usize,
}

impl Teams {
    /// For bundles of three rows.
    pub fn for_bundles(device: &Device, layout: BundleLayout) -> Self {
        let (hidden, warps) = (layout.hidden_size(), warps_of(layout.encoding(), layout.hidden_size()));
        let staged = (warps <= MAX_WARPS).then(|| Self::staged(device, warps, hidden, layout.bundle_bytes()));
        staged.flatten().unwrap_or_else(|| Self::in_place(warps.min(WARPS), hidden))
    }

    /// For rows of a matrix, `stride` bytes each.
    pub fn for_rows(device: &Device, encoding: Encoding, columns: usize, stride: usize) -> Self {
        let warps = warps_of(encoding, columns).min(WARPS);
        Self::staged(device, warps, columns, stride).unwrap_or_else(|| Self::in_place(warps, columns))
    }

    pub fn threads(&self) -> u32 {
        (32 * self.warps * self.n) as u32
    }

    /// One team, whose warps have several segments.
    fn in_place(warps: usize, columns: usize) -> Self {
        Self { warps, n: 1, stages: 0, shared_bytes: vector_bytes(columns) }
    }

    /// As many teams as make full blocks, two blocks to a multiprocessor, and the next bundle on its way: what comes
    /// first is given up last.
    fn staged(device: &Device, warps: usize, columns: usize, bytes: usize) -> Option<Self> {
        let whole = device.shared_bytes().saturating_sub(OTHER_SHARED_BYTES);
        let half = (device.shared_bytes() / 2).saturating_sub(OTHER_SHARED_BYTES);
        let most = (WARPS / warps).max(1);
        let half = if warps <= WARPS { half } else { 0 };
        let full_blocks = [(most, 2, half), (most, 1, half), (most, 2, whole), (most, 1, whole)];
        let smaller = (1..most).rev().flat_map(|n| [(n, 2, whole), (n, 1, whole)]);
        full_blocks.into_iter().chain(smaller).find_map(|(n, stages, limit)| {
            let shared_bytes = vector_bytes(columns) + n * stages * bytes + SLACK_BYTES;
            (shared_bytes <= limit).then_some(Self { warps, n, stages, shared_bytes })
        })
    }
}

/// Warps that decode a row at once (`kTogether` in `kernels/cuda/exact.cuh`).
fn warps_of(encoding: Encoding, columns: usize) -> usize {
    let segments = if matches!(encoding, Encoding::Q4Exact | Encoding::Q8Exact) { 2 } else { 1 };
    columns.div_ceil(segments * SEGMENT)
}

/// The input vector in shared memory: whole blocks.
fn vector_bytes(columns: usize) -> usize {
    4 * columns.next_multiple_of(BLOCK)
}
