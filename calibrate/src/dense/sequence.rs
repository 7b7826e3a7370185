/// Rows that belong together: a text, and behind it what may follow, one continuation after the other.
///
/// A row of the text sees the text up to itself. A row of a branch sees the whole text and its own branch up to itself, as if
/// there were no other: several continuations of a text cost the text once. Positions go on from the text's in each branch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// Rows of the text; at least one if there are branches.
    pub text_len: usize,
    /// Rows of each branch; none is fine.
    pub branches: Vec<usize>,
}

impl Sequence {
    /// A text alone.
    pub fn plain(text_len: usize) -> Self {
        Sequence { text_len, branches: Vec::new() }
    }

    /// Rows of the text and of all branches.
    pub fn n_rows(&self) -> usize {
        self.text_len + self.branches.iter().sum::<usize>()
    }

    /// Positions that the longest continuation reaches.
    pub(crate) fn n_positions(&self) -> usize {
        self.text_len + self.branches.iter().copied().max().unwrap_or(0)
    }

    /// The position of every row.
    pub(crate) fn positions(&self) -> Vec<usize> {
        let of_branch = |&len: &usize| self.text_len..self.text_len + len;
        (0..self.text_len).chain(self.branches.iter().flat_map(of_branch)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn branches_go_on_from_the_text() {
        let sequence = Sequence { text_len: 3, branches: vec![2, 0, 1] };
        assert_eq!(sequence.positions(), [0, 1, 2, 3, 4, 3]);
        assert_eq!((sequence.n_rows(), sequence.n_positions()), (6, 5));
        assert_eq!(Sequence::plain(2).positions(), [0, 1]);
    }
}
