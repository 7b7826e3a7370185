use crate::prefetch;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Spins before a waiting thread lets others run: on a busy machine one of them may be what it waits for.
const SPINS_TO_YIELD: u32 = 20_000;

/// One turn of a thread that waits for another without sleeping; `spins` counts them.
pub fn pause(spins: &mut u32) {
    *spins = spins.wrapping_add(1);
    if spins.is_multiple_of(SPINS_TO_YIELD) {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}

/// Threads that add up vectors together: each its own part, then each some columns of all parts.
///
/// Two meetings of all threads and no lock: an exchange takes a few microseconds, where a layer's work is some tens.
#[derive(Debug)]
struct Team {
    n_columns: usize,
    /// A vector for each thread.
    parts: Vec<UnsafeCell<Vec<f32>>>,
    /// Threads that came to a meeting, over all meetings.
    arrived: Line<AtomicU64>,
    /// Arrivals up to the last meeting to which all have come: on another line, or those who look would hold up those
    /// who come.
    met: Line<AtomicU64>,
    /// A thread is gone: the others must not wait for it.
    broken: Line<AtomicBool>,
}

/// Alone on its cache lines: two, which the hardware prefetches together.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Line<T>(T);

// SAFETY: part `i` is written only by the one `Member` of that number, between its second meeting of one sum and its
// first of the next; it is read by others only between these two meetings. Meetings are acquire-release.
unsafe impl Sync for Team {}

/// One thread's place in a team.
#[derive(Debug)]
pub struct Member {
    team: Arc<Team>,
    number: usize,
    /// Meetings that this thread has come to.
    meetings: u64,
    /// Whether its part is zeros.
    clear: bool,
    /// Room for its columns of a sum.
    sums: Vec<f32>,
}

/// A member of the team has gone away in the middle of a sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("another thread of the team has failed")]
pub struct Broken;

impl Member {
    /// The members of a team of `n` for vectors of `n_columns`.
    pub fn team(n: usize, n_columns: usize) -> Vec<Member> {
        let parts = (0..n).map(|_| UnsafeCell::new(vec![0.0; n_columns])).collect();
        let team = Team { n_columns, parts, arrived: Line::default(), met: Line::default(), broken: Line::default() };
        let team = Arc::new(team);
        (0..n)
            .map(|number| Member { team: Arc::clone(&team), number, meetings: 0, clear: true, sums: Vec::new() })
            .collect()
    }

    /// This member's number, from 0.
    pub fn number(&self) -> usize {
        self.number
    }

    /// Members of the team.
    pub fn n_members(&self) -> usize {
        self.team.parts.len()
    }

    /// The sum of one vector of each member, which `add` fills (it starts as zeros), in the order of their numbers.
    /// `take` gets some columns of it and their place; every member gets others. True for the last to finish: when it
    /// returns, all have taken theirs.
    ///
    /// # Errors
    /// If another member is gone.
    pub fn sum(
        &mut self,
        add: impl FnOnce(&mut [f32]),
        take: impl FnOnce(Range<usize>, &[f32]),
    ) -> Result<bool, Broken> {
        if !self.clear {
            self.clear();
        }
        self.clear = false;
        add(self.part());
        self.meet()?;
        let n = self.n_members();
        let columns = self.team.n_columns * self.number / n..self.team.n_columns * (self.number + 1) / n;
        // SAFETY: between the two meetings nobody writes to a part.
        let parts = || self.team.parts.iter().map(|part| unsafe { &(&*part.get())[columns.clone()] });
        // They lie in the caches of other cores: all are asked for before the first is waited for.
        parts().for_each(|part| prefetch(bytemuck::cast_slice(part)));
        self.sums.clear();
        self.sums.resize(columns.len(), 0.0);
        for part in parts() {
            for (sum, v) in self.sums.iter_mut().zip(part) {
                *sum += v;
            }
        }
        take(columns, &self.sums);
        let last = self.arrive();
        if !last {
            self.wait()?;
        }
        Ok(last)
    }

    /// Makes room for the next sum, which otherwise does it itself: for when there is time.
    pub fn clear(&mut self) {
        self.part().fill(0.0);
        self.clear = true;
    }

    /// Only before the first meeting of a sum.
    fn part(&mut self) -> &mut [f32] {
        // SAFETY: see `Team`; `&mut self` and one `Member` a number make this the only reference.
        unsafe { &mut *self.team.parts[self.number].get() }
    }

    /// Whether this was the last member that the meeting waited for.
    fn arrive(&mut self) -> bool {
        self.meetings += 1;
        let all = self.meetings * self.team.parts.len() as u64;
        let last = self.team.arrived.0.fetch_add(1, Ordering::AcqRel) + 1 == all;
        if last {
            self.team.met.0.store(all, Ordering::Release);
        }
        last
    }

    fn meet(&mut self) -> Result<(), Broken> {
        if self.arrive() { Ok(()) } else { self.wait() }
    }

    fn wait(&self) -> Result<(), Broken> {
        let mut spins = 0u32;
        let has_met = || self.team.met.0.load(Ordering::Acquire) >= self.meetings * self.team.parts.len() as u64;
        while !has_met() {
            if self.team.broken.0.load(Ordering::Acquire) {
                // Who left after the meeting has not broken it: that all had met was written before.
                return if has_met() { Ok(()) } else { Err(Broken) };
            }
            pause(&mut spins);
        }
        Ok(())
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // Between sums nobody waits; in the middle of one this is a panic, and the others must be told.
        self.team.broken.0.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn sums_are_those_of_all_members_again_and_again() {
        const COLUMNS: usize = 37;
        let out = Mutex::new(vec![vec![0.0f32; COLUMNS]; 50]);
        let lasts = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for mut member in Member::team(3, COLUMNS) {
                let (out, lasts) = (&out, &lasts);
                scope.spawn(move || {
                    for turn in 0..50 {
                        let add = |sums: &mut [f32]| {
                            assert!(sums.iter().all(|s| *s == 0.0));
                            sums.iter_mut().enumerate().for_each(|(c, s)| *s = (c * (member_number(turn)) + c) as f32);
                        };
                        let take = |columns: Range<usize>, sums: &[f32]| {
                            out.lock().unwrap_or_else(|e| e.into_inner())[turn][columns].copy_from_slice(sums);
                        };
                        let last = member.sum(add, take).expect("nobody is gone");
                        lasts.fetch_add(u64::from(last), Ordering::Relaxed);
                    }
                });
            }
        });
        let out = out.into_inner().expect("no panic");
        for (turn, sums) in out.iter().enumerate() {
            let want = |c: usize| (3 * (c * member_number(turn) + c)) as f32;
            assert!(sums.iter().enumerate().all(|(c, s)| *s == want(c)), "turn {turn}: {sums:?}");
        }
        assert_eq!(lasts.into_inner(), 50, "one a turn");
    }

    /// As a model is dropped after its last token: the first to leave does so while others still wait. Miri found it.
    #[test]
    fn a_member_that_leaves_after_the_meeting_breaks_nothing() {
        for _ in 0..if cfg!(miri) { 5 } else { 500 } {
            std::thread::scope(|scope| {
                for mut member in Member::team(3, 8) {
                    scope.spawn(move || member.sum(|_| (), |_, _| ()).expect("nobody left before"));
                }
            });
        }
    }

    fn member_number(turn: usize) -> usize {
        turn % 7
    }

    #[test]
    fn nobody_waits_for_a_member_that_is_gone() {
        let mut team = Member::team(2, 4);
        let gone = team.pop();
        let mut left = team.pop().expect("two members");
        std::thread::scope(|scope| {
            let waits = scope.spawn(move || left.sum(|_| (), |_, _| ()));
            std::thread::sleep(std::time::Duration::from_millis(5));
            drop(gone);
            assert_eq!(waits.join().expect("no panic"), Err(Broken));
        });
    }
}
