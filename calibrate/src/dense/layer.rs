use crate::{
    Result,
    dense::{
        attention::{Attention, AttentionInputs, Mixtures},
        linear::{Linear, load_checked, tensor, with_values},
        norm::rms_norm,
        sequence::Sequence,
    },
    error::check_len,
};
use candle_core::Tensor;
use rayon::prelude::*;
use thermocline_datasets::{Activation, Checkpoint, ModelConfig};

/// What the neurons of a layer did for a batch of tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Activations {
    /// `h = act(g . x) * (u . x)`, `[n_tokens, intermediate_size]`.
    pub h: Vec<f32>,
    /// Tokens.
    pub n_tokens: usize,
    /// Neurons.
    pub intermediate_size: usize,
}

/// A matrix of a layer, for those who change what it reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Projection {
    /// `q_proj`.
    Query,
    /// `k_proj`.
    Key,
    /// `v_proj`.
    Value,
    /// `o_proj`.
    Output,
    /// `gate_proj`.
    Gate,
    /// `up_proj`.
    Up,
    /// `down_proj`.
    Down,
}

impl Projection {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 7] = [Self::Query, Self::Key, Self::Value, Self::Output, Self::Gate, Self::Up, Self::Down];
}

/// One decoder layer's weights as f32, about
/// `4 * hidden_size * (3 * intermediate_size + 2 * (n_heads + n_kv_heads) * head_dim)` bytes.
pub struct DenseLayer {
    attention: Attention,
    attention_norm: Vec<f32>,
    ffn_norm: Vec<f32>,
    gate: Linear,
    up: Linear,
    down: Linear,
    activation: Activation,
    eps: f32,
}

impl DenseLayer {
    /// Loads layer `index`.
    ///
    /// # Errors
    /// If a tensor is missing, unreadable or of another shape than the configuration says.
    pub fn load(checkpoint: &dyn Checkpoint, index: usize) -> Result<Self> {
        let config: &ModelConfig = checkpoint.config();
        let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
        let prefix = format!("model.layers.{index}.");
        let vector = |name: &str| load_checked(checkpoint, &format!("{prefix}{name}.weight"), hidden);
        let mlp = |name: &str, shape| Linear::load(checkpoint, &format!("{prefix}mlp.{name}_proj"), shape, false);
        Ok(DenseLayer {
            attention: Attention::load(checkpoint, &prefix, config)?,
            attention_norm: vector("input_layernorm")?,
            ffn_norm: vector("post_attention_layernorm")?,
            gate: mlp("gate", [ffn, hidden])?,
            up: mlp("up", [ffn, hidden])?,
            down: mlp("down", [hidden, ffn])?,
            activation: config.activation,
            eps: config.rms_norm_eps,
        })
    }

    /// The attention half: `x + attention(norm(x))`, `[n_windows * window_len, hidden_size]`.
    /// Positions start at 0 in each window and see their own window only.
    ///
    /// # Errors
    /// If `x` has another length.
    pub fn attention(&self, x: &[f32], n_windows: usize, window_len: usize) -> Result<Vec<f32>> {
        self.attention_in(x, &vec![Sequence::plain(window_len); n_windows])
    }

    /// As [`DenseLayer::attention`], for the rows of `sequences` one after the other, `[n_rows, hidden_size]`.
    ///
    /// # Errors
    /// If `x` has another length.
    pub fn attention_in(&self, x: &[f32], sequences: &[Sequence]) -> Result<Vec<f32>> {
        let normed = self.attention_input(x, sequences)?;
        let mixed = self.attention.mix([&normed; 3], sequences, None)?;
        self.attended(x, &mixed)
    }

    /// As [`DenseLayer::attention`], and shows what the projections read.
    ///
    /// # Errors
    /// If `x` has another length.
    pub fn attention_observed(
        &self,
        x: &[f32],
        n_windows: usize,
        window_len: usize,
        observe: impl FnOnce(AttentionInputs<'_>),
    ) -> Result<Vec<f32>> {
        let sequences = vec![Sequence::plain(window_len); n_windows];
        let normed = self.attention_input(x, &sequences)?;
        let mut mixtures = Mixtures::new(&normed)?;
        let mixed = self.attention.mix([&normed; 3], &sequences, Some(&mut mixtures))?;
        let mixtures = &mixtures.rows;
        with_values(&normed, |qkv| with_values(&mixed, |output| observe(AttentionInputs { qkv, mixtures, output })))??;
        self.attended(x, &mixed)
    }

    /// Normalised rows of `sequences`, `[n_rows, hidden_size]`.
    fn attention_input(&self, x: &[f32], sequences: &[Sequence]) -> Result<Tensor> {
        let (n, hidden) = (sequences.iter().map(Sequence::n_rows).sum::<usize>(), self.hidden_size());
        check_len("attention input", x.len(), n * hidden)?;
        tensor(rms_norm(x, &self.attention_norm, self.eps), &[n, hidden])
    }

    /// `x`, and what the output projection makes of `mixed`.
    fn attended(&self, x: &[f32], mixed: &Tensor) -> Result<Vec<f32>> {
        let mut out = x.to_vec();
        with_values(&self.attention.project(mixed)?, |delta| add(&mut out, delta))?;
        Ok(out)
    }

    /// The whole layer for one sequence's rows `x [n_rows, hidden_size]`; every projection reads its input as `change` leaves
    /// it, `[n_rows, n_in]`.
    ///
    /// # Errors
    /// If `x` has another length.
    pub fn changed(&self, x: &[f32], sequence: &Sequence, change: impl Fn(Projection, &mut [f32])) -> Result<Vec<f32>> {
        let (hidden, n) = (self.hidden_size(), sequence.n_rows());
        check_len("layer's input", x.len(), n * hidden)?;
        let of = |projection, mut values: Vec<f32>| {
            change(projection, &mut values);
            let n_in = values.len() / n.max(1);
            tensor(values, &[n, n_in])
        };
        let normed = rms_norm(x, &self.attention_norm, self.eps);
        let [q, k, v] = [Projection::Query, Projection::Key, Projection::Value].map(|p| of(p, normed.clone()));
        let mixed =
            with_values(&self.attention.mix([&q?, &k?, &v?], std::slice::from_ref(sequence), None)?, <[f32]>::to_vec)?;
        let mut out = self.attended(x, &of(Projection::Output, mixed)?)?;
        let input = self.ffn_input(&out)?;
        let (gate, up) = (of(Projection::Gate, input.clone())?, of(Projection::Up, input)?);
        let (gate, up) = (self.gate.forward(&gate)?, self.up.forward(&up)?);
        let mut h = self.activate(&gate, &up, n)?;
        change(Projection::Down, &mut h);
        self.ffn_output(&mut out, h)?;
        Ok(out)
    }

    /// Lengths of the columns of a matrix, `[n_in]`.
    ///
    /// # Errors
    /// None in practice; candle's accessors are fallible.
    pub fn column_norms(&self, projection: Projection) -> Result<Vec<f32>> {
        let [query, key, value, output] = self.attention.projections();
        match projection {
            Projection::Query => query,
            Projection::Key => key,
            Projection::Value => value,
            Projection::Output => output,
            Projection::Gate => &self.gate,
            Projection::Up => &self.up,
            Projection::Down => &self.down,
        }
        .column_norms()
    }

    /// The normalised input of the feed-forward half, `[n_tokens, hidden_size]`.
    ///
    /// # Errors
    /// If `x` is not a whole number of rows.
    pub fn ffn_input(&self, x: &[f32]) -> Result<Vec<f32>> {
        let hidden = self.hidden_size();
        check_len("feed-forward input", x.len(), x.len() / hidden * hidden)?;
        Ok(rms_norm(x, &self.ffn_norm, self.eps))
    }

    /// Activations for `input` (of [`DenseLayer::ffn_input`]), `[n_tokens, hidden_size]`.
    ///
    /// # Errors
    /// If `input` is not a whole number of rows.
    pub fn neurons(&self, input: &[f32]) -> Result<Activations> {
        let (hidden, ffn) = (self.hidden_size(), self.intermediate_size());
        let n_tokens = input.len() / hidden;
        check_len("neurons' input", input.len(), n_tokens * hidden)?;
        let input = tensor(input.to_vec(), &[n_tokens, hidden])?;
        let h = self.activate(&self.gate.forward(&input)?, &self.up.forward(&input)?, n_tokens)?;
        Ok(Activations { h, n_tokens, intermediate_size: ffn })
    }

    /// Gate and up pre-activations for `input` of [`DenseLayer::ffn_input`], `[n_tokens, intermediate_size]` each.
    ///
    /// # Errors
    /// If `input` is not a whole number of rows.
    pub fn pre_activations(&self, input: &[f32]) -> Result<[Vec<f32>; 2]> {
        let (hidden, n) = (self.hidden_size(), input.len() / self.hidden_size());
        check_len("pre-activations' input", input.len(), n * hidden)?;
        let input = tensor(input.to_vec(), &[n, hidden])?;
        let product = |matrix: &Linear| with_values(&matrix.forward(&input)?, <[f32]>::to_vec);
        Ok([product(&self.gate)?, product(&self.up)?])
    }

    fn activate(&self, gate: &Tensor, up: &Tensor, n_tokens: usize) -> Result<Vec<f32>> {
        let ffn = self.intermediate_size();
        let mut h = vec![0.0f32; n_tokens * ffn];
        with_values(gate, |gate| {
            with_values(up, |up| {
                let rows = gate.par_chunks(ffn).zip(up.par_chunks(ffn));
                h.par_chunks_mut(ffn).zip(rows).for_each(|(h, (gate, up))| {
                    for ((h, &gate), &up) in h.iter_mut().zip(gate).zip(up) {
                        *h = self.activation.apply(gate, up);
                    }
                });
            })
        })??;
        Ok(h)
    }

    /// What the gates let through, `act(g . x)`, for `input` of [`DenseLayer::ffn_input`]: `[n_tokens, intermediate_size]`.
    ///
    /// # Errors
    /// If `input` is not a whole number of rows.
    pub fn gates(&self, input: &[f32]) -> Result<Vec<f32>> {
        let (hidden, n) = (self.hidden_size(), input.len() / self.hidden_size());
        check_len("gates' input", input.len(), n * hidden)?;
        let gate = self.gate.forward(&tensor(input.to_vec(), &[n, hidden])?)?;
        with_values(&gate, |gate| gate.par_iter().map(|&g| self.activation.apply(g, 1.0)).collect())
    }

    /// Adds the feed-forward output `h [n_tokens, intermediate_size]` times `down_proj` to `x [n_tokens, hidden_size]`.
    ///
    /// # Errors
    /// If `h` and `x` have different numbers of rows.
    pub fn ffn_output(&self, x: &mut [f32], h: Vec<f32>) -> Result<()> {
        let n_tokens = x.len() / self.hidden_size();
        check_len("activations", h.len(), n_tokens * self.intermediate_size())?;
        let h = tensor(h, &[n_tokens, self.intermediate_size()])?;
        with_values(&self.down.forward(&h)?, |delta| add(x, delta))
    }

    /// `||d_i||` of every neuron: the norms of the columns of `down_proj`, `[intermediate_size]`.
    ///
    /// # Errors
    /// None in practice; candle's accessors are fallible.
    pub fn down_norms(&self) -> Result<Vec<f32>> {
        self.down.column_norms()
    }

    /// `gate_proj` and `up_proj`, row-major `[intermediate_size, hidden_size]` each.
    ///
    /// # Errors
    /// None in practice; candle's accessors are fallible.
    pub fn with_gate_up<T>(&self, read: impl FnOnce(&[f32], &[f32]) -> T) -> Result<T> {
        self.gate.with_weight(|gate| self.up.with_weight(|up| read(gate, up)))?
    }

    /// The nonlinearity.
    pub fn activation(&self) -> Activation {
        self.activation
    }

    /// Width of the residual stream.
    pub fn hidden_size(&self) -> usize {
        self.gate.n_in()
    }

    /// Neurons.
    pub fn intermediate_size(&self) -> usize {
        self.gate.n_out()
    }
}

fn add(x: &mut [f32], delta: &[f32]) {
    x.iter_mut().zip(delta).for_each(|(x, d)| *x += d);
}
