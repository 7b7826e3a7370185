use super::layer::GATE_SD;
use super::tokens::CODE_SD;
use super::{Shape, Statistics};

/// Mean square of a random 4-bit code, -8..=7 with equal chances.
const CODE_SQUARE: f32 = 21.5;
/// What all layers together add to the free channels' mean square (1 in the embedding), attention and feed-forward
/// half each.
const GROWTH: f32 = 1.0;
/// The next token's logit; all others stay within a few units of zero.
const TOP_LOGIT: f32 = 20.0;

/// How large the weights are, as scales of 4-bit codes, and what comes of it. Chosen so that the residual stream grows
/// little over the layers, gate and up activations are about 1, and attention is neither flat nor stuck on one token.
/// Those that decide whether a neuron fires are powers of two, so that products with codes are exact.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scales {
    /// Of the embedding's pattern codes.
    pub pattern: f32,
    /// The value of a domain's constant, a code of 4 times a scale of 1.
    pub constant: f32,
    /// Of the embedding's identity codes, which are 4 and -4.
    pub identity: f32,
    /// Of the embedding's free channels.
    pub free: f32,
    /// Of the gate's pattern codes.
    pub gate: f32,
    /// Of up rows: an up activation then has a standard deviation of 1.
    pub up: f32,
    /// Of down columns, in the mean over neurons.
    pub down: f32,
    /// Of query, key and value rows.
    pub query: f32,
    /// Of attention's output rows.
    pub output: f32,
    /// Of the head's identity codes, which are 7 and -7.
    pub head: f32,
    /// Of the head's free channels.
    pub head_free: f32,
    /// Standard deviation of a gate row's sum over a token's code, in codes.
    pub sum_sd: f32,
    shares: [f32; 2],
    n_layers: usize,
}

impl Scales {
    pub(super) fn new(shape: &Shape, statistics: &Statistics) -> Self {
        let (hidden, layers) = (shape.hidden_size as f32, shape.n_layers as f32);
        let channels = shape.channels();
        let (pattern, gate, constant) = (0.5, 1.0 / 32.0, 4.0);
        let n_free = channels.free.len() as f32;
        let reserved = shape.pattern_channels as f32 * (pattern * CODE_SD).powi(2)
            + constant * constant
            + shape.identity_channels as f32;
        let shares = [(reserved + n_free) / hidden, GROWTH * n_free / hidden];
        let sum_sd = (shape.pattern_channels as f32).sqrt() * CODE_SD * GATE_SD;
        let final_scale = 1.0 / (shares[0] + shares[1]).sqrt();

        // A neuron that fires is above its threshold by a normal variable's tail: about half a variance in the square.
        let gate_sd = sum_sd * gate * pattern / shares[0].sqrt();
        let active = statistics.active_share as f32 * shape.intermediate_size as f32;
        let added = GROWTH / (2.0 * layers);
        let random = CODE_SQUARE.sqrt();
        let query = 1.0 / (random * hidden.sqrt());
        Self {
            pattern,
            constant,
            identity: 0.25,
            free: 1.0 / random,
            gate,
            up: query,
            down: (added / (0.5 * active * gate_sd * gate_sd)).sqrt() / random,
            query,
            output: (added / (shape.n_heads * shape.head_dim) as f32).sqrt() / random,
            head: TOP_LOGIT / (shape.identity_channels as f32 * final_scale) / 7.0,
            head_free: 0.5 / (random * (n_free * (1.0 + GROWTH)).sqrt() * final_scale),
            sum_sd,
            shares,
            n_layers: shape.n_layers,
        }
    }

    /// About what RMSNorm multiplies the residual stream with in front of layer `l`'s feed-forward part.
    pub fn norm(&self, l: usize) -> f32 {
        1.0 / (self.shares[0] + self.shares[1] * l as f32 / self.n_layers as f32).sqrt()
    }

    /// About the mean square of each channel that layer `l`'s neurons read, `[hidden]`, over the tokens of both domains; for a
    /// model of this shape, which the scales are of.
    pub fn input_mean_squares(&self, shape: &Shape, l: usize) -> Vec<f32> {
        let channels = shape.channels();
        let mut squares = vec![1.0 + GROWTH * l as f32 / self.n_layers as f32; shape.hidden_size];
        squares[channels.pattern].fill((self.pattern * CODE_SD).powi(2));
        for group in channels.constants {
            squares[group.clone()].fill(0.0);
            // Half of the tokens have it.
            squares[group.start] = self.constant * self.constant / 2.0;
        }
        squares[channels.identity].fill(1.0);
        let norm = self.norm(l);
        squares.iter_mut().for_each(|square| *square *= norm * norm);
        squares
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normed_inputs_have_a_mean_square_of_one() {
        for shape in Shape::ALL {
            let scales = Scales::new(&shape, &Statistics::case("a").unwrap());
            for l in [0, shape.n_layers / 2, shape.n_layers - 1] {
                let squares = scales.input_mean_squares(&shape, l);
                let mean = squares.iter().sum::<f32>() / shape.hidden_size as f32;
                assert!((mean - 1.0).abs() < 1e-3, "{}, layer {l}: {mean}", shape.name);
            }
        }
    }
}
