use super::BitMatrix;

/// Neurons read per active neuron if the layer is stored in `order` and read in whole chunks of `chunk_len`: at best
/// 1, at worst `chunk_len`. `NaN` if nothing is active.
///
/// Fit the order on one part of the samples and measure on another.
pub fn over_fetch(active: &BitMatrix, order: &[u32], chunk_len: usize) -> f64 {
    let chunk_len = chunk_len.max(1);
    let n_chunks = order.len().div_ceil(chunk_len);
    let mut chunk_of = vec![0usize; active.n_columns()];
    order.iter().enumerate().for_each(|(place, &neuron)| chunk_of[neuron as usize] = place / chunk_len);
    let len_of = |chunk: usize| chunk_len.min(order.len() - chunk * chunk_len);
    let mut last_read = vec![usize::MAX; n_chunks];
    let (mut n_read, mut n_active) = (0u64, 0u64);
    for row in 0..active.n_rows() {
        for neuron in active.ones(row) {
            n_active += 1;
            let chunk = chunk_of[neuron];
            if last_read[chunk] != row {
                last_read[chunk] = row;
                n_read += len_of(chunk) as u64;
            }
        }
    }
    n_read as f64 / n_active as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_whole_chunks() {
        // Neurons 0 and 3 of 5 fire at one token, none at the other.
        let active = BitMatrix::from_bytes(2, 5, vec![0b0_1001, 0]);
        assert_eq!(over_fetch(&active, &[0, 1, 2, 3, 4], 2), 2.0);
        assert_eq!(over_fetch(&active, &[0, 3, 1, 2, 4], 2), 1.0);
        assert_eq!(over_fetch(&active, &[0, 1, 2, 3, 4], 4), 2.0);
        assert_eq!(over_fetch(&active, &[0, 1, 2, 4, 3], 4), 2.5);
    }
}
