/// Neurons by falling rate (equal ones by index): the hottest prefix is the best static hot set.
pub fn order_by_rate(rates: &[f64]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..rates.len() as u32).collect();
    order.sort_by(|&a, &b| rates[b as usize].total_cmp(&rates[a as usize]).then(a.cmp(&b)));
    order
}

/// A shuffled order, the baseline that others must beat. The same for the same seed, everywhere.
pub fn order_random(n: usize, seed: u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..n as u32).collect();
    // Sorting by a hash is a shuffle that needs no generator.
    order.sort_by_key(|&i| (xxhash_rust::xxh3::xxh3_64_with_seed(&i.to_le_bytes(), seed), i));
    order
}
