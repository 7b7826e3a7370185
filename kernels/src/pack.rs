use crate::exact::{self, bits16, value16};
use crate::{Encoding, GROUP, RowRef};
use half::f16;

/// A weight that an encoding cannot hold.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PackError {
    /// Not finite, or too large for an f16 scale.
    #[error("column {column}: {value} cannot be stored as {encoding}; use bf16, or mend the checkpoint")]
    OutOfRange {
        /// The column.
        column: usize,
        /// Its value.
        value: f32,
        /// The encoding asked for.
        encoding: Encoding,
    },
}

/// How the scale of a quantised group of 32 is chosen.
#[derive(Debug, Clone, Copy)]
pub enum ScaleFit<'a> {
    /// The weight of largest magnitude is mapped to the end of the range.
    Absmax,
    /// The squared error is least.
    LeastSquares,
    /// The squared error is least where a column's error counts `c (s + v^2)` times: v is the weight, s the group's mean
    /// square, c a non-negative number a column (1 if not given), usually the mean square of that input channel over a
    /// corpus. The first factor is the diagonal of the objective of GPTQ and AWQ. The second keeps large weights from
    /// being clipped for the sake of many small ones: inputs have heavy tails, which a mean square does not show, and
    /// without it models with outlier channels lose more than by absmax (README has the figures).
    Weighted(Option<&'a [f32]>),
    /// These are the scales, one for each group.
    Given(&'a [f16]),
}

/// Encodes one row as a matrix row: codes, scales, zeros up to the end of `out`.
///
/// bf16 rounds to nearest even; a value that is already bf16 keeps its bits, of a NaN too. A weight halfway between two
/// codes gets that of the larger value.
///
/// # Errors
/// If a weight is not finite or too large, for `q8` and `q4`.
///
/// # Panics
/// If the encoding is not a plain one or does not accept rows of this length, `out` is shorter than a row, a weighted fit has another
/// number of weights, or not every group is given a scale.
pub fn pack(encoding: Encoding, row: &[f32], fit: ScaleFit<'_>, out: &mut [u8]) -> Result<(), PackError> {
    assert!(encoding.is_plain(), "{encoding} rows are packed by `exact`");
    assert!(encoding.accepts(row.len()), "{encoding} cannot store rows of {}", row.len());
    if let ScaleFit::Weighted(Some(w)) = fit {
        assert_eq!(w.len(), row.len(), "one weight a column");
    }
    let n_codes = encoding.code_bytes(row.len());
    let (codes, rest) = out.split_at_mut(n_codes);
    rest.fill(0);
    if encoding == Encoding::Bf16 {
        for (o, &v) in codes.chunks_exact_mut(2).zip(row) {
            o.copy_from_slice(&bits16(v).to_le_bytes());
        }
        return Ok(());
    }
    let in_nibbles = matches!(encoding, Encoding::Q4 | Encoding::R4);
    let (low, high) = if in_nibbles { (-8.0, 7.0) } else { (-127.0, 127.0) };
    for (g, values) in row.chunks_exact(GROUP).enumerate() {
        let fit = match fit {
            ScaleFit::Weighted(Some(w)) => ScaleFit::Weighted(Some(&w[g * GROUP..(g + 1) * GROUP])),
            other => other,
        };
        let scale = match fit {
            ScaleFit::Given(scales) => scales[g],
            fit => fit_scale(values, fit, low, high),
        };
        if !scale.is_finite() {
            let worst = (0..GROUP).max_by(|&a, &b| values[a].abs().total_cmp(&values[b].abs())).unwrap_or(0);
            return Err(PackError::OutOfRange { column: g * GROUP + worst, value: values[worst], encoding });
        }
        let inverse = if scale == f16::ZERO { 0.0 } else { 1.0 / scale.to_f32() };
        let code = |v: f32| settle(v, scale.to_f32(), (v * inverse).round_ties_even() as i32, low as i32, high as i32);
        rest[2 * g..2 * g + 2].copy_from_slice(&scale.to_le_bytes());
        if in_nibbles {
            for j in 0..GROUP / 2 {
                let (lo, hi) = (code(values[j]) + 8, code(values[j + GROUP / 2]) + 8);
                codes[g * (GROUP / 2) + j] = (lo | hi << 4) as u8;
            }
        } else {
            for (o, &v) in codes[g * GROUP..].iter_mut().zip(values) {
                *o = code(v) as i8 as u8;
            }
        }
    }
    Ok(())
}

/// The code in whose cell `v` lies, the interval of one step around the code's value with its lower end, from the `code`
/// that a rounded quotient gives: a bound of the cell is exact in f32, the quotient is not. Planes over the code count
/// on that (`exact/residual.rs`).
fn settle(v: f32, scale: f32, code: i32, low: i32, high: i32) -> i32 {
    let code = code.clamp(low, high);
    let half = scale / 2.0;
    let (a, b) = ((2 * code - 1) as f32 * half, (2 * code + 1) as f32 * half);
    let up = if scale < 0.0 { -1 } else { 1 };
    let code = code + if v < a.min(b) { -up } else { up * i32::from(v >= a.max(b) && scale != 0.0) };
    code.clamp(low, high)
}

/// The f16 scale of one group.
///
/// By least squares: for fixed codes q the best scale is sum(w v q) / sum(w q q) and lowers the error by its numerator
/// squared over its denominator; the codes come from a grid of scales around the one that maps the largest value to the
/// end of the range.
fn fit_scale(values: &[f32], fit: ScaleFit<'_>, low: f32, high: f32) -> f16 {
    let mut largest = 0.0f32;
    for &v in values {
        if !v.is_finite() {
            return f16::INFINITY;
        }
        if v.abs() > largest.abs() {
            largest = v;
        }
    }
    if largest == 0.0 {
        return f16::ZERO;
    }
    let mut weights = [1.0f32; GROUP];
    match fit {
        ScaleFit::Absmax => return f16::from_f32(largest / low),
        ScaleFit::LeastSquares | ScaleFit::Given(_) => {}
        ScaleFit::Weighted(channels) => {
            // Relative to the largest weight, so that no square vanishes.
            let square = |v: f32| (v / largest).powi(2);
            let mean = values.iter().map(|&v| square(v)).sum::<f32>() / GROUP as f32;
            for (j, (w, &v)) in weights.iter_mut().zip(values).enumerate() {
                *w = (mean + square(v)) * channels.map_or(1.0, |c| c[j].max(1e-12));
            }
        }
    }
    // At 8 bits the largest weight decides; at 4 it often pays to clip it, up to about half its size.
    let steps = if high > 8.0 { -2..=2 } else { -5..=20 };
    let mut best = (f32::NEG_INFINITY, 0.0f32);
    // With an asymmetric range both signs of the scale are worth trying.
    let ends: &[f32] = if low == -high { &[high] } else { &[low, high] };
    for &end in ends {
        for step in steps.clone() {
            let scale = largest / (end * (1.0 + 0.04 * step as f32));
            let inverse = 1.0 / scale;
            if !inverse.is_finite() {
                continue;
            }
            let (mut numerator, mut denominator) = (0.0f32, 0.0f32);
            for (&v, &w) in values.iter().zip(&weights) {
                let q = (v * inverse).round_ties_even().clamp(low, high);
                numerator += w * v * q;
                denominator += w * q * q;
            }
            let gain = numerator * numerator / denominator;
            if denominator > 0.0 && gain > best.0 {
                best = (gain, numerator / denominator);
            }
        }
    }
    // Scales below the smallest f16 vanish: such a group is all zeros to the last bit that f16 can tell.
    f16::from_f32(best.1)
}

/// Decodes one row to f32. Exact: every code times its scale is computed in f32, the middle of a cell as well.
///
/// # Panics
/// If `out` is longer than the row.
pub fn unpack(encoding: Encoding, row: RowRef<'_>, out: &mut [f32]) {
    let scale = |g: usize| f16::from_le_bytes([row.scales[2 * g], row.scales[2 * g + 1]]).to_f32();
    match encoding {
        Encoding::Bf16 => {
            for (o, c) in out.iter_mut().zip(row.codes.as_chunks::<2>().0) {
                *o = value16(u16::from_le_bytes(*c));
            }
        }
        Encoding::Bf16x | Encoding::Q4Exact | Encoding::Q8Exact => {
            let mut bits = vec![0; out.len()];
            exact::decode(encoding, row, &mut bits);
            out.iter_mut().zip(bits).for_each(|(o, b)| *o = value16(b));
        }
        Encoding::Q4Plus => {
            let groups = row.codes.chunks_exact(GROUP / 2).zip(row.coarse.chunks_exact(GROUP / 2));
            for (g, (o, (c, f))) in out.chunks_exact_mut(GROUP).zip(groups).enumerate() {
                let s = scale(g) / 16.0;
                let (lo, hi) = o.split_at_mut(GROUP / 2);
                for (((lo, hi), &c), &f) in lo.iter_mut().zip(hi).zip(c).zip(f) {
                    *lo = (f32::from((c & 15) << 4 | f & 15) - 135.5) * s;
                    *hi = (f32::from(c & 0xf0 | f >> 4) - 135.5) * s;
                }
            }
        }
        Encoding::Q8 => {
            for (g, (o, c)) in out.chunks_exact_mut(GROUP).zip(row.codes.chunks_exact(GROUP)).enumerate() {
                let s = scale(g);
                for (o, &c) in o.iter_mut().zip(c) {
                    *o = f32::from(c as i8) * s;
                }
            }
        }
        Encoding::Q4 | Encoding::R4 => {
            for (g, (o, c)) in out.chunks_exact_mut(GROUP).zip(row.codes.chunks_exact(GROUP / 2)).enumerate() {
                let s = scale(g);
                let (lo, hi) = o.split_at_mut(GROUP / 2);
                for ((lo, hi), &c) in lo.iter_mut().zip(hi).zip(c) {
                    *lo = (f32::from(c & 15) - 8.0) * s;
                    *hi = (f32::from(c >> 4) - 8.0) * s;
                }
            }
        }
    }
}
