//! Examples as rows of one batch.

use super::TaskExample;
use std::ops::Range;
use thermocline_calibrate::dense::Sequence;

/// Bytes of hidden states that all masks together hold at once. More examples take further passes over the layers.
const PASS_BYTES: usize = 1 << 30;
/// Rows that go through a layer together: as many as a window of a text has.
const GROUP_ROWS: usize = 1024;

/// A row whose logits are read, and the token that they should predict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Read {
    /// Row of the pass.
    pub row: usize,
    /// The token that follows.
    pub target: u32,
    /// Example of the pass.
    pub example: usize,
    /// Its choice.
    pub choice: usize,
}

/// Examples whose hidden states are held at the same time.
#[derive(Debug, Default)]
pub(super) struct Pass {
    /// `[n_rows]`
    pub tokens: Vec<u32>,
    /// One an example.
    pub sequences: Vec<Sequence>,
    /// In order of examples, choices and tokens.
    pub reads: Vec<Read>,
}

impl Pass {
    /// The last token of a choice is not read: nothing is asked behind it. The context's last row predicts the first token of
    /// each choice.
    fn push(&mut self, example: &TaskExample) {
        let (first, text_len, index) = (self.tokens.len(), example.context.len(), self.sequences.len());
        self.tokens.extend(&example.context);
        let mut branches = Vec::with_capacity(example.choices.len());
        for (choice, scored) in example.choices.iter().enumerate() {
            let start = self.tokens.len();
            for (i, &target) in scored.tokens.iter().enumerate() {
                let row = if i == 0 { first + text_len - 1 } else { start + i - 1 };
                self.reads.push(Read { row, target, example: index, choice });
            }
            let inputs = &scored.tokens[..scored.tokens.len() - 1];
            self.tokens.extend(inputs);
            branches.push(inputs.len());
        }
        self.sequences.push(Sequence { text_len, branches });
    }

    /// Sequences that go through a layer together, with their rows.
    pub(super) fn groups(&self) -> Vec<(Range<usize>, Range<usize>)> {
        let mut groups: Vec<(Range<usize>, Range<usize>)> = Vec::new();
        let mut first = 0;
        for (i, sequence) in self.sequences.iter().enumerate() {
            let end = first + sequence.n_rows();
            match groups.last_mut() {
                Some((sequences, rows)) if end - rows.start <= GROUP_ROWS => {
                    (sequences.end, rows.end) = (i + 1, end);
                }
                _ => groups.push((i..i + 1, first..end)),
            }
            first = end;
        }
        groups
    }
}

/// Divides `examples` so that `n_streams` hidden states of `hidden_size` stay in bounds; an example alone may go beyond them.
pub(super) fn passes(examples: &[TaskExample], n_streams: usize, hidden_size: usize) -> Vec<Pass> {
    let rows_max = (PASS_BYTES / 4 / hidden_size.max(1) / n_streams.max(1)).max(1);
    let mut passes: Vec<Pass> = Vec::new();
    for example in examples {
        let n_rows = example.context.len() + example.choices.iter().map(|c| c.tokens.len() - 1).sum::<usize>();
        match passes.last_mut() {
            Some(pass) if pass.tokens.len() + n_rows <= rows_max => pass.push(example),
            _ => {
                let mut pass = Pass::default();
                pass.push(example);
                passes.push(pass);
            }
        }
    }
    passes
}

#[cfg(test)]
mod tests {
    use super::super::TaskChoice;
    use super::*;

    fn example(n_context: u32, choices: &[&[u32]]) -> TaskExample {
        let choices = choices.iter().map(|tokens| TaskChoice { tokens: tokens.to_vec(), bytes: 1 }).collect();
        TaskExample { context: (0..n_context).collect(), choices, answer: 0 }
    }

    #[test]
    fn choices_share_their_context() {
        let examples = [example(2, &[&[70]]), example(3, &[&[10, 11, 12], &[20], &[30, 31]])];
        let passes = passes(&examples, 1, 1);
        let [pass] = passes.as_slice() else { panic!("one pass") };
        assert_eq!(pass.tokens, [0, 1, 0, 1, 2, 10, 11, 30]);
        assert_eq!(pass.sequences[1], Sequence { text_len: 3, branches: vec![2, 0, 1] });
        let reads: Vec<_> = pass.reads.iter().map(|r| (r.row, r.target, r.example, r.choice)).collect();
        let of_second = [(4, 10, 1, 0), (5, 11, 1, 0), (6, 12, 1, 0), (4, 20, 1, 1), (4, 30, 1, 2), (7, 31, 1, 2)];
        assert_eq!(reads, [&[(1, 70, 0, 0)][..], &of_second].concat());
        assert_eq!(pass.groups(), [(0..2, 0..8)]);
    }

    #[test]
    fn groups_and_passes_hold_whole_examples() {
        let examples = vec![example(600, &[&[1]]); 3];
        let all = passes(&examples, 1, 1);
        assert_eq!(all[0].groups(), [(0..1, 0..600), (1..2, 600..1200), (2..3, 1200..1800)]);
        // Room for a row and a half of examples.
        let few = passes(&examples, 1, PASS_BYTES / 4 / 900);
        assert_eq!(few.iter().map(|p| p.tokens.len()).collect::<Vec<_>>(), [600, 600, 600]);
    }
}
