//! The part of the weights that a pass reads from disk in a known order, kept ahead of the computation.

use crate::Result;
use crate::fetch::{Fetcher, Run, Staged, Ticket};
use crate::matrix::Disk;
use std::collections::VecDeque;

/// A sequence of runs. It is cyclic, unless it is for once: while one token is computed, the next one's first runs are already
/// being read.
#[derive(Debug)]
pub(crate) struct Stream {
    runs: Vec<Run>,
    next: usize,
    in_flight: VecDeque<Ticket>,
    /// Buffers that must stay free for reads that cannot be foreseen.
    reserve: usize,
    /// Whether the first run follows the last.
    is_cyclic: bool,
}

impl Stream {
    pub(crate) fn new(runs: Vec<Run>, reserve: usize) -> Self {
        Self { runs, next: 0, in_flight: VecDeque::new(), reserve, is_cyclic: true }
    }

    /// Each of `runs` once: nothing is read ahead beyond the last, and no more may be taken.
    pub(crate) fn once(runs: Vec<Run>) -> Self {
        Self { is_cyclic: false, ..Self::new(runs, 0) }
    }

    fn advance(&mut self) {
        self.next += 1;
        if self.is_cyclic {
            self.next %= self.runs.len();
        }
    }

    /// Starts reads while buffers are free.
    pub(crate) fn pump(&mut self, fetcher: &Fetcher) {
        while self.next < self.runs.len() && fetcher.n_free() > self.reserve {
            let Some(ticket) = fetcher.try_submit(&self.runs[self.next]) else { return };
            self.in_flight.push_back(ticket);
            self.advance();
        }
    }

    /// Waits for the next run of the sequence.
    pub(crate) fn take(&mut self, fetcher: &Fetcher) -> Result<Staged> {
        if self.in_flight.is_empty() {
            let ticket = loop {
                if let Some(ticket) = fetcher.try_submit(&self.runs[self.next]) {
                    break ticket;
                }
                // Every buffer belongs to a read that is under way and will be given back.
                std::thread::yield_now();
            };
            self.advance();
            self.in_flight.push_back(ticket);
        }
        self.pump(fetcher);
        match self.in_flight.pop_front() {
            Some(ticket) => fetcher.wait(ticket),
            None => unreachable!("one was submitted above"),
        }
    }

    /// Forgets what was read ahead and starts from the first run again.
    pub(crate) fn rewind(&mut self, fetcher: &Fetcher) {
        for ticket in self.in_flight.drain(..) {
            fetcher.discard(ticket);
        }
        self.next = 0;
    }
}

/// The two sequences of a model that is not all in memory, and the readers that they share.
#[derive(Debug)]
pub(crate) struct Streams {
    pub fetcher: Fetcher,
    /// Everything that is not in memory, in the order in which a dense pass uses it.
    dense: Stream,
    /// The same without neurons, for sparse passes.
    sparse: Stream,
    pass_is_sparse: bool,
}

impl Streams {
    pub(crate) fn new(fetcher: Fetcher, dense: Stream, sparse: Stream) -> Self {
        Self { fetcher, dense, sparse, pass_is_sparse: false }
    }

    /// Reading ahead follows the kind of pass; what the other kind had asked for is dropped.
    pub(crate) fn begin_pass(&mut self, sparse: bool) {
        if sparse != self.pass_is_sparse {
            self.rewind();
            self.pass_is_sparse = sparse;
        }
        let disk = self.current();
        disk.stream.pump(disk.fetcher);
    }

    /// The sequence of the pass under way.
    pub(crate) fn current(&mut self) -> Disk<'_> {
        let stream = if self.pass_is_sparse { &mut self.sparse } else { &mut self.dense };
        Disk { fetcher: &self.fetcher, stream }
    }

    /// Forgets what was read ahead in either.
    pub(crate) fn rewind(&mut self) {
        self.dense.rewind(&self.fetcher);
        self.sparse.rewind(&self.fetcher);
    }
}
