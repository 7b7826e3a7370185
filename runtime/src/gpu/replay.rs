//! The device cache on the CPU: the split's trace replayed through cache policies, to choose one and its size.
//!
//! The device cache is set-associative: cold neuron c of a layer may lie in the slots of set `c % n_sets`. A neuron's
//! key holds how recently and how often it fired (LRFU, Lee et al. 2001): C(now) = sum over its activations of
//! 2^(-lambda (now - t)), kept as log2 plus lambda times now, which orders neurons for all time. A large lambda is LRU, a
//! small one LFU. A neuron that is read over the link takes the slot of the lowest key in its set if its own is higher.

use crate::Result;
use thermocline_kernels::LayerLayout;
use thermocline_split::Split;

/// Slots in a set of the device cache.
pub(super) const WAYS: usize = 16;

/// How a policy chooses which neuron leaves the cache.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Policy {
    /// The device's: recency and frequency in one key.
    Lrfu {
        /// Octaves per token.
        lambda: f32,
    },
    /// Second chance, a hand for each set; for comparison.
    Clock,
}

impl std::fmt::Display for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            // An octave a token forgets everything but the order of the last uses.
            Policy::Lrfu { lambda } if *lambda >= 1.0 => f.write_str("LRU"),
            Policy::Lrfu { lambda } => write!(f, "frequency, halved every {} tokens", 1.0 / lambda),
            Policy::Clock => f.write_str("CLOCK"),
        }
    }
}

impl Policy {
    /// What is compared for every model.
    pub(super) const CANDIDATES: [Policy; 6] = [
        Policy::Lrfu { lambda: 1.0 },
        Policy::Lrfu { lambda: 1.0 / 8.0 },
        Policy::Lrfu { lambda: 1.0 / 32.0 },
        Policy::Lrfu { lambda: 1.0 / 128.0 },
        Policy::Lrfu { lambda: 1.0 / 512.0 },
        Policy::Clock,
    ];
}

/// Active neurons of consecutive sampled tokens of one layer.
#[derive(Debug)]
pub(super) struct LayerTrace {
    /// Ascending places, token by token.
    tokens: Vec<Vec<u32>>,
}

/// What a replay saw, per token and layer.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Replayed {
    pub active: f64,
    pub hot: f64,
    pub cached: f64,
    /// Bytes of those that are neither.
    pub missed_bytes: f64,
}

impl Replayed {
    pub(super) fn plus(self, other: Self) -> Self {
        Self {
            active: self.active + other.active,
            hot: self.hot + other.hot,
            cached: self.cached + other.cached,
            missed_bytes: self.missed_bytes + other.missed_bytes,
        }
    }

    /// Each divided by `n`, which is taken for 1 if it is 0.
    pub(super) fn over(self, n: usize) -> Self {
        let n = n.max(1) as f64;
        let Self { active, hot, cached, missed_bytes } = self;
        Self { active: active / n, hot: hot / n, cached: cached / n, missed_bytes: missed_bytes / n }
    }
}

impl LayerTrace {
    pub(super) fn load(split: &Split, layer: usize) -> Result<Self> {
        let width = split.manifest().config.intermediate_size.div_ceil(8);
        let bits = crate::replay::layer_bits(split, layer)?;
        let ones = |row: &[u8]| -> Vec<u32> {
            let bits =
                row.iter().enumerate().flat_map(|(i, b)| (0..8).filter(move |j| b >> j & 1 == 1).map(move |j| (i, j)));
            bits.map(|(i, j)| (8 * i + j) as u32).collect()
        };
        Ok(Self { tokens: bits.chunks_exact(width.max(1)).map(ones).collect() })
    }

    /// Replays with the first `n_hot` neurons in device memory and `n_sets` sets of `n_ways` slots, if the other neurons
    /// are all of the last section. The first quarter of the tokens warms the cache and is not counted.
    pub(super) fn replay(
        &self,
        layout: &LayerLayout,
        n_hot: usize,
        n_sets: usize,
        n_ways: usize,
        policy: Policy,
    ) -> Replayed {
        let mut cache = SetCache::new(layout.n_neurons() - n_hot, n_sets, n_ways, policy);
        let warm_up = self.tokens.len() / 4;
        let mut sum = Replayed::default();
        for (t, active) in self.tokens.iter().enumerate() {
            let before = |place: usize| active.partition_point(|&n| (n as usize) < place);
            let hot = before(n_hot);
            let hits = cache.token(t as u32 + 1, active[hot..].iter().map(|n| n - n_hot as u32));
            let cold = layout.within(n_hot..layout.n_neurons());
            let cold_bytes: usize =
                cold.map(|(part, s)| (before(part.end) - before(part.start)) * s.bundles().bundle_bytes()).sum();
            let missed_bytes = (cold_bytes - hits * layout.coldest().bundles().bundle_bytes()) as f64;
            if t >= warm_up {
                let (active, hot, cached) = (active.len() as f64, hot as f64, hits as f64);
                sum = sum.plus(Replayed { active, hot, cached, missed_bytes });
            }
        }
        sum.over(self.tokens.len() - warm_up)
    }
}

const NONE: u32 = u32::MAX;

struct SetCache {
    policy: Policy,
    n_sets: usize,
    n_ways: usize,
    slot_of: Vec<u32>,
    owner: Vec<u32>,
    used: Vec<u32>,
    /// log2 of C plus lambda times the token's number.
    key: Vec<f32>,
    hand: Vec<u32>,
}

impl SetCache {
    fn new(n_cold: usize, n_sets: usize, n_ways: usize, policy: Policy) -> Self {
        let slots = n_sets * n_ways;
        Self {
            policy,
            n_sets,
            n_ways,
            slot_of: vec![NONE; n_cold],
            owner: vec![NONE; slots],
            used: vec![0; slots],
            key: vec![f32::NEG_INFINITY; n_cold],
            hand: vec![0; n_sets],
        }
    }

    /// One token's cold neurons, ascending; returns how many were in the cache.
    fn token(&mut self, now: u32, active: impl Iterator<Item = u32> + Clone) -> usize {
        if self.n_sets == 0 {
            return 0;
        }
        let mut hits = 0;
        for c in active.clone() {
            let c = c as usize;
            if let Policy::Lrfu { lambda } = self.policy {
                let base = lambda * now as f32;
                self.key[c] = base + (1.0 + (self.key[c] - base).exp2()).log2();
            }
            if self.slot_of[c] != NONE {
                self.used[self.slot_of[c] as usize] = now;
                hits += 1;
            }
        }
        for c in active {
            if self.slot_of[c as usize] != NONE {
                continue;
            }
            let set = c as usize % self.n_sets;
            let ways = set * self.n_ways..(set + 1) * self.n_ways;
            let free = ways.clone().find(|&s| self.owner[s] == NONE);
            let victim = free.or_else(|| match self.policy {
                Policy::Lrfu { .. } => ways
                    .filter(|&s| self.used[s] != now)
                    .map(|s| (s, self.key[self.owner[s] as usize]))
                    .min_by(|a, b| a.1.total_cmp(&b.1))
                    .filter(|(_, key)| *key < self.key[c as usize])
                    .map(|(s, _)| s),
                Policy::Clock => (0..2 * self.n_ways).find_map(|_| {
                    let slot = set * self.n_ways + self.hand[set] as usize;
                    self.hand[set] = (self.hand[set] + 1) % self.n_ways as u32;
                    // A slot that was used at this token is spared, an older mark is taken away.
                    (self.used[slot] == 0).then_some(slot).or_else(|| {
                        if self.used[slot] != now {
                            self.used[slot] = 0;
                        }
                        None
                    })
                }),
            });
            let Some(slot) = victim else { continue };
            if self.owner[slot] != NONE {
                self.slot_of[self.owner[slot] as usize] = NONE;
            }
            self.owner[slot] = c;
            self.used[slot] = now;
            self.slot_of[c as usize] = slot as u32;
        }
        hits
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use thermocline_kernels::{BundleLayout, Encoding};

    /// Neurons that fire in bursts: a hot one always, a few for a while.
    fn bursts(n_tokens: usize) -> LayerTrace {
        let mut tokens = Vec::new();
        for t in 0..n_tokens {
            let burst = (t / 16) as u32;
            let mut active: Vec<u32> = (0..8).map(|i| 1 + (burst * 8 + i) * 13 % 499).collect();
            active.push(0);
            active.sort_unstable();
            active.dedup();
            tokens.push(active);
        }
        LayerTrace { tokens }
    }

    #[test]
    fn every_policy_finds_what_comes_again() {
        let trace = bursts(400);
        let q4 = BundleLayout::new(Encoding::Q4, 32).expect("whole groups");
        let layout = LayerLayout::new([(500, q4)]).expect("neurons");
        for policy in Policy::CANDIDATES {
            let r = trace.replay(&layout, 0, 4, 16, policy);
            // What forgets slowly keeps the neurons of old bursts, and always the one that never rests.
            let forgets = !matches!(policy, Policy::Lrfu { lambda } if lambda < 0.1);
            let least = if forgets { 0.8 } else { 0.11 };
            assert!(r.cached > least * r.active && r.cached < r.active, "{policy}: {r:?}");
            let none = trace.replay(&layout, 0, 0, 16, policy);
            assert!(none.cached == 0.0 && none.active == r.active);
            let hot = trace.replay(&layout, 500, 0, 16, policy);
            assert_eq!((hot.hot, hot.missed_bytes), (hot.active, 0.0));
            let bytes = (r.active - r.cached) * q4.bundle_bytes() as f64;
            assert!((r.missed_bytes - bytes).abs() < 1e-6 * bytes, "{policy}: {r:?}");
        }
    }

    /// Without a cache what is missed is what lies behind the prefix, each neuron in its section's bytes.
    #[test]
    fn missed_bytes_are_those_of_the_sections() {
        let [q8, q4] = [Encoding::Q8, Encoding::Q4].map(|e| BundleLayout::new(e, 32).expect("whole groups"));
        let layout = LayerLayout::new([(100, q8), (400, q4)]).expect("neurons");
        let trace = bursts(100);
        for n_hot in [0, 60, 100, 300] {
            let bytes = |&n: &u32| if (n as usize) < n_hot { 0 } else { layout.of(n as usize).bundle_bytes() };
            let expected: usize = trace.tokens[25..].iter().flatten().map(bytes).sum();
            let r = trace.replay(&layout, n_hot, 0, 16, Policy::CANDIDATES[0]);
            assert!((r.missed_bytes * 75.0 - expected as f64).abs() < 1e-3, "{n_hot}: {r:?}, {expected}");
        }
    }
}
