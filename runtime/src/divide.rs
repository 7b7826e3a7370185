//! Which neurons of each layer stay in memory: prefixes of the split's order, and slots for some of the others.

use crate::Result;
use crate::cache::NeuronCache;
use crate::replay::{Replayed, Trace};
use std::ops::Range;
use thermocline_split::{LayerFile, Split};

/// A prefix that ends between chunks.
pub(crate) fn whole_chunks(neurons: usize, chunk_neurons: usize, n: usize) -> usize {
    if neurons == n { n } else { neurons / chunk_neurons * chunk_neurons }
}

/// Bytes that the first `hot[l]` bundles of each layer take in memory, in whole chunks, with the table of where they begin if
/// they have streams.
pub(crate) fn prefix_bytes(split: &Split, hot: &[usize]) -> u64 {
    let of_layer = |(file, &n): (&LayerFile, &usize)| {
        let has_streams = file.bundles().within(0..n).any(|(_, s)| s.bundles().encoding().has_stream());
        let table = if has_streams { size_of::<u32>() * (n + file.bundles().sections().len()) } else { 0 };
        (file.trimmed_bytes(0..n.div_ceil(file.chunk_neurons())) + table) as u64
    };
    split.layers().iter().zip(hot).map(of_layer).sum()
}

/// Bytes of a slot of the cache where these prefixes are hot: the longest of the other bundles.
pub(crate) fn slot_bytes(split: &Split, hot: &[usize]) -> usize {
    let longest = |(file, &n): (&LayerFile, &usize)| file.bundles().longest(n..file.order().len());
    split.layers().iter().zip(hot).map(longest).max().unwrap_or(0)
}

/// The longest prefix, in whole chunks and the same for every layer, with which `fits` holds.
pub(crate) fn equal_prefixes(split: &Split, fits: impl Fn(&[usize]) -> bool) -> Vec<usize> {
    let n = split.manifest().config.intermediate_size;
    let (mut low, mut high) = (0, n);
    while low < high {
        let middle = (low + high).div_ceil(2);
        (low, high) = if fits(&vec![middle; split.layers().len()]) { (middle, high) } else { (low, middle - 1) };
    }
    split.layers().iter().map(|f| whole_chunks(low, f.chunk_neurons(), n)).collect()
}

/// One layer's activation rates in split order, `[intermediate_size]`.
pub(crate) fn activation_rates(split: &Split, layer: usize) -> Result<Vec<f32>> {
    let name = format!("layers.{layer}.activation_rate");
    let rates = split.statistics().read_f32(&name)?;
    let n = split.manifest().config.intermediate_size;
    if rates.len() == n {
        return Ok(rates);
    }
    let (path, reason) = (split.statistics().path().to_owned(), format!("{} rates for {n} neurons", rates.len()));
    Err(thermocline_split::Error::Corrupt { path, field: name, reason }.into())
}

/// The layer of every neuron, by falling activation rate over all layers.
pub(crate) fn layers_by_rate(split: &Split) -> Result<Vec<u32>> {
    let mut rates = Vec::new();
    for l in 0..split.layers().len() {
        rates.extend(activation_rates(split, l)?.into_iter().map(|r| (r, l as u32)));
    }
    rates.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    Ok(rates.into_iter().map(|(_, l)| l).collect())
}

/// The prefix of each layer, in whole chunks, that holds its part of as many of `layers_by_rate` as fit in `budget` bytes:
/// the next neuron of each of these layers in turn.
pub(crate) fn hot_prefixes(split: &Split, layers_by_rate: &[u32], budget: u64) -> Vec<usize> {
    let (mut hot, mut used) = (vec![0usize; split.layers().len()], 0);
    for &l in layers_by_rate {
        let (hot, file) = (&mut hot[l as usize], &split.layers()[l as usize]);
        used += file.bundles().of(*hot).bundle_bytes() as u64;
        if used > budget {
            break;
        }
        *hot += 1;
    }
    let n_neurons = split.manifest().config.intermediate_size;
    hot.iter().zip(split.layers()).map(|(&h, file)| whole_chunks(h, file.chunk_neurons(), n_neurons)).collect()
}

/// Bytes of the bundle of a neuron that fires, in the mean of the profile's tokens, among the neurons `part(l)` of each
/// layer l; 0 if there are none.
pub(crate) fn active_bundle(split: &Split, part: impl Fn(usize) -> Range<usize>) -> Result<f64> {
    let (mut bytes, mut fires, mut all, mut n) = (0.0, 0.0, 0, 0);
    for (l, file) in split.layers().iter().enumerate() {
        let rates = activation_rates(split, l)?;
        for (neurons, section) in file.bundles().within(part(l)) {
            let sum: f64 = rates[neurons.clone()].iter().map(|&r| f64::from(r)).sum();
            bytes += sum * section.bundles().bundle_bytes() as f64;
            fires += sum;
            all += neurons.len() * section.bundles().bundle_bytes();
            n += neurons.len();
        }
    }
    Ok(if fires > 0.0 { bytes / fires } else { all as f64 / n.max(1) as f64 })
}

/// Divides `left` bytes between hot prefix and cache: the division whose replay reads the fewest bytes from disk.
pub(crate) fn divide(split: &Split, trace: &Trace, left: u64) -> Result<(Vec<usize>, usize, Replayed)> {
    let config = &split.manifest().config;
    let n = config.intermediate_size;
    let hottest = layers_by_rate(split)?;
    let mut best: Option<(Vec<usize>, usize, Replayed)> = None;
    for quarters in 0..=4u64 {
        let hot_budget = left / 4 * quarters;
        let hot = hot_prefixes(split, &hottest, hot_budget);
        let (used, bundle) = (prefix_bytes(split, &hot), slot_bytes(split, &hot) as u64);
        let tables = NeuronCache::bytes(1, bundle as usize, config.n_layers, n);
        let cold = config.n_layers * n - hot.iter().sum::<usize>();
        let slots = ((left - used).saturating_sub(tables) / (bundle + 5)) as usize;
        // What is left after rounding is no cache: less than a token's worth of slots only costs copies.
        let slots = if slots < cold / 100 { 0 } else { slots.min(cold) };
        let replayed = trace.replay(split, &hot, slots)?;
        if best.as_ref().is_none_or(|b| replayed.disk_bytes < b.2.disk_bytes) {
            best = Some((hot, slots, replayed));
        }
    }
    Ok(best.unwrap_or((vec![0; config.n_layers], 0, Replayed::default())))
}
