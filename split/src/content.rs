//! What the bundles of a layer file are: neurons, or one of their further planes.

use crate::chunk::Codec;
use crate::planes::Plane;
use thermocline_kernels::{BundleLayout, Encoding};

/// What the bundles of a file are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// Whole bundles of an encoding that is stored in one piece.
    Bundles(BundleLayout),
    /// The coarse planes of `q4`.
    Coarse {
        /// Columns of each row.
        hidden_size: usize,
    },
    /// Heads and streams over `q4` or `q8`.
    Final {
        /// Columns of each row.
        hidden_size: usize,
        /// Of a bundle: heads, and room for the longest streams of the layer.
        bytes: usize,
    },
}

/// The number of coarse planes in headers, where encodings have theirs.
const COARSE_ID: u32 = 16;
/// The number of final planes.
const FINAL_ID: u32 = 17;

impl Content {
    /// The inverse of [`Content::id`], with the other fields of the header; `None` if they do not fit each other.
    pub(crate) fn from_header(id: u32, hidden_size: usize, bytes: usize) -> Option<Self> {
        let content = match id {
            COARSE_ID => Content::Coarse { hidden_size },
            FINAL_ID => Content::Final { hidden_size, bytes },
            _ => {
                let encoding = Encoding::from_id(id).filter(|e| e.base() == *e)?;
                Content::Bundles(BundleLayout::of_bundle_bytes(encoding, hidden_size, bytes)?)
            }
        };
        // Longer streams than of any layer would size allocations.
        let longest = 3 * hidden_size.checked_mul(8)?.checked_add(256)?;
        (content.bundle_bytes() == bytes && bytes <= longest && Encoding::Q8.accepts(hidden_size) | (id < COARSE_ID))
            .then_some(content)
    }

    /// Which plane over the base it is; `None` for the base.
    pub(crate) fn plane(&self) -> Option<Plane> {
        match self {
            Content::Bundles(_) => None,
            Content::Coarse { .. } => Some(Plane::Coarse),
            Content::Final { .. } => Some(Plane::Final),
        }
    }

    pub(crate) fn id(&self) -> u32 {
        match self {
            Content::Bundles(layout) => layout.encoding().id(),
            Content::Coarse { .. } => COARSE_ID,
            Content::Final { .. } => FINAL_ID,
        }
    }

    /// Columns of each row.
    pub(crate) fn hidden_size(&self) -> usize {
        match self {
            Content::Bundles(layout) => layout.hidden_size(),
            Content::Coarse { hidden_size } | Content::Final { hidden_size, .. } => *hidden_size,
        }
    }

    /// Bytes of one neuron.
    pub(crate) fn bundle_bytes(&self) -> usize {
        match self {
            Content::Bundles(layout) => layout.bundle_bytes(),
            Content::Coarse { hidden_size } => (3 * Encoding::Q4Plus.coarse_bytes(*hidden_size)).next_multiple_of(16),
            Content::Final { bytes, .. } => bytes.next_multiple_of(16),
        }
    }

    /// Bytes of a neuron's bundle, which begins with `bytes`, without the room behind its streams; a longer number than
    /// the bundle's if the heads are damaged.
    fn used_bytes(&self, bytes: &[u8]) -> usize {
        match self {
            Content::Bundles(layout) if layout.encoding().has_stream() => layout.used_bytes(bytes),
            Content::Final { hidden_size, .. } => {
                let heads = 3 * Encoding::Q4Exact.head_bytes(*hidden_size);
                heads + Encoding::Q4Exact.stream_bytes(bytes.get(..heads).unwrap_or_default())
            }
            _ => self.bundle_bytes(),
        }
    }

    /// Whether chunks can be stored so.
    pub(crate) fn takes(&self, codec: Codec) -> bool {
        let has_streams = match self {
            Content::Bundles(layout) => layout.encoding().has_stream(),
            Content::Coarse { .. } => false,
            Content::Final { .. } => true,
        };
        match codec {
            Codec::Stored | Codec::Zstd => true,
            Codec::Trimmed => has_streams,
            Codec::ZstdPlanes => !has_streams,
        }
    }

    /// Bundles one behind the other without the room behind their streams; `None` if there is none in these.
    pub(crate) fn trim(&self, bundles: &[u8]) -> Option<Vec<u8>> {
        if matches!(self, Content::Coarse { .. }) {
            return None;
        }
        let mut out = Vec::with_capacity(bundles.len());
        for bundle in bundles.chunks_exact(self.bundle_bytes()) {
            out.extend(bundle.get(..self.used_bytes(bundle))?);
        }
        (out.len() < bundles.len()).then_some(out)
    }

    /// The inverse of [`Content::trim`]; false if the bytes do not fit the heads among them.
    pub(crate) fn pad(&self, mut trimmed: &[u8], bundles: &mut [u8]) -> bool {
        for bundle in bundles.chunks_exact_mut(self.bundle_bytes()) {
            let used = self.used_bytes(trimmed);
            let (Some((now, later)), Some((place, room))) =
                (trimmed.split_at_checked(used), bundle.split_at_mut_checked(used))
            else {
                return false;
            };
            place.copy_from_slice(now);
            room.fill(0);
            trimmed = later;
        }
        trimmed.is_empty()
    }
}
