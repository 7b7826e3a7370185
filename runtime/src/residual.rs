//! Sparse mode that reads single rows of a split with residuals: a row that is read is what the sketch leaves of it, as long as
//! one of q4, and is added to what the sketch has. Neurons that every token computes have no sketch and are read as the split has
//! them.

use crate::Result;
use crate::plan::Mode;
use std::borrow::Cow;
use thermocline_kernels::LayerLayout;
use thermocline_split::{GradedCurves, GradedThresholds, LayerFile, Split, residual_layout};

/// Whether `mode` reads residuals, if there is memory for all of them: where single rows are chosen, and of each that is read the base
/// alone is wanted. If all rows are read, they are the split's own.
///
/// # Errors
/// If the split's thresholds cannot be read.
pub(crate) fn reads_residuals(split: &Split, mode: Mode) -> Result<bool> {
    let Mode::Sparse { active } = mode else { return Ok(false) };
    let is_base = || split.delta().is_none() && split.layers().iter().all(|file| file.bundles().has_plain_rows());
    if split.residuals().is_none() || !is_base() {
        return Ok(false);
    }
    let of_rows = |t: &GradedThresholds| t.error_factors().is_some() && t.layers(0.0, active).is_some();
    Ok(split.graded_curves()?.as_ref().map(GradedCurves::thresholds).is_some_and(of_rows))
}

/// Where the neurons of `file` lie in memory if those from `residuals_from` on are there as residuals.
pub(crate) fn layout_with(file: &LayerFile, residuals_from: Option<usize>) -> Cow<'_, LayerLayout> {
    match residuals_from {
        Some(first) => Cow::Owned(with_residuals(file, first)),
        None => Cow::Borrowed(file.bundles()),
    }
}

/// Where a layer's neurons lie whose first `n_always` are bundles of `file` and whose others are residuals.
pub(crate) fn with_residuals(file: &LayerFile, n_always: usize) -> LayerLayout {
    let layout = file.bundles();
    let always = layout.within(0..n_always).map(|(neurons, section)| (neurons.len(), *section.bundles()));
    let residuals = residual_layout(layout.hidden_size()).map(|bundles| (layout.n_neurons() - n_always, bundles));
    LayerLayout::new(always.chain(residuals)).expect("neurons, of a width that sketches have")
}
