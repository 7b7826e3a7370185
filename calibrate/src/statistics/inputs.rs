//! What a layer's projections read.

use thermocline_datasets::ModelConfig;

/// The input of a group of projections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// That of gate and up, `[hidden_size]`.
    Ffn,
    /// That of the query, key and value projections, `[hidden_size]`.
    Qkv,
    /// That of the output projection, `[n_heads * head_dim]`.
    AttentionOutput,
    /// Mixtures of the value projection's, as heads weight them, `[hidden_size]` ([`AttentionInputs::mixtures`]): what an error of
    /// the projection is multiplied with before it leaves attention. Few tokens can be most of these.
    ///
    /// [`AttentionInputs::mixtures`]: crate::dense::AttentionInputs::mixtures
    Mixture,
}

impl Input {
    /// In the order in which a layer's sums have them.
    pub(crate) const ALL: [Input; 4] = [Input::Ffn, Input::Qkv, Input::AttentionOutput, Input::Mixture];

    /// Its channels.
    pub(crate) fn width(self, config: &ModelConfig) -> usize {
        match self {
            Input::Ffn | Input::Qkv | Input::Mixture => config.hidden_size,
            Input::AttentionOutput => config.n_heads * config.head_dim,
        }
    }

    /// What errors call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Input::Ffn => "feed-forward input",
            Input::Qkv => "attention input",
            Input::AttentionOutput => "attention output",
            Input::Mixture => "mixture of attention inputs",
        }
    }

    /// The section with the sums of its squares.
    pub(crate) fn squares(self) -> &'static str {
        match self {
            Input::Ffn => "ffn_input_square_sum",
            Input::Qkv => "qkv_input_square_sum",
            Input::AttentionOutput => "attention_output_square_sum",
            Input::Mixture => "mixture_square_sum",
        }
    }

    /// The section with the sums of its channels' products.
    pub(crate) fn moment(self) -> &'static str {
        match self {
            Input::Ffn => "ffn_input_second_moment",
            Input::Qkv => "qkv_input_second_moment",
            Input::AttentionOutput => "attention_output_second_moment",
            Input::Mixture => "mixture_second_moment",
        }
    }
}
