//! How the bundles of one chunk are stored: as they are, or as one zstd frame.

/// How a chunk's bytes are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// As they are: a reader computes with them where they were read.
    Stored,
    /// One zstd frame with its content size.
    Zstd,
}

impl Codec {
    pub(crate) fn id(self) -> u32 {
        match self {
            Codec::Stored => 0,
            Codec::Zstd => 1,
        }
    }

    pub(crate) fn from_id(id: u32) -> Option<Self> {
        [Codec::Stored, Codec::Zstd].into_iter().find(|c| c.id() == id)
    }
}

/// When to compress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Never.
    None,
    /// At this zstd level, wherever a chunk becomes smaller by more than a sixteenth: below that, decoding at about
    /// 1.5 GB/s a core costs more time than reading the bytes from any disk of this century.
    Zstd(i32),
}

/// Encodes one chunk.
pub(crate) fn encode(compression: Compression, raw: &[u8]) -> (Codec, Vec<u8>) {
    if let Compression::Zstd(level) = compression
        && let Ok(frame) = zstd::bulk::compress(raw, level)
        && frame.len() < raw.len() - raw.len() / 16
    {
        return (Codec::Zstd, frame);
    }
    (Codec::Stored, raw.to_vec())
}

/// Decodes one chunk into exactly `out`; false if it is not that long or not valid.
#[must_use]
pub(crate) fn decode(codec: Codec, stored: &[u8], out: &mut [u8]) -> bool {
    match codec {
        Codec::Stored if stored.len() == out.len() => {
            out.copy_from_slice(stored);
            true
        }
        Codec::Stored => false,
        Codec::Zstd => zstd::bulk::decompress_to_buffer(stored, out).is_ok_and(|n| n == out.len()),
    }
}
