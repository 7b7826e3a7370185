//! A layer that the host's threads choose and compute by themselves, because its sketch lies in pinned memory and reading it there
//! spares the link the copy: they judge all neurons, choose, compute the chosen ones, and add the sketch of the others. The device
//! only gives the input and adds up the sums; meanwhile it copies the next layer's sketch.
//!
//! Threads take neurons to judge as they come and meet once, when all are judged; then each finds the same list, and computes its
//! part of it.

use super::host_share::Watch;
use super::load::{Layer, RowRule};
use super::sketches::PinnedSketch;
use crate::chooser::{JudgedNeurons, TASK_NEURONS};
use crate::ffn::{ColdBundles, add_bundles};
use crate::pauses::pause;
use crate::predictor::top_k;
use crate::row_choice::HostList;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use thermocline_datasets::Activation;
use thermocline_kernels::cuda::launch::{HOST_ROWS, Selection};
use thermocline_kernels::{Kernels, PreparedInput};
use thermocline_split::ALL_ROWS;

/// What a layer's neurons are judged and chosen by.
#[derive(Debug)]
pub(super) struct HostLayer {
    sketch: Arc<PinnedSketch>,
    selection: Selection,
    rows: Option<RowRule>,
}

/// What the threads share while they work on such a layer.
#[derive(Debug)]
pub(super) struct Judging {
    /// f32 `[ffn]` each, and pairs of them: what [`crate::chooser::Judgement`] has.
    scores: Vec<AtomicU32>,
    sketched: Vec<AtomicU32>,
    products: Vec<AtomicU32>,
    next_task: AtomicUsize,
    arrived: AtomicUsize,
    /// The last layer's flag at which all threads have met.
    met: AtomicU32,
}

/// A thread, and what it needs to know of a layer.
pub(super) struct Part<'a> {
    pub kernels: &'a Kernels,
    pub nth: usize,
    pub n_threads: usize,
    pub activation: Activation,
    /// All neurons of the layer, and the sketch of their down rows: of those that are not read, and under residuals.
    pub bundles: ColdBundles<'a>,
    /// The layer's input, and the same as rows of bundles want it.
    pub x: &'a [f32],
    pub input: &'a PreparedInput,
}

/// What a thread did.
#[derive(Debug, Default)]
pub(super) struct Done {
    /// Bytes of rows, and of sketches, that it read.
    pub bytes: u64,
    /// Those of sketches, but for what is under residuals.
    pub sketch_bytes: u64,
    /// Rows of the neurons that it computed.
    pub rows: u64,
    /// All neurons that were chosen, ascending.
    pub chosen: Vec<u32>,
}

impl HostLayer {
    /// Of `layer`, if the threads could compute all of it.
    pub(super) fn new(layer: &Layer) -> Option<Self> {
        let sketch = Arc::clone(layer.for_host()?);
        Some(Self { sketch, selection: layer.selection, rows: layer.rows })
    }

    /// Computes this thread's part into `sums`, `[hidden]`; `None` if `is_over` before all threads have judged. `flag` is the request's,
    /// other than that of any other layer or token.
    pub(super) fn add(
        &self,
        part: &Part<'_>,
        judging: &Judging,
        flag: u32,
        is_over: impl Fn() -> bool,
        sums: &mut [f32],
    ) -> Option<Done> {
        let n = self.sketch.numbers.n_neurons();
        let mut done = Done { sketch_bytes: self.judge(part, judging, n), ..Done::default() };
        if !judging.meet(flag, part.n_threads, is_over) {
            return None;
        }
        done.chosen = self.chosen(judging, n);
        let list = share(done.chosen.len(), part);
        let of_chosen = self.add_chosen(part, judging, &done.chosen[list], &mut done.rows, sums);
        done.sketch_bytes += self.add_others(part, judging, &done.chosen, share(n, part), sums);
        done.bytes = of_chosen + done.sketch_bytes;
        Some(done)
    }

    /// Judges neurons as long as there are any that no thread has taken; returns the bytes that were read.
    fn judge(&self, part: &Part<'_>, judging: &Judging, n: usize) -> u64 {
        let numbers = &self.sketch.numbers;
        let (rows, columns) =
            ([self.sketch.matrix(0), self.sketch.matrix(1)], numbers.columns_of(part.kernels, part.x));
        let (mut scores, mut sketched) = ([0.0; TASK_NEURONS], [0.0; TASK_NEURONS]);
        let mut products = [[0.0; 2]; TASK_NEURONS];
        let mut bytes = 0;
        while let Some(first) = judging.take(n) {
            let len = TASK_NEURONS.min(n - first);
            let (scores, sketched, products) = (&mut scores[..len], &mut sketched[..len], &mut products[..len]);
            let of_task = JudgedNeurons { first, scores, sketched, products };
            numbers.judge_some(part.kernels, rows, &columns, self.rows.map(|rule| rule.least), of_task);
            let store = |to: &[AtomicU32], values: &[f32]| {
                to.iter().zip(values).for_each(|(to, value)| to.store(value.to_bits(), Ordering::Relaxed));
            };
            store(&judging.scores[first..], scores);
            store(&judging.sketched[first..], sketched);
            if self.rows.is_some() {
                store(&judging.products[2 * first..], products.as_flattened());
            }
            // As many as a chooser on a CPU counts.
            bytes += (len * (rows[0].row_bytes() + rows[1].row_bytes() + 16)) as u64;
        }
        bytes
    }

    /// The neurons that are computed, ascending, when all are judged.
    fn chosen(&self, judging: &Judging, n: usize) -> Vec<u32> {
        let scores = judging.scores[..n].iter().map(value);
        match self.selection {
            Selection::Every => (0..n as u32).collect(),
            Selection::Above(least) => (0..).zip(scores).filter(|(_, score)| *score > least).map(|(i, _)| i).collect(),
            Selection::Top(k) => {
                let mut chosen = Vec::new();
                top_k(&scores.collect::<Vec<f32>>(), k.max(1), &mut chosen);
                chosen
            }
        }
    }

    /// Adds `chosen` neurons; counts their rows and returns the bytes of those that were read.
    fn add_chosen(&self, part: &Part<'_>, judging: &Judging, chosen: &[u32], rows: &mut u64, sums: &mut [f32]) -> u64 {
        let to_read = |i: usize| match self.rows {
            Some(_) => value(&judging.scores[i]) as u32,
            None => u32::from(ALL_ROWS),
        };
        let entries: Vec<_> = chosen.iter().map(|&i| AtomicU32::new(i | to_read(i as usize) << HOST_ROWS)).collect();
        let product = |at: usize| AtomicU32::new(judging.products[at].load(Ordering::Relaxed));
        let known: Option<Vec<_>> = self.rows.map(|_| {
            let both = |&i: &u32| [2 * i as usize, 2 * i as usize + 1].map(product);
            chosen.iter().flat_map(both).collect()
        });
        let list = HostList { entries: &entries, known: known.as_deref() };
        *rows += list.n_rows();
        add_bundles(part.kernels, part.bundles, part.activation, part.input, sums, list)
    }

    /// Adds the sketch of those of `neurons` that are not `chosen`; returns the bytes that were read.
    fn add_others(
        &self,
        part: &Part<'_>,
        judging: &Judging,
        chosen: &[u32],
        neurons: Range<usize>,
        sums: &mut [f32],
    ) -> u64 {
        let mut chosen = chosen[chosen.partition_point(|&i| (i as usize) < neurons.start)..].iter().peekable();
        let (mut rows, mut factors) = (Vec::with_capacity(neurons.len()), Vec::with_capacity(neurons.len()));
        for i in neurons {
            if chosen.next_if(|&&next| next as usize == i).is_some() {
                continue;
            }
            let h = value(&judging.sketched[i]);
            if h != 0.0 {
                rows.push(i as u32);
                factors.push(h);
            }
        }
        let down = self.sketch.matrix(2);
        part.kernels.sketch_axpys(down, &rows, &factors, sums);
        (rows.len() * down.row_bytes()) as u64
    }
}

fn value(bits: &AtomicU32) -> f32 {
    f32::from_bits(bits.load(Ordering::Relaxed))
}

/// A thread's share of `n` things.
fn share(n: usize, part: &Part<'_>) -> Range<usize> {
    n * part.nth / part.n_threads..n * (part.nth + 1) / part.n_threads
}

impl Judging {
    /// For layers of so many neurons; `flag` is none that a request will have soon.
    pub(super) fn new(n_neurons: usize, flag: u32) -> Self {
        let zeros = |n: usize| (0..n).map(|_| AtomicU32::new(0)).collect();
        Self {
            scores: zeros(n_neurons),
            sketched: zeros(n_neurons),
            products: zeros(2 * n_neurons),
            next_task: AtomicUsize::new(0),
            arrived: AtomicUsize::new(0),
            met: AtomicU32::new(flag),
        }
    }

    /// Bytes that this takes for layers of so many neurons.
    pub(super) fn bytes(n_neurons: usize) -> u64 {
        16 * n_neurons as u64
    }

    /// The first of the next [`TASK_NEURONS`] of `n` neurons that no thread has taken.
    fn take(&self, n: usize) -> Option<usize> {
        pause();
        Some(self.next_task.fetch_add(1, Ordering::Relaxed) * TASK_NEURONS).filter(|&first| first < n)
    }

    /// Waits until all threads are here; `false` if it `is_over` before. What each wrote before is then there for all.
    fn meet(&self, flag: u32, n_threads: usize, is_over: impl Fn() -> bool) -> bool {
        pause();
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == n_threads {
            // Nobody takes a task before the next request, which comes when all are done with this one.
            self.arrived.store(0, Ordering::Relaxed);
            self.next_task.store(0, Ordering::Relaxed);
            pause();
            self.met.store(flag, Ordering::Release);
            return true;
        }
        let mut watch = Watch::default();
        while self.met.load(Ordering::Acquire) != flag {
            if watch.rest() && is_over() {
                return false;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pauses::in_time;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    const THREADS: usize = 3;
    const NEURONS: usize = 5 * TASK_NEURONS - 7;
    const ROUNDS: u32 = 200;

    /// What a thread does for the requests up to the last: takes tasks, meets, looks at what all have done.
    fn work(judging: &Judging, request: &AtomicU32, done: &AtomicUsize) {
        for round in 1..=ROUNDS {
            while request.load(Ordering::Acquire) < round {
                std::thread::yield_now();
            }
            while let Some(first) = judging.take(NEURONS) {
                let before = judging.scores[first].swap(round, Ordering::Relaxed);
                assert_eq!(before, round - 1, "taken twice, or too early");
                pause();
            }
            assert!(judging.meet(round, THREADS, || false));
            for first in (0..NEURONS).step_by(TASK_NEURONS) {
                assert_eq!(judging.scores[first].load(Ordering::Relaxed), round, "not seen behind the meeting");
            }
            done.fetch_add(1, Ordering::AcqRel);
        }
    }

    #[test]
    fn every_task_is_taken_once_and_seen_by_all() {
        in_time(Duration::from_secs(120), || {
            let (judging, request, done) = (Judging::new(NEURONS, 0), AtomicU32::new(0), AtomicUsize::new(0));
            std::thread::scope(|scope| {
                for _ in 0..THREADS {
                    scope.spawn(|| work(&judging, &request, &done));
                }
                for round in 1..=ROUNDS {
                    // The next request comes when all are done with this one.
                    request.store(round, Ordering::Release);
                    while done.load(Ordering::Acquire) < THREADS * round as usize {
                        std::thread::yield_now();
                    }
                }
            });
        });
    }

    /// A thread that has failed is not waited for.
    #[test]
    fn nobody_waits_for_a_thread_that_is_gone() {
        in_time(Duration::from_secs(60), || {
            let (judging, is_over) = (Judging::new(NEURONS, 0), AtomicBool::new(false));
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| judging.meet(1, 2, || is_over.load(Ordering::Relaxed)));
                std::thread::sleep(Duration::from_millis(20));
                is_over.store(true, Ordering::Relaxed);
                assert!(!waiting.join().expect("no panic"));
            });
        });
    }
}
