//! From hidden states to what each choice is worth.

use super::pack::Pass;
use crate::eval::likelihood::{log_likelihood, positions_at_once};
use crate::{Error, Result, eval::Mask};
use rayon::prelude::*;
use thermocline_calibrate::dense::Head;

/// What a model says of one choice.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct ChoiceScore {
    /// Sum of the logarithms of its tokens' probabilities, in nats.
    pub log_likelihood: f64,
    /// Whether each token was the likeliest.
    pub greedy: bool,
}

/// Scores of all choices of each example of `pass`, from the last layer's outputs `x [n_rows, hidden_size]`.
pub(super) fn scores(
    head: &Head,
    pass: &Pass,
    x: &[f32],
    hidden_size: usize,
    mask: Mask,
) -> Result<Vec<Vec<ChoiceScore>>> {
    let nothing = ChoiceScore { log_likelihood: 0.0, greedy: true };
    let mut scores: Vec<Vec<ChoiceScore>> = pass.sequences.iter().map(|s| vec![nothing; s.branches.len()]).collect();
    for (chunk, reads) in pass.reads.chunks(positions_at_once(head.vocab_size())).enumerate() {
        let rows: Vec<f32> = reads.iter().flat_map(|r| &x[r.row * hidden_size..][..hidden_size]).copied().collect();
        let logits = head.logits(&rows)?;
        let tokens = logits.par_chunks(head.vocab_size()).zip(reads).map(|(l, r)| log_likelihood(l, r.target));
        for (i, (read, (log, greedy))) in reads.iter().zip(tokens.collect::<Vec<_>>()).enumerate() {
            if !log.is_finite() {
                let position = chunk * positions_at_once(head.vocab_size()) + i;
                return Err(Error::NotFinite { mask: mask.name(), position });
            }
            let score = &mut scores[read.example][read.choice];
            score.log_likelihood += log;
            score.greedy &= greedy;
        }
    }
    Ok(scores)
}
