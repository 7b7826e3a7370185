//! Which tokens' active sets are kept.
//!
//! Runs of neighbouring tokens, because a planner replays them through its caches in order; chosen by a hash of their
//! place in the whole corpus, so that every shard chooses the same ones without knowing of the others.

use crate::settings::Settings;
use std::ops::Range;
use xxhash_rust::xxh3::xxh3_64;

/// The sampled runs, sorted by place.
#[derive(Debug)]
pub(crate) struct SamplePlan {
    /// Window and first position.
    runs: Vec<(usize, usize)>,
    run_len: usize,
    window_len: usize,
}

impl SamplePlan {
    /// Runs for a corpus of `n_windows`.
    pub(crate) fn new(settings: &Settings, n_windows: usize) -> Self {
        let window_len = settings.window_len;
        let run_len = settings.sample_run_len.min(window_len);
        let per_window = window_len / run_len;
        let wanted = (settings.n_samples / run_len).min(n_windows.saturating_mul(per_window));
        let place = |run: usize| (run / per_window, run % per_window * run_len);
        let mut hashed: Vec<(u64, usize)> =
            (0..n_windows * per_window).map(|run| (xxh3_64(&(run as u64).to_le_bytes()), run)).collect();
        hashed.sort_unstable();
        let mut runs: Vec<(usize, usize)> = hashed[..wanted].iter().map(|&(_, run)| place(run)).collect();
        runs.sort_unstable();
        SamplePlan { runs, run_len, window_len }
    }

    /// Sampled positions of a window, ascending.
    pub(crate) fn positions(&self, window: usize) -> impl Iterator<Item = usize> + '_ {
        let first = self.runs.partition_point(|&(w, _)| w < window);
        let runs = self.runs[first..].iter().take_while(move |&&(w, _)| w == window);
        runs.flat_map(|&(_, start)| start..start + self.run_len)
    }

    /// Places of the sampled tokens of some windows in the whole corpus.
    pub(crate) fn token_indices(&self, windows: Range<usize>) -> Vec<u64> {
        windows.flat_map(|window| self.positions(window).map(move |t| (window * self.window_len + t) as u64)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_choose_what_one_run_chooses() {
        let settings = Settings { window_len: 100, n_samples: 300, sample_run_len: 30, ..Settings::default() };
        let plan = SamplePlan::new(&settings, 50);
        let all = plan.token_indices(0..50);
        assert_eq!(all.len(), 300);
        assert!(all.is_sorted());
        assert_eq!(all, [plan.token_indices(0..13), plan.token_indices(13..50)].concat());
        assert_eq!(SamplePlan::new(&settings, 1).token_indices(0..1).len(), 90);
    }
}
