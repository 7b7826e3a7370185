//! The part of the weights that a pass reads from disk in a known order, kept ahead of the computation.

use crate::Result;
use crate::fetch::{Fetcher, Run, Staged, Ticket};
use std::collections::VecDeque;

/// A cyclic sequence of runs: while one token is computed, the next one's first runs are already being read.
#[derive(Debug)]
pub(crate) struct Stream {
    runs: Vec<Run>,
    next: usize,
    in_flight: VecDeque<Ticket>,
    /// Buffers that must stay free for reads that cannot be foreseen.
    reserve: usize,
}

impl Stream {
    pub(crate) fn new(runs: Vec<Run>, reserve: usize) -> Self {
        Self { runs, next: 0, in_flight: VecDeque::new(), reserve }
    }

    /// Starts reads while buffers are free.
    pub(crate) fn pump(&mut self, fetcher: &Fetcher) {
        while !self.runs.is_empty() && fetcher.n_free() > self.reserve {
            let Some(ticket) = fetcher.try_submit(&self.runs[self.next]) else { return };
            self.in_flight.push_back(ticket);
            self.next = (self.next + 1) % self.runs.len();
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
            self.next = (self.next + 1) % self.runs.len();
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
        fetcher.recover();
        self.next = 0;
    }
}
