use crate::{Random, U, additions, assert_near, device, pinned, poisoned, read, upload, wide};
use proptest::prelude::*;
use thermocline_kernels::cuda::launch::{
    DeviceSketch, LayerInput, Nonlinearity, RowChoice, Sketched, add_sketched, sketch_rows, sketch_scores,
};
use thermocline_kernels::{SKETCH_UNIT, SketchBits, SketchMatrix, sketch_planes, sketch_row, unsketch};

/// Random rows of one part of a sketch.
pub(crate) struct Part {
    pub planes: Vec<u8>,
    columns: usize,
    /// `[rows, columns]`.
    pub weights: Vec<f32>,
}

impl Part {
    pub fn random(bits: SketchBits, n_rows: usize, columns: usize, random: &mut Random) -> Self {
        let row_bytes = bits.row_bytes(columns);
        let (mut bytes, mut weights) = (vec![0; n_rows * row_bytes], vec![0.0; n_rows * columns]);
        for (row, weights) in bytes.chunks_exact_mut(row_bytes).zip(weights.chunks_exact_mut(columns)) {
            let codes: Vec<u8> = (0..columns).map(|_| random.below(1 << bits.bits()) as u8).collect();
            let scales: Vec<f32> = random.values(columns / SKETCH_UNIT).iter().map(|v| v.abs()).collect();
            sketch_row(bits, &codes, &scales, row);
            unsketch(bits, row, weights);
        }
        let planes = sketch_planes(SketchMatrix::new(bits, columns, &bytes));
        assert_eq!(planes.len(), bytes.len());
        Self { planes, columns, weights }
    }

    /// `row . x` for x in the order of columns, and a bound of what the kernel's sum misses: an input becomes a
    /// whole number of 8355000ths of the largest of its unit. That rounds by half of one, and the factor and the product before
    /// it, as floats of 24 bits, by as much each.
    pub fn dot(&self, row: usize, x: &[f64]) -> (f64, f64) {
        let row = &self.weights[row * self.columns..(row + 1) * self.columns];
        let (mut product, mut error) = (0.0, 0.0);
        for (row, x) in row.chunks_exact(SKETCH_UNIT).zip(x.chunks_exact(SKETCH_UNIT)) {
            let largest = x.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
            let of_unit: f64 = row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
            let lost = row.iter().map(|w| f64::from(w.abs())).sum::<f64>() * largest * 1.6 / 8_355_000.0;
            let size: f64 = row.iter().zip(x).map(|(w, x)| (f64::from(*w) * x).abs()).sum::<f64>() + lost;
            product += of_unit;
            error += lost + (additions(self.columns) + 16.0) * U * size;
        }
        (product, error)
    }
}

/// Value, expected value, expected square, and expected square of the distance from the value of `act(v)` for `v ~ N(mean, sd^2)`,
/// as calibrate defines them.
fn factor(is_silu: bool, mean: f64, sd: f64) -> [f64; 4] {
    if is_silu {
        let sigmoid = 1.0 / (1.0 + (-mean).exp());
        let (value, slope) = (mean * sigmoid, sigmoid * (1.0 + mean * (1.0 - sigmoid)) * sd);
        return [value, value, value * value + slope * slope, slope * slope];
    }
    let value = mean.max(0.0);
    if sd <= 1e-6 * mean.abs() {
        return [value, value, value * value, 0.0];
    }
    let t = mean / sd;
    let (below, density) = (1.0 / (1.0 + (-1.702 * t).exp()), 0.398_942_3 * (-0.5 * t * t).exp());
    let square = ((mean * mean + sd * sd) * below + mean * sd * density).max(0.0);
    let expected = (mean * below + sd * density).max(0.0);
    [value, expected, square, (square - 2.0 * value * expected + value * value).max(0.0)]
}

fn factors(activation: Nonlinearity, [gate, up]: [f64; 2], [gate_sd, up_sd]: [f64; 2]) -> [[f64; 4]; 2] {
    let u = match activation {
        Nonlinearity::Drelu => factor(false, up, up_sd),
        _ => [up, up, up * up + up_sd * up_sd, up_sd * up_sd],
    };
    [factor(activation == Nonlinearity::Silu, gate, gate_sd), u]
}

/// Squared costs of leaving the gate, the up and the down row to the sketch, and how far each may be off.
fn row_costs(
    activation: Nonlinearity,
    [gate, up]: [f64; 2],
    [gate_sd, up_sd, down, down_error]: [f64; 4],
) -> [(f64, f64); 3] {
    let [g, u] = factors(activation, [gate, up], [gate_sd, up_sd]);
    // Roundings of squares of which little is left.
    let size = ((gate.abs() + gate_sd) * (up.abs() + up_sd)).powi(2) * 1e-5;
    let squares = [down, down, down_error].map(|length| length * length);
    let costs = [g[3] * u[2], g[0] * g[0] * u[3], g[2] * u[2]];
    std::array::from_fn(|row| (costs[row] * squares[row], (1e-3 * costs[row] + size) * squares[row]))
}

/// What one neuron should come out as: activation, squared score, and how far each may be off.
fn judged(
    activation: Nonlinearity,
    [(gate, gate_error), (up, up_error)]: [(f64, f64); 2],
    [gate_sd, up_sd, down, down_error]: [f64; 4],
) -> [(f64, f64); 2] {
    let [g, u] = factors(activation, [gate, up], [gate_sd, up_sd]);
    let h = g[0] * u[0];
    let square = (g[2] * u[2] - 2.0 * h * (g[1] * u[1]) + h * h).max(0.0);
    // Sizes of the factors, and what errors of the products and exponentials that are right to 3e-5 make of them.
    let (gate_size, up_size) = (gate.abs() + gate_sd + gate_error, up.abs() + up_sd + up_error);
    let relative = 1e-3 + 8.0 * (gate_error / gate_size.max(1e-30) + up_error / up_size.max(1e-30));
    let size = (gate_size * up_size).powi(2);
    let h_error = 1.2 * (gate_error * up_size + up_error * gate_size) + 1e-6 * h.abs();
    let of_down = 2.0 * (h.abs() + h_error) * h_error + 1e-6 * h * h;
    let score = square * down * down + h * h * down_error * down_error;
    [(h, h_error), (score, size * relative * down * down + of_down * down_error * down_error + 1e-5 * score + 1e-30)]
}

/// Bits of up rows.
pub(crate) fn up_bits() -> impl Strategy<Value = SketchBits> {
    prop_oneof![Just(SketchBits::Two), Just(SketchBits::Three)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn sketches_judge_neurons_as_their_rows_say(
        units in prop_oneof![1usize..40, Just(64)],
        ffn in 1usize..200,
        activation in 0usize..3,
        (with_host, whole) in any::<(bool, bool)>(),
        up_bits in up_bits(),
        seed: u64,
    ) {
        let random = &mut Random::new(seed);
        let hidden = units * SKETCH_UNIT;
        let activation = [Nonlinearity::Silu, Nonlinearity::Relu, Nonlinearity::Drelu][activation];
        let [gate, down] = [0, 1].map(|_| Part::random(SketchBits::Two, ffn, hidden, random));
        let up = Part::random(up_bits, ffn, hidden, random);
        let mut neurons: Vec<f32> = random.values(4 * ffn).iter().map(|v| v.abs()).collect();
        // Some miss nothing; one is broken, and neither chosen nor added.
        neurons[..ffn].iter_mut().step_by(3).for_each(|sd| *sd = 0.0);
        let broken = random.below(ffn);
        neurons[2 * ffn + broken] = f32::NAN;
        let (x, mut weight, eps) = (random.values(hidden), random.values(hidden), 1e-3f32);
        // Products are large, or about as large as what they miss.
        let size = (-(random.below(14) as f32)).exp2();
        weight.iter_mut().for_each(|w| *w *= size);
        let (host_x, normed) = (pinned(&vec![7f32; hidden + 1]), pinned(&vec![7f32; hidden + 1]));
        let (scores, activations) = (poisoned(4 * ffn + 4), poisoned(4 * ffn + 4));
        let mut columns: Vec<u32> = (0..hidden as u32).collect();
        (1..hidden).for_each(|i| columns.swap(i, random.below(i + 1)));
        let sketch = DeviceSketch {
            gate: upload(&gate.planes).view(), up: upload(&up.planes).view(), down: upload(&down.planes).view(),
            neurons: upload(&neurons).view(), columns: upload(&columns).view(), up_bits, first: 0, n_neurons: ffn, hidden,
        };
        let (x_view, host_view, normed_view) = (upload(&x).view(), host_x.view(), normed.view());
        let from = LayerInput { hidden, x: &x_view, eps, normed: &normed_view, host_x: with_host.then_some(&host_view) };
        let out = Sketched { scores: &scores.view(), activations: &activations.view(), rows: None };
        sketch_scores(device(), &sketch, from, &upload(&weight).view(), activation, out).unwrap();

        let squares: f64 = wide(&x).iter().map(|x| x * x).sum();
        let scale = 1.0 / (squares / hidden as f64 + f64::from(eps)).sqrt();
        let scale_error = (additions(hidden) + 8.0) * U;
        let input: Vec<f64> = wide(&x).iter().zip(wide(&weight)).map(|(x, w)| x * scale * w).collect();
        let in_columns: Vec<f64> = columns.iter().map(|c| input[*c as usize]).collect();
        let (normed, copy) = (read::<f32>(&normed), read::<f32>(&host_x));
        for (got, want) in normed.iter().zip(&input) {
            assert_near(*got, *want, (scale_error + 3.0 * U) * want.abs(), "normalised input");
        }
        prop_assert!(normed[hidden] == 7.0 && copy[hidden] == 7.0, "nothing after the end");
        let untouched = vec![7.0; hidden];
        prop_assert_eq!(&copy[..hidden], if with_host { &normed[..hidden] } else { &untouched });

        let (scores, activations) = (read::<f32>(&scores), read::<f32>(&activations));
        prop_assert!(scores[ffn].is_nan() && activations[ffn].is_nan(), "nothing after the end");
        let products = |i: usize| [&gate, &up].map(|part| {
            let (product, error) = part.dot(i, &in_columns);
            (product, error + scale_error * error / U)
        });
        let of_neuron = |i: usize| [0, 1, 2, 3].map(|which| f64::from(neurons[which * ffn + i]));
        for i in 0..ffn {
            if i == broken {
                prop_assert_eq!([scores[i], activations[i]], [0.0, 0.0]);
                continue;
            }
            let [(h, h_error), (score, score_error)] = judged(activation, products(i), of_neuron(i));
            assert_near(activations[i], h, h_error, &format!("{activation:?}, activation of neuron {i}"));
            let got = f64::from(scores[i]).powi(2);
            prop_assert!((got - score).abs() <= score_error, "{:?}, neuron {}: {} {} {:e}", activation, i, got, score, score_error);
        }

        // Rows alone, about as costly as one of them.
        let one = random.below(ffn);
        let wanted = row_costs(activation, products(one).map(|(product, _)| product), of_neuron(one))[random.below(3)].0;
        let least = (wanted * f64::from(random.value() + 1.5)).sqrt() as f32;
        let least = if least.is_finite() { least } else { 0.5 };
        let (masks, in_rows, of_rows) = (poisoned(4 * ffn + 4), poisoned(4 * ffn + 4), poisoned(8 * ffn + 8));
        let rows = Some(RowChoice { least, whole, products: &of_rows.view() });
        let out = Sketched { scores: &masks.view(), activations: &in_rows.view(), rows };
        sketch_scores(device(), &sketch, from, &upload(&weight).view(), activation, out).unwrap();
        let (masks, in_rows, of_rows) = (read::<f32>(&masks), read::<f32>(&in_rows), read::<[f32; 2]>(&of_rows));
        prop_assert!(masks[ffn].is_nan() && in_rows[ffn].is_nan() && of_rows[ffn][0].is_nan(), "nothing after the end");
        for i in 0..ffn {
            for (got, (want, error)) in of_rows[i].into_iter().zip(products(i)) {
                assert_near(got, want, error, &format!("product of neuron {i}"));
            }
            let (h, h_error) = judged(activation, products(i), of_neuron(i))[0];
            assert_near(in_rows[i], h, h_error, &format!("{activation:?}, activation of neuron {i}"));
            let limit = f64::from(least).powi(2);
            // What is not a number is read; of what is close to the limit nothing can be said.
            let is_read = row_costs(activation, of_rows[i].map(f64::from), of_neuron(i)).map(|(cost, error)| match cost {
                _ if (cost - limit).abs() <= error => None,
                _ => Some(cost.is_nan() || cost > limit),
            });
            prop_assert!(masks[i] == masks[i].trunc() && (0.0..8.0).contains(&masks[i]), "{} of neuron {}", masks[i], i);
            let any = if is_read.contains(&Some(true)) { Some(true) } else { is_read.into_iter().all(|row| row == Some(false)).then_some(false) };
            for (row, mut is_read) in is_read.into_iter().enumerate() {
                if whole {
                    is_read = any;
                }
                let got = masks[i] as u32 >> row & 1 == 1;
                prop_assert!(is_read.is_none_or(|want| want == got), "{:?}, row {} of neuron {}: {}", activation, row, i, got);
            }
            prop_assert!(!whole || masks[i] == 0.0 || masks[i] == 7.0, "all or nothing");
        }
        prop_assert!(masks[broken] as u32 & 3 == 3, "what is not a number is read");
    }

    #[test]
    fn down_rows_are_added_but_for_those_without_activation(
        units in prop_oneof![1usize..40, Just(64), Just(65)],
        ffn in 1usize..300,
        n_blocks in prop_oneof![1usize..9, Just(0)],
        active_share in 0usize..5,
        seed: u64,
    ) {
        let random = &mut Random::new(seed);
        let hidden = units * SKETCH_UNIT;
        let n_blocks = if n_blocks == 0 { sketch_rows(2 * device().n_multiprocessors(), ffn, hidden) } else { n_blocks };
        let mut down = Part::random(SketchBits::Two, ffn, hidden, random);
        let mut h = random.values(ffn);
        let active: Vec<usize> = (0..ffn).filter(|_| random.below(4) < active_share).collect();
        for &i in &active {
            h[i] = if random.below(2) == 0 { 0.0 } else { -0.0 };
            // Its row's scale, behind the codes: whatever it is, nothing is added.
            down.planes[16 * units * ffn + 2 * i..][..2].copy_from_slice(&[0xff, 0x7f]);
        }
        let sketch = DeviceSketch {
            gate: upload(&down.planes).view(), up: upload(&vec![0u8; ffn * SketchBits::Three.row_bytes(hidden)]).view(),
            down: upload(&down.planes).view(), neurons: upload(&vec![0f32; 4 * ffn]).view(),
            columns: upload(&vec![0u32; hidden]).view(), up_bits: SketchBits::Three, first: 0, n_neurons: ffn, hidden,
        };
        let partial = poisoned(4 * (n_blocks * hidden + 1));
        add_sketched(device(), &sketch, &upload(&h).view(), n_blocks, &partial.view()).unwrap();
        let partial = read::<f32>(&partial);
        prop_assert!(partial[n_blocks * hidden].is_nan(), "nothing after the end");
        let of_block = ffn.div_ceil(n_blocks);
        for (b, got) in partial[..n_blocks * hidden].chunks_exact(hidden).enumerate() {
            let mine = (b * of_block).min(ffn)..((b + 1) * of_block).min(ffn);
            let mine: Vec<usize> = mine.filter(|&i| active.binary_search(&i).is_err()).collect();
            for (c, got) in got.iter().enumerate() {
                let term = |i: &usize, w: f64| f64::from(h[*i]) * w;
                let want: f64 = mine.iter().map(|i| term(i, f64::from(down.weights[i * hidden + c]))).sum();
                // A level is made of a byte from 0 to 255, twice, and 255 that are taken away; it is at least 25.
                let size: f64 = mine.iter().map(|i| term(i, 765.0 / 25.0 * f64::from(down.weights[i * hidden + c])).abs()).sum();
                assert_near(*got, want, (of_block as f64 + 12.0) * U * size, &format!("block {b}, column {c}"));
            }
        }
    }
}
