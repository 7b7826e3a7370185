use super::Tokenizer;

/// Tokens that are kept back at most while they may still become a character: four bytes make the longest one, and
/// a token holds at least one byte.
const MAX_PENDING: usize = 4;

/// Turns tokens into text as they come, holding back those that are parts of a character only.
///
/// A few tokens before the new ones are decoded with them, since what a token adds to a text can depend on whether
/// it comes first.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens whose text was given out already, kept as context, then those that are held back.
    ids: Vec<u32>,
    n_context: usize,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), n_context: 0 }
    }

    /// Adds a token; gives the text that is complete now, if there is any.
    pub fn push(&mut self, id: u32) -> Option<String> {
        self.ids.push(id);
        let pending = self.ids.len().saturating_sub(self.n_context);
        self.take(pending < MAX_PENDING)
    }

    /// What is still held back, with U+FFFD for what never became a character.
    pub fn finish(mut self) -> Option<String> {
        self.take(false)
    }

    fn take(&mut self, may_wait: bool) -> Option<String> {
        let context = self.tokenizer.decode(self.ids.get(..self.n_context)?).ok()?;
        let text = self.tokenizer.decode(&self.ids).ok()?;
        if may_wait && text.ends_with(char::REPLACEMENT_CHARACTER) {
            return None;
        }
        // A context that ended in half a character reads differently once more bytes follow; the common start is
        // what was certainly given out.
        let given: usize =
            context.chars().zip(text.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
        let new = text.get(given..).unwrap_or_default().to_owned();
        if new.is_empty() && may_wait {
            return None;
        }
        self.ids.drain(..self.n_context);
        self.n_context = self.ids.len();
        (!new.is_empty()).then_some(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::write::{TinyModel, tiny_tokenizer_json};

    #[test]
    fn characters_come_whole_and_texts_complete() {
        let tokenizer = Tokenizer::from_json(&tiny_tokenizer_json(&TinyModel::default())).expect("tokenizer");
        for text in ["the thing and the 语言 \u{1F980} on", "é", "", "\u{1F980}\u{1F980}", "a\n\n b  c"] {
            let mut stream = tokenizer.decode_stream();
            let mut out = String::new();
            for id in tokenizer.encode(text, false).expect("ids") {
                let piece = stream.push(id).unwrap_or_default();
                assert!(!piece.contains(char::REPLACEMENT_CHARACTER));
                out += &piece;
            }
            assert_eq!(stream.finish(), None);
            assert_eq!(out, text);
        }
    }

    #[test]
    fn bytes_that_never_become_a_character_are_given_up_in_time() {
        let tokenizer = Tokenizer::from_json(&tiny_tokenizer_json(&TinyModel::default())).expect("tokenizer");
        let broken = tokenizer.encode("\u{1F980}", false).expect("ids").first().copied().expect("a byte");
        let mut stream = tokenizer.decode_stream();
        let out: String = (0..32).filter_map(|_| stream.push(broken)).collect();
        assert!(out.contains(char::REPLACEMENT_CHARACTER));
    }
}
