use crate::{Random, U, assert_near, device, poisoned, read, upload, wide};
use half::f16;
use proptest::prelude::*;
use thermocline_kernels::cuda::launch::{Heads, RopeTables, attend};

/// Cosines and sines `[capacity, half]`.
pub(crate) fn tables(capacity: usize, half: usize) -> [Vec<f32>; 2] {
    let angle = |i: usize| (i / half) as f64 * 100f64.powf(-((i % half) as f64) / half as f64);
    let n = capacity * half;
    [(0..n).map(|i| angle(i).cos() as f32).collect(), (0..n).map(|i| angle(i).sin() as f32).collect()]
}

/// The head turned to the position whose cosines and sines these are.
pub(crate) fn turned(head: &[f64], cos: &[f32], sin: &[f32]) -> Vec<f64> {
    let half = cos.len();
    let pair = |i: usize| (head[i], head[i + half], f64::from(cos[i]), f64::from(sin[i]));
    let lower = (0..half).map(pair).map(|(a, b, c, s)| a * c - b * s);
    let upper = (0..half).map(pair).map(|(a, b, c, s)| b * c + a * s);
    lower.chain(upper).collect()
}

/// Attention of one query over the positions of `keys` and `values`, and a bound of the kernel's error.
pub(crate) fn attention(q: &[f64], keys: &[f16], values: &[f16]) -> (Vec<f64>, f64) {
    let dim = q.len();
    let row =
        |cache: &[f16], p: usize| -> Vec<f64> { cache[p * dim..(p + 1) * dim].iter().map(|v| v.to_f64()).collect() };
    let n = keys.len() / dim;
    let scale = 1.0 / (dim as f64).sqrt();
    let mut score_error = 0.0f64;
    let scores: Vec<f64> = (0..n)
        .map(|p| {
            let terms = q.iter().zip(row(keys, p)).map(|(q, k)| q * k * scale);
            let (sum, size) = terms.fold((0.0, 0.0f64), |(sum, size), t| (sum + t, size + t.abs()));
            // A lane adds up to eight products, the warp five times; the query and its scale have rounded before.
            score_error = score_error.max(size * 24.0 * U);
            sum
        })
        .collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut out = vec![0.0; dim];
    let mut size = 0.0f64;
    for (p, w) in weights.iter().enumerate() {
        for (o, v) in out.iter_mut().zip(row(values, p)) {
            *o += w / total * v;
            size = size.max(v.abs());
        }
    }
    // An error of a score is a relative error of its weight, in numerator and denominator; so is that of exp, whose
    // argument has an error of its own, and those of the two sums.
    let spread = scores.iter().fold(0.0f64, |spread, s| spread.max(largest - s));
    (out, size * 2.0 * (2.0 * score_error + (spread * 2.0 + n as f64 + 64.0) * U))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn attend_agrees_with_softmax_over_the_cache(
        (n_kv_heads, group) in prop_oneof![(1usize..4, 1usize..17), Just((2, 8)), Just((3, 3)), Just((1, 16))],
        head_dim in prop_oneof![Just(64usize), Just(80), Just(128), Just(256), (1usize..128).prop_map(|h| 2 * h)],
        position in prop_oneof![Just(0usize), 0usize..12, 0usize..150, 30usize..36, 0usize..700],
        n_splits in prop_oneof![1usize..9, Just(20usize), Just(128)],
        seed: u64,
        loud in any::<bool>(),
    ) {
        let random = &mut Random::new(seed);
        let capacity = position + 1 + random.below(5);
        let heads = Heads { n_heads: n_kv_heads * group, n_kv_heads, head_dim, capacity };
        let width = heads.n_heads * head_dim;
        let mut qkv = random.values((heads.n_heads + 2 * n_kv_heads) * head_dim);
        if loud {
            // Scores of hundreds: the running maximum changes, and most weights vanish.
            qkv[..width].iter_mut().for_each(|v| *v *= 200.0);
        }
        let mut cache = || -> Vec<f16> { (0..heads.cache_values()).map(|_| f16::from_f32(random.value())).collect() };
        let (mut keys, mut values) = (cache(), cache());
        // What lies behind the position must not be read.
        for cache in [&mut keys, &mut values] {
            for head in cache.chunks_exact_mut(capacity * head_dim) {
                head[position * head_dim..].fill(f16::NAN);
            }
        }
        let [cos, sin] = tables(capacity, head_dim / 2);
        let (keys_memory, values_memory) = (upload(&keys), upload(&values));
        let (partial, out) = (poisoned(4 * heads.partial_values(n_splits)), poisoned(4 * width));
        let step = upload(&[3u32, position as u32, 5, 0]);
        let arrived = upload(&vec![0u32; heads.counters()]);
        let (cos_memory, sin_memory) = (upload(&cos), upload(&sin));
        let rope = RopeTables { cos: &cos_memory.view(), sin: &sin_memory.view() };
        let qkv_memory = upload(&qkv);
        let launch = || {
            attend(
                device(), heads, n_splits, &qkv_memory.view(), &step.view(),
                [&keys_memory.view(), &values_memory.view()], rope, [&partial.view(), &arrived.view()], &out.view(),
            ).unwrap();
            assert!(read::<u32>(&arrived).iter().take(heads.counters()).all(|n| *n == 0), "counters are back at zero");
            read::<f32>(&out)
        };
        let got = launch();
        // Again, with the new position in the cache already: the same to the last bit.
        prop_assert!(launch().iter().zip(&got).take(width).all(|(a, b)| a.to_bits() == b.to_bits()));

        let at = position * head_dim / 2..(position + 1) * head_dim / 2;
        let turn = |head: &[f32]| turned(&wide(head), &cos[at.clone()], &sin[at.clone()]);
        let (new_keys, new_values) = (read::<f16>(&keys_memory), read::<f16>(&values_memory));
        for kv in 0..n_kv_heads {
            let of = |cache: &[f16], p: usize| cache[(kv * capacity + p) * head_dim..][..head_dim].to_vec();
            for p in 0..position {
                prop_assert_eq!(of(&new_keys, p), of(&keys, p), "earlier keys stay");
                prop_assert_eq!(of(&new_values, p), of(&values, p), "earlier values stay");
            }
            let (k, v) = (width + kv * head_dim, width + (n_kv_heads + kv) * head_dim);
            for (got, want) in of(&new_keys, position).iter().zip(turn(&qkv[k..k + head_dim])) {
                // Half a unit of f16, or of its smallest number, and the rounding of two products before it.
                assert_near(got.to_f32(), want, want.abs() * 2f64.powi(-11) + 2f64.powi(-25) + 4.0 * U, "new key");
            }
            let rounded: Vec<f16> = qkv[v..v + head_dim].iter().map(|v| f16::from_f32(*v)).collect();
            prop_assert_eq!(of(&new_values, position), rounded, "new value");
        }
        for head in 0..heads.n_heads {
            let q = turn(&qkv[head * head_dim..(head + 1) * head_dim]);
            let seen = head / group * capacity * head_dim..(head / group * capacity + position + 1) * head_dim;
            let (want, tolerance) = attention(&q, &new_keys[seen.clone()], &new_values[seen]);
            for (got, want) in got[head * head_dim..].iter().zip(&want) {
                assert_near(*got, *want, tolerance, &format!("head {head} of {heads:?}, {n_splits} splits"));
            }
        }
    }
}
