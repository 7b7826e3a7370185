//! A base model and an adapter seen as the model that they make together.

use super::bits::{narrow, widen};
use super::low_rank::Factors;
use rayon::prelude::*;
use std::ops::Range;
use std::path::Path;
use thermocline_datasets::huggingface::LoraAdapter;
use thermocline_datasets::{Checkpoint, ModelConfig, Result, TensorInfo};

/// The base with the adapter folded in, row by row as rows are asked for ([`super::fold_row`]).
pub struct AdapterCheckpoint<'a> {
    base: &'a dyn Checkpoint,
    adapter: &'a LoraAdapter,
}

impl<'a> AdapterCheckpoint<'a> {
    /// Takes an adapter that was opened for `base`.
    pub fn new(base: &'a dyn Checkpoint, adapter: &'a LoraAdapter) -> Self {
        Self { base, adapter }
    }
}

impl Checkpoint for AdapterCheckpoint<'_> {
    fn config(&self) -> &ModelConfig {
        self.base.config()
    }

    fn path(&self) -> &Path {
        self.adapter.path()
    }

    fn names(&self) -> Vec<String> {
        self.base.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.base.info(name)
    }

    fn load_rows(&self, name: &str, rows: Range<usize>) -> Result<Vec<f32>> {
        let values = self.base.load_rows(name, rows.clone())?;
        let Some(factors) = self.adapter.factors(name)? else { return Ok(values) };
        let factors = Factors::of_adapter(&factors, self.adapter.rank(), self.adapter.scale());
        let mut bits = narrow(&values);
        let columns = bits.len() / rows.len().max(1);
        let each = bits.par_chunks_exact_mut(columns.max(1)).zip(rows);
        each.for_each_init(Vec::new, |acc, (bits, row)| factors.fold(row, bits, acc));
        Ok(widen(&bits))
    }

    /// The adapter's own.
    fn digest(&self) -> Result<String> {
        self.adapter.digest()
    }

    fn tokenizer_json(&self) -> Result<String> {
        self.adapter.tokenizer_json()?.map_or_else(|| self.base.tokenizer_json(), Ok)
    }

    fn chat_template(&self) -> Option<String> {
        self.base.chat_template()
    }
}
