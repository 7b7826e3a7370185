use crate::attention::{attention, tables, turned};
use crate::ffn::random_bundles;
use crate::matrix::{on_device, shape};
use crate::{Random, Rows, U, assert_near, device, poisoned, read, upload, wide};
use half::{bf16, f16};
use proptest::prelude::*;
use thermocline_kernels::cuda::Memory;
use thermocline_kernels::cuda::launch::{
    Heads, Nonlinearity, Norm, RopeTables, add_bias_rows, attend_rows, embed_rows, gate_rows, norm_rows,
    unpack_bundles, unpack_rows,
};
use thermocline_kernels::{BundleLayout, Encoding, unpack};

/// Two bf16 numbers leave at most this share of the value that they were split from.
const SPLIT: f64 = 1.0 / (1 << 16) as f64;

/// Where split values go.
pub(crate) struct Halves(pub [Memory; 2]);

impl Halves {
    pub fn new(n: usize) -> Self {
        Self([poisoned(2 * n), poisoned(2 * n)])
    }

    /// What they hold together. The upper one alone must be the value, rounded.
    fn sums(&self) -> Vec<f64> {
        let [high, low] = [&self.0[0], &self.0[1]].map(read::<bf16>);
        let sum = |(h, l): (&bf16, &bf16)| {
            let sum = h.to_f64() + l.to_f64();
            assert!(l.to_f64().abs() <= h.to_f64().abs() * 2f64.powi(-8), "{h} and {l}");
            sum
        };
        high.iter().zip(&low).map(sum).collect()
    }
}

/// Whether two bf16 numbers hold exactly what each value's bits allow.
pub(crate) fn assert_split(got: &Halves, want: &[f32]) {
    for (got, want) in got.sums().into_iter().zip(want) {
        assert!((got - f64::from(*want)).abs() <= f64::from(want.abs()) * SPLIT, "{got} {want}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn rows_are_embedded_and_unpacked(
        (encoding, columns) in shape(1usize..40), rows in 1usize..9, first in 0usize..3, n in 0usize..6, seed: u64,
    ) {
        let random = &mut Random::new(seed);
        let w = Rows::random(encoding, rows + 3, columns, random);
        let tokens: Vec<u32> = (0..n).map(|_| random.below(rows) as u32).collect();
        let x = poisoned(4 * n * columns);
        embed_rows(device(), &on_device(&w), &upload(&tokens).view(), n, &x.view()).unwrap();
        let want: Vec<f32> = tokens.iter().flat_map(|t| w.weights(*t as usize).to_vec()).collect();
        prop_assert_eq!(read::<f32>(&x), want);

        let out = Halves::new(rows * columns);
        unpack_rows(device(), &on_device(&w), first, rows, [&out.0[0].view(), &out.0[1].view()]).unwrap();
        assert_split(&out, &w.weights[first * columns..(first + rows) * columns]);
    }

    #[test]
    fn bundles_are_unpacked(encoding in 0usize..3, groups in 1usize..30, n in 0usize..6, seed: u64) {
        let layout = BundleLayout::new(Encoding::PLAIN[encoding], 32 * groups).unwrap();
        let bundles = random_bundles(&layout, n, &mut Random::new(seed));
        let out: [Halves; 3] = std::array::from_fn(|_| Halves::new(n * 32 * groups));
        let views = [&out[0], &out[1], &out[2]].map(|o| [o.0[0].view(), o.0[1].view()]);
        let refs = [&views[0], &views[1], &views[2]].map(|v| [&v[0], &v[1]]);
        unpack_bundles(device(), layout, &upload(&bundles).view(), n, None, refs).unwrap();
        for (which, out) in out.iter().enumerate() {
            let mut want = vec![0.0; n * 32 * groups];
            for (want, bundle) in want.chunks_exact_mut(32 * groups).zip(bundles.chunks_exact(layout.bundle_bytes())) {
                unpack(layout.encoding(), layout.row(bundle, which), want);
            }
            assert_split(out, &want);
        }
    }

    #[test]
    fn rows_are_normalised_gated_and_biased(
        n in 1usize..5, columns in 1usize..700, activation in 0usize..3, seed: u64,
    ) {
        let random = &mut Random::new(seed);
        let (a, b, row) = (random.values(n * columns), random.values(n * columns), random.values(columns));
        let (a_memory, b_memory, row_memory) = (upload(&a), upload(&b), upload(&row));
        let out = Halves::new(n * columns);
        let halves = [&out.0[0].view(), &out.0[1].view()];
        let norm = Norm { weight: &row_memory.view(), eps: 1e-6, out: None };
        norm_rows(device(), &a_memory.view(), norm, n, columns, halves).unwrap();
        for (t, got) in out.sums().chunks_exact(columns).enumerate() {
            let x = wide(&a[t * columns..(t + 1) * columns]);
            let scale = 1.0 / (x.iter().map(|v| v * v).sum::<f64>() / columns as f64 + 1e-6).sqrt();
            for ((got, x), w) in got.iter().zip(&x).zip(&row) {
                let want = x * scale * f64::from(*w);
                assert_near(*got as f32, want, want.abs() * (SPLIT + (columns as f64 / 256.0 + 24.0) * U), "norm");
            }
        }

        let activation = [Nonlinearity::Silu, Nonlinearity::Relu, Nonlinearity::Drelu][activation];
        gate_rows(device(), [&a_memory.view(), &b_memory.view()], (n, columns), activation, halves).unwrap();
        for ((got, g), u) in out.sums().into_iter().zip(wide(&a)).zip(wide(&b)) {
            let want = match activation {
                Nonlinearity::Silu => g / (1.0 + (-g).exp()) * u,
                Nonlinearity::Relu => g.max(0.0) * u,
                Nonlinearity::Drelu => g.max(0.0) * u.max(0.0),
            };
            assert_near(got as f32, want, want.abs() * (SPLIT + 16.0 * U), "gate");
        }

        add_bias_rows(device(), &a_memory.view(), &row_memory.view(), n, columns).unwrap();
        let want: Vec<f32> = a.iter().zip(row.iter().cycle()).map(|(a, b)| a + b).collect();
        prop_assert_eq!(read::<f32>(&a_memory), want);
    }

    #[test]
    fn attention_of_a_batch_is_causal(
        (n_kv_heads, group) in (1usize..3, 1usize..4),
        head_dim in prop_oneof![Just(32usize), Just(64), Just(80), Just(128), Just(256), (1usize..64).prop_map(|h| 2 * h)],
        past in prop_oneof![Just(0usize), 0usize..40],
        n in 1usize..70,
        seed: u64,
    ) {
        let random = &mut Random::new(seed);
        let capacity = past + n + random.below(4);
        let heads = Heads { n_heads: n_kv_heads * group, n_kv_heads, head_dim, capacity };
        let (width, row) = (heads.n_heads * head_dim, (heads.n_heads + 2 * n_kv_heads) * head_dim);
        let qkv = random.values(n * row);
        let mut cache = || -> Vec<f16> {
            let one = |i: usize| if i / head_dim % capacity < past { f16::from_f32(random.value()) } else { f16::NAN };
            (0..heads.cache_values()).map(one).collect()
        };
        let (keys, values) = (upload(&cache()), upload(&cache()));
        let [cos, sin] = tables(capacity, head_dim / 2);
        let (cos_memory, sin_memory) = (upload(&cos), upload(&sin));
        let rope = RopeTables { cos: &cos_memory.view(), sin: &sin_memory.view() };
        let out = Halves::new(n * width);
        attend_rows(
            device(), heads, (n, past), &upload(&qkv).view(), [&keys.view(), &values.view()], rope,
            [&out.0[0].view(), &out.0[1].view()],
        ).unwrap();

        let (keys, values) = (read::<f16>(&keys), read::<f16>(&values));
        let [high, low] = [&out.0[0], &out.0[1]].map(read::<bf16>);
        let got: Vec<f64> = high.iter().zip(&low).map(|(h, l)| h.to_f64() + l.to_f64()).collect();
        for t in 0..n {
            let half = head_dim / 2;
            let at = (past + t) * half..(past + t + 1) * half;
            let of = |head: usize| {
                turned(&wide(&qkv[t * row + head * head_dim..][..head_dim]), &cos[at.clone()], &sin[at.clone()])
            };
            for kv in 0..n_kv_heads {
                let place = (kv * capacity + past + t) * head_dim;
                for (got, want) in keys[place..].iter().zip(of(heads.n_heads + kv)) {
                    assert_near(got.to_f32(), want, want.abs() * 2f64.powi(-11) + 2f64.powi(-25) + 4.0 * U, "new key");
                }
                let v = &qkv[t * row + width + (n_kv_heads + kv) * head_dim..][..head_dim];
                let rounded: Vec<f16> = v.iter().map(|v| f16::from_f32(*v)).collect();
                prop_assert_eq!(&values[place..place + head_dim], &rounded[..], "new value");
            }
            for head in 0..heads.n_heads {
                let first = head / group * capacity * head_dim;
                let seen = first..first + (past + t + 1) * head_dim;
                let (want, tolerance) = attention(&of(head), &keys[seen.clone()], &values[seen]);
                // A dot product here runs through all dimensions in one sum.
                let tolerance = tolerance * (1.0 + head_dim as f64 / 24.0);
                for (got, want) in got[t * width + head * head_dim..].iter().zip(&want) {
                    assert_near(*got as f32, *want, tolerance + want.abs() * SPLIT, &format!("token {t}, head {head}"));
                }
            }
        }
    }
}
