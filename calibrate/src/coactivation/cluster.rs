//! Balanced recursive bisection on co-activation.
//!
//! A set of neurons is split in halves along the first principal component of its members' centred activity (found by
//! power iteration), until parts are of `leaf_len`. With n neurons, s samples and density p a level costs
//! O(iterations * n * s * p), and there are log2(n / leaf_len) levels: 28672 neurons, 1024 samples at 10 % and 8
//! iterations are 5e7 additions a level. That is why the samples are thinned to [`SAMPLES_MAX`].

use super::BitMatrix;
use rayon::prelude::*;

const SAMPLES_MAX: usize = 2048;
const ITERATIONS: usize = 8;

/// An order of `neurons` in which those that fire together lie together, in groups of about `leaf_len`.
///
/// Groups are sorted by falling mean rate, so that a prefix is still the hotter part.
pub fn order_clustered(active: &BitMatrix, neurons: &[u32], leaf_len: usize) -> Vec<u32> {
    let step = active.n_rows().div_ceil(SAMPLES_MAX).max(1);
    let rows: Vec<usize> = (0..active.n_rows()).step_by(step).collect();
    let mut events = vec![Vec::new(); active.n_columns()];
    for (sample, &row) in rows.iter().enumerate() {
        active.ones(row).for_each(|neuron| events[neuron].push(sample as u32));
    }
    let mut leaves = split(&events, rows.len(), neurons.to_vec(), leaf_len.max(1));
    let rate = |leaf: &[u32]| {
        leaf.iter().map(|&neuron| events[neuron as usize].len()).sum::<usize>() as f64 / leaf.len().max(1) as f64
    };
    leaves.sort_by(|a, b| rate(b).total_cmp(&rate(a)).then_with(|| a.cmp(b)));
    leaves.concat()
}

fn split(events: &[Vec<u32>], n_samples: usize, mut neurons: Vec<u32>, leaf_len: usize) -> Vec<Vec<u32>> {
    if neurons.len() <= leaf_len {
        return vec![neurons];
    }
    let component = principal_component(events, n_samples, &neurons);
    let mut keyed: Vec<(f32, u32)> = component.into_iter().zip(neurons.drain(..)).collect();
    keyed.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    // Halves that are multiples of the leaf, so that leaves are full.
    let half = (keyed.len().div_ceil(leaf_len) / 2).max(1) * leaf_len;
    let (low, high) = keyed.split_at(half.min(keyed.len() - 1));
    let ids = |part: &[(f32, u32)]| part.iter().map(|&(_, neuron)| neuron).collect::<Vec<_>>();
    let (low, high) = (ids(low), ids(high));
    let (mut left, right) =
        rayon::join(|| split(events, n_samples, low, leaf_len), || split(events, n_samples, high, leaf_len));
    left.extend(right);
    left
}

/// Loadings of the neurons on the first principal component of their activity, each neuron's activity centred and
/// scaled to unit variance (otherwise rates, not patterns, would decide).
fn principal_component(events: &[Vec<u32>], n_samples: usize, neurons: &[u32]) -> Vec<f32> {
    let scale = |neuron: u32| {
        let rate = events[neuron as usize].len() as f32 / n_samples as f32;
        1.0 / (rate * (1.0 - rate)).max(1e-6).sqrt()
    };
    // A start that depends on the neurons' ids only, so that the order is reproducible.
    let mut loadings: Vec<f32> =
        neurons.iter().map(|&i| (i.wrapping_mul(2_654_435_769) >> 16) as f32 / 65_536.0 - 0.5).collect();
    for _ in 0..ITERATIONS {
        let mut activity = vec![0.0f32; n_samples];
        for (&neuron, &loading) in neurons.iter().zip(&loadings) {
            let weight = loading * scale(neuron);
            events[neuron as usize].iter().for_each(|&sample| activity[sample as usize] += weight);
        }
        // Centring the activity over samples centres every neuron at once.
        let mean = activity.iter().sum::<f32>() / n_samples.max(1) as f32;
        activity.iter_mut().for_each(|v| *v -= mean);
        loadings = neurons
            .par_iter()
            .with_min_len(256)
            .map(|&neuron| {
                let events = &events[neuron as usize];
                scale(neuron) * events.iter().map(|&sample| activity[sample as usize]).sum::<f32>()
            })
            .collect();
        let norm = loadings.iter().map(|v| v * v).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
        loadings.iter_mut().for_each(|v| *v /= norm);
    }
    loadings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coactivation::{order_random, over_fetch};

    #[test]
    fn finds_planted_groups() {
        // 256 neurons in 32 groups of 8 that fire as one; groups are scattered over the ids.
        let (n, groups, samples) = (256usize, 32, 600);
        let mut bytes = vec![0u8; samples * n / 8];
        for sample in 0..samples {
            for neuron in 0..n {
                let group = neuron * 37 % n / 8;
                let hash = xxhash_rust::xxh3::xxh3_64(&[(sample % 256) as u8, (sample / 256) as u8, group as u8]);
                if hash % 10 < 2 {
                    bytes[sample * n / 8 + neuron / 8] |= 1 << (neuron % 8);
                }
            }
        }
        let active = BitMatrix::from_bytes(samples, n, bytes);
        let all: Vec<u32> = (0..n as u32).collect();
        let order = order_clustered(&active.rows(0..samples / 2), &all, groups / 4);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, all);
        let held_out = active.rows(samples / 2..samples);
        let (clustered, random) = (over_fetch(&held_out, &order, 8), over_fetch(&held_out, &order_random(n, 1), 8));
        assert!(clustered < 1.7 && random > 3.0, "clustered {clustered}, random {random}");
    }
}
