//! One layer under a guess.

use super::{Cost, Guess, Guesser, Seen};
use crate::Result;
use crate::eval::{Mask, active_count};
use thermocline_calibrate::dense::DenseLayer;
use thermocline_runtime::LayerActive;
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
        let (width, active) = (ctx * layer.hidden_size(), LayerActive::top(active_count(share, down_norm.len())));
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
            tally = tally + mask.apply(&mut h, &mut [], down_norm, Some(&scores), Some(&active));
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::eval::guess::tests::{layers, noise};
    use std::cell::RefCell;

    /// Notes what it sees, and scores as the neurons give.
    #[derive(Default)]
    struct Observer {
        earlier: RefCell<Vec<Vec<Vec<f32>>>>,
    }

    impl Guess for Observer {
        fn scores(&self, seen: &Seen<'_>) -> Result<Vec<f32>> {
            self.earlier.borrow_mut().push(seen.earlier.iter().map(|x| x.to_vec()).collect());
            Ok(seen.given.to_vec())
        }

        fn cost(&self) -> Cost {
            Cost { bytes: 3.0, multiply_adds: 5.0 }
        }
    }

    /// Against the oracle's mask, whose choice it is, layer by layer and window by window.
    #[test]
    fn guesses_see_the_streams_of_layers_before() {
        let (layers, ctx) = (layers(3), 5);
        let width = ctx * layers[0].hidden_size();
        let mut x = noise(2 * width, 1);
        let mut by_hand = x.clone();
        let (mut guessed, mut attended) = (Guessed::default(), Vec::<Vec<Vec<f32>>>::new());
        for layer in &layers {
            let (norms, observer) = (layer.down_norms().unwrap(), Observer::default());
            let of = (Guesser::AheadByTwo, 0.4);
            let tally = guessed.forward(of, &observer, (layer, &norms), &mut x, ctx).unwrap();
            assert!((tally.quality(0).recall - 1.0).abs() < 1e-9);
            let mut of_layer = Vec::new();
            for window in by_hand.chunks_exact_mut(width) {
                let mut next = layer.attention(window, 1, ctx).unwrap();
                of_layer.push(next.clone());
                let mut h = layer.neurons(&layer.ffn_input(&next).unwrap()).unwrap().h;
                Mask::Oracle(0.4).apply(&mut h, &mut [], &norms, None, None);
                layer.ffn_output(&mut next, h).unwrap();
                window.copy_from_slice(&next);
            }
            assert_eq!(x, by_hand);
            for (i, seen) in observer.earlier.into_inner().into_iter().enumerate() {
                let wanted: Vec<Vec<f32>> = attended.iter().rev().take(2).map(|layer| layer[i].clone()).collect();
                assert_eq!(seen, wanted);
            }
            attended.push(of_layer);
        }
        assert_eq!(guessed.cost, Cost { bytes: 9.0, multiply_adds: 15.0 });
        assert_eq!(guessed.earlier.len(), 2);
    }
}
