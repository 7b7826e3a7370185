//! From an example's text to tokens.

use super::read::Line;
use crate::{Error, Result};
use thermocline_datasets::Tokenizer;

/// One example as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskExample {
    /// What every choice goes on from; at least one token.
    pub context: Vec<u32>,
    /// The choices; the only one where a word is to be predicted.
    pub choices: Vec<TaskChoice>,
    /// Which one is right.
    pub answer: usize,
}

/// A continuation that is scored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskChoice {
    /// Its tokens, at least one.
    pub tokens: Vec<u32>,
    /// Bytes of its text, without blanks around it.
    pub bytes: usize,
}

/// A tokenizer, with what it puts in front of a text.
pub(super) struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    /// What a run's prompt would begin with.
    before: Vec<u32>,
    max_context: usize,
}

impl<'a> Encoder<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, max_context: usize) -> Result<Self> {
        let (plain, special) = (tokenizer.encode("a", false)?, tokenizer.encode("a", true)?);
        let at = special.windows(plain.len().max(1)).position(|part| part == plain);
        let before = at.and_then(|at| special.get(..at)).ok_or_else(|| thermocline_datasets::Error::Tokenizer {
            reason: "its special tokens change the text that they stand around; save it without them".to_owned(),
        })?;
        Ok(Encoder { tokenizer, before: before.to_vec(), max_context })
    }

    /// Context and choices are tokenised together, each choice behind the context; where all of these agree with the context
    /// alone is the example's context, and what comes then is scored. So blanks between the two, and tokens that reach
    /// over the border, are the choice's.
    pub(super) fn example(
        &self,
        line: &Line<'_>,
        (context_field, context): (&str, &str),
        choices: &[&str],
        choice_field: &str,
        answer: usize,
    ) -> Result<TaskExample> {
        let (text, blanks) = context.split_at(context.trim_end().len());
        let alone = self.encode(text)?;
        let whole = choices.iter().map(|choice| self.encode(&format!("{text}{blanks}{choice}")));
        let whole = whole.collect::<Result<Vec<_>>>()?;
        let shared = whole.iter().map(|w| w.iter().zip(&alone).take_while(|(a, b)| a == b).count()).min().unwrap_or(0);
        if shared == 0 {
            return Err(line.refuse(context_field, "has no token of its own: there is nothing to predict from"));
        }
        let named = |i: usize| if choices.len() > 1 { format!("{choice_field}[{i}]") } else { choice_field.to_owned() };
        let mut scored = Vec::with_capacity(choices.len());
        for (i, (whole, choice)) in whole.iter().zip(choices).enumerate() {
            if whole.len() > self.max_context {
                let reason = format!(
                    "{} tokens with its context, and the model was trained for {}; shorten it or leave it out",
                    whole.len(),
                    self.max_context
                );
                return Err(line.refuse(named(i), reason));
            }
            let tokens = whole[shared..].to_vec();
            if tokens.is_empty() {
                return Err(line.refuse(named(i), "has no tokens of its own"));
            }
            scored.push(TaskChoice { tokens, bytes: choice.trim().len() });
        }
        Ok(TaskExample { context: alone[..shared].to_vec(), choices: scored, answer })
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut tokens = self.before.clone();
        tokens.extend(self.tokenizer.encode(text, false).map_err(Error::from)?);
        Ok(tokens)
    }
}
