use super::statistics::n_hot;
use super::{GATE, PlantedModel, SHIFT};
use crate::Random;

/// Standard deviation of a gate code, an integer in -7..=7.
pub(super) const GATE_SD: f32 = 3.0;
const CODE_MAX: f32 = 7.0;
/// Twice the largest threshold: odd integers up to here are exact in an f16 and have three digits to the base 16.
const THRESHOLD_MAX: i32 = 1909;

/// Which neurons of one layer fire when.
#[derive(Debug)]
pub struct PlantedLayer<'m> {
    model: &'m PlantedModel,
    index: usize,
    /// Cluster of each neuron.
    cluster: Vec<u32>,
    /// Directions `[clusters, pattern]` that the clusters lean to.
    directions: Vec<f32>,
    /// Rates by neuron in the vocabulary's second half.
    shifted: Vec<f64>,
}

/// What decides whether a neuron fires: at token t of domain d if `2 * (gate . pattern(t)) > threshold[d]`.
#[derive(Debug, Clone, PartialEq)]
pub struct PlantedNeuron {
    /// Gate codes `[pattern]`, integers in -7..=7.
    pub gate: Vec<i8>,
    /// Twice the threshold in either domain: odd, so that no token is ever on it.
    pub threshold: [i32; 2],
    /// Share of the sampled tokens at which it fires, with the first domain's threshold.
    pub rate: f64,
    /// Mean over the sampled tokens of the square of what the gate has above the first domain's threshold, in codes
    /// squared.
    pub mean_square: f64,
}

impl PlantedNeuron {
    /// Whether it fires at a token with this pattern.
    pub fn fires(&self, pattern: &[i8], domain: usize) -> bool {
        let dot: i32 = self.gate.iter().zip(pattern).map(|(g, p)| i32::from(*g) * i32::from(*p)).sum();
        2 * dot > self.threshold[domain]
    }
}

impl<'m> PlantedLayer<'m> {
    pub(super) fn new(model: &'m PlantedModel, index: usize) -> Self {
        let (n, statistics) = (model.shape.intermediate_size, &model.statistics);
        let mut random = Random::at(model.seed, &[SHIFT, index as u64]);
        // Hot and cold neurons share clusters: those of one cluster differ in their thresholds.
        let mut cluster = vec![0; n];
        for (i, &neuron) in random.permutation(n).iter().enumerate() {
            cluster[neuron as usize] = (i / statistics.cluster_neurons) as u32;
        }
        let n_clusters = n.div_ceil(statistics.cluster_neurons);
        let directions = (0..n_clusters * model.shape.pattern_channels).map(|_| random.quick_normal()).collect();
        // In the second domain some of the hottest neurons change places with others.
        let hot = n_hot(n);
        let n_changed = ((statistics.shift * hot as f64).round() as usize).min(n - hot);
        let (mut leave, mut come) = (random.permutation(hot), random.permutation(n - hot));
        leave.truncate(n_changed);
        come.truncate(n_changed);
        let mut shifted = model.rates.clone();
        for (hot_neuron, other) in leave.into_iter().zip(come) {
            shifted.swap(hot_neuron as usize, hot + other as usize);
        }
        Self { model, index, cluster, directions, shifted }
    }

    /// The cluster of each neuron, in split order.
    pub fn clusters(&self) -> &[u32] {
        &self.cluster
    }

    /// A neuron by its place in the split's order, which is that of falling rates in the first domain.
    ///
    /// # Panics
    /// If there is no such neuron.
    pub fn neuron(&self, place: usize) -> PlantedNeuron {
        let gate = self.gate(place);
        let sums = self.model.sampled_sums(&gate);
        let rates = [self.model.rates[place], self.shifted[place]];
        let first = threshold(&sums, rates[0]);
        let second = if rates[0] == rates[1] { first } else { threshold(&sums, rates[1]) };
        let above = sums.iter().map(|&s| (2 * i64::from(s) - i64::from(first)).max(0));
        let square: i64 = above.map(|v| v * v).sum();
        let count = sums.iter().filter(|&&s| 2 * i32::from(s) > first).count();
        let n = sums.len() as f64;
        PlantedNeuron {
            gate,
            threshold: [first, second],
            rate: count as f64 / n,
            mean_square: square as f64 / (4.0 * n),
        }
    }

    fn gate(&self, place: usize) -> Vec<i8> {
        let width = self.model.shape.pattern_channels;
        let mut random = Random::at(self.model.seed, &[GATE, self.index as u64, place as u64]);
        let statistics = &self.model.statistics;
        let shared = if statistics.cluster_neurons > 1 { statistics.cluster_correlation } else { 0.0 };
        let (lean, own) = (GATE_SD * (shared as f32).sqrt(), GATE_SD * (1.0 - shared as f32).sqrt());
        let direction = &self.directions[self.cluster[place] as usize * width..][..width];
        direction
            .iter()
            .map(|d| (lean * d + own * random.quick_normal()).round().clamp(-CODE_MAX, CODE_MAX) as i8)
            .collect()
    }
}

/// Twice the threshold at which the share of `sums` above it is nearest to `rate`.
fn threshold(sums: &[i16], rate: f64) -> i32 {
    let wanted = ((rate * sums.len() as f64).round() as usize).min(sums.len() - 1);
    let mut sorted = sums.to_vec();
    let (_, &mut at, _) = sorted.select_nth_unstable_by(wanted, |a, b| b.cmp(a));
    // Half a step above `at` no more than `wanted` sums are left; half a step below it, with its equals, more.
    let fewer = sums.iter().filter(|&&s| s > at).count();
    let more = sums.iter().filter(|&&s| s >= at).count();
    let half = if wanted - fewer <= more - wanted { 1 } else { -1 };
    (2 * i32::from(at) + half).clamp(-THRESHOLD_MAX, THRESHOLD_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_leave_the_nearest_share_above_them() {
        let sums: Vec<i16> = (0..1000).map(|i| i * 7 % 1000 / 3).collect();
        let above = |twice: i32| sums.iter().filter(|&&s| 2 * i32::from(s) > twice).count() as f64;
        for wanted in 0..990 {
            let twice = threshold(&sums, f64::from(wanted) / 1000.0);
            assert_eq!(twice.rem_euclid(2), 1);
            // Sums come in threes: no threshold is nearer than this.
            assert!((above(twice) - f64::from(wanted)).abs() <= 1.5, "{wanted}: {}", above(twice));
        }
    }
}
