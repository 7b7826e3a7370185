//! Rows as planes: what a layer's neurons, or a matrix, are stored as.

use crate::content::Content;
use rayon::prelude::*;
use thermocline_kernels::exact::{PackedRow, bf16x, bits16, residual};
use thermocline_kernels::{BundleLayout, Encoding, PackError, ScaleFit, pack};

/// A plane over the base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Plane {
    /// Four more bits of `q4` codes.
    Coarse,
    /// What leads to the bfloat16.
    Final,
}

impl Plane {
    /// What it adds to the names of tensors (`NAME.coarse`) and of files (`000.coarse.thm`).
    pub(crate) fn name(self) -> &'static str {
        match self {
            Plane::Coarse => "coarse",
            Plane::Final => "final",
        }
    }
}

/// The planes over the base, in the order of their bytes.
pub(crate) fn further_planes(encoding: Encoding) -> &'static [Plane] {
    match encoding {
        Encoding::Q4Plus => &[Plane::Coarse],
        Encoding::Q4Exact => &[Plane::Coarse, Plane::Final],
        Encoding::Q8Exact => &[Plane::Final],
        Encoding::Bf16 | Encoding::Bf16x | Encoding::Q8 | Encoding::Q4 | Encoding::R4 => &[],
    }
}

/// The inverse: what a base becomes with these planes over it.
pub(crate) fn joined(base: Encoding, planes: &[Plane]) -> Option<Encoding> {
    Encoding::ALL.into_iter().find(|e| e.base() == base && further_planes(*e) == planes)
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
///
/// # Panics
/// If the encoding has no rows of so many columns; the settings are checked for that before anything is packed.
pub(crate) fn lay_out(encoding: Encoding, columns: usize, rows: usize, packed: &[PackedRow]) -> Vec<Vec<u8>> {
    let streams = |bundle: &[PackedRow]| bundle.iter().map(|r| r.stream.len()).sum::<usize>();
    let longest = packed.chunks_exact(rows).map(streams).max().unwrap_or(0);
    let layout = if rows == 1 {
        BundleLayout::matrix_row(encoding, columns, longest)
    } else {
        BundleLayout::with_streams(encoding, columns, longest)
    };
    let Some(layout) = layout else { unreachable!("packed rows of {columns} columns in {encoding}") };
    let base = encoding.base();
    let (code_bytes, scale_bytes) = (base.code_bytes(columns), base.scale_bytes(columns));
    // Heads and streams of what has no further planes belong to the base.
    let is_whole = encoding == base;
    let base_bytes = if is_whole { layout.bundle_bytes() } else { layout.base_bytes() };
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
        for (which, row) in packed.iter().enumerate() {
            out[which * code_bytes..][..code_bytes].copy_from_slice(&row.base[..code_bytes]);
            let scales = &row.base[code_bytes..code_bytes + scale_bytes];
            out[rows * code_bytes + which * scale_bytes..][..scale_bytes].copy_from_slice(scales);
        }
        if is_whole {
            tail(packed, &mut out[layout.base_bytes()..]);
        }
    })];
    let coarse_bytes = encoding.coarse_bytes(columns);
    if coarse_bytes > 0 {
        planes.push(plane(layout.coarse_bytes(), &|packed, out| {
            let rows = out.chunks_exact_mut(coarse_bytes).zip(packed);
            rows.for_each(|(out, row)| out.copy_from_slice(&row.coarse));
        }));
    }
    if !is_whole {
        planes.push(plane(layout.final_bytes(), &tail));
    }
    planes
}

/// What the files of these planes hold, three rows a bundle.
pub(crate) fn contents(encoding: Encoding, hidden_size: usize, planes: &[Vec<u8>], n: usize) -> Vec<Content> {
    let bytes = |plane: &Vec<u8>| plane.len() / n.max(1);
    let base = BundleLayout::of_bundle_bytes(encoding.base(), hidden_size, bytes(&planes[0]));
    let further = further_planes(encoding).iter().zip(&planes[1..]).map(|(plane, bundles)| match plane {
        Plane::Coarse => Content::Coarse { hidden_size },
        Plane::Final => Content::Final { hidden_size, bytes: bytes(bundles) },
    });
    base.map(Content::Bundles).into_iter().chain(further).collect()
}
