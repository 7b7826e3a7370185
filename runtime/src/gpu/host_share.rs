//! The host's threads, which compute a share of the cold neurons from pinned memory while the device reads the others.
//!
//! No call of the driver is involved: the device writes its input and a list to mapped memory and raises a flag; the
//! threads watch the flag, add up their part, and raise another. All threads take part in every layer.

use super::load::Model;
use crate::ffn::add_bundles;
use crate::{Error, Result};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use thermocline_datasets::Activation;
use thermocline_kernels::cuda::Memory;
use thermocline_kernels::cuda::launch::{INPUT_FLAG, flag_value};
use thermocline_kernels::{BundleLayout, Kernels, Member, PreparedInput, pause};

/// What the device takes for "the host has given up".
const GIVEN_UP: u32 = u32::MAX;

/// For so long after a token the threads watch for the next one before they sleep: waking them takes longer than what
/// lies between two tokens.
const LINGER: Duration = Duration::from_millis(3);

/// Looks at the flag between two looks at everything else.
const SPINS_TO_CHECK: u32 = 256;

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
            bytes: AtomicU64::new(0),
        });
        let seen = shared.request_flag.words()[0].load(Ordering::Acquire);
        let prepared = shared.request_flag.words()[INPUT_FLAG].load(Ordering::Acquire);
        let mut all = Self { shared, threads: Vec::new() };
        for (t, member) in Member::team(n_threads, model.layout.hidden_size()).into_iter().enumerate() {
            let shared = Arc::clone(&all.shared);
            let thread = std::thread::Builder::new().name(format!("host-{t}")).spawn(move || {
                if catch_unwind(AssertUnwindSafe(|| work(&shared, member, seen, prepared))).is_err() {
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

/// What the device asks for, with the layer's flag.
enum Request {
    /// Its input is there.
    Input(u32),
    /// Its list is, too.
    Work(u32),
}

/// What a thread does until it is stopped. `seen` and `prepared` are the last requests that are not for it: a thread that
/// starts late must not take the first one for an old one.
fn work(shared: &Shared, mut member: Member, mut seen: u32, mut prepared: u32) {
    let kernels = Kernels::detect();
    let (t, n_threads) = (member.number(), member.n_members());
    let (mut x, mut input) = (vec![0.0f32; shared.layout.hidden_size()], PreparedInput::default());
    while let Some(request) = next_request(shared, seen, prepared) {
        let (Request::Input(flag) | Request::Work(flag)) = request;
        if prepared != flag {
            // The device does not write the next layer's before this one is done, if the host has work in it.
            prepared = flag;
            shared.x.copy_to(&mut x);
            kernels.prepare(shared.layout.encoding(), &x, &mut input);
        }
        if matches!(request, Request::Input(_)) {
            continue;
        }
        seen = flag;
        let layer = (flag.wrapping_sub(1) % shared.cold.len() as u32) as usize;
        let n = shared.count.words()[0].load(Ordering::Relaxed) as usize;
        let mine = &shared.list.words()[n * t / n_threads..n * (t + 1) / n_threads];
        let add = |sums: &mut [f32]| {
            let (cold, size) = (shared.cold[layer].host_bytes(), shared.layout.bundle_bytes());
            let bundle = |i: usize| {
                let at = mine[i].load(Ordering::Relaxed) as usize * size;
                &cold[at..at + size]
            };
            let rows = add_bundles(&kernels, shared.layout, shared.activation, &input, sums, mine.len(), bundle);
            shared.bytes.fetch_add(rows * (size as u64 / 3), Ordering::Relaxed);
        };
        let take = |columns: std::ops::Range<usize>, sums: &[f32]| {
            for (word, v) in shared.y.words()[columns].iter().zip(sums) {
                word.store(v.to_bits(), Ordering::Relaxed);
            }
        };
        match member.sum(add, take) {
            Ok(true) => shared.result_flag.words()[0].store(flag, Ordering::Release),
            Ok(false) => {}
            Err(_) => return,
        }
        member.clear();
    }
}

/// The next request; `None` when the threads are to end.
fn next_request(shared: &Shared, seen: u32, prepared: u32) -> Option<Request> {
    let flags = shared.request_flag.words();
    let mut spins = 0u32;
    let mut idle_since = None;
    loop {
        let now = flags[0].load(Ordering::Acquire);
        if now != seen {
            return Some(Request::Work(now));
        }
        let now = flags[INPUT_FLAG].load(Ordering::Acquire);
        if now != prepared {
            return Some(Request::Input(now));
        }
        pause(&mut spins);
        if !spins.is_multiple_of(SPINS_TO_CHECK) {
            continue;
        }
        if shared.stop.load(Ordering::Relaxed) {
            return None;
        }
        if shared.awake.load(Ordering::Relaxed) {
            idle_since = None;
        } else if idle_since.get_or_insert_with(Instant::now).elapsed() > LINGER {
            // A wake-up that comes between the check and this is kept by the thread's token.
            std::thread::park_timeout(Duration::from_millis(100));
        }
    }
}
