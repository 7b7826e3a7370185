//! The guesses of one layer.

use super::ahead::Ahead;
use super::copies::Copies;
use super::fit::{GuessFit, LayerFit, needs_split, of_share};
use super::mixture::LowRankAndPrevious;
use super::previous::Previous;
use super::trained::Trained;
use super::{Guess, Guesser, StoredLowRank};
use crate::eval::Mask;
use crate::{Error, Result};
use std::rc::Rc;
use thermocline_calibrate::dense::DenseLayer;
use thermocline_split::Split;

/// Those that some masks ask.
pub(crate) struct Guesses {
    of: Vec<(Mask, Rc<dyn Guess>)>,
}

impl Guesses {
    /// Those of layer `index` that `masks` ask, each once.
    pub(crate) fn load(
        (index, layer): (usize, &DenseLayer),
        down_norm: &[f32],
        split: Option<&Split>,
        fit: Option<&GuessFit>,
        masks: &[Mask],
    ) -> Result<Self> {
        let of_layer = fit.and_then(|fit| fit.layer(index));
        let mut of: Vec<(Mask, Rc<dyn Guess>)> = Vec::new();
        for mask in masks {
            let Mask::Guessed(guesser, share) = *mask else { continue };
            let same = |(loaded, _): &&(Mask, Rc<dyn Guess>)| {
                !guesser.is_fitted_to_share() && matches!(loaded, Mask::Guessed(other, _) if *other == guesser)
            };
            let guess = match of.iter().find(same) {
                Some((_, guess)) => Rc::clone(guess),
                None => load(guesser, share, (index, layer), down_norm, split, of_layer)?,
            };
            of.push((*mask, guess));
        }
        Ok(Self { of })
    }

    /// The guess of `mask`.
    pub(crate) fn of(&self, mask: Mask) -> Option<&dyn Guess> {
        self.of.iter().find(|(of, _)| *of == mask).map(|(_, guess)| guess.as_ref())
    }
}

fn load(
    guesser: Guesser,
    share: f64,
    (index, layer): (usize, &DenseLayer),
    down_norm: &[f32],
    split: Option<&Split>,
    fit: Option<&LayerFit>,
) -> Result<Rc<dyn Guess>> {
    let of_split = || split.ok_or_else(needs_split);
    let unfitted = || unfitted(guesser);
    Ok(match guesser {
        Guesser::Signs => Rc::new(Copies::signs(layer, down_norm)?),
        Guesser::Copies(bits) => {
            let feedback = fit.and_then(|fit| fit.feedback.as_ref()).ok_or_else(unfitted)?;
            Rc::new(Copies::rounded(layer, down_norm, feedback, bits)?)
        }
        Guesser::Previous => Rc::new(Previous::load(of_split()?, index)?),
        Guesser::AheadByOne => Rc::new(Ahead::load(of_split()?, index, 0)?),
        Guesser::AheadByTwo => Rc::new(Ahead::load(of_split()?, index, 1)?),
        Guesser::Trained => {
            let network = fit.and_then(|fit| of_share(&fit.trained, share)).ok_or_else(unfitted)?;
            Rc::new(Trained::new(network)?)
        }
        Guesser::LowRankAndPrevious => {
            let factor = *fit.and_then(|fit| of_share(&fit.factors, share)).ok_or_else(unfitted)?;
            Rc::new(LowRankAndPrevious { predictor: StoredLowRank::load(of_split()?, index)?, factor })
        }
    })
}

/// Of a guess that lacks what it was to be told.
fn unfitted(guesser: Guesser) -> Error {
    Error::Setting { flag: "--mask", reason: format!("{} is not fitted", guesser.name()) }
}
