//! What is expected of a neuron whose pre-activations are known only roughly: normal, with known standard deviations.

use thermocline_datasets::Activation;

/// Root of the expected `h^2` if gate and up are normal with means `gate` and `up` and these standard deviations.
#[inline]
pub fn expected_magnitude(activation: Activation, gate: f32, up: f32, gate_sd: f32, up_sd: f32) -> f32 {
    let [gate, up] = factors(activation, gate, up, gate_sd, up_sd);
    (gate.square * up.square).sqrt()
}

/// Root of the expected `(h - v)^2`, where `v` is what the means `gate` and `up` themselves give: the error of taking them for
/// the neuron's own. A neuron may be small and yet uncertain, so that its error counts, and large and certain.
#[inline]
pub fn expected_error(activation: Activation, gate: f32, up: f32, gate_sd: f32, up_sd: f32) -> f32 {
    let [g, u] = factors(activation, gate, up, gate_sd, up_sd);
    let value = g.value * u.value;
    // E[(g u)^2] - 2 v E[g u] + v^2; roundings can leave less than nothing.
    (g.square * u.square - 2.0 * value * (g.mean * u.mean) + value * value).max(0.0).sqrt()
}

/// What is expected of a neuron's rows, if gate and up are normal with means `gate` and `up` and these standard deviations.
#[inline]
pub fn expected_rows(activation: Activation, gate: f32, up: f32, gate_sd: f32, up_sd: f32) -> ExpectedRows {
    let [g, u] = factors(activation, gate, up, gate_sd, up_sd);
    ExpectedRows { gate: g.error * u.square, up: g.value * g.value * u.error, square: g.square * u.square }
}

/// Squares of activations.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpectedRows {
    /// Expected square of what is missed if only the gate row's product is taken for its mean: what reading that row spares.
    pub gate: f32,
    /// The same of the up row, where the gate stays as it is.
    pub up: f32,
    /// Expected `h^2`.
    pub square: f32,
}

/// One of the two factors of an activation, as a function of a normal pre-activation.
#[derive(Clone, Copy)]
struct Factor {
    /// Of the pre-activation's mean.
    value: f32,
    /// Expected value.
    mean: f32,
    /// Expected square.
    square: f32,
    /// Expected square of the distance from `value`.
    error: f32,
}

#[inline]
fn factors(activation: Activation, gate: f32, up: f32, gate_sd: f32, up_sd: f32) -> [Factor; 2] {
    let up = match activation {
        Activation::Silu | Activation::Relu => {
            Factor { value: up, mean: up, square: up * up + up_sd * up_sd, error: up_sd * up_sd }
        }
        Activation::Drelu => relu(up, up_sd),
    };
    let gate = match activation {
        Activation::Silu => silu(gate, gate_sd),
        Activation::Relu | Activation::Drelu => relu(gate, gate_sd),
    };
    [gate, up]
}

/// `exp`, within 3e-5 of itself: scores only rank neurons, and this one becomes vector code.
/// A power of two by its exponent bits, the rest by a polynomial (the Taylor series of `2^f` to the fourth power).
#[inline]
pub(super) fn exp(x: f32) -> f32 {
    let t = (x * std::f32::consts::LOG2_E).clamp(-126.0, 126.0);
    // Adding and taking away 1.5 * 2^23 rounds to the nearest whole number.
    let whole = (t + 12_582_912.0) - 12_582_912.0;
    let f = t - whole;
    let p = 1.0 + f * (std::f32::consts::LN_2 + f * (0.240_226_5 + f * (0.055_504_1 + f * 0.009_618_1)));
    f32::from_bits(((whole as i32 + 127) << 23) as u32) * p
}

/// `silu(v)`, to first order in the noise.
#[inline]
fn silu(mean: f32, sd: f32) -> Factor {
    let sigmoid = 1.0 / (1.0 + exp(-mean));
    let (value, slope) = (mean * sigmoid, sigmoid * (1.0 + mean * (1.0 - sigmoid)));
    let error = (slope * sd).powi(2);
    Factor { value, mean: value, square: value * value + error, error }
}

/// `max(v, 0)`; the normal distribution function is replaced by a logistic one (within 0.01 everywhere), so that a kernel
/// needs exponentials only.
#[inline]
fn relu(mean: f32, sd: f32) -> Factor {
    let value = mean.max(0.0);
    if sd <= 1e-6 * mean.abs() {
        return Factor { value, mean: value, square: value * value, error: 0.0 };
    }
    let t = mean / sd;
    let below = 1.0 / (1.0 + exp(-1.702 * t));
    let density = 0.398_942_3 * exp(-0.5 * t * t);
    // The approximation can make a tiny value negative.
    let square = ((mean * mean + sd * sd) * below + mean * sd * density).max(0.0);
    let expected = (mean * below + sd * density).max(0.0);
    // Roundings can leave less than nothing.
    let error = (square - 2.0 * value * expected + value * value).max(0.0);
    Factor { value, mean: expected, square, error }
}

#[cfg(test)]
mod tests {
    use super::*;
    use thermocline_datasets::Random;

    /// Activations, gate, up and their standard deviations where the formulas are exact or close to it: small noise for SiLU, any
    /// for ReLU.
    const CASES: [(Activation, f32, f32, f32, f32); 5] = [
        (Activation::Silu, 0.7, -1.3, 0.05, 0.2),
        (Activation::Silu, -3.0, 2.0, 0.1, 0.1),
        (Activation::Relu, 0.5, 1.0, 0.8, 0.3),
        (Activation::Relu, -1.0, 1.0, 0.8, 0.3),
        (Activation::Drelu, 0.5, -0.2, 0.5, 0.5),
    ];

    /// Against samples.
    #[test]
    fn expectations_are_those_of_samples() {
        let mut random = Random::new(3);
        for (activation, gate, up, gate_sd, up_sd) in CASES {
            let value = f64::from(activation.apply(gate, up));
            let (mut square, mut error) = (0.0, 0.0);
            const N: usize = 20_000;
            for _ in 0..N {
                let (g, u) = (gate + gate_sd * random.normal(), up + up_sd * random.normal());
                let h = f64::from(activation.apply(g, u));
                square += h * h / N as f64;
                error += (h - value).powi(2) / N as f64;
            }
            let got = [expected_magnitude, expected_error].map(|f| f64::from(f(activation, gate, up, gate_sd, up_sd)));
            for (got, expected) in got.into_iter().zip([square.sqrt(), error.sqrt()]) {
                assert!(
                    (got - expected).abs() < 0.05 * expected + 0.004,
                    "{activation:?} {gate} {up}: {got} {expected}"
                );
            }
        }
    }

    /// Each row's error against samples, in the first two of which the other row is known.
    #[test]
    fn errors_of_rows_are_those_of_samples() {
        let mut random = Random::new(5);
        for (activation, gate, up, gate_sd, up_sd) in CASES {
            let value = |gate: f32, up: f32| f64::from(activation.apply(gate, up));
            let mut errors = [0.0; 3];
            const N: usize = 20_000;
            for _ in 0..N {
                let (g, u) = (gate + gate_sd * random.normal(), up + up_sd * random.normal());
                let of =
                    [value(gate, u) - value(gate, up), value(g, up) - value(gate, up), value(g, u) - value(gate, u)];
                errors.iter_mut().zip(of).for_each(|(sum, of)| *sum += of * of / N as f64);
            }
            let rows = expected_rows(activation, gate, up, gate_sd, up_sd);
            let of_known_up = expected_rows(activation, gate, up, gate_sd, 0.0);
            let got = [rows.up, of_known_up.gate, rows.gate];
            for (got, expected) in got.into_iter().zip(errors) {
                let got = f64::from(got);
                assert!((got - expected).abs() < 0.1 * expected + 1e-4, "{activation:?} {gate} {up}: {got} {expected}");
            }
        }
    }

    #[test]
    fn what_is_known_has_no_error() {
        for activation in [Activation::Silu, Activation::Relu, Activation::Drelu] {
            for (gate, up) in [(1.5, -2.0), (-1.5, 2.0), (0.3, 0.1)] {
                assert!(expected_error(activation, gate, up, 0.0, 0.0) < 1e-3);
                let h = activation.apply(gate, up).abs();
                assert!((expected_magnitude(activation, gate, up, 0.0, 0.0) - h).abs() <= 1e-3 * h + 1e-4);
            }
        }
    }
}
