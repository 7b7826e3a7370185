//! Large models with random weights whose feed-forward activations are planted, for measuring engines on sizes and
//! statistics that no free checkpoint has.
//!
//! The embedding of a token carries a code of small integers in reserved channels that no layer writes to. A gate row
//! holds small integers against that code and a threshold against a constant, and nothing else: so a neuron fires at a
//! token if and only if an integer is above a half-integer, at every layer, whatever attention and the other channels
//! do in between, and in any arithmetic that adds up 96 small integers. Thresholds are quantiles of those integers over
//! the vocabulary, so that each neuron has its planted rate. Rates follow a capped power law; codes of neighbouring
//! tokens are correlated (reuse); gate rows of a cluster are too (co-activation); in the second half of the vocabulary,
//! the second domain, another constant is on and part of the thresholds are exchanged (shift).
//!
//! The head is planted as well: greedy decoding goes from token t to token t + 1, and from the last to the first.

mod layer;
mod report;
mod scales;
mod shape;
mod statistics;
mod tokens;

pub use layer::{PlantedLayer, PlantedNeuron};
pub use report::{Measured, PlantedReport};
pub use scales::Scales;
pub use shape::{Channels, Shape};
pub use statistics::{HOT_SHARE, Statistics, n_hot};

use crate::{Activation, ModelConfig, Result};
use std::ops::Range;
use xxhash_rust::xxh3::xxh3_128;

/// Changes when the same settings give another model.
const GENERATION: u32 = 2;
/// Streams of random numbers.
const PATTERN: u64 = 1;
const IDENTITY: u64 = 2;
const SHIFT: u64 = 3;
const GATE: u64 = 4;
/// Tokens over which rates are counted, at most.
const SAMPLED_TOKENS_MAX: usize = 2048;
/// Tokens of the trace, at most.
const TRACE_TOKENS_MAX: usize = 256;

/// A planted model: everything but the bytes.
#[derive(Debug)]
pub struct PlantedModel {
    shape: Shape,
    case: String,
    statistics: Statistics,
    activation: Activation,
    seed: u64,
    /// `[vocab, pattern]`.
    patterns: Vec<i8>,
    /// `[vocab, identity]`.
    identities: Vec<i8>,
    /// Patterns of tokens at equal distances, `[pattern, n_sampled]`.
    sampled: Vec<i16>,
    /// By place in the split's order.
    rates: Vec<f64>,
}

impl PlantedModel {
    /// The model of these settings; `case` is for its name only. Equal settings give an equal model.
    ///
    /// # Errors
    /// If a statistic is out of range, or not possible together with the others.
    pub fn new(shape: Shape, case: &str, statistics: Statistics, seed: u64) -> Result<Self> {
        statistics.check()?;
        let rates = statistics.rates(shape.intermediate_size)?;
        let patterns = tokens::patterns(&shape, &statistics, seed);
        let identities = tokens::identities(&shape, seed);
        let n_sampled = shape.vocab_size.min(SAMPLED_TOKENS_MAX);
        let token = |i: usize| i * shape.vocab_size / n_sampled;
        let width = shape.pattern_channels;
        let sampled = (0..width).flat_map(|c| (0..n_sampled).map(move |i| (token(i), c)));
        let sampled = sampled.map(|(t, c)| i16::from(patterns[t * width + c])).collect();
        let (case, activation) = (case.to_owned(), Activation::Relu);
        Ok(Self { shape, case, statistics, activation, seed, patterns, identities, sampled, rates })
    }

    /// The same weights with SiLU: neurons that do not fire are small and not zero, as in most trained models.
    #[must_use]
    pub fn with_silu(self) -> Self {
        Self { activation: Activation::Silu, ..self }
    }

    /// What it is called everywhere, so that no one takes it for a trained model.
    pub fn name(&self) -> String {
        let activation = if self.activation.is_sparse() { "" } else { "-silu" };
        format!("planted-{}-{}{activation}", self.shape.name, self.case)
    }

    /// What a reader is told of it. No token ends a text: a run is as long as it was asked to be.
    pub fn config(&self) -> ModelConfig {
        ModelConfig { activation: self.activation, ..self.shape.config() }
    }

    /// Its sizes.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// What is planted.
    pub fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// The seed of everything random.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Rates by place in the split's order, in the first domain.
    pub fn rates(&self) -> &[f64] {
        &self.rates
    }

    /// A digest of everything that decides the model.
    pub fn digest(&self) -> String {
        let activation = if self.activation.is_sparse() { "" } else { " silu" };
        let text = format!("{GENERATION} {:?} {:?} {}{activation}", self.shape, self.statistics, self.seed);
        format!("{:032x}", xxh3_128(text.as_bytes()))
    }

    /// Tokens at which the trace of active sets is taken: consecutive ones of the first domain.
    pub fn trace_tokens(&self) -> Range<usize> {
        0..TRACE_TOKENS_MAX.min(self.border())
    }

    /// Tokens over which rates are counted.
    pub fn n_sampled(&self) -> usize {
        self.sampled.len() / self.shape.pattern_channels
    }

    /// The first token of the second domain.
    pub fn border(&self) -> usize {
        self.shape.vocab_size / 2
    }

    /// The domain of a token, 0 or 1.
    pub fn domain(&self, token: usize) -> usize {
        usize::from(token >= self.border())
    }

    /// A token's code `[pattern]`, integers in -7..=7.
    ///
    /// # Panics
    /// If there is no such token.
    pub fn pattern(&self, token: usize) -> &[i8] {
        let width = self.shape.pattern_channels;
        &self.patterns[token * width..(token + 1) * width]
    }

    /// A token's name `[identity]`, 1 or -1.
    ///
    /// # Panics
    /// If there is no such token.
    pub fn identity(&self, token: usize) -> &[i8] {
        let width = self.shape.identity_channels;
        &self.identities[token * width..(token + 1) * width]
    }

    /// The token that greedy decoding goes on with.
    pub fn next(&self, token: usize) -> usize {
        (token + 1) % self.shape.vocab_size
    }

    /// What decides which neurons of layer `index` fire.
    pub fn layer(&self, index: usize) -> PlantedLayer<'_> {
        PlantedLayer::new(self, index)
    }

    /// How large its weights are.
    pub fn scales(&self) -> Scales {
        Scales::new(&self.shape, &self.statistics)
    }

    /// Its `tokenizer.json`: whole words `t0`, `t1`, ...
    pub fn tokenizer_json(&self) -> String {
        tokens::tokenizer_json(self.shape.vocab_size)
    }

    /// `gate . pattern(t)` of the sampled tokens: at most 96 * 49, so 16 bits hold it.
    fn sampled_sums(&self, gate: &[i8]) -> Vec<i16> {
        let n = self.n_sampled();
        let mut sums = vec![0i16; n];
        // Four channels at a time: the sums are read and written a quarter as often.
        for (gate, rows) in gate.chunks_exact(4).zip(self.sampled.chunks_exact(4 * n)) {
            let [a, b, c, d] = [0, 1, 2, 3].map(|i| (i16::from(gate[i]), &rows[i * n..(i + 1) * n]));
            let rows = a.1.iter().zip(b.1).zip(c.1).zip(d.1);
            for (sum, (((p, q), r), s)) in sums.iter_mut().zip(rows) {
                *sum += a.0 * p + b.0 * q + c.0 * r + d.0 * s;
            }
        }
        sums
    }
}
