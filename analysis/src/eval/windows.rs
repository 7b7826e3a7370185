use crate::{Error, Result};

/// The first `n` windows of `ctx` tokens of a text; they do not overlap, and none sees another.
#[derive(Debug, Clone, Copy)]
pub struct Windows<'a> {
    tokens: &'a [u32],
    ctx: usize,
}

impl<'a> Windows<'a> {
    /// Cuts `tokens`, a whole text without special tokens.
    ///
    /// # Errors
    /// If a window has fewer than two tokens, or the text is too short.
    pub fn new(tokens: &'a [u32], ctx: usize, n: usize) -> Result<Self> {
        if ctx < 2 {
            let reason = format!("{ctx}: a window needs two tokens, one to predict the other");
            return Err(Error::Setting { flag: "--ctx", reason });
        }
        let wanted = ctx.checked_mul(n).filter(|&wanted| wanted > 0 && wanted <= tokens.len());
        let Some(wanted) = wanted else {
            let reason = format!("{n}: the text has {} tokens, {} windows of {ctx}", tokens.len(), tokens.len() / ctx);
            return Err(Error::Setting { flag: "--windows", reason });
        };
        Ok(Windows { tokens: &tokens[..wanted], ctx })
    }

    /// All tokens, `[n_windows * ctx]`.
    pub fn tokens(&self) -> &'a [u32] {
        self.tokens
    }

    /// Tokens in a window.
    pub fn ctx(&self) -> usize {
        self.ctx
    }

    /// Windows.
    pub fn len(&self) -> usize {
        self.tokens.len() / self.ctx
    }

    /// Never: there is at least one window.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The token that follows `position` in its window.
    pub(crate) fn next(&self, position: usize) -> Option<u32> {
        if (position + 1).is_multiple_of(self.ctx) { None } else { self.tokens.get(position + 1).copied() }
    }
}
