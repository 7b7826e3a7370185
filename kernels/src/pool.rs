use crate::pauses::pause;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle, Thread};

/// Spins before a waiting worker sleeps: some tens of microseconds, longer than the serial parts of a token, shorter
/// than a disk read (readers need the cores then).
const SPINS_TO_PARK: u32 = 4_000;
/// Spins before the caller, waiting for its workers, lets others run: on a busy machine one of them may be a worker.
const SPINS_TO_YIELD: u32 = 1_000;

/// A fixed set of threads that run one parallel loop at a time with about a microsecond of overhead.
///
/// A decode step has some two hundred loops of 10 to 100 microseconds each; a work-stealing pool's hand-over (rayon:
/// several microseconds once its threads have gone to sleep) would cost a tenth of the token. Waiting threads spin
/// briefly, then park. The calling thread works too, and it waits only for threads that have begun: on a busy machine a
/// worker that the system has not woken in time misses the loop instead of holding it up.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    threads: Vec<Thread>,
}

/// A thread that the system would not start; those started before it have ended again.
#[derive(Debug, thiserror::Error)]
#[error("cannot start thread {nth} of {n_threads}: {source}")]
pub struct PoolError {
    /// Which one, the calling thread being the first.
    pub nth: usize,
    /// Threads asked for.
    pub n_threads: usize,
    /// The cause.
    pub source: std::io::Error,
}

type Job = *const (dyn Fn() + Sync);

/// Set in [`Shared::gate`] while threads may join the loop.
const OPEN: u64 = 1 << 31;

#[derive(Debug)]
struct Shared {
    /// The loop's number in the upper half; below it [`OPEN`] and how many threads have joined.
    gate: AtomicU64,
    /// Threads that joined and have ended.
    done: AtomicU64,
    stop: AtomicBool,
    panicked: AtomicBool,
    parked: Vec<AtomicBool>,
    job: UnsafeCell<Option<Job>>,
}

/// The number of the loop that `gate` belongs to.
fn epoch(gate: u64) -> u64 {
    gate >> 32
}

// SAFETY: `job` is written only by the thread that runs `Pool::run` (which takes `&mut self`), while the gate is closed
// and every thread that joined has ended; it is read only by threads that joined through the open gate (acquire after
// release) and have not ended.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer inside is only followed while its referent is borrowed by `Pool::run`.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `n_threads` in all (at least one: the caller).
    ///
    /// # Errors
    /// If the system refuses to start a thread.
    pub fn new(n_threads: usize) -> Result<Self, PoolError> {
        let n_workers = n_threads.max(1) - 1;
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            done: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            parked: (0..n_workers).map(|_| AtomicBool::new(false)).collect(),
            job: UnsafeCell::new(None),
        });
        // Dropping a pool that is not complete ends the threads that it has.
        let mut pool = Self { shared, workers: Vec::new(), threads: Vec::new() };
        for w in 0..n_workers {
            let shared = Arc::clone(&pool.shared);
            let builder = thread::Builder::new().name(format!("compute-{}", w + 1));
            let worker = builder.spawn(move || work(&shared, w)).map_err(|source| PoolError {
                nth: w + 2,
                n_threads,
                source,
            })?;
            pool.threads.push(worker.thread().clone());
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads in all, the caller included.
    pub fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f` on this thread and once on every other that comes before this one's call has returned; returns when all
    /// calls have.
    ///
    /// # Panics
    /// If `f` panicked on any thread.
    fn run<F: Fn() + Sync>(&mut self, f: F) {
        if self.workers.is_empty() {
            return f();
        }
        let shared = &self.shared;
        let job: &(dyn Fn() + Sync) = &f;
        let job = std::ptr::from_ref(job);
        // SAFETY: only the lifetime changes; every use ends before this function returns, while `f` is still alive.
        let job: Job = unsafe { std::mem::transmute(job) };
        // SAFETY: the gate is closed and all who joined before have ended: nobody reads `job`.
        unsafe { *shared.job.get() = Some(job) };
        shared.done.store(0, Ordering::Relaxed);
        let next = epoch(shared.gate.load(Ordering::Relaxed)).wrapping_add(1) << 32;
        pause();
        shared.gate.store(next | OPEN, Ordering::SeqCst);
        pause();
        for (parked, thread) in shared.parked.iter().zip(&self.threads) {
            if parked.swap(false, Ordering::SeqCst) {
                thread.unpark();
            }
        }
        let mine = catch_unwind(AssertUnwindSafe(f));
        pause();
        let joined = shared.gate.fetch_and(!OPEN, Ordering::AcqRel) & (OPEN - 1);
        pause();
        let mut spins = 0u32;
        while shared.done.load(Ordering::Acquire) < joined {
            spins += 1;
            if spins > SPINS_TO_YIELD { thread::yield_now() } else { std::hint::spin_loop() }
        }
        if let Err(panic) = mine {
            resume_unwind(panic);
        }
        assert!(!shared.panicked.swap(false, Ordering::Relaxed), "a compute thread panicked");
    }

    /// Splits `data` in pieces of `chunk_len` and calls `f(index, piece)` once for each, on whichever thread is free.
    ///
    /// # Panics
    /// If `chunk_len` is 0 or `f` panics.
    pub fn for_each_chunk<T: Send, F>(&mut self, data: &mut [T], chunk_len: usize, f: F)
    where
        F: Fn(usize, &mut [T]) + Sync,
    {
        let len = data.len();
        let n_chunks = len.div_ceil(chunk_len);
        let base = Base(data.as_mut_ptr());
        let next = AtomicUsize::new(0);
        self.run(|| {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= n_chunks {
                    return;
                }
                let start = i * chunk_len;
                // SAFETY: `i` is handed out once, so the pieces are disjoint; they lie inside `data`, which is
                // borrowed mutably until `run` has returned.
                let piece = unsafe { std::slice::from_raw_parts_mut(base.at(start), chunk_len.min(len - start)) };
                f(i, piece);
            }
        });
    }
}

/// A pointer that the closure of a parallel loop may share.
struct Base<T>(*mut T);

impl<T> Base<T> {
    /// # Safety
    /// `start` must lie inside the slice that the pointer came from.
    unsafe fn at(&self, start: usize) -> *mut T {
        // SAFETY: by this function's contract.
        unsafe { self.0.add(start) }
    }
}

// SAFETY: used only to reach disjoint parts of a slice whose elements may be sent.
unsafe impl<T: Send> Sync for Base<T> {}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        pause();
        self.shared.gate.fetch_add(1 << 32, Ordering::SeqCst);
        for thread in &self.threads {
            thread.unpark();
        }
        for worker in self.workers.drain(..) {
            // A worker only ends in this way; its jobs' panics were reported by `run`.
            let _ = worker.join();
        }
    }
}

fn work(shared: &Shared, index: usize) {
    let mut seen = 0;
    loop {
        let mut spins = 0u32;
        let mut gate = shared.gate.load(Ordering::Acquire);
        while epoch(gate) == seen {
            spins += 1;
            if spins < SPINS_TO_PARK {
                std::hint::spin_loop();
            } else {
                shared.parked[index].store(true, Ordering::SeqCst);
                pause();
                if epoch(shared.gate.load(Ordering::SeqCst)) == seen {
                    pause();
                    thread::park();
                }
                shared.parked[index].store(false, Ordering::SeqCst);
            }
            gate = shared.gate.load(Ordering::Acquire);
        }
        seen = epoch(gate);
        pause();
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        if !join(&shared.gate, gate) {
            continue;
        }
        pause();
        // SAFETY: this thread joined, so `job` was written before and stays valid until `done` is raised below.
        let job = unsafe { (*shared.job.get()).map(|job| &*job) };
        if let Some(job) = job
            && catch_unwind(AssertUnwindSafe(job)).is_err()
        {
            shared.panicked.store(true, Ordering::Relaxed);
        }
        pause();
        shared.done.fetch_add(1, Ordering::Release);
    }
}

/// Joins the loop that was open when `seen` was read; false if it has been closed since.
fn join(gate: &AtomicU64, mut seen: u64) -> bool {
    let number = epoch(seen);
    while seen & OPEN != 0 && epoch(seen) == number {
        match gate.compare_exchange_weak(seen, seen + 1, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return true,
            Err(now) => seen = now,
        }
    }
    false
}
