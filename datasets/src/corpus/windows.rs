use super::{Continue, Corpus, Piece};
use crate::{Error, Result, Tokenizer};

impl Corpus {
    /// The corpus as token windows of exactly `window_len`: documents are tokenised without special tokens and put
    /// one after the other, with the vocabulary's usual separator between them if it has one, then cut; what is left
    /// over at the end is dropped. At most `max_tokens` tokens are given, and no more of the files is read than that
    /// takes.
    ///
    /// # Errors
    /// If a file cannot be read or tokenised, or there is not enough text for one window.
    pub fn token_windows(&self, tokenizer: &Tokenizer, window_len: usize, max_tokens: usize) -> Result<Vec<Vec<u32>>> {
        let failed = |reason: String| Error::Corpus { path: self.files.first().cloned().unwrap_or_default(), reason };
        let n_windows = max_tokens.checked_div(window_len).unwrap_or(0);
        if n_windows == 0 {
            return Err(failed(format!("{max_tokens} tokens in windows of {window_len} make no window")));
        }
        let separator = tokenizer.document_separator();
        let (mut windows, mut left_over, mut n_tokens) = (Vec::new(), Vec::new(), 0usize);
        let mut between = false;
        self.read(&mut |piece| {
            match piece {
                Piece::EndOfDocument => between = true,
                Piece::Text(text) => {
                    let ids = tokenizer.encode(text, false)?;
                    n_tokens = n_tokens.saturating_add(ids.len());
                    left_over.extend(separator.filter(|_| std::mem::take(&mut between)));
                    left_over.extend(ids);
                }
            }
            let mut full = left_over.chunks_exact(window_len);
            windows.extend(full.by_ref().take(n_windows.saturating_sub(windows.len())).map(<[u32]>::to_vec));
            left_over = full.remainder().to_vec();
            Ok(if windows.len() >= n_windows { Continue::Break(()) } else { Continue::Continue(()) })
        })?;
        if windows.is_empty() {
            return Err(failed(format!("the corpus has {n_tokens} tokens, fewer than one window of {window_len}")));
        }
        Ok(windows)
    }
}
