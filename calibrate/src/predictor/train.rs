//! Trains a [`TwoLayer`] by its own backward pass.
//!
//! The loss is the binary cross-entropy of each neuron's membership in the set, as in Deja Vu (arXiv 2310.17157, section 4.1); the
//! steps are those of Adam (arXiv 1412.6980, algorithm 1) with a rate that falls to nothing. Input channels are brought to a
//! mean square of 1 for the training, so that one rate suits all of them.

use super::TwoLayer;
use super::expected::exp;
use crate::{
    Error, Result,
    dense::{tensor, with_values},
    error::check_len,
};
use rayon::prelude::*;
use thermocline_datasets::Random;

/// How long and how fast.
#[derive(Debug, Clone, Copy)]
pub struct Training {
    /// Steps.
    pub steps: usize,
    /// Tokens of a step, drawn from all.
    pub batch: usize,
    /// Adam's rate at the first step.
    pub rate: f32,
    /// Of the draws.
    pub seed: u64,
}

impl Default for Training {
    fn default() -> Self {
        Self { steps: 1024, batch: 128, rate: 2e-3, seed: 0 }
    }
}

/// Adam's memory of the gradients, and of their squares.
const DECAY: [f32; 2] = [0.9, 0.999];
/// Keeps its quotient finite.
const EPSILON: f32 = 1e-8;

/// Trains a network on `inputs [n_tokens, hidden_size]` and the sets of the neurons that each token needs,
/// `sets [n_tokens, set_size]`, their numbers below `intermediate_size`. `first [rank, hidden_size]` is where its first matrix
/// starts: directions of the input that matter, as [`super::LowRank::b`]. The second starts at zero, its bias at how often each
/// neuron is in the set.
///
/// The same numbers on the same machine; about `6 * batch * rank * (hidden_size + intermediate_size)` operations a step.
///
/// # Errors
/// [`Error::Shape`] if lengths disagree, [`Error::Fit`] if there are no tokens, a number is no neuron's, or training ends in
/// numbers that are not finite.
pub fn train_two_layer(
    inputs: &[f32],
    (sets, set_size): (&[u32], usize),
    first: &[f32],
    (hidden_size, intermediate_size): (usize, usize),
    training: Training,
) -> Result<TwoLayer> {
    let fail = |reason: &str| Err(Error::Fit { reason: reason.to_owned() });
    let (n, rank) = (inputs.len() / hidden_size.max(1), first.len() / hidden_size.max(1));
    check_len("inputs", inputs.len(), n * hidden_size)?;
    check_len("sets", sets.len(), n * set_size)?;
    check_len("first matrix", first.len(), rank * hidden_size)?;
    if n == 0 || rank == 0 || set_size == 0 || sets.iter().any(|&i| i as usize >= intermediate_size) {
        return fail("no tokens, no rank, or sets that are empty or have neurons that are not there");
    }
    let rms = channel_rms(inputs, hidden_size);
    let scaled = |values: &[f32], by: &dyn Fn(f32, f32) -> f32| -> Vec<f32> {
        values.chunks_exact(hidden_size).flat_map(|row| row.iter().zip(&rms).map(|(v, rms)| by(*v, *rms))).collect()
    };
    let inputs = scaled(inputs, &|x, rms| x / rms);
    let mut network = TwoLayer {
        rank,
        hidden_size,
        intermediate_size,
        first: scaled(first, &|w, rms| w * rms),
        first_bias: vec![0.0; rank],
        second: vec![0.0; intermediate_size * rank],
        second_bias: base_logits(sets, n, intermediate_size),
    };
    let mut adam = Adam::new(&mut network);
    let mut random = Random::new(training.seed);
    for step in 0..training.steps {
        let drawn: Vec<usize> = (0..training.batch.max(1)).map(|_| random.below(n)).collect();
        let x: Vec<f32> = drawn.iter().flat_map(|&t| &inputs[t * hidden_size..][..hidden_size]).copied().collect();
        let set: Vec<u32> = drawn.iter().flat_map(|&t| &sets[t * set_size..][..set_size]).copied().collect();
        let mut slope = gradient(&network, x, &set)?;
        adam.step(&mut network, &mut slope, training.rate * (1.0 - step as f32 / training.steps as f32));
    }
    network.first = scaled(&network.first, &|w, rms| w / rms);
    if network.parameters().into_iter().flatten().any(|v| !v.is_finite()) {
        return fail("training ended in numbers that are not finite");
    }
    Ok(network)
}

/// Root mean squares of the input's channels, `[hidden_size]`; 1 where a channel is always zero.
fn channel_rms(inputs: &[f32], hidden_size: usize) -> Vec<f32> {
    let mut squares = vec![0.0f64; hidden_size];
    for x in inputs.chunks_exact(hidden_size) {
        squares.iter_mut().zip(x).for_each(|(sum, &x)| *sum += f64::from(x) * f64::from(x));
    }
    let n = (inputs.len() / hidden_size) as f64;
    let rms = |sum: f64| (sum / n).sqrt() as f32;
    squares.into_iter().map(|sum| Some(rms(sum)).filter(|rms| *rms > 0.0).unwrap_or(1.0)).collect()
}

/// Logits of how often each neuron is in the set of one of `n` tokens, `[intermediate_size]`; one that always or never is counts as
/// if that had not been so once.
fn base_logits(sets: &[u32], n: usize, intermediate_size: usize) -> Vec<f32> {
    let mut counts = vec![0u32; intermediate_size];
    sets.iter().for_each(|&i| counts[i as usize] += 1);
    counts.into_iter().map(|count| ((count as f32 + 1.0) / (n as f32 - count as f32 + 1.0)).ln()).collect()
}

/// The gradient of the loss, its sum over neurons and mean over the tokens of `x [n_tokens, hidden_size]`, in the shape of the network
/// itself; `sets [n_tokens, set_size]` as they are above.
fn gradient(network: &TwoLayer, x: Vec<f32>, sets: &[u32]) -> Result<TwoLayer> {
    let TwoLayer { rank, hidden_size, intermediate_size: ffn, .. } = *network;
    let n = x.len() / hidden_size;
    let x = tensor(x, &[n, hidden_size])?;
    let inner_values = network.inner(&x)?;
    let inner = tensor(inner_values.clone(), &[n, rank])?;
    // The slope along a logit: how likely the neuron is said to be in the set, less whether it is.
    let mut of_logits = network.of_inner(&inner)?;
    let share = 1.0 / n as f32;
    of_logits.par_chunks_mut(ffn).zip(sets.par_chunks(sets.len() / n)).for_each(|(slopes, set)| {
        slopes.iter_mut().for_each(|logit| *logit = share / (1.0 + exp(-*logit)));
        set.iter().for_each(|&i| slopes[i as usize] -= share);
    });
    let second_bias = column_sums(&of_logits, ffn);
    let of_logits = tensor(of_logits, &[n, ffn])?;
    let second = with_values(&of_logits.t()?.matmul(&inner)?, <[f32]>::to_vec)?;
    let stored = tensor(network.second.clone(), &[ffn, rank])?;
    let mut of_inner = with_values(&of_logits.matmul(&stored)?, <[f32]>::to_vec)?;
    // Where the ReLU gives nothing it passes no slope.
    of_inner.iter_mut().zip(&inner_values).filter(|(_, z)| **z <= 0.0).for_each(|(slope, _)| *slope = 0.0);
    let first_bias = column_sums(&of_inner, rank);
    let first = with_values(&tensor(of_inner, &[n, rank])?.t()?.matmul(&x)?, <[f32]>::to_vec)?;
    Ok(TwoLayer { rank, hidden_size, intermediate_size: ffn, first, first_bias, second, second_bias })
}

fn column_sums(rows: &[f32], width: usize) -> Vec<f32> {
    let mut sums = vec![0.0; width];
    for row in rows.chunks_exact(width) {
        sums.iter_mut().zip(row).for_each(|(sum, v)| *sum += v);
    }
    sums
}

/// Running means of each parameter's gradient, and of its square.
struct Adam {
    means: [Vec<[f32; 2]>; 4],
    /// What is still missing in means that began at zero.
    missing: [f32; 2],
}

impl Adam {
    fn new(network: &mut TwoLayer) -> Self {
        Self { means: network.parameters().map(|p| vec![[0.0; 2]; p.len()]), missing: [1.0; 2] }
    }

    fn step(&mut self, network: &mut TwoLayer, gradient: &mut TwoLayer, rate: f32) {
        self.missing.iter_mut().zip(DECAY).for_each(|(missing, decay)| *missing *= decay);
        let [mean_is, square_is] = self.missing.map(|missing| 1.0 / (1.0 - missing));
        let parameters = network.parameters().into_iter().zip(gradient.parameters()).zip(&mut self.means);
        for ((values, slopes), means) in parameters {
            values.par_iter_mut().zip(slopes).zip(means).with_min_len(1 << 14).for_each(|((value, slope), means)| {
                let [mean, square] = means;
                *mean = DECAY[0] * *mean + (1.0 - DECAY[0]) * *slope;
                *square = DECAY[1] * *square + (1.0 - DECAY[1]) * *slope * *slope;
                *value -= rate * mean_is * *mean / ((square_is * *square).sqrt() + EPSILON);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HIDDEN: usize = 12;
    const FFN: usize = 20;

    fn noise(random: &mut Random, n: usize) -> Vec<f32> {
        (0..n).map(|_| random.normal()).collect()
    }

    /// The loss itself, in f64 and by plain loops.
    fn loss(network: &TwoLayer, x: &[f32], sets: &[u32]) -> f64 {
        let n = x.len() / HIDDEN;
        let dot = |a: &[f32], b: &[f64]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * b).sum::<f64>();
        let mut sum = 0.0;
        for (x, set) in x.chunks_exact(HIDDEN).zip(sets.chunks_exact(sets.len() / n)) {
            let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
            let rows = network.first.chunks_exact(HIDDEN).zip(&network.first_bias);
            let inner: Vec<f64> = rows.map(|(row, bias)| (dot(row, &x) + f64::from(*bias)).max(0.0)).collect();
            for (i, row) in network.second.chunks_exact(network.rank).enumerate() {
                let logit = dot(row, &inner) + f64::from(network.second_bias[i]);
                let is_in = set.contains(&(i as u32));
                sum += if is_in { -logit } else { logit }.exp().ln_1p();
            }
        }
        sum / n as f64
    }

    #[test]
    fn the_gradient_is_that_of_finite_differences() {
        let mut random = Random::new(1);
        let rank = 5;
        let mut network = TwoLayer {
            rank,
            hidden_size: HIDDEN,
            intermediate_size: FFN,
            first: noise(&mut random, rank * HIDDEN),
            first_bias: noise(&mut random, rank),
            second: noise(&mut random, FFN * rank),
            second_bias: noise(&mut random, FFN),
        };
        let x = noise(&mut random, 6 * HIDDEN);
        let sets: Vec<u32> = (0..6).flat_map(|t| [t, t + 7, t + 14]).collect();
        let mut slope = gradient(&network, x.clone(), &sets).unwrap();
        let slopes: Vec<Vec<f32>> = slope.parameters().into_iter().map(|p| p.clone()).collect();
        for (which, slopes) in slopes.iter().enumerate() {
            assert!(slopes.iter().any(|s| s.abs() > 0.01));
            for (i, slope) in slopes.iter().enumerate() {
                let value = network.parameters()[which][i];
                let mut at = |moved: f32| {
                    network.parameters()[which][i] = moved;
                    loss(&network, &x, &sets)
                };
                let step = 1e-3;
                let want = (at(value + step) - at(value - step)) / f64::from((value + step) - (value - step));
                at(value);
                assert!((f64::from(*slope) - want).abs() < 2e-3 * (1.0 + want.abs()), "{which} {i}: {slope} {want}");
            }
        }
    }

    /// Sets that no linear score could name: those of the channel that is furthest from zero, on either side.
    #[test]
    fn a_planted_rule_is_learnt() {
        let mut random = Random::new(2);
        let (n, set_size) = (3000, 5);
        let mut x = noise(&mut random, n * HIDDEN);
        // A channel that is much larger than the others, as real ones have, and one that is never used.
        x.chunks_exact_mut(HIDDEN).for_each(|x| (x[3], x[4]) = (40.0 * x[3], 0.0));
        let set = |x: &[f32]| -> Vec<u32> {
            // Four channels decide, each for five neurons.
            let score = |group: usize| x[[0, 1, 2, 5][group]].abs();
            let best = (0..4).max_by(|&a, &b| score(a).total_cmp(&score(b))).unwrap_or(0);
            (0..5).map(|i| (5 * best + i) as u32).collect()
        };
        let sets: Vec<u32> = x.chunks_exact(HIDDEN).flat_map(set).collect();
        let (train, test) = x.split_at(2500 * HIDDEN);
        let (train_sets, test_sets) = sets.split_at(2500 * set_size);
        let found = |network: &TwoLayer| {
            let scores = network.scores(test).unwrap();
            assert!(scores.iter().all(|s| *s > 0.0));
            let rows = scores.chunks_exact(FFN).zip(test_sets.chunks_exact(set_size));
            let of_row = |(scores, set): (&[f32], &[u32])| {
                let mut order: Vec<u32> = (0..FFN as u32).collect();
                order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]));
                order[..set_size].iter().filter(|i| set.contains(i)).count()
            };
            rows.map(of_row).sum::<usize>() as f64 / test_sets.len() as f64
        };
        // Directions in which all channels count alike.
        let mut first = noise(&mut random, 32 * HIDDEN);
        first.chunks_exact_mut(HIDDEN).for_each(|row| row[3] /= 40.0);
        let train = |steps| {
            let training = Training { steps, rate: 1e-2, ..Training::default() };
            train_two_layer(train, (train_sets, set_size), &first, (HIDDEN, FFN), training).unwrap()
        };
        let (blind, trained) = (train(0), train(600));
        assert!(found(&blind) < 0.4 && found(&trained) > 0.85, "{} {}", found(&blind), found(&trained));
        assert_eq!(train(20), train(20), "the same every time");
        // Untrained it is the start, and says how often each neuron is needed.
        assert!(blind.first.iter().zip(&first).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs()));
        let rate = train_sets.iter().filter(|&&i| i == 0).count() as f32 / 2500.0;
        assert!((blind.scores(&test[..HIDDEN]).unwrap()[0] - rate / (1.0 - rate)).abs() < 1e-2);
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let (x, first) = ([1.0; 2 * HIDDEN], [0.1; 4 * HIDDEN]);
        let train = |sets: &[u32], first: &[f32]| {
            train_two_layer(&x, (sets, 1), first, (HIDDEN, FFN), Training { steps: 1, ..Training::default() })
        };
        assert!(train(&[0, 19], &first).is_ok());
        assert!(matches!(train(&[0, 20], &first), Err(Error::Fit { .. })));
        assert!(matches!(train(&[0], &first), Err(Error::Shape { .. })));
        assert!(matches!(train(&[0, 1], &first[1..]), Err(Error::Shape { .. })));
        assert!(matches!(train(&[0, 1], &[]), Err(Error::Fit { .. })));
        let nothing = train_two_layer(&[], (&[], 1), &first, (HIDDEN, FFN), Training::default());
        assert!(matches!(nothing, Err(Error::Fit { .. })));
    }
}
