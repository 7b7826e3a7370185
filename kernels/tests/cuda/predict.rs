use crate::matrix::{on_device, plain_shape};
use crate::{Random, Rows, U, additions, assert_near, device, pinned, poisoned, read, upload, wide};
use proptest::prelude::*;
use thermocline_kernels::Encoding;
use thermocline_kernels::cuda::launch::{LayerInput, Nonlinearity, inner_values, predict_inner, predict_scores};

/// Columns of a slice of the inner vector's shares, and shares of its sum of squares.
const SLICE: usize = 1024;
const SQUARES: usize = 8;

/// `E[act(v)^2]` as calibrate defines it, for a mean whose error is at most `error`; and a bound of the error of the
/// result, in which exponentials that are right to 3e-5 have the largest part.
fn square(silu: bool, mean: f64, sd: f64, error: f64) -> (f64, f64) {
    let size = mean * mean + sd * sd;
    let tolerance = 2e-4 * size + 3.0 * (mean.abs() + sd + error) * error;
    if silu {
        let sigmoid = 1.0 / (1.0 + (-mean).exp());
        let slope = sigmoid * (1.0 + mean * (1.0 - sigmoid));
        return ((mean * sigmoid).powi(2) + (slope * sd).powi(2), tolerance);
    }
    if sd <= 1e-6 * mean.abs() {
        return (mean.max(0.0).powi(2), tolerance);
    }
    let t = mean / sd;
    let below = 1.0 / (1.0 + (-1.702 * t).exp());
    ((size * below + mean * sd * 0.398_942_3 * (-0.5 * t * t).exp()).max(0.0), tolerance)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn shares_of_the_inner_vector_add_up(
        (encoding, hidden) in plain_shape(prop_oneof![1usize..20, Just(32), Just(33), 60usize..140, Just(256)]),
        rank in prop_oneof![Just(1usize), Just(32), Just(100), Just(128)],
        seed: u64,
    ) {
        let random = &mut Random::new(seed);
        let w = Rows::random(encoding, rank, hidden, random);
        let (x, weight) = (random.values(hidden), random.values(hidden));
        let n = inner_values(hidden, rank);
        let inner = poisoned(4 * (n + 1));
        let weight_memory = upload(&weight);
        predict_inner(device(), &on_device(&w), &upload(&x).view(), &weight_memory.view(), &inner.view()).unwrap();
        let inner = read::<f32>(&inner);
        prop_assert!(inner[n].is_nan(), "nothing after its end");
        let (shares, squares) = inner[..n].split_at(n - hidden.div_ceil(SLICE) * SQUARES);
        for (slice, x) in x.chunks(SLICE).enumerate() {
            let got: f64 = wide(&squares[slice * SQUARES..][..SQUARES]).iter().sum();
            let want: f64 = wide(x).iter().map(|x| x * x).sum();
            prop_assert!((got - want).abs() <= 10.0 * U * want, "squares {} {}", got, want);
        }
        let weighted = |slice: usize| -> Vec<f64> {
            let product = |(x, w): (&f32, &f32)| f64::from(*x) * f64::from(*w);
            let inside = |c: usize| c / SLICE == slice;
            x.iter().zip(&weight).map(product).enumerate().map(|(c, v)| if inside(c) { v } else { 0.0 }).collect()
        };
        for slice in 0..hidden.div_ceil(SLICE) {
            let input = weighted(slice);
            for r in 0..rank {
                let (want, size) = w.dot(r, &input);
                let tolerance = (additions(SLICE) + 2.0) * U * size;
                assert_near(shares[slice * rank + r], want, tolerance, &format!("{encoding} slice {slice} row {r}"));
            }
        }
    }

    #[test]
    fn scores_are_expected_magnitudes(
        encoding in 0usize..3,
        rank in prop_oneof![Just(32usize), Just(96), Just(128), Just(160), Just(544)],
        ffn in 1usize..300,
        activation in 0usize..3,
        broken in any::<bool>(),
        hidden in prop_oneof![1usize..2000, Just(8192), 9000usize..20000],
        with_host in any::<bool>(),
        seed: u64,
    ) {
        let random = &mut Random::new(seed);
        let encoding = Encoding::PLAIN[encoding];
        let activation = [Nonlinearity::Silu, Nonlinearity::Relu, Nonlinearity::Drelu][activation];
        let w = Rows::random(encoding, 2 * ffn, rank, random);
        let mut neurons: Vec<f32> = random.values(3 * ffn).iter().map(|v| v.abs()).collect();
        // Some have no residual; one is broken, and scores nothing.
        neurons[..ffn].iter_mut().step_by(3).for_each(|sd| *sd = 0.0);
        if broken {
            neurons[ffn / 2] = f32::NAN;
        }
        let scores = poisoned(4 * ffn);
        let (x, weight, eps) = (random.values(hidden), random.values(hidden), 1e-3f32);
        let n_slices = hidden.div_ceil(SLICE);
        let mut inner = random.values(inner_values(hidden, rank));
        let (shares, squares) = inner.split_at_mut(n_slices * rank);
        squares.iter_mut().for_each(|v| *v = v.abs());
        let scale = 1.0 / (wide(squares).iter().sum::<f64>() / hidden as f64 + f64::from(eps)).sqrt();
        // Relative error of that: half that of the sum of squares, and of the root and the division after it.
        let scale_error = (squares.len() as f64 / 32.0 + 12.0) * U;
        let share = |s: usize, r: usize| f64::from(shares[s * rank + r]) * scale;
        let z: Vec<f64> = (0..rank).map(|r| (0..n_slices).map(|s| share(s, r)).sum()).collect();
        let z_error = |r: usize| {
            let size: f64 = (0..n_slices).map(|s| share(s, r).abs()).sum();
            size * (scale_error + (n_slices as f64 + 2.0) * U)
        };
        let z_errors: Vec<f64> = (0..rank).map(z_error).collect();
        let host_x = pinned(&vec![7f32; hidden + 1]);
        let normed = pinned(&vec![7f32; hidden + 1]);
        let [x_view, weight_view, inner_view, neurons_view] =
            [upload(&x), upload(&weight), upload(&inner), upload(&neurons)].map(|m| m.view());
        let (host_view, normed_view) = (host_x.view(), normed.view());
        let from = LayerInput {
            hidden,
            x: &x_view,
            norm_weight: &weight_view,
            eps,
            inner: &inner_view,
            normed: &normed_view,
            host_x: with_host.then_some(&host_view),
        };
        predict_scores(device(), &on_device(&w), from, &neurons_view, activation, &scores.view()).unwrap();
        let (normed, copy) = (read::<f32>(&normed), read::<f32>(&host_x));
        for (c, got) in normed[..hidden].iter().enumerate() {
            let want = f64::from(x[c]) * scale * f64::from(weight[c]);
            assert_near(*got, want, (scale_error + 3.0 * U) * want.abs(), "normalised input");
        }
        prop_assert!(normed[hidden] == 7.0 && copy[hidden] == 7.0, "nothing after the end");
        let untouched = vec![7.0; hidden];
        prop_assert_eq!(&copy[..hidden], if with_host { &normed[..hidden] } else { &untouched });
        for (i, got) in read::<f32>(&scores).into_iter().enumerate() {
            let of = |which: usize| f64::from(neurons[which * ffn + i]);
            let ((gate, gate_size), (up, up_size)) = (w.dot(2 * i, &z), w.dot(2 * i + 1, &z));
            let error = |size: f64, row: usize| size * additions(rank) * U + w.dot(row, &z_errors).1;
            let (gate_error, up_error) = (error(gate_size, 2 * i), error(up_size, 2 * i + 1));
            let (gate_square, gate_error) = square(activation == Nonlinearity::Silu, gate, of(0), gate_error);
            let (up_square, up_error) = match activation {
                Nonlinearity::Drelu => square(false, up, of(1), up_error),
                _ => (up * up + of(1) * of(1), square(false, up, of(1), up_error).1),
            };
            let want = gate_square * up_square * of(2) * of(2);
            let tolerance = (gate_error * (up_square + up_error) + gate_square * up_error) * of(2) * of(2) + 1e-30;
            if of(0).is_nan() {
                prop_assert_eq!(got, 0.0, "neuron {}", i);
                continue;
            }
            let got = f64::from(got).powi(2);
            prop_assert!((got - want).abs() <= tolerance, "{activation:?} neuron {i}: {got} {want} {tolerance:e}");
        }
    }
}
