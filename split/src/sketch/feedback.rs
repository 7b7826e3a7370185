//! Rounding with feedback: what a column's rounding does to a row's products is made good by the columns that are still to be
//! rounded, as far as the inputs' covariance allows.
//!
//! Paper: GPTQ, arXiv 2210.17323, section 3 (its Cholesky form, and the order of columns by falling variance that its authors
//! call `act_order`); units keep the scales that they have in the order of the columns.

use super::trellis::{DECIDED, FeedbackSearch, Subsets, WINDOW, search, walk};
use super::{CopyBits, RowCopy, unsketch_columns};
use crate::{Error, Result};
use faer::linalg::solvers::{DenseSolveCore, Llt};
use faer::{Mat, MatRef, Side};
use half::f16;
use ndarray::Array2;
use rayon::prelude::*;
use thermocline_kernels::{
    Encoding, GROUP, PackError, RowRef, SKETCH_UNIT, ScaleFit, SketchBits, pack, sketch_row, sketch_scales, unsketch,
};

/// Added to the inputs' variances, as a share of their mean.
const DAMPING: f64 = 0.01;
/// Rows that one task rounds together: each row of the factor is read once for all of them.
const TASK_ROWS: usize = 32;
/// Inputs that are in memory as f64 at a time.
const BLOCK_ROWS: usize = 2048;
/// Rounds of least squares for a unit's scale, codes and scale in turn.
const SCALE_ROUNDS: usize = 2;

/// What rounding needs to know of a layer's inputs.
#[derive(Debug, Clone)]
pub struct Feedback {
    /// The column that is rounded at each step: the most variable first.
    order: Vec<u32>,
    /// The upper Cholesky factor of the inverse of the inputs' second moment, rows and columns in that order, `[n, n]`.
    factor: Vec<f32>,
}

/// Encoded rows, or the number of one that cannot be and why.
pub(crate) type PackedRows = std::result::Result<Vec<u8>, (usize, PackError)>;

/// Rows in their new form.
pub(crate) struct Rounded {
    /// `[n_rows, row_bytes]`.
    pub bytes: Vec<u8>,
    /// Root mean square of what each row's product with an input loses, `[n_rows]`.
    pub errors: Vec<f32>,
}

impl Feedback {
    /// From the inputs `[n_tokens, n]` themselves.
    ///
    /// # Errors
    /// If one of them is not finite.
    pub fn of_inputs(inputs: &[f32], n: usize) -> Result<Self> {
        let n_tokens = inputs.len() / n.max(1);
        let mut sums = Mat::<f64>::zeros(n, n);
        for block in inputs.chunks(BLOCK_ROWS * n.max(1)) {
            let rows = Mat::from_fn(block.len() / n.max(1), n, |i, j| f64::from(block[i * n + j]));
            sums += rows.transpose() * &rows;
        }
        Self::new(&Array2::from_shape_fn((n, n), |(i, j)| sums[(i, j)] / n_tokens.max(1) as f64))
    }

    /// From the second moment `[n, n]` of the inputs.
    pub(crate) fn new(moment: &Array2<f64>) -> Result<Self> {
        let n = moment.nrows();
        let fail = |reason: String| Error::from(thermocline_calibrate::Error::Fit { reason });
        if moment.iter().any(|v| !v.is_finite()) {
            return Err(fail("the second moment of the inputs is not finite".to_owned()));
        }
        let mut order: Vec<u32> = (0..n as u32).collect();
        order.sort_by(|&a, &b| moment[(b as usize, b as usize)].total_cmp(&moment[(a as usize, a as usize)]));
        let mean = moment.diag().sum() / n.max(1) as f64;
        let damping = if mean > 0.0 { DAMPING * mean } else { 1.0 };
        let damped = Mat::from_fn(n, n, |i, j| {
            moment[(order[i] as usize, order[j] as usize)] + if i == j { damping } else { 0.0 }
        });
        let llt = |m: MatRef<'_, f64>| {
            Llt::new(m, Side::Lower).map_err(|e| fail(format!("the second moment of the inputs has no inverse: {e:?}")))
        };
        let inverse = llt(damped.as_ref())?.inverse();
        let inverse = llt(inverse.as_ref())?;
        let lower = inverse.L();
        let factor = (0..n).flat_map(|i| (0..n).map(move |j| (i, j)));
        // The lower factor's transpose.
        let factor = factor.map(|(i, j)| if j < i { 0.0 } else { lower[(j, i)] as f32 }).collect();
        Ok(Self { order, factor })
    }

    /// The input channel of each column of rounded rows, `[n]`.
    pub(crate) fn order(&self) -> &[u32] {
        &self.order
    }

    /// Rounds `weights [n_rows, n]`; the columns of the new rows are in the order of rounding.
    pub(crate) fn round(&self, bits: SketchBits, weights: &[f32]) -> Rounded {
        let n = self.order.len();
        let n_rows = weights.len() / n.max(1);
        let (mut bytes, mut errors) = (vec![0; n_rows * bits.row_bytes(n)], vec![0.0; n_rows]);
        let rows = bytes.par_chunks_mut(TASK_ROWS * bits.row_bytes(n)).zip(errors.par_chunks_mut(TASK_ROWS));
        rows.zip(weights.par_chunks(TASK_ROWS * n)).for_each(|((bytes, errors), weights)| {
            self.round_task(bits, weights, bytes, errors);
        });
        Rounded { bytes, errors }
    }

    fn round_task(&self, bits: SketchBits, weights: &[f32], bytes: &mut [u8], errors: &mut [f32]) {
        let n = self.order.len();
        let mut left = self.in_order(weights);
        let wished: Vec<f32> = left.chunks_exact(SKETCH_UNIT).map(|unit| unit_scale(bits, unit)).collect();
        let mut scales = vec![0.0; wished.len()];
        for (wished, scales) in wished.chunks_exact(n / SKETCH_UNIT).zip(scales.chunks_exact_mut(n / SKETCH_UNIT)) {
            sketch_scales(wished, scales);
        }
        let (mut codes, mut states) = (vec![0u8; weights.len()], vec![0; errors.len()]);
        let (subsets, mut search) = (Subsets::new(bits), FeedbackSearch::new(bits));
        errors.fill(0.0);
        let mut first = 0;
        while first < n {
            let end = (first + WINDOW).min(n);
            let decided = if end == n { n } else { first + DECIDED };
            for (row, state) in states.iter().enumerate() {
                let codes = &mut codes[row * n + first..row * n + end];
                let scales = |column: usize| scales[row * (n / SKETCH_UNIT) + (first + column) / SKETCH_UNIT];
                let factor = |i: usize| &self.factor[(first + i) * n + first + i..(first + i + 1) * n];
                search.search(*state, &left[row * n + first..row * n + end], factor, scales, codes);
            }
            for column in first..decided {
                let factor = &self.factor[column * n + column..(column + 1) * n];
                for (row, left) in left.chunks_exact_mut(n).enumerate() {
                    let (level, state) = subsets.level(states[row], codes[row * n + column]);
                    states[row] = state;
                    let scale = scales[row * (n / SKETCH_UNIT) + column / SKETCH_UNIT];
                    let error = (left[column] - scale * level) / factor[0];
                    errors[row] += error * error;
                    // What this column left is spread over those to come; its own place is of no use any more.
                    left[column..].iter_mut().zip(factor).for_each(|(w, f)| *w -= error * f);
                }
            }
            first = decided;
        }
        errors.iter_mut().for_each(|error| *error = error.sqrt());
        for (row, out) in bytes.chunks_exact_mut(bits.row_bytes(n)).enumerate() {
            sketch_row(
                bits,
                &codes[row * n..(row + 1) * n],
                &wished[row * (n / SKETCH_UNIT)..(row + 1) * (n / SKETCH_UNIT)],
                out,
            );
        }
    }

    /// Rows `[n_rows, n]` with their columns in the order of rounding.
    fn in_order(&self, rows: &[f32]) -> Vec<f32> {
        rows.chunks_exact(self.order.len()).flat_map(|row| self.order.iter().map(|&j| row[j as usize])).collect()
    }

    /// Rounds `weights [n_rows, n]` column by column; `round(row, column, weight)` is the value that is kept of a weight with what
    /// the columns before left it to make good. `errors [n_rows]` become the root mean squares of what products lose.
    fn spread(&self, weights: &[f32], errors: &mut [f32], mut round: impl FnMut(usize, usize, f32) -> f32) {
        let n = self.order.len();
        errors.fill(0.0);
        // Columns in the order of rounding.
        let mut left = self.in_order(weights);
        for (step, &column) in self.order.iter().enumerate() {
            let factor = &self.factor[step * n + step..(step + 1) * n];
            for (row, left) in left.chunks_exact_mut(n).enumerate() {
                let error = (left[step] - round(row, column as usize, left[step])) / factor[0];
                errors[row] += error * error;
                // What this step left is spread over the columns to come; the own column's place is of no use any more.
                left[step..].iter_mut().zip(factor).for_each(|(w, f)| *w -= error * f);
            }
        }
        errors.iter_mut().for_each(|error| *error = error.sqrt());
    }

    /// Encodes `weights [n_rows, n]` as rows `[n_rows, row_stride]` of codes with scales for groups, which are those that `fit` finds
    /// for the weights as they are.
    ///
    /// # Errors
    /// The row with a weight that cannot be stored.
    pub(crate) fn pack(&self, encoding: Encoding, weights: &[f32], fit: ScaleFit<'_>) -> PackedRows {
        let n = self.order.len();
        let (stride, groups) = (encoding.row_stride(n), n / GROUP);
        let (low, high) = if encoding == Encoding::Q8 { (-127.0, 127.0) } else { (-8.0, 7.0) };
        let mut bytes = vec![0; weights.len() / n * stride];
        let tasks = bytes.par_chunks_mut(TASK_ROWS * stride).zip(weights.par_chunks(TASK_ROWS * n)).enumerate();
        tasks.try_for_each(|(task, (bytes, weights))| {
            let mut scales = Vec::with_capacity(weights.len() / GROUP);
            for (i, (row, out)) in weights.chunks_exact(n).zip(bytes.chunks_exact_mut(stride)).enumerate() {
                pack(encoding, row, fit, out).map_err(|e| (task * TASK_ROWS + i, e))?;
                let stored = RowRef::from_matrix_row(encoding, n, out).scales.as_chunks().0;
                scales.extend(stored[..groups].iter().map(|bytes| f16::from_le_bytes(*bytes)));
            }
            let (mut kept, mut errors) = (weights.to_vec(), vec![0.0; weights.len() / n]);
            self.spread(weights, &mut errors, |row, column, weight| {
                let scale = scales[row * groups + column / GROUP].to_f32();
                let code = if scale == 0.0 { 0.0 } else { (weight / scale).round_ties_even().clamp(low, high) };
                kept[row * n + column] = code * scale;
                code * scale
            });
            let rows = kept.chunks_exact(n).zip(scales.chunks_exact(groups)).zip(bytes.chunks_exact_mut(stride));
            for (i, ((row, scales), out)) in rows.enumerate() {
                pack(encoding, row, ScaleFit::Given(scales), out).map_err(|e| (task * TASK_ROWS + i, e))?;
            }
            Ok(())
        })?;
        Ok(bytes)
    }

    /// A copy of `weights [n_rows, n]` in few bits, as f32.
    ///
    /// # Errors
    /// If `n` is not a multiple of 64, which weights share a scale.
    pub fn copy(&self, bits: CopyBits, weights: &[f32]) -> Result<RowCopy> {
        let n = self.order.len();
        let row_bytes = bits.row_bytes(n)?;
        let mut rows = vec![0.0; weights.len()];
        let errors = match bits.of_sketch() {
            Some(bits) => {
                let Rounded { bytes, errors } = self.round(bits, weights);
                let stored = bytes.par_chunks_exact(row_bytes);
                rows.par_chunks_exact_mut(n)
                    .zip(stored)
                    .for_each(|(row, stored)| unsketch_columns(bits, stored, &self.order, row));
                errors
            }
            None => {
                let mut errors = vec![0.0; weights.len() / n];
                let tasks = rows.par_chunks_mut(TASK_ROWS * n).zip(errors.par_chunks_mut(TASK_ROWS));
                tasks.zip(weights.par_chunks(TASK_ROWS * n)).for_each(|((rows, errors), weights)| {
                    let scales: Vec<f32> = weights.chunks_exact(n).flat_map(sign_scales).collect();
                    self.spread(weights, errors, |row, column, weight| {
                        let value = scales[row * (n / SKETCH_UNIT) + column / SKETCH_UNIT].copysign(weight);
                        rows[row * n + column] = value;
                        value
                    });
                });
                errors
            }
        };
        Ok(RowCopy { rows, errors, row_bytes })
    }
}

/// The scales of a row's units, of which signs are kept, as they would be stored: those of the least squared error.
fn sign_scales(row: &[f32]) -> Vec<f32> {
    let mean = |unit: &[f32]| unit.iter().map(|w| w.abs()).sum::<f32>() / unit.len() as f32;
    let wished: Vec<f32> = row.chunks_exact(SKETCH_UNIT).map(mean).collect();
    let mut scales = vec![0.0; wished.len()];
    sketch_scales(&wished, &mut scales);
    scales
}

/// Rounds `weights [n_rows, columns]` for the least squared error of each row: for rows that are added up, not multiplied with an
/// input. `errors` are the lengths of what the rows lose.
pub(crate) fn round_alone(bits: SketchBits, weights: &[f32], columns: usize) -> Rounded {
    let n_rows = weights.len() / columns.max(1);
    let (mut bytes, mut errors) = (vec![0; n_rows * bits.row_bytes(columns)], vec![0.0; n_rows]);
    let rows = bytes.par_chunks_mut(bits.row_bytes(columns)).zip(&mut errors);
    rows.zip(weights.par_chunks(columns)).for_each(|((bytes, error), row)| {
        let wished: Vec<f32> = row.chunks_exact(SKETCH_UNIT).map(|unit| unit_scale(bits, unit)).collect();
        *error = round_row(bits, row, &wished, Search::Best, bytes).iter().map(|lost| lost.powi(2)).sum::<f32>().sqrt();
    });
    Rounded { bytes, errors }
}

/// Encodes `weights [n_rows, columns]` as rows `[n_rows, row_stride]`, each weight for itself.
///
/// # Errors
/// The row with a weight that cannot be stored.
pub(crate) fn pack_alone(encoding: Encoding, weights: &[f32], columns: usize, fit: ScaleFit<'_>) -> PackedRows {
    let stride = encoding.row_stride(columns);
    let mut bytes = vec![0; weights.len() / columns.max(1) * stride];
    let rows = bytes.par_chunks_mut(stride).zip(weights.par_chunks(columns)).enumerate();
    rows.try_for_each(|(i, (out, row))| pack(encoding, row, fit, out).map_err(|e| (i, e)))?;
    Ok(bytes)
}

/// How codes of a row are found for the least squared error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Search {
    /// The best ones.
    Best,
    /// Column by column.
    Quick,
}

/// Rounds one row under the scale wished for its units, `wished [columns / 64]`; `bytes` is a row long. Returns what each weight
/// loses, `[columns]`.
pub(crate) fn round_row(bits: SketchBits, row: &[f32], wished: &[f32], how: Search, bytes: &mut [u8]) -> Vec<f32> {
    let mut scales = vec![0.0; wished.len()];
    sketch_scales(wished, &mut scales);
    let (mut codes, mut lost) = (vec![0; row.len()], vec![0.0; row.len()]);
    let (subsets, scale) = (Subsets::new(bits), |column: usize| scales[column / SKETCH_UNIT]);
    match how {
        Search::Best => search(&subsets, row, scale, &mut codes),
        Search::Quick => walk(&subsets, row, scale, &mut codes),
    }
    sketch_row(bits, &codes, wished, bytes);
    unsketch(bits, bytes, &mut lost);
    lost.iter_mut().zip(row).for_each(|(lost, weight)| *lost = weight - *lost);
    lost
}

/// The scale of the least squared error, found by turns from the one that suits normal weights.
pub(crate) fn unit_scale(bits: SketchBits, unit: &[f32]) -> f32 {
    let rms = (unit.iter().map(|w| w * w).sum::<f32>() / unit.len() as f32).sqrt();
    let mut scale = rms * bits.normal_scale();
    let subsets = Subsets::new(bits);
    let mut codes = [0; SKETCH_UNIT];
    for _ in 0..SCALE_ROUNDS {
        search(&subsets, unit, |_| scale, &mut codes);
        let (mut product, mut square, mut state) = (0.0, 0.0, 0);
        for (w, code) in unit.iter().zip(codes) {
            let (level, next) = subsets.level(state, code);
            product += w * level;
            square += level * level;
            state = next;
        }
        if product <= 0.0 {
            break;
        }
        scale = product / square;
    }
    scale
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use thermocline_datasets::Random;
    use thermocline_kernels::unpack;

    const COLUMNS: usize = 192;

    /// Inputs that depend on each other, `[n, COLUMNS]`.
    fn inputs(n: usize) -> Vec<f32> {
        let mut random = Random::new(5);
        let mix: Vec<f32> = (0..COLUMNS * COLUMNS).map(|_| random.normal()).collect();
        (0..n)
            .flat_map(|_| {
                let z: Vec<f32> = (0..COLUMNS).map(|k| random.normal() / (1.0 + k as f32 / 8.0)).collect();
                mix.chunks_exact(COLUMNS).map(|m| m.iter().zip(&z).map(|(m, z)| m * z).sum::<f32>()).collect::<Vec<_>>()
            })
            .collect()
    }

    fn moment(x: &[f32]) -> Array2<f64> {
        let n = (x.len() / COLUMNS) as f64;
        Array2::from_shape_fn((COLUMNS, COLUMNS), |(i, j)| {
            x.chunks_exact(COLUMNS).map(|x| f64::from(x[i]) * f64::from(x[j])).sum::<f64>() / n
        })
    }

    /// Root mean square over inputs of each row's lost products; `columns`: the channels of the row's columns.
    fn lost(bits: SketchBits, weights: &[f32], rounded: &Rounded, columns: &[u32], x: &[f32]) -> Vec<f64> {
        let rows = weights.chunks_exact(COLUMNS).zip(rounded.bytes.chunks_exact(bits.row_bytes(COLUMNS)));
        rows.map(|(w, row)| {
            let mut stored = vec![0.0; COLUMNS];
            unsketch_columns(bits, row, columns, &mut stored);
            let of = |x: &[f32]| w.iter().zip(&stored).zip(x).map(|((w, s), x)| f64::from((w - s) * x)).sum::<f64>();
            (x.chunks_exact(COLUMNS).map(|x| of(x).powi(2)).sum::<f64>() * COLUMNS as f64 / x.len() as f64).sqrt()
        })
        .collect()
    }

    #[test]
    fn feedback_halves_the_error_and_knows_what_is_left() {
        let x = inputs(600);
        let mut random = Random::new(9);
        let weights: Vec<f32> = (0..40 * COLUMNS).map(|_| random.normal() * 0.1).collect();
        let feedback = Feedback::new(&moment(&x)).unwrap();
        for bits in [SketchBits::Two, SketchBits::Three] {
            let rounded = feedback.round(bits, &weights);
            let got = lost(bits, &weights, &rounded, feedback.order(), &x);
            let in_place: Vec<u32> = (0..COLUMNS as u32).collect();
            let alone = lost(bits, &weights, &round_alone(bits, &weights, COLUMNS), &in_place, &x);
            let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
            assert!(mean(&got) < 0.5 * mean(&alone), "{bits:?}: {} against {}", mean(&got), mean(&alone));
            // Up to the damping, which counts as error too.
            for (got, told) in got.iter().zip(&rounded.errors) {
                assert!((0.7..=1.02).contains(&(got / f64::from(*told))), "{bits:?}: {got}, told {told}");
            }
        }
    }

    /// Codes with scales, against the rows' products with inputs: the same scales as each weight for itself, and much less is lost; where
    /// inputs have nothing to do with each other, the same bytes.
    #[test]
    fn codes_with_feedback_keep_the_scales_and_lose_less() {
        let x = inputs(600);
        let mut random = Random::new(13);
        let weights: Vec<f32> = (0..40 * COLUMNS).map(|_| random.normal() * 0.1).collect();
        let feedback = Feedback::of_inputs(&x, COLUMNS).unwrap();
        let unrelated = Feedback::new(&Array2::from_diag_elem(COLUMNS, 2.0)).unwrap();
        for encoding in [Encoding::Q4, Encoding::R4, Encoding::Q8] {
            let stride = encoding.row_stride(COLUMNS);
            let alone = pack_alone(encoding, &weights, COLUMNS, ScaleFit::LeastSquares).unwrap();
            let rounded = feedback.pack(encoding, &weights, ScaleFit::LeastSquares).unwrap();
            assert_eq!(unrelated.pack(encoding, &weights, ScaleFit::LeastSquares).unwrap(), alone);
            let lost = |bytes: &[u8]| {
                let rows = weights.chunks_exact(COLUMNS).zip(bytes.chunks_exact(stride));
                let of = |(row, stored): (&[f32], &[u8])| {
                    let mut back = vec![0.0; COLUMNS];
                    unpack(encoding, RowRef::from_matrix_row(encoding, COLUMNS, stored), &mut back);
                    let product = |x: &[f32]| (0..COLUMNS).map(|j| f64::from((row[j] - back[j]) * x[j])).sum::<f64>();
                    x.chunks_exact(COLUMNS).map(|x| product(x).powi(2)).sum::<f64>()
                };
                rows.map(of).sum::<f64>()
            };
            assert!(lost(&rounded) < 0.3 * lost(&alone), "{encoding}: {} of {}", lost(&rounded), lost(&alone));
            let scales = |bytes: &[u8]| -> Vec<u8> {
                let rows = bytes.chunks_exact(stride);
                rows.flat_map(|row| RowRef::from_matrix_row(encoding, COLUMNS, row).scales.to_vec()).collect()
            };
            assert_eq!(scales(&rounded), scales(&alone));
        }
        let mut large = weights;
        large[37 * COLUMNS + 5] = 1e9;
        let (row, error) = feedback.pack(Encoding::Q4, &large, ScaleFit::LeastSquares).unwrap_err();
        assert!(row == 37 && error.to_string().contains("column 5"), "{row}: {error}");
    }

    /// Against the rows' products with inputs: more bits lose less, and all know what they lose.
    #[test]
    fn copies_lose_what_they_say() {
        let x = inputs(600);
        let mut random = Random::new(11);
        let weights: Vec<f32> = (0..40 * COLUMNS).map(|_| random.normal() * 0.1).collect();
        let feedback = Feedback::of_inputs(&x, COLUMNS).unwrap();
        let mut means = Vec::new();
        for (bits, row_bytes) in [(CopyBits::One, 29), (CopyBits::Two, 53), (CopyBits::Three, 77)] {
            let copy = feedback.copy(bits, &weights).unwrap();
            assert_eq!((copy.row_bytes, copy.rows.len()), (row_bytes, weights.len()));
            let mut sum = 0.0;
            for (i, told) in copy.errors.iter().enumerate() {
                let row = i * COLUMNS..(i + 1) * COLUMNS;
                let (row, kept) = (&weights[row.clone()], &copy.rows[row]);
                let lost = |x: &[f32]| (0..COLUMNS).map(|j| f64::from((row[j] - kept[j]) * x[j])).sum::<f64>().powi(2);
                let lost = (x.chunks_exact(COLUMNS).map(lost).sum::<f64>() / 600.0).sqrt();
                assert!((0.7..=1.02).contains(&(lost / f64::from(*told))), "{bits:?}: {lost}, told {told}");
                sum += lost;
            }
            means.push(sum / copy.errors.len() as f64);
        }
        assert!(means.windows(2).all(|w| w[1] < 0.7 * w[0]), "{means:?}");
        // One bit is a sign and a scale of its unit.
        let signs = feedback.copy(CopyBits::One, &weights).unwrap().rows;
        for unit in signs.chunks_exact(64) {
            assert!(unit.iter().all(|v| v.abs() == unit[0].abs()));
        }
        let narrow = Feedback::of_inputs(&[1.0; 70], 70).unwrap().copy(CopyBits::One, &[1.0; 70]).unwrap_err();
        assert!(narrow.to_string().contains("70 is no multiple of 64"), "{narrow}");
    }

    #[test]
    fn rows_alone_tell_the_length_of_what_is_lost() {
        let mut random = Random::new(2);
        let mut weights: Vec<f32> = (0..4 * COLUMNS).map(|_| random.normal()).collect();
        weights[COLUMNS..2 * COLUMNS].fill(0.0);
        let rounded = round_alone(SketchBits::Two, &weights, COLUMNS);
        let mut stored = vec![0.0; COLUMNS];
        for (r, row) in rounded.bytes.chunks_exact(SketchBits::Two.row_bytes(COLUMNS)).enumerate() {
            unsketch(SketchBits::Two, row, &mut stored);
            let w = &weights[r * COLUMNS..(r + 1) * COLUMNS];
            let length = w.iter().zip(&stored).map(|(w, s)| (w - s).powi(2)).sum::<f32>().sqrt();
            assert!((length - rounded.errors[r]).abs() <= 1e-4 * length, "row {r}");
            // About 0.08 of the energy for normal weights.
            let all = w.iter().map(|w| w * w).sum::<f32>().sqrt();
            assert!(length <= 0.3 * all, "row {r}: {length} of {all}");
        }
    }

    #[test]
    fn inputs_that_never_vary_are_no_failure_and_what_is_not_finite_is() {
        let mut m = Array2::zeros((64, 64));
        assert!(Feedback::new(&m).is_ok());
        m[(3, 4)] = f64::NAN;
        assert!(Feedback::new(&m).is_err());
    }
}
