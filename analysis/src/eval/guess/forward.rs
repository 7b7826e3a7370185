//! One layer under a guess.

use super::{Cost, Guess, Guesser, Seen};
use crate::Result;
use crate::eval::{Mask, active_count};
use thermocline_calibrate::dense::DenseLayer;
use thermocline_runtime::quality::Tally;

/// What a guess keeps from layer to layer.
#[derive(Debug, Default)]
pub(crate) struct Guessed {
    /// The residual stream that the layers before normalised for their neurons, the last one first, `[n_tokens, hidden_size]` each.
    earlier: Vec<Vec<f32>>,
    /// What asking took so far.
    pub cost: Cost,
}

impl Guessed {
    /// Takes `x [n_tokens, hidden_size]`, in windows of `ctx`, through the layer with the `share` of neurons that `guess` names.
    pub(crate) fn forward(
        &mut self,
        (guesser, share): (Guesser, f64),
        guess: &dyn Guess,
        (layer, down_norm): (&DenseLayer, &[f32]),
        x: &mut [f32],
        ctx: usize,
    ) -> Result<Tally> {
        let (width, n_chosen) = (ctx * layer.hidden_size(), active_count(share, down_norm.len()));
        let (mut tally, mut attended) = (Tally::default(), Vec::new());
        for (i, window) in x.chunks_exact_mut(width).enumerate() {
            let mut next = layer.attention(window, 1, ctx)?;
            let input = layer.ffn_input(&next)?;
            let mut h = layer.neurons(&input)?.h;
            let of_row = |h: &[f32]| h.iter().zip(down_norm).map(|(h, d)| h.abs() * d).collect::<Vec<f32>>();
            let given: Vec<f32> = h.chunks_exact(down_norm.len()).flat_map(of_row).collect();
            let earlier: Vec<&[f32]> = self.earlier.iter().map(|x| &x[i * width..(i + 1) * width]).collect();
            let scores = guess.scores(&Seen { layer, input: &input, earlier: &earlier, given: &given })?;
            let mask = Mask::Guessed(guesser, share);
            tally = tally + mask.apply(&mut h, &mut [], down_norm, Some(&scores), n_chosen);
            if guesser.looks_back() > 0 {
                attended.extend_from_slice(&next);
            }
            layer.ffn_output(&mut next, h)?;
            window.copy_from_slice(&next);
        }
        self.earlier.insert(0, attended);
        self.earlier.truncate(guesser.looks_back());
        self.cost += guess.cost();
        Ok(tally)
    }
}
