//! What a sketch leaves of its rows, in the codes of q4: added to the sketch's, rows come nearer to the checkpoint's than q4 has them,
//! for as many bytes.

use super::{Feedback, Sketch, pack_alone};
use crate::Error;
use crate::error::{Result, corrupt};
use crate::tensor_file::{Format, TensorFile};
use rayon::prelude::*;
use thermocline_datasets::ModelConfig;
use thermocline_kernels::{BundleLayout, Encoding, ScaleFit};

/// Where the residuals of a neuron's rows lie, if the width can have any.
pub fn residual_layout(hidden_size: usize) -> Option<BundleLayout> {
    BundleLayout::new(Encoding::R4, hidden_size)
}

impl Sketch {
    /// What it leaves of gate, up and down rows `[n_neurons, hidden]`, to which it was fitted, as bundles `[n_neurons, bundle_bytes]`; of
    /// gate and up rows rounded with `feedback`, if there is any. `fits` say what the rows' scales are chosen by; `tensors` name them in
    /// errors.
    ///
    /// # Errors
    /// If a weight is too large for what is stored.
    pub(crate) fn residuals(
        &self,
        feedback: Option<&Feedback>,
        rows: [&[f32]; 3],
        fits: [ScaleFit<'_>; 3],
        tensors: [&str; 3],
    ) -> Result<Vec<u8>> {
        let hidden = self.columns.len();
        let layout = residual_layout(hidden).expect("the width that sketches have");
        let mut bytes = vec![0; self.n_neurons() * layout.bundle_bytes()];
        for (part, (rows, fit)) in rows.into_iter().zip(fits).enumerate() {
            let mut left = self.decoded(part);
            left.par_iter_mut().zip(rows).for_each(|(left, row)| *left = row - *left);
            let packed = match feedback.filter(|_| part < 2) {
                Some(feedback) => feedback.pack(Encoding::R4, &left, fit),
                None => pack_alone(Encoding::R4, &left, hidden, fit),
            };
            let packed =
                packed.map_err(|(row, source)| Error::Pack { tensor: tensors[part].to_owned(), row, source })?;
            let packed = packed.par_chunks_exact(Encoding::R4.row_stride(hidden));
            bytes
                .par_chunks_exact_mut(layout.bundle_bytes())
                .zip(packed)
                .for_each(|(bundle, row)| layout.set_row(bundle, part, row));
        }
        Ok(bytes)
    }
}

/// The tensor of a layer's residuals: bundles in split order.
pub(crate) fn residual_tensor(layer: usize, config: &ModelConfig) -> (String, Format, usize, usize) {
    let bundle_bytes = residual_layout(config.hidden_size).map_or(0, |layout| layout.bundle_bytes());
    (format!("residuals.{layer}"), Format::U8, config.intermediate_size, bundle_bytes)
}

/// Reads the bundles of layer `layer`'s residuals from neuron `first` on, as many as `out` has room for.
///
/// # Panics
/// If there are not so many.
pub(crate) fn read(file: &TensorFile, config: &ModelConfig, layer: usize, first: usize, out: &mut [u8]) -> Result<()> {
    let (name, format, rows, bundle_bytes) = residual_tensor(layer, config);
    let entry = file.entry(&name)?;
    let layout = residual_layout(config.hidden_size);
    let fitting = layout.filter(|_| (entry.format, entry.rows, entry.columns) == (format, rows, bundle_bytes));
    let layout = fitting.ok_or_else(|| corrupt(file.path(), &name, "the shape does not fit the model"))?;
    file.read_part(entry, first, out)?;
    for (i, bundle) in out.chunks_exact(bundle_bytes).enumerate() {
        if let Some(part) = (0..3).find(|part| Encoding::R4.first_not_finite(layout.row(bundle, *part)).is_some()) {
            let reason = format!("a scale of neuron {}, row {part}, is not finite; make the split again", first + i);
            return Err(corrupt(file.path(), name, reason));
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::SketchForm;
    use ndarray::Array2;
    use thermocline_datasets::Random;
    use thermocline_kernels::unpack;

    const COLUMNS: usize = 192;
    const ROWS: usize = 40;

    fn feedback() -> Feedback {
        Feedback::new(&Array2::from_shape_fn((COLUMNS, COLUMNS), |(i, j)| f64::from(u8::from(i == j)))).unwrap()
    }

    fn sketch_of(rows: &[Vec<f32>; 3]) -> Sketch {
        Sketch::fit(SketchForm::AllInTwo, &feedback(), &rows[0], &rows[1], &rows[2], vec![1.0; ROWS])
    }

    fn residuals_of(sketch: &Sketch, rows: &[Vec<f32>; 3]) -> Result<Vec<u8>> {
        sketch.residuals(
            Some(&feedback()),
            rows.each_ref().map(Vec::as_slice),
            [ScaleFit::LeastSquares; 3],
            ["gate", "up", "down"],
        )
    }

    /// Of normal weights a group's q4 leaves about a hundredth of the energy, and so it does of what a sketch leaves.
    #[test]
    fn they_take_nearly_all_that_a_sketch_loses() {
        let mut random = Random::new(5);
        let rows: [Vec<f32>; 3] = std::array::from_fn(|_| (0..ROWS * COLUMNS).map(|_| 0.1 * random.normal()).collect());
        let sketch = sketch_of(&rows);
        let (bundles, layout) = (residuals_of(&sketch, &rows).unwrap(), residual_layout(COLUMNS).unwrap());
        for (part, rows) in rows.iter().enumerate() {
            let (mut alone, mut both) = (0.0, 0.0);
            let bundles = bundles.chunks_exact(layout.bundle_bytes());
            for (i, (row, bundle)) in rows.chunks_exact(COLUMNS).zip(bundles).enumerate() {
                let (mut sketched, mut residual) = (vec![0.0; COLUMNS], vec![0.0; COLUMNS]);
                sketch.decode_row(part, i, &mut sketched);
                unpack(Encoding::R4, layout.row(bundle, part), &mut residual);
                for ((w, s), r) in row.iter().zip(&sketched).zip(&residual) {
                    alone += (w - s).powi(2);
                    both += (w - s - r).powi(2);
                }
            }
            let share = both / alone;
            assert!((0.003..0.012).contains(&share), "part {part}: {share} of what the sketch loses");
        }
    }

    #[test]
    fn rows_of_zeros_stay_zeros_and_what_cannot_be_stored_is_named() {
        let mut rows: [Vec<f32>; 3] = std::array::from_fn(|_| vec![0.0; ROWS * COLUMNS]);
        let (sketch, layout) = (sketch_of(&rows), residual_layout(COLUMNS).unwrap());
        let mut residual = vec![f32::NAN; COLUMNS];
        for bundle in residuals_of(&sketch, &rows).unwrap().chunks_exact(layout.bundle_bytes()) {
            (0..3).for_each(|part| {
                unpack(Encoding::R4, layout.row(bundle, part), &mut residual);
                assert!(residual.iter().all(|v| *v == 0.0));
            });
        }
        rows[1][3 * COLUMNS + 7] = 1e9;
        let error = residuals_of(&sketch, &rows).unwrap_err().to_string();
        assert!(error.contains("up") && error.contains("row 3") && error.contains("column 7"), "{error}");
    }
}
