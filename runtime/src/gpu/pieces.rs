//! Which thread computes what of a request.
//!
//! Each thread has a stretch of the list, in pieces that get smaller. It takes them from the front; a thread that is done
//! takes pieces of others from their ends, because machines share cores and which thread is late changes from request to
//! request. A piece is summed from zero whoever takes it, and the device adds the sums in the order of the threads and of the
//! pieces, so that bits do not depend on who was faster.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a piece holds at least: some microseconds of a thread, to a fraction of one for its claim and its sums.
const PIECE_BYTES: usize = 32 << 10;

/// Down rows that are added in one pass over the sums.
const STEP: usize = 4;

/// Pieces that a thread leaves alone at the end of a slower one's stretch: that one is done with them sooner than another, who
/// has none of their rows in its caches, and whose sums come to the device apart.
const LEFT_ALONE: usize = 1;

/// How the `n` neurons of one request are divided.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pieces {
    n: usize,
    n_threads: usize,
    /// Neurons of the smallest pieces.
    small: usize,
}

impl Pieces {
    /// Of `n` neurons with bundles of `bundle_bytes`.
    pub(super) fn new(n: usize, n_threads: usize, bundle_bytes: usize) -> Self {
        let small = PIECE_BYTES.div_ceil(bundle_bytes.max(1)).next_multiple_of(STEP);
        Self { n, n_threads, small }
    }

    /// The part of the list that is thread `t`'s.
    pub(super) fn stretch(&self, t: usize) -> Range<usize> {
        self.n * t / self.n_threads..self.n * (t + 1) / self.n_threads
    }

    /// The pieces of thread `t`, in its stretch.
    fn all(self, t: usize) -> impl Iterator<Item = Range<usize>> {
        let n = self.stretch(t).len();
        let mut start = 0;
        std::iter::from_fn(move || {
            let left = n - start;
            let len = (left / 2 / STEP * STEP).max(self.small).min(left);
            start += len;
            (len > 0).then_some(start - len..start)
        })
    }

    /// Pieces of thread `t`; none if it has no neurons.
    pub(super) fn n_pieces(&self, t: usize) -> usize {
        self.all(t).count()
    }

    /// Piece `i` of thread `t`, in its stretch.
    ///
    /// # Panics
    /// If there is none.
    pub(super) fn piece(&self, t: usize, i: usize) -> Range<usize> {
        self.all(t).nth(i).expect("a piece of the stretch")
    }
}

/// What has been claimed of each thread's pieces.
#[derive(Debug)]
pub(super) struct Claims(Vec<Claim>);

/// The number of a request above 32 bits, then how many pieces are gone from the front and how many from the end. A word
/// with another number is about a request that has ended: nothing is gone of this one. (The device asks for nothing new
/// before every thread has done with a request, so nobody comes with an old number.)
#[derive(Debug)]
#[repr(align(128))]
struct Claim(AtomicU64);

impl Claims {
    pub(super) fn new(n_threads: usize) -> Self {
        Self((0..n_threads).map(|_| Claim(AtomicU64::new(u64::MAX))).collect())
    }

    /// The next piece from the front of thread `t`'s `n_pieces`, if one is left.
    pub(super) fn front(&self, t: usize, request: u32, n_pieces: usize) -> Option<usize> {
        self.0[t].take(request, n_pieces, 1 << 16).map(|[front, _]| front)
    }

    /// The last piece that is left of thread `t`'s `n_pieces`, if there is one more.
    pub(super) fn back(&self, t: usize, request: u32, n_pieces: usize) -> Option<usize> {
        let most = n_pieces.saturating_sub(LEFT_ALONE);
        self.0[t].take(request, most, 1).map(|[_, back]| n_pieces - 1 - back)
    }

    /// How many of thread `t`'s `n_pieces` another may claim.
    pub(super) fn left(&self, t: usize, request: u32, n_pieces: usize) -> usize {
        let [front, back] = gone(self.0[t].0.load(Ordering::Relaxed), request);
        n_pieces.saturating_sub(front + back + LEFT_ALONE)
    }
}

impl Claim {
    /// Adds `step` if less than `most` are gone; what was gone before. What a claim gives away, lists and weights, was there
    /// before the request was seen: no order is needed.
    fn take(&self, request: u32, most: usize, step: u64) -> Option<[usize; 2]> {
        let mut seen = self.0.load(Ordering::Relaxed);
        loop {
            let [front, back] = gone(seen, request);
            if front + back >= most {
                return None;
            }
            let now = (u64::from(request) << 32 | (front << 16 | back) as u64) + step;
            match self.0.compare_exchange_weak(seen, now, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some([front, back]),
                Err(other) => seen = other,
            }
        }
    }
}

/// From the front and from the end.
fn gone(word: u64, request: u32) -> [usize; 2] {
    if (word >> 32) as u32 == request { [(word >> 16) as usize & 0xffff, word as usize & 0xffff] } else { [0, 0] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pauses::{in_time, pause};
    use proptest::prelude::*;
    use std::sync::atomic::AtomicU32;
    use std::time::Duration;

    proptest! {
        #[test]
        fn pieces_are_the_list(n in 0usize..30_000, n_threads in 1usize..80, bundle_bytes in 1usize..100_000) {
            let pieces = Pieces::new(n, n_threads, bundle_bytes);
            let mut next = 0;
            for t in 0..n_threads {
                let stretch = pieces.stretch(t);
                    prop_assert!(pieces.n_pieces(t) < 64);
                for i in 0..pieces.n_pieces(t) {
                    let piece = pieces.piece(t, i);
                    prop_assert!(!piece.is_empty());
                    prop_assert_eq!(stretch.start + piece.start, next);
                    next = stretch.start + piece.end;
                }
                prop_assert_eq!(next, stretch.end);
            }
            prop_assert_eq!(next, n);
        }
    }

    #[test]
    fn every_piece_is_claimed_once() {
        in_time(Duration::from_secs(240), claim_requests);
    }

    fn claim_requests() {
        const REQUESTS: u32 = 400;
        let n_pieces = [3usize, 7, 1, 12, 0];
        let claims = Claims::new(n_pieces.len());
        let done = n_pieces.map(|n| (0..n).map(|_| AtomicU32::new(u32::MAX)).collect::<Vec<_>>());
        let barrier = std::sync::Barrier::new(n_pieces.len());
        let compute = |owner: usize, piece: usize, request: u32| {
            pause();
            let before = done[owner][piece].swap(request, Ordering::Relaxed);
            assert_eq!(before, request.wrapping_sub(1));
        };
        let work = |t: usize| {
            for request in 0..REQUESTS {
                while let Some(i) = claims.front(t, request, n_pieces[t]) {
                    compute(t, i, request);
                }
                for other in (0..n_pieces.len()).filter(|o| *o != t) {
                    while let Some(i) = claims.back(other, request, n_pieces[other]) {
                        compute(other, i, request);
                    }
                    assert_eq!(claims.left(other, request, n_pieces[other]), 0);
                }
                // Requests do not overlap.
                barrier.wait();
            }
        };
        std::thread::scope(|scope| {
            for t in 0..n_pieces.len() {
                let work = &work;
                scope.spawn(move || work(t));
            }
        });
        assert!(done.iter().flatten().all(|piece| piece.load(Ordering::Relaxed) == REQUESTS - 1));
    }
}
