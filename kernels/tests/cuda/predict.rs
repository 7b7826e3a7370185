use crate::{Random, Rows, U, additions, device, pinned, poisoned, read, upload, wide};
use proptest::prelude::*;
use thermocline_kernels::Encoding;
use thermocline_kernels::cuda::launch::{DeviceMatrix, Nonlinearity, predict_scores};

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
    fn scores_are_expected_magnitudes(
        encoding in 0usize..3,
        rank in prop_oneof![Just(32usize), Just(96), Just(128), Just(160), Just(544)],
        ffn in 1usize..300,
        activation in 0usize..3,
        broken in any::<bool>(),
        hidden in prop_oneof![Just(0usize), 1usize..2000],
        seed: u64,
    ) {
        let random = &mut Random::new(seed);
        let encoding = Encoding::ALL[encoding];
        let activation = [Nonlinearity::Silu, Nonlinearity::Relu, Nonlinearity::Drelu][activation];
        let w = Rows::random(encoding, 2 * ffn, rank, random);
        let z = random.values(rank);
        let mut neurons: Vec<f32> = random.values(3 * ffn).iter().map(|v| v.abs()).collect();
        // Some have no residual; one is broken, and scores nothing.
        neurons[..ffn].iter_mut().step_by(3).for_each(|sd| *sd = 0.0);
        if broken {
            neurons[ffn / 2] = f32::NAN;
        }
        let factors = DeviceMatrix { encoding, rows: 2 * ffn, columns: rank, data: upload(&w.bytes).view() };
        let scores = poisoned(4 * ffn);
        let x = random.values(hidden);
        let host_x = pinned(&vec![7f32; hidden + 1]);
        let (x_memory, host_view) = (upload(&x), host_x.slice(0, 4 * hidden));
        let x_view = x_memory.view();
        let to_host = (hidden > 0).then_some([&x_view, &host_view]);
        let (z_memory, neurons_memory) = (upload(&z).view(), upload(&neurons).view());
        predict_scores(device(), &factors, &z_memory, &neurons_memory, activation, &scores.view(), to_host).unwrap();
        let copy = read::<f32>(&host_x);
        prop_assert!(copy[..hidden] == x && copy[hidden] == 7.0, "{:?}", &copy[..=hidden]);
        let z = wide(&z);
        for (i, got) in read::<f32>(&scores).into_iter().enumerate() {
            let of = |which: usize| f64::from(neurons[which * ffn + i]);
            let ((gate, gate_size), (up, up_size)) = (w.dot(2 * i, &z), w.dot(2 * i + 1, &z));
            let error = |size: f64| size * additions(rank) * U;
            let (gate_square, gate_error) = square(activation == Nonlinearity::Silu, gate, of(0), error(gate_size));
            let (up_square, up_error) = match activation {
                Nonlinearity::Drelu => square(false, up, of(1), error(up_size)),
                _ => (up * up + of(1) * of(1), square(false, up, of(1), error(up_size)).1),
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
