//! From scores to accuracy, beside the dense model's on the same examples.

use super::score::ChoiceScore;
use super::{TaskExample, TaskKind};
use crate::eval::Mask;
use crate::eval::bootstrap::mean_intervals;
use serde::{Deserialize, Serialize};

/// What one mask did to a model's answers. Intervals are of 95 %, from a bootstrap over examples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskResult {
    /// As in [`crate::eval::Evaluation::mask`].
    pub mask: String,
    /// Share of the neurons, or inputs, that the mask keeps, where it has one.
    pub active: Option<f64>,
    /// As [`crate::eval::Evaluation::bytes_share`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_share: Option<f64>,
    /// Of a last word: all its tokens the likeliest. Of choices: by the sum of log-likelihoods.
    pub accuracy: Accuracy,
    /// Of choices: by the sum over the choice's bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy_by_bytes: Option<Accuracy>,
    /// Mean over examples of the right answer's negative log-likelihood, all its tokens together, in nats.
    pub answer_loss: f64,
    /// Its interval.
    pub answer_loss_ci95: [f64; 2],
    /// `exp` of the loss where answers are single words: the usual figure for LAMBADA. `None` beyond 1e300.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub word_perplexity: Option<f64>,
}

/// How often a model is right, and what changed against the dense model on the same examples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// Share of the examples.
    pub share: f64,
    /// Its interval.
    pub ci95: [f64; 2],
    /// Less the dense model's share.
    pub difference: f64,
    /// The difference's interval, from the same examples for both: what the examples have in common falls out.
    pub difference_ci95: [f64; 2],
    /// Examples that the dense model gets right and this one does not.
    pub lost: usize,
    /// Examples that this one gets right and the dense model does not.
    pub gained: usize,
}

impl Accuracy {
    fn new(right: &[bool], dense: &[bool]) -> Self {
        let as_number = |right: &bool| f64::from(u8::from(*right));
        let own: Vec<f64> = right.iter().map(as_number).collect();
        let moved: Vec<f64> = right.iter().zip(dense).map(|(a, b)| as_number(a) - as_number(b)).collect();
        let [ci95, difference_ci95] = mean_intervals([&own, &moved]);
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let count = |was: bool| right.iter().zip(dense).filter(|(a, b)| a != b && **b == was).count();
        Accuracy {
            share: mean(&own),
            ci95,
            difference: mean(&moved),
            difference_ci95,
            lost: count(true),
            gained: count(false),
        }
    }
}

impl TaskResult {
    /// `scores` and `dense` are in the order of `examples`.
    pub(super) fn new(
        mask: Mask,
        bytes_share: Option<f64>,
        kind: TaskKind,
        examples: &[TaskExample],
        scores: &[Vec<ChoiceScore>],
        dense: &[Vec<ChoiceScore>],
    ) -> Self {
        let accuracy = |is_right: &dyn Fn(&TaskExample, &[ChoiceScore]) -> bool| {
            let right = |scores: &[Vec<ChoiceScore>]| -> Vec<bool> {
                examples.iter().zip(scores).map(|(example, scores)| is_right(example, scores)).collect()
            };
            Accuracy::new(&right(scores), &right(dense))
        };
        let by_sum = |e: &TaskExample, s: &[ChoiceScore]| best(s.iter().map(|s| s.log_likelihood)) == Some(e.answer);
        let by_bytes = |e: &TaskExample, s: &[ChoiceScore]| {
            let per_byte = s.iter().zip(&e.choices).map(|(s, choice)| s.log_likelihood / choice.bytes.max(1) as f64);
            best(per_byte) == Some(e.answer)
        };
        let greedy = |e: &TaskExample, s: &[ChoiceScore]| s.get(e.answer).is_some_and(|s| s.greedy);
        let of_answer = |(e, s): (&TaskExample, &Vec<ChoiceScore>)| s.get(e.answer).map(|s| -s.log_likelihood);
        let losses: Vec<f64> = examples.iter().zip(scores).filter_map(of_answer).collect();
        let answer_loss = losses.iter().sum::<f64>() / losses.len().max(1) as f64;
        let [answer_loss_ci95] = mean_intervals([&losses]);
        let (accuracy, accuracy_by_bytes) = match kind {
            TaskKind::Lambada => (accuracy(&greedy), None),
            TaskKind::Cloze => (accuracy(&by_sum), Some(accuracy(&by_bytes))),
        };
        TaskResult {
            mask: mask.name().to_owned(),
            active: mask.active(),
            bytes_share,
            accuracy,
            accuracy_by_bytes,
            answer_loss,
            answer_loss_ci95,
            word_perplexity: (kind == TaskKind::Lambada).then(|| answer_loss.exp()).filter(|p| *p < 1e300),
        }
    }
}

/// The first of the largest.
fn best(values: impl Iterator<Item = f64>) -> Option<usize> {
    let mut best: Option<(usize, f64)> = None;
    for (i, value) in values.enumerate() {
        if best.is_none_or(|(_, most)| value > most) {
            best = Some((i, value));
        }
    }
    best.map(|(i, _)| i)
}

#[cfg(test)]
mod tests {
    use super::super::TaskChoice;
    use super::*;

    fn score(log_likelihood: f64, greedy: bool) -> ChoiceScore {
        ChoiceScore { log_likelihood, greedy }
    }

    fn example(bytes: &[usize], answer: usize) -> TaskExample {
        let choices = bytes.iter().map(|&bytes| TaskChoice { tokens: vec![1], bytes }).collect();
        TaskExample { context: vec![1], choices, answer }
    }

    #[test]
    fn long_choices_are_weighed_by_their_bytes() {
        let examples = [example(&[4, 16], 1), example(&[4, 16], 0)];
        // The longer one is less likely as a whole, and likelier a byte.
        let dense = [vec![score(-4.0, false), score(-8.0, false)], vec![score(-4.0, false), score(-8.0, false)]];
        // Now the longer one is likelier as a whole, too; a tie goes to the first.
        let masked = [vec![score(-4.0, false), score(-3.0, false)], vec![score(-4.0, false), score(-4.0, false)]];
        let result = TaskResult::new(Mask::Oracle(0.3), Some(0.5), TaskKind::Cloze, &examples, &masked, &dense);
        let by_bytes = result.accuracy_by_bytes.unwrap();
        assert_eq!((by_bytes.share, by_bytes.difference, by_bytes.lost, by_bytes.gained), (0.5, 0.0, 0, 0));
        let a = result.accuracy;
        assert_eq!((a.share, a.difference, a.lost, a.gained), (1.0, 0.5, 0, 1));
        assert!((result.answer_loss - 3.5).abs() < 1e-9 && result.word_perplexity.is_none());
    }

    #[test]
    fn flips_are_counted_in_both_directions() {
        let examples = vec![example(&[1], 0); 5];
        let of = |right: [bool; 5]| right.map(|r| vec![score(-1.0, r)]);
        let (dense, masked) = (of([true, true, true, false, false]), of([true, false, false, true, false]));
        let result = TaskResult::new(Mask::Teal(0.5), None, TaskKind::Lambada, &examples, &masked, &dense);
        let a = &result.accuracy;
        assert_eq!((a.share, a.lost, a.gained, result.accuracy_by_bytes.is_none()), (0.4, 2, 1, true));
        assert!((a.difference + 0.2).abs() < 1e-12);
        assert!((result.word_perplexity.unwrap() - 1f64.exp()).abs() < 1e-9);
        assert!(a.difference_ci95[0] < -0.2 && -0.2 < a.difference_ci95[1], "{:?}", a.difference_ci95);
    }
}
