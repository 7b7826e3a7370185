//! Rows as planes: what a layer's neurons, or a matrix, are stored as.

use crate::plane_file::Content;
use rayon::prelude::*;
use thermocline_kernels::exact::{PackedRow, bf16x, bits16, residual};
use thermocline_kernels::{BundleLayout, Encoding, PackError, ScaleFit, pack};

/// The suffixes of the names of planes over the base, of tensors (`NAME.coarse`) and of files (`000.coarse.thm`).
pub(crate) fn plane_names(encoding: Encoding) -> &'static [&'static str] {
    match encoding {
        Encoding::Q4Exact => &["coarse", "final"],
        Encoding::Q8Exact => &["final"],
        _ => &[],
    }
}

/// Encodes one row. In exact encodings nothing is refused.
///
/// # Errors
/// If a plain encoding cannot hold a weight.
pub(crate) fn pack_row(encoding: Encoding, row: &[f32], fit: ScaleFit<'_>) -> Result<PackedRow, PackError> {
    if encoding.has_stream() {
        let bits: Vec<u16> = row.iter().map(|&v| bits16(v)).collect();
        return Ok(if encoding == Encoding::Bf16x { bf16x::pack(&bits) } else { residual::pack(encoding, &bits, fit) });
    }
    let mut packed = PackedRow { base: vec![0; encoding.row_stride(row.len())], ..PackedRow::default() };
    pack(encoding, row, fit, &mut packed.base)?;
    Ok(packed)
}

/// The planes of bundles of `rows` (3) rows, or of matrix rows (1), the base first: the rows of bundle i from `i * rows`
/// on.
pub(crate) fn lay_out(encoding: Encoding, columns: usize, rows: usize, packed: &[PackedRow]) -> Vec<Vec<u8>> {
    let streams = |bundle: &[PackedRow]| bundle.iter().map(|r| r.stream.len()).sum::<usize>();
    let longest = packed.chunks_exact(rows).map(streams).max().unwrap_or(0);
    let base = encoding.base();
    let (code_bytes, scale_bytes) = (base.code_bytes(columns), base.scale_bytes(columns));
    // Heads and streams of what has no further planes belong to the base.
    let is_whole = encoding == base;
    let tail_bytes = rows * encoding.head_bytes(columns) + longest;
    let base_bytes = (rows * (code_bytes + scale_bytes)).next_multiple_of(16);
    let base_bytes = if is_whole { (base_bytes + tail_bytes).next_multiple_of(16) } else { base_bytes };
    let plane = |bytes: usize, fill: &(dyn Fn(&[PackedRow], &mut [u8]) + Sync)| {
        let mut out = vec![0; packed.len() / rows * bytes];
        out.par_chunks_exact_mut(bytes).zip(packed.par_chunks_exact(rows)).for_each(|(out, rows)| fill(rows, out));
        out
    };
    let tail = |rows: &[PackedRow], out: &mut [u8]| {
        let parts = rows.iter().map(|r| &r.head).chain(rows.iter().map(|r| &r.stream));
        let mut at = 0;
        for part in parts {
            out[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
    };
    let mut planes = vec![plane(base_bytes, &|packed, out| {
        let tail_at = (rows * (code_bytes + scale_bytes)).next_multiple_of(16);
        for (which, row) in packed.iter().enumerate() {
            out[which * code_bytes..][..code_bytes].copy_from_slice(&row.base[..code_bytes]);
            let scales = &row.base[code_bytes..code_bytes + scale_bytes];
            out[rows * code_bytes + which * scale_bytes..][..scale_bytes].copy_from_slice(scales);
        }
        if is_whole {
            tail(packed, &mut out[tail_at..]);
        }
    })];
    let coarse_bytes = encoding.coarse_bytes(columns);
    if coarse_bytes > 0 {
        planes.push(plane((rows * coarse_bytes).next_multiple_of(16), &|packed, out| {
            let rows = out.chunks_exact_mut(coarse_bytes).zip(packed);
            rows.for_each(|(out, row)| out.copy_from_slice(&row.coarse));
        }));
    }
    if !is_whole {
        planes.push(plane(tail_bytes.next_multiple_of(16), &tail));
    }
    planes
}

/// What the files of these planes hold, three rows a bundle.
pub(crate) fn contents(encoding: Encoding, hidden_size: usize, planes: &[Vec<u8>], n: usize) -> Vec<Content> {
    let bytes = |plane: &Vec<u8>| plane.len() / n.max(1);
    let layout = |streams: usize| BundleLayout::with_streams(encoding.base(), hidden_size, streams);
    let base = layout(0).map(|bare| bare.used_bytes(&[])).filter(|_| encoding.base().has_stream());
    let base = layout(base.map_or(0, |fixed| bytes(&planes[0]).saturating_sub(fixed)));
    let names = plane_names(encoding).iter().zip(&planes[1..]);
    let further = names.map(|(name, plane)| match *name {
        "coarse" => Content::Coarse { hidden_size },
        _ => Content::Final { hidden_size, bytes: bytes(plane) },
    });
    base.map(Content::Bundles).into_iter().chain(further).collect()
}
