//! Base and delta seen as the final model: what evaluation and `verify` read.

use super::bits::{narrow, widen};
use super::manifest::DeltaKind;
use super::open::Delta;
use crate::{Error, Result, SplitCheckpoint};
use std::ops::Range;
use std::path::Path;
use thermocline_datasets::{Checkpoint, Error as DatasetsError, ModelConfig, TensorInfo};

/// The final model, tensor by tensor as it is asked for; never whole in memory.
pub struct DeltaCheckpoint {
    base: Box<dyn Checkpoint>,
    delta: Delta,
}

impl DeltaCheckpoint {
    /// Puts a delta on the checkpoint that it was made from. Reads the checkpoint's files once, for its digest.
    ///
    /// # Errors
    /// [`Error::WrongSource`] if it was made from another model, [`Error::NotBf16`] if a matrix is not bf16.
    pub fn new(base: Box<dyn Checkpoint>, delta: Delta) -> Result<Self> {
        let digest = base.digest()?;
        Self::over(base, &digest, delta)
    }

    /// Puts a delta on a split of the checkpoint that it was made from. The split must be bf16 throughout: only then
    /// are its bits the checkpoint's.
    ///
    /// # Errors
    /// As [`DeltaCheckpoint::new`].
    pub fn over_split(base: SplitCheckpoint, delta: Delta) -> Result<Self> {
        let digest = base.split().manifest().source.model_digest.clone();
        Self::over(Box::new(base), &digest, delta)
    }

    fn over(base: Box<dyn Checkpoint>, digest: &str, delta: Delta) -> Result<Self> {
        if digest != delta.base_digest() {
            let (path, got) = (delta.dir().to_owned(), delta.base_digest().to_owned());
            return Err(Error::WrongSource { path, got, expected: digest.to_owned() });
        }
        for tensor in &delta.manifest().tensors {
            let matrix = base.info(&tensor.name).is_some_and(|info| info.shape.len() == 2);
            if matrix && tensor.kind != DeltaKind::Vector {
                super::bits::check_dtype(base.as_ref(), &tensor.name)?;
            }
        }
        Ok(Self { base, delta })
    }

    /// The delta.
    pub fn delta(&self) -> &Delta {
        &self.delta
    }

    /// The base.
    pub fn base(&self) -> &dyn Checkpoint {
        self.base.as_ref()
    }

    fn damaged(&self, error: Error) -> DatasetsError {
        let reason = error.to_string();
        DatasetsError::Corrupt { path: self.delta.dir().to_owned(), field: "delta".to_owned(), reason }
    }
}

impl Checkpoint for DeltaCheckpoint {
    fn config(&self) -> &ModelConfig {
        &self.delta.manifest().config
    }

    fn path(&self) -> &Path {
        self.delta.dir()
    }

    fn name(&self) -> String {
        self.delta.manifest().final_model.model.clone()
    }

    fn names(&self) -> Vec<String> {
        self.base.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.base.info(name)
    }

    fn load_rows(&self, name: &str, rows: Range<usize>) -> thermocline_datasets::Result<Vec<f32>> {
        let values = self.base.load_rows(name, rows.clone())?;
        if !self.delta.touches(name) {
            return Ok(values);
        }
        if self.info(name).is_some_and(|info| info.shape.len() == 1) {
            let all = self.delta.vector(name).map_err(|e| self.damaged(e))?.unwrap_or_default();
            return Ok(all.get(rows).map(<[f32]>::to_vec).unwrap_or(values));
        }
        let mut bits = narrow(&values);
        drop(values);
        self.delta.patch_rows(name, rows, &mut bits).map_err(|e| self.damaged(e))?;
        Ok(widen(&bits))
    }

    /// The manifest's checksum: it covers the base's digest and the checksums of everything in the delta.
    fn digest(&self) -> thermocline_datasets::Result<String> {
        Ok(self.delta.manifest().checksum.clone())
    }

    fn tokenizer_json(&self) -> thermocline_datasets::Result<String> {
        let own = self.delta.plain_file("tokenizer.json").map_err(|e| self.damaged(e))?;
        own.map_or_else(|| self.base.tokenizer_json(), Ok)
    }

    /// An empty template in the delta means that the final model has none.
    fn chat_template(&self) -> Option<String> {
        match self.delta.plain_file("chat_template.jinja").ok().flatten() {
            Some(own) => Some(own).filter(|text| !text.is_empty()),
            None => self.base.chat_template(),
        }
    }
}
