use crate::{Error, Result, dense::linear::load_checked, error::check_len};
use std::collections::BTreeSet;
use thermocline_datasets::Checkpoint;

/// Tables up to this size are kept in memory; rows of larger ones are read as they are needed.
pub(crate) const WHOLE_TABLE_BYTES_MAX: usize = 1 << 30;

const NAME: &str = "model.embed_tokens.weight";

/// The token embedding, `[vocab_size, hidden_size]`.
pub struct Embedding<'a> {
    checkpoint: &'a dyn Checkpoint,
    table: Option<Vec<f32>>,
    hidden_size: usize,
    vocab_size: usize,
}

impl<'a> Embedding<'a> {
    /// Loads the whole table if it takes less than 1 GiB as f32; otherwise rows are read on demand.
    ///
    /// # Errors
    /// If the tensor is missing, unreadable or of another shape than the configuration says.
    pub fn load(checkpoint: &'a dyn Checkpoint) -> Result<Self> {
        let config = checkpoint.config();
        let (hidden_size, vocab_size) = (config.hidden_size, config.vocab_size);
        let whole = vocab_size.saturating_mul(hidden_size).saturating_mul(4) < WHOLE_TABLE_BYTES_MAX;
        let table = whole.then(|| load_checked(checkpoint, NAME, vocab_size * hidden_size)).transpose()?;
        Ok(Embedding { checkpoint, table, hidden_size, vocab_size })
    }

    /// Rows of `tokens`, `[n_tokens, hidden_size]`.
    ///
    /// # Errors
    /// If an id is outside the vocabulary, or a row cannot be read.
    pub fn rows(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        if let Some(position) = tokens.iter().position(|&id| id as usize >= self.vocab_size) {
            return Err(Error::TokenId { id: tokens[position], position, vocab_size: self.vocab_size });
        }
        match &self.table {
            Some(table) => Ok(self.gather(tokens, |id| id as usize, table)),
            None => self.read(tokens),
        }
    }

    fn gather(&self, tokens: &[u32], row: impl Fn(u32) -> usize, table: &[f32]) -> Vec<f32> {
        let mut out = Vec::with_capacity(tokens.len() * self.hidden_size);
        for &id in tokens {
            let start = row(id) * self.hidden_size;
            out.extend_from_slice(&table[start..start + self.hidden_size]);
        }
        out
    }

    /// Each distinct id once, in file order.
    fn read(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        let ids: Vec<u32> = tokens.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
        let mut table = Vec::with_capacity(ids.len() * self.hidden_size);
        for &id in &ids {
            let row = self.checkpoint.load_rows(NAME, id as usize..id as usize + 1)?;
            check_len(NAME, row.len(), self.hidden_size)?;
            table.extend_from_slice(&row);
        }
        Ok(self.gather(tokens, |id| ids.partition_point(|&other| other < id), &table))
    }
}
