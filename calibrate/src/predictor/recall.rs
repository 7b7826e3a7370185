use rayon::prelude::*;

/// Share of the energy `sum (|h_i| * ||d_i||)^2` that the top `share` of neurons by predicted score keep, mean over
/// tokens. `predicted` and `actual` are scores `[n_tokens, intermediate_size]`; pass `actual` twice for what an oracle
/// reaches. Tokens without any energy count as 1.
pub fn energy_recall(predicted: &[f32], actual: &[f32], intermediate_size: usize, share: f64) -> f64 {
    let n_kept = crate::settings::top_count(share, intermediate_size);
    let rows = predicted.par_chunks_exact(intermediate_size).zip(actual.par_chunks_exact(intermediate_size));
    let recalls: Vec<f64> = rows
        .map_init(Vec::new, |order, (predicted, actual)| {
            order.clear();
            order.extend(0..intermediate_size as u32);
            order.select_nth_unstable_by(n_kept - 1, |&a, &b| predicted[b as usize].total_cmp(&predicted[a as usize]));
            let energy = |score: f32| f64::from(score) * f64::from(score);
            let kept: f64 = order[..n_kept].iter().map(|&neuron| energy(actual[neuron as usize])).sum();
            let all: f64 = actual.iter().map(|&score| energy(score)).sum();
            if all > 0.0 { kept / all } else { 1.0 }
        })
        .collect();
    recalls.iter().sum::<f64>() / recalls.len().max(1) as f64
}
