//! How sparse mode chooses in graded precision, and what that costs, by the share of the neurons that are always computed and by the
//! share of the others that is chosen; and the least share that keeps a promise.

use crate::curve::{Curve, Promise, bytes_of, measured_of};
use crate::error::{Result, corrupt};
use crate::tensor_file::{Format, TensorFile, TensorFileEntry, Writer};
use crate::{Error, GradedThresholds, Manifest, Split};
use serde::Serialize;
use std::path::Path;

/// Two names, so that a new file can grow beside the one in use.
const FILES: [&str; 2] = ["graded.safetensors", "graded.1.safetensors"];

const ALWAYS: &str = "graded.always";
const ACTIVE: &str = "graded.active";
const RESIDUAL_RMS: &str = "graded.residual_rms";
const THRESHOLD: &str = "graded.threshold";
const ROW_THRESHOLD: &str = "graded.row_threshold";
const ERROR_FACTORS: &str = "graded.error_factors";
const INCREASE: &str = "graded.ppl_increase";
const INCREASE_HIGH: &str = "graded.ppl_increase_high";
const MEASURED: &str = "graded.measured";

/// The thresholds by which neurons or their rows are chosen, and what they cost: a curve for each of several shares of the neurons that are always
/// computed; the active shares of each are of the others.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GradedCurves {
    #[serde(skip)]
    thresholds: GradedThresholds,
    curves: Vec<GradedCurve>,
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GradedCurve {
    /// Share of each layer's neurons, the first in the split's order, that are always computed: 0 to below 1.
    pub always: f32,
    /// What the share of the others costs that is computed of them.
    #[serde(flatten)]
    pub curve: Curve,
}

impl GradedCurves {
    /// Of `curves`, measured with `thresholds` at their shares, all on the same text; none if that was not measured.
    ///
    /// # Errors
    /// [`Error::Settings`] if they differ in what they were measured at.
    pub fn new(thresholds: GradedThresholds, curves: Vec<GradedCurve>) -> Result<Self> {
        if curves.is_empty() {
            return Ok(Self { thresholds, curves });
        }
        let refused = |what: &str| Err(Error::Settings { what: what.to_owned() });
        if !curves.iter().map(|c| c.always).eq(thresholds.always().iter().copied()) {
            return refused("graded curves must be of the shares that thresholds are for");
        }
        let is_at = |c: &GradedCurve| c.curve.points().map(|p| p.0).eq(thresholds.active().iter().copied());
        if !(curves.iter().all(is_at) && curves.windows(2).all(|w| w[0].curve.is_measured_as(&w[1].curve))) {
            return refused("graded curves must have the thresholds' active shares, and the same tokens and text");
        }
        Ok(Self { thresholds, curves })
    }

    /// By which neurons are chosen.
    pub fn thresholds(&self) -> &GradedThresholds {
        &self.thresholds
    }

    /// By rising share of the neurons that are always computed; none if that was not measured.
    pub fn curves(&self) -> &[GradedCurve] {
        &self.curves
    }

    /// The least share of the neurons that are not always computed at which the perplexity rises by no more than
    /// `max_ppl_increase` (at least 0), if `always` (0 to 1) of the neurons are: by the curve of the largest measured share that is
    /// not above it, since more neurons that are computed cost nothing. See [`Curve::promise`]. `None` if nothing was measured.
    pub fn promise(&self, always: f32, max_ppl_increase: f64) -> Option<Promise> {
        let below = self.curves.iter().rev().find(|c| c.always <= always).or(self.curves.first())?;
        Some(Promise { always: Some(below.always), ..below.curve.promise(max_ppl_increase) })
    }

    fn tensors(&self) -> Vec<(String, Format, usize, usize, Vec<u8>)> {
        let by = &self.thresholds;
        let (k, n) = (by.always().len(), by.active().len());
        let of_each = |of: fn((f32, f32, f32)) -> f32| -> Vec<f32> {
            self.curves.iter().flat_map(|c| c.curve.points().map(of)).collect()
        };
        let floats = |name: &str, rows: usize, columns: usize, values: &[f32]| {
            (name.to_owned(), Format::F32, rows, columns, bytes_of(values))
        };
        let threshold = if by.error_factors().is_some() { ROW_THRESHOLD } else { THRESHOLD };
        let mut tensors = vec![
            floats(ALWAYS, 1, k, by.always()),
            floats(ACTIVE, 1, n, by.active()),
            floats(RESIDUAL_RMS, 1, by.residual_rms().len(), by.residual_rms()),
            floats(threshold, k, n, by.thresholds()),
        ];
        if let Some(first) = self.curves.first() {
            let measured = first.curve.measured();
            tensors.push(floats(INCREASE, k, n, &of_each(|point| point.1)));
            tensors.push(floats(INCREASE_HIGH, k, n, &of_each(|point| point.2)));
            tensors.push((MEASURED.to_owned(), Format::U8, 1, measured.len(), measured));
        }
        if let Some(factors) = by.error_factors() {
            tensors.push(floats(ERROR_FACTORS, factors.len(), 2, factors.as_flattened()));
        }
        tensors
    }

    /// Whether a file that lists this tensor has thresholds of rows.
    pub(crate) fn is_of_rows(tensor: &str) -> bool {
        tensor == ROW_THRESHOLD
    }

    fn write(&self, dir: &Path, name: &str) -> Result<TensorFileEntry> {
        let tensors = self.tensors();
        let shapes = tensors.iter().map(|(name, format, rows, columns, _)| (name.clone(), *format, *rows, *columns));
        let mut writer = Writer::create(dir, name, shapes.collect())?;
        tensors.iter().try_for_each(|(name, .., bytes)| writer.write(name, bytes))?;
        writer.finish()
    }

    pub(crate) fn read(file: &TensorFile, n_layers: usize) -> Result<Self> {
        let refuse = |reason: String| corrupt(file.path(), "graded", reason);
        let of_rows = file.tensors().iter().any(|t| Self::is_of_rows(&t.name));
        let threshold = if of_rows { ROW_THRESHOLD } else { THRESHOLD };
        let is_measured = file.tensors().iter().any(|t| t.name == MEASURED);
        let [always, active, rms, thresholds] =
            [ALWAYS, ACTIVE, RESIDUAL_RMS, threshold].map(|name| file.read_f32(name));
        let (always, active, rms) = (always?, active?, rms?);
        let (k, n) = (always.len(), active.len());
        let check = |name: &str, (rows, columns): (usize, usize)| {
            let entry = file.entry(name)?;
            if rows == 0 || columns == 0 || (entry.rows, entry.columns) != (rows, columns) {
                let is = format!("{name} is [{}, {}], not [{rows}, {columns}]", entry.rows, entry.columns);
                return Err(refuse(is));
            }
            Ok(())
        };
        check(RESIDUAL_RMS, (1, n_layers))?;
        check(threshold, (k, n))?;
        let mut found = GradedThresholds::new(rms, always.clone(), active.clone(), thresholds?);
        let mut n_known = 4;
        if of_rows {
            check(ERROR_FACTORS, (n_layers, 2))?;
            let factors = file.read_f32(ERROR_FACTORS)?.as_chunks().0.to_vec();
            found = found.and_then(|thresholds| thresholds.of_rows(factors));
            n_known += 1;
        }
        let thresholds = found.map_err(|e| refuse(e.to_string()))?;
        let mut curves = Vec::new();
        if is_measured {
            check(INCREASE, (k, n))?;
            check(INCREASE_HIGH, (k, n))?;
            let (low, high) = (file.read_f32(INCREASE)?, file.read_f32(INCREASE_HIGH)?);
            let (tokens, digest) = measured_of(file, MEASURED)?;
            for (always, (low, high)) in always.into_iter().zip(low.chunks_exact(n).zip(high.chunks_exact(n))) {
                let curve = Curve::new(active.clone(), low.to_vec(), high.to_vec(), tokens, digest);
                curves.push(GradedCurve { always, curve: curve.map_err(|e| refuse(e.to_string()))? });
            }
            n_known += 3;
        }
        // All that belong here were found: of others, or of one twice, nobody knows what they mean.
        if file.tensors().len() != n_known {
            return Err(refuse(format!("{} tensors where {n_known} are known", file.tensors().len())));
        }
        Self::new(thresholds, curves).map_err(|e| refuse(e.to_string()))
    }
}

impl Split {
    /// Puts `curves` into the split in `dir`, in place of those that it has, as [`Split::put_shares`] does.
    ///
    /// # Errors
    /// If the split cannot be opened or written, or has no sketches.
    pub fn put_graded_curves(dir: &Path, curves: &GradedCurves) -> Result<()> {
        let mut manifest = Manifest::read(dir)?;
        if manifest.sketches.is_none() {
            return Err(Error::Settings { what: format!("{}: a split without sketches", dir.display()) });
        }
        if manifest.config.n_layers != curves.thresholds.residual_rms().len() {
            return Err(Error::Settings { what: format!("{}: the thresholds are another model's", dir.display()) });
        }
        let old = manifest.graded.take();
        manifest.graded = Some(curves.write(dir, crate::shares::other_name(FILES, old.as_ref()))?);
        manifest.replace_file(dir, old)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first_thresholds() -> GradedThresholds {
        GradedThresholds::new(vec![1.0; 3], vec![0.0], vec![0.1, 0.5], vec![2.0, 1.0]).unwrap()
    }

    fn of(curves: Vec<GradedCurve>) -> Result<GradedCurves> {
        let always: Vec<f32> = curves.iter().map(|c| c.always).collect();
        let rows = [2.0, 1.0].repeat(always.len());
        GradedCurves::new(GradedThresholds::new(vec![1.0; 3], always, vec![0.1, 0.5], rows)?, curves)
    }

    fn curve(always: f32, high: [f32; 2]) -> GradedCurve {
        let low = high.map(|h| h - 0.01).to_vec();
        GradedCurve { always, curve: Curve::new(vec![0.1, 0.5], low, high.to_vec(), 100, 7).unwrap() }
    }

    #[test]
    fn a_promise_goes_by_the_share_below() {
        let curves = of(vec![curve(0.0, [0.5, 0.1]), curve(0.4, [0.2, 0.05])]).unwrap();
        for (always, measured, active) in [(0.0, 0.0, 0.4), (0.39, 0.0, 0.4), (0.4, 0.4, 0.1), (1.0, 0.4, 0.1)] {
            let promise = curves.promise(always, 0.200001).unwrap();
            assert_eq!(promise.always, Some(measured));
            assert!((promise.active - active).abs() < 1e-4, "{always}: {promise:?}");
        }
        let said = curves.promise(0.45, 0.25).unwrap().to_string();
        assert!(
            said.contains("--active 0.1 with 40 % or more of the neurons always computed for at most +25 %"),
            "{said}"
        );
    }

    #[test]
    fn curves_that_do_not_belong_together_are_refused() {
        let other = |tokens, active: Vec<f32>| GradedCurve {
            always: 0.5,
            curve: Curve::new(active, vec![0.1, 0.1], vec![0.1, 0.1], tokens, 7).unwrap(),
        };
        let first = || curve(0.0, [0.5, 0.1]);
        assert!(of(vec![first(), other(100, vec![0.1, 0.5])]).is_ok());
        let unmeasured = GradedCurves::new(first_thresholds(), vec![]).unwrap();
        assert_eq!(unmeasured.promise(0.0, 0.1), None);
        for refused in [
            vec![curve(0.1, [0.5, 0.1])],
            vec![first(), first()],
            vec![first(), curve(1.0, [0.5, 0.1])],
            vec![first(), curve(f32::NAN, [0.5, 0.1])],
            vec![first(), other(99, vec![0.1, 0.5])],
            vec![first(), other(100, vec![0.2, 0.5])],
        ] {
            assert!(of(refused.clone()).is_err(), "{refused:?}");
        }
    }
}
