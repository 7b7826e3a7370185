//! The host's threads, which compute a share of the cold neurons from pinned memory while the device reads the others.
//!
//! No call of the driver is involved: the device writes its input and a list to mapped memory and raises a flag; the
//! threads watch the flag; each adds up its part of the list, leaves the sums in mapped memory, and raises a flag of its
//! own. They never wait for each other: the device adds up what they leave. Of some layers they do everything ([`super::host_layer`]).

use super::host_layer::{Done, HostLayer, Judging, Part};
use super::load::{Layer, Model};
use super::sketches::PinnedSketch;
use crate::chooser::SketchedLayer;
use crate::ffn::{ColdBundles, add_bundles, input_encoding};
use crate::row_choice::HostList;
use crate::{Error, Result};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use thermocline_datasets::Activation;
use thermocline_kernels::cuda::Memory;
use thermocline_kernels::cuda::launch::{HOST_ROWS, INPUT_FLAG, RESULT_FLAG, flag_value};
use thermocline_kernels::{Encoding, Kernels, LayerLayout, PreparedInput};
use thermocline_split::{ALL_ROWS, Split};

/// What the device takes for "the host has given up".
const GIVEN_UP: u32 = u32::MAX;

/// For so long after a token the threads watch for the next one before they sleep: waking them takes longer than what
/// lies between two tokens.
const LINGER: Duration = Duration::from_millis(3);

/// Looks at the flags before a waiting thread lets others run.
const SPINS_TO_YIELD: u32 = 20_000;

/// Looks at the flag between two looks at everything else.
const SPINS_TO_CHECK: u32 = 256;

/// A thread that watches a flag.
#[derive(Default)]
pub(super) struct Watch {
    looks: u32,
}

impl Watch {
    /// Rests after a look at the flag; whether it is time to look at everything else.
    pub(super) fn rest(&mut self) -> bool {
        self.looks = self.looks.wrapping_add(1);
        if self.looks.is_multiple_of(SPINS_TO_YIELD) {
            // On a busy machine another thread may be what is waited for.
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
        self.looks.is_multiple_of(SPINS_TO_CHECK)
    }
}

/// What the threads have counted so far.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct HostCounts {
    /// Bytes that they have read.
    pub bytes: u64,
    /// The part of them that is sketches, of layers that are theirs.
    pub sketch_bytes: u64,
    /// Rows that they were asked for, three of a whole neuron.
    pub rows: u64,
    /// Neurons that they chose in layers that are theirs.
    pub chosen: u64,
}

impl HostCounts {
    pub(super) fn since(self, before: Self) -> Self {
        Self {
            bytes: self.bytes - before.bytes,
            sketch_bytes: self.sketch_bytes - before.sketch_bytes,
            rows: self.rows - before.rows,
            chosen: self.chosen - before.chosen,
        }
    }
}

/// The threads. They sleep until [`HostShare::wake`].
#[derive(Debug)]
pub(super) struct HostShare {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    activation: Activation,
    hidden_size: usize,
    layers: Vec<ColdNeurons>,
    request_flag: Memory,
    result_flags: Memory,
    count: Memory,
    list: Memory,
    known: Memory,
    x: Memory,
    y: Memory,
    awake: AtomicBool,
    stop: AtomicBool,
    panicked: AtomicBool,
    /// As in [`HostCounts`], this and the next three.
    bytes: AtomicU64,
    sketch_bytes: AtomicU64,
    rows: AtomicU64,
    chosen: AtomicU64,
    /// Whether lists may ask for single rows.
    of_rows: bool,
    n_threads: usize,
    /// For layers of which the threads do everything.
    judging: Judging,
    /// The neurons of each of these layers that the last token computed.
    last_chosen: Vec<Mutex<Vec<u32>>>,
}

/// A layer's neurons that are not hot.
#[derive(Debug)]
struct ColdNeurons {
    layout: LayerLayout,
    n_hot: usize,
    memory: Memory,
    /// All of them, if the threads could choose among them by themselves.
    whole: Option<HostLayer>,
    /// Whether they do.
    is_hosts: AtomicBool,
    /// If they are residuals: the sketch of these and of those between them and the ones that every token computes, unless it lies in
    /// pinned memory.
    sketch: Option<SketchedLayer>,
    pinned_sketch: Option<Arc<PinnedSketch>>,
}

impl ColdNeurons {
    fn bundles(&self) -> ColdBundles<'_> {
        let own = self.sketch.as_ref().map(|sketch| (sketch.matrix(2), sketch.first()));
        let pinned = || self.pinned_sketch.as_ref().map(|sketch| (sketch.matrix(2), sketch.numbers.first()));
        let sketch = own.or_else(pinned);
        ColdBundles { layout: &self.layout, first: self.n_hot, bytes: self.memory.host_bytes(), sketch }
    }
}

impl Shared {
    /// The flag of thread `t`.
    fn result_flag(&self, t: usize) -> &AtomicU32 {
        &self.result_flags.words()[t * RESULT_FLAG]
    }
}

impl HostShare {
    pub(super) fn start(split: &Split, model: &Model, activation: Activation, n_threads: usize) -> Result<Self> {
        let m = &model.mapped;
        let cold = |(i, l): (usize, &Layer)| -> Result<ColdNeurons> {
            let is_residual = l.n_hot < l.layout.n_neurons() && l.last_section().layout.encoding() == Encoding::R4;
            let pinned_sketch = l.pinned_sketch().cloned();
            let is_own = is_residual && pinned_sketch.is_none();
            let sketch = if is_own { SketchedLayer::behind(split, i, l.n_always, None)? } else { None };
            Ok(ColdNeurons {
                layout: l.layout.clone(),
                n_hot: l.n_hot,
                memory: l.cold.clone(),
                whole: HostLayer::new(l),
                is_hosts: AtomicBool::new(false),
                sketch: sketch.map(SketchedLayer::down_rows),
                pinned_sketch,
            })
        };
        let n_judged = if model.n_for_host() > 0 { split.manifest().config.intermediate_size } else { 0 };
        let seen = m.request_flag.words()[0].load(Ordering::Acquire);
        let shared = Arc::new(Shared {
            activation,
            hidden_size: model.layers.first().map_or(0, |l| l.layout.hidden_size()),
            layers: model.layers.iter().enumerate().map(cold).collect::<Result<_>>()?,
            request_flag: m.request_flag.clone(),
            result_flags: m.result_flags.clone(),
            count: m.count.clone(),
            list: m.list.clone(),
            known: m.known.clone(),
            x: m.x.clone(),
            y: m.y.clone(),
            awake: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            bytes: AtomicU64::new(0),
            sketch_bytes: AtomicU64::new(0),
            rows: AtomicU64::new(0),
            chosen: AtomicU64::new(0),
            judging: Judging::new(n_judged, seen),
            last_chosen: model.layers.iter().map(|_| Mutex::default()).collect(),
            of_rows: model.layers.iter().any(|l| l.rows.is_some()),
            n_threads,
        });
        let prepared = shared.request_flag.words()[INPUT_FLAG].load(Ordering::Acquire);
        let mut all = Self { shared, threads: Vec::new() };
        for t in 0..n_threads {
            let shared = Arc::clone(&all.shared);
            let thread = std::thread::Builder::new().name(format!("host-{t}")).spawn(move || {
                if catch_unwind(AssertUnwindSafe(|| work(&shared, t, seen, prepared))).is_err() {
                    shared.panicked.store(true, Ordering::SeqCst);
                    shared.result_flag(t).store(GIVEN_UP, Ordering::SeqCst);
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

    /// What was counted so far.
    pub(super) fn counts(&self) -> HostCounts {
        let s = &self.shared;
        let [bytes, sketch_bytes, rows, chosen] =
            [&s.bytes, &s.sketch_bytes, &s.rows, &s.chosen].map(|n| n.load(Ordering::Relaxed));
        HostCounts { bytes, sketch_bytes, rows, chosen }
    }

    /// The neurons of layer `l`, which is the host's, that the last token computed, ascending.
    pub(super) fn last_chosen(&self, l: usize) -> Vec<u32> {
        self.shared.last_chosen[l].lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes over the layers that `model` leaves to the host. The device must be idle.
    pub(super) fn take_over(&self, model: &Model) {
        for (own, layer) in self.shared.layers.iter().zip(&model.layers) {
            own.is_hosts.store(layer.is_hosts, Ordering::SeqCst);
        }
    }

    /// Bytes a second of rows read and computed with, on `n` neurons of each of several layers that have cold ones and are not the
    /// host's, spread over all of them or one behind the other; 0 if there is none. The device must be idle. Takes numbers of tokens after `serial`,
    /// which is moved on: flags never go back.
    pub(super) fn measure(&self, n: usize, is_scattered: bool, serial: &mut u32) -> f64 {
        const LAYERS: usize = 6;
        const ROUNDS: usize = 2;
        let shared = &self.shared;
        let n_cold = |l: usize| shared.layers[l].layout.n_neurons() - shared.layers[l].n_hot;
        let is_shared = |l: usize| !shared.layers[l].is_hosts.load(Ordering::SeqCst);
        let layers: Vec<usize> = (0..shared.layers.len()).filter(|&l| n_cold(l) > 0 && is_shared(l)).collect();
        for (i, word) in shared.x.words()[..shared.hidden_size].iter().enumerate() {
            word.store(((i % 7) as f32 - 3.0).to_bits(), Ordering::Relaxed);
        }
        self.wake();
        let mut best = 0.0f64;
        // Each time other rows, because what was read just now lies in the caches; in the second round of pages that the
        // threads have seen.
        let n_layers = LAYERS.min(layers.len());
        for (round, i) in (0..ROUNDS).flat_map(|round| (0..n_layers).map(move |i| (round, i))) {
            let layer = layers[i * layers.len() / n_layers];
            let available = n_cold(layer);
            let n = n.min(available).min(shared.list.words().len());
            for (i, word) in shared.list.words()[..n].iter().enumerate() {
                let spread = (ROUNDS * i + round) * available / (ROUNDS * n);
                let cold = if is_scattered { spread } else { round * (available - n) + i };
                word.store(cold as u32 | u32::from(ALL_ROWS) << HOST_ROWS, Ordering::Relaxed);
            }
            shared.count.words()[0].store(n as u32, Ordering::Relaxed);
            *serial += 1;
            let flag = flag_value(*serial, layer, shared.layers.len());
            let (before, begin) = (self.counts().bytes, Instant::now());
            shared.request_flag.words()[0].store(flag, Ordering::Release);
            while (0..shared.n_threads).any(|t| shared.result_flag(t).load(Ordering::Acquire) != flag) {
                if shared.panicked.load(Ordering::SeqCst) {
                    return 0.0;
                }
                std::hint::spin_loop();
            }
            best = best.max((self.counts().bytes - before) as f64 / begin.elapsed().as_secs_f64());
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

/// What thread `t` does until it is stopped. `seen` and `prepared` are the last requests that are not for it: a thread that
/// starts late must not take the first one for an old one.
fn work(shared: &Shared, t: usize, mut seen: u32, mut prepared: u32) {
    let kernels = Kernels::detect();
    let (n_threads, hidden) = (shared.n_threads, shared.hidden_size);
    let (mut x, mut input) = (vec![0.0f32; hidden], PreparedInput::default());
    let mut sums = vec![0.0f32; hidden];
    while let Some(request) = next_request(shared, seen, prepared) {
        let (Request::Input(flag) | Request::Work(flag)) = request;
        let layer = &shared.layers[(flag.wrapping_sub(1) % shared.layers.len() as u32) as usize];
        if prepared != flag {
            // The device does not write the next layer's before this one is done, if the host has work in it.
            prepared = flag;
            shared.x.copy_to(&mut x);
            kernels.prepare(input_encoding(&layer.layout), &x, &mut input);
        }
        if matches!(request, Request::Input(_)) {
            continue;
        }
        seen = flag;
        if let Some(whole) = layer.whole.as_ref().filter(|_| layer.is_hosts.load(Ordering::SeqCst)) {
            let (activation, bundles) = (shared.activation, layer.bundles());
            let part = Part { kernels: &kernels, nth: t, n_threads, activation, bundles, x: &x, input: &input };
            let is_over = || shared.panicked.load(Ordering::Relaxed) || shared.stop.load(Ordering::Relaxed);
            let Some(Done { bytes, sketch_bytes, rows, chosen }) =
                whole.add(&part, &shared.judging, flag, is_over, &mut sums)
            else {
                continue;
            };
            // The first thread's is there before the device goes on.
            if t == 0 {
                shared.chosen.fetch_add(chosen.len() as u64, Ordering::Relaxed);
                let l = flag.wrapping_sub(1) % shared.layers.len() as u32;
                *shared.last_chosen[l as usize].lock().unwrap_or_else(PoisonError::into_inner) = chosen;
            }
            shared.bytes.fetch_add(bytes, Ordering::Relaxed);
            shared.sketch_bytes.fetch_add(sketch_bytes, Ordering::Relaxed);
            shared.rows.fetch_add(rows, Ordering::Relaxed);
            give(shared, t, flag, &mut sums);
            continue;
        }
        let n = shared.count.words()[0].load(Ordering::Relaxed) as usize;
        let places = n * t / n_threads..n * (t + 1) / n_threads;
        let known = shared.of_rows.then(|| &shared.known.words()[2 * places.start..2 * places.end]);
        let mine = HostList { entries: &shared.list.words()[places], known };
        let bytes = add_bundles(&kernels, layer.bundles(), shared.activation, &input, &mut sums, mine);
        give(shared, t, flag, &mut sums);
        // While the device is busy with other things.
        shared.bytes.fetch_add(bytes, Ordering::Relaxed);
        shared.rows.fetch_add(mine.n_rows(), Ordering::Relaxed);
    }
}

/// Leaves the sums of thread `t` to the device, and begins anew.
fn give(shared: &Shared, t: usize, flag: u32, sums: &mut [f32]) {
    shared.y.copy_from(t * shared.hidden_size, sums);
    shared.result_flag(t).store(flag, Ordering::Release);
    sums.fill(0.0);
}

/// The next request; `None` when the threads are to end.
fn next_request(shared: &Shared, seen: u32, prepared: u32) -> Option<Request> {
    let flags = shared.request_flag.words();
    let mut watch = Watch::default();
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
        if !watch.rest() {
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
