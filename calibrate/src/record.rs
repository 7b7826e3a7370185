//! The checkpoint record of a run: which layers are done, and the checksums that prove it.
//!
//! The newest record and the one before it are kept. A record counts only if its own checksum, its layers' files and
//! its hidden states are intact; otherwise the older one is tried, and then the run starts over.

use crate::{
    Error, Result, Settings, Shard,
    error::AtPath,
    hidden::{bytes_digest, file_digest},
    work_dir::{WorkDir, write_atomically},
};
use serde::{Deserialize, Serialize};
use std::{fs, path::Path};

const VERSION: u64 = 1;
const NEWEST: &str = "record.json";
const OLDER: &str = "record.previous.json";

/// What a run is of; resuming with anything else is refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) model_digest: String,
    pub(crate) corpus_digest: String,
    pub(crate) settings: Settings,
    pub(crate) shard: Option<Shard>,
}

impl Identity {
    /// Refuses `now` if it is not this, naming the first thing that changed.
    pub(crate) fn check(&self, now: &Identity, path: &Path) -> Result<()> {
        let differ = |what: &str, was: String, now: String| {
            if was == now {
                return Ok(());
            }
            Err(Error::ResumeMismatch { path: path.to_owned(), what: what.to_owned(), was, now })
        };
        let (a, b) = (&self.settings, &now.settings);
        differ("model", self.model_digest.clone(), now.model_digest.clone())?;
        differ("setting window_len", a.window_len.to_string(), b.window_len.to_string())?;
        differ("setting n_samples", a.n_samples.to_string(), b.n_samples.to_string())?;
        differ("setting sample_run_len", a.sample_run_len.to_string(), b.sample_run_len.to_string())?;
        differ("setting active_share", a.active_share.to_string(), b.active_share.to_string())?;
        differ("setting second_moment", a.second_moment.to_string(), b.second_moment.to_string())?;
        differ("setting attention_moments", a.attention_moments.to_string(), b.attention_moments.to_string())?;
        differ("corpus", self.corpus_digest.clone(), now.corpus_digest.clone())?;
        let shard = |shard: Option<Shard>| shard.map_or_else(|| "whole corpus".to_owned(), |s| s.to_string());
        differ("shard", shard(self.shard), shard(now.shard))
    }
}

/// Progress of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) identity: Identity,
    /// Checksum of the hidden states that the next layer reads.
    pub(crate) hidden_digest: String,
    /// Checksums of the finished layers' files.
    pub(crate) layer_digests: Vec<String>,
    /// Seconds spent so far, over all attempts.
    pub(crate) seconds: f64,
}

#[derive(Serialize, Deserialize)]
struct Sealed {
    version: u64,
    checksum: String,
    /// The record as a JSON text, so that the checksum is over exact bytes.
    record: String,
}

impl Record {
    pub(crate) fn n_layers_done(&self) -> usize {
        self.layer_digests.len()
    }

    /// Makes this the newest record.
    pub(crate) fn save(&self, work: &WorkDir) -> Result<()> {
        let path = work.join(NEWEST);
        if path.exists() {
            write_atomically(&work.join(OLDER), &fs::read(&path).at(&path)?)?;
        }
        let record = serde_json::to_string(self).map_err(std::io::Error::from).at(&path)?;
        let sealed = Sealed { version: VERSION, checksum: bytes_digest(record.as_bytes()), record };
        write_atomically(&path, &serde_json::to_vec(&sealed).map_err(std::io::Error::from).at(&path)?)
    }

    /// The newest record that is intact, if any, and what was wrong with newer ones.
    pub(crate) fn load(work: &WorkDir, now: &Identity, n_layers: usize) -> Result<(Option<Record>, Vec<String>)> {
        let mut notices = Vec::new();
        for name in [NEWEST, OLDER] {
            let path = work.join(name);
            if !path.exists() {
                continue;
            }
            match Record::read(&path) {
                Err(reason) => notices.push(format!("{name}: {reason}")),
                Ok(record) => {
                    record.identity.check(now, &path)?;
                    match record.verify(work, n_layers) {
                        Ok(()) => return Ok((Some(record), notices)),
                        Err(reason) => notices.push(format!("{name}: {reason}")),
                    }
                }
            }
        }
        Ok((None, notices))
    }

    fn read(path: &Path) -> Result<Record, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let sealed: Sealed = serde_json::from_slice(&fs::read(path).map_err(|e| text(&e))?).map_err(|e| text(&e))?;
        if sealed.version != VERSION {
            return Err(format!("version {} is not {VERSION}", sealed.version));
        }
        if sealed.checksum != bytes_digest(sealed.record.as_bytes()) {
            return Err("the checksum is wrong".to_owned());
        }
        serde_json::from_str(&sealed.record).map_err(|e| text(&e))
    }

    fn verify(&self, work: &WorkDir, n_layers: usize) -> Result<(), String> {
        if self.n_layers_done() > n_layers {
            return Err(format!("{} layers of {n_layers}", self.n_layers_done()));
        }
        let files = self.layer_digests.iter().enumerate().map(|(layer, digest)| (layer_file(layer), digest));
        for (name, expected) in files.chain([(hidden_file(self.n_layers_done()), &self.hidden_digest)]) {
            match file_digest(&work.join(&name)) {
                Ok(got) if got == *expected => (),
                Ok(_) => return Err(format!("{name}: the checksum is wrong")),
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(())
    }
}

/// The hidden states that `layer` reads.
pub(crate) fn hidden_file(layer: usize) -> String {
    format!("hidden-{}.f32", layer % 2)
}

/// The finished statistics of `layer`.
pub(crate) fn layer_file(layer: usize) -> String {
    format!("layer-{layer:03}.bin")
}
