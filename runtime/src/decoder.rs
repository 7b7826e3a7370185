//! Tokens in, logits out, on whatever computes: what generation, evaluation and measurement need of an engine.

use crate::account::{Account, HostParts, TierBytes};
use crate::audit::AuditReport;
use crate::chooser::{check_max_error, has_sketches};
use crate::engine::{Engine, Logits};
use crate::plan::Mode;
use crate::{Error, Result};
use serde::Serialize;
use std::time::Duration;
use thermocline_split::{Flaw, Split};

/// An engine with one sequence's state.
pub trait Decoder {
    /// The split that it was loaded from.
    fn split(&self) -> &Split;
    /// How it chooses neurons.
    fn mode(&self) -> Mode;
    /// Whether sparse mode chooses by the split's sketches, and lets these stand for the neurons that it leaves out.
    fn is_graded(&self) -> bool {
        has_sketches(self.split())
    }
    /// The first neurons of each layer, which every token of sparse mode computes without their being chosen.
    fn always_neurons(&self) -> usize;
    /// The share of a layer that these are.
    fn always_share(&self) -> f64 {
        self.always_neurons() as f64 / self.split().manifest().config.intermediate_size as f64
    }
    /// Tokens that its context holds.
    fn context(&self) -> usize;
    /// Tokens in the context.
    fn len(&self) -> usize;
    /// Whether the context is empty.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Forgets the sequence.
    fn clear(&mut self);
    /// Appends a prompt and returns its last token's logits, `[vocab]`. Prompts are computed densely in either mode.
    ///
    /// # Errors
    /// If the prompt does not fit in the context, or disk or device fail.
    fn prefill(&mut self, prompt: &[u32]) -> Result<Vec<f32>>;
    /// Appends one token and returns the next one's logits, `[vocab]`.
    ///
    /// # Errors
    /// As [`Decoder::prefill`].
    fn decode(&mut self, token: u32) -> Result<Vec<f32>>;
    /// What it cost so far.
    fn account(&self) -> Account;
    /// Starts audits of the first token that is decoded and of every one `every` tokens after it; none if `every` is 0.
    ///
    /// # Errors
    /// If its mode has nothing to audit.
    fn start_audit(&mut self, every: usize) -> Result<()>;
    /// Lets sparse mode compute fewer neurons where sketches expect an error below `error`.
    ///
    /// # Errors
    /// If this engine has no sketches, or the number is out of range.
    fn limit_error(&mut self, error: f32) -> Result<()> {
        check_max_error(error, self.mode(), false, 0, &[])
    }
    /// What audits found since they were started; `None` if there are none.
    fn audit(&self) -> Option<AuditReport>;
    /// What audits took since they were started: part of the time that decoding took.
    fn audit_time(&self) -> Duration;
    /// The speeds of what it reads from, measured now or when it was loaded.
    ///
    /// # Errors
    /// If a file cannot be read.
    fn speeds(&mut self) -> Result<Speeds>;
    /// Weights that no sound model has.
    fn flaws(&self) -> &[Flaw];
    /// Its plan, for machines.
    fn plan_json(&self) -> serde_json::Value;
    /// What a user must know before believing the figures.
    fn warnings(&self) -> Vec<String>;
}

/// Bytes a second of everything that weights are read from; `None` for what is not used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Speeds {
    /// Device memory.
    pub device: Option<f64>,
    /// Pinned memory, read by the device.
    pub link: Option<f64>,
    /// RAM, read by the threads.
    pub ram: Option<f64>,
    /// The same of sketches, where a GPU's threads read any.
    pub sketches: Option<f64>,
    /// The disk.
    pub disk: Option<f64>,
}

impl Speeds {
    /// The least time in seconds for these bytes, and what sets it. RAM and disk are read at the same time, and so are
    /// link and RAM; device memory comes on top, because a layer's attention must end before its neurons are known, but
    /// for what the link fetches early. With a GPU `of_host` are parts of `bytes.host`.
    pub fn limit(&self, bytes: TierBytes, of_host: HostParts) -> (f64, &'static str) {
        let seconds = |bytes: u64, speed: Option<f64>| speed.map_or(0.0, |s| bytes as f64 / s);
        let Some(_) = self.device else {
            let (ram, disk) = (seconds(bytes.host + bytes.cache, self.ram), seconds(bytes.disk, self.disk));
            return if disk > ram { (disk, "disk") } else { (ram, "RAM") };
        };
        let device = seconds(bytes.device + bytes.cache, self.device);
        let rows = bytes.host.saturating_sub(of_host.link + of_host.sketches);
        let link = seconds(of_host.link, self.link);
        let ram = seconds(rows, self.ram) + seconds(of_host.sketches, self.sketches);
        let name = match (device > link.max(ram), ram > 0.0) {
            (true, _) => "VRAM",
            (false, true) => "VRAM + link and RAM",
            (false, false) => "VRAM + link",
        };
        let early = device.min(seconds(of_host.early_link, self.link));
        (device + (link - early).max(ram), name)
    }
}

impl Decoder for Engine {
    fn split(&self) -> &Split {
        self.split()
    }

    fn mode(&self) -> Mode {
        self.plan().request.mode
    }

    fn always_neurons(&self) -> usize {
        self.plan().always_neurons
    }

    fn context(&self) -> usize {
        self.plan().request.context
    }

    fn len(&self) -> usize {
        self.len()
    }

    fn clear(&mut self) {
        self.clear();
    }

    fn prefill(&mut self, prompt: &[u32]) -> Result<Vec<f32>> {
        self.prefill(prompt)
    }

    fn decode(&mut self, token: u32) -> Result<Vec<f32>> {
        self.forward(&[token], Logits::Last)
    }

    fn account(&self) -> Account {
        self.account()
    }

    fn start_audit(&mut self, every: usize) -> Result<()> {
        self.start_audit(every)
    }

    fn limit_error(&mut self, error: f32) -> Result<()> {
        self.limit_error(error)
    }

    fn audit(&self) -> Option<AuditReport> {
        self.audit()
    }

    fn audit_time(&self) -> Duration {
        self.audit_time()
    }

    fn speeds(&mut self) -> Result<Speeds> {
        let ram = Some(self.measure_ram_speed());
        Ok(Speeds { ram, disk: self.measure_disk_speed()?, ..Speeds::default() })
    }

    fn flaws(&self) -> &[Flaw] {
        self.flaws()
    }

    fn plan_json(&self) -> serde_json::Value {
        serde_json::json!(self.plan())
    }

    fn warnings(&self) -> Vec<String> {
        let mut out = Vec::new();
        if self.plan().streams() && !self.reads_are_direct() {
            out.push(
                "this file system has no direct reads; the page cache holds weights beyond --ram-budget".to_owned(),
            );
        }
        out
    }
}

/// The error for a token that the vocabulary does not have.
pub(crate) fn unknown_token(token: u32, vocab_size: usize) -> Error {
    Error::Setting { flag: "prompt", reason: format!("token {token} of a vocabulary of {vocab_size}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_has_each_part_at_its_own_speed() {
        let speeds = Speeds { device: Some(100.0), link: Some(10.0), ram: Some(20.0), sketches: Some(5.0), disk: None };
        let bytes = TierBytes { device: 100, host: 100, ..TierBytes::default() };
        let limit = |link, early_link, sketches| speeds.limit(bytes, HostParts { link, early_link, sketches });
        // All of the host's by threads as rows; half over the link; a fifth of it as sketches, which are slower.
        assert_eq!(limit(0, 0, 0), (1.0 + 5.0, "VRAM + link and RAM"));
        assert_eq!(limit(80, 0, 0), (1.0 + 8.0, "VRAM + link and RAM"));
        assert_eq!(limit(20, 0, 20), (1.0 + 3.0 + 4.0, "VRAM + link and RAM"));
        // What comes early comes while the device is busy.
        assert_eq!(limit(100, 5, 0), (1.0 + 9.5, "VRAM + link"));
        assert_eq!(limit(100, 50, 0), (1.0 + 9.0, "VRAM + link"));
        let on_cpu = Speeds { ram: Some(20.0), disk: Some(1.0), ..Speeds::default() };
        assert_eq!(on_cpu.limit(TierBytes { disk: 7, ..bytes }, HostParts::default()), (7.0, "disk"));
    }
}
