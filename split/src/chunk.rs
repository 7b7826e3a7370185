//! How the bundles of one chunk are stored.

use crate::content::Content;
use thermocline_kernels::Encoding;

/// How a chunk's bytes are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// As they are: a reader computes with them where they were read.
    Stored,
    /// One zstd frame with its content size.
    Zstd,
    /// Without the room behind the streams of each bundle.
    Trimmed,
    /// One zstd frame of the parts of all bundles, 16-bit numbers byte by byte: bundles without streams only.
    ZstdPlanes,
}

impl Codec {
    const ALL: [Codec; 4] = [Codec::Stored, Codec::Zstd, Codec::Trimmed, Codec::ZstdPlanes];

    pub(crate) fn id(self) -> u32 {
        match self {
            Codec::Stored => 0,
            Codec::Zstd => 1,
            Codec::Trimmed => 2,
            Codec::ZstdPlanes => 3,
        }
    }

    pub(crate) fn from_id(id: u32) -> Option<Self> {
        Codec::ALL.into_iter().find(|c| c.id() == id)
    }
}

/// When to compress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Never; the room behind streams is left out all the same.
    None,
    /// At this zstd level, wherever a chunk becomes smaller by more than a sixteenth: below that, decoding at about
    /// 1.5 GB/s a core costs more time than reading the bytes from any disk of this century.
    Zstd(i32),
    /// At this zstd level, wherever a chunk becomes smaller at all: for keeping, not for streaming.
    Archive(i32),
}

/// Encodes one chunk of bundles of `content`.
pub(crate) fn encode(compression: Compression, content: &Content, raw: &[u8]) -> (Codec, Vec<u8>) {
    let best = match content.trim(raw) {
        Some(trimmed) => (Codec::Trimmed, trimmed),
        None => (Codec::Stored, raw.to_vec()),
    };
    let (level, least_gain) = match compression {
        Compression::None => return best,
        Compression::Zstd(level) => (level, best.1.len() / 16),
        Compression::Archive(level) => (level, 0),
    };
    // What has streams holds as good as no more than its entropy.
    if let Some(planes) = split_planes(content, raw)
        && let Ok(frame) = zstd::bulk::compress(&planes, level)
        && frame.len() + least_gain < best.1.len()
    {
        return (Codec::ZstdPlanes, frame);
    }
    best
}

/// Decodes one chunk into exactly `out`; false if it is not that long or not valid.
#[must_use]
pub(crate) fn decode(codec: Codec, content: &Content, stored: &[u8], out: &mut [u8]) -> bool {
    match codec {
        Codec::Stored if stored.len() == out.len() => {
            out.copy_from_slice(stored);
            true
        }
        Codec::Stored => false,
        Codec::Zstd => zstd::bulk::decompress_to_buffer(stored, out).is_ok_and(|n| n == out.len()),
        Codec::Trimmed => content.pad(stored, out),
        Codec::ZstdPlanes => {
            let mut planes = vec![0; out.len()];
            zstd::bulk::decompress_to_buffer(stored, &mut planes).is_ok_and(|n| n == out.len())
                && join_planes(content, &planes, out)
        }
    }
}

/// The parts of a bundle, in order: bytes, and whether they are 16-bit numbers; `None` if it has streams.
fn parts(content: &Content) -> Option<Vec<(usize, bool)>> {
    let Content::Bundles(layout) = content else {
        return matches!(content, Content::Coarse { .. }).then(|| vec![(content.bundle_bytes(), false)]);
    };
    let encoding = layout.encoding();
    if encoding.has_stream() {
        return None;
    }
    let codes = 3 * encoding.code_bytes(layout.hidden_size());
    let scales = 3 * encoding.scale_bytes(layout.hidden_size());
    Some(vec![(codes, encoding == Encoding::Bf16), (scales, true), (layout.bundle_bytes() - codes - scales, false)])
}

/// The same part of all bundles together, of 16-bit numbers first all lower, then all upper bytes.
fn split_planes(content: &Content, bundles: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(bundles.len());
    let mut first = 0;
    for (bytes, is_wide) in parts(content)? {
        let of_bundles = || bundles.chunks_exact(content.bundle_bytes()).map(|b| &b[first..first + bytes]);
        if is_wide {
            out.extend(of_bundles().flat_map(|part| part.iter().step_by(2)));
            out.extend(of_bundles().flat_map(|part| part.iter().skip(1).step_by(2)));
        } else {
            of_bundles().for_each(|part| out.extend_from_slice(part));
        }
        first += bytes;
    }
    Some(out)
}

/// The inverse of [`split_planes`]; `planes` and `bundles` have the same length.
fn join_planes(content: &Content, mut planes: &[u8], bundles: &mut [u8]) -> bool {
    let Some(parts) = parts(content) else { return false };
    let size = content.bundle_bytes();
    let n = bundles.len() / size;
    let mut first = 0;
    for (bytes, is_wide) in parts {
        let (part, rest) = planes.split_at(n * bytes);
        if is_wide && bytes > 0 {
            let (lower, upper) = part.split_at(part.len() / 2);
            let halves = lower.chunks_exact(bytes / 2).zip(upper.chunks_exact(bytes / 2));
            for (bundle, (lower, upper)) in bundles.chunks_exact_mut(size).zip(halves) {
                let pairs = bundle[first..first + bytes].as_chunks_mut::<2>().0.iter_mut();
                pairs.zip(lower.iter().zip(upper)).for_each(|(pair, (l, u))| *pair = [*l, *u]);
            }
        } else if bytes > 0 {
            for (bundle, part) in bundles.chunks_exact_mut(size).zip(part.chunks_exact(bytes)) {
                bundle[first..first + bytes].copy_from_slice(part);
            }
        }
        planes = rest;
        first += bytes;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use thermocline_kernels::BundleLayout;

    fn content(encoding: Encoding) -> Content {
        Content::Bundles(BundleLayout::new(encoding, 64).expect("whole groups"))
    }

    #[test]
    fn planes_come_together_again() {
        for content in [Encoding::Bf16, Encoding::Q8, Encoding::Q4]
            .map(content)
            .into_iter()
            .chain([Content::Coarse { hidden_size: 64 }])
        {
            // Small numbers, so that planes are worth a frame.
            let raw: Vec<u8> = (0..7 * content.bundle_bytes()).map(|i| (i * 7 % 13) as u8 * (i % 2) as u8).collect();
            let (codec, stored) = encode(Compression::Archive(3), &content, &raw);
            assert_eq!(codec, Codec::ZstdPlanes);
            let mut out = vec![0xff; raw.len()];
            assert!(decode(codec, &content, &stored, &mut out) && out == raw, "{content:?}");
            assert!(!decode(codec, &content, &stored[..stored.len() - 1], &mut out));
            assert!(!decode(codec, &content, &stored, &mut out[1..]));
        }
    }
}
