use crate::matrix::{on_device, plain_shape};
use crate::{Random, Rows, U, additions, assert_near, device, pinned, poisoned, read, upload, wide};
use proptest::prelude::*;
use thermocline_kernels::Encoding;
use thermocline_kernels::cuda::launch::{
    DeviceMatrix, LayerInput, LowRankPredictor, Nonlinearity, inner_values, predict_inner, predict_scores,
};
use thermocline_kernels::cuda::{Memory, View};

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

/// A predictor on the device, some parts of which a test does not need.
struct OnDevice {
    input: DeviceMatrix,
    norm_weight: View,
    factors: DeviceMatrix,
    neurons: View,
    inner: Memory,
    scores: Memory,
}

impl OnDevice {
    fn predictor<'a>(&'a self, views: &'a [View; 2]) -> LowRankPredictor<'a> {
        let (input, norm_weight, factors, neurons) = (&self.input, &self.norm_weight, &self.factors, &self.neurons);
        LowRankPredictor { input, norm_weight, factors, neurons, inner: &views[0], scores: &views[1] }
    }
}

/// Calls `f` with the predictors.
fn with_predictors<T>(all: &[OnDevice], f: impl FnOnce(&[LowRankPredictor<'_>]) -> T) -> T {
    let views: Vec<_> = all.iter().map(|p| [p.inner.view(), p.scores.view()]).collect();
    f(&all.iter().zip(&views).map(|(p, views)| p.predictor(views)).collect::<Vec<_>>())
}

/// Holds what `predict_inner` has left to sums in f64.
fn assert_inner(w: &Rows, rank: usize, x: &[f32], weight: &[f32], inner: &[f32]) {
    let hidden = x.len();
    let n = inner_values(hidden, rank);
    assert!(inner[n].is_nan(), "nothing after its end");
    let (shares, squares) = inner[..n].split_at(n - hidden.div_ceil(SLICE) * SQUARES);
    for (slice, x) in x.chunks(SLICE).enumerate() {
        let got: f64 = wide(&squares[slice * SQUARES..][..SQUARES]).iter().sum();
        let want: f64 = wide(x).iter().map(|x| x * x).sum();
        assert!((got - want).abs() <= 10.0 * U * want, "squares {got} {want}");
    }
    let weighted = |slice: usize| -> Vec<f64> {
        let product = |(x, w): (&f32, &f32)| f64::from(*x) * f64::from(*w);
        let inside = |c: usize| c / SLICE == slice;
        x.iter().zip(weight).map(product).enumerate().map(|(c, v)| if inside(c) { v } else { 0.0 }).collect()
    };
    for slice in 0..hidden.div_ceil(SLICE) {
        let input = weighted(slice);
        for r in 0..rank {
            let (want, size) = w.dot(r, &input);
            let tolerance = (additions(SLICE) + 2.0) * U * size;
            assert_near(shares[slice * rank + r], want, tolerance, &format!("slice {slice} row {r}"));
        }
    }
}

/// The second half of a predictor, at random.
struct Outer {
    factors: Rows,
    neurons: Vec<f32>,
    inner: Vec<f32>,
}

impl Outer {
    fn random(encoding: Encoding, [hidden, rank, ffn]: [usize; 3], broken: bool, random: &mut Random) -> Self {
        let factors = Rows::random(encoding, 2 * ffn, rank, random);
        let mut neurons: Vec<f32> = random.values(3 * ffn).iter().map(|v| v.abs()).collect();
        // Some have no residual; one is broken, and scores nothing.
        neurons[..ffn].iter_mut().step_by(3).for_each(|sd| *sd = 0.0);
        if broken {
            neurons[ffn / 2] = f32::NAN;
        }
        let mut inner = random.values(inner_values(hidden, rank));
        inner[hidden.div_ceil(SLICE) * rank..].iter_mut().for_each(|v| *v = v.abs());
        Self { factors, neurons, inner }
    }

    fn on_device(&self, input: &DeviceMatrix, norm_weight: &View) -> OnDevice {
        OnDevice {
            input: input.clone(),
            norm_weight: norm_weight.clone(),
            factors: on_device(&self.factors),
            neurons: upload(&self.neurons).view(),
            inner: upload(&self.inner),
            scores: poisoned(4 * self.neurons.len() / 3),
        }
    }

    /// What the norm multiplies with, and its relative error.
    fn scale(&self, hidden: usize, rank: usize, eps: f32) -> (f64, f64) {
        let squares = &self.inner[hidden.div_ceil(SLICE) * rank..];
        let scale = 1.0 / (wide(squares).iter().sum::<f64>() / hidden as f64 + f64::from(eps)).sqrt();
        // Half that of the sum of squares, and of the root and the division after it.
        (scale, (squares.len() as f64 / 32.0 + 12.0) * U)
    }

    /// Holds scores to the expected magnitudes in f64.
    fn assert_scores(&self, hidden: usize, rank: usize, eps: f32, activation: Nonlinearity, scores: &[f32]) {
        let (n_slices, ffn) = (hidden.div_ceil(SLICE), scores.len());
        let (scale, scale_error) = self.scale(hidden, rank, eps);
        let share = |s: usize, r: usize| f64::from(self.inner[s * rank + r]) * scale;
        let z: Vec<f64> = (0..rank).map(|r| (0..n_slices).map(|s| share(s, r)).sum()).collect();
        let z_error = |r: usize| {
            let size: f64 = (0..n_slices).map(|s| share(s, r).abs()).sum();
            size * (scale_error + (n_slices as f64 + 2.0) * U)
        };
        let z_errors: Vec<f64> = (0..rank).map(z_error).collect();
        for (i, &got) in scores.iter().enumerate() {
            let of = |which: usize| f64::from(self.neurons[which * ffn + i]);
            let w = &self.factors;
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
                assert_eq!(got, 0.0, "neuron {i}");
                continue;
            }
            let got = f64::from(got).powi(2);
            assert!((got - want).abs() <= tolerance, "{activation:?} neuron {i}: {got} {want} {tolerance:e}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn shares_of_the_inner_vector_add_up(
        (encoding, hidden) in plain_shape(prop_oneof![1usize..20, Just(32), Just(33), 60usize..140, Just(256)]),
        rank in prop_oneof![Just(32usize), Just(96), Just(128)],
        n_predictors in 1usize..3,
        seed: u64,
    ) {
        let random = &mut Random::new(seed);
        let x = random.values(hidden);
        let factors = on_device(&Rows::random(encoding, 2, rank, random));
        let all: Vec<_> = (0..n_predictors).map(|_| {
            let (w, weight) = (Rows::random(encoding, rank, hidden, random), random.values(hidden));
            let inner = poisoned(4 * (inner_values(hidden, rank) + 1));
            let device = OnDevice {
                input: on_device(&w), norm_weight: upload(&weight).view(), factors: factors.clone(),
                neurons: upload(&[0f32; 3]).view(), inner, scores: poisoned(4),
            };
            (w, weight, device)
        }).collect();
        let (all, on_device): (Vec<_>, Vec<_>) = all.into_iter().map(|(w, weight, device)| ((w, weight), device)).unzip();
        with_predictors(&on_device, |predictors| predict_inner(device(), predictors, &upload(&x).view())).unwrap();
        for ((w, weight), device) in all.iter().zip(&on_device) {
            assert_inner(w, rank, &x, weight, &read::<f32>(&device.inner));
        }
    }

    #[test]
    fn scores_are_expected_magnitudes(
        encoding in 0usize..3,
        rank in prop_oneof![Just(32usize), Just(96), Just(128), Just(160), Just(544)],
        ffn in 1usize..300,
        activation in 0usize..3,
        broken in any::<bool>(),
        hidden in prop_oneof![1usize..60, Just(256), 280usize..600].prop_map(|groups| 32 * groups),
        with_host in any::<bool>(),
        n_predictors in 1usize..3,
        seed: u64,
    ) {
        let random = &mut Random::new(seed);
        let encoding = Encoding::PLAIN[encoding];
        let activation = [Nonlinearity::Silu, Nonlinearity::Relu, Nonlinearity::Drelu][activation];
        let outers: Vec<_> =
            (0..n_predictors).map(|_| Outer::random(encoding, [hidden, rank, ffn], broken, random)).collect();
        let (x, weight, eps) = (random.values(hidden), random.values(hidden), 1e-3f32);
        let host_x = pinned(&vec![7f32; hidden + 1]);
        let normed = pinned(&vec![7f32; hidden + 1]);
        let [x_view, weight_view] = [upload(&x), upload(&weight)].map(|m| m.view());
        let (host_view, normed_view) = (host_x.view(), normed.view());
        let input = on_device(&Rows::random(encoding, rank, hidden, random));
        let all: Vec<_> = outers.iter().map(|outer| outer.on_device(&input, &weight_view)).collect();
        let from = LayerInput {
            hidden, x: &x_view, eps, normed: &normed_view, host_x: with_host.then_some(&host_view),
        };
        with_predictors(&all, |predictors| predict_scores(device(), predictors, from, activation)).unwrap();
        let (normed, copy) = (read::<f32>(&normed), read::<f32>(&host_x));
        let (scale, scale_error) = outers[0].scale(hidden, rank, eps);
        for (c, got) in normed[..hidden].iter().enumerate() {
            let want = f64::from(x[c]) * scale * f64::from(weight[c]);
            assert_near(*got, want, (scale_error + 3.0 * U) * want.abs(), "normalised input");
        }
        prop_assert!(normed[hidden] == 7.0 && copy[hidden] == 7.0, "nothing after the end");
        let untouched = vec![7.0; hidden];
        prop_assert_eq!(&copy[..hidden], if with_host { &normed[..hidden] } else { &untouched });
        for (outer, device) in outers.iter().zip(&all) {
            outer.assert_scores(hidden, rank, eps, activation, &read::<f32>(&device.scores));
        }
    }
}
