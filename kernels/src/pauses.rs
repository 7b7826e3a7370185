//! Random pauses where threads meet, in unit tests alone: an idle machine does the same things in the same order again and
//! again, and what is wrong in another order is never seen.

#[cfg(test)]
pub(crate) use random::{in_time, pause};

/// A place where another thread may come first.
#[cfg(not(test))]
#[inline]
pub(crate) fn pause() {}

#[cfg(test)]
mod random {
    use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::time::Duration;

    /// Tests that want pauses.
    static WANTED: AtomicUsize = AtomicUsize::new(0);
    static STATE: AtomicU64 = AtomicU64::new(88_172_645_463_325_252);

    /// While one of these lives, [`pause`] pauses, in all threads.
    struct Pauses(());

    impl Pauses {
        fn begin() -> Self {
            WANTED.fetch_add(1, Ordering::SeqCst);
            Self(())
        }
    }

    impl Drop for Pauses {
        fn drop(&mut self) {
            WANTED.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Runs `work` with pauses; fails if it has not ended within `limit`.
    pub(crate) fn in_time(limit: Duration, work: impl FnOnce() + Send + 'static) {
        let _pauses = Pauses::begin();
        let (sender, receiver) = mpsc::channel();
        let worker = std::thread::spawn(move || {
            work();
            let _ = sender.send(());
        });
        let ended = receiver.recv_timeout(limit);
        assert!(!matches!(ended, Err(mpsc::RecvTimeoutError::Timeout)), "threads wait for each other");
        if let Err(panic) = worker.join() {
            std::panic::resume_unwind(panic);
        }
    }

    /// A place where another thread may come first: half of the time nothing happens, else some nanoseconds to some tens
    /// of microseconds go by, or the thread stands at the end of the queue.
    pub(crate) fn pause() {
        if WANTED.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut x = STATE.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x ^= x >> 27;
        match x % 32 {
            0..16 => {}
            16..24 => (0..x >> 8 & 0x7ff).for_each(|_| std::hint::spin_loop()),
            24..31 => std::thread::yield_now(),
            _ => std::thread::sleep(Duration::from_micros(x >> 8 & 63)),
        }
    }
}
