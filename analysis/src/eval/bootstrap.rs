//! How far a perplexity, or the score of a task, can be trusted.
//!
//! Neighbouring tokens are alike, so single tokens would promise too much; whole windows are too few to draw from.
//! Blocks of [`BLOCK`] tokens are drawn with replacement instead.

use super::Windows;
use thermocline_datasets::Random;

/// Neighbouring tokens that are drawn together.
const BLOCK: usize = 64;
/// Draws; the ends of the interval are then stable to about a tenth of its width.
const RESAMPLES: usize = 2000;
/// Fixed, so that the same scores give the same interval every time.
const SEED: u64 = 0;

/// Perplexity of a text, with what is known of its error.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Summary {
    pub perplexity: f64,
    pub ci95: [f64; 2],
    pub dense: Option<f64>,
    pub ratio_ci95: Option<[f64; 2]>,
}

/// Sums of one block.
#[derive(Debug, Clone, Copy, Default)]
struct Block {
    n: f64,
    loss: f64,
    dense: f64,
}

/// `losses` and those of the dense model, `[n_windows * (ctx - 1)]`.
pub(crate) fn summarise(windows: &Windows<'_>, losses: &[f32], dense: Option<&[f32]>) -> Summary {
    let mut blocks = Vec::new();
    for (w, window) in losses.chunks(windows.ctx() - 1).enumerate() {
        for (b, block) in window.chunks(BLOCK).enumerate() {
            let first = w * (windows.ctx() - 1) + b * BLOCK;
            let of_dense = dense.and_then(|d| d.get(first..first + block.len())).unwrap_or(block);
            let sum = |losses: &[f32]| losses.iter().map(|&l| f64::from(l)).sum::<f64>();
            blocks.push(Block { n: block.len() as f64, loss: sum(block), dense: sum(of_dense) });
        }
    }
    let all = total(blocks.iter().copied());
    let mut random = Random::new(SEED);
    let mut draws: Vec<(f64, f64)> = Vec::with_capacity(RESAMPLES);
    for _ in 0..RESAMPLES {
        let drawn = total((0..blocks.len()).map(|_| blocks[random.below(blocks.len())]));
        draws.push(((drawn.loss / drawn.n).exp(), ((drawn.loss - drawn.dense) / drawn.n).exp()));
    }
    Summary {
        perplexity: (all.loss / all.n).exp(),
        ci95: interval(draws.iter().map(|d| d.0).collect()),
        dense: dense.map(|_| (all.dense / all.n).exp()),
        ratio_ci95: dense.map(|_| interval(draws.iter().map(|d| d.1).collect())),
    }
}

fn total(blocks: impl Iterator<Item = Block>) -> Block {
    blocks.fold(Block::default(), |a, b| Block { n: a.n + b.n, loss: a.loss + b.loss, dense: a.dense + b.dense })
}

/// 95 % intervals of the means of `columns` over examples that are drawn with replacement, the same ones for all columns.
/// Examples of a task have nothing to do with each other, so each is drawn alone.
pub(crate) fn mean_intervals<const N: usize>(columns: [&[f64]; N]) -> [[f64; 2]; N] {
    let n = columns.iter().map(|c| c.len()).min().unwrap_or(0);
    if n == 0 {
        return [[0.0; 2]; N];
    }
    let mut random = Random::new(SEED);
    let mut draws = [const { Vec::new() }; N];
    for _ in 0..RESAMPLES {
        let mut sums = [0.0; N];
        for _ in 0..n {
            let drawn = random.below(n);
            sums.iter_mut().zip(columns).for_each(|(sum, column)| *sum += column[drawn]);
        }
        draws.iter_mut().zip(sums).for_each(|(draws, sum)| draws.push(sum / n as f64));
    }
    draws.map(interval)
}

fn interval(mut values: Vec<f64>) -> [f64; 2] {
    values.sort_by(f64::total_cmp);
    let at = |q: f64| values[((values.len() - 1) as f64 * q).round() as usize];
    [at(0.025), at(0.975)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_have_the_width_of_the_binomial() {
        let right: Vec<f64> = (0..400).map(|i| f64::from(i % 4 == 0)).collect();
        let gained: Vec<f64> = right.iter().map(|r| r + 0.5).collect();
        let [share, moved] = mean_intervals([&right, &gained]);
        let expected = 2.0 * 1.96 * (0.25f64 * 0.75 / 400.0).sqrt();
        assert!(((share[1] - share[0]) / expected - 1.0).abs() < 0.1, "{share:?}, expected width {expected}");
        // The same examples were drawn for both.
        assert!((moved[0] - share[0] - 0.5).abs() < 1e-12 && (moved[1] - share[1] - 0.5).abs() < 1e-12);
        assert_eq!(mean_intervals([&[]]), [[0.0; 2]]);
    }

    #[test]
    fn interval_has_the_width_of_the_standard_error() {
        // Losses that are independent from block to block, so that theory is easy: sd of a block mean is 1 / sqrt(12).
        let mut random = Random::new(7);
        let tokens = vec![0; 65 * 400];
        let windows = Windows::new(&tokens, 65, 400).unwrap();
        let level: Vec<f32> = (0..400).map(|_| random.below(1 << 20) as f32 / (1 << 20) as f32).collect();
        let losses: Vec<f32> = (0..64 * 400).map(|i| level[i / 64]).collect();
        let dense: Vec<f32> = losses.iter().map(|l| l - 0.1).collect();
        let s = summarise(&windows, &losses, Some(&dense));
        let (low, high) = (s.ci95[0].ln(), s.ci95[1].ln());
        let expected = 2.0 * 1.96 * (1.0f64 / 12.0).sqrt() / 20.0;
        assert!(((high - low) / expected - 1.0).abs() < 0.15, "{low} {high}, expected width {expected}");
        assert!(low < s.perplexity.ln() && s.perplexity.ln() < high);
        // A constant difference is known exactly.
        let ratio = s.ratio_ci95.unwrap();
        assert!((ratio[0] - 0.1f64.exp()).abs() < 1e-5 && (ratio[1] - 0.1f64.exp()).abs() < 1e-5);
    }
}
