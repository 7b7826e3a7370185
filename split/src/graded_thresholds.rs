//! From which expected error on a neuron is computed, or a single row of it read, instead of left to its sketch: one threshold for all
//! layers and tokens.

use crate::Error;
use crate::error::Result;

/// Thresholds on what leaving a neuron to its sketch is expected to cost, relative to the residual stream behind the neuron's layer:
/// the same error counts for more where the stream is small, and a token or a layer in more doubt computes more neurons. For each of
/// several shares of the neurons that are always computed and each of several shares of the others, the threshold that left that
/// share on a text.
///
/// They are of whole neurons ([`crate::Sketch::judge`]) or of single rows ([`crate::Sketch::rows_to_read`]); then shares are of the
/// rows, and go with what corrects the sketches' errors of gate and up products, which are those of the text that they were
/// rounded for.
#[derive(Debug, Clone, PartialEq)]
pub struct GradedThresholds {
    error_factors: Option<Vec<[f32; 2]>>,
    residual_rms: Vec<f32>,
    always: Vec<f32>,
    active: Vec<f32>,
    thresholds: Vec<f32>,
}

impl GradedThresholds {
    /// `residual_rms [n_layers]`: root mean square of the residual stream behind each layer, that of the median token. `thresholds
    /// [always, active]` are for shares of each layer's neurons that are always computed, rising from 0 to below 1, and shares of
    /// the others, rising from above 0 to below 1.
    ///
    /// # Errors
    /// [`Error::Settings`] if shares do not rise so, lengths disagree, or a number is not positive and finite; or a threshold rises
    /// with the share.
    pub fn new(residual_rms: Vec<f32>, always: Vec<f32>, active: Vec<f32>, thresholds: Vec<f32>) -> Result<Self> {
        let refused = |what: &str| Err(Error::Settings { what: what.to_owned() });
        let rises = |shares: &[f32]| shares.windows(2).all(|w| w[0] < w[1]) && shares.last().is_some_and(|s| *s < 1.0);
        if !(rises(&always) && always[0] == 0.0) {
            return refused("graded.always must rise, from 0 to below 1");
        }
        if !(rises(&active) && active[0] > 0.0 && active.len() > 1) {
            return refused("graded.active must have two shares or more, rising from above 0 to below 1");
        }
        let is_sound = |v: &f32| *v > 0.0 && v.is_finite();
        if residual_rms.is_empty() || !residual_rms.iter().chain(&thresholds).all(is_sound) {
            return refused("graded.residual_rms and graded.threshold must be positive and finite");
        }
        let falls = |row: &[f32]| row.windows(2).all(|w| w[0] >= w[1]);
        if thresholds.len() != always.len() * active.len() || !thresholds.chunks(active.len()).all(falls) {
            return refused(
                "graded.threshold must have a row for each of graded.always, which falls with graded.active",
            );
        }
        Ok(Self { error_factors: None, residual_rms, always, active, thresholds })
    }

    /// The same of single rows, where the errors of each layer's gate and up products are `error_factors [n_layers]` times what its
    /// sketch says.
    ///
    /// # Errors
    /// [`Error::Settings`] if there is not one for each layer, or one is not positive and finite.
    pub fn of_rows(self, error_factors: Vec<[f32; 2]>) -> Result<Self> {
        let is_sound = error_factors.as_flattened().iter().all(|v| *v > 0.0 && v.is_finite());
        if !is_sound || error_factors.len() != self.residual_rms.len() {
            let what = "graded.error_factors must be two for each layer, positive and finite".to_owned();
            return Err(Error::Settings { what });
        }
        Ok(Self { error_factors: Some(error_factors), ..self })
    }

    /// Of thresholds of single rows, how many times the errors of each layer's gate and up products are what its sketch says.
    pub fn error_factors(&self) -> Option<&[[f32; 2]]> {
        self.error_factors.as_deref()
    }

    /// What they are for: `rows` or `neurons`.
    pub fn kind(&self) -> &'static str {
        if self.error_factors.is_some() { "rows" } else { "neurons" }
    }

    /// Root mean square of the residual stream behind each layer.
    pub fn residual_rms(&self) -> &[f32] {
        &self.residual_rms
    }

    /// Shares that are always computed.
    pub fn always(&self) -> &[f32] {
        &self.always
    }

    /// Shares of the others.
    pub fn active(&self) -> &[f32] {
        &self.active
    }

    /// `[always, active]`.
    pub fn thresholds(&self) -> &[f32] {
        &self.thresholds
    }

    /// Each layer's least cost from which a neuron is computed, or a row read, `[n_layers]`, so that about the share `active` of those is that
    /// are not always computed, where `always` are. `None` where that is all of them.
    /// Between shares the logarithms are interpolated, that of the active share too; above the last active share thresholds fall
    /// in proportion, to 0 at all; beyond the last share that is always computed its thresholds hold.
    pub fn layers(&self, always: f32, active: f32) -> Option<Vec<f32>> {
        if active >= 1.0 {
            return None;
        }
        let above = self.always.partition_point(|a| *a <= always).max(1);
        let below = self.of_row(above - 1, active);
        let threshold = match self.always.get(above) {
            Some(next) => {
                let from = self.always[above - 1];
                mixed(below, self.of_row(above, active), (always - from) / (next - from))
            }
            None => below,
        };
        Some(self.residual_rms.iter().map(|rms| threshold * rms).collect())
    }

    /// The threshold of row `row` for the share `active`, below 1.
    fn of_row(&self, row: usize, active: f32) -> f32 {
        let n = self.active.len();
        let row = &self.thresholds[row * n..(row + 1) * n];
        if active >= self.active[n - 1] {
            return row[n - 1] * (1.0 - active) / (1.0 - self.active[n - 1]);
        }
        // The two shares around it, or below the first the first two.
        let next = self.active.partition_point(|a| *a <= active).clamp(1, n - 1);
        let (low, high) = (self.active[next - 1], self.active[next]);
        mixed(row[next - 1], row[next], (active / low).ln() / (high / low).ln())
    }
}

/// From `a` to `b` by their logarithms.
fn mixed(a: f32, b: f32, part: f32) -> f32 {
    (a.ln() + part * (b.ln() - a.ln())).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thresholds() -> GradedThresholds {
        let rows = vec![4.0, 2.0, 1.0, 2.0, 1.0, 0.25];
        GradedThresholds::new(vec![1.0, 10.0], vec![0.0, 0.5], vec![0.1, 0.2, 0.5], rows).unwrap()
    }

    #[test]
    fn thresholds_are_met_and_go_from_one_to_the_next() {
        let of = |always: f32, active: f32| thresholds().layers(always, active).unwrap();
        for (always, active, wanted) in [
            (0.0, 0.1, 4.0),
            (0.0, 0.5, 1.0),
            (0.5, 0.2, 1.0),
            // Half-way by logarithms.
            (0.25, 0.1, 8f32.sqrt()),
            (0.0, 0.02f32.sqrt(), 8f32.sqrt()),
            // Below the first as between the first two, above the last down to nothing.
            (0.0, 0.05, 8.0),
            (0.0, 0.75, 0.5),
            (0.9, 0.2, 1.0),
        ] {
            let got = of(always, active);
            assert!((got[0] / wanted - 1.0).abs() < 1e-5, "{always}, {active}: {got:?}");
            assert!((got[1] / got[0] - 10.0).abs() < 1e-5);
        }
        assert_eq!(thresholds().layers(0.5, 1.0), None);
        let shares: Vec<f32> = (1..100).map(|i| of(0.3, i as f32 / 100.0)[0]).collect();
        assert!(shares.windows(2).all(|w| w[0] > w[1]), "the more, the lower");
    }

    #[test]
    fn thresholds_that_are_none_are_refused() {
        let new = |rms: &[f32], always: &[f32], active: &[f32], rows: &[f32]| {
            GradedThresholds::new(rms.to_vec(), always.to_vec(), active.to_vec(), rows.to_vec()).is_err()
        };
        assert!(!new(&[1.0], &[0.0], &[0.1, 0.2], &[1.0, 1.0]));
        assert!(new(&[], &[0.0], &[0.1, 0.2], &[1.0, 1.0]));
        assert!(new(&[0.0], &[0.0], &[0.1, 0.2], &[1.0, 1.0]));
        assert!(new(&[f32::INFINITY], &[0.0], &[0.1, 0.2], &[1.0, 1.0]));
        assert!(new(&[1.0], &[], &[0.1, 0.2], &[]));
        assert!(new(&[1.0], &[0.1], &[0.1, 0.2], &[1.0, 1.0]));
        assert!(new(&[1.0], &[0.0], &[], &[]));
        assert!(new(&[1.0], &[0.0], &[0.2, 0.1], &[1.0, 1.0]));
        assert!(new(&[1.0], &[0.0], &[0.1, 1.0], &[1.0, 1.0]));
        assert!(new(&[1.0], &[0.0], &[0.1, 0.2], &[1.0, 2.0]));
        assert!(new(&[1.0], &[0.0], &[0.1, 0.2], &[1.0, f32::NAN]));
        assert!(new(&[1.0], &[0.0], &[0.1, 0.2], &[1.0]));
    }

    #[test]
    fn factors_are_two_of_each_layer() {
        assert_eq!(thresholds().error_factors(), None);
        let of_rows = thresholds().of_rows(vec![[1.0, 2.0], [3.0, 0.5]]).unwrap();
        assert_eq!(of_rows.error_factors(), Some(&[[1.0, 2.0], [3.0, 0.5]][..]));
        assert_eq!(of_rows.layers(0.0, 0.1), thresholds().layers(0.0, 0.1));
        for refused in [vec![], vec![[1.0; 2]], vec![[1.0; 2]; 3], vec![[1.0; 2], [0.0, 1.0]], vec![[f32::NAN, 1.0]; 2]]
        {
            assert!(thresholds().of_rows(refused.clone()).is_err(), "{refused:?}");
        }
    }
}
