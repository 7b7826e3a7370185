//! The trace in a split, replayed against a division of memory between hot prefix and cache.

use crate::Result;
use thermocline_split::Split;

/// Active neurons of consecutive sampled tokens, by layer, in split order.
#[derive(Debug)]
pub(crate) struct Trace {
    /// `[n_layers]` bitmaps `[n_tokens, ceil(n_neurons / 8)]`.
    layers: Vec<Vec<u8>>,
    n_tokens: usize,
    n_neurons: usize,
}

/// What a replay saw, per token.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Replayed {
    pub active: f64,
    pub hot: f64,
    pub cached: f64,
    /// Bytes of the bundles that are hot or cached.
    pub ram_bytes: f64,
    /// Bytes of the chunks that hold at least one active neuron that is neither hot nor cached.
    pub disk_bytes: f64,
}

/// One layer's active sets: bitmaps `[n_tokens, ceil(n_neurons / 8)]`.
pub(crate) fn layer_bits(split: &Split, layer: usize) -> Result<Vec<u8>> {
    let (file, name) = (split.statistics(), format!("layers.{layer}.trace"));
    let n_tokens = file.entry("trace.token")?.rows;
    let bits = file.read(&name)?;
    if bits.len() == n_tokens * split.manifest().config.intermediate_size.div_ceil(8) {
        return Ok(bits);
    }
    let (path, reason) = (file.path().to_owned(), format!("{} bytes for {n_tokens} tokens", bits.len()));
    Err(thermocline_split::Error::Corrupt { path, field: name, reason }.into())
}

impl Trace {
    pub(crate) fn load(split: &Split) -> Result<Self> {
        let config = &split.manifest().config;
        let n_tokens = split.statistics().entry("trace.token")?.rows;
        let layers = (0..config.n_layers).map(|l| layer_bits(split, l)).collect::<Result<_>>()?;
        Ok(Self { layers, n_tokens, n_neurons: config.intermediate_size })
    }

    /// Replays with the first `hot[l]` neurons of each layer in memory and `n_slots` cache slots (CLOCK, as the
    /// runtime's). The first quarter of the tokens warms the cache and is not counted.
    pub(crate) fn replay(&self, split: &Split, hot: &[usize], n_slots: usize) -> Result<Replayed> {
        let mut cache = crate::cache::NeuronCache::new(n_slots, 0, self.layers.len(), self.n_neurons)?;
        let width = self.n_neurons.div_ceil(8);
        let warm_up = self.n_tokens / 4;
        let mut sum = Replayed::default();
        for token in 0..self.n_tokens {
            let counted = if token >= warm_up { 1.0 } else { 0.0 };
            for (l, (bits, file)) in self.layers.iter().zip(split.layers()).enumerate() {
                let (chunk_neurons, layout) = (file.chunk_neurons(), file.bundles());
                let mut last_chunk = usize::MAX;
                let row = &bits[token * width..(token + 1) * width];
                let ones = row
                    .iter()
                    .enumerate()
                    .flat_map(|(i, b)| (0..8).filter(move |j| b >> j & 1 == 1).map(move |j| i * 8 + j));
                for n in ones {
                    sum.active += counted;
                    if n < hot[l] {
                        sum.hot += counted;
                        sum.ram_bytes += counted * layout.of(n).bundle_bytes() as f64;
                    } else if cache.contains(l, n) {
                        cache.touch(l, n);
                        sum.cached += counted;
                        sum.ram_bytes += counted * layout.of(n).bundle_bytes() as f64;
                    } else {
                        let chunk = n / chunk_neurons;
                        if chunk != last_chunk {
                            sum.disk_bytes += counted * file.stored_bytes(chunk..chunk + 1) as f64;
                            last_chunk = chunk;
                        }
                        cache.insert(l, n, &[]);
                    }
                }
            }
        }
        let n = (self.n_tokens - warm_up).max(1) as f64;
        Ok(Replayed {
            active: sum.active / n,
            hot: sum.hot / n,
            cached: sum.cached / n,
            ram_bytes: sum.ram_bytes / n,
            disk_bytes: sum.disk_bytes / n,
        })
    }
}
