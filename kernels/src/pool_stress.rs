//! The thread pool with random pauses wherever its threads meet.

use crate::Pool;
use crate::pauses::in_time;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn a_loop_is_whole_and_over_when_it_returns() {
    for n_threads in [2, 4] {
        in_time(LIMIT, move || {
            let mut pool = Pool::new(n_threads).expect("threads");
            // Outlives every loop, so that a call that comes too late is seen.
            let inside = Arc::new(AtomicUsize::new(0));
            for round in 0..3000u32 {
                let mut data = vec![0u32; 1 + round as usize * 37 % 300];
                let inside = &inside;
                pool.for_each_chunk(&mut data, 5, |i, piece| {
                    inside.fetch_add(1, Ordering::SeqCst);
                    crate::pauses::pause();
                    piece.iter_mut().for_each(|v| *v += round + i as u32);
                    inside.fetch_sub(1, Ordering::SeqCst);
                });
                assert_eq!(inside.load(Ordering::SeqCst), 0, "round {round}: somebody is still in the loop");
                let whole = data.iter().enumerate().all(|(j, &v)| v == round + (j / 5) as u32);
                assert!(whole, "round {round}: pieces once each: {data:?}");
                if round % 500 == 0 {
                    // Workers go to sleep.
                    std::thread::sleep(Duration::from_millis(3));
                }
            }
        });
    }
}

#[test]
fn a_pool_ends_whatever_its_threads_are_doing() {
    in_time(LIMIT, || {
        for round in 0..300 {
            let mut pool = Pool::new(2 + round % 3).expect("threads");
            for _ in 0..round % 4 {
                let mut data = vec![0u8; 20];
                pool.for_each_chunk(&mut data, 1, |_, piece| piece[0] += 1);
                assert!(data.iter().all(|&v| v == 1));
            }
        }
    });
}

#[test]
fn a_panic_in_a_loop_is_that_loops_own() {
    in_time(LIMIT, || {
        let mut pool = Pool::new(3).expect("threads");
        for round in 0..300 {
            let mut data = vec![0u8; 40];
            let panics = round % 3 == 0;
            let ran = catch_unwind(AssertUnwindSafe(|| {
                pool.for_each_chunk(&mut data, 1, |i, piece| {
                    if panics && i == round % 40 {
                        // Without a word on standard error.
                        std::panic::resume_unwind(Box::new("planted"));
                    }
                    piece[0] += 1;
                });
            }));
            assert_eq!(ran.is_err(), panics, "round {round}");
            assert!(panics || data.iter().all(|&v| v == 1), "round {round}");
        }
    });
}
