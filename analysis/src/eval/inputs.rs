//! Methods that leave out inputs of matrices, column by column, instead of neurons: two from the literature, and that of
//! [`super::input_costs`].
//!
//! - TEAL (arXiv 2408.14690): of each matrix's inputs those whose magnitude is below a threshold, which leaves the same
//!   share in the mean over tokens. Its greedy division between the matrices of a block is left out. The threshold is of the
//!   window's (or a task's example's) own inputs, which favours it.
//! - WINA (arXiv 2505.19427): for each token the share with the largest `|x_j| * ||W_j||`, by the lengths of the columns.

use super::input_costs::{GROUPS, GroupCost, group_of};
use crate::Result;
use rayon::prelude::*;
use std::sync::atomic::{AtomicU64, Ordering};
use thermocline_calibrate::dense::{DenseLayer, Projection, Sequence};
use thermocline_runtime::top_k;

/// Which share of the inputs is kept.
#[derive(Debug, Clone, Copy)]
pub(crate) enum InputChoice<'a> {
    /// Those above a threshold of the window.
    Teal(f64),
    /// Of each token those that weigh most.
    Wina(f64),
    /// Those whose energy reaches their group's threshold; ours.
    Priced(&'a [GroupCost; 4], [f32; 4]),
}

/// A choice with what it needs to know of a layer.
pub(crate) struct InputMethod<'a> {
    layer: &'a DenseLayer,
    choice: InputChoice<'a>,
    /// Lengths of the columns of each of [`Projection::ALL`], if they are asked for.
    norms: Vec<Vec<f32>>,
    /// Inputs of each group that were kept so far, if thresholds decide.
    kept: [AtomicU64; 4],
}

impl<'a> InputMethod<'a> {
    pub(crate) fn new(layer: &'a DenseLayer, choice: InputChoice<'a>) -> Result<Self> {
        let norms = match choice {
            InputChoice::Teal(_) | InputChoice::Priced(..) => Vec::new(),
            InputChoice::Wina(_) => {
                let norms = Projection::ALL.into_iter().map(|p| Ok(layer.column_norms(p)?));
                norms.collect::<Result<_>>()?
            }
        };
        Ok(Self { layer, choice, norms, kept: Default::default() })
    }

    /// The layer's output for one sequence's rows `x`; the inputs of rows before `from` are all kept.
    pub(crate) fn forward(&self, x: &[f32], sequence: &Sequence, from: usize) -> Result<Vec<f32>> {
        let n_rows = sequence.n_rows();
        Ok(self.layer.changed(x, sequence, |projection, inputs| {
            let first = inputs.len() / n_rows.max(1) * from;
            match self.choice {
                InputChoice::Teal(share) => above_threshold(inputs, share, first),
                InputChoice::Wina(share) => {
                    let norms = &self.norms[projection as usize];
                    heaviest(&mut inputs[first..], norms, super::active_count(share, norms.len()));
                }
                InputChoice::Priced(costs, thresholds) => {
                    let group = group_of(projection);
                    let kept = costs[group].leave_out(&mut inputs[first..], thresholds[group]);
                    if GROUPS[group][0] == projection {
                        self.kept[group].fetch_add(kept, Ordering::Relaxed);
                    }
                }
            }
        })?)
    }

    /// Inputs of each group that were kept.
    pub(crate) fn kept(&self) -> [u64; 4] {
        std::array::from_fn(|group| self.kept[group].load(Ordering::Relaxed))
    }
}

/// Sets to zero what is below the threshold that leaves `share` of all values, of those from `first` on.
pub(crate) fn above_threshold(values: &mut [f32], share: f64, first: usize) {
    let threshold = threshold(values, share);
    values[first..].par_iter_mut().for_each(|v| *v = if v.abs() < threshold { 0.0 } else { *v });
}

/// The magnitude that a `share` of `values` reaches.
fn threshold(values: &[f32], share: f64) -> f32 {
    let mut magnitudes: Vec<f32> = values.iter().map(|v| v.abs()).collect();
    let kept = super::active_count(share, magnitudes.len());
    let Some(at) = magnitudes.len().checked_sub(kept) else { return 0.0 };
    if magnitudes.is_empty() { 0.0 } else { *magnitudes.select_nth_unstable_by(at, f32::total_cmp).1 }
}

/// Keeps of each row of `values` the `k` with the largest product with `norms`.
fn heaviest(values: &mut [f32], norms: &[f32], k: usize) {
    values.par_chunks_mut(norms.len()).for_each(|row| {
        let weights: Vec<f32> = row.iter().zip(norms).map(|(x, norm)| x.abs() * norm).collect();
        let mut best = Vec::new();
        top_k(&weights, k, &mut best);
        super::mask::keep(row, &best);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threshold_leaves_its_share_of_all_tokens_together() {
        let mut values = [1.0, -8.0, 3.0, -4.0, 5.0, 0.5, 7.0, -6.0];
        above_threshold(&mut values, 0.5, 0);
        assert_eq!(values, [0.0, -8.0, 0.0, 0.0, 5.0, 0.0, 7.0, -6.0]);
        let mut values = [1.0, -8.0, 3.0, -4.0, 5.0, 0.5, 7.0, -6.0];
        above_threshold(&mut values, 0.5, 3);
        assert_eq!(values, [1.0, -8.0, 3.0, 0.0, 5.0, 0.0, 7.0, -6.0]);
    }

    #[test]
    fn of_each_token_the_heaviest_are_kept() {
        let mut values = [1.0, -2.0, 3.0, 4.0, 1.0, 1.0];
        heaviest(&mut values, &[4.0, 1.0, 0.5], 1);
        assert_eq!(values, [1.0, 0.0, 0.0, 4.0, 0.0, 0.0]);
    }
}
