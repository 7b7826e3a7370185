//! The host's threads, which compute a share of the cold neurons from pinned memory while the device reads the others.
//!
//! No call of the driver is involved: the device writes its input and a list to mapped memory and raises a flag; the
//! threads watch the flag, add up their part, and raise another. All threads take part in every layer.

use super::load::Model;
use crate::ffn::add_bundles;
use crate::{Error, Result};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use thermocline_datasets::Activation;
use thermocline_kernels::cuda::Memory;
use thermocline_kernels::cuda::launch::flag_value;
use thermocline_kernels::{BundleLayout, Kernels};

/// What the device takes for "the host has given up".
const GIVEN_UP: u32 = u32::MAX;

/// Spins before a waiting thread lets others run: on a busy machine one of them may be what it waits for.
const SPINS_TO_YIELD: u32 = 20_000;

/// The threads. They sleep until [`HostShare::wake`].
#[derive(Debug)]
pub(super) struct HostShare {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    layout: BundleLayout,
    activation: Activation,
    cold: Vec<Memory>,
    request_flag: Memory,
    result_flag: Memory,
    count: Memory,
    list: Memory,
    x: Memory,
    y: Memory,
    awake: AtomicBool,
    stop: AtomicBool,
    panicked: AtomicBool,
    /// Threads that have reached a meeting point, over all of them.
    arrived: AtomicU64,
    /// Each thread's sums, `[hidden]`.
    partials: Vec<RwLock<Vec<f32>>>,
    /// Bytes of rows that were read.
    bytes: AtomicU64,
}

impl HostShare {
    pub(super) fn start(model: &Model, activation: Activation, n_threads: usize) -> Result<Self> {
        let m = &model.mapped;
        let shared = Arc::new(Shared {
            layout: model.layout,
            activation,
            cold: model.layers.iter().map(|l| l.cold.clone()).collect(),
            request_flag: m.request_flag.clone(),
            result_flag: m.result_flag.clone(),
            count: m.count.clone(),
            list: m.list.clone(),
            x: m.x.clone(),
            y: m.y.clone(),
            awake: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            arrived: AtomicU64::new(0),
            partials: (0..n_threads).map(|_| RwLock::new(vec![0.0; model.layout.hidden_size()])).collect(),
            bytes: AtomicU64::new(0),
        });
        let mut all = Self { shared, threads: Vec::new() };
        for t in 0..n_threads {
            let shared = Arc::clone(&all.shared);
            let thread = std::thread::Builder::new().name(format!("host-{t}")).spawn(move || {
                if catch_unwind(AssertUnwindSafe(|| work(&shared, t))).is_err() {
                    shared.panicked.store(true, Ordering::SeqCst);
                    shared.result_flag.words()[0].store(GIVEN_UP, Ordering::SeqCst);
                }
            });
            let refused = |source| Error::HostThreads { nth: t + 1, n_threads, source };
            all.threads.push(thread.map_err(refused)?);
        }
        Ok(all)
    }

    /// Before work is given to the device that asks the host for its share.
    pub(super) fn wake(&self) {
        self.shared.awake.store(true, Ordering::SeqCst);
        self.threads.iter().for_each(|t| t.thread().unpark());
    }

    /// When that work has ended. An error if a thread has failed.
    pub(super) fn rest(&self) -> Result<()> {
        self.shared.awake.store(false, Ordering::SeqCst);
        if self.shared.panicked.load(Ordering::SeqCst) { Err(Error::HostThreadFailed) } else { Ok(()) }
    }

    /// Bytes of rows read so far.
    pub(super) fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    /// Bytes a second of rows read and computed with, on `n` neurons of the layer that has most cold ones; 0 if none
    /// has. The device must be idle. Takes numbers of tokens after `serial`, which is moved on: flags never go back.
    pub(super) fn measure(&self, n: usize, serial: &mut u32) -> f64 {
        let shared = &self.shared;
        let bundle = shared.layout.bundle_bytes();
        let Some(layer) = (0..shared.cold.len()).max_by_key(|&l| shared.cold[l].len()) else { return 0.0 };
        let available = shared.cold[layer].host_bytes().len() / bundle;
        let n = n.min(available).min(shared.list.words().len());
        if n == 0 {
            return 0.0;
        }
        for (i, word) in shared.list.words()[..n].iter().enumerate() {
            word.store((i * available / n) as u32, Ordering::Relaxed);
        }
        for (i, word) in shared.x.words()[..shared.layout.hidden_size()].iter().enumerate() {
            word.store(((i % 7) as f32 - 3.0).to_bits(), Ordering::Relaxed);
        }
        shared.count.words()[0].store(n as u32, Ordering::Relaxed);
        self.wake();
        let mut best = 0.0f64;
        for _ in 0..6 {
            *serial += 1;
            let flag = flag_value(*serial, layer, shared.cold.len());
            let (before, begin) = (self.bytes(), Instant::now());
            shared.request_flag.words()[0].store(flag, Ordering::Release);
            while shared.result_flag.words()[0].load(Ordering::Acquire) != flag {
                if shared.panicked.load(Ordering::SeqCst) {
                    return 0.0;
                }
                std::hint::spin_loop();
            }
            best = best.max((self.bytes() - before) as f64 / begin.elapsed().as_secs_f64());
        }
        self.shared.awake.store(false, Ordering::SeqCst);
        best
    }
}

impl Drop for HostShare {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // A panic was already reported by `rest`.
            let _ = thread.join();
        }
    }
}

/// What thread `t` does until it is stopped.
fn work(shared: &Shared, t: usize) {
    let kernels = Kernels::detect();
    let hidden = shared.layout.hidden_size();
    let n_threads = shared.partials.len();
    let mut x = vec![0.0f32; hidden];
    let mut seen = shared.request_flag.words()[0].load(Ordering::Acquire);
    let mut meetings = 0;
    while let Some(flag) = next_request(shared, seen) {
        seen = flag;
        let layer = (flag.wrapping_sub(1) % shared.cold.len() as u32) as usize;
        let n = shared.count.words()[0].load(Ordering::Relaxed) as usize;
        let mine = &shared.list.words()[n * t / n_threads..n * (t + 1) / n_threads];
        read(&shared.x, &mut x);
        {
            let mut sums = shared.partials[t].write().unwrap_or_else(PoisonError::into_inner);
            sums.fill(0.0);
            let (cold, size) = (shared.cold[layer].host_bytes(), shared.layout.bundle_bytes());
            let bundle = |i: usize| {
                let at = mine[i].load(Ordering::Relaxed) as usize * size;
                &cold[at..at + size]
            };
            let rows = add_bundles(&kernels, shared.layout, shared.activation, &x, &mut sums, mine.len(), bundle);
            shared.bytes.fetch_add(rows * (size as u64 / 3), Ordering::Relaxed);
        }
        meetings += 1;
        meet(shared, meetings);
        let columns = hidden * t / n_threads..hidden * (t + 1) / n_threads;
        let mut sums = vec![0.0f32; columns.len()];
        for partial in &shared.partials {
            let partial = partial.read().unwrap_or_else(PoisonError::into_inner);
            for (sum, v) in sums.iter_mut().zip(&partial[columns.clone()]) {
                *sum += v;
            }
        }
        for (word, v) in shared.y.words()[columns].iter().zip(&sums) {
            word.store(v.to_bits(), Ordering::Relaxed);
        }
        meetings += 1;
        // The last to come tells the device.
        if arrive(shared) == meetings * n_threads as u64 {
            shared.result_flag.words()[0].store(flag, Ordering::Release);
        }
    }
}

/// The next value of the request flag; `None` when the threads are to end.
fn next_request(shared: &Shared, seen: u32) -> Option<u32> {
    let flag = &shared.request_flag.words()[0];
    let mut spins = 0u32;
    loop {
        let now = flag.load(Ordering::Acquire);
        if now != seen {
            return Some(now);
        }
        if shared.stop.load(Ordering::Relaxed) {
            return None;
        }
        if !shared.awake.load(Ordering::Relaxed) {
            // A wake-up that comes between the check and this is kept by the thread's token.
            std::thread::park_timeout(Duration::from_millis(100));
        }
        pause(&mut spins);
    }
}

fn arrive(shared: &Shared) -> u64 {
    shared.arrived.fetch_add(1, Ordering::AcqRel) + 1
}

/// Waits until all threads have come to this meeting, the `nth`.
fn meet(shared: &Shared, nth: u64) {
    arrive(shared);
    let mut spins = 0;
    while shared.arrived.load(Ordering::Acquire) < nth * shared.partials.len() as u64 {
        assert!(!shared.panicked.load(Ordering::Relaxed), "another thread has failed");
        pause(&mut spins);
    }
}

fn pause(spins: &mut u32) {
    *spins = spins.wrapping_add(1);
    if spins.is_multiple_of(SPINS_TO_YIELD) {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}

fn read(memory: &Memory, out: &mut [f32]) {
    let words: &[AtomicU32] = memory.words();
    for (o, w) in out.iter_mut().zip(words) {
        *o = f32::from_bits(w.load(Ordering::Relaxed));
    }
}
