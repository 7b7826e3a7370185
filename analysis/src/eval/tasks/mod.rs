//! Zero-shot tasks: which of the dense model's answers a mask loses.
//!
//! | concept | where |
//! | --- | --- |
//! | files of examples | [`TaskKind`], [`TaskFile`], [`read_task`] |
//! | one example as tokens | [`TaskExample`] |
//! | where masks apply | [`Positions`] |
//! | all masks at once, through the dense forward | [`evaluate_task`] |
//! | what comes out | [`TaskResult`], [`Accuracy`] |
//!
//! Scores are those of the usual evaluation harness. [`TaskKind::Lambada`] (Paperno et al. 2016, arXiv 1606.06031): the last
//! word counts as right if each of its tokens is the likeliest one behind the tokens before. [`TaskKind::Cloze`]: of several
//! continuations of a context the one with the largest sum of log-likelihoods is chosen, or the one with the largest sum for
//! each of its bytes.
//!
//! Examples are packed: as many as fit go through a layer together, each with attention of its own, and the choices of one
//! example share the rows of their context ([`thermocline_calibrate::dense::Sequence`]). Nothing is padded.

mod encode;
mod pack;
mod read;
mod result;
mod run;
mod score;

pub use encode::{TaskChoice, TaskExample};
pub use read::{TaskFile, TaskKind, read_task};
pub use result::{Accuracy, TaskResult};
pub use run::evaluate_task;

use serde::{Deserialize, Serialize};
use thermocline_calibrate::dense::Sequence;

/// Where a mask applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Positions {
    /// At every position, as if each had been decoded: more than a run does, which computes its prompt densely.
    All,
    /// Behind the context only. The whole context is the prompt, its last token included, so that the first token of each
    /// answer is predicted by the dense model; masks apply where the answer's tokens are read to predict its later ones,
    /// over the dense model's keys and values of the context.
    Decoded,
}

impl Positions {
    /// The first row of `sequence` that is masked.
    pub(crate) fn first_masked(self, sequence: &Sequence) -> usize {
        match self {
            Positions::All => 0,
            Positions::Decoded => sequence.text_len,
        }
    }
}
