//! Tokens in, logits out, on a GPU.

use super::audit::GpuAudit;
use super::host_share::{HostCounts, HostShare};
use super::load::{Layer, Model};
use super::plan::GpuPlan;
use super::predict::{GpuPrediction, GpuSpeeds};
use super::prefill::Batch;
use super::sections::TOTALS_BYTES;
use super::token::Parts;
use super::{speeds, token};
use crate::account::{Account, TierBytes};
use crate::audit::{AuditReport, check_audit};
use crate::decoder::{Decoder, Speeds, unknown_token};
use crate::plan::Mode;
use crate::sampler::greedy;
use crate::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use thermocline_kernels::cuda::{Device, Graph, Memory};
use thermocline_split::{Flaw, Split};

/// A model loaded onto a GPU, with one sequence's state.
#[derive(Debug)]
pub struct GpuEngine {
    split: Arc<Split>,
    plan: GpuPlan,
    device: Device,
    model: Model,
    host: Option<HostShare>,
    host_share: f32,
    host_share_given: bool,
    /// Neurons of each layer that are fetched while attention is computed; at most the plan's.
    lookahead: usize,
    token: Graph,
    parts: Parts,
    audit: Option<GpuAudit>,
    /// Tokens in the context.
    len: usize,
    /// Tokens that were ever computed; the caches' clock.
    serial: u32,
    speeds: GpuSpeeds,
    /// The kernels' own counters when they were last read: row by row, as [`Totals`].
    totals: Vec<Totals>,
    account: Account,
}

/// A row of the kernels' counters ([`thermocline_kernels::cuda::launch::WorkList::totals`]).
type Totals = [u64; TOTALS_BYTES / 8];

impl GpuEngine {
    /// Loads what `plan` says. `host_share`, from 0 to 1, is the host threads' share of the cold neurons that are not
    /// cached; `None`: the fastest of several near what the measured speeds of link and threads suggest.
    /// `progress(done, total)` counts layers.
    ///
    /// # Errors
    /// If a file cannot be read or is damaged, or device or host have not the memory.
    pub fn load(
        split: Split,
        plan: GpuPlan,
        device: Device,
        host_share: Option<f32>,
        progress: &dyn Fn(usize, usize),
    ) -> Result<Self> {
        let config = split.manifest().config.clone();
        let is_cold = plan.hot_neurons.iter().any(|&h| h < config.intermediate_size);
        let with_host = is_cold && host_share != Some(0.0);
        if !with_host && plan.request.host_layers.is_some_and(|n| n > 0) {
            let reason = "asks for the CPU's threads, to which --cpu-share 0 leaves nothing; leave one of the two out";
            return Err(Error::Setting { flag: "--cpu-layers", reason: reason.to_owned() });
        }
        let model = Model::load(&split, &plan, &device, with_host, progress)?;
        for layer in model.layers.iter().filter(|l| l.cache.n_sets > 0) {
            device.fill(&layer.cache.slot_of, 0xff)?;
            device.fill(&layer.cache.owner, 0xff)?;
            // -1.7e38 in every place: older than any use.
            device.fill(&layer.cache.key, 0xfe)?;
            device.fill(&layer.cache.used, 0)?;
        }
        let host = with_host
            .then(|| HostShare::start(&split, &model, config.activation, plan.request.base.n_threads))
            .transpose()?;
        let mut serial = 0;
        let speeds = speeds::of_loaded(&split, &plan, &device, &model, host.as_ref(), &mut serial)?;
        let parts = Parts { host: host.is_some(), lookahead: plan.lookahead_neurons > 0 };
        let token = token::record(&device, &config, &plan, &model, parts)?;
        let expected = plan.predict(&speeds);
        let expected_share = if host.is_some() { expected.host_share as f32 } else { 0.0 };
        let totals = vec![[0; 8]; model.scratch.work.totals.len() / TOTALS_BYTES];
        let (split, account) = (Arc::new(split), Account::default());
        let mut engine = Self {
            split,
            lookahead: plan.lookahead_neurons,
            plan,
            device,
            model,
            host,
            host_share: host_share.unwrap_or(expected_share).clamp(0.0, 1.0),
            host_share_given: host_share.is_some(),
            token,
            parts,
            audit: None,
            len: 0,
            serial,
            speeds,
            totals,
            account,
        };
        engine.tune(expected.host_layers)?;
        if engine.lookahead == 0 && engine.plan.lookahead_neurons > 0 {
            engine.parts.lookahead = false;
            engine.token = token::record(&engine.device, &config, &engine.plan, &engine.model, engine.parts)?;
        }
        Ok(engine)
    }

    /// Leaves so many layers to the host's threads, all of their neurons.
    fn leave_to_host(&mut self, n_layers: usize) -> Result<()> {
        self.model.leave_to_host(n_layers);
        if let Some(host) = &self.host {
            host.take_over(&self.model);
        }
        let config = &self.split.manifest().config;
        self.token = token::record(&self.device, config, &self.plan, &self.model, self.parts)?;
        Ok(())
    }

    /// Finds how much to fetch beforehand, how many layers to leave to the host, which of these is near `expected_layers`, and the host's
    /// share of the others that make tokens fastest, unless they were given. The share
    /// is near the expected one, and oftener above than below it: link and threads are measured apart, but share the RAM when they
    /// work together, so that threads are faster where the link is done before them.
    fn tune(&mut self, expected_layers: usize) -> Result<()> {
        const LOOKAHEADS: [f32; 4] = [1.0, 0.6, 0.3, 0.0];
        const STEPS: [f32; 7] = [0.0, 0.05, 0.1, 0.15, 0.2, -0.05, -0.1];
        const LAYER_STEPS: [f32; 5] = [0.0, -0.1, 0.1, -0.2, 0.2];
        let most = self.plan.lookahead_neurons;
        if most > 0 && self.plan.request.lookahead.is_none() {
            let candidates = LOOKAHEADS.map(|share| (share * most as f32) as usize);
            let set = |engine: &mut Self, n| {
                engine.lookahead = n;
                Ok(())
            };
            self.lookahead = self.fastest(&candidates, set)?;
        }
        let possible = if self.host.is_some() { self.model.n_for_host() } else { 0 };
        if possible > 0 {
            let possible = possible as f32;
            let near = |step: f32| (expected_layers as f32 + step * possible).round().clamp(0.0, possible) as usize;
            let n_layers = match self.plan.request.host_layers {
                Some(n) => n,
                None => self.fastest(&LAYER_STEPS.map(near), Self::leave_to_host)?,
            };
            self.leave_to_host(n_layers)?;
        }
        if self.host.is_some() && !self.host_share_given {
            let candidates = STEPS.map(|step| (self.host_share + step).clamp(0.0, 1.0));
            let set = |engine: &mut Self, share| {
                engine.host_share = share;
                Ok(())
            };
            self.host_share = self.fastest(&candidates, set)?;
        }
        self.account = Account::default();
        Ok(())
    }

    /// That of `candidates` with which tokens are fastest; the first, if there is no room for a few tokens.
    fn fastest<T: Copy>(&mut self, candidates: &[T], set: impl Fn(&mut Self, T) -> Result<()>) -> Result<T> {
        const ROUNDS: usize = 3;
        // A slow machine tries fewer.
        const LONG_ENOUGH: Duration = Duration::from_secs(3);
        // Every token of exact mode needs the same, and nearly so, where most of what it needs are sketches.
        let are_alike = self.plan.request.base.mode == Mode::Exact || self.plan.streamed_sketches > 0;
        let n_tokens = if are_alike { 2 } else { 6 };
        if self.context() <= n_tokens {
            return Ok(candidates[0]);
        }
        let mut seconds = vec![f64::INFINITY; candidates.len()];
        let begin = Instant::now();
        for _ in 0..ROUNDS {
            for (&candidate, best) in candidates.iter().zip(&mut seconds) {
                if begin.elapsed() > LONG_ENOUGH {
                    break;
                }
                set(self, candidate)?;
                self.clear();
                let mut token = 1 % self.split.manifest().config.vocab_size as u32;
                // The first one pays for what changed: a graph that the device has not seen, memory that the threads have not.
                token = greedy(&self.forward(token)?);
                // Tokens differ in how much they need; the same ones are compared.
                let begin = Instant::now();
                for _ in 0..n_tokens {
                    token = greedy(&self.forward(token)?);
                }
                *best = best.min(begin.elapsed().as_secs_f64());
            }
        }
        self.clear();
        let fastest = (0..candidates.len()).min_by(|a, b| seconds[*a].total_cmp(&seconds[*b])).unwrap_or_default();
        Ok(candidates[fastest])
    }

    /// What is where.
    pub fn plan(&self) -> &GpuPlan {
        &self.plan
    }

    /// The split that it was loaded from.
    pub fn split(&self) -> &Split {
        &self.split
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Weights that no sound model has.
    pub fn flaws(&self) -> &[Flaw] {
        &self.model.flaws
    }

    /// What it cost so far.
    pub fn account(&self) -> Account {
        self.account
    }

    /// The speeds that were measured so far: when it was loaded and, if that was done, by [`Decoder::speeds`]; of each the fastest.
    pub fn measured(&self) -> GpuSpeeds {
        self.speeds
    }

    /// The host threads' share of the cold neurons that are not cached.
    pub fn host_share(&self) -> f32 {
        self.host_share
    }

    /// Layers whose neurons the host's threads choose and compute by themselves.
    pub fn host_layers(&self) -> usize {
        self.model.layers.iter().filter(|layer| layer.is_hosts).count()
    }

    /// Neurons of each layer that the link fetches while attention is computed.
    pub fn lookahead(&self) -> usize {
        self.lookahead
    }

    /// Whether that share was given, or else found when the model was loaded.
    pub fn host_share_given(&self) -> bool {
        self.host_share_given
    }

    /// What the plan expects at these speeds.
    pub fn predicted(&self) -> GpuPrediction {
        self.plan.predict(&self.speeds)
    }

    /// Tokens in the context.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the context is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets the sequence; the cache keeps its neurons.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// The neurons of the last layer that the last decoded token computed, ascending; for comparison with another engine.
    ///
    /// # Errors
    /// If the device fails.
    pub fn last_active(&self) -> Result<Vec<u32>> {
        if let Some(all) = self.model.layers.last().and_then(Layer::all_neurons) {
            return Ok(all.collect());
        }
        let last = self.model.layers.len() - 1;
        if let Some(host) = self.host.as_ref().filter(|_| self.model.layers[last].is_hosts) {
            return Ok(host.last_chosen(last));
        }
        let work = &self.model.scratch.work;
        let counts: Vec<u32> = self.device.read_all(&work.counts)?;
        let mut ids: Vec<u32> = self.device.read_all(&work.ids)?;
        ids.truncate(counts[5] as usize);
        Ok(ids)
    }

    /// Appends a prompt and returns its last token's logits.
    ///
    /// # Errors
    /// As [`GpuEngine::forward`].
    pub fn prefill(&mut self, prompt: &[u32]) -> Result<Vec<f32>> {
        let (vocab_size, context) = (self.split.manifest().config.vocab_size, self.plan.request.base.context);
        if self.len + prompt.len() > context {
            return Err(Error::PromptTooLong { prompt_tokens: self.len + prompt.len(), context });
        }
        if let Some(&token) = prompt.iter().find(|&&t| t as usize >= vocab_size) {
            return Err(unknown_token(token, vocab_size));
        }
        for tokens in prompt.chunks(self.plan.request.base.batch.clamp(1, context)) {
            let (config, n) = (&self.split.manifest().config, tokens.len());
            let (device, plan, model, past) = (&self.device, &self.plan, &self.model, self.len);
            let batch = Batch { device, config, plan, model, n, past };
            let ran = batch.run(tokens);
            // Also after an error, so that no work is left that uses this sequence.
            self.device.synchronize()?;
            ran?;
            let link_bytes = batch.link_bytes();
            self.account.bytes.host += link_bytes;
            self.account.link_bytes += link_bytes;
            self.account.bytes.device += plan.fixed.matrices + plan.hot_bytes;
            self.len += n;
        }
        if prompt.is_empty() { Ok(Vec::new()) } else { Ok(self.device.read_all(&self.model.scratch.logits)?) }
    }

    /// Appends one token and returns the next one's logits, `[vocab]`.
    ///
    /// # Errors
    /// If the context is full, the token is not in the vocabulary, or the device fails.
    pub fn forward(&mut self, token: u32) -> Result<Vec<f32>> {
        let (vocab_size, context) = (self.split.manifest().config.vocab_size, self.plan.request.base.context);
        if self.len >= context {
            return Err(Error::PromptTooLong { prompt_tokens: self.len + 1, context });
        }
        if token as usize >= vocab_size {
            return Err(unknown_token(token, vocab_size));
        }
        self.serial = self.serial.wrapping_add(1);
        let step = [token, self.len as u32, self.serial, self.host_share.to_bits(), self.lookahead as u32];
        for (word, value) in self.model.mapped.step.words().iter().zip(step) {
            word.store(value, Ordering::Release);
        }
        let before = self.host.as_ref().map(HostShare::counts).unwrap_or_default();
        let audit = self.audit.as_ref().filter(|audit| audit.audit.is_due());
        let is_audited = audit.is_some();
        let started = match audit {
            None => self.token.start(),
            Some(audit) => {
                let config = &self.split.manifest().config;
                token::launch(&self.device, config, &self.plan, &self.model, self.parts, Some(&audit.kept))
            }
        };
        // The device is some kernels away from its first request.
        if let Some(host) = &self.host {
            host.wake();
        }
        // Also after an error, so that no work is left.
        let ran = started.and(self.device.synchronize());
        if let Some(host) = &self.host {
            host.rest()?;
        }
        ran?;
        if let Some(audit) = &mut self.audit {
            if is_audited {
                audit.run(&self.split, &self.device, &self.model, self.host.as_ref())?;
            }
            audit.audit.count();
        }
        self.len += 1;
        let now = self.host.as_ref().map(HostShare::counts).unwrap_or_default();
        self.count(now.since(before));
        let mut logits = vec![0.0; vocab_size];
        self.model.mapped.logits.copy_to(&mut logits);
        Ok(logits)
    }

    /// Adds a token to the account, of which `host` is what the host's threads did.
    fn count(&mut self, host: HostCounts) {
        let config = &self.split.manifest().config;
        let fixed = &self.plan.fixed;
        let n = (config.n_layers * config.intermediate_size) as u64;
        let kv = 2 * 2 * (config.n_layers * config.n_kv_heads * config.head_dim * self.len) as u64;
        let chooser = self.plan.chooser_bytes_per_token - self.model.hosts_sketch_bytes();
        let mut bytes = TierBytes { device: fixed.matrices + chooser + kv, ..TierBytes::default() };
        let a = &mut self.account;
        let since = added(&self.model.mapped.totals, &mut self.totals);
        let before = a.link_bytes;
        let sketches = self.model.copied_bytes();
        a.link_bytes += sketches;
        a.early_link_bytes += sketches;
        // Where single rows are read.
        let (mut n_rows, mut of_rows) = (host.rows, false);
        for layer in &self.model.layers {
            if layer.is_hosts {
                of_rows |= layer.rows.is_some();
                continue;
            }
            if !layer.is_chosen {
                bytes.device += layer.layout.bytes(0..layer.n_hot) as u64;
                a.link_bytes += layer.cold_bytes();
                a.neurons_computed += config.intermediate_size as u64;
                continue;
            }
            for section in &layer.sections {
                let bundle = section.layout.bundle_bytes() as u64;
                let [_, link_rows, cached, hot_rows, ..] = since[section.totals];
                let cached = if layer.rows.is_some() { 0 } else { cached };
                bytes.device += hot_rows * bundle / 3;
                bytes.cache += cached * bundle;
                a.link_bytes += link_rows * bundle / 3;
            }
            let [_, link_rows, cached, hot_rows, host, active, used, fetched] = since[layer.totals];
            if layer.rows.is_some() {
                (n_rows, of_rows) = (n_rows + link_rows + hot_rows, true);
                if let Some(sketch) = layer.sketch().filter(|_| !self.plan.residuals) {
                    // There is no cache; this counts those whose down row was read.
                    bytes.device -= cached * sketch.down_row_bytes();
                }
                continue;
            }
            let early_bytes = fetched * layer.last_section().layout.bundle_bytes() as u64;
            a.link_bytes += early_bytes;
            a.early_link_bytes += early_bytes;
            a.cache_hits += cached;
            // A cache is for what changes from token to token.
            a.cache_misses += if layer.chooser.is_some() { link_rows / 3 + host + used } else { 0 };
            a.foreseen += fetched;
            a.foreseen_used += used;
            a.neurons_computed += active;
            // The others' down rows are the sketch's.
            if let Some(sketch) = layer.sketch() {
                bytes.device -= (active - sketch.first as u64) * sketch.down_row_bytes();
            }
        }
        a.neurons_computed += if of_rows { n_rows / 3 } else { host.chosen };
        bytes.host = a.link_bytes - before + host.bytes;
        a.host_sketch_bytes += host.sketch_bytes;
        a.neurons_total += n;
        a.bytes.device += bytes.device;
        a.bytes.cache += bytes.cache;
        a.bytes.host += bytes.host;
    }
}

/// What the kernels have counted since `before`, which is moved on: they add up since the model was loaded.
fn added(counters: &Memory, before: &mut [Totals]) -> Vec<Totals> {
    let half = |word: &AtomicU32| u64::from(word.load(Ordering::Relaxed));
    let of_row = |(row, before): (&[AtomicU32], &mut Totals)| {
        let now = std::array::from_fn(|i| half(&row[2 * i]) | half(&row[2 * i + 1]) << 32);
        let since = std::array::from_fn(|i| now[i] - before[i]);
        *before = now;
        since
    };
    counters.words().chunks_exact(TOTALS_BYTES / 4).zip(before).map(of_row).collect()
}

impl Decoder for GpuEngine {
    fn split(&self) -> &Split {
        self.split()
    }

    fn mode(&self) -> Mode {
        self.plan.request.base.mode
    }

    fn always_neurons(&self) -> usize {
        self.plan.always_neurons
    }

    fn context(&self) -> usize {
        self.plan.request.base.context
    }

    fn len(&self) -> usize {
        self.len
    }

    fn clear(&mut self) {
        self.clear();
    }

    fn prefill(&mut self, prompt: &[u32]) -> Result<Vec<f32>> {
        self.prefill(prompt)
    }

    fn decode(&mut self, token: u32) -> Result<Vec<f32>> {
        self.forward(token)
    }

    fn account(&self) -> Account {
        self.account
    }

    fn start_audit(&mut self, every: usize) -> Result<()> {
        check_audit(every, self.mode())?;
        let config = &self.split.manifest().config;
        let n_threads = self.plan.request.base.n_threads;
        let audit = (every > 0).then(|| GpuAudit::new(&self.device, config, every, n_threads));
        self.audit = audit.transpose()?;
        Ok(())
    }

    fn audit(&self) -> Option<AuditReport> {
        self.audit.as_ref().map(|audit| audit.audit.report())
    }

    fn audit_time(&self) -> Duration {
        self.audit.as_ref().map_or(Duration::ZERO, |audit| audit.audit.time())
    }

    fn speeds(&mut self) -> Result<Speeds> {
        let finite = |speed: f64| (speed.is_finite() && speed > 0.0).then_some(speed);
        // The moment of loading may have been a slow one.
        let host = self.host.as_ref();
        let now = speeds::of_loaded(&self.split, &self.plan, &self.device, &self.model, host, &mut self.serial)?;
        self.speeds = self.speeds.or_faster(now);
        let s = self.speeds;
        let link = finite(s.link.max(s.copies));
        Ok(Speeds { device: finite(s.device), link, ram: finite(s.host), sketches: finite(s.sketches), disk: None })
    }

    fn flaws(&self) -> &[Flaw] {
        self.flaws()
    }

    fn plan_json(&self) -> serde_json::Value {
        serde_json::json!(self.plan)
    }

    fn warnings(&self) -> Vec<String> {
        let emulated = self.device.is_emulated().then(|| "the GPU is emulated on the CPU".to_owned());
        emulated.into_iter().collect()
    }
}
