//! What a run cost: bytes by tier, hits, times.

use serde::Serialize;
use std::time::Duration;

/// Bytes of weights that were read, by where they lay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct TierBytes {
    /// Device memory, by the GPU engine: matrices, predictors, keys and values, hot neurons.
    pub device: u64,
    /// Cache slots that hold cold neurons of late.
    pub cache: u64,
    /// Weights, predictors and certificates that stay in RAM; with a GPU the cold neurons, which lie in pinned RAM. Exact
    /// mode counts the rows that it read; where a gate shows that a neuron is zero, that is one of three, where a
    /// certificate does, it is the certificate alone.
    pub host: u64,
    /// Read from disk (whole chunks, read-ahead that was not used included).
    pub disk: u64,
}

impl TierBytes {
    /// The mean over `n` tokens.
    pub(crate) fn per_token(self, n: u64) -> Self {
        let n = n.max(1);
        Self { device: self.device / n, cache: self.cache / n, host: self.host / n, disk: self.disk / n }
    }

    pub(crate) fn minus(self, other: Self) -> Self {
        Self {
            device: self.device - other.device,
            cache: self.cache - other.cache,
            host: self.host - other.host,
            disk: self.disk - other.disk,
        }
    }
}

/// Counters of an engine since it was loaded.
#[derive(Debug, Clone, Copy, Default)]
pub struct Account {
    /// Bytes read.
    pub bytes: TierBytes,
    /// Cold neurons that were found in the cache.
    pub cache_hits: u64,
    /// Cold neurons that were not.
    pub cache_misses: u64,
    /// Neurons that were computed.
    pub neurons_computed: u64,
    /// Neurons that there were.
    pub neurons_total: u64,
    /// What a prediction fetched one layer early (chunks from disk; with a GPU neurons over the link), and how many of
    /// those were needed.
    pub foreseen: u64,
    /// As above.
    pub foreseen_used: u64,
    /// Time spent waiting for the disk.
    pub disk_wait: Duration,
    /// With a GPU: the part of `bytes.host` that the device read over the link; the host's threads read the rest.
    pub link_bytes: u64,
    /// The part of `link_bytes` that was fetched before it was known whether it is needed.
    pub early_link_bytes: u64,
    /// With a GPU: the part of `bytes.host` that the host's threads read of sketches.
    pub host_sketch_bytes: u64,
}

/// Parts of [`TierBytes::host`] that are read at speeds of their own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HostParts {
    /// [`Account::link_bytes`].
    pub link: u64,
    /// [`Account::early_link_bytes`].
    pub early_link: u64,
    /// [`Account::host_sketch_bytes`].
    pub sketches: u64,
}

impl Account {
    /// What is in [`Account::bytes`] of the host since `before`, by who read it.
    pub(crate) fn host_parts_since(&self, before: &Self) -> HostParts {
        HostParts {
            link: self.link_bytes - before.link_bytes,
            early_link: self.early_link_bytes - before.early_link_bytes,
            sketches: self.host_sketch_bytes - before.host_sketch_bytes,
        }
    }
}

impl HostParts {
    /// The mean over `n` tokens.
    pub(crate) fn per_token(self, n: u64) -> Self {
        let n = n.max(1);
        Self { link: self.link / n, early_link: self.early_link / n, sketches: self.sketches / n }
    }
}
