// What is expected of a neuron whose pre-activations are known only roughly: normal, with known standard deviations. The
// formulas are those of calibrate/src/predictor/expected.rs.
#pragma once
#include "platform.cuh"

// exp within 3e-5 of itself: a power of two by its exponent bits, the rest by a polynomial.
DEVICE float quick_exp(float x) {
  const float t = fminf(fmaxf(x * 1.44269504f, -126.0f), 126.0f);
  // Adding and taking away 1.5 * 2^23 rounds to the nearest whole number.
  const float whole = (t + 12582912.0f) - 12582912.0f, f = t - whole;
  const float p = 1.0f + f * (0.69314718f + f * (0.2402265f + f * (0.0555041f + f * 0.0096181f)));
  return __uint_as_float(static_cast<u32>(static_cast<int>(whole) + 127) << 23) * p;
}

// One of the two factors of an activation, as a function of a normal pre-activation: what the pre-activation's mean gives,
// the expected value, the expected square, the expected square of the distance from `value`.
struct Factor {
  float value, mean, square, error;
};

// silu(v), to first order in the noise.
DEVICE Factor silu_factor(float mean, float sd) {
  const float sigmoid = reciprocal(1.0f + quick_exp(-mean));
  const float value = mean * sigmoid, slope = sigmoid * (1.0f + mean * (1.0f - sigmoid)) * sd;
  return {value, value, value * value + slope * slope, slope * slope};
}

// max(v, 0), with a logistic function in place of the normal distribution's.
DEVICE Factor relu_factor(float mean, float sd) {
  const float value = fmaxf(mean, 0.0f);
  if (sd <= 1e-6f * fabsf(mean)) return {value, value, value * value, 0.0f};
  const float t = mean * reciprocal(sd);
  const float below = reciprocal(1.0f + quick_exp(-1.702f * t)), density = 0.3989423f * quick_exp(-0.5f * t * t);
  const float expected = fmaxf(mean * below + sd * density, 0.0f);
  const float square = fmaxf((mean * mean + sd * sd) * below + mean * sd * density, 0.0f);
  // Roundings can leave less than nothing.
  return {value, expected, square, fmaxf(square - 2.0f * value * expected + value * value, 0.0f)};
}

DEVICE Factor gate_factor(int activation, float mean, float sd) {
  return activation == 0 ? silu_factor(mean, sd) : relu_factor(mean, sd);
}

DEVICE Factor up_factor(int activation, float mean, float sd) {
  if (activation == 2) return relu_factor(mean, sd);
  return {mean, mean, mean * mean + sd * sd, sd * sd};
}

// Root of the expected h^2 if gate and up are normal with these means and standard deviations.
DEVICE float expected_magnitude(int activation, float gate, float up, float gate_sd, float up_sd) {
  return sqrtf(gate_factor(activation, gate, gate_sd).square * up_factor(activation, up, up_sd).square);
}

// Expected (h - v)^2, where v is what the means themselves give.
DEVICE float expected_square_error(int activation, float gate, float up, float gate_sd, float up_sd) {
  const Factor g = gate_factor(activation, gate, gate_sd), u = up_factor(activation, up, up_sd);
  const float value = g.value * u.value;
  // Roundings can leave less than nothing; what is not a number stays so.
  const float error = g.square * u.square - 2.0f * value * (g.mean * u.mean) + value * value;
  return error < 0.0f ? 0.0f : error;
}

// What leaving each of a neuron's rows to its sketch is expected to cost, as squared lengths in the layer's output.
struct RowCosts {
  float gate, up, down;
};
DEVICE RowCosts row_costs(int activation, float gate, float up, float gate_sd, float up_sd, float down, float down_error) {
  const Factor g = gate_factor(activation, gate, gate_sd), u = up_factor(activation, up, up_sd);
  const float square = down * down;
  return {g.error * u.square * square, g.value * g.value * u.error * square, g.square * u.square * (down_error * down_error)};
}
